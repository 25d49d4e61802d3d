"""The processes that compare mathematical answers, each pair in a limited time (worker.py).

A fork has the imports and, above all, what ANTLR's parser builds while it reads its first expressions: a cold one reads
about 10 a second. The library's own time limit, SIGALRM in a main thread, is left out for ours.
"""

import contextlib

from omniopd_jax.graders import worker
from omniopd_jax.graders.math_equal import grade

WARM_UP = (  # expressions of the usual kinds, for the parser's tables
    ("3x^2-5x+\\frac{1}{2}", "3x^2-4x+\\frac{1}{2}"),
    ("\\frac{\\sqrt{2}}{2}", "\\sqrt{3}"),
    ("2\\pi r", "2\\pi r^2"),
    ("x=\\frac{-b\\pm\\sqrt{b^2-4ac}}{2a}", "x=1"),
    ("[-2,7) \\cup (8,\\infty)", "(-\\infty,-2) \\cup (3,5]"),
    ("x^2+y^2=4", "y=2x+3"),
    ("-1 \\le x < 4", "[-1,4)"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "5"),
    ("\\sin x + \\cos^2 x", "\\ln 2 + e^{x}"),
    ("\\binom{5}{2}+5!", "\\log_2 3"),
    ("(x+1)(x-2)^3", "(x-1)(x+2)"),
    ("3+4i", "2-i"),
    ("10^{-6}", "1.5 \\times 10^{3}"),
    ("\\sqrt[3]{16}", "2^{\\frac{1}{3}}"),
    ("\\{1,2,3\\}", "\\{4,5\\}"),
    ("\\frac{a+b}{c-d}", "\\frac{a}{b}+\\frac{c}{d}"),
    ("x>3", "x<-3"),
    ("90^\\circ", "45^{\\circ}"),
    ("\\emptyset", "|x-1|"),
    ("The value is $\\frac{1}{2}$ and $x = 3$.", "7"),
    ("x \\in \\mathbb{R}", "y = \\pm 1"),
    ("\\int_0^1 x dx", "a_1 b_2"),
)


def main():
    """Serves questions of the form [text, answer]."""
    worker.main(answer, warm_up=warm_up)


def answer(question, limited):
    """Whether a text gives its answer."""
    with limited():
        return grade(*question)


def warm_up():
    """Reads what fills the parser's tables."""
    for got, gold in WARM_UP:
        with contextlib.suppress(Exception):
            grade(f"\\boxed{{{got}}}" if "$" not in got else got, gold)
