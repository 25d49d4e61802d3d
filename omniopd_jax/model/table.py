"""What a model is made of: its config's facts, and one declaration per parameter: shape, logical axes, init, and the
Hugging Face tensor that it is. Loading, sharding, init and export all read it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from omniopd_jax.errors import UserError
from omniopd_jax.parallel import sharding

FLOAT32 = ("a_log", "dt_bias")  # leaves that are computed with in float32 whatever the rest is in


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a config.json says of the architecture. How a run computes it is `compute.Compute`."""

    family: str  # qwen3 | qwen2 | llama | qwen3_moe | gemma3 | qwen3_5
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
    # of families whose layers differ, or whose parts do
    layer_kinds: tuple[str, ...] = ()  # of each layer: full | sliding | linear; empty: full, all of them
    window: int = 0  # sliding: tokens that a token sees, itself included
    local_rope_theta: float | None = None  # sliding: the base of its own RoPE, which is not scaled
    rotary_dim: int = 0  # how much of a head RoPE turns; 0: all of it
    query_scale: float | None = None  # attention scores are divided by its root; None: by that of head_dim
    zero_centred_norms: bool = False  # a norm's factor is 1 + w
    post_norms: bool = False  # norms of what attention and feed-forward give, before it is added
    scaled_embeddings: bool = False  # times the root of hidden_size
    activation: str = "silu"  # silu | gelu_tanh
    attention_gate: bool = False  # q_proj gives a gate too: attention's output times its sigmoid
    linear_key_heads: int = 0  # linear: heads of query and key, and of value, their widths, the convolution's width
    linear_value_heads: int = 0
    linear_key_dim: int = 0
    linear_value_dim: int = 0
    conv_width: int = 0
    prefix: str = "model."  # of the text model's tensors in the file

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer."""
        return self.layer_kinds or ("full",) * self.num_layers

    @property
    def period(self) -> int:
        """Layers after which the kinds repeat."""
        kinds = self.kinds
        return next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))

    @property
    def conv_channels(self) -> int:
        """Channels of a linear layer's convolution: its queries, keys and values."""
        return 2 * self.linear_key_heads * self.linear_key_dim + self.linear_value_heads * self.linear_value_dim


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter. `hf` is its tensor; leaf = tensor.reshape(view).transpose(perm), by layer and expert."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes, resolved by sharding.RULES
    hf: str  # with {layer} where the leaf is stacked, {expert} likewise
    hf_shape: tuple[int, ...]  # in the file
    view: tuple[int, ...]  # the same with the heads split off
    perm: tuple[int, ...]
    init: str = "normal"  # normal | ones | zeros | log_uniform; adapters: uniform | zeros
    fan_in: int = 0
    layers: Sequence[int] = ()  # the numbers of the layers that a stacked leaf holds
    stays_float32: bool = False  # in an export of any dtype, as in the published files
    parts: tuple[int, ...] = ()  # rows a head has of each part of hf's: there part by part, in the leaf head by head


def table(cfg: ModelConfig) -> dict:
    """Every parameter of the model, as a nested dict of `Param` with the structure of the parameters.

    A leaf of `layers` is stacked over the layers that have it (`Param.layers`): all of them, or those of one kind.
    """
    V, D = cfg.vocab_size, cfg.hidden_size
    every = range(cfg.num_layers)  # never enumerated: the number may be a lie until the tensors have been seen
    linear = tuple(i for i, kind in enumerate(cfg.layer_kinds) if kind == "linear")
    attention = tuple(i for i in every if i not in linear) if linear else every

    def stack(part: dict, layers: Sequence[int]) -> dict:
        return {
            name: dataclasses.replace(
                p, shape=(len(layers), *p.shape), axes=("layers", *p.axes), layers=layers,
                hf=f"{cfg.prefix}layers.{{layer}}.{p.hf}",
            )
            for name, p in part.items()
        }  # fmt: skip

    layers = stack(_norms(cfg), every) | stack(_attention(cfg), attention) | stack(_mlp(cfg), every)
    if linear:
        layers |= stack(_linear(cfg), linear)
    embed = f"{cfg.prefix}embed_tokens.weight"
    out = {
        "embed": Param((V, D), ("vocab", "embed"), embed, (V, D), (V, D), (0, 1), fan_in=D),
        "layers": layers,
        "final_norm": _vector(D, f"{cfg.prefix}norm.weight", init=_norm_init(cfg)),
    }
    if not cfg.tied:
        out["head"] = _matrix((D, V), ("embed", "vocab"), "lm_head.weight")
    return out


def _norm_init(cfg: ModelConfig) -> str:
    return "zeros" if cfg.zero_centred_norms else "ones"


def _norms(cfg: ModelConfig) -> dict:
    """Of the residual stream."""
    names = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if cfg.post_norms:
        names = {
            "attn_norm": "input_layernorm", "attn_out_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm", "mlp_out_norm": "post_feedforward_layernorm",
        }  # fmt: skip
    return {k: _vector(cfg.hidden_size, f"{hf}.weight", init=_norm_init(cfg)) for k, hf in names.items()}


