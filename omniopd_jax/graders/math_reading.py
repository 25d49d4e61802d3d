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
JOIN = r"(?:and|or|og|und|(?<=\d )y(?= \d)|\\&|&|\\land|\\lor|\\wedge|\\vee)"
BETWEEN_BOXES = re.compile(
    rf"(?:\s|\$|,|;|{SPACE}|\\[()\[\]]|\b(?:and|or)\b|\\(?:text|mbox|textrm|mathrm|textbf)\s*\{{[\s,;]*(?:and|or)?[\s,;]*\}}"
    r"|&|\\(?:land|lor|wedge|vee)\b|\*\*)*"
)
PHRASE = re.compile(
    r"(?is)\b(?:answers?|(?:correct|right|best)\s(?:option|choice))\s*(?:is|are|:|=)\s*:?\s*|答案\s*(?:是|为|:)\s*:?\s*"
)
WRAPS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
TEXT_COMMAND = re.compile(
    r"\\(?:text|mbox|mathrm|textbf|mathbf|operatorname|textit|mathit|textrm|bf|boldsymbol|mathsf|emph)\s*\{([^{}]*)\}"
)
NOT_WORDS = r"\\[A-Za-z]+|\b(?:pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|inf|infty|and|or|in|cup|frac)\b"
SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": r"^{\circ}", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ",
    "±": r"\pm ", "∓": r"\mp ", "∈": r"\in ", "∣": r"\mid ", "，": ",", "；": ";", "：": ":", "（": "(", "）": ")",
    "≈": r"\approx ", "€": "", "£": "", "¥": "", "₹": "", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
SUPERSCRIPTS, SAME = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+"
MANY = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
AMOUNT_OF_MANY = re.compile(
    r"(?i)(?<![\d.,\w])(\d[\d,]*+(?:\.\d++)?)(\s*+(?:\\[ ,;])?)(\\(?:text|mbox|mathrm|textrm)\s*+\{\s*+)?("
    + "|".join(MANY)
    + r")s?\b"
)
BRACKETS = {"(": 1, "[": 1, "\\{": 1, ")": -1, "]": -1, "\\}": -1}
LISTED = re.compile(r"\d{3}(?:,\d{3}){2,}")  # a list as well as a number: 100,200,300
INDIAN = re.compile(r"[-+]?\d{1,2}(?:,\d\d)+,\d{3}(?:\.\d*)?")
MIXED = re.compile(r"([-+]?)\s*(\d+)(?:\s|\\[ ,;]|~)+(\d+)\s*/\s*(\d+)")
SCIENTIFIC = re.compile(
    r"([-+]?\s*(?:\d+(?:\.\d*)?|\.\d+))\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:(\d)|\{\s*([-+]?\d{1,3})\s*\})"
)
SPACED_THOUSANDS = re.compile(r"(?<![\d,.] )(?<![\d,.])\d{1,3}(?: \d{3})+(?![\d ]*[/\d])")
WITH_BASE = re.compile(r"\s*([-+]?)\(?([0-9A-Z]+)(?:\.([0-9A-Z]+))?\)?_(?:(\d)|\{\s*(\d+)\s*\})\s*")
NUMBER = re.compile(r"([-+]?)\s*(\d*)(?:\.(\d*))?(?:\s*(?:/|\\div)\s*(\d+))?\s*(\\?%|percent)?")
FRACTION = re.compile(r"([-+]?)\s*\\[dtc]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(\\?%)?")
_FRACTION = r"\\[dt]?frac\s*\{-?\d+\}\s*\{\d+\}"
AMOUNT = re.compile(rf"-?(?:[\d.,/ ]|{_FRACTION})*+")
WORDS = re.compile(r"(?:[A-Za-z]++(?:\^\{?\d\}?)?|[\s./()!'-])++")
# what may follow a number without a space
UNITS = frozenset((
    "km", "cm", "mm", "nm", "kg", "mg", "ml", "kl", "ft", "in", "mi", "lb", "lbs", "oz", "yd", "sec", "secs",
    "min", "mins", "hr", "hrs", "day", "days", "mph", "kph", "rpm", "usd", "eur", "gbp", "inr", "deg", "rad",
    "mol", "kwh", "sq", "cubic", "square", "meter", "meters", "metre", "metres", "kilometer", "kilometers",
    "kilometre", "kilometres", "centimeter", "centimeters", "centimetre", "centimetres", "millimeter",
    "millimeters", "inch", "inches", "foot", "feet", "yard", "yards", "mile", "miles", "gram", "grams",
    "kilogram", "kilograms", "pound", "pounds", "ounce", "ounces", "ton", "tons", "liter", "liters", "litre",
    "litres", "gallon", "gallons", "pint", "pints", "quart", "quarts", "cup", "cups", "second", "seconds",
    "minute", "minutes", "hour", "hours", "week", "weeks", "month", "months", "year", "years", "dollar",
    "dollars", "cent", "cents", "euro", "euros", "degree", "degrees", "radian", "radians", "unit", "units",
))  # fmt: skip
SHORT_WORDS = frozenset((
    "a", "an", "all", "and", "are", "at", "both", "by", "each", "egg", "for", "has", "her", "his", "in", "is",
    "it", "man", "men", "of", "off", "on", "out", "per", "pen", "the", "too", "was", "we",
))  # fmt: skip
LETTER_UNITS = frozenset("msghlL")  # where a space parts them from the number: 10 m, 10 m/s
LEADING_TEXT = re.compile(r"\s*\\text\s*\{([^{}\d()]*)\}\s*(?=[\d\\(-])")
_THAN = "(?:more|less|fewer|greater|larger|smaller|higher|lower)"
# words beside a number that make it another one, and words that say which of two things it is of
TURNS_BEFORE = re.compile(rf"(?i)\b(?:not|minus|negative|{_THAN} than)\s*:?\s*\Z")
TURNS_BEHIND = re.compile(
    rf"(?i)[\s~{{]*(?:(?:or|,)\s*{_THAN}|squared|cubed|factorial|halves|thirds|fourths|fifths|sixths|sevenths|eighths|ninths|"
    r"tenths|twelfths|sixteenths|hundredths|thousandths|millionths)\b"
)
WHICH = re.compile(
    r"(?i)\b(?:(a|p)\.?m\b|(january|february|march|april|may|june|july|august|september|october|november|december|"
    r"increase|decrease|gain|loss|profit|north|south|east|west)\b)"
)
TRAILING_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textrm)\s*\{[^{}\d]*\}(?:\s*\^\s*\{?\d\}?)?\Z")
LETTERS = re.compile(r"[A-Za-z](?:\s*[A-Za-z])+")  # a word or several, an order of letters
CHOICE = re.compile(r"\(?\s*([A-Ja-j])\s*(?:[).:]\s*(.*)|\)\s*(.*))?", re.DOTALL)
# behind a letter: (A), (B) and A or B choose nothing
ANOTHER = re.compile(r"(?:(?:[,;/&]|or\b|and\b)\s*(?:[A-J]\b|\([A-Ja-j]\))|\([A-Ja-j]\))")
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
    text = re.sub(f"[{SUPERSCRIPTS}]+", lambda m: f"^{{{''.join(SAME[SUPERSCRIPTS.index(c)] for c in m[0])}}}", text)
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


