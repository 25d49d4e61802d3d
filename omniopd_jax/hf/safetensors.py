"""Tensors in and out of safetensors files, without torch: one tensor per parameter, as `model.table` says.

Files are mapped, not read: safetensors' own slices cannot be cut after a reshape, and a device's part of a projection
is a few heads. All is checked before the first byte of a tensor is read.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from omniopd_jax import model
from omniopd_jax.errors import UserError
from omniopd_jax.hf import bounded, layered

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES = 100_000_000  # the format's own bound


class Tensor(NamedTuple):
    """Where one tensor is stored: `data` is the mapped file, bytes `start` to `start + nbytes`."""

    file: Path
    data: np.memmap
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def view(self) -> np.ndarray:
        """The tensor without a copy: pages are read where they are touched."""
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        return self.data[self.start : self.start + nbytes].view(self.dtype).reshape(self.shape)


def find(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, found and bounds-checked, none read."""
    if (folder / SINGLE).is_file():
        return header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise UserError(_no_safetensors(folder))
    mapped = bounded.read_json(folder / INDEX).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(f, str) for f in mapped.values()):
        raise UserError(f"{folder / INDEX}: no weight_map")
    found: dict[str, Tensor] = {}
    for file in sorted(set(mapped.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{folder / INDEX} names the file {file!r}, which is not in the folder")
        here = header(folder / file)
        for name in here:
            if mapped.get(name) != file:
                raise UserError(f"{folder / file}: tensor {name} is not listed there by {INDEX}")
        found |= here
    if missing := sorted(set(mapped) - set(found)):
        raise UserError(f"{folder / mapped[missing[0]]}: tensor {missing[0]} is missing, though {INDEX} lists it")
    return found


def header(file: Path) -> dict[str, Tensor]:
    """The header of one safetensors file: {name: Tensor}, each checked against the file's size."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{file}: truncated or not safetensors: its header ({length} bytes) passes the file's end")
        if length > HEADER_BYTES:
            raise UserError(
                f"{file}: not safetensors: a header of {length:,} bytes; the format allows {HEADER_BYTES:,}"
            )
        try:
            raw = bounded.parse(f.read(length), "it")
            entries = {n: _entry(e) for n, e in raw.items() if n != "__metadata__"}
        except (UserError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{file}: not a safetensors file: its header cannot be read ({bounded.line(e)})") from e
    data = np.memmap(file, np.uint8, "r") if size > 8 + length else np.empty(0, np.uint8)
    out = {}
    end = 0
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if dtype not in DTYPES:
            raise UserError(f"{file}: tensor {name} is {dtype}; only {', '.join(DTYPES)} are read, nothing quantised")
        if start != end or stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise UserError(f"{file}: tensor {name}: bytes {start} to {stop} do not fit shape {list(shape)} {dtype}")
        if 8 + length + stop > size:
            raise UserError(f"{file}: truncated: tensor {name} ends at byte {8 + length + stop}, the file at {size}")
        out[name] = Tensor(file, data, DTYPES[dtype], shape, 8 + length + start)
        end = stop
    if 8 + length + end != size:
        raise UserError(f"{file}: corrupt: {size - 8 - length - end} bytes after its last tensor")
    return out


def _entry(e: dict) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, last byte) of a tensor's entry in a header.

    Raises:
      ValueError, TypeError, KeyError: it is none.
    """
    shape, (start, stop) = e["shape"], e["data_offsets"]
    if not isinstance(e["dtype"], str) or len(shape) > 8:
        raise ValueError("an entry that is no tensor's")
    for n in (*shape, start, stop):
        if type(n) is not int or not 0 <= n < 2**60:
            raise ValueError(f"the size {str(n)[:30]} of a tensor")
    return e["dtype"], tuple(shape), start, stop


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


def check(tensors: dict[str, Tensor], table: dict, cfg: model.ModelConfig, folder: Path) -> None:
    """Exactly one tensor a parameter, of its shape, and none left over."""
    left = dict(tensors)
    described, held = model.num_params(cfg), sum(math.prod(t.shape) for t in tensors.values())
    if described > 2 * held or described * 4 < held:  # smaller differences are named by their tensor
        raise UserError(
            f"{folder}: config.json describes {described:,} parameters, the tensors hold {held:,}: not one model"
        )
    for p in jax.tree.leaves(table, is_leaf=model.is_param):
        for _, name in named(p):
            found = left.pop(name, None)
            if found is None:
                raise UserError(f"{folder}: tensor {name} is missing from the checkpoint")
            if found.shape != p.hf_shape:
                raise UserError(
                    f"{found.file}: tensor {name} has shape {list(found.shape)}, config.json says {list(p.hf_shape)}"
                )
    if cfg.tied and "lm_head.weight" in left:
        head, embed = left.pop("lm_head.weight"), tensors[table["embed"].hf]
        if head.shape != embed.shape or head.dtype != embed.dtype or not _equal(head.view(), embed.view()):
            raise UserError(
                f"{head.file}: tensor lm_head.weight differs from model.embed_tokens.weight, but config.json says "
                "tie_word_embeddings: true; set it to false if the model has its own head"
            )
    left = {n: t for n, t in left.items() if not n.endswith(".rotary_emb.inv_freq")}  # old exports store the angles too
    beside = carried(left, cfg)
    left = {n: t for n, t in left.items() if n not in beside}
    if left:
        name = min(left)
        raise UserError(
            f"{left[name].file}: tensor {name} belongs to no parameter of {cfg.family}"
            + (f" (and {len(left) - 1} more: {', '.join(sorted(left)[1:4])})" if len(left) > 1 else "")
        )


def carried(tensors: dict[str, Tensor], cfg: model.ModelConfig) -> dict[str, Tensor]:
    """What a checkpoint holds beside the text model, which an export takes over as it is: towers of images, heads that
    predict further tokens. Empty for a family that has none."""
    known = cfg.family in layered.FAMILIES
    return {name: t for name, t in tensors.items() if known and name.startswith(layered.CARRIED)}


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits, a block of rows at a time: the maps stay unread beyond the first difference."""
    rows = max(1, (1 << 24) // max(1, a[0].size if a.ndim else 1))
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return all(np.array_equal(a[i : i + rows].view(bits), b[i : i + rows].view(bits)) for i in range(0, len(a), rows))


def named(p: model.Param) -> Iterator[tuple[tuple[int, ...], str]]:
    """((layer, expert) as far as the leaf is stacked, tensor name), one after the other: a config may name a
    billion."""
    lead = len(p.shape) - len(p.perm)
    keys = ("layer", "expert")[:lead]
    for at in np.ndindex(*p.shape[:lead]):
        number = (p.layers[at[0]], *at[1:]) if p.layers else at
        yield at, p.hf.format(**dict(zip(keys, number)))


def read(p: model.Param, tensors: dict[str, Tensor], index, dtype) -> np.ndarray:
    """The part `index` of a leaf, cast, from the bytes that it needs."""
    lead = len(p.shape) - len(p.perm)
    ranges = [range(*s.indices(n)) for s, n in zip(index, p.shape)]
    out = np.empty([len(r) for r in ranges], dtype)
    names = dict(named(p))
    inner = tuple(index[lead:])
    for at in itertools.product(*ranges[:lead]):
        out[tuple(i - r.start for i, r in zip(at, ranges))] = laid_out(tensors[names[at]].view(), p)[inner]
    return out


def laid_out(tensor: np.ndarray, p: model.Param) -> np.ndarray:
    """A file's tensor as the leaf holds it (one layer, one expert of it); a view where no rows change places."""
    if p.parts:
        heads = len(tensor) // sum(p.parts)
        ends = np.cumsum([heads * n for n in p.parts])[:-1]
        pieces = [a.reshape(heads, n, *a.shape[1:]) for a, n in zip(np.split(tensor, ends), p.parts)]
        tensor = np.concatenate(pieces, axis=1)
    return tensor.reshape(p.view).transpose(p.perm)


def as_in_file(leaf: np.ndarray, p: model.Param) -> np.ndarray:
    """The inverse of `laid_out`."""
    tensor = leaf.transpose(np.argsort(p.perm))
    if p.parts:
        heads, *rest = p.hf_shape[0] // sum(p.parts), *p.hf_shape[1:]
        pieces = np.split(tensor.reshape(heads, sum(p.parts), *rest), np.cumsum(p.parts)[:-1], axis=1)
        tensor = np.concatenate([a.reshape(-1, *rest) for a in pieces])
    return np.ascontiguousarray(tensor).reshape(p.hf_shape)


def write(
    work: Path | None, params: dict, table: dict, dtype, shard_bytes: float, single: str = SINGLE,
    beside: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """All tensors into one file or shards with an index; `work` None: only take part in the gathers.

    Args:
      beside: tensors that are written as they are, as a shard of their own (`carried`).
    """
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
    count = len(plan) + bool(beside)
    files = [single] if count == 1 else [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]  # fmt: skip
    mapped, total = {}, 0
    for file, parts in zip(files, plan):
        here: dict[str, np.ndarray] = {}
        for p, array, layer in parts:
            values = _gather(array, layer, np.dtype(np.float32) if p.stays_float32 else dtype)
            if work is not None:
                here |= _split(p, values, layer)
        if work is not None:
            save_file(here, work / file, metadata={"format": "pt"})
            mapped |= dict.fromkeys(here, file)
            total += sum(a.nbytes for a in here.values())
    if work is not None and beside:
        here = {name: np.ascontiguousarray(t.view()) for name, t in beside.items()}
        save_file(here, work / files[-1], metadata={"format": "pt"})
        mapped |= dict.fromkeys(here, files[-1])
        total += sum(a.nbytes for a in here.values())
    if work is not None and count > 1:
        bounded.write_json(
            work / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(mapped.items()))}
        )


def _split(p: model.Param, values: np.ndarray, layer: int | None) -> dict[str, np.ndarray]:
    """{tensor name: array in the file's shape} of one layer of a leaf (a tensor an expert), or of a whole leaf."""
    out = {}
    for at, name in named(p):
        if layer is None or at[0] == layer:
            inner = values[at if layer is None else at[1:]]
            out[name] = as_in_file(inner, p)
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
