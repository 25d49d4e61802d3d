"""What a response or a reference answer says, as text: its boxes, its parts, its spellings made one. No arithmetic."""

import re
import unicodedata
from fractions import Fraction

from omniopd_jax.graders.program_text import after_thinking

WINDOW = 4000  # characters from the end of a response that are searched where it has no box
LONGEST = 2000  # characters of one answer that sympy may see
MOST_PARTS = 30  # of one answer that are compared one by one
BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
SPACE = r"\\(?:quad|qquad|enspace|thinspace|hfill|newline|,|;|:|!|\\| )|\\hspace\s*\{[^{}]*\}|~"
JOIN = r"(?:and|or|og|und|y|\\&|&|\\land|\\lor|\\wedge|\\vee)"
BETWEEN_BOXES = re.compile(
    rf"(?:\s|\$|,|;|{SPACE}|\\[()\[\]]|\b(?:and|or)\b|\\(?:text|mbox|textrm|mathrm|textbf)\s*\{{[\s,;]*(?:and|or)?[\s,;]*\}}"
    r"|&|\\(?:land|lor|wedge|vee)\b|\*\*)*"
)
PHRASE = re.compile(r"(?is)\banswers?\s*(?:is|are|:|=)\s*:?\s*")
WRAPS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
TEXT_COMMAND = re.compile(
    r"\\(?:text|mbox|mathrm|textbf|mathbf|operatorname|textit|mathit|textrm|bf|boldsymbol|mathsf|emph)\s*\{([^{}]*)\}"
)
NOT_WORDS = r"\\[A-Za-z]+|\b(?:pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|inf|infty|and|or|in|cup|frac)\b"
SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": r"^{\circ}", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ",
    "±": r"\pm ", "∓": r"\mp ", "∈": r"\in ", "∣": r"\mid ", "，": ",", "；": ";", "：": ":", "（": "(", "）": ")",
    "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
WITH_BASE = re.compile(r"\s*([-+]?)\(?([0-9A-Z]+)(?:\.([0-9A-Z]+))?\)?_(?:(\d)|\{\s*(\d+)\s*\})\s*")
NUMBER = re.compile(r"([-+]?)\s*(\d*)(?:\.(\d*))?(?:\s*(?:/|\\div)\s*(\d+))?\s*(\\?%|percent)?")
FRACTION = re.compile(r"([-+]?)\s*\\[dtc]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(\\?%)?")
_FRACTION = r"\\[dt]?frac\s*\{-?\d+\}\s*\{\d+\}"
AMOUNT = re.compile(rf"-?(?:[\d.,/ ]|{_FRACTION})*+")
WORDS = re.compile(r"(?:[A-Za-z]++(?:\^\{?\d\}?)?|[\s./()!'-])++")
UNITS = frozenset(  # what may follow a number without a space
    "km cm mm nm kg mg ml kl ft in mi lb lbs oz yd sec secs min mins hr hrs day days mph kph rpm usd eur gbp inr deg rad mol kwh sq "
    "cubic square meter meters metre metres kilometer kilometers kilometre kilometres centimeter centimeters centimetre centimetres "
    "millimeter millimeters inch inches foot feet yard yards mile miles gram grams kilogram kilograms pound pounds ounce ounces ton "
    "tons liter liters litre litres gallon gallons pint pints quart quarts cup cups second seconds minute minutes hour hours week "
    "weeks month months year years dollar dollars cent cents euro euros degree degrees radian radians unit units".split()
)
SHORT_WORDS = frozenset(
    "a an all and are at both by each egg for has her his in is it man men of off on out per pen the too was we".split()
)
COMPOUND = frozenset(
    "m s h g l L".split()
)  # units of one letter, where a slash says that they are none of the variables
TRAILING_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textrm)\s*\{[^{}\d]*\}(?:\s*\^\s*\{?\d\}?)?\Z")
CHOICE = re.compile(r"\(?\s*([A-Ja-j])\s*(?:[).:]\s*(.*)|\)\s*(.*))?", re.DOTALL)
ASSIGNED = re.compile(
    r"\s*((?:\\[A-Za-z]+|[A-Za-z])(?:_(?:\w|\{\w+\}))?'*(?:\s*\(\s*[a-z]\s*(?:,\s*[a-z]\s*)*\))?)\s*(?:=|\\in\b)\s*(.+)",
    re.DOTALL,
)
SET_BUILDER = re.compile(
    r"\s*\\?\{\s*([A-Za-z])(?:\s*\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\||\\mid\b|\\vert\b|:|\\colon\b)\s*+(.+?)\\?\}\s*",
    re.DOTALL,
)


