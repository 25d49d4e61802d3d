"""Hugging Face folders in and out, without torch: config.json, safetensors, tokenizer, generation_config.json.

`model.table` says which tensor every parameter is; this file reads and writes by that table alone. Files are mapped,
not read: safetensors' own slices cannot be cut after a reshape, and a device's part of a projection is a few heads.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from omniopd_jax import model
from omniopd_jax.errors import UserError, one_of
from omniopd_jax.hf import config as hf_config
from omniopd_jax.hf.config import model_config  # noqa: F401  part of this module's interface

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
SAVE_DTYPES = ("bfloat16", "float16", "float32")
ADAPTER = "adapter_model.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PACKAGE = Path(__file__).resolve().parents[1]
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")


class Tensor(NamedTuple):
    """Where one tensor lies: `data` is the mapped file, bytes `start` to `start + nbytes`."""

    file: Path
    data: np.memmap
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def view(self) -> np.ndarray:
        """The tensor without a copy: pages are read where they are touched."""
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        return self.data[self.start : self.start + nbytes].view(self.dtype).reshape(self.shape)


def read_config(folder, *, setting: str = "student.path") -> model.ModelConfig:
    """ModelConfig of a folder or hub name; reads config.json alone.

    Raises:
      UserError: no such folder, unreachable hub, or a config.json that `model_config` refuses.
    """
    path = resolve(folder, setting=setting, files=("config.json",)) / "config.json"
    return model_config(_json(path), str(path))


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
      shardings: where each parameter lies instead, such as in host memory.
      setting: the config key that errors name.

    Raises:
      UserError: names the file and the tensor that is missing, extra, misshapen, truncated, or not safetensors.
    """
    folder = resolve(folder, setting=setting)
    cfg = read_config(folder, setting=setting)
    dtype = np.dtype(jnp.dtype(dtype or "float32"))
    tensors = _tensors(folder)
    table = model.table(cfg)
    _check(tensors, table, cfg, folder)

    def one(p: model.Param, where):
        if where is None:
            return jax.device_put(_read(p, tensors, (slice(None),) * len(p.shape), dtype))
        read = functools.partial(_read, p, tensors, dtype=dtype)
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
    shard_bytes: float = 5e9, generation_config: dict | None = None,
) -> None:  # fmt: skip
    """Writes a folder that transformers and vLLM open: safetensors, configs, tokenizer, chat template.

    The folder appears whole or not at all: it is written beside its place and renamed. One layer of one parameter is
    gathered at a time. With several processes all must call; process 0 writes.

    Args:
      folder: an empty or missing folder, or an earlier export, which is replaced.
      params: as `load` returns them, on any mesh.
      tokenizer: a transformers tokenizer; None: no tokenizer files and no token ids.
      dtype: of the tensors: bfloat16 | float16 | float32.
      shard_bytes: a larger model is split into files of at most this size (a single larger tensor excepted).
      generation_config: entries of generation_config.json beside the defaults (`do_sample`: true, the token ids).

    Raises:
      UserError: an unknown dtype, or a folder that holds something else.
    """
    one_of(dtype, SAVE_DTYPES, "dtype")
    ids = {} if tokenizer is None else {k: getattr(tokenizer, k) for k in hf_config.TOKEN_IDS}
    generation = {"do_sample": True} | ids | (generation_config or {})
    config = hf_config.config_json(model_cfg, dtype, generation)
    with _placed(folder, "config.json") as work:
        _write_tensors(work, params, model.table(model_cfg), np.dtype(jnp.dtype(dtype)), shard_bytes)
        if work is not None:
            _dump(work / "config.json", config)
            _dump(work / "generation_config.json", generation)
            if tokenizer is not None:
                tokenizer.save_pretrained(work)


def save_adapters(folder, adapters: dict, table: dict, config: dict, *, dtype: str = "bfloat16") -> None:
    """Writes a PEFT folder: adapter_config.json and adapter_model.safetensors. Whole or not at all, as `save`.

    Args:
      adapters: the trained tree. table: its `model.Param`s (lora.table). config: lora.peft_config.
      dtype: of the tensors: bfloat16 | float16 | float32.

    Raises:
      UserError: an unknown dtype, or a folder that holds something else.
    """
    one_of(dtype, SAVE_DTYPES, "dtype")
    with _placed(folder, "adapter_config.json") as work:
        _write_tensors(work, adapters, table, np.dtype(jnp.dtype(dtype)), math.inf, single=ADAPTER)
        if work is not None:
            _dump(work / "adapter_config.json", config)