def many(text: str) -> str:
    """`text` with 5 million, 2 dozen, 3 \\text{ thousand} as one number."""

    def product(match):
        value = Fraction(match[1].replace(",", "").rstrip(".")) * MANY[match[4].lower()]
        told = str(value) if value.denominator == 1 else f"{float(value)!r}"
        return told + (match[3] or "")

    return re.sub(r"(\d)\\(?:text|mbox|mathrm|textrm)\s*\{\s*\}", r"\1", AMOUNT_OF_MANY.sub(product, text))


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
    return (
        len(text) <= 300
        and "\n" not in text
        and not re.search(r"[A-Za-z]{3}|[\u3400-\u9fff]", re.sub(NOT_WORDS, " ", text))
    )


def read(text: str) -> tuple[str | None, str, str]:
    """(the answer that `text` gives, the answer as it was written, prose that may hold it) of a response or reference.

    The answer is None, and only the prose is there to be searched, where nothing marks it.
    """
    text = after_thinking(text)
    _, mark, tagged = text.rpartition("<answer>")
    if mark and not BOX.search(text):
        text = tagged.partition("</answer>")[0]
    text = many(text.strip())
    found = boxes(text)
    answer = ", ".join(found)
    last = text.rpartition("\n")[2].strip()
    if not answer and last.startswith("####"):  # GSM8K's way to mark an answer
        text = last.lstrip("#").strip()
        if len(text) <= 300 and not PHRASE.search(text):
            answer = text
    if not answer and len(text) <= LONGEST:
        answer = unwrapped(text) or ""
    if not answer and is_bare(without_text(text)):
        answer = text.rstrip(".")
    if answer:
        return tidy(answer), answer.strip(), ""
    tail = text[-WINDOW:]
    said = list(PHRASE.finditer(tail))
    phrase = re.split(r"\n|。|\.(?:\s|$)", tail[said[-1].end() :], maxsplit=1)[0] if said else ""
    phrase = phrase.strip().strip("*").strip()
    inner = unwrapped(phrase)
    phrase = phrase if inner is None else inner
    if phrase and is_bare(without_text(phrase)):
        return tidy(phrase), phrase, ""
    prose = re.sub(r"\.(\s*\$)", r"\1", tail.replace("\\$", ""))  # an amount; a full stop within a formula
    return None, phrase or (text if len(text) <= 300 else ""), plain_symbols(prose)


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
    answer = re.sub(r"(?<!\d)(\d*+)\.(\d*+)\\(?:overline|bar|dot)\s*\{(\d+)\}", repeating, answer)
    if (said := LEADING_TEXT.match(answer)) and not (TURNS_BEFORE.search(said[1]) or WHICH.search(said[1])):
        answer = answer[said.end() :]
    answer = re.sub(r"(?<=\d)(?:\{,\}|\\,)\s*(?=\d{3})", "", answer)
    answer = re.sub(r"\\text\s*\{\s*(-?\d[\d.,/]*+)([^{}\d]*)\}", r"\1\\text{\2}", answer)
    answer = re.sub(r"\\degree(?![A-Za-z])", r"^{\\circ}", answer).replace("\\varnothing", "\\emptyset")
    answer = re.sub(r"^\s*\\\{\s*\\\}\s*$", r"\\emptyset", answer)
    answer = re.sub(r"\\(?:approx|simeq)(?![A-Za-z])", "=", answer)
    answer = re.sub(r"^\s*=", "", answer)
    answer = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", answer)
    answer = re.sub(r"(\d)\s*+(?:\\text\s*\{\s*percent\s*\}|percent\b)", r"\1\\%", answer)
    answer = re.sub(r"(?<![\w.\\}])(\d++(?:\.\d*+)?|\.\d++)[eE]([+-]?\d{1,3})(?![\w.])", power_of_ten, answer)
    answer = join_thousands(answer)
    return answer.strip().rstrip(".").strip()


