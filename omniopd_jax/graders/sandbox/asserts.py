"""Assert tests, run by the judge against a program at the other end of a line (remote.py).

The forms that test files come in: asserts one after another, HumanEval's `check(candidate)`, pytest functions and
classes, unittest cases, any of them under a main guard. What counts is how many assertions were evaluated: tests that
evaluate none, or that ask nothing of the program, say nothing about it, and no program passes them.
"""

import ast
import sys
import types
from collections import Counter

from remote import Gone, Link

COUNT, SAME = "_assertion_evaluated", "_same_answer"  # names that the judge adds to the tests


class Counting(ast.NodeTransformer):
    """Adds a count after each assertion, under the name of the function or class at the top that holds it.

    An assertion is an `assert` of anything but a constant, an `if` that raises, and an exception that is caught where
    the test would otherwise have raised or asserted. With `lists`, `==` takes a tuple for a list with its elements.
    """

    def __init__(self, lists):
        self.lists, self.owner = lists, ""

    def counted(self, node):
        """The statement that counts one, at the place of `node`."""
        call = ast.Call(ast.Name(COUNT, ast.Load()), [ast.Constant(self.owner)], [])
        return ast.fix_missing_locations(ast.copy_location(ast.Expr(call), node))

    def visit_definition(self, node):
        """A function or class: what it holds is counted under its name where it is at the top."""
        outer, self.owner = self.owner, self.owner or node.name
        self.generic_visit(node)
        self.owner = outer
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_definition

    def visit_Assert(self, node):
        """`assert x` counts where it passes."""
        self.generic_visit(node)
        return node if isinstance(node.test, ast.Constant) else [node, self.counted(node)]

    def visit_If(self, node):
        """`if wrong: raise ...` counts where it does not raise."""
        raises = any(isinstance(n, ast.Raise) for n in node.body + node.orelse)
        self.generic_visit(node)
        return [node, self.counted(node)] if raises else node

    def visit_Try(self, node):
        """`try: f(); assert False` counts in the handler."""
        wanted = any(isinstance(n, (ast.Assert, ast.Raise)) for s in node.body + node.orelse for n in ast.walk(s))
        self.generic_visit(node)
        for handler in node.handlers if wanted else ():
            handler.body.insert(0, self.counted(handler))
        return node

    visit_TryStar = visit_Try

    def visit_Compare(self, node):
        """`a == b` as a call."""
        self.generic_visit(node)
        if not self.lists or len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq):
            return node
        call = ast.Call(ast.Name(SAME, ast.Load()), [node.left, node.comparators[0]], [])
        return ast.fix_missing_locations(ast.copy_location(call, node))


def same_answer(a, b):
    """Equality in which a tuple is as good as a list, at the top: what LiveCodeBench's harness asks for."""
    if isinstance(a, tuple) and isinstance(b, list):
        return list(a) == b
    if isinstance(a, list) and isinstance(b, tuple):
        return a == list(b)
    return a == b


class Solution(types.ModuleType):
    """The program, to tests that import it."""

    def __init__(self, tests):
        super().__init__("solution")
        self.__dict__["_tests"] = tests

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__["_tests"].of_program(name)


