"""What a trained model has lost: its perplexity on ordinary prose, written for this and kept in prose.txt."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax import hf, model
from omniopd_jax.run import trained

PROSE = pathlib.Path(__file__).with_name("prose.txt")
LENGTH = 128  # tokens of a window


def perplexities(folder: pathlib.Path) -> list[float]:
    """[the base model's, that of the run's newest checkpoint], of the prose in windows of `LENGTH` tokens."""
    after = trained.read(folder, None)
    tokenizer = hf.load_tokenizer(after.student)
    ids = tokenizer(PROSE.read_text(), add_special_tokens=False)["input_ids"]
    token_BL = np.array(ids[: len(ids) // LENGTH * LENGTH], np.int32).reshape(-1, LENGTH)
    base = hf.load(after.student)[0]
    return [round(float(np.exp(_loss(params, after.model_cfg, token_BL))), 3) for params in (base, after.whole())]


@functools.partial(jax.jit, static_argnums=1)
def _loss(params, model_cfg, token_BL):
    """Mean negative log-likelihood of each window's tokens behind its first, in nats."""
    logits_BLV = model.logits(params, model_cfg, model.hidden(params, model_cfg, token_BL))
    logp_BLV = jax.nn.log_softmax(logits_BLV[:, :-1].astype(jnp.float32))
    return -jnp.take_along_axis(logp_BLV, token_BL[:, 1:, None], axis=-1).mean()
