"""What a trained model has lost: its perplexity on ordinary prose, written for this and kept in prose.txt."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax import hf, model
from omniopd_jax.model import lora
from omniopd_jax.run import trained

PROSE = pathlib.Path(__file__).with_name("prose.txt")
LENGTH = 128  # tokens of a window


def perplexity(folder: pathlib.Path, updates: int) -> float:
    """Of the prose in windows of `LENGTH` tokens: the base model's (0 updates), or that of the run's newest
    checkpoint."""
    run = trained.read(folder, None)
    tokenizer = hf.load_tokenizer(run.student)
    ids = tokenizer(PROSE.read_text(), add_special_tokens=False)["input_ids"]
    token_BL = np.array(ids[: len(ids) // LENGTH * LENGTH], np.int32).reshape(-1, LENGTH)
    params = run.whole() if updates else hf.load(run.student)[0]
    scale = lora.scale(run.lora) if updates else None
    return round(float(np.exp(_loss(params, run.model_cfg, model.Compute(lora_scale=scale), token_BL))), 3)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _loss(params, model_cfg, compute, token_BL):
    """Mean negative log-likelihood of each window's tokens behind its first, in nats."""
    logits_BLV = model.logits(params, model_cfg, model.hidden(params, model_cfg, token_BL, compute=compute))
    logp_BLV = jax.nn.log_softmax(logits_BLV[:, :-1].astype(jnp.float32))
    return -jnp.take_along_axis(logp_BLV, token_BL[:, 1:, None], axis=-1).mean()
