"""Hugging Face folders in and out, without torch: config.json, safetensors, tokenizer, generation_config.json.

`model.table` says which tensor every parameter is; loading and saving go by that table alone.
"""

import dataclasses
import functools
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax import model
from omniopd_jax.errors import one_of
from omniopd_jax.hf import bounded, hub, layered, placed, safetensors
from omniopd_jax.hf import config as hf_config
from omniopd_jax.hf.config import model_config
from omniopd_jax.hf.hub import resolve
from omniopd_jax.hf.tokenizer import end_ids, load_tokenizer

__all__ = [
    "SAVE_DTYPES",
    "end_ids",
    "generation_config",
    "load",
    "load_tokenizer",
    "model_config",
    "read_config",
    "resolve",
    "save",
    "save_adapters",
]

SAVE_DTYPES = ("bfloat16", "float16", "float32")
ADAPTER = "adapter_model.safetensors"
PROCESSORS = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json",
)  # fmt: skip


def read_config(folder, *, setting: str = "student.path") -> model.ModelConfig:
    """ModelConfig of a folder or hub name; reads config.json alone.

    Raises:
      UserError: no such folder, unreachable hub, or a config.json that `model_config` refuses.
    """
    path = hub.resolve(folder, setting=setting, files=("config.json",)) / "config.json"
    return hf_config.model_config(bounded.read_json(path), str(path))


def load(
    folder, *, mesh=None, dtype=None, shardings: dict | None = None, setting: str = "student.path"
) -> tuple[dict, model.ModelConfig]:
    """Parameters of a Hugging Face folder (or hub name), as `model.table` lays them out.

    All is checked before the first byte of a tensor is read: every parameter has exactly one tensor of the right shape,
    and no tensor is left over.

    Args:
      folder: holds config.json and model.safetensors, or its shards and their index.
      mesh: parameters are created sharded over it (`sharding.RULES`); a host reads only its devices' part. None: one
        device.
      dtype: of the parameters; None = float32, the master weights.
      shardings: where each parameter is placed instead, such as in host memory.
      setting: the config key that errors name.

    Raises:
      UserError: names the file and the tensor that is missing, extra, misshapen, truncated, or not safetensors.
    """
    folder = hub.resolve(folder, setting=setting)
    cfg = read_config(folder, setting=setting)
    dtype = np.dtype(jnp.dtype(dtype or "float32"))
    tensors = safetensors.find(folder)
    table = model.table(layered.in_file(cfg, tensors))
    safetensors.check(tensors, table, cfg, folder)

    def one(p: model.Param, where):
        if where is None:
            return jax.device_put(safetensors.read(p, tensors, (slice(None),) * len(p.shape), dtype))
        read = functools.partial(safetensors.read, p, tensors, dtype=dtype)
        parts: dict = {}  # devices that hold the same part share one read

        def part(index):
            key = tuple(s.indices(n) for s, n in zip(index, p.shape))
            if key not in parts:
                parts[key] = read(index)
            return parts[key]

        with jax.transfer_guard("allow"):  # it counts this explicit transfer as an implicit one
            return jax.make_array_from_callback(p.shape, where, part)

    leaves, tree = jax.tree.flatten(table, is_leaf=model.is_param)
    wheres = [None] * len(leaves)
    if mesh is not None:
        wheres = tree.flatten_up_to(shardings or model.param_shardings(cfg, mesh))
    return tree.unflatten([one(p, w) for p, w in zip(leaves, wheres)]), cfg


