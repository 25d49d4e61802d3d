"""Against transformers, part by part: the same random checkpoint, float32, tolerances relative to the spread."""

import copy
import dataclasses

import hf_fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax import hf, model, rollout
from omniopd_jax.model import attention, rope

torch = pytest.importorskip("torch")
MAX, MEAN = 1e-4, 1e-5  # of the reference's standard deviation
LENGTHS = (90, 70, 81)
SMALL = [  # family, rope, other settings
    ("qwen3", "none", {"tie_word_embeddings": True}),
    ("qwen3", "yarn", {"attention_bias": True}),
    ("qwen2", "linear", {}),
    ("llama", "llama3", {"attention_bias": True}),
    ("llama", "none", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("qwen3_moe", "none", {}),
]
WIDE = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 24}
DEEP = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "rms_norm_eps": 1e-5}
MANY = {"norm_topk_prob": False, "num_experts": 9, "num_experts_per_tok": 4}
MORE = [
    (family, rope, {"tie_word_embeddings": tied} | size | (MANY if tied and family == "qwen3_moe" else {}))
    for family in hf_fixtures.CLASSES
    for rope in hf_fixtures.ROPE
    for tied, size in ((True, WIDE), (False, DEEP))
]


def name(case) -> str:
    family, rope, over = case
    return "-".join([family, rope, *(f"{k.replace('_', '')}{v}" for k, v in over.items())])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """loaded(family, rope, over) -> (torch model, params, cfg), through a folder that transformers wrote."""
    cache = {}

    def make(family, rope, over):
        key = name((family, rope, over))
        if key not in cache:
            folder = tmp_path_factory.mktemp("checkpoint")
            reference = hf_fixtures.torch_checkpoint(folder, family, rope=rope, **over)
            cache[key] = (reference, *hf.load(folder))
        return cache[key]

    return make


def batch(seed: int = 0):
    rng = np.random.default_rng(seed)
    L = max(LENGTHS)
    token = rng.integers(0, hf_fixtures.SIZES["vocab_size"], (len(LENGTHS), L)).astype(np.int32)
    right = np.arange(L)[None] < np.array(LENGTHS)[:, None]
    left = right[:, ::-1]
    return token, right, left, np.where(left, np.cumsum(left, axis=1) - 1, 0).astype(np.int32)