def power_of_ten(match) -> str:
    """1.5e-07 as 1.5 times a power."""
    return f"{match[1]} \\times 10^{{{int(match[2])}}}"


def join_thousands(answer: str) -> str:
    """`answer` with 1,234,567 as one number; within brackets, where a comma parts the elements, only if others do."""
    spaced, depth = re.search(r",\s", answer) is not None, 0

    def one(match):
        nonlocal depth
        token = match[0]
        if token in BRACKETS:
            depth = max(0, depth + BRACKETS[token])
        kept = token in BRACKETS or (depth and not spaced) or LISTED.fullmatch(token)
        return token if kept else token.replace(",", "")

    return re.sub(r"\\[{}]|[()\[\]]|(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})++(?!\d|,\d)", one, answer)


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
    """The answers that one answer holds: parted by commas, semicolons, "and", "or"; both signs of a plus-minus; each
    once."""
    return list(dict.fromkeys(listed(answer)))


def listed(answer: str) -> list[str]:
    """As `parts_of`, each as often as it stands there."""
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
    return out


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
    if found := MIXED.fullmatch(text):
        sign, whole, upper, lower = found.groups()
        value = int(whole) + Fraction(int(upper), int(lower)) if int(lower) else None
        return None if value is None else (-value if sign == "-" else value, False)
    if found := SCIENTIFIC.fullmatch(text):
        return Fraction(found[1].replace(" ", "")) * Fraction(10) ** int(found[2] or found[3]), False
    if INDIAN.fullmatch(text) or LISTED.fullmatch(text):
        text = text.replace(",", "")
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


def which(text: str) -> set[str]:
    """The words of a text that say which of several things a number is of: am, pm, a month, an increase."""
    return {(m[1] or m[2]).lower() for m in WHICH.finditer(text)}


def without_units(text: str) -> str:
    """`text` without the words around a number: 18 dollars, 5 \\text{cm}^2, \\text{June } 5."""
    text = text.strip()
    if (said := LEADING_TEXT.match(text)) and not TURNS_BEFORE.search(said[1]):
        text = text[said.end() :]
    for found in TRAILING_TEXT.finditer(text):
        said = found[0].partition("{")[2]
        if re.search(rf"(?i)\b(?:{'|'.join(MANY)}|percent)", said) or TURNS_BEHIND.match(said):
            break
        head = text[: found.start()].rstrip().removesuffix("\\,").removesuffix("\\;").rstrip(" \\")
        words = re.findall("[A-Za-z]+", said)
        if head[-1:].isdigit() or head[-1:] == "}" or (head and all(word.lower() in UNITS for word in words)):
            text = head
    amount = AMOUNT.match(text)[0]
    rest = text[len(amount) :]
    if amount.rstrip()[-1:] not in tuple("0123456789}") or not WORDS.fullmatch(rest) or TURNS_BEHIND.match(rest):
        return text
    words = re.findall("[A-Za-z]+", rest)
    if not words or (amount[-1] != " " and words[0].lower() not in UNITS):
        return text  # 5ab is a product
    return amount.strip() if all(map(is_unit, words)) else text


