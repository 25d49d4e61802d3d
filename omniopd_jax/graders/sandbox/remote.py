"""Assert tests at arm's length: the tests run in one process, the program in another, and only plain data pass between.

The program's process (`serve`) never holds the tests, so there is nothing in it to patch, read or fake: it can answer
calls, and that is all. What it answers arrives as lists, dicts, numbers and strings made anew on the tests' side. An
object that is not plain data stays where it is and becomes a `Remote`, which equals nothing but what the program itself
says of another such object.

What remains forgeable: a test that takes a helper from the program (HumanEval/32 calls the `poly` of its own prompt)
believes that helper, and one that asks no more than truth of a result (`assert f(x)`) is content with any object, as in
one process. Known limits: exceptions arrive as the nearest built-in class; instances of the tests' own classes cannot
be passed over; tests and program share no global state; a named tuple arrives as a tuple.

Run by path inside the sandbox, and imported by asserts.py: standard library only.
"""

import builtins
import json
import operator
import os
import sys
import types

MOST_BYTES = 64 << 20  # of one message; the tests' side is limited in memory too
PLAIN = (bool, int, float, str, type(None))
VIEWS = (type({}.keys()), type({}.values()), type({}.items()))


CLASSES = {  # besides the built-in ones: classes that are the same on both sides, by module
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "datetime": ("date", "datetime", "time", "timedelta"),
}


class Gone(Exception):
    """The program's process ended or broke the protocol."""


def send(fd, message):
    """One message: eight bytes of length, then JSON."""
    body = json.dumps(message).encode()
    data = memoryview(len(body).to_bytes(8, "big") + body)
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as error:
        raise Gone(str(error)) from None


def receive(fd):
    """The next message; raises Gone at the end, or for what is too long or no JSON."""

    def exactly(count):
        parts = []
        while count:
            try:
                part = os.read(fd, min(count, 1 << 20))
            except OSError as error:
                raise Gone(str(error)) from None
            if not part:
                raise Gone("the program ended before its tests")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    count = int.from_bytes(exactly(8), "big")
    if count > MOST_BYTES:
        raise Gone("a result is too large")
    try:
        return json.loads(exactly(count))
    except (ValueError, RecursionError):
        raise Gone("a result is malformed") from None


