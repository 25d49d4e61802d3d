"""Where a run is, and its small files, read with one line where they are not what they should be (host.write_whole
writes them)."""

import json
import os
import pathlib

import fsspec
from etils import epath

from omniopd_jax.config import expanded, is_bucket
from omniopd_jax.errors import UserError

# buckets by gcsfs, whether TensorFlow happens to be there or not; etils asks once in a process, at its first path
os.environ.setdefault("EPATH_USE_TF", "false")
MAX_STATE = 16 << 20  # bytes of a small file: a config, a summary, a report


def place(run_dir) -> pathlib.Path | epath.Path:
    """A run's folder: an absolute path of this machine, or a bucket's, which has the same methods."""
    if not is_bucket(run_dir):
        return expanded(run_dir).absolute()
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)  # others write there too
    return epath.Path(run_dir)


def newest_step(run_dir) -> int | None:
    """The newest checkpoint's step in a run's folder; None where there is none."""
    folder = place(run_dir) / "checkpoints"
    try:
        return max((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), default=None)
    except Exception:  # no such folder; of a bucket whatever its client raises, which the run itself will say
        return None


def try_writing(folder: pathlib.Path) -> None:
    """Writes and removes a file of 64 KiB in a folder that is there; raises OSError where that fails."""
    probe = folder / f".write-test-{os.getpid()}"
    probe.write_bytes(b"\0" * 65_536)
    probe.unlink()


def read_json(path, advice: str) -> dict:
    """A small JSON object from a file.

    Args:
      path: the file.
      advice: how to go on where it cannot be read, the end of the error's line.

    Raises:
      UserError: missing, cut off, too large, nested too deep, or no JSON object.
    """
    path = path if isinstance(path, epath.Path) else pathlib.Path(path)
    try:
        size = path.stat().length if isinstance(path, epath.Path) else path.stat().st_size
        if size > MAX_STATE:
            raise UserError(f"{path} is {size >> 20} MB, more than such a file ever is: {advice}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or type(e).__name__}): {advice}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is cut off or no JSON: {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {advice}")
    return value
