"""Families whose layers differ, against transformers: Gemma 3 (sliding and full) and Qwen3.5 (linear and full attention)."""

import dataclasses
import functools
import json

import hf_fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
from ml_collections import ConfigDict

from omniopd_jax import config, hf, model, rollout
from omniopd_jax.hf.published import PUBLISHED
from omniopd_jax.model import linear, lora, rope

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
families = pytest.importorskip("families")
FAMILIES, SIZES, batch, gap, tensors_of, wrapped = (
    families.FAMILIES, families.SIZES, families.batch, families.gap, families.tensors_of, families.wrapped,
)  # fmt: skip
MAX = 1e-4  # of the reference's standard deviation


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """loaded(family) -> (torch model, params, cfg, folder), through a folder that transformers wrote."""

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        reference = families.torch_model(family)
        reference.save_pretrained(folder)
        return reference, *hf.load(folder), folder

    return make


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


@pytest.mark.parametrize(("width", "theta"), [(256, 1e6), (256, 1e4), (64, 1e7), (128, 1e6)])
def test_frequencies_are_torchs_bit_by_bit(width, theta):
    """But for two by an ulp: at token 800 an ulp moves an angle by 1e-4, and Gemma-3-270M's logits by 1e-3."""
    cfg = model.ModelConfig("gemma3", 8, 8, 8, 1, 2, 1, width, rope_theta=theta)
    theirs = 1.0 / (theta ** (torch.arange(0, width, 2).float() / width))
    assert (rope.frequencies(cfg)[0] != theirs.numpy()).sum() <= 2


def test_gemmas_embeddings_are_scaled_as_the_reference_rounds_the_factor():
    """The root of 640 is 25.298; in bfloat16 it is 25.25, and the product is rounded again."""
    cfg, weight = PUBLISHED["google/gemma-3-270m"], torch.tensor(np.random.default_rng(0).normal(size=(5, 640)))
    for dtype in ("float32", "bfloat16"):
        theirs = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(5, 640, None, 640**0.5)
        theirs.weight.data[:] = weight
        want = theirs.to(getattr(torch, dtype))(torch.arange(5)).float().detach().numpy()
        compute = model.Compute(dtype)
        ours = model.scaled(model.lookup(jnp.asarray(weight.float().numpy()), jnp.arange(5)[None], compute), cfg)[0]
        np.testing.assert_array_equal(np.asarray(ours, np.float32), want)


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
    if leak == "state":
        delta = linear._delta
        changed("_delta", lambda memory, before, *args: delta(memory, before * 0, *args[:-1], args[-1] * 0))
    else:
        convolve = linear._convolve
        changed("_convolve", lambda x, conv, segment: convolve(x, conv, None))
    with pytest.raises(AssertionError):
        test_segments_of_a_packed_row_see_nothing_of_each_other(loaded, "qwen3_5")


def decoded(params, cfg, token_BP, length, new: int):
    """(the tokens cut to their lengths, `new` greedy tokens behind each row)."""
    prompt = np.where(np.arange(token_BP.shape[1])[None] < length[:, None], token_BP, 0)
    keys = jax.random.split(jax.random.key(0), len(length))
    how = {"max_new_tokens": new, "temperature": 0.0}
    return prompt, rollout.sample(params, cfg, jnp.asarray(prompt), jnp.asarray(length), keys, **how)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_follows_the_full_forward(loaded, family):
    """Prompts of three lengths, a cache of two pages: the largest logit of the whole row, wherever it is clear."""
    _, params, cfg, _ = loaded(family)
    token, *_ = batch()
    P, new, length = 80, 40, np.array([80, 50, 3], np.int32)
    prompt, out = decoded(params, cfg, token[:, :P], length, new)
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
    _, out = decoded(params, cfg, token[:, :P], length, 64)
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
            want = hf.safetensors.laid_out(theirs[name], p)
            assert np.linalg.norm(a - want) <= 1e-4 * np.linalg.norm(want) + 1e-9, name
            seen += 1
    assert seen == len(theirs)


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


def recurrence(L: int):
    """(config, inputs of `linear.whole` of two rows): decays near 0 and 1, and repeated keys."""
    rng = np.random.default_rng(0)
    cfg = model.ModelConfig(
        "qwen3_5", 8, 8, 8, 1, 2, 1, 4, layer_kinds=("linear",), linear_key_heads=2, linear_value_heads=4, linear_key_dim=6,
        linear_value_dim=5, conv_width=4,
    )  # fmt: skip
    B = 2
    qkv = rng.normal(size=(B, L, cfg.linear_key_heads, cfg.conv_channels // 2)).astype(np.float32)
    qkv[:, 60:90] = qkv[:, 60:61]
    conv = rng.normal(size=(*qkv.shape[2:], 4)).astype(np.float32)
    decay = -np.exp(rng.normal(size=(B, L, 4)) * 2 - 2).astype(np.float32)
    beta = rng.uniform(0, 1, (B, L, 4)).astype(np.float32)
    return cfg, (qkv, conv, decay, beta)


@pytest.mark.parametrize("grouped", [16, 4])
def test_the_chunks_are_the_recurrence(grouped, monkeypatch):
    """Whole rows against one token after the other; four chunks, and two groups of two."""
    monkeypatch.setattr(linear, "GROUPED", grouped)
    cfg, (qkv, conv, decay, beta) = recurrence(250)
    length = np.array([250, 97], np.int32)
    out, state = jax.jit(functools.partial(linear.whole, cfg=cfg))(qkv, conv, decay, beta, length_B=jnp.asarray(length))

    def one(state, xs):
        now, state = linear.step(xs[0][None, None], conv, xs[1][None, None], xs[2][None, None], cfg, state)
        return state, now[0, 0]

    empty = linear.State(jnp.zeros((1, 3, *qkv.shape[2:])), jnp.zeros((1, 4, 6, 5)))
    for b, n in enumerate(length):
        last, by_token = jax.lax.scan(one, empty, (qkv[b, :n], decay[b, :n], beta[b, :n]))
        np.testing.assert_allclose(out[b, :n], by_token, atol=2e-4)
        np.testing.assert_allclose(state.memory[b], last.memory[0], atol=2e-4)
        np.testing.assert_array_equal(state.conv[b], last.conv[0])


def test_groups_of_chunks_change_no_gradient(monkeypatch):
    """Rows of two segments in four chunks."""
    cfg, inputs = recurrence(250)
    segment = (np.arange(250) > 100).astype(np.int32)[None].repeat(2, 0)

    def gradient(grouped):
        monkeypatch.setattr(linear, "GROUPED", grouped)
        total = lambda *a: jnp.sum(jnp.sin(linear.whole(*a, cfg, segment)[0]))  # noqa: E731
        return jax.jit(jax.grad(total, argnums=range(4)))(*inputs)

    for ours, want in zip(gradient(4), gradient(16), strict=True):
        assert float(jnp.linalg.norm(want)) > 1
        np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4)


OLDER, NEWER = "language_model.model.", "model.language_model."  # what transformers 5.23 writes of Gemma 3, and Qwen3.5


@pytest.mark.parametrize(("family", "prefix"), [("qwen3_5", NEWER), ("gemma3", OLDER), ("gemma3", NEWER)])
def test_what_is_beside_the_text_model_is_carried_through_an_export(family, prefix, tmp_path):
    """A tower of images, heads that predict further tokens; under the names of either layout."""
    reference = wrapped(family, tmp_path / "in")
    tensors = tensors_of(tmp_path / "in")
    if family == "qwen3_5":
        tensors["mtp.fc.weight"] = torch.randn(3, 5)
    elif prefix == NEWER:
        renamed = {n: n.replace(OLDER, NEWER) if n.startswith(OLDER) else f"model.{n}" for n in tensors}
        tensors = {renamed[n]: t for n, t in tensors.items()}
    assert f"{prefix}norm.weight" in tensors
    safetensors.torch.save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    params, cfg = hf.load(tmp_path / "in")
    assert cfg == hf.read_config(tmp_path / "in") and cfg.prefix == NEWER
    params["final_norm"] = params["final_norm"] + 1
    hf.save(tmp_path / "out", params, cfg, dtype="float32", source=tmp_path / "in")
    again, loaded_cfg = hf.load(tmp_path / "out")
    assert loaded_cfg == cfg
    written = tensors_of(tmp_path / "out")
    assert set(written) == set(tensors)
    changed = [name for name in tensors if not torch.equal(written[name], tensors[name])]
    assert changed == [f"{prefix}norm.weight"]
    theirs = type(reference).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    token = batch()[0][:, :40]
    assert gap(our_logits(again, cfg, token), their_logits(theirs, token, np.ones_like(token))) < MAX
    hf.save(tmp_path / "text", params, cfg, dtype="float32")  # without its source: the text model alone
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()
    assert type(alone).__name__ == FAMILIES[family][1]
    assert gap(our_logits(again, cfg, token), their_logits(alone, token, np.ones_like(token))) < MAX


def test_a_wrapper_s_export_has_the_small_files_of_its_processor(tmp_path):
    """And the processor's template is the run's where that is another than the base's."""
    wrapped("gemma3", tmp_path / "in")
    tokenizer = hf_fixtures.tokenizer()
    tokenizer.save_pretrained(tmp_path / "in")
    small = {"preprocessor_config.json", "processor_config.json", "chat_template.json", "LICENSE"}
    for name in small:
        (tmp_path / "in" / name).write_text('{"chat_template": "theirs"}')
    params, cfg = hf.load(tmp_path / "in")
    for template, said in ((tokenizer.chat_template, "theirs"), ("ours", "ours")):
        tokenizer.chat_template = template
        hf.save(tmp_path / "out", params, cfg, tokenizer, source=tmp_path / "in")
        assert small <= {f.name for f in (tmp_path / "out").iterdir()}
        assert json.loads((tmp_path / "out" / "chat_template.json").read_text()) == {"chat_template": said}


def test_a_bfloat16_export_keeps_decays_gated_norms_and_what_is_carried_in_float32(tmp_path):
    wrapped("qwen3_5", tmp_path / "in")
    tensors = tensors_of(tmp_path / "in")
    hf.save(tmp_path / "out", *hf.load(tmp_path / "in"), dtype="bfloat16", source=tmp_path / "in")
    written = tensors_of(tmp_path / "out")
    whole = [n for n, t in written.items() if t.dtype == torch.float32]
    assert {n for n in tensors if n.endswith(("A_log", "linear_attn.norm.weight")) or ".visual." in n} == set(whole)
    assert all(torch.equal(written[n], tensors[n]) for n in whole)
    assert all(torch.equal(written[n], tensors[n].bfloat16()) for n in written if n not in whole)
    again, _ = hf.load(tmp_path / "out")
    np.testing.assert_array_equal(again["layers"]["a_log"][0], tensors[min(n for n in whole if "A_log" in n)])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5", "gemma3"])
def test_peft_opens_the_adapters_of_a_wrapper_s_text_model_and_nothing_else_takes_them(family, tmp_path):
    """What takes the text model alone finds no such modules, and says so: it would be the base model in silence."""
    peft = pytest.importorskip("peft")
    reference, folder, out = wrapped(family, tmp_path / "in"), tmp_path / "in", tmp_path / "adapter"
    cfg = hf.read_config(folder)
    settings = ConfigDict({"rank": 2, "alpha": 3.0, "targets": config.TARGETS})
    adapters, table = lora.init(jax.random.key(0), cfg, settings), lora.table(cfg, settings)
    hf.save_adapters(out, adapters, table, lora.peft_config(settings, folder, cfg.prefix), dtype="float32")
    theirs = peft.PeftModel.from_pretrained(type(reference).from_pretrained(folder, dtype=torch.float32), out)
    read = {n.replace(".default", "") for n, _ in theirs.named_parameters() if "lora_" in n}
    assert read == set(tensors_of(out)) and all("language_model" in n for n in read)
    if family == "gemma3":  # whose class for text is the wrapper's
        auto = peft.AutoPeftModelForCausalLM.from_pretrained(out)
        assert {n.replace(".default", "") for n, _ in auto.named_parameters() if "lora_" in n} == read
    else:
        with pytest.raises(ValueError, match="not found in the base model"):
            peft.AutoPeftModelForCausalLM.from_pretrained(out)


@pytest.mark.slow
def test_peft_opens_the_adapters_of_every_layer(loaded, tmp_path):
    """Of a Qwen3.5, linear layers and full ones: the adapter folder on transformers' model gives our logits."""
    peft = pytest.importorskip("peft")
    reference, params, cfg, folder = loaded("qwen3_5")
    settings = ConfigDict({"rank": 2, "alpha": 3.0, "targets": config.TARGETS + config.LINEAR_TARGETS})
    adapters = lora.init(jax.random.key(0), cfg, settings)
    adapters = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), adapters)
    out, table = tmp_path / "adapter", lora.table(cfg, settings)
    hf.save_adapters(out, adapters, table, lora.peft_config(settings, folder), dtype="float32")
    theirs = peft.PeftModel.from_pretrained(type(reference).from_pretrained(folder, dtype=torch.float32), out).eval()
    read = {n.replace(".default", "") for n, _ in theirs.named_parameters() if "lora_" in n}
    assert read == set(tensors_of(out)) and sum("linear_attn" in n for n in read) == 2 * 5 * 3
    token = batch()[0][:, :70]
    compute = model.Compute(lora_scale=lora.scale(settings))
    ours = jax.jit(lambda p: model.logits(p, cfg, model.hidden(p, cfg, jnp.asarray(token), compute=compute)))
    want = their_logits(theirs, token, np.ones_like(token))
    assert gap(np.asarray(ours(lora.attach(params, adapters))), want) < MAX
    assert gap(our_logits(params, cfg, token), want) > 0.1
