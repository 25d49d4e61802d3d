"""What a model is made of: its config's facts, and one declaration per parameter: shape, logical axes, init, and the
Hugging Face tensor that it is. Loading, sharding, init and export all read it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from omniopd_jax.errors import UserError
from omniopd_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a config.json says of the architecture. How a run computes it is `compute.Compute`."""

    family: str  # qwen3 | qwen2 | llama | qwen3_moe
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: tuple[tuple[str, float | str], ...] = ()  # items of a rope_scaling of a known type, sorted
    norm_eps: float = 1e-6
    tied: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    normalize_experts: bool = True
    max_positions: int = 32_768


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter. `hf` is its tensor; leaf = tensor.reshape(view).transpose(perm), by layer and expert."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes, resolved by sharding.RULES
    hf: str  # with {layer} where the leaf is stacked, {expert} likewise
    hf_shape: tuple[int, ...]  # in the file
    view: tuple[int, ...]  # the same with the heads split off
    perm: tuple[int, ...]
    init: str = "normal"  # normal | ones | zeros; adapters: uniform | zeros
    fan_in: int = 0


def table(cfg: ModelConfig) -> dict:
    """Every parameter of the model, as a nested dict of `Param` with the structure of the parameters."""
    V, D, F, Q, K, H = (
        cfg.vocab_size, cfg.hidden_size, cfg.intermediate_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim,
    )  # fmt: skip
    layer = {
        "attn_norm": _vector(D, "input_layernorm.weight"),
        "mlp_norm": _vector(D, "post_attention_layernorm.weight"),
        "q": _heads(D, Q, H, "heads", "self_attn.q_proj.weight"),
        "k": _heads(D, K, H, "kv_heads", "self_attn.k_proj.weight"),
        "v": _heads(D, K, H, "kv_heads", "self_attn.v_proj.weight"),
        "o": Param(
            (Q, H, D), ("heads", None, "embed"), "self_attn.o_proj.weight", (D, Q * H), (D, Q, H), (1, 2, 0),
            fan_in=Q * H,
        ),
    }  # fmt: skip
    if cfg.qk_norm:
        layer |= {n: _vector(H, f"self_attn.{n}.weight", axis=None) for n in ("q_norm", "k_norm")}
    if cfg.qkv_bias:
        for name, n, axis in (("q", Q, "heads"), ("k", K, "kv_heads"), ("v", K, "kv_heads")):
            key = f"self_attn.{name}_proj.bias"
            layer[f"{name}_bias"] = Param((n, H), (axis, None), key, (n * H,), (n, H), (0, 1), "zeros")
    if cfg.out_bias:
        layer["o_bias"] = _vector(D, "self_attn.o_proj.bias", init="zeros")
    if cfg.num_experts:
        E, F = cfg.num_experts, cfg.expert_size
        layer["router"] = _matrix((D, E), ("embed", None), "mlp.gate.weight")
        for name, shape, axes in (
            ("gate", (D, F), ("embed", "ff")), ("up", (D, F), ("embed", "ff")), ("down", (F, D), ("ff", "embed")),
        ):  # fmt: skip
            p = _matrix(shape, axes, f"mlp.experts.{{expert}}.{name}_proj.weight")
            layer[name] = dataclasses.replace(p, shape=(E, *shape), axes=("experts", *axes))
    else:
        layer["gate"] = _matrix((D, F), ("embed", "ff"), "mlp.gate_proj.weight")
        layer["up"] = _matrix((D, F), ("embed", "ff"), "mlp.up_proj.weight")
        layer["down"] = _matrix((F, D), ("ff", "embed"), "mlp.down_proj.weight")

    def stack(p: Param) -> Param:
        hf = f"model.layers.{{layer}}.{p.hf}"
        return dataclasses.replace(p, shape=(cfg.num_layers, *p.shape), axes=("layers", *p.axes), hf=hf)

    out = {
        "embed": Param((V, D), ("vocab", "embed"), "model.embed_tokens.weight", (V, D), (V, D), (0, 1), fan_in=D),
        "layers": {name: stack(p) for name, p in layer.items()},
        "final_norm": _vector(D, "model.norm.weight"),
    }
    if not cfg.tied:
        out["head"] = _matrix((D, V), ("embed", "vocab"), "lm_head.weight")
    return out


def _vector(n: int, hf: str, axis: str | None = "embed_norm", init: str = "ones") -> Param:
    return Param((n,), (axis,), hf, (n,), (n,), (0,), init)


def _heads(d: int, n: int, h: int, axis: str, hf: str) -> Param:
    return Param((d, n, h), ("embed", axis, None), hf, (n * h, d), (n, h, d), (2, 0, 1), fan_in=d)


def _matrix(shape: tuple[int, int], axes: tuple, hf: str) -> Param:
    """A projection [in, out]; the file holds it [out, in]."""
    return Param(shape, axes, hf, shape[::-1], shape[::-1], (1, 0), fan_in=shape[0])


def is_param(x) -> bool:
    """Leaf test for `jax.tree.map` over a table."""
    return isinstance(x, Param)


def fits(params: dict, table: dict) -> bool:
    """Whether `params` has the names and shapes of a table."""
    leaves, tree = jax.tree.flatten(table, is_leaf=is_param)
    return jax.tree.structure(params) == tree and all(
        tuple(a.shape) == p.shape for a, p in zip(jax.tree.leaves(params), leaves)
    )


def init(key: jax.Array, cfg: ModelConfig) -> dict:
    """Random float32 parameters: normal, standard deviation fan_in**-0.5 (embeddings 0.02); norms one, biases zero."""
    leaves, tree = jax.tree.flatten(table(cfg), is_leaf=is_param)

    def one(key, p: Param):
        if p.init != "normal":
            return jnp.full(p.shape, float(p.init == "ones"), jnp.float32)
        scale = 0.02 if "embed_tokens" in p.hf or "lm_head" in p.hf else p.fan_in**-0.5
        return scale * jax.random.normal(key, p.shape, jnp.float32)

    return tree.unflatten([one(k, p) for k, p in zip(jax.random.split(key, len(leaves)), leaves)])


def param_shardings(cfg: ModelConfig, mesh, rules=sharding.RULES) -> dict:
    """`table_shardings` of every parameter of the model."""
    return table_shardings(table(cfg), mesh, rules)


def table_shardings(params: dict, mesh, rules=sharding.RULES) -> dict:
    """NamedSharding of every `Param`; an axis that the mesh axis does not divide is an error that names both.

    Raises:
      UserError: e.g. 3 kv heads over tp = 2.
    """

    def one(p: Param):
        names = [rules[a] for a in p.axes]
        for size, axis, name in zip(p.shape, p.axes, names):
            if name and size % mesh.shape[name]:
                raise UserError(f"{p.hf}: {axis} = {size} is not divisible by mesh.{name} = {mesh.shape[name]}")
        return NamedSharding(mesh, P(*names))

    return jax.tree.map(one, params, is_leaf=is_param)


@functools.lru_cache
def num_params(cfg: ModelConfig) -> int:
    """Number of parameters, tied head counted once."""
    return count(table(cfg))


def count(table: dict) -> int:
    """Numbers that a table's parameters hold."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(table, is_leaf=is_param))
