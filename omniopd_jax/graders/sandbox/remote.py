"""Assert tests at arm's length: the tests run in one process, the program in another, and only plain data pass between.

The program's process (`serve`) never holds the tests, so there is nothing in it to patch, read or fake: it can answer
calls, and that is all. What it answers arrives as lists, dicts, numbers and strings made anew on the tests' side. An
object that is not plain data stays where it is and becomes a `Remote`, which equals nothing but what the program itself
says of another such object.

What remains forgeable: a test that takes a helper from the program (HumanEval/32 calls the `poly` of its own prompt)
believes that helper, and one that asks no more than truth of a result (`assert f(x)`) is content with any object, as in
one process. Known limits: exceptions arrive as the nearest built-in class; instances of the tests' own classes cannot
be passed over; tests and program share no global state.

Run by path inside the sandbox, and imported by asserts.py: standard library only.
"""

import builtins
import json
import os
import sys
import types

MOST_BYTES = 64 << 20  # of one message; the tests' side is limited in memory too
PLAIN = (bool, int, float, str, type(None))


CLASSES = {  # besides the built-in ones: classes that are the same on both sides, by module
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque"), "decimal": ("Decimal",), "fractions": ("Fraction",),
    "datetime": ("date", "datetime", "time", "timedelta"),
}  # fmt: skip


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
    if isinstance(value, dict):
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
    """Runs `preamble` and the program at `path` (`load`) as a module, then answers requests until the other side ends."""
    kept, calls = [], []

    def keep(value):
        if isinstance(value, Callback):
            return {"callback": value.number}
        kept.append(value)
        return {"ref": len(kept) - 1}

    def find(kind, number):
        return kept[number] if kind == "ref" else Callback(number)

    class Callback:
        def __init__(self, number):
            self.number = number

        def __call__(self, *args, **kwargs):
            send(fd, {"callback": self.number, "args": encode(list(args), keep), "kwargs": encode(kwargs, keep)})
            return answer_until("value")

    def do(op, args):
        if op == "get":
            return getattr(module, args[0])
        if op == "call":
            return args[0](*args[1], **args[2])
        if op == "list":
            return list(args[0])
        if op == "isinstance":
            return isinstance(args[0], args[1])
        return getattr(args[0], op)(*args[1:])  # an operator's method

    def answer_until(key):
        while True:
            message = receive(fd)
            if key in message:
                return decode(message[key], find)
            if "raise" in message:
                raise RuntimeError(message["raise"][1])
            calls.append(message["op"])
            try:
                args = [decode(a, find) for a in message["args"]]
                inner = args[1] if message["op"] == "call" else []
                before = [json.dumps(encode(a, keep)) if mutable(a) else None for a in inner]
                reply = {"value": encode(do(message["op"], args), keep), "changed": {}}
                for i, a in enumerate(inner):
                    if before[i] is not None and json.dumps(now := encode(a, keep)) != before[i]:
                        reply["changed"][str(i)] = now
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


def mutable(value):
    """Whether a function may change `value` in place for its caller to see."""
    return isinstance(value, (list, dict, set, bytearray))


def describe(error):
    """[nearest built-in exception, message] of an exception."""
    name = next(c.__name__ for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c)
    try:
        text = str(error)[:300]
    except BaseException:
        text = "(no message)"
    return [name, text if type(error).__name__ == name else f"{type(error).__name__}: {text}"]


# -- the tests' side


class Link:
    """The tests' end of the line: sends requests, answers callbacks."""

    def __init__(self, fd):
        self.fd, self.callbacks, self.gone = fd, [], ""

    def keep(self, value):
        """Names what is not plain data for the other side."""
        if isinstance(value, Remote):
            return {"ref": value._number}
        if not callable(value):
            raise TypeError(f"an object of the tests' class {type(value).__name__} cannot be passed to the program")
        self.callbacks.append(value)
        return {"callback": len(self.callbacks) - 1}

    def find(self, kind, number):
        """What a name from the other side stands for."""
        if kind == "callback":
            return self.callbacks[number]
        return Remote(self, number)

    def request(self, op, *args):
        """One operation on the other side; raises what it raised there, as a built-in exception."""
        try:
            send(self.fd, {"op": op, "args": [encode(a, self.keep) for a in args]})
            return self.result(args[1] if op == "call" else (), ends=op == "__next__")
        except Gone as error:
            self.gone = str(error) or "gone"  # the tests may catch it and go on
            raise

    def result(self, given=(), ends=False):
        """The result of the request under way; `given` are its arguments, changed in place as they were there.

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
                    name, text = message["raise"]
                    break
                for i, now in message.get("changed", {}).items():
                    overwrite(given[int(i)], decode(now, self.find))
                return decode(message["value"], self.find)
            except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError, ImportError):
                raise Gone("a result is malformed") from None
        kind = getattr(builtins, str(name), None)
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
        function = self.callbacks[message["callback"]]
        args, kwargs = decode(message["args"], self.find), decode(message["kwargs"], self.find)
        try:
            reply = {"value": encode(function(*args, **kwargs), self.keep)}
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
        """The call there; lists, dicts and sets among `args` are changed here as they are there."""
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


if __name__ == "__main__":
    serve(3, sys.argv[1], int(sys.argv[2]), sys.argv[3])