def plain_symbols(text: str) -> str:
    """Digits of any script, fractions, exponents and operators of Unicode as ASCII and LaTeX."""
    if text.isascii():
        return text
    text = re.sub(f"[{SUPERSCRIPTS}]+", lambda m: f"^{{{''.join(str(SUPERSCRIPTS.index(c)) for c in m[0])}}}", text)
    text = re.sub(r"√\s*(\d+|[A-Za-z]|\([^()]*\))", r"\\sqrt{\1}", text)
    out = []
    for c in text:
        if c in SYMBOLS:
            out.append(SYMBOLS[c])
        elif c.isdecimal():
            out.append(str(unicodedata.decimal(c)))
        elif unicodedata.decomposition(c).startswith("<fraction>"):
            upper, lower = unicodedata.normalize("NFKC", c).split("⁄")
            out.append(f" {upper}/{lower}" if lower else c)
        else:
            out.append(c)
    return "".join(out)


def boxes(text: str) -> list[str]:
    """The contents of the last box, with those that only a comma, a space or an "and" parts from it."""
    contents, start = [], None
    for match in reversed(list(BOX.finditer(text))[-20:]):
        close = closing_brace(text, match.end())
        if close is None:
            continue
        if start is not None and close > start:  # a box around the ones that were found
            contents, start = [text[match.end() : close]], match.start()
            continue
        if start is not None and (start - close > 80 or not BETWEEN_BOXES.fullmatch(text, close + 1, start)):
            break
        contents.insert(0, text[match.end() : close])
        start = match.start()
    return contents


def closing_brace(text: str, start: int) -> int | None:
    """The index of the brace that closes the one before `start`; None where nothing does."""
    depth = 1
    for i in range(start, min(len(text), start + 20 * LONGEST)):
        c = text[i]
        if text[i - 1] == "\\" and text[i - 2] != "\\":
            continue
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return i
    return None


def is_bare(text: str) -> bool:
    """Whether `text` is an answer by itself and not prose that holds one."""
    return len(text) <= 300 and "\n" not in text and not re.search(r"[A-Za-z]{3}", re.sub(NOT_WORDS, " ", text))


def read(text: str) -> tuple[str | None, str, str]:
    """(the answer that `text` gives, the answer as it was written, prose that may hold it) of a response or reference.

    The answer is None, and only the prose is there to be searched, where nothing marks it.
    """
    text = after_thinking(text).strip()
    found = boxes(text)
    answer = ", ".join(found)
    if not answer and len(text) <= LONGEST:
        answer = unwrapped(text) or ""
    if not answer and is_bare(without_text(text)):
        answer = text.rstrip(".")
    if answer:
        return tidy(answer), answer.strip(), ""
    tail = text[-WINDOW:]
    said = list(PHRASE.finditer(tail))
    phrase = re.split(r"\n|\.(?:\s|$)", tail[said[-1].end() :], maxsplit=1)[0] if said else ""
    phrase = phrase.strip().strip("*").strip()
    inner = unwrapped(phrase)
    phrase = phrase if inner is None else inner
    if phrase and is_bare(without_text(phrase)):
        return tidy(phrase), phrase, ""
    return None, phrase or (text if len(text) <= 300 else ""), plain_symbols(tail)


def unwrapped(text: str) -> str | None:
    """What is between the dollars or the like around the whole of `text`; None without them."""
    text = text.strip().removesuffix(".").rstrip()
    for start, end in WRAPS:
        inner = text[len(start) : -len(end)]
        if text == start + inner + end and not (start == "$" and "$" in inner):
            return inner
    return None


def without_text(answer: str) -> str:
    """`answer` without \\text{...} and the names of environments."""
    return re.sub(r"\\(?:begin|end)\s*\{[a-z*]*\}", " ", TEXT_COMMAND.sub(" ", answer))