def close(ours, theirs, what: str) -> tuple[float, float]:
    """Max and mean difference over the reference's standard deviation, within the bounds."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, what
    gap = np.abs(ours - theirs) / theirs.std()
    assert gap.max() <= MAX and gap.mean() <= MEAN, f"{what}: max {gap.max():.2e}, mean {gap.mean():.2e}"
    return float(gap.max()), float(gap.mean())


def our_logits(params, cfg, token, compute=None, **kwargs):
    run = jax.jit(lambda p, t, kw: model.logits(p, cfg, model.hidden(p, cfg, t, compute=compute, **kw)))
    return np.asarray(run(params, jnp.asarray(token), {k: jnp.asarray(v) for k, v in kwargs.items()}))


def their_logits(reference, token, mask, position=None, dtype=None):
    with torch.no_grad():
        position = None if position is None else torch.tensor(position.astype(np.int64))
        token, mask = torch.tensor(token.astype(np.int64)), torch.tensor(np.ascontiguousarray(mask).astype(np.int64))
        return reference(token, attention_mask=mask, position_ids=position).logits.to(dtype).numpy()


def check_logits(loaded, case, record_property):
    reference, params, cfg = loaded(*case)
    token, right, left, position = batch()
    theirs = their_logits(reference, token, right)[right]
    assert theirs.std() >= 3
    record_property("right", close(our_logits(params, cfg, token)[right], theirs, "right-padded"))
    theirs = their_logits(reference, token, left, position)[left]
    ours = our_logits(params, cfg, token, position_BL=position, segment_BL=left.astype(np.int32))[left]
    record_property("left", close(ours, theirs, "left-padded"))


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_logits(loaded, case, record_property):
    check_logits(loaded, case, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=name)
def test_logits_of_more_shapes(loaded, case, record_property):
    check_logits(loaded, case, record_property)


def check_parts(loaded, case):
    reference, params, cfg = loaded(*case)
    token, *_ = batch(1)
    seen = {}

    def keep(key):
        return lambda module, inputs, out: seen.update(
            {key: (out[0] if isinstance(out, tuple) else out).detach().numpy()}
        )

    core = reference.model
    hooks = [core.embed_tokens.register_forward_hook(keep("embed")), core.norm.register_forward_hook(keep("norm"))]
    for i, block in enumerate(core.layers):
        for key in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
            hooks.append(getattr(block, key).register_forward_hook(keep(f"{i}.{key}")))
        hooks.append(block.register_forward_hook(keep(f"{i}.layer")))
    their_logits(reference, token, np.ones_like(token))
    for hook in hooks:
        hook.remove()

    def attend(q, k, v):
        return attention.attend(q, k, v, backend="xla")

    compute = model.Compute()
    angles = rope.tables(cfg, jnp.broadcast_to(jnp.arange(token.shape[1]), token.shape))
    x = params["embed"][token]
    close(x, seen["embed"], "embeddings")
    for i, p in enumerate(model.unstack(params, cfg, "float32")["layers"]):
        h = model.rms_norm(x, p["attn_norm"], cfg.norm_eps)
        close(h, seen[f"{i}.input_layernorm"], f"layer {i}: first norm")
        # what the residual gains when the mlp is switched off is the attention block alone
        alone = model.layer(x, p | {"down": jnp.zeros_like(p["down"])}, cfg, compute, angles, attend) - x
        close(alone, seen[f"{i}.self_attn"], f"layer {i}: attention")
        h = model.rms_norm(x + seen[f"{i}.self_attn"], p["mlp_norm"], cfg.norm_eps)
        close(h, seen[f"{i}.post_attention_layernorm"], f"layer {i}: second norm")
        close(model.mlp(h, p, cfg, compute), seen[f"{i}.mlp"], f"layer {i}: mlp")
        x = model.layer(x, p, cfg, compute, angles, attend)
        close(x, seen[f"{i}.layer"], f"layer {i}")
    close(model.hidden(params, cfg, jnp.asarray(token)), seen["norm"], "last norm")


@pytest.mark.parametrize("case", [SMALL[1], SMALL[3], SMALL[5]], ids=name)
def test_every_part_of_a_block(loaded, case):
    check_parts(loaded, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=name)
def test_every_part_of_a_block_of_more_shapes(loaded, case):
    check_parts(loaded, case)


def check_left_out(loaded, case, without):
    reference, params, cfg = loaded(*case)
    token, right, *_ = batch()
    theirs = their_logits(reference, token, right)[right]
    with pytest.raises(AssertionError, match="max"):
        close(our_logits(params, dataclasses.replace(cfg, **without), token)[right], theirs, "")


@pytest.mark.parametrize(
    ("case", "without"),
    [
        (SMALL[0], {"qk_norm": False}),
        (SMALL[1], {"rope_scaling": ()}),
        (SMALL[2], {"qkv_bias": False}),
        (SMALL[3], {"rope_scaling": ()}),
        (SMALL[3], {"out_bias": False}),
    ],
    ids=lambda v: name(v) if isinstance(v, tuple) else next(iter(v)),
)
def test_leaving_a_part_out_fails_the_comparison(loaded, case, without):
    check_left_out(loaded, case, without)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "without"),
    [
        (SMALL[0], {"norm_eps": 1e-3}),
        (SMALL[1], {"out_bias": False}),
        (SMALL[2], {"rope_scaling": ()}),
        (SMALL[5], {"qk_norm": False}),
        (SMALL[5], {"normalize_experts": False}),
        (SMALL[5], {"experts_per_token": 1}),
    ],
    ids=lambda v: name(v) if isinstance(v, tuple) else next(iter(v)),
)
def test_leaving_more_parts_out_fails_the_comparison(loaded, case, without):
    check_left_out(loaded, case, without)


def check_greedy(loaded, case):
    """Rows of three lengths; returns how many tokens were compared before the first tie to rounding."""
    reference, params, cfg = loaded(*case)
    token, right, *_ = batch(2)
    want = 64
    out = rollout.sample(
        params, cfg, jnp.asarray(np.where(right, token, 0)), jnp.asarray(LENGTHS, jnp.int32),
        jax.random.split(jax.random.key(0), len(LENGTHS)), max_new_tokens=want, temperature=0.0,
    )  # fmt: skip
    compared = 0
    for row, (ids, n) in enumerate(zip(token, LENGTHS)):
        with torch.no_grad():
            ids = torch.tensor(
                ids[None, :n].astype(np.int64)
            )  # with its mask: generate hides prompt tokens equal to pad
            theirs = reference.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=want, output_logits=True,
                return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        for t, z in enumerate(theirs.logits):
            first, second = z[0].topk(2).values.tolist()
            if first - second <= 1e-3:
                break  # a tie to rounding: from here on the two may part
            assert int(out.token_BT[row, t]) == int(theirs.sequences[0, n + t]), f"row {row}, token {t}"
            compared += 1
    assert compared >= want * len(LENGTHS) // 2
    return compared


@pytest.mark.parametrize("case", [SMALL[0], pytest.param(SMALL[3], marks=pytest.mark.slow)], ids=name)
def test_greedy_decoding_gives_the_tokens_of_generate(loaded, case):
    check_greedy(loaded, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [SMALL[5], *MORE], ids=name)
def test_greedy_decoding_of_more_shapes(loaded, case):
    check_greedy(loaded, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [SMALL[0], SMALL[2], SMALL[3]], ids=name)
def test_bfloat16_strays_from_float32_no_further_than_transformers(loaded, case):
    reference, params, cfg = loaded(*case)
    token, right, *_ = batch(3)
    exact = their_logits(reference, token, right)[right]
    ours = our_logits(params, cfg, token, compute=model.Compute("bfloat16"))[right]
    theirs = their_logits(copy.deepcopy(reference).bfloat16(), token, right, dtype=torch.float32)[right]
    assert np.abs(ours - exact).mean() <= 1.1 * np.abs(theirs - exact).mean()