@contextlib.contextmanager
def _placed(folder, marker: str):
    """Gives a place to write beside `folder`, and renames it to `folder` at the end; None but in process 0.

    An old folder is replaced where it is empty or holds the file `marker`.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / marker).is_file())):
        raise UserError(f"{folder} exists and is no Hugging Face folder (it has no {marker}); give an empty or a new one")
    writer = jax.process_index() == 0
    work = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        if writer:
            work.mkdir(parents=True)
        yield work if writer else None
        if writer:
            _replace(work, folder)
    finally:
        if writer:
            shutil.rmtree(work, ignore_errors=True)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("hf.save")


def load_tokenizer(folder, *, setting: str = "student.path"):
    """The folder's transformers tokenizer, which must have a chat template.

    Raises:
      UserError: no tokenizer files, files that transformers cannot read, or no chat template.
    """
    folder = resolve(folder, setting=setting)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise UserError(f"{setting}: {folder} holds no tokenizer (tokenizer.json, tokenizer_config.json)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises what the parser of the day raises
        raise UserError(f"{setting}: transformers cannot read the tokenizer in {folder}: {_line(e)}") from e
    if not tokenizer.chat_template:
        raise UserError(
            f"{setting}: the tokenizer in {folder} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); take the instruct model's folder or add one"
        )
    return tokenizer


def end_ids(folder, tokenizer=None, *, setting: str = "student.path") -> tuple[int, ...]:
    """Tokens that end an answer: of generation_config.json, config.json and the tokenizer, ascending, each once."""
    folder = resolve(folder, setting=setting)
    found = set() if tokenizer is None or tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        ids = _json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return tuple(sorted(found))


def generation_config(folder, *, setting: str = "student.path") -> dict:
    """The folder's generation_config.json without its bookkeeping; {} where there is none."""
    path = resolve(folder, setting=setting) / "generation_config.json"
    found = _json(path) if path.is_file() else {}
    return {k: v for k, v in found.items() if not k.startswith("_") and k != "transformers_version"}


