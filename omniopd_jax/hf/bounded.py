"""Files from elsewhere, read within bounds: a size before a byte is read, JSON without depth or digits that hurt."""

import json
from pathlib import Path

from omniopd_jax.errors import UserError

JSON_BYTES = 100_000_000  # of one JSON file: the largest tokenizers and indices have some 30 MB


def parse(text: str | bytes, where) -> object:
    """The value of a JSON text.

    Raises:
      UserError: one line that begins with `where`: not JSON, not UTF-8, nested too deep, a number too long.
    """
    try:
        return json.loads(text)
    except RecursionError as e:
        raise UserError(f"{where}: JSON that is nested too deep to be read") from e
    except ValueError as e:  # the decoder's, the codec's, and that of a number with more than 4,300 digits
        raise UserError(f"{where} is not JSON: {line(e)}") from e


def read_json(path: Path, limit: int = JSON_BYTES) -> dict:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
      UserError: one line: no such file, larger than that, not JSON, or no object.
    """
    found = parse(read_text(path, limit), path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def read_text(path: Path, limit: int) -> str:
    """The text of a UTF-8 file of at most `limit` bytes, a byte order mark left out.

    Raises:
      UserError: one line: no such file, larger than that, or not UTF-8.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(limit + 1)
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {line(e)}") from e
    if len(raw) > limit:
        raise UserError(f"{path} is larger than {limit:,} bytes, the most that is read of such a file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: {line(e)}") from e


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file as people read it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def line(e: BaseException) -> str:
    """The first line of an error, short."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