class Tests:
    """One test file and the program that it is about."""

    def __init__(self, link, order):
        self.link, self.order, self.entry_point = link, order, order["entry_point"]
        self.evaluated, self.asked = Counter(), False
        module = types.ModuleType("__main__")  # a main guard in the tests holds
        self.scope = module.__dict__
        sys.modules["__main__"], sys.argv = module, ["tests"]
        sys.modules["solution"] = Solution(self)

    def of_program(self, name):
        """What the program calls `name`; raises AttributeError where it has none."""
        value = self.link.request("get", name)
        self.asked = True
        return value

    def take(self, name):
        """Whether the program defines `name`; the tests have it then."""
        try:
            self.scope[name] = self.of_program(name)
        except AttributeError:
            return False
        return True

    def run(self):
        """Runs everything that the tests hold; returns (reason, detail)."""
        tree = ast.parse(self.order["source"])
        self.link.result()  # the program has loaded, or says what stopped it
        as_livecodebench = self.order["preamble"] is not None
        exec(self.order["preamble"] or "", self.scope)
        for name in self.order["names"]:
            if name in self.order["modules"]:
                self.scope[name] = __import__(name)
            elif name not in self.scope and name != self.entry_point:
                self.take(name)
        if self.entry_point and not self.take(self.entry_point):
            return "error", f"the program does not define {self.entry_point}"
        if not self.asked:  # a program may define a name that Python has: the innermost call is what is asked
            any(self.take(name) for name in self.order["maybe"])
        if self.entry_point:
            self.scope["candidate"] = self.scope[self.entry_point]
        self.scope[COUNT] = lambda owner: self.evaluated.update([owner])
        self.scope[SAME] = same_answer
        if "unittest" in self.order["source"]:
            self.count_unittest()
        tree = Counting(as_livecodebench).visit(tree)
        try:
            exec(compile(tree, "tests", "exec"), self.scope)
            wrong = self.run_functions() or self.run_cases()
        except SystemExit as error:
            wrong = f"the tests ended with exit code {error.code}" if error.code else ""
        if wrong:
            return "wrong_answer", wrong
        if not self.evaluated:
            return (
                "error",
                "the tests evaluated no assertion: an error of the data, or of a program that returns nothing",
            )
        if not self.asked:
            return "error", "the tests ask nothing of the program: an error of the data"
        return "ok", ""

    def run_functions(self):
        """HumanEval's `check` and pytest's functions and classes, those that have not been called yet."""
        for name, value in list(self.scope.items()):
            if self.evaluated[name]:
                continue
            if isinstance(value, types.FunctionType) and (name == "check" or name.startswith("test")):
                code = value.__code__
                needed = code.co_argcount - len(value.__defaults__ or ())
                if needed == 0:
                    value()
                elif needed == 1 and self.entry_point:
                    value(self.scope["candidate"])
            elif isinstance(value, type) and name.startswith("Test") and value.__module__ == "__main__":
                if any(base.__name__ == "TestCase" for base in value.__mro__):
                    continue
                for method in [m for m in vars(value) if m.startswith("test")]:
                    case = value()
                    if hasattr(case, "setup_method"):
                        case.setup_method()
                    getattr(case, method)()
        return ""

    def count_unittest(self):
        """Makes unittest's assertions count, and its `main` do nothing: the cases are run at the end."""
        import unittest

        def counting(method):
            def wrapper(case, *args, **kwargs):
                result = method(case, *args, **kwargs)
                self.evaluated.update([type(case).__name__])
                return result

            return wrapper

        for name in dir(unittest.TestCase):
            if name.startswith("assert"):
                setattr(unittest.TestCase, name, counting(getattr(unittest.TestCase, name)))
        unittest.main = unittest.TestProgram = lambda *args, **kwargs: None

    def run_cases(self):
        """unittest's cases; returns what failed."""
        unittest = sys.modules.get("unittest")
        if unittest is None:
            return ""
        for value in list(self.scope.values()):
            if isinstance(value, type) and issubclass(value, unittest.TestCase) and value is not unittest.TestCase:
                result = unittest.TestResult()
                unittest.defaultTestLoader.loadTestsFromTestCase(value).run(result)
                for case, text in result.failures + result.errors:
                    return f"{case}: {text.strip().splitlines()[-1]}"[:300]
                if result.unexpectedSuccesses:
                    return f"{result.unexpectedSuccesses[0]} passed and should not"
        return ""


def check(fd, order):
    """Runs assert tests against the program on the other end of `fd`.

    Args:
      fd: the line.
      order: the test file's `source`; `entry_point` or None; `names` that it reads and does not define, which come from
        the standard library where they are in `modules`, else from the program; `maybe`, built-in names that it calls;
        `preamble`, imports that LiveCodeBench's tests have, else None.

    Returns:
      (reason, detail): ok, wrong_answer, error, or `gone` where the program's process ended.
    """
    link = Link(fd)
    try:
        reason, detail = Tests(link, order).run()
        link.request("get", "__name__")  # it must still be there and answer
        return reason, detail
    except Gone as error:
        return "gone", str(error)
    except AssertionError as error:
        return ("gone", link.gone) if link.gone else ("wrong_answer", str(error)[:300])
    except BaseException as error:
        return ("gone", link.gone) if link.gone else ("error", f"{type(error).__name__}: {error}"[:300])
