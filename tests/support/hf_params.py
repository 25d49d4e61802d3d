"""A small Qwen3 and random parameters, for the tests of Hugging Face folders."""

import jax
import numpy as np

from omniopd_jax import model

BASE = model.ModelConfig(
    family="qwen3", vocab_size=38, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, qk_norm=True, tied=True,
)  # fmt: skip


def random_params(cfg, seed=0) -> dict:
    """Numpy parameters, none of them constant."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: rng.standard_normal(p.shape).astype(np.float32), model.table(cfg), is_leaf=model.is_param
    )


def same_bits(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )
