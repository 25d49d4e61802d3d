"""Families whose layers differ, against transformers: Gemma 3 (sliding and full) and Qwen3.5 (linear and full attention)."""

import dataclasses
import functools

import hf_fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
from ml_collections import ConfigDict

from omniopd_jax import config, hf, model, rollout, step
from omniopd_jax.model import linear, lora
from omniopd_jax.parallel import sharding

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
MAX = 1e-4  # of the reference's standard deviation
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FAMILIES = {
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        "num_hidden_layers": 4, "sliding_window": 20, "query_pre_attn_scalar": 24, "sliding_window_pattern": 3,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    }),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {
        "num_hidden_layers": 4, "tie_word_embeddings": False, "full_attention_interval": 3, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }),
}  # fmt: skip
LENGTHS = (150, 100, 131)  # over several chunks of linear attention and several windows


def torch_model(family: str):
    """Random, with norms, decays, gates and convolutions that matter."""
    config, kind, more = FAMILIES[family]
    out = getattr(transformers, kind)(getattr(transformers, config)(**SIZES | more))
    rng = torch.Generator().manual_seed(0)
    for name, p in out.named_parameters():
        draw = torch.randn(p.shape, generator=rng)
        if name.endswith("linear_attn.norm.weight"):
            p.data = 1 + 0.3 * draw
        elif any(part in name for part in ("norm", "A_log", "dt_bias")):
            p.data = 0.3 * draw  # a slow decay makes transformers' own logits move by 1e-4 with an ulp of the weights
        elif "conv1d" in name:
            p.data = 1.5 * draw  # smaller, queries and keys of almost no length are common, whose direction is rounding
        elif "embed_tokens" in name or "lm_head" in name:
            p.data = draw * 3.5 * SIZES["hidden_size"] ** -0.5
        else:
            p.data = draw * p.shape[-1] ** -0.5
    return out.float().eval()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """loaded(family) -> (torch model, params, cfg, folder), through a folder that transformers wrote."""

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        reference = torch_model(family)
        reference.save_pretrained(folder)
        return reference, *hf.load(folder), folder

    return make


def batch():
    rng, L = np.random.default_rng(0), max(LENGTHS)
    token = rng.integers(0, SIZES["vocab_size"], (len(LENGTHS), L)).astype(np.int32)
    right = np.arange(L)[None] < np.array(LENGTHS)[:, None]
    left = right[:, ::-1]
    return token, right, left, np.where(left, np.cumsum(left, axis=1) - 1, 0).astype(np.int32)


def their_logits(reference, token, mask, position=None):
    with torch.no_grad():
        position = None if position is None else torch.tensor(position.astype(np.int64))
        token, mask = torch.tensor(token.astype(np.int64)), torch.tensor(np.ascontiguousarray(mask).astype(np.int64))
        return reference(token, attention_mask=mask, position_ids=position).logits.numpy()


@functools.partial(jax.jit, static_argnames="cfg")
def forward(params, cfg, token, position, segment):
    return model.logits(params, cfg, model.hidden(params, cfg, token, position_BL=position, segment_BL=segment))


def our_logits(params, cfg, token, position=None, segment=None):
    """By one program for rows of one shape, however they are padded or packed."""
    position = np.broadcast_to(np.arange(token.shape[1], dtype=np.int32), token.shape) if position is None else position
    segment = np.ones(token.shape, np.int32) if segment is None else segment
    return np.asarray(forward(params, cfg, *map(jnp.asarray, (token, position, segment.astype(np.int32)))))


@pytest.fixture
def changed(monkeypatch):
    """changed(name, function): a function of linear.py replaced, and nothing compiled before taken for it."""
    forward.clear_cache()
    yield lambda name, function: monkeypatch.setattr(linear, name, function)
    forward.clear_cache()


def gap(ours, theirs) -> float:
    """The largest difference over the reference's standard deviation."""
    return float(np.abs(ours - theirs).max() / theirs.std())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_padded_on_either_side(loaded, family):
    reference, params, cfg, _ = loaded(family)
    token, right, left, position = batch()
    theirs = their_logits(reference, token, right)[right]
    assert theirs.std() > 2 and cfg.period == 3 and cfg.num_layers % cfg.period  # a scan of one period, and a rest
    assert gap(our_logits(params, cfg, token)[right], theirs) < MAX
    theirs = their_logits(reference, token, left, position)[left]
    assert gap(our_logits(params, cfg, token, position, left)[left], theirs) < MAX


