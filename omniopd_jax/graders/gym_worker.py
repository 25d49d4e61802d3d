"""The processes that score answers by the rules of reasoning-gym's data sets (worker.py).

Some of those rules evaluate the answer: as Python (`eval`) or through sympy's `parse_expr`, which evaluates too. Here
both get an `eval` that takes literals, arithmetic and a few functions, and refuses all else. Besides, a worker may not
write a file, start a program, open a socket or signal another process (seccomp, where kernel.py knows the machine).
"""

import ast
import base64
import functools
import pickle
import resource
import sys

import reasoning_gym
import sympy.parsing.sympy_parser

from omniopd_jax.graders import worker
from omniopd_jax.graders.sandbox import kernel

FUNCTIONS = frozenset((
    "Symbol", "Integer", "Float", "Rational", "Function", "sqrt", "cbrt", "root", "Abs", "abs", "exp", "log",
    "ln", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "sinh", "cosh", "tanh",
    "asinh", "acosh", "atanh", "factorial", "erf", "Ei", "Si", "Ci", "li",
))  # fmt: skip
NODES = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop,
    ast.List, ast.Tuple, ast.Set, ast.Dict,
)  # fmt: skip


def evaluate(source, *scopes):
    """`eval` of a text that holds literals, arithmetic and calls of FUNCTIONS by name.

    Raises:
      ValueError: anything else.
    """
    if not isinstance(source, str):
        raise ValueError("only text is evaluated here")
    tree = ast.parse(source.strip(), mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, NODES):
            raise ValueError(f"{type(node).__name__} is not evaluated here")
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            raise ValueError(f"the name {node.id} is not evaluated here")
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS):
            raise ValueError("this call is not evaluated here")
    return eval(compile(tree, "answer", "eval"), *(scopes or ({"__builtins__": {}},)))


def settle():
    """Takes from a worker what scoring does not need."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "reasoning_gym" or module is sympy.parsing.sympy_parser:
            module.eval = evaluate  # found before the built-in one
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    kernel.drop_rights(kernel.seccomp_filter(judge=True, read_only=True))


@functools.cache
def problems(name, seed, size):
    """The data set: entry i is a function of (name, seed, size, i)."""
    return reasoning_gym.create_dataset(name, seed=seed, size=size)


def answer(question, limited):
    """Whether an answer has the full score; for the name of a data set alone, makes it ready."""
    name, seed, size, *rest = question
    scored = problems(name, seed, size)
    if not rest:
        return True
    entry, text = pickle.loads(base64.b64decode(rest[0])), rest[1]  # the trainer's own entry
    with limited():
        return scored.score_answer(text, entry) >= 1


def main():
    """Serves questions of the forms [name, seed, size] and [name, seed, size, entry, text]."""
    worker.main(answer, settle=settle)