def save(
    folder, params: dict, model_cfg: model.ModelConfig, tokenizer=None, *, dtype: str = "bfloat16",
    shard_bytes: float = 5e9, generation_config: dict | None = None, end_ids: tuple[int, ...] = (), source=None,
) -> None:  # fmt: skip
    """Writes a folder that transformers and vLLM open: safetensors, configs, tokenizer, chat template.

    The folder appears whole or not at all: it is written beside its place and renamed. One layer of one parameter is
    gathered at a time. With several processes all must call; process 0 writes.

    Args:
      folder: an empty or missing folder, or an earlier export (`placed.check`), which is replaced.
      params: as `load` returns them, on any mesh.
      tokenizer: a transformers tokenizer; None: no tokenizer files and no token ids.
      dtype: of the tensors: bfloat16 | float16 | float32; those that `stays_float32` names are float32 in any case.
      shard_bytes: a larger model is split into files of at most this size (a single larger tensor excepted).
      generation_config: of the model that this one was trained from: written as it is, but for its end tokens, which it
        gets where it has none; None or empty: none is written.
      source: the folder that the model was loaded from: what it holds beside the text model (a tower of images, heads
        that predict further tokens) is taken over, tensors and config, as it is. None: the text model alone is written.
      end_ids: every token that ends an answer; empty: as generation_config or else the tokenizer says.

    Raises:
      UserError: an unknown dtype, or a folder that holds something else.
    """
    one_of(dtype, SAVE_DTYPES, "dtype")
    source = None if source is None else hub.resolve(source)
    ids = {} if tokenizer is None else {k: getattr(tokenizer, k) for k in hf_config.TOKEN_IDS}
    generation = dict(generation_config or {})
    if end_ids:
        ids["eos_token_id"] = end_ids[0] if len(end_ids) == 1 else sorted(end_ids)
        generation |= {"eos_token_id": ids["eos_token_id"]} if generation else {}  # readers ask config.json no more
    config = hf_config.config_json(
        model_cfg, dtype, ids | {k: v for k, v in generation.items() if k in hf_config.TOKEN_IDS}
    )
    beside: dict = {}
    if source is not None and model_cfg.family in layered.FAMILIES:
        found = safetensors.find(source)
        beside, model_cfg = safetensors.carried(found, model_cfg), layered.in_file(model_cfg, found)
        config = layered.around(config, bounded.read_json(source / "config.json"))
    else:
        model_cfg = dataclasses.replace(model_cfg, prefix=layered.PREFIX)
    with placed.placed(folder, () if source is None else (source,)) as work:
        safetensors.write(work, params, model.table(model_cfg), np.dtype(jnp.dtype(dtype)), shard_bytes, beside=beside)
        if work is not None:
            bounded.write_json(work / "config.json", config)
            if generation:
                bounded.write_json(work / "generation_config.json", generation)
            _write_tokenizer(tokenizer, work)
            if source is not None:
                _copy_small_files(source, work, tokenizer, wrapped="text_config" in config)


def save_adapters(
    folder, adapters: dict, table: dict, config: dict, tokenizer=None, *, dtype: str = "bfloat16", keep=()
) -> None:
    """Writes a PEFT folder: adapter_config.json, adapter_model.safetensors, tokenizer. Whole or not at all, as `save`.

    Args:
      adapters: the trained tree. table: its `model.Param`s (lora.table). config: lora.peft_config.
      tokenizer: the base's; None: no tokenizer files.
      dtype: of the tensors: bfloat16 | float16 | float32.
      keep: paths that `folder` must neither be nor hold: what the adapters were read from.

    Raises:
      UserError: an unknown dtype, or a folder that holds something else.
    """
    one_of(dtype, SAVE_DTYPES, "dtype")
    with placed.placed(folder, keep) as work:
        safetensors.write(work, adapters, table, np.dtype(jnp.dtype(dtype)), math.inf, single=ADAPTER)
        if work is not None:
            bounded.write_json(work / "adapter_config.json", config)
            _write_tokenizer(tokenizer, work)


def generation_config(folder, *, setting: str = "student.path") -> dict:
    """The folder's generation_config.json without its bookkeeping; {} where there is none."""
    path = hub.resolve(folder, setting=setting) / "generation_config.json"
    found = bounded.read_json(path) if path.is_file() else {}
    return {k: v for k, v in found.items() if not k.startswith("_") and k != "transformers_version"}


def _copy_small_files(source: Path, work: Path, tokenizer, *, wrapped: bool) -> None:
    """The source's licence; of a wrapper also what its other inputs are prepared by."""
    names = hub.LICENCES + (PROCESSORS if wrapped else ())
    for path in sorted(p for name in names for p in source.glob(name) if p.is_file()):
        if path.stat().st_size <= bounded.JSON_BYTES and not (work / path.name).exists():
            shutil.copyfile(path, work / path.name)
    old = work / "chat_template.json"  # the processor's: as it was only where the tokenizer's is
    ours = getattr(tokenizer, "chat_template", None)
    if old.exists() and isinstance(ours, str) and ours != load_tokenizer(source).chat_template:
        bounded.write_json(old, {"chat_template": ours})


def _write_tokenizer(tokenizer, work: Path) -> None:
    """The tokenizer's files, where there is one."""
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
        _for_older_readers(work / "tokenizer_config.json")


def _for_older_readers(path: Path) -> None:
    """Makes a tokenizer_config.json of transformers 5 readable for transformers 4, which it stays for 5: the class by
    its name in both, special tokens beside the named ones as the list that 4 knows.
    """
    if not path.is_file():
        return
    config = bounded.read_json(path)
    if config.get("tokenizer_class") in (None, "TokenizersBackend", "PythonBackend"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config.pop("backend", None)
    bounded.write_json(path, config)
