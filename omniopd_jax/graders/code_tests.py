"""The tests of a program as data has them, read and checked: stdin and stdout, or assertions.

    {"stdin": text or list, "stdout": text or list}, or a list of such objects
    {"asserts": source or list of sources, "entry_point": name, "prompt": source}, the last two optional

`asserts` may hold plain assertions, HumanEval's `check(candidate)`, pytest functions or unittest cases, with the
standard library; what they import from a module `solution` is the program's. `prompt` is the start of the program that
a completion goes on from, as HumanEval has it. An answer may be the object or its JSON text.
"""

import ast
import builtins
import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import symtable
import sys
import threading

from omniopd_jax.errors import UserError

FORMS = 'code tests need "stdin" and "stdout", or "asserts"'

# What LiveCodeBench's own harness puts before a program: programs of its kind rely on these names.
STARS = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
_WORD = re.compile(r"[A-Za-z_]\w*")


@dataclasses.dataclass(frozen=True)
class Tests:
    """What a program is tested with: `inputs` and `outputs`, or `asserts`.

    Attributes:
      inputs, outputs: texts of stdin and stdout, as many; empty with `asserts`.
      asserts: source, or None.
      entry_point: the function asked for, where the data names it.
      prompt: what a completion may go on from, or "".
      names: what the assertions read and do not define; the program must define it, but for standard modules.
      modules: those names that are modules of the standard library.
      maybe: built-in names that the assertions call, innermost first: a program may define one of them itself.
      count: assertions in the source, or cases on stdin.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    asserts: str | None = None
    entry_point: str | None = None
    prompt: str = ""
    names: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    maybe: tuple[str, ...] = ()
    count: int = 1

    @property
    def asked(self) -> tuple[str, ...]:
        """The names that the program is to define; () for a program on stdin."""
        if self.entry_point:
            return (self.entry_point,)
        return tuple(n for n in self.names if n not in self.modules) or self.maybe

    @property
    def as_livecodebench(self) -> bool:
        """Whether programs are run as LiveCodeBench does: with its imports, a tuple as good as a list."""
        return self.asserts is None or "Solution" in self.names


def read(tests) -> Tests:
    """The tests in any of the forms above.

    Raises:
      UserError: another form, or assertions that assert nothing.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise UserError(f"{FORMS}; this is no JSON: {tests[:60]!r}") from error
    if isinstance(tests, dict) and "asserts" in tests:
        return _asserts(tests)
    if isinstance(tests, dict):
        tests = [tests]
    if not isinstance(tests, (list, tuple)) or not tests:
        raise UserError(f"{FORMS}; this is {_named(tests)}")
    inputs, outputs = [], []
    for pair in tests:
        if not isinstance(pair, dict) or not {"stdin", "stdout"} <= set(pair):
            raise UserError(f"{FORMS}; this has {sorted(pair) if isinstance(pair, dict) else _named(pair)}")
        for key, into in (("stdin", inputs), ("stdout", outputs)):
            values = [pair[key]] if isinstance(pair[key], str) else pair[key]
            if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
                raise UserError(f"code tests: {key!r} must be text or a list of texts; it is {_named(pair[key])}")
            into += values
    if not inputs or len(inputs) != len(outputs):
        raise UserError(f"code tests hold {len(inputs)} inputs and {len(outputs)} outputs: need as many, at least one")
    return Tests(tuple(inputs), tuple(outputs), count=len(inputs))


def _named(value) -> str:
    """A value of the wrong form, as an error names it."""
    return "null" if value is None else f"{type(value).__name__} {json.dumps(value, default=str)[:60]}"


def _asserts(tests) -> Tests:
    source, entry_point, prompt = tests["asserts"], tests.get("entry_point"), tests.get("prompt") or ""
    if isinstance(source, (list, tuple)) and all(isinstance(part, str) for part in source):
        source = "\n".join(source)
    if not isinstance(source, str):
        raise UserError(f"code tests: 'asserts' must be source or a list of sources; it is {_named(tests['asserts'])}")
    for key, value in (("entry_point", entry_point or "f"), ("prompt", prompt)):
        if not isinstance(value, str):
            raise UserError(f"code tests: {key!r} must be text; it is {_named(value)}")
    if entry_point and not entry_point.isidentifier():
        raise UserError(f"code tests: 'entry_point' must be the name of a function; it is {_named(entry_point)}")
    names, modules, maybe, needs_entry, count = _looked_through(source)
    if needs_entry and not entry_point:
        raise UserError("code tests define check(candidate) and nothing calls it: they need 'entry_point'")
    return Tests((), (), source, entry_point, prompt, names, modules, maybe, count)