def resolve(folder, *, setting: str = "student.path", files=HUB_FILES) -> Path:
    """The local folder of a path or hub name; a hub name is downloaded once (`files`: glob patterns).

    Raises:
      UserError: no such folder, or a hub that cannot be reached (within seconds) and no cached copy.
    """
    name = str(folder)
    if not name:
        raise UserError(f"{setting} is empty: set it to a Hugging Face folder")
    packaged = PACKAGE.parent / name  # omniopd_jax/world/checkpoints/...: found from any folder
    path = packaged if name.startswith(f"{PACKAGE.name}/") and packaged.is_dir() else Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{setting} = {name!r} is a file; give the folder that holds config.json and model.safetensors")
    if name.count("/") > 1 or name[0] in "/.~" or name.endswith("/"):
        raise UserError(f"{setting} = {name!r}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), etag_timeout=5))
    except Exception as e:  # the client's own, httpx's and the file system's errors alike
        raise UserError(
            f"{setting} = {name!r} is no folder here, and as a hub name it cannot be had ({_line(e)}); "
            f"set {setting} to a local folder"
        ) from e


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, found and bounds-checked, none read."""
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise UserError(_no_safetensors(folder))
    mapped = _json(folder / INDEX).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(f, str) for f in mapped.values()):
        raise UserError(f"{folder / INDEX}: no weight_map")
    found: dict[str, Tensor] = {}
    for file in sorted(set(mapped.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{folder / INDEX} names the file {file!r}, which is not in the folder")
        here = _header(folder / file)
        for name in here:
            if mapped.get(name) != file:
                raise UserError(f"{folder / file}: tensor {name} is not listed there by {INDEX}")
        found |= here
    if missing := sorted(set(mapped) - set(found)):
        raise UserError(f"{folder / mapped[missing[0]]}: tensor {missing[0]} is missing, though {INDEX} lists it")
    return found


def _header(file: Path) -> dict[str, Tensor]:
    """The header of one safetensors file: {name: Tensor}, each checked against the file's size."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{file}: truncated or not safetensors: its header ({length} bytes) passes the file's end")
        try:
            header = json.loads(f.read(length))
            entries = {
                n: (e["dtype"], tuple(map(int, e["shape"])), *map(int, e["data_offsets"]))
                for n, e in header.items() if n != "__metadata__"
            }  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{file}: not a safetensors file: its header cannot be read ({_line(e)})") from e
    data = np.memmap(file, np.uint8, "r") if size > 8 + length else np.empty(0, np.uint8)
    out = {}
    end = 0
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if dtype not in DTYPES:
            raise UserError(f"{file}: tensor {name} is {dtype}; only {', '.join(DTYPES)} are read, nothing quantised")
        if start != end or stop - start != math.prod(shape) * DTYPES[dtype].itemsize or min(shape, default=0) < 0:
            raise UserError(f"{file}: tensor {name}: bytes {start} to {stop} do not fit shape {list(shape)} {dtype}")
        if 8 + length + stop > size:
            raise UserError(f"{file}: truncated: tensor {name} ends at byte {8 + length + stop}, the file at {size}")
        out[name] = Tensor(file, data, DTYPES[dtype], shape, 8 + length + start)
        end = stop
    if 8 + length + end != size:
        raise UserError(f"{file}: corrupt: {size - 8 - length - end} bytes after its last tensor")
    return out


def _no_safetensors(folder: Path) -> str:
    """What the folder holds instead of model.safetensors, in a line."""
    pickles = sorted(f.name for s in ("*.bin", "*.pt", "*.pth") for f in folder.glob(s))
    if pickles:
        return (
            f"{folder / pickles[0]}: a pickle checkpoint, which can run code when opened, is not read; convert it: "
            "AutoModelForCausalLM.from_pretrained(F).save_pretrained(F2, safe_serialization=True)"
        )
    if (folder / "adapter_config.json").is_file():
        return f"{folder}: a PEFT adapter, not a model; merge it into its base model first"
    return f"{folder} holds neither {SINGLE} nor {INDEX}"


def _check(tensors: dict[str, Tensor], table: dict, cfg: model.ModelConfig, folder: Path) -> None:
    """Exactly one tensor a parameter, of its shape, and none left over."""
    left = dict(tensors)
    for p in jax.tree.leaves(table, is_leaf=model.is_param):
        for name in names(p).values():
            found = left.pop(name, None)
            if found is None:
                raise UserError(f"{folder}: tensor {name} is missing from the checkpoint")
            if found.shape != p.hf_shape:
                raise UserError(
                    f"{found.file}: tensor {name} has shape {list(found.shape)}, config.json says {list(p.hf_shape)}"
                )
    if cfg.tied and "lm_head.weight" in left:
        head, embed = left.pop("lm_head.weight"), tensors["model.embed_tokens.weight"]
        if head.shape != embed.shape or head.dtype != embed.dtype or not _equal(head.view(), embed.view()):
            raise UserError(
                f"{head.file}: tensor lm_head.weight differs from model.embed_tokens.weight, but config.json says "
                "tie_word_embeddings: true; set it to false if the model has its own head"
            )
    left = {n: t for n, t in left.items() if not n.endswith(".rotary_emb.inv_freq")}  # old exports store the angles too
    if left:
        name = min(left)
        raise UserError(
            f"{left[name].file}: tensor {name} belongs to no parameter of {cfg.family}"
            + (f" (and {len(left) - 1} more: {', '.join(sorted(left)[1:4])})" if len(left) > 1 else "")
        )


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits, a block of rows at a time: the maps stay unread beyond the first difference."""
    rows = max(1, (1 << 24) // max(1, a[0].size if a.ndim else 1))
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return all(np.array_equal(a[i : i + rows].view(bits), b[i : i + rows].view(bits)) for i in range(0, len(a), rows))


def names(p: model.Param) -> dict[tuple[int, ...], str]:
    """{(layer, expert) as far as the leaf is stacked: tensor name}."""
    lead = len(p.shape) - len(p.perm)
    keys = ("layer", "expert")[:lead]
    return {at: p.hf.format(**dict(zip(keys, at))) for at in itertools.product(*map(range, p.shape[:lead]))}


def _read(p: model.Param, tensors: dict[str, Tensor], index, dtype) -> np.ndarray:
    """The part `index` of a leaf, cast, from the bytes that it needs."""
    lead = len(p.shape) - len(p.perm)
    ranges = [range(*s.indices(n)) for s, n in zip(index, p.shape)]
    out = np.empty([len(r) for r in ranges], dtype)
    named = names(p)
    inner = tuple(index[lead:])
    for at in itertools.product(*ranges[:lead]):
        view = tensors[named[at]].view().reshape(p.view).transpose(p.perm)[inner]
        out[tuple(i - r.start for i, r in zip(at, ranges))] = view
    return out


def _write_tensors(work: Path | None, params: dict, table: dict, dtype, shard_bytes: float, single: str = SINGLE) -> None:
    """All tensors into one file or shards with an index; `work` None: only take part in the gathers."""
    from safetensors.numpy import save_file

    leaves, tree = jax.tree.flatten(table, is_leaf=model.is_param)
    arrays = tree.flatten_up_to(params)
    plan: list[list] = [[]]  # shards of (Param, array, layer or None)
    room = shard_bytes
    for p, array in zip(leaves, arrays):
        if tuple(array.shape) != p.shape:
            raise ValueError(f"{p.hf}: array of shape {array.shape}, the table says {p.shape}")
        for layer in range(p.shape[0]) if p.axes[0] == "layers" else (None,):
            nbytes = math.prod(p.shape[layer is not None :]) * dtype.itemsize
            if nbytes > room and plan[-1]:
                plan.append([])
                room = shard_bytes
            plan[-1].append((p, array, layer))
            room -= nbytes
    files = [single] if len(plan) == 1 else [
        f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))]  # fmt: skip
    mapped, total = {}, 0
    for file, parts in zip(files, plan):
        here: dict[str, np.ndarray] = {}
        for p, array, layer in parts:
            values = _gather(array, layer, dtype)
            if work is not None:
                here |= _split(p, values, layer)
        if work is not None:
            save_file(here, work / file, metadata={"format": "pt"})
            mapped |= dict.fromkeys(here, file)
            total += sum(a.nbytes for a in here.values())
    if work is not None and len(plan) > 1:
        _dump(work / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(mapped.items()))})


def _split(p: model.Param, values: np.ndarray, layer: int | None) -> dict[str, np.ndarray]:
    """{tensor name: array in the file's shape} of one layer of a leaf (a tensor an expert), or of a whole leaf."""
    back = tuple(int(i) for i in np.argsort(p.perm))
    out = {}
    for at, name in names(p).items():
        if layer is None or at[0] == layer:
            inner = values[at if layer is None else at[1:]]
            out[name] = np.ascontiguousarray(inner.transpose(back)).reshape(p.hf_shape)
    return out


def _gather(array, layer: int | None, dtype) -> np.ndarray:
    """One layer of a (possibly sharded) leaf, or the whole of one without layers, cast, on this host."""
    if not isinstance(array, jax.Array):
        return np.asarray(array if layer is None else array[layer]).astype(dtype)
    where = NamedSharding(array.sharding.mesh, PartitionSpec()) if isinstance(array.sharding, NamedSharding) else None
    cut = _cutter(np.dtype(dtype).name, layer is not None, where)
    return np.asarray(jax.device_get(cut(array, jax.device_put(np.int32(layer or 0), where))))


@functools.lru_cache
def _cutter(dtype: str, stacked: bool, where):
    def cut(array, layer):
        part = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) if stacked else array
        return part.astype(dtype)

    return jax.jit(cut, out_shardings=where)


def _replace(work: Path, folder: Path) -> None:
    """Renames `work` to `folder`; what stood there goes only once the new one is in place."""
    old = folder.parent / f"{work.name}.old"
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist") from e
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {_line(e)}") from e
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def _dump(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _line(e: Exception) -> str:
    """The first line of an error, short."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
