"""Small files of prompts, and how they are loaded."""

import json

from omniopd_jax import config
from omniopd_jax.data import prompts


def small(**more):
    c = config.default()
    c.update_from_flattened_dict(more)
    return c


def write(tmp_path, *records, name="prompts.jsonl"):
    """A JSONL file; a record that is a string or bytes is written as it stands."""
    raw = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    (tmp_path / name).write_bytes(b"\n".join(raw) + b"\n")
    return str(tmp_path / name)


def load(path, count=0):
    return prompts.load(small(**{"data.source": "jsonl"}), source="jsonl", split="", path=path, count=count)