def encode(value, keep):
    """`value` as JSON; `keep(value)` names what is not plain data. Subclasses of plain types go as their base."""
    if value is None or isinstance(value, (bool, float, str)):
        for base in (float, str):
            if isinstance(value, base):
                return base.__getnewargs__(value)[0]
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -(1 << 53) < number < (1 << 53) else {"int": hex(number)}
    if isinstance(value, list):
        return [encode(v, keep) for v in list.__iter__(value)]
    for base in (tuple, set, frozenset):
        if isinstance(value, base):
            return {base.__name__: [encode(v, keep) for v in base.__iter__(value)]}
    if type(value) in VIEWS:
        return {"view": [VIEWS.index(type(value)), [encode(v, keep) for v in value]]}
    if isinstance(value, dict):
        kind = type(value)
        if (kind.__module__, kind.__name__) == ("collections", "Counter"):
            return {"Counter": [[encode(k, keep), encode(v, keep)] for k, v in dict.items(value)]}
        return {"dict": [[encode(k, keep), encode(v, keep)] for k, v in dict.items(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__ if type(value) in (bytes, bytearray) else "bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if type(value) is range:
        return {"range": [encode(v, keep) for v in (value.start, value.stop, value.step)]}
    kind = type(value)
    if (kind.__module__, kind.__name__) in (("decimal", "Decimal"), ("fractions", "Fraction")):
        return {kind.__name__: str(value)}
    if (kind.__module__, kind.__name__) == ("collections", "deque"):
        return {"deque": [encode(v, keep) for v in value]}
    if kind.__module__ == "datetime" and kind.__name__ in ("date", "datetime", "time"):
        return {kind.__name__: value.isoformat()}
    if isinstance(value, type) and known_class(value.__module__, value.__name__) is value:
        return {"class": [value.__module__, value.__name__]}
    return keep(value)


def decode(value, find):
    """The inverse of `encode`; `find(kind, name)` gives what a name stands for. Builds built-in types only."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list):
        return [decode(v, find) for v in value]
    ((tag, body),) = value.items()
    if tag == "int":
        return int(body, 16)
    if tag in ("tuple", "set", "frozenset"):
        return getattr(builtins, tag)(decode(v, find) for v in body)
    if tag == "dict":
        return {decode(k, find): decode(v, find) for k, v in body}
    if tag == "Counter":
        import collections

        return collections.Counter({decode(k, find): decode(v, find) for k, v in body})
    if tag == "view":
        which, values = body[0], decode(body[1], find)
        if which == 1:
            return dict(enumerate(values)).values()
        return dict(values).items() if which else dict.fromkeys(values).keys()
    if tag in ("bytes", "bytearray"):
        return getattr(builtins, tag).fromhex(body)
    if tag == "complex":
        return complex(*body)
    if tag == "range":
        return range(*decode(body, find))
    if tag == "Decimal":
        import decimal

        return decimal.Decimal(body)
    if tag == "Fraction":
        import fractions

        return fractions.Fraction(body)
    if tag == "deque":
        import collections

        return collections.deque(decode(body, find))
    if tag in ("date", "datetime", "time"):
        import datetime

        return getattr(datetime, tag).fromisoformat(body)
    if tag == "class":
        return known_class(*body)
    return find(tag, body)


def known_class(module, name):
    """The class of that name where both sides have the same, else None."""
    if module == "builtins":
        found = getattr(builtins, str(name), None)
        return found if isinstance(found, type) else None
    if module in CLASSES and name in CLASSES[module]:
        return getattr(__import__(module), name)
    return None


# -- the program's side


def load(path, count):
    """The first of the `count` sources at `path`, `path`.1 ... that compiles; raises what the first raised else."""
    failed = None
    for i in range(count):
        try:
            with open(f"{path}.{i}" if i else path, "rb") as f:
                return compile(f.read(), path, "exec")
        except (SyntaxError, ValueError) as error:
            failed = failed or error
    raise failed


def serve(fd, path, count, preamble):
    """Runs `preamble` and the program at `path` (`load`) as a module, then answers requests until the other side
    ends."""
    kept = []

    def keep(value):
        if isinstance(value, Callback):
            return {"callback": object.__getattribute__(value, "number")}
        kept.append(value)
        if isinstance(value, type) and issubclass(value, Exception):
            return {"exception": [len(kept) - 1, describe_class(value)]}
        return {"ref": len(kept) - 1}

    def find(kind, number):
        return kept[number] if kind == "ref" else Callback(number)

    class Callback:
        """A function or object of the tests."""

        def __init__(self, number):
            object.__setattr__(self, "number", number)

        def _ask(self, **message):
            send(fd, {"callback": object.__getattribute__(self, "number")} | message)
            return answer_until("value")

        def __call__(self, *args, **kwargs):
            return self._ask(args=encode(list(args), keep), kwargs=encode(kwargs, keep))

        def __getattr__(self, name):
            if name.startswith("_"):
                raise AttributeError(name)
            return self._ask(attribute=name)

        def __setattr__(self, name, value):
            self._ask(attribute=name, set=encode(value, keep))

    def do(op, args):
        first, *rest = args
        if op == "get":
            return getattr(module, first)
        if op == "call":
            return first(*rest[0], **rest[1])
        if op in FUNCTIONS:
            return FUNCTIONS[op](first, *rest)
        if op in OPERATORS:
            return getattr(operator, op)(first, *rest)
        return getattr(type(first), op)(first, *rest)  # an operator's method

    def answer_until(key):
        while True:
            message = receive(fd)
            if key in message:
                return decode(message[key], find)
            if "raise" in message:
                raise RuntimeError(message["raise"][1])
            try:
                args = [decode(a, find) for a in message["args"]]
                inner = arguments(*args[1:]) if message["op"] == "call" else {}
                before = {i: json.dumps(encode(a, keep)) for i, a in inner.items() if mutable(a)}
                reply = {"value": encode(do(message["op"], args), keep), "changed": {}}
                for i, was in before.items():
                    if json.dumps(now := encode(inner[i], keep)) != was:
                        reply["changed"][i] = now
            except Gone:
                raise
            except BaseException as error:
                reply = {"raise": describe(error)}
            send(fd, reply)

    module = types.ModuleType("program")
    sys.modules["program"] = module
    sys.argv = [path]
    try:
        code = load(path, count)
        exec(preamble, module.__dict__)
        exec(code, module.__dict__)
        send(fd, {"value": None})
    except Gone:
        raise
    except BaseException as error:
        send(fd, {"raise": describe(error)})
        return
    answer_until("never")


FUNCTIONS = {
    "list": list, "isinstance": isinstance, "__getattribute__": getattr, "__setattr__": setattr, "__str__": str,
    "__repr__": repr, "__next__": next,
}  # fmt: skip
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
OPERATORS = {f"__{name}__" for name in (*_BINARY, "lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert")}


def arguments(args, kwargs):
    """{"0": the first, ..., "=name": one by name} of a call."""
    return {str(i): a for i, a in enumerate(args)} | {f"={name}": a for name, a in kwargs.items()}


def mutable(value):
    """Whether a function may change `value` in place for its caller to see."""
    return isinstance(value, (list, dict, set, bytearray))


def describe_class(kind):
    """[nearest built-in exception, the classes before it by name] of an exception's class."""
    own = []
    for c in kind.__mro__:
        if getattr(builtins, c.__name__, None) is c:
            return [c.__name__, own]
        own.append(str(c.__name__)[:100])
    return ["Exception", own]


def describe(error):
    """[nearest built-in exception, message, the classes before it by name] of an exception."""
    name, own = describe_class(type(error))
    try:
        text = str(error)[:300]
    except BaseException:
        text = "(no message)"
    return [name, f"{own[0]}: {text}" if own else text, own]


# -- the tests' side


class Link:
    """The tests' end of the line: sends requests, answers callbacks."""

    def __init__(self, fd):
        self.fd, self.callbacks, self.gone, self.exceptions = fd, [], "", {}

    def keep(self, value):
        """Names what is not plain data for the other side."""
        if isinstance(value, Remote):
            return {"ref": value._number}
        if not callable(value) and type(value).__module__ != "__main__":
            raise TypeError(f"an object of the tests' class {type(value).__name__} cannot be passed to the program")
        self.callbacks.append(value)
        return {"callback": len(self.callbacks) - 1}

    def find(self, kind, number):
        """What a name from the other side stands for."""
        if kind == "callback":
            return self.callbacks[number]
        if kind == "exception":
            return self.exception(*number[1])
        return Remote(self, number)

    def exception(self, base, names):
        """A class that stands for one of the program's exceptions, for the tests to catch."""
        kind = getattr(builtins, str(base), None)
        if not names or not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise Gone("a result is malformed")
        for name in reversed(names[:20]):
            if name not in self.exceptions:
                self.exceptions[name] = type(str(name), (kind,), {})
            kind = self.exceptions[name]
        return kind

    def request(self, op, *args):
        """One operation on the other side; raises what it raised there, as a built-in exception."""
        try:
            send(self.fd, {"op": op, "args": [encode(a, self.keep) for a in args]})
            return self.result(arguments(*args[1:]) if op == "call" else {}, ends=op == "__next__")
        except Gone as error:
            self.gone = str(error) or "gone"  # the tests may catch it and go on
            raise

    def result(self, given=types.MappingProxyType({}), ends=False):
        """The result of the request under way; `given` are its `arguments`, changed in place as they were there.

        StopIteration is what the program raised where it `ends` an iterator; anywhere else it would end a loop of the
        tests.
        """
        while True:
            message = receive(self.fd)
            try:
                if "callback" in message:
                    self.call_back(message)
                    continue
                if "raise" in message:
                    name, text, own = message["raise"]
                    kind = getattr(builtins, str(name), None)
                    known = next((self.exceptions[n] for n in own if n in self.exceptions), None)
                    break
                for i, now in message.get("changed", {}).items():
                    overwrite(given[i], decode(now, self.find))
                return decode(message["value"], self.find)
            except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError, ImportError):
                raise Gone("a result is malformed") from None
        if known is not None:
            raise known(str(text).partition(": ")[2])
        stops = kind in (StopIteration, StopAsyncIteration) and not ends
        if stops or not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise RuntimeError(f"{name}: {text}")
        try:
            error = kind(str(text))
        except TypeError:  # the few that want more arguments
            error = RuntimeError(f"{name}: {text}")
        raise error

    def call_back(self, message):
        """Runs a function of the tests for the program."""
        function, name = self.callbacks[message["callback"]], message.get("attribute")
        try:
            if name is None:
                args, kwargs = decode(message["args"], self.find), decode(message["kwargs"], self.find)
                result = function(*args, **kwargs)
            elif type(function).__module__ != "__main__" or not isinstance(name, str) or name.startswith("_"):
                raise AttributeError(f"a program sees no {name!r} of this object of the tests")
            elif "set" in message:
                result = setattr(function, name, decode(message["set"], self.find))
            else:
                result = getattr(function, name)
            reply = {"value": encode(result, self.keep)}
        except Exception as error:
            reply = {"raise": describe(error)}
        send(self.fd, reply)


def overwrite(mine, theirs):
    """Makes the argument `mine` equal to what the program left of its copy."""
    if isinstance(mine, (list, bytearray)):
        mine[:] = theirs
    else:
        mine.clear()
        mine.update(theirs)


class Remote:
    """An object of the program that is not plain data: a class, a function, an instance."""

    def __init__(self, link, number):
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args, **kwargs):
        """The call there; lists, dicts and sets among its arguments are changed here as they are there."""
        return self._link.request("call", self, args, kwargs)

    def __getattr__(self, name):
        return self._link.request("__getattribute__", self, name)

    def __setattr__(self, name, value):
        self._link.request("__setattr__", self, name, value)

    def __iter__(self):
        return iter(self._link.request("list", self))

    def __next__(self):
        return self._link.request("__next__", self)

    def __instancecheck__(self, other):
        return isinstance(other, Remote) and self._link.request("isinstance", other, self) is True

    def __getitem__(self, key):
        return self._link.request("__getitem__", self, key)

    def __setitem__(self, key, value):
        self._link.request("__setitem__", self, key, value)

    def __delitem__(self, key):
        self._link.request("__delitem__", self, key)

    def __enter__(self):
        return self._link.request("__enter__", self)

    def __exit__(self, kind, error, trace):
        return self._link.request("__exit__", self, None, None, None) if kind is None else False

    def __len__(self):
        try:
            return self._link.request("__len__", self)
        except AttributeError as error:  # what `list(...)` of a generator expects
            raise TypeError(str(error)) from None

    def __str__(self):
        return self._link.request("__str__", self)

    def __repr__(self):
        return self._link.request("__repr__", self)

    def __bool__(self):
        return True

    def __hash__(self):
        return 0

    def __eq__(self, other):  # with plain data never: an object that equals everything would pass every test
        return isinstance(other, Remote) and self._link.request("__eq__", self, other) is True


ORDERINGS = ("__lt__", "__le__", "__gt__", "__ge__")


def operation(name):
    """An operator of an object of the program, which may give another object, but plain data only between two of them.

    A lying object could else make `abs(f(x) - 9) < 1e-6` true: by what it says is its distance, or by what it says of a
    number. An ordering is true or false: with plain data there is none, and no object is truth.
    """

    def method(self, *others):
        if name in ORDERINGS:
            return self._link.request(name, self, *others) is True if isinstance(others[0], Remote) else NotImplemented
        result = self._link.request(name, self, *others)
        if isinstance(result, Remote) or (others and all(isinstance(v, Remote) for v in others)):
            return result
        if not others:
            raise TypeError(f"{name} of an object of the program gives no plain data")
        return NotImplemented

    return method


for _name in OPERATORS - {"__eq__", "__ne__"}:
    setattr(Remote, _name, operation(_name))


if __name__ == "__main__":
    serve(3, sys.argv[1], int(sys.argv[2]), sys.argv[3])
