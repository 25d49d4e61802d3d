"""LoRA: adapters beside the projections against merged weights, in the loss, the sampler, a whole run and PEFT's own
reader."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_step import close, equations, make_batch, naive_logp, weights

from benchmarks.real_model import forgetting
from omniopd_jax import config, export, hf, model, rollout, step, train
from omniopd_jax.errors import UserError
from omniopd_jax.evaluation import runner
from omniopd_jax.model import lora
from omniopd_jax.parallel import sharding
from omniopd_jax.run import checkpoint, trained, validation

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@pytest.fixture(scope="module")
def cfg(make_cfg):
    return make_cfg(**{"lora.rank": 2, "lora.alpha": 3.0})


@pytest.fixture(scope="module")
def compute(cfg):
    return model.Compute(lora_scale=lora.scale(cfg.lora))


@pytest.fixture(scope="module")
def new(model_cfg, cfg):
    """Adapters as a run starts with."""
    return lora.init(jax.random.key(5), model_cfg, cfg.lora)


@pytest.fixture(scope="module")
def adapters(new):
    """Adapters that have moved."""
    leaves, tree = jax.tree.flatten(new)
    keys = jax.random.split(jax.random.key(6), len(leaves))
    return tree.unflatten([a + 0.2 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves)])


def merged(base, adapters, scale):
    """W + scale A B of every projection, in NumPy float64, cast to float32."""
    layers = dict(base["layers"])
    for name in MATRICES:
        a, b = (np.asarray(adapters["layers"][f"{name}_lora_{x}"], np.float64) for x in "ab")
        delta = np.stack([np.tensordot(x, y, axes=1) for x, y in zip(a, b)])
        layers[name] = jnp.asarray(np.asarray(layers[name], np.float64) + scale * delta, jnp.float32)
    return base | {"layers": layers}


def test_adapters_start_as_pefts(model_cfg, cfg, new):
    """A uniform in +-fan_in**-0.5, B zero: the bound is reached and the mean is nothing."""
    wide = dataclasses.replace(model_cfg, hidden_size=64, intermediate_size=48)
    settings = config.default().lora
    settings.rank = 32
    got = lora.init(jax.random.key(0), wide, settings)["layers"]
    for name, fan_in in {"q": 64, "o": 32, "down": 48}.items():
        a = np.asarray(got[f"{name}_lora_a"])
        assert 0.98 * fan_in**-0.5 < np.abs(a).max() <= fan_in**-0.5 and abs(a.mean()) < 0.05 * fan_in**-0.5
    assert not any(np.any(v) for k, v in got.items() if k.endswith("_b"))
    assert model.fits(new, lora.table(model_cfg, cfg.lora))


def test_merging_adds_the_scaled_product(params, adapters, compute):
    got = jax.jit(lambda p: lora.merge(p, compute.lora_scale, "float32"))(lora.attach(params, adapters))
    want = merged(params, adapters, 1.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("objective", ["omniopd", pytest.param("opd_exact", marks=pytest.mark.slow)])
def test_the_gradient_is_the_chain_rule_through_merged_weights(
    params, ref_params, model_cfg, batch, make_cfg, adapters, compute, objective
):
    """dA = s dW B^T, dB = s A^T dW, dW of the dense loss at W + s A B; the reference is the base in both."""
    how = {"micro_batches": 2, "objective.name": objective}
    dense, with_lora = make_cfg(**how), make_cfg(**how | {"lora.rank": 2, "lora.alpha": 3.0})
    weight, mask = weights(batch, dense)
    teacher = {"teacher_params": ref_params, "teacher_cfg": model_cfg} if objective == "opd_exact" else {}
    whole = merged(params, adapters, 1.5)
    want, dense_grads, dense_stats = taught(whole, params, batch, weight, mask, model_cfg, dense, **teacher)
    rematerialised = dataclasses.replace(compute, remat={"omniopd": "full", "opd_exact": "dots"}[objective])
    got, grads, stats = taught(adapters, params, batch, weight, mask, model_cfg, with_lora, rematerialised, **teacher)
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    np.testing.assert_allclose(stats.kl_BT, dense_stats.kl_BT, rtol=1e-3, atol=1e-5)
    chained = {}
    for name in MATRICES:
        a, b = (np.asarray(adapters["layers"][f"{name}_lora_{x}"], np.float64) for x in "ab")
        dw = np.asarray(dense_grads["layers"][name], np.float64)
        inputs = a.ndim - 2
        pairs = list(zip(a, b, dw))
        outputs = dw.ndim - 1 - inputs
        chained[f"{name}_lora_a"] = 1.5 * np.stack([
            np.tensordot(w, y, axes=(range(inputs, w.ndim), range(1, 1 + outputs))) for _, y, w in pairs
        ])  # fmt: skip
        chained[f"{name}_lora_b"] = 1.5 * np.stack([
            np.tensordot(x, w, axes=(range(inputs), range(inputs))) for x, _, w in pairs
        ])  # fmt: skip
    close(grads, {"layers": chained}, 1e-4)


@functools.partial(jax.jit, static_argnames=("model_cfg", "cfg", "compute", "teacher_cfg"))
def taught(
    params, ref_params, batch, weight, mask, model_cfg, cfg, compute=None, teacher_params=None, teacher_cfg=None
):
    return step.loss_and_grads(
        params,
        ref_params,
        batch,
        weight,
        mask,
        model_cfg=model_cfg,
        cfg=cfg,
        compute=compute,
        teacher_params=teacher_params,
        teacher_cfg=teacher_cfg,
        divergence_BT=None if teacher_params is None else mask,
    )


def test_the_reference_is_the_model_without_adapters(params, model_cfg, batch, cfg, new, adapters, compute):
    """A new run's KL is 0 to rounding; a moved one's is that of the merged model to the base."""
    weight, mask = weights(batch, cfg)
    kl_BT = taught(new, params, batch, weight, mask, model_cfg, cfg, compute)[2].kl_BT
    assert np.abs(np.asarray(kl_BT)).max() < 1e-6  # two programs for one forward: they round apart
    kl_BT = taught(adapters, params, batch, weight, mask, model_cfg, cfg, compute)[2].kl_BT
    logp_BTV = naive_logp(merged(params, adapters, 1.5), model_cfg, batch)
    ref_BTV = naive_logp(params, model_cfg, batch)
    want = np.asarray(jnp.sum(jnp.exp(ref_BTV) * (ref_BTV - logp_BTV), axis=-1))
    real = np.arange(want.shape[1])[None] < np.asarray(batch.length_B)[:, None]
    np.testing.assert_allclose(np.asarray(kl_BT)[real], want[real], rtol=1e-3, atol=1e-5)
    assert want[real].min() > 0.01


def test_no_gradient_of_the_base_or_its_head_is_formed(params, model_cfg, batch, make_cfg, compute):
    """No product of the update has the shape, in any order of axes, of a projection or of the head; the dense one has
    all."""
    cfg = make_cfg(**{"lora.rank": 3})  # 2 would be the shape of k as well
    weight, mask = weights(batch, cfg)
    adapters = lora.init(jax.random.key(0), model_cfg, cfg.lora)

    def shapes(trained, cfg):
        fn = functools.partial(step.loss_and_grads, model_cfg=model_cfg, cfg=cfg, compute=compute)
        made = equations(jax.make_jaxpr(fn)(trained, params, batch, weight, mask).jaxpr)
        return {tuple(sorted(e.outvars[0].aval.shape)) for e in made if e.primitive.name == "dot_general"}

    table = model.table(model_cfg)
    base = {tuple(sorted(p.hf_shape)) for p in [table["embed"], *(table["layers"][n] for n in MATRICES)]}
    assert base <= shapes(params, make_cfg())
    both = base & shapes(adapters, cfg)
    assert not both


def test_state_holds_the_adapters_alone(params, model_cfg, batch, cfg, new, compute):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tp": 1}, jax.devices()[:1])
    steps = step.make_steps(model_cfg, cfg, compute=dataclasses.replace(compute, mesh=mesh))
    base = jax.device_put(jax.tree.map(jnp.copy, params), steps.reference_shardings)
    state = step.create_state(jax.tree.map(jnp.copy, new), cfg, steps, jax.random.key(0))
    held = sum(a.size for a in jax.tree.leaves((state.params, state.opt_state)))
    assert held <= 3 * sum(a.size for a in jax.tree.leaves(new)) + 4
    rows = sharding.put_rows(batch, mesh)
    for _ in range(2):
        stats = steps.score_step(step.policy(state.params, base, cfg), rows.token_BL, rows.prompt_length_B, 10)
        state, metrics, _ = steps.train_step(state, base, rows, stats, None)
        assert float(metrics["score/update_logp_gap"]) < 1e-4
    assert not any(a.is_deleted() for a in jax.tree.leaves(base))
    close(base, params, 0.0)
    assert float(metrics["anchor/kl_ref_to_student_exact"]) > -1e-6, "float32 rounding about a KL near 0"
    assert float(metrics["grad_norm"]) > 0


def test_the_sampler_gets_merged_weights(params, model_cfg, adapters, compute):
    got = rollout.prepare(lora.attach(params, adapters), model_cfg, compute=compute)
    want = rollout.prepare(merged(params, adapters, 1.5), model_cfg)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    close(got, want, 1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora.targets": ("q_proj", "lm_head")}, "lora.targets = 'lm_head' is unknown; choose one of: .*q_proj"),
        ({"lora.targets": ()}, "at least one projection"),
        ({"lora.targets": ("q_proj", "q_proj")}, "each once"),
        ({"lora.alpha": 0.0}, "lora.alpha = 0.0"),
        ({"lora.rank": -1}, "lora.rank = -1"),
        ({"anchor.ref_offload": True}, "anchor.ref_offload with lora.rank"),
    ],
)
def test_wrong_settings_are_one_line(values, message):
    c = config.default()
    c.update_from_flattened_dict({"lora.rank": 2} | values)
    with pytest.raises(UserError, match=message):
        validation.validate(c)


def test_experts_take_no_adapter(model_cfg, make_cfg):
    moe = dataclasses.replace(model_cfg, family="qwen3_moe", num_experts=4, experts_per_token=2, expert_size=8)
    with pytest.raises(UserError, match="gate_proj, up_proj, down_proj of a mixture of experts take no adapter"):
        lora.table(moe, make_cfg(**{"lora.rank": 2}).lora)
    attention = make_cfg(**{"lora.rank": 2, "lora.targets": lora.ATTENTION}).lora
    assert len(lora.table(moe, attention)["layers"]) == 8


def test_adapters_without_a_scale_are_refused(params, adapters, model_cfg):
    with pytest.raises(ValueError, match="lora_scale"):
        model.hidden(lora.attach(params, adapters), model_cfg, jnp.ones((1, 3), jnp.int32))


# --- a whole run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return folder, *tiny.make_folders(folder)


def recipe(folders, name, **more):
    """A run with LoRA of all projections on one device; no teacher, so that it is short."""
    folder, student, teacher = folders
    return tiny.recipe(student, teacher, folder / name, **{
        "objective.name": "constant", "lora.rank": 4, "lora.alpha": 8.0, "optimizer.learning_rate": 1e-2,
        "optimizer.mu_dtype": "bfloat16", "anchor.ref_dtype": "bfloat16", "micro_batches": 2,
    } | more)  # fmt: skip


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        tiny.on_one_device(patch)
        yield


@pytest.fixture(scope="module")
def whole(folders, one_device):
    train.train(recipe(folders, "whole", num_steps=3))
    return folders[0] / "whole"


def test_a_run_trains_and_saves_adapters_alone(whole):
    params, saved = checkpoint.restore_params(whole)
    assert set(params) == {"layers"} and saved["lora"]["rank"] == 4
    assert all(np.abs(a).max() > 0 for a in jax.tree.leaves(params))
    rows = tiny.lines(whole / "metrics.jsonl")
    kl = [r["anchor/kl_ref_to_student_exact"] for r in rows]
    assert abs(kl[0]) < 1e-6 and kl[2] > 1e-5
    assert all(r["score/update_logp_gap"] < 1e-4 and r["rollout/score_logp_gap"] < 1e-3 for r in rows)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(folders, whole):
    train.train(recipe(folders, "parts", num_steps=2))
    train.train(recipe(folders, "parts", num_steps=3))
    assert tiny.same(checkpoint.restore_params(whole)[0], checkpoint.restore_params(folders[0] / "parts")[0])
    a, b = (tiny.lines(folders[0] / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [r["loss"] for r in a] == [r["loss"] for r in b] and len(a) == 3


def test_other_adapters_are_another_run(folders, whole):
    with pytest.raises(UserError, match=r"lora.alpha was 8.0, is 16.0"):
        train.train(recipe(folders, "whole", num_steps=4, **{"lora.alpha": 16.0}))


def test_evaluation_and_merged_export_answer_alike(folders, whole):
    c = recipe(folders, "whole")
    student = runner.load_student(c, str(whole))
    out = export.export(whole, folders[0] / "merged", dtype="float32")
    other = runner.load_student(c, str(out))
    close(student.params, other.params, 1e-6)
    base = runner.load_student(c, None)
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), student.params["layers"][0], base.params["layers"][0]
    )
    assert all(moved[n] > 1e-5 for n in MATRICES)


def test_perplexity_of_a_run_is_that_of_its_merged_model(folders, whole):
    """What benchmarks/real_model says of forgetting, against float64 on transformers' logits."""
    import torch
    import transformers

    def perplexity(path) -> float:
        ids = hf.load_tokenizer(path)(forgetting.PROSE.read_text(), add_special_tokens=False)["input_ids"]
        rows = np.array(ids[: len(ids) // forgetting.LENGTH * forgetting.LENGTH]).reshape(-1, forgetting.LENGTH)
        with torch.no_grad():
            m = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            logp = torch.log_softmax(m(torch.tensor(rows)).logits.double(), -1)[:, :-1]
        return float(np.exp(-logp.gather(-1, torch.tensor(rows[:, 1:, None])).mean()))

    merged = export.export(whole, folders[0] / "merged_3", dtype="float32")
    told = [forgetting.perplexity(whole, updates) for updates in (0, 3)]
    assert told == pytest.approx([perplexity(folders[1]), perplexity(merged)], rel=1e-4) and told[0] != told[1]


def test_a_run_without_adapters_has_none_to_export(folders, whole, monkeypatch):
    read = trained.read(whole, None)
    monkeypatch.setattr(export, "read", lambda *_: dataclasses.replace(read, lora=config.default().lora))
    with pytest.raises(UserError, match="was trained without LoRA"):
        export.export(whole, folders[0] / "none", adapter=True)


def test_peft_opens_the_adapters_and_transformers_the_merged_model(folders, whole):
    """Both give our logits; PEFT's own tensor names, one file, all of it read."""
    import torch
    import transformers
    from peft import PeftModel
    from safetensors.numpy import load_file

    folder, base, _ = folders
    out = export.export(whole, folder / "adapter", dtype="float32", adapter=True)
    again = export.export(whole, folder / "adapter", dtype="float32", adapter=True)  # replaces itself
    files = {f.name for f in out.iterdir()}
    assert out == again and {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    names = set(load_file(out / "adapter_model.safetensors"))
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert first in names and len(names) == 2 * 7 * 2
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, out).eval()
    read = {n.replace(".default", "") for n, _ in theirs.named_parameters() if "lora_" in n}
    assert read == names
    hf_merged = transformers.AutoModelForCausalLM.from_pretrained(
        export.export(whole, folder / "merged_2", dtype="float32"), dtype=torch.float32
    ).eval()
    token = np.random.default_rng(0).integers(0, 300, (2, 20))
    got = trained.read(whole, None)
    bare, cfg = hf.load(base)
    compute = model.Compute(lora_scale=lora.scale(got.lora))
    p = jax.jit(lambda p: model.logits(p, cfg, model.hidden(p, cfg, jnp.asarray(token), compute=compute)))(got.whole())
    without = np.asarray(model.logits(bare, cfg, model.hidden(bare, cfg, jnp.asarray(token))))
    with torch.no_grad():
        for m in (theirs, hf_merged):
            logits = m(torch.tensor(token)).logits.numpy()
            assert np.abs(logits - np.asarray(p)).max() < 1e-4 * logits.std()
            assert np.abs(logits - without).max() > 1e-2 * logits.std()
