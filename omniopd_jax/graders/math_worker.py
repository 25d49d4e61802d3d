"""The process that compares mathematical answers: run by path (`python -P`), killed and restarted by math.py at will.

Reads one JSON list [text, answer] a line and writes true or false a line. Apart from the process that trains, because
sympy can be sent to compute for hours, because only a process can be stopped for certain, and because the library's own
time limit (SIGALRM) works in a main thread alone; here it is the main thread.
"""

import faulthandler
import json
import logging
import os
import re
import resource
import signal
import sys
import unicodedata

from math_verify import parse, verify
from sympy import Basic, I

WINDOW = 4000  # characters from the end of a response that are searched where it has no box
LONGEST = 2000  # characters of one answer that sympy may see
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BETWEEN_BOXES = re.compile(r"(?:\s|\$|,|;|\\[,;()\[\]]|and\b|or\b|\\text\s*\{\s*(?:and|or)\s*\})*")
PHRASE = re.compile(r"(?is)\banswer\s*(?:is|:|=)\s*:?\s*")
WRAPPED = re.compile(r"(?s)\s*(?:\$\$(.*)\$\$|\$([^$]*)\$|\\\((.*)\\\)|\\\[(.*)\\\])\s*\.?\s*")
TEXT_COMMAND = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|operatorname|textit|mathit)\s*\{([^{}]*)\}")
NOT_WORDS = r"\\[A-Za-z]+|\b(?:pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|inf|infty|and|or|in|cup|frac)\b"
SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": r"^{\circ}", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ",
    "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
WITH_BASE = re.compile(r"\s*[0-9A-Z]+_(?:\d|\{\d+\})\s*")
SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"


class OutOfTime(BaseException):
    """Not an Exception, so that no handler within sympy takes it for a mistake of its own."""


def plain_symbols(text):
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


def boxes(text):
    """The contents of the last box, with those that only a comma or an "and" parts from it; "" where there is none."""
    contents, start, end = [], None, None
    for match in reversed(list(BOX.finditer(text))[-20:]):
        close = closing_brace(text, match.end())
        if close is None:
            continue
        if start is not None and (close > start or not BETWEEN_BOXES.fullmatch(text, close + 1, start)):
            if close > start:  # a box around the ones that were found
                contents, start = [text[match.end() : close]], match.start()
                continue
            break
        if start is not None and start - close > 60:
            break
        contents.insert(0, text[match.end() : close])
        start, end = match.start(), close
    return ", ".join(contents) if end is not None else ""


def closing_brace(text, start):
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


def is_bare(text):
    """Whether `text` is an answer by itself and not prose that holds one."""
    return len(text) <= 300 and "\n" not in text and not re.search(r"[A-Za-z]{3}", re.sub(NOT_WORDS, " ", text))


def read(text):
    """(what the parser shall read, the answer as it was written) of a response or a reference answer."""
    text = text.strip()
    answer = boxes(text)
    if not answer and (whole := WRAPPED.fullmatch(text)) and len(text) <= LONGEST:
        answer = next(g for g in whole.groups() if g is not None)
    if not answer and is_bare(without_text(text)):
        answer = text.rstrip(".")
    if answer:
        answer = answer.strip().strip("$").strip()
        return (f"${plain_symbols(tidy(answer))}$" if len(answer) <= LONGEST else ""), answer
    tail = text[-WINDOW:]
    said = list(PHRASE.finditer(tail))
    phrase = re.split(r"\n|\.(?:\s|$)", tail[said[-1].end() :], maxsplit=1)[0] if said else ""
    if phrase and is_bare(without_text(phrase)) and "$" not in phrase.replace("\\$", ""):
        return f"${plain_symbols(tidy(phrase.strip()))}$", phrase
    return plain_symbols(tail), phrase or (text if len(text) <= 300 else "")


def without_text(answer):
    """`answer` without \\text{...} and the names of environments."""
    return re.sub(r"\\(?:begin|end)\s*\{[a-z*]*\}", " ", TEXT_COMMAND.sub(" ", answer))


def tidy(answer):
    """Spellings that the parser trips over: thousands, dollars, repeating decimals, words around a number."""
    answer = re.sub(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", repeating, answer)
    answer = re.sub(r"^\\text\s*\{[^{}\d]*\}\s*(?=[\d\\(-])", "", answer)
    answer = re.sub(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})", "", answer)
    answer = re.sub(r"\\\$\s*(?=[\d.])", "", answer)
    return re.sub(r"\\text\s*\{\s*(-?\d[\d.,/]*)([^{}\d]*)\}", r"\1\\text{\2}", answer)


def repeating(match):
    """0.1\\overline{6} as a fraction."""
    whole, start, again = match.groups()
    upper = int(whole + start + again) - int(whole + start or 0)
    return f"\\frac{{{upper}}}{{{(10 ** len(again) - 1) * 10 ** len(start)}}}"


def as_string(answer):
    """`answer` as it is compared letter by letter."""
    answer = TEXT_COMMAND.sub(r"\1", answer)
    answer = re.sub(r"\\(?:left|right|displaystyle|,|;|!|:| |quad|qquad)|[\s${}*]|\\[()\[\]]", "", answer)
    answer = answer.replace("dfrac", "frac").replace("tfrac", "frac").rstrip(".").lower()
    choice = re.fullmatch(r"\(([a-z])\)(?:.*)", answer)
    return choice[1] if choice else answer


def grade(text, answer):
    """Whether the response `text` ends in `answer`."""
    (got_source, got_text), (gold_source, gold_text) = read(text), read(answer)
    if len(got_text) <= LONGEST and as_string(got_text) == as_string(gold_text) != "":
        return True
    if WITH_BASE.fullmatch(got_text) and WITH_BASE.fullmatch(gold_text):
        return False  # the parser drops the base of 204_5
    got = parse(got_source, parsing_timeout=None) if gold_source else []
    gold = parse(gold_source, parsing_timeout=None) if got else []
    if gold and verify(gold, got, timeout_seconds=None, allow_set_relation_comp=True):
        return True
    gold_i, got_i = imaginary(gold), imaginary(got)
    return (gold_i, got_i) != (gold, got) and verify(gold_i, got_i, timeout_seconds=None, allow_set_relation_comp=True)


def imaginary(parsed):
    """The parsed expressions with `i`, a symbol like any other to math-verify, as the imaginary unit."""

    def unit(expression):
        return expression.subs({s: I for s in expression.free_symbols if s.name == "i"})

    return [unit(e) if isinstance(e, Basic) else e for e in parsed]


def main():
    """Serves until standard input ends. Arguments: seconds a pair, MiB of memory."""
    seconds, memory_mb = float(sys.argv[1]), int(sys.argv[2])
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20,) * 2)
    sys.set_int_max_str_digits(100_000)
    out = os.fdopen(os.dup(1), "w")
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - the watchdog's, for as long as the process lives
    os.dup2(nowhere.fileno(), 1)

    def ring(number, frame):
        raise OutOfTime

    signal.signal(signal.SIGALRM, ring)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        # one second more and the watchdog, a thread of C, ends the process, whatever it computes
        faulthandler.dump_traceback_later(seconds + 1, exit=True, file=nowhere)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                result = grade(*json.loads(line))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (Exception, OutOfTime):  # unreadable is wrong: MemoryError and RecursionError are Exceptions too
            result = False
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
