"""Small files of a run, read with one line where they are not what they should be (host.write_whole writes them)."""

import json
import pathlib

from omniopd_jax.errors import UserError

MAX_STATE = 16 << 20  # bytes of a small file: a config, a summary, a report


def read_json(path, advice: str) -> dict:
    """A small JSON object from a file.

    Args:
      path: the file.
      advice: how to go on where it cannot be read, the end of the error's line.

    Raises:
      UserError: missing, cut off, too large, nested too deep, or no JSON object.
    """
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_STATE:
            raise UserError(f"{path} is {size >> 20} MB, more than such a file ever is: {advice}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): {advice}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is cut off or no JSON: {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {advice}")
    return value
