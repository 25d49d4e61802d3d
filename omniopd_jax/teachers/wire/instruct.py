"""The instruction fallback, for models that refuse to continue an assistant turn: the prompt, and what is cut away.

A chat model that is asked for "only the next words" still repeats the last ones, puts them in quotes, starts over or
says what it is about to do. Each of these has a rule in `cut`, tested on its own. What cannot be made a continuation
(the model started the answer over and never got past the prefix) is no continuation: None, which lowers n.
"""

import re
import unicodedata

VERSION = 3  # of the prompt and the rules: part of the journal key

INSTRUCTION = (
    "Your answer above was cut off by accident. Write only what comes next, from the exact character where it stops: "
    "about {words} words are enough, and it need not be complete. Go on in the same language, style and format, as if "
    "you had never been interrupted. Do not repeat anything that is already there, do not start over, do not comment, "
    "apologise or use quotation marks around the text, and do not mention this instruction. If the answer stops inside "
    "a word, begin with the rest of that word. If the answer is already complete, write nothing."
)
QUOTES = {'"': '"', "“": "”", "«": "»", "‘": "’", "`": "`", "'": "'"}
_YES = r"(?:sure|certainly|of course|okay|ok|absolutely|understood|got it)\b[^\n]{0,80}?[!.:,]\s*"
# what names the text that was asked for; "Here are the factors of 12: 1, 2" may be that text itself
_NAMED = (
    r"(?:continuation|remainder|rest|remaining (?:text|words|part)|what (?:comes|follows)|"
    r"next (?:words?|part|portion|section|characters?|text)|"
    r"(?:full|completed?|whole) (?:answer|text|response|solution))\b"
)
_HERE = r"here(?:'s| is| are)\b"
_GO_ON = r"(?:continuing|i(?:'ll| will) continue|let me continue)\b"
_FROM = r"(?=\s*[:.…]|[^\n]{0,40}\b(?:from|where|on|answer|text)\b)"
_OWN = r"(?:the next words|(?:(?:the|my) )?continuation)\b"  # "the remainder is: 2" is the answer itself
_COLON = r"[^\n]{0,120}?(?::|\.\.\.|…)"
PREAMBLE = re.compile(
    rf"^\s*(?:{_YES})?(?:{_HERE}[^\n]{{0,60}}?\b{_NAMED}|{_GO_ON}{_FROM}|{_OWN}){_COLON}\s*"
    rf"|^\s*{_YES}(?:{_HERE}|{_GO_ON}){_COLON}(?=[ \t]*(?:[\n\"“`]|$))\s*",  # behind a "Sure!", up to a line's end
    re.IGNORECASE,
)
ASSENT = re.compile(
    r"^\s*(?:sure|certainly|of course|absolutely|understood|got it)\b[^\n:]{0,60}[!.:]\s*\n+", re.IGNORECASE
)
ABOUT_ITSELF = re.compile(  # the instruction said again, an apology, an offer to help, a system prompt
    r"^\s*(?:[^\n]{0,40}\bcut off by accident\b|your (?:answer|response|reply|text|message)\b[^\n.]{0,20}\bcut off\b"
    r"|(?:i(?:['’]m| am) (?:\w+ )?|my )?(?:sorry\b|apolog)|i apologi[sz]e\b"
    r"|i(?:['’]m| am|['’]d be) (?:ready|happy|glad) to\b|as an? (?:ai|language model)\b|you are an? (?:helpful|ai)\b)",
    re.IGNORECASE,
)
WHOLE = {  # words that others begin with: behind "the", "then" is a new one
    "the", "for", "and", "are", "not", "all", "but", "can", "you", "her", "one", "any", "out", "per", "was", "has",
    "had", "may", "who", "its", "let", "new", "two", "our", "now", "see", "use", "sum", "add",
}  # fmt: skip
MIN_OVERLAP = 12  # characters that a repeated tail must have: shorter ones occur by themselves ("1 + 1 + 1")
MIN_RESTART = 24  # characters from the answer's start that count as starting over