_LIMIT = threading.Lock()
_LOOKED = {}  # digest of assertions -> what `_look` found: tests may be megabytes, and are graded many times


def _looked_through(source: str):
    digest = hashlib.blake2b(source.encode("utf-8", "replace")).digest()
    if digest not in _LOOKED:
        if len(_LOOKED) > 20_000:
            _LOOKED.clear()
        try:
            with long_integers():
                _LOOKED[digest] = _look(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(
                f"code tests: 'asserts' can't be read: {type(error).__name__}: {str(error)[:200]}"
            ) from error
    return _LOOKED[digest]


def _look(source):
    """(names, modules, maybe, whether an entry point is needed, count) of assertions.

    Raises:
      UserError: nothing is asserted, or a module is imported that the sandbox does not have.
    """
    tree = ast.parse(source)
    count = sum(map(_asserts_something, ast.walk(tree)))
    if not count:
        raise UserError("code tests: 'asserts' hold no assertion, so that any program would pass")
    if missing := _imported(tree) - sys.stdlib_module_names - {"__main__", "solution", "test"}:
        raise UserError(f"code tests import {', '.join(sorted(missing))}: the sandbox has the standard library alone")
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    called = {n.func.id for n in calls}
    dotted = {
        n.value.id for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    } - called
    names = sorted((_free_names(source) - set(dir(builtins))) | _of_solution(tree))
    inner = {id(n): sum(isinstance(m, ast.Call) for m in ast.walk(n)) for n in calls if hasattr(builtins, n.func.id)}
    calls = [n for n in calls if id(n) in inner]
    calls.sort(key=lambda n: (inner[id(n)], n.lineno, n.col_offset))
    check = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"), None)
    needs_entry = check is not None and len(check.args.args) == 1 and not check.args.defaults and "check" not in called
    modules = tuple(n for n in names if n in sys.stdlib_module_names and n in dotted)
    return tuple(names), modules, tuple(dict.fromkeys(n.func.id for n in calls)), needs_entry, count


def _of_solution(tree) -> set[str]:
    """Names that `tree` takes from a module `solution`, which is the program (asserts.py)."""
    found = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and n.module == "solution" and not n.level:
            found |= {a.name for a in n.names} - {"*"}
        elif isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "solution":
            found.add(n.attr)
    return found


def _imported(tree) -> set[str]:
    """Modules that the tests cannot do without: imported at the top, or in what is run of them, under no condition."""
    found, left = set(), list(tree.body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.partition(".")[0])
        elif isinstance(node, ast.ClassDef) or (
            isinstance(node, ast.FunctionDef) and (node.name == "check" or node.name.startswith("test"))
        ):
            left += node.body
    return found


@contextlib.contextmanager
def long_integers():
    """Lets integers of 50,000 digits be read, as LiveCodeBench's harness does."""
    with _LIMIT:  # of the whole process
        before = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(50_000)
        try:
            yield
        finally:
            sys.set_int_max_str_digits(before)


def _asserts_something(node) -> bool:
    """Whether a node of a syntax tree is an assertion of any form."""
    if isinstance(node, ast.Assert):
        return not (isinstance(node.test, ast.Constant) and node.test.value)
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return name.startswith(("assert", "fail")) or name == "raises"
    return isinstance(node, ast.Raise)


def _free_names(source) -> set[str]:
    """The names that `source` reads and does not define at its top."""
    top = symtable.symtable(source, "tests", "exec")
    defined = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    found, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        found |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (table is top or s.is_global())}
    return found - defined


@functools.cache
def _preamble() -> dict[str, str]:
    """name -> the import that LiveCodeBench's preamble gets it from; "" where it is a built-in in the end."""
    table = {}
    for module in STARS:
        scope = {}
        exec(f"from {module} import *", scope)
        del scope["__builtins__"]
        table |= {name: "" if module == "builtins" else f"from {module} import {name}" for name in scope}
    return table | {module: f"import {module}" for module in STARS if module not in ("builtins", "typing")}


def preamble(*sources: str) -> str:
    """What of LiveCodeBench's preamble these programs can notice: the imports of the names in them."""
    words = set().union(*(_WORD.findall(source) for source in sources))
    lines = {table[word] for table in [_preamble()] for word in words & table.keys()} - {""}
    lines = sorted(lines, key=lambda line: (line.startswith("import "), line))  # `datetime` is the module in the end
    return "\n".join([*lines, "__import__('sys').setrecursionlimit(50000)"])
