"""The exceptions that are the user's to act on, and how their lines are kept harmless for a terminal."""

import unicodedata


class UserError(Exception):
    """A setting, file or service is wrong: the message is one line that says what, where and what to do.

    `main` prints it alone and exits with `exit_code`; a traceback comes only with a raised `--verbosity`.
    """

    def __init__(self, message: str, *, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


class NumberError(UserError, FloatingPointError):
    """A number came out that nothing can be trained on: the run has diverged, or an input was no number."""


class Stopped(UserError):
    """A signal came while the step was waiting for its teacher: the state before it is saved, nothing is lost."""


class TeacherStopped(UserError):
    """The teacher can give nothing more (budget spent, service gone): checkpoint and stop cleanly."""


def one_of(value: str, allowed, where: str) -> str:
    """Returns `value` if `allowed` holds it, else raises a `UserError` naming the place and the choices."""
    if value not in allowed:
        raise UserError(f"{where} = {value!r} is unknown; choose one of: {', '.join(sorted(map(str, allowed)))}")
    return value


def printable(text: str) -> str:
    """`text` with control, escape and direction characters written out (`\\x1b`); line ends stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _written_out(c) for c in text)


def _written_out(char: str) -> str:
    if unicodedata.category(char).startswith("Z") or char == "\t":
        return " "
    return char.encode("unicode_escape").decode()