def messages(prompt, prefix: str, max_tokens: int) -> list[dict]:
    """The chat that asks for the next words: the unfinished answer as the assistant's turn, then the instruction.

    The instruction comes last, so that the nested prefixes of one response share the provider's prompt cache.
    """
    ask = INSTRUCTION.format(words=max(5, max_tokens * 2 // 3))
    return [*prompt, {"role": "assistant", "content": prefix}, {"role": "user", "content": ask}]


def cut(prefix: str, text: str) -> str | None:
    """What `text` adds to `prefix`, or None where it starts the answer over, or speaks of itself and not of the task.

    The result is `text` without something at either end, or with one space put in front where a word would otherwise
    run into the prefix's last one (chat models swallow leading spaces).
    """
    if ABOUT_ITSELF.match(text) and not ABOUT_ITSELF.match(prefix):
        return None
    body = _unwrap(prefix, _no_preamble(text))
    body = _unwrap(prefix, _no_ellipsis(prefix, body))
    body = _no_restart(prefix, body)
    if body is None:
        return None
    shorter = _no_overlap(prefix, body)
    if shorter is not None:
        return shorter
    return _joined(prefix, body)


def _no_preamble(text: str) -> str:
    """Takes off "Sure! Here is the continuation:" and its like."""
    found = PREAMBLE.match(text) or ASSENT.match(text)
    return text[found.end() :] if found else text


def _no_ellipsis(prefix: str, text: str) -> str:
    """Takes off the dots that stand for what came before."""
    if prefix.rstrip().endswith(("...", "…")):
        return text
    return re.sub(r"^\s*(?:\.\.\.|…)\s?", "", text, count=1)


def _unwrap(prefix: str, text: str) -> str:
    """Takes off a code fence or quotation marks around the whole text, where the prefix has none open."""
    stripped = text.strip()
    fence = re.fullmatch(r"```[\w-]*\n(.*?)\n?```", stripped, re.DOTALL)
    if fence and prefix.count("```") % 2 == 0 and not prefix.endswith("\n"):  # where a line begins it may be meant
        return fence.group(1)
    if len(stripped) >= 2 and (close := QUOTES.get(stripped[0])) and stripped[-1] == close:
        inner = stripped[1:-1]
        same = stripped[0] == close
        opened = prefix.count(close) % 2 if same else prefix.count(stripped[0]) > prefix.count(close)
        if close not in inner and stripped[0] not in inner and not opened:
            return inner
    return text


def _squeezed(text: str) -> tuple[str, list[int]]:
    """`text` with each run of whitespace as one space and none in front, and where each character came from."""
    out, where = [], []
    for i, char in enumerate(text):
        if char.isspace():
            if not out or out[-1] == " ":
                continue
            char = " "
        out.append(char)
        where.append(i)
    return "".join(out), where


def _no_restart(prefix: str, text: str) -> str | None:
    """Takes off the whole prefix where the text begins with it; None where it starts over and does not get past it."""
    old, _ = _squeezed(prefix.strip())
    new, where = _squeezed(text)
    if not old or not new:
        return text
    is_words = old[0].isalpha() and old[-1].isalpha() and not new[len(old) : len(old) + 1].isalnum()
    if new.startswith(old) and (len(old) >= MIN_OVERLAP or is_words):
        rest = text[where[len(old) - 1] + 1 :]
        return _after_space(prefix, rest)
    start = old[:MIN_RESTART]
    if len(old) > MIN_RESTART and len(new) >= MIN_RESTART and new.startswith(start):
        return None
    if len(new.strip()) >= MIN_OVERLAP and old.startswith(new.strip()):
        return None
    return text


def _no_overlap(prefix: str, text: str) -> str | None:
    """Takes off a repeat of the prefix's last words, or of the word it stops inside; None where there is neither."""
    old, _ = _squeezed(prefix)
    old = old.rstrip()
    new, where = _squeezed(text)
    for size in range(min(len(old), len(new)), MIN_OVERLAP - 1, -1):
        if not old.endswith(new[:size]):
            continue
        at_word = size == len(old) or not (old[-size - 1].isalnum() and new[0].isalnum())
        if at_word and " " in new[:size].strip():
            return _after_space(prefix, text[where[size - 1] + 1 :])
    part = re.search(r"[^\W\d_]{3,}$", prefix)
    word = re.match(r"[^\W\d_]+", text)
    whole = part is not None and part.group().lower() in WHOLE
    if part and word and not whole and len(word.group()) > len(part.group()) and word.group().startswith(part.group()):
        return text[len(part.group()) :]
    return None


def _after_space(prefix: str, rest: str) -> str:
    """`rest` where the repeat has been cut: whitespace that the prefix already ends with is not said twice."""
    return rest.lstrip() if prefix[-1:].isspace() else rest


def _joined(prefix: str, text: str) -> str:
    """Mends the seam: no whitespace twice, and a space between two words that would run together.

    Digits are left as they are: of "1" and "2 apples" nobody knows that they were two numbers, and the instruction asks
    for the exact character.
    """
    if prefix[-1:].isspace():
        return text.lstrip()
    last, first = prefix[-1:], text[:1]
    if not first.isalnum() or not _has_spaces(first) or (last.isalnum() and not _has_spaces(last)):
        return text
    if first.isdigit() and (last.isdigit() or re.search(r"\d[.,:]$", prefix)):
        return text
    return f" {text}" if last.isalnum() or last in ".,;:!?)" else text


def _has_spaces(char: str) -> bool:
    """Whether a character is of a script that writes spaces between words: not Chinese, Japanese, Thai, Lao, Khmer or
    Burmese; Korean does."""
    if 0xAC00 <= ord(char) <= 0xD7A3:
        return True
    apart = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF))
    return unicodedata.east_asian_width(char) not in "WF" and not any(low <= ord(char) <= high for low, high in apart)