WITHOUT = [
    ("gemma3", {"window": 0}), ("gemma3", {"local_rope_theta": None}), ("gemma3", {"rope_scaling": ()}),
    ("gemma3", {"query_scale": None}), ("gemma3", {"zero_centred_norms": False}), ("gemma3", {"post_norms": False}),
    ("gemma3", {"scaled_embeddings": False}), ("gemma3", {"activation": "silu"}), ("gemma3", {"qk_norm": False}),
    ("qwen3_5", {"zero_centred_norms": False}), ("qwen3_5", {"rotary_dim": 0}), ("qwen3_5", {"qk_norm": False}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("family", "without"), WITHOUT, ids=str)
def test_leaving_a_part_out_is_seen(loaded, family, without):
    reference, params, cfg, _ = loaded(family)
    token, right, *_ = batch()
    theirs = their_logits(reference, token, right)[right]
    cfg = dataclasses.replace(cfg, **without)
    kept = {name: a for name, a in params["layers"].items() if name in model.table(cfg)["layers"]}
    assert gap(our_logits(params | {"layers": kept}, cfg, token)[right], theirs) > 10 * MAX


@pytest.mark.slow
@pytest.mark.parametrize("part", ["gate of attention", "gate of linear attention", "convolution", "decay", "beta"])
def test_leaving_a_part_of_qwen35_out_is_seen(loaded, changed, part):
    reference, params, cfg, _ = loaded("qwen3_5")
    token, right, *_ = batch()
    theirs = their_logits(reference, token, right)[right]
    whole = linear.whole
    if part == "convolution":
        changed("_convolve", lambda x, conv, segment: x)
    elif part in ("decay", "beta"):
        neutral = {"decay": (0.0, 1.0), "beta": (1.0, 0.0)}[part]  # factors of decay and of beta's distance to 1

        def other(qkv, conv, decay, beta, *rest):
            return whole(qkv, conv, decay * neutral[0], 1 + (beta - 1) * neutral[1], *rest)

        changed("whole", other)
    else:
        layers = dict(params["layers"])
        if part == "gate of attention":
            q = layers["q"]  # its second half is the gate: at 0 it is one half everywhere
            layers["q"] = q.at[..., cfg.head_dim :].set(0)
        else:
            layers["linear_z"] = jnp.zeros_like(layers["linear_z"]) + 0.01
        params = params | {"layers": layers}
    assert gap(our_logits(params, cfg, token)[right], theirs) > 10 * MAX


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_of_a_packed_row_see_nothing_of_each_other(loaded, family):
    """Three sequences in one row, cut off mid-chunk: the states are those of rows of their own."""
    _, params, cfg, _ = loaded(family)
    token, _, _, _ = batch()
    cuts = (37, 70, 43)
    packed = np.concatenate([token[b, :n] for b, n in enumerate(cuts)])
    segment, position = np.repeat(np.arange(1, 4), cuts), np.concatenate([np.arange(n, dtype=np.int32) for n in cuts])
    rows = (np.broadcast_to(a, token.shape) for a in (packed, position, segment))
    ours, alone = our_logits(params, cfg, *rows)[0], our_logits(params, cfg, token)
    want = np.concatenate([alone[b, :n] for b, n in enumerate(cuts)])
    assert gap(ours, want) < MAX


@pytest.mark.slow
@pytest.mark.parametrize("leak", ["state", "convolution"])
def test_a_segment_that_leaks_is_seen(loaded, changed, leak):
    name = {"state": "_chunks", "convolution": "_convolve"}[leak]
    real = getattr(linear, name)
    changed(name, lambda *args: real(*args[:-1], None))
    with pytest.raises(AssertionError):
        test_segments_of_a_packed_row_see_nothing_of_each_other(loaded, "qwen3_5")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_follows_the_full_forward(loaded, family):
    """Prompts of three lengths, a cache of two pages: the largest logit of the whole row, wherever it is clear."""
    _, params, cfg, _ = loaded(family)
    token, *_ = batch()
    P, new, length = 80, 40, np.array([80, 50, 3], np.int32)
    prompt = np.where(np.arange(P)[None] < length[:, None], token[:, :P], 0)
    keys = jax.random.split(jax.random.key(0), 3)
    out = rollout.sample(
        params, cfg, jnp.asarray(prompt), jnp.asarray(length), keys, max_new_tokens=new, temperature=0.0
    )
    rows = np.zeros((3, P + new), np.int32)
    for b, n in enumerate(length):
        rows[b, : n + new] = [*prompt[b, :n], *np.asarray(out.token_BT)[b, :new]]
    logits, compared = our_logits(params, cfg, rows), 0
    for b, n in enumerate(length):
        for t in range(new):
            top = np.sort(logits[b, n + t - 1])
            if top[-1] - top[-2] > 1e-3:
                assert int(out.token_BT[b, t]) == int(logits[b, n + t - 1].argmax()), (b, t)
                compared += 1
    assert compared > 100


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_gives_the_tokens_of_generate(loaded, family):
    reference, params, cfg, _ = loaded(family)
    token, *_ = batch()
    P, length = 96, np.array([96, 70, 33], np.int32)
    prompt = np.where(np.arange(P)[None] < length[:, None], token[:, :P], 0)
    out = rollout.sample(
        params, cfg, jnp.asarray(prompt), jnp.asarray(length), jax.random.split(jax.random.key(0), 3), max_new_tokens=64,
        temperature=0.0,
    )  # fmt: skip
    compared = 0
    for b, n in enumerate(length):
        ids = torch.tensor(token[b : b + 1, :n].astype(np.int64))
        with torch.no_grad():
            theirs = reference.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, output_logits=True,
                return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        for t, z in enumerate(theirs.logits):
            first, second = z[0].topk(2).values.tolist()
            if first - second <= 1e-3:
                break
            assert int(out.token_BT[b, t]) == int(theirs.sequences[0, n + t]), (b, t)
            compared += 1
    assert compared > 96


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_torch(loaded, family):
    """Of the mean log-prob of every next token, leaf by leaf through the table, within 1e-4 of each tensor's norm."""
    reference, params, cfg, _ = loaded(family)
    token, *_ = batch()
    ids = torch.tensor(token.astype(np.int64))
    reference.zero_grad()
    logp = torch.log_softmax(reference(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])
    logp.mean().backward()
    theirs = {name: p.grad.numpy() for name, p in reference.named_parameters()}

    def loss(params):
        logp = jax.nn.log_softmax(model.logits(params, cfg, model.hidden(params, cfg, jnp.asarray(token))))[:, :-1]
        return jnp.take_along_axis(logp, jnp.asarray(token)[:, 1:, None], axis=-1).mean()

    grads = jax.jit(jax.grad(loss))(params)
    leaves = zip(jax.tree.leaves(model.table(cfg), is_leaf=model.is_param), jax.tree.leaves(grads), strict=True)
    seen = 0
    for p, grad in leaves:
        stacked = zip(p.layers, np.asarray(grad)) if p.layers else [(None, np.asarray(grad))]
        for number, a in stacked:
            name = p.hf.format(layer=number)
            want = theirs[name].reshape(p.view).transpose(p.perm)
            assert np.linalg.norm(a - want) <= 1e-4 * np.linalg.norm(want) + 1e-9, name
            seen += 1
    assert seen == len(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_devices_compute_what_one_does(loaded, family):
    _, params, cfg, folder = loaded(family)
    token, *_ = batch()
    token = np.concatenate([token, token[:1]])[:, :96]
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tp": 2})
    many, _ = hf.load(folder, mesh=mesh)
    length = np.full(4, 40, np.int32)

    def score(params, compute):
        how = {"T": 56, "model_cfg": cfg, "block": 64, "micro_batches": 1, "compute": compute}
        rows = sharding.put_rows((token, length), compute.mesh)
        return jax.jit(functools.partial(step.score, **how))(params, *rows)

    one = score(params, model.Compute())
    eight = score(many, model.Compute(mesh=mesh))
    np.testing.assert_allclose(eight.logp_BT, one.logp_BT, atol=2e-4)
    keys = rollout.row_keys(jax.random.key(0), range(4))
    tokens = []
    for p, on in ((params, sharding.default_mesh()), (many, mesh)):
        rows = sharding.put_rows((token[:, :40], length), on)
        how = {"max_new_tokens": 16, "temperature": 0.0, "compute": model.Compute(mesh=on)}
        out = rollout.sample(p, cfg, *rows, jax.device_put(keys, sharding.rows(on)), **how)
        tokens.append(np.asarray(out.token_BT)[:, :16])
    assert (tokens[0] == tokens[1]).mean() > 0.9  # ties apart


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_bit_exact_and_opened_by_transformers(loaded, family, tmp_path):
    reference, params, cfg, folder = loaded(family)
    hf.save(tmp_path / "out", params, cfg, hf_fixtures.tokenizer(), dtype="float32")
    again, loaded_cfg = hf.load(tmp_path / "out")
    assert loaded_cfg == cfg
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(theirs) is type(reference)
    for (name, a), (_, b) in zip(theirs.state_dict().items(), reference.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    token = batch()[0][:, :30]
    assert (
        gap(their_logits(theirs, token, np.ones_like(token)), their_logits(reference, token, np.ones_like(token)))
        < 1e-6
    )


@pytest.mark.slow
def test_adapters_on_linear_layers_are_the_merged_weights(loaded):
    """Every projection of a Qwen3.5 carries one; each has a gradient."""
    _, params, cfg, _ = loaded("qwen3_5")
    settings = ConfigDict({"rank": 2, "alpha": 3.0, "targets": config.TARGETS + config.LINEAR_TARGETS})
    adapters = lora.init(jax.random.key(0), cfg, settings)
    adapters = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), adapters)
    assert set(lora.LEAVES) == set(settings.targets) and len(adapters["layers"]) == 2 * len(settings.targets)
    token, compute = jnp.asarray(batch()[0][:, :70]), model.Compute(lora_scale=lora.scale(settings))

    def total(adapters, weight_BLD):
        hidden_BLD = model.hidden(lora.attach(params, adapters), cfg, token, compute=compute)
        return (hidden_BLD * weight_BLD).sum(), hidden_BLD

    weight_BLD = jax.random.normal(jax.random.key(1), (*token.shape, cfg.hidden_size))
    grads, ours = jax.jit(jax.grad(total, has_aux=True))(adapters, weight_BLD)
    merged = jax.jit(lambda p: lora.merge(p, compute.lora_scale, "float32"))(lora.attach(params, adapters))
    want, plain = (jax.jit(lambda p: model.hidden(p, cfg, token))(p) for p in (merged, params))
    assert gap(np.asarray(ours), np.asarray(want)) < MAX < 0.1 < gap(np.asarray(ours), np.asarray(plain))
    assert all(np.linalg.norm(g) > 0 for g in jax.tree.leaves(grads))


def test_the_chunks_are_the_recurrence():
    """Whole rows against one token after the other, with decays near 0 and 1 and repeated keys."""
    rng = np.random.default_rng(0)
    cfg = model.ModelConfig(
        "qwen3_5", 8, 8, 8, 1, 2, 1, 4, layer_kinds=("linear",), linear_key_heads=2, linear_value_heads=4, linear_key_dim=6,
        linear_value_dim=5, conv_width=4,
    )  # fmt: skip
    B, L = 2, 150
    qkv = rng.normal(size=(B, L, cfg.conv_channels)).astype(np.float32)
    qkv[:, 60:90] = qkv[:, 60:61]
    conv = rng.normal(size=(cfg.conv_channels, 4)).astype(np.float32)
    decay = -np.exp(rng.normal(size=(B, L, 4)) * 2 - 2).astype(np.float32)
    beta = rng.uniform(0, 1, (B, L, 4)).astype(np.float32)
    length = np.array([150, 97], np.int32)
    out, state = jax.jit(functools.partial(linear.whole, cfg=cfg))(qkv, conv, decay, beta, length_B=jnp.asarray(length))

    def one(state, xs):
        now, state = linear.step(xs[0][None, None], conv, xs[1][None, None], xs[2][None, None], cfg, state)
        return state, now[0, 0]

    empty = linear.State(jnp.zeros((1, 3, cfg.conv_channels)), jnp.zeros((1, 4, 6, 5)))
    for b, n in enumerate(length):
        last, by_token = jax.lax.scan(one, empty, (qkv[b, :n], decay[b, :n], beta[b, :n]))
        np.testing.assert_allclose(out[b, :n], by_token, atol=2e-4)
        np.testing.assert_allclose(state.memory[b], last.memory[0], atol=2e-4)
        np.testing.assert_array_equal(state.conv[b], last.conv[0])


def test_what_is_beside_the_text_model_is_carried_through_an_export(tmp_path):
    """Qwen3.5 with a tower of images and heads that predict further tokens: transformers opens what comes out."""
    text = SIZES | FAMILIES["qwen3_5"][2] | {"tie_word_embeddings": True}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 8,
        "out_hidden_size": 64,
        "patch_size": 4,
    }
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    reference = transformers.Qwen3_5ForConditionalGeneration(config).float().eval()
    reference.save_pretrained(tmp_path / "in")
    tensors = safetensors.torch.load_file(tmp_path / "in" / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.randn(3, 5)
    safetensors.torch.save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    params, cfg = hf.load(tmp_path / "in")
    params["final_norm"] = params["final_norm"] + 1
    hf.save(tmp_path / "out", params, cfg, dtype="float32", source=tmp_path / "in")
    again, loaded_cfg = hf.load(tmp_path / "out")
    assert loaded_cfg == cfg and cfg.prefix == "model.language_model."
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= safetensors.torch.load_file(file)
    assert set(written) == set(tensors)
    changed = [name for name in tensors if not torch.equal(written[name], tensors[name])]
    assert changed == ["model.language_model.norm.weight"]
    theirs = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    token = batch()[0][:, :40]
    assert gap(our_logits(again, cfg, token), their_logits(theirs, token, np.ones_like(token))) < MAX
    hf.save(tmp_path / "text", params, cfg, dtype="float32")  # without its source: the text model alone
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()
    assert type(alone) is transformers.Qwen3_5ForCausalLM
    assert gap(our_logits(again, cfg, token), their_logits(alone, token, np.ones_like(token))) < MAX