def _attention(cfg: ModelConfig) -> dict:
    D, Q, K, H = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    out = {
        "q": _heads(D, Q, H * (1 + cfg.attention_gate), "heads", "self_attn.q_proj.weight"),
        "k": _heads(D, K, H, "kv_heads", "self_attn.k_proj.weight"),
        "v": _heads(D, K, H, "kv_heads", "self_attn.v_proj.weight"),
        "o": Param(
            (Q, H, D), ("heads", None, "embed"), "self_attn.o_proj.weight", (D, Q * H), (D, Q, H), (1, 2, 0),
            fan_in=Q * H,
        ),
    }  # fmt: skip
    if cfg.qk_norm:
        out |= {n: _vector(H, f"self_attn.{n}.weight", axis=None, init=_norm_init(cfg)) for n in ("q_norm", "k_norm")}
    if cfg.qkv_bias:
        for name in ("q", "k", "v"):
            (_, n, width), axis = out[name].shape, out[name].axes[1]
            key = f"self_attn.{name}_proj.bias"
            out[f"{name}_bias"] = Param((n, width), (axis, None), key, (n * width,), (n, width), (0, 1), "zeros")
    if cfg.out_bias:
        out["o_bias"] = _vector(D, "self_attn.o_proj.bias", init="zeros")
    return out


def _linear(cfg: ModelConfig) -> dict:
    """Of a gated delta net (linear.py). What belongs to one key's head (its query, its key, the values that share them)
    is together, so that tp splits all leaves by these heads; the file holds all queries, then all keys, all values.
    """
    D, K, C, W = cfg.hidden_size, cfg.linear_key_heads, cfg.conv_channels, cfg.conv_width
    values, shared = cfg.linear_value_heads * cfg.linear_value_dim, cfg.linear_value_heads // K
    parts = (cfg.linear_key_dim, cfg.linear_key_dim, values // K)

    def into(width: int, name: str, parts=()) -> Param:
        return dataclasses.replace(_heads(D, K, width, "linear_heads", f"linear_attn.{name}.weight"), parts=parts)

    conv = Param(
        (K, C // K, W), ("linear_heads", None, None), "linear_attn.conv1d.weight", (C, 1, W), (K, C // K, W), (0, 1, 2),
        fan_in=W, parts=parts,
    )  # fmt: skip
    a_log = _vector(cfg.linear_value_heads, "linear_attn.A_log", axis="linear_heads", init="log_uniform")
    norm = _vector(cfg.linear_value_dim, "linear_attn.norm.weight", axis=None)
    return {
        "linear_qkv": into(C // K, "in_proj_qkv", parts),
        "linear_z": into(values // K, "in_proj_z"),
        "linear_b": into(shared, "in_proj_b"),
        "linear_a": into(shared, "in_proj_a"),
        "conv": conv,
        "dt_bias": _vector(cfg.linear_value_heads, "linear_attn.dt_bias", axis="linear_heads"),
        "a_log": dataclasses.replace(a_log, stays_float32=True),
        "linear_norm": dataclasses.replace(norm, stays_float32=True),
        "linear_out": Param(
            (K, values // K, D), ("linear_heads", None, "embed"), "linear_attn.out_proj.weight", (D, values),
            (D, K, values // K), (1, 2, 0), fan_in=values,
        ),
    }  # fmt: skip


def _mlp(cfg: ModelConfig) -> dict:
    D, F = cfg.hidden_size, cfg.intermediate_size
    if not cfg.num_experts:
        return {
            "gate": _matrix((D, F), ("embed", "ff"), "mlp.gate_proj.weight"),
            "up": _matrix((D, F), ("embed", "ff"), "mlp.up_proj.weight"),
            "down": _matrix((F, D), ("ff", "embed"), "mlp.down_proj.weight"),
        }
    E, F = cfg.num_experts, cfg.expert_size
    out = {"router": _matrix((D, E), ("embed", None), "mlp.gate.weight")}
    for name, shape, axes in (
        ("gate", (D, F), ("embed", "ff")), ("up", (D, F), ("embed", "ff")), ("down", (F, D), ("ff", "embed")),
    ):  # fmt: skip
        p = _matrix(shape, axes, f"mlp.experts.{{expert}}.{name}_proj.weight")
        out[name] = dataclasses.replace(p, shape=(E, *shape), axes=("experts", *axes))
    return out


def _vector(n: int, hf: str, axis: str | None = "embed_norm", init: str = "ones") -> Param:
    return Param((n,), (axis,), hf, (n,), (n,), (0,), init)


def _heads(d: int, n: int, h: int, axis: str, hf: str) -> Param:
    return Param((d, n, h), ("embed", axis, None), hf, (n * h, d), (n, h, d), (2, 0, 1), fan_in=d)


def _matrix(shape: tuple[int, int], axes: tuple, hf: str) -> Param:
    """A projection [in, out]; the file holds it [out, in]."""
    return Param(shape, axes, hf, shape[::-1], shape[::-1], (1, 0), fan_in=shape[0])


@functools.lru_cache
def layers_of(cfg: ModelConfig) -> dict[str, Sequence[int]]:
    """Name of a leaf of `layers` -> the numbers of the layers that it is stacked over."""
    return {name: p.layers for name, p in table(cfg)["layers"].items()}


def layer_slices(stacked: dict, cfg: ModelConfig, i: int) -> dict:
    """The leaves of layer i of a stacked `layers`."""
    layers = {name: layers_of(cfg)[name.split("_lora_")[0]] for name in stacked}
    return {name: a[layers[name].index(i)] for name, a in stacked.items() if i in layers[name]}


def cast(params: dict, dtype) -> dict:
    """`params`, or a part of them, in `dtype`, but for the leaves that are computed with in float32."""
    return {
        name: cast(a, dtype) if isinstance(a, dict) else a.astype(jnp.float32 if name in FLOAT32 else dtype)
        for name, a in params.items()
    }


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
    """Random float32 parameters: normal, standard deviation fan_in**-0.5 (embeddings 0.02); norms 1, biases 0."""
    leaves, tree = jax.tree.flatten(table(cfg), is_leaf=is_param)

    def one(key, p: Param):
        if p.init == "log_uniform":
            return jnp.log(jax.random.uniform(key, p.shape, jnp.float32, 0.01, 16.0))
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