def is_unit(word: str) -> bool:
    """Whether a word after a number says what is counted, and is no product of variables, which wxyz is."""
    if word.lower().rstrip("s") in MANY or word.lower().startswith("percent"):
        return False
    if word.lower() in UNITS or word.lower() in SHORT_WORDS or word in LETTER_UNITS:
        return True
    ascending = all(a < b for a, b in zip(word, word[1:]))
    return len(word) > 3 and not ascending and word[1:].islower() and bool(re.search("[aeiouy]", word))


def as_string(answer: str) -> str:
    """`answer` as it is compared letter by letter."""
    answer = TEXT_COMMAND.sub(r"\1", answer)
    answer = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\$|\\[()\[\]!]", "", answer)
    answer = re.sub(r"\\(?:[,;: ]|q?quad(?![A-Za-z]))", " ", answer)
    answer = SPACED_THOUSANDS.sub(lambda m: m[0].replace(" ", ""), answer)
    answer = re.sub(r"\{\s*([^{}\\\s])\s*\}", r"\1", answer).strip("* ")  # x^{2} is x^2, x^{2+1} is not x^2+1
    while answer[:1] == "{" and answer[-1:] == "}" and "}" not in answer[1:-1]:
        answer = answer[1:-1]
    answer = re.sub(r"(?<=\d)\s+(?=\d)", "\0", answer)  # 1 1/2 is not 11/2
    answer = re.sub(r"\s", "", answer)
    return answer.replace("dfrac", "frac").replace("tfrac", "frac").rstrip(".").lower()


def choice(answer: str) -> tuple[str, str] | None:
    """(letter, what follows it) of "B", "(B)", "B. 12", "\\textbf{(B)}\\ 12"; None for anything else."""
    plain = re.sub(r"\\[ ,;:!]|~|\\q?quad", " ", TEXT_COMMAND.sub(r"\1", answer)).strip().strip("{}*").strip()
    plain = re.sub(r"(?i)^(?:option|choice)\s+", "", plain)
    found = CHOICE.fullmatch(plain)
    rest = found and (found[2] or found[3] or "").strip()
    return None if found is None or ANOTHER.match(rest) else (found[1].upper(), rest)


def assignments(answer: str) -> dict[str, str]:
    """name -> value of x=1, y=2 and of (x,y)=(1,2), in the order as written; {} for anything else."""
    sides = split_at_top(answer, "=")
    pairs = [bracketed(side) for side in sides] if len(sides) == 2 else [None]
    if all(pairs) and pairs[0][0] == pairs[1][0] == "()" and len(pairs[0][1]) == len(pairs[1][1]) > 1:
        names, values = pairs[0][1], pairs[1][1]
    else:
        found = [ASSIGNED.fullmatch(part) for part in parts_of(answer)]
        if len(found) < 2 or not all(m and "=" in m[0] and not any(s in m[2] for s in "=<>") for m in found):
            return {}
        names, values = [m[1] for m in found], [m[2] for m in found]
    named = dict(zip((re.sub(r"\s", "", name) for name in names), values))
    return named if len(named) == len(names) else {}


def ratio(answer: str) -> list[str]:
    """The numbers of 3:2 and 9:30; [] for anything else."""
    parts = split_at_top(answer, ":")
    plain = re.sub(r"\\[A-Za-z]+", "", answer)
    return parts if len(parts) > 1 and not choice(answer) and not re.search(r"[A-Za-z]{2}|[=<>|]", plain) else []


def in_base(answer: str) -> tuple[str, str] | None:
    """(signed digits, base) of -221_4, 10.2_{3}; None for anything else."""
    found = WITH_BASE.fullmatch(TEXT_COMMAND.sub(r"\1", answer))
    if found is None:
        return None
    whole, point = found[2].lstrip("0") or "0", (found[3] or "").rstrip("0")
    return f"{found[1].replace('+', '')}{whole}{'.' * bool(point)}{point}", str(int(found[4] or found[5]))