def tidy(answer: str) -> str:
    """One spelling: no dollars, thousands, sizes, bold; repeating decimals as fractions; words around a number gone."""
    answer = plain_symbols(answer)
    answer = re.sub(r"\\\$|(?<!\\)\$", " ", answer)
    answer = re.sub(r"\\(?:displaystyle|textstyle|bigl|bigr|Bigl|Bigr|big|Big|!)(?![A-Za-z])", "", answer)
    answer = re.sub(r"\\(?:left|right)(?![A-Za-z])\s*\.?", "", answer)
    answer = re.sub(r"\\(?:mathbf|textbf|boldsymbol|bf|mathrm|textrm)\s*\{(\s*\(?[-\d.,/\\%]+\)?\s*)\}", r"\1", answer)
    answer = re.sub(r"(?<!\d)(\d*+)\.(\d*+)\\overline\s*\{(\d+)\}", repeating, answer)
    answer = re.sub(r"^\s*\\text\s*\{[^{}\d()]*\}\s*(?=[\d\\(-])", "", answer)
    answer = re.sub(r"(?<=\d)(?:\{,\}|\\,)\s*(?=\d{3})", "", answer)
    answer = re.sub(r"\\text\s*\{\s*(-?\d[\d.,/]*+)([^{}\d]*)\}", r"\1\\text{\2}", answer)
    answer = re.sub(r"(?<![\d.])(?<!\d,)(\d{1,3}(?:,\d{3})++)(?![\d,])", lambda m: m[1].replace(",", ""), answer)
    return answer.strip().rstrip(".").strip()


def repeating(match) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, start, again = match.groups()
    upper = int(whole + start + again) - int(whole + start or 0)
    return f"\\frac{{{upper}}}{{{(10 ** len(again) - 1) * 10 ** len(start)}}}"


def split_at_top(text: str, separators: str) -> list[str]:
    """`text` cut at characters of `separators` that no bracket, brace or environment encloses."""
    parts, depth, at = [], 0, 0
    text = re.sub(r"\\([{}])", lambda m: "\\lbrace " if m[1] == "{" else "\\rbrace ", text)
    for match in re.finditer(
        r"\\begin\b|\\end\b|\\[lr]brace\b|\\[lr]angle\b|\\.|[\[\](){}]|[" + re.escape(separators) + "]", text
    ):
        token = match[0]
        if token in ("\\begin", "\\lbrace", "\\langle", "(", "[", "{"):
            depth += 1
        elif token in ("\\end", "\\rbrace", "\\rangle", ")", "]", "}"):
            depth -= 1
        elif token in separators and depth <= 0:
            parts.append(text[at : match.start()])
            at = match.end()
    parts.append(text[at:])
    return [part.replace("\\lbrace ", "\\{").replace("\\rbrace ", "\\}").strip() for part in parts]


def bracketed(text: str) -> tuple[str, list[str]] | None:
    """(the two brackets, the elements) of a tuple, an interval, a set; None for anything else."""
    text = text.strip()
    braces = text.startswith("\\{") and text.endswith("\\}")
    inner = text[2:-2] if braces else text[1:-1]
    if not braces and (text[:1] not in ("(", "[") or text[-1:] not in (")", "]")):
        return None
    depth = 0
    for c in re.sub(r"\\\\|\\[^{}]", "", inner).replace("\\{", "(").replace("\\}", ")"):
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return None  # (1,2) \cup (3,4)
    return ("{}" if braces else text[0] + text[-1]), split_at_top(inner, ",")


def parts_of(answer: str) -> list[str]:
    """The answers that one answer holds: parted by commas, semicolons, "and", "or"; both signs of a plus-minus."""
    joined = re.sub(
        rf"\\(?:text|mbox|textrm|mathrm)\s*\{{[\s,;]*{JOIN}[\s,;]*\}}|(?<![A-Za-z\\]){JOIN}(?![A-Za-z])", ",", answer
    )
    joined = re.sub(rf",(?:\s|{SPACE})*,", ",", joined)
    joined = re.sub(r"\\(?:quad|qquad)(?![A-Za-z])|(?<!\\)\\ ", " ", joined)
    braces = re.fullmatch(r"\s*\\\{(.*)\\\}\s*", joined, re.DOTALL)
    if braces and not SET_BUILDER.fullmatch(joined) and "\\}" not in braces[1]:
        joined = braces[1]
    parts = [part for part in split_at_top(joined, ",;") if part]
    out = []
    for part in parts:
        if re.search(r"\\(?:pm|mp)\b", part):
            for sign, other in (("+", "-"), ("-", "+")):
                one = re.sub(r"\\pm\b\s*", sign, re.sub(r"\\mp\b\s*", other, part))
                out.append(re.sub(r"^\s*\+|(?<=[=(\[{,])\s*\+", "", one).strip())
        else:
            out.append(part)
    return list(dict.fromkeys(out))


