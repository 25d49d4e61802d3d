"""Rows of tokens as the devices take them: padded to few shapes that all processes share, or packed."""

import dataclasses

import jax
import numpy as np

from omniopd_jax.data.prompts import Prompt
from omniopd_jax.parallel import packing, sharding


@dataclasses.dataclass(frozen=True)
class Rows:
    """Prompts directly followed by their responses, on the devices: `token_BL`, or `packed` where rows are shared.

    prompt_length_B: int32. T: response positions of the batch.
    """

    token_BL: jax.Array | None
    packed: packing.Packed | None
    prompt_length_B: jax.Array
    T: int

    @property
    def tokens(self) -> jax.Array | packing.Packed:
        """Whichever holds the tokens."""
        return self.token_BL if self.packed is None else self.packed


def put(prompts: list[Prompt], tokens: list[list[int]], mesh, cfg, *, most: int = 0, like: Rows | None = None) -> Rows:
    """This process's prompts and responses, joined and sent once. All processes must call.

    Args:
      prompts: what precedes each response.
      most: tokens of the longest response; 0: `max_completion_length`.
      like: the same responses behind other prompts, as they were sent: T and each one's place are then the same.
    """
    rows = [list(p.token_ids) + r for p, r in zip(prompts, tokens, strict=True)]
    prompt_length_B = np.array([len(p.token_ids) for p in prompts], np.int32)
    T = like.T if like else response_width(tokens, most or cfg.max_completion_length)
    if not cfg.packing.length:
        L = min(bucket(longest(rows)), prompt_width([p.token_ids for p in prompts]) + T)
        token_BL, prompt_length_B = sharding.put_rows((pad_rows(rows, L)[0], prompt_length_B), mesh)
        return Rows(token_BL, None, prompt_length_B, T)
    laid = None
    if like:
        laid = packing.Laid(sharding.local_rows(like.packed.first_B), like.packed.owner_ZX.shape[1])
    packed = packing.make(
        rows,
        prompt_length_B,
        most=max(cfg.packing.length, longest(rows)) if like else cfg.packing.length,  # privileged prompts are longer
        shards=sharding.own_shards(mesh),
        micro_batches=micro_batches(cfg, len(rows) * jax.process_count()),
        like=laid,
    )
    packed, prompt_length_B = sharding.put_rows((packed, prompt_length_B), mesh)
    return Rows(None, packed, prompt_length_B, T)


def micro_batches(cfg, rows: int) -> int:
    """Micro-batches of a pass over so many rows of all processes: of a part of a step (`rollout.parts`), its share."""
    part = rows * cfg.rollout.parts == cfg.prompts_per_step * cfg.num_generations
    return max(1, cfg.micro_batches // cfg.rollout.parts) if part else cfg.micro_batches


def longest(rows) -> int:
    """Tokens of the longest row of all processes; at least 1, also where every solution of a step failed."""
    return max(1, sharding.global_max(max(map(len, rows))))


def prompt_width(prompt_ids) -> int:
    """P, padded to a bucket that all processes share."""
    return bucket(longest(prompt_ids))


def response_width(tokens, max_completion_length: int) -> int:
    """T, padded to a bucket that all processes share."""
    return min(bucket(longest(tokens)), bucket(max_completion_length))


def bucket(length: int, least: int = 16) -> int:
    """The padded length: multiples of `least` up to 8 of them, then steps of a quarter of the power of two below."""
    step = max(least, 1 << max(0, (max(length, 1) - 1).bit_length() - 3))
    return -(-length // step) * step


def pad_rows(rows, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of token ids -> (int32 [B, width] right-padded with 0, int32 lengths)."""
    out = np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out, np.array([len(r) for r in rows], np.int32)
