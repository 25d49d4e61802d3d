"""Where a folder is written: beside its place and then renamed, over nothing but an earlier export of this program."""

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from omniopd_jax import config
from omniopd_jax.errors import UserError
from omniopd_jax.hf import bounded

MARK = ".omniopd_export"  # in each folder written here; hidden, so that a folder's digest (run/identity.py) stays
MARK_TEXT = "Written by omniopd_jax. A later export to this folder replaces all of it.\n"
OF_A_RUN = ("checkpoints", "journal", "metrics.jsonl")  # never replaced, whatever else is there
UNMARKED = (  # all that an export held before there was a mark; another program's folder may have the same names
    "config.json", "adapter_config.json", "generation_config.json", "README.md", "*.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
ADAPTER_KEYS = {  # of lora.peft_config; PEFT writes others beside them
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "lora_dropout", "bias",
    "fan_in_fan_out", "use_rslora", "use_dora", "modules_to_save", "inference_mode",
}  # fmt: skip


def check(folder, keep: Iterable = ()) -> Path:
    """The absolute path of a folder that may be written: missing, empty, or an earlier export.

    Args:
      keep: paths that must stay: `folder` may be none of them and hold none of them.

    Raises:
      UserError: the folder holds something else.
    """
    folder = Path(os.path.abspath(folder))
    real = folder.resolve()  # a link stays one: what it leads to is replaced
    if os.path.ismount(real):
        raise UserError(f"{folder} is the root of a file system, which can't be replaced; give a folder below it")
    for path in (config.expanded(p).resolve() for p in keep):
        if real == path or real in path.parents:
            raise UserError(f"{folder} is or holds {path}, which the export is made from; give an empty or a new one")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return real
    found = [name for name in OF_A_RUN if (folder / name).exists()]
    if found:
        raise UserError(f"{folder} holds a run ({', '.join(found)}); give an empty or a new folder")
    if not folder.is_dir() or not ((folder / MARK).is_file() or _unmarked_export(folder)):
        raise UserError(
            f"{folder} exists and is no Hugging Face folder that omniopd_jax exported; give an empty or a new one, or "
            "remove it"
        )
    return real


@contextlib.contextmanager
def placed(folder, keep: Iterable = ()):
    """Gives a place to write beside `folder`, and renames it to `folder` at the end; None but in process 0.

    Raises:
      UserError: as `check`.
    """
    folder = check(folder, keep)
    writer = jax.process_index() == 0
    work = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        if writer:
            _make(work, folder)
        yield work if writer else None
        if writer:
            (work / MARK).write_text(MARK_TEXT)
            for path in (work, *work.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)  # whoever serves the model may be another user
            _replace(work, folder)
    finally:
        if writer:
            shutil.rmtree(work, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("hf.save")


def _make(work: Path, folder: Path) -> None:
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} can't be written: {bounded.line(error)}; give another folder") from error


def _unmarked_export(folder: Path) -> bool:
    """Whether an export from before there was a mark wrote all of this: by its files, and by its config, which has the
    dtype under both of its names, as no version of transformers writes it; adapters by their keys.
    """
    entries = list(folder.iterdir())
    known = all(p.is_file() and any(fnmatch.fnmatchcase(p.name, n) for n in UNMARKED) for p in entries)
    if not known or not any(p.suffix == ".safetensors" for p in entries):
        return False
    own, adapter = folder / "config.json", folder / "adapter_config.json"
    try:
        if adapter.is_file():
            return not own.exists() and bounded.read_json(adapter).keys() == ADAPTER_KEYS
        found = bounded.read_json(own) if own.is_file() else {}
    except UserError:
        return False
    inner = found.get("text_config")
    return {"dtype", "torch_dtype"} <= (inner if isinstance(inner, dict) else found).keys()


def _replace(work: Path, folder: Path) -> None:
    """Renames `work` to `folder`; what stood there goes only once the new one is in place."""
    old = folder.parent / f"{work.name}.old"
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