def number(text: str) -> tuple[Fraction, bool] | None:
    """(value, whether it is a percentage) of a plain number: 1.50, -3/4, \\frac{3}{4}, 50\\%; None for anything
    else."""
    if len(text) > 400:
        return None
    text = TEXT_COMMAND.sub(r"\1", text).strip()
    while len(text) > 2 and text[0] in "({" and text[-1] in ")}" and "(" not in text[1:]:
        text = text[1:-1].strip()
    if not text:
        return None
    if found := NUMBER.fullmatch(text):
        sign, whole, decimals, lower, percent = found.groups()
        if not (whole or decimals):
            return None
        value = Fraction(int((whole or "0") + (decimals or "")), 10 ** len(decimals or ""))
    elif found := FRACTION.fullmatch(text):
        sign, upper, upper_digit, lower, lower_digit, percent = found.groups()
        value, lower = Fraction(int(upper or upper_digit)), lower or lower_digit
    else:
        return None
    if lower is not None:
        if int(lower) == 0:
            return None
        value /= int(lower)
    return (-value if sign == "-" else value), bool(percent)


def without_units(text: str) -> str:
    """`text` without the words after a number: 18 dollars, 5 \\text{cm}^2."""
    text = text.strip()
    for found in TRAILING_TEXT.finditer(text):
        head = text[: found.start()].rstrip().removesuffix("\\,").removesuffix("\\;").rstrip(" \\")
        if head[-1:].isdigit() or head[-1:] == "}":
            text = head
    amount = AMOUNT.match(text)[0]
    rest = text[len(amount) :]
    if amount.rstrip()[-1:] not in tuple("0123456789}") or not WORDS.fullmatch(rest):
        return text
    words = re.findall("[A-Za-z]+", rest)
    if not words or (amount[-1] != " " and words[0].lower() not in UNITS):
        return text  # 5ab is a product
    return amount.strip() if all(is_unit(word, "/" in rest) for word in words) else text


def is_unit(word: str, compound: bool = False) -> bool:
    """Whether a word after a number says what is counted, and is no product of variables, which wxyz is.

    `compound`: between slashes.
    """
    if word.lower() in UNITS or word.lower() in SHORT_WORDS or (compound and word in COMPOUND):
        return True
    ascending = all(a < b for a, b in zip(word, word[1:]))
    return len(word) > 3 and not ascending and word[1:].islower() and bool(re.search("[aeiouy]", word))


def as_string(answer: str) -> str:
    """`answer` as it is compared letter by letter."""
    answer = TEXT_COMMAND.sub(r"\1", answer)
    answer = re.sub(r"\\(?:left|right|displaystyle|,|;|!|:| |quad|qquad)|[\s${}*]|\\[()\[\]]", "", answer)
    return answer.replace("dfrac", "frac").replace("tfrac", "frac").rstrip(".").lower()


def choice(answer: str) -> tuple[str, str] | None:
    """(letter, what follows it) of "B", "(B)", "B. 12", "\\textbf{(B)}\\ 12"; None for anything else."""
    plain = re.sub(r"\\[ ,;:!]|~|\\q?quad", " ", TEXT_COMMAND.sub(r"\1", answer)).strip().strip("{}").strip()
    found = CHOICE.fullmatch(plain)
    return (found[1].upper(), (found[2] or found[3] or "").strip()) if found else None


def in_base(answer: str) -> tuple[str, str] | None:
    """(signed digits, base) of -221_4, 10.2_{3}; None for anything else."""
    found = WITH_BASE.fullmatch(TEXT_COMMAND.sub(r"\1", answer))
    if found is None:
        return None
    whole, point = found[2].lstrip("0") or "0", (found[3] or "").rstrip("0")
    return f"{found[1].replace('+', '')}{whole}{'.' * bool(point)}{point}", str(int(found[4] or found[5]))
