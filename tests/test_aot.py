"""Will it fit? Sizes and knobs on fake devices; with `make test-aot` the TPU compiler's own figures for a v5e:2x2
slice.

The marked tests fail, and never skip, where that compiler is missing; the one marked gpu needs `jax[cuda13]`, and no
GPU.
"""

import json
import subprocess

import jax
import numpy as np
import pytest
import tiny

from omniopd_jax import model, rollout
from omniopd_jax.errors import UserError
from omniopd_jax.parallel import sharding
from omniopd_jax.run import fit, flops, hlo, topologies

GIB = 2.0**30
LAYERS, ROWS, LENGTH = 4, 128, 8192  # 32 rows a chip: a cache of 4 GiB
# bytes that an offloaded reference leaves on one of four chips: its vectors, and a quarter of its embedding
STAYS = 4 * (LAYERS * (2 * 1024 + 2 * 128) + 1024) + 151_936 * 1024


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A folder with the config.json of Qwen3-0.6B, four of its layers."""
    folder = tmp_path_factory.mktemp("student")
    values = {
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "tie_word_embeddings": True, "max_position_embeddings": 40_960,
        "hidden_act": "silu", "attention_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def settings(student, **more) -> dict:
    return {
        "student.path": student, "prompts_per_step": ROWS // 4, "num_generations": 4, "max_prompt_length": 1024,
        "max_completion_length": LENGTH - 1024, "micro_batches": 32, "compute_dtype": "bfloat16", "model.remat": "full",
        "rollout.cache_gib": 8.0,
    } | more  # fmt: skip


def recipe(student, **more):
    c = tiny.recipe("", "", "")
    c.update_from_flattened_dict(settings(student, **more))
    return c


@pytest.fixture(scope="module")
def plan(student):
    """On four fake devices, two of them tensor-parallel."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tp": 2}, jax.devices()[:4])
    return fit.Plan(recipe(student), mesh)


def test_sizes_are_what_a_chip_holds(plan):
    count, sizes = model.num_params(plan.model_cfg), plan.sizes()
    norms = LAYERS * (2 * 1024 + 2 * 128) + 1024  # replicated; all else lies over four chips
    held = (count - norms) / 4 + norms
    assert sizes["parameters"] == sizes["reference"] == 4 * held
    assert 8 * held <= sizes["optimizer"] <= 8 * held + 64  # and its step counter
    pages = 1 + (ROWS // 2) * (LENGTH // rollout.PAGE + 1)  # of each of two shards, heads over two chips
    assert sizes["cache"] == 2 * LAYERS * pages * (8 / 2) * rollout.PAGE * 128 * 2


def test_sizes_of_a_smaller_reference_and_of_adapters(student, plan):
    def sizes(**more):
        return fit.Plan(recipe(student, **more), plan.mesh).sizes()

    full = plan.sizes()
    assert sizes(**{"anchor.ref_dtype": "bfloat16"})["reference"] == full["reference"] / 2
    assert sizes(**{"anchor.ref_offload": True})["reference"] == STAYS
    assert sizes(**{"anchor.kl_coef": 0.0})["reference"] == 0.0  # none is held
    half = sizes(**{"optimizer.mu_dtype": "bfloat16"})["optimizer"]
    assert half == pytest.approx(full["optimizer"] * 3 / 4, rel=1e-6)
    adapters = sizes(**{"lora.rank": 16, "anchor.kl_coef": 0.0, "anchor.ref_dtype": "bfloat16"})
    assert adapters["reference"] == full["reference"] / 2  # the base, with or without an anchor
    D, F, q, kv = 1024, 3072, 16 * 128, 8 * 128
    split = LAYERS * 16 * (D + q + 2 * (D + kv) + q + D + 2 * (D + F) + F + D)  # over fsdp or tp, each side of a pair
    assert adapters["parameters"] == 4 * split / 2


def test_decode_is_lowered_with_what_the_sampler_takes(plan):
    """With the whole cache, donated; the kernels of the other passes are compiled below."""
    lowered, donated, resident = plan.lower("decode")
    text = lowered.as_text()
    assert f"tensor<{plan.sampler.pages}x8x{rollout.PAGE}x128xbf16>" in text and "stablehlo.while" in text
    assert donated == fit.local_bytes(plan.sampler.state()[:2]) > plan.sizes()["cache"]
    assert resident == fit.local_bytes(plan.state) + plan.sizes()["reference"]


def test_a_prefill_is_lowered_at_its_largest_beside_the_rows_that_decode(student, plan):
    """An evaluation's, where that has more prompts. Its slots' states are there while others are prefilled."""
    assert plan.samplers["prefill"] is plan.sampler and plan.sampler.entries == 2 * 16
    large = fit.Plan(recipe(student, **{"eval.num_prompts": 512}), plan.mesh)
    sampler = large.samplers["prefill"]
    few = fit.Plan(recipe(student, **{"rollout.slots": 16}), plan.mesh)
    assert few.sampler.entries == 2 * 2, "8 slots a shard take two prompts with four rows each"
    assert sampler.entries == 2 * rollout.PREFILL_TOKENS // 1024 and "evaluate" in large.samplers
    lowered, donated, resident = large.lower("prefill")
    assert f"tensor<{sampler.entries}x1024xi32>" in lowered.as_text()
    pools, slots, _ = sampler.state()
    assert donated == fit.local_bytes(pools)
    beside = fit.local_bytes(large.state) + large.sizes()["reference"]
    assert resident == beside + fit.local_bytes(slots) > beside


def test_knobs_come_in_order_and_build_on_each_other(student):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tp": 1}, jax.devices()[:4])
    cfg = recipe(student, **{"model.remat": "none", "micro_batches": 8, "mesh.data": 2})
    taken = [(what, c.to_dict()) for what, c in fit.knobs(cfg, mesh)]
    assert [what for what, _ in taken] == [
        "model.remat=full", "mesh.data=1, mesh.fsdp=-1", "rollout.slots=64", "rollout.slots=32", "rollout.parts=2", "rollout.parts=4",
        "anchor.ref_dtype=bfloat16", "anchor.ref_offload=True", "mesh.tp=2, mesh.fsdp=-1", "mesh.tp=4, mesh.fsdp=-1",
    ]  # fmt: skip
    last = taken[-1][1]
    assert (last["model"]["remat"], last["rollout"]["parts"], last["mesh"]["tp"]) == ("full", 4, 4)
    assert last["anchor"]["ref_offload"] and last["anchor"]["ref_dtype"] == "bfloat16"
    assert cfg.model.remat == "none" and cfg.rollout.parts == 1, "the recipe itself is left alone"
    adapters = recipe(student, **{"lora.rank": 8})
    assert not any("anchor" in what for what, _ in fit.knobs(adapters, mesh))


def test_the_heads_size_in_a_loop_is_found(plan):
    def one(dims, loops):
        return hlo.Collective("all-gather", dims, 4.0 * np.prod(dims), 2, loops, 1)

    V, D = 151_936, 1024
    heads, others = [one((V, D), 1), one((V // 2, D), 2), one((D // 2, V), 1)], [one((32, V), 1), one((D, 3072), 1)]
    done = [fit.Pass("update", 0.0, collectives=[*heads, one((V, D), 0), *others])]
    assert [c for _, c in fit.head_in_loops(plan, done)] == heads


def test_the_report_says_what_does_not_fit():
    chip = flops.CHIPS["v5e"]
    fits = fit.Pass(
        "decode", 1.0, donated=8 * GIB, aliased=8 * GIB, temporaries=0.5 * GIB, peak=9 * GIB, resident=2 * GIB
    )
    text = "\n".join(fit.lines(fits, chip, 8 * GIB))
    assert "decode  fits" in text and "(69%)" in text and "temporaries are 6.2% of the cache" in text
    assert "donated 8,192.0 MiB, aliased 8,192.0 MiB" in text
    fits.resident = 7 * GIB
    assert "decode  DOES NOT FIT" in fit.lines(fits, chip, 8 * GIB)[0]
    assert fit.lines(fit.Pass("update", 1.0, problem="Ran out"), chip, 1.0)[0].startswith(
        "update  DOES NOT FIT: Ran out"
    )


def test_known_models_need_no_hub():
    assert model.num_params(topologies.model_config("Qwen/Qwen3-1.7B")) == 1_720_574_976
    assert model.num_params(topologies.model_config("Qwen/Qwen3-32B")) == 32_762_123_264
    with pytest.raises(UserError, match="student.path"):
        topologies.model_config("nobody/nothing")


@pytest.mark.parametrize(
    ("topology", "install"), [("v5e:2x2", "requirements-tpu.txt"), ("H100:8", "requirements-gpu.txt")]
)
def test_without_the_compiler_it_says_what_to_install(monkeypatch, topology, install):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=install):
        topologies.devices(topology)


@pytest.mark.parametrize("topology", ["H100", "H100:", "H100:0", "H200:2x", "A100:2x2x2"])
def test_gpus_are_counted_by_node(topology):
    with pytest.raises(UserError, match="H100:2x8 for two nodes of eight"):
        topologies.devices(topology)


def test_passes_that_the_recipe_lacks_are_one_line(student, monkeypatch):
    """A text teacher has no pass of its own: what compiles nothing is no proof that all fits."""
    monkeypatch.setattr(fit, "devices", lambda topology: jax.devices()[:1])
    with pytest.raises(UserError, match="names none that this recipe has: prefill, start, decode"):
        fit.check(recipe(student), "v5e:1x1", ["teacher"], say=lambda line: None)


def test_an_unknown_chip_is_one_line(student):
    with pytest.raises(UserError, match="B300.*A100-40GB, H100, H200"):
        fit.check(recipe(student), "B300:8")


@pytest.mark.gpu
def test_gpus_that_are_not_there(student):
    """Eight H100: everything fits, cuDNN attends, the layers' gathers are in loops and the head's are not."""
    said = []
    plan, done, fits = fit.check(recipe(student, micro_batches=4), "H100:8", say=said.append)
    passes = {p.name: p for p in done}
    assert fits and plan.mesh.size == 8 and plan.compute.attention == "cudnn"
    assert passes["decode"].temporaries <= 0.1 * plan.sizes()["cache"]
    assert passes["update"].aliased >= passes["update"].donated > 0
    assert any(c.loops for c in passes["update"].collectives) and not any("warning" in line for line in said)
    assert len({d.process_index for d in topologies.devices("H200:2x8")}) == 2


# --- the TPU compiler itself ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(student):
    """(what was said, plan, {name: Pass}, fits) of the whole recipe on four chips."""
    said = []
    plan, done, fits = fit.check(recipe(student), "v5e:2x2", say=said.append)
    print("\n".join(said))
    return said, plan, {p.name: p for p in done}, fits


@pytest.mark.aot
def test_a_recipe_fits_and_every_pass_is_reported(compiled):
    said, plan, passes, fits = compiled
    assert fits and set(passes) == set(plan.passes(fit.PASSES)) and not any(p.problem for p in passes.values())
    assert all(0 < p.total < 16 * GIB and p.compute_s > 0 for p in passes.values())
    assert passes["update"].arguments >= fit.local_bytes(plan.state) + plan.sizes()["reference"]
    assert not any("warning" in line for line in said)


@pytest.mark.aot
def test_decode_needs_little_beside_its_cache(compiled):
    _, plan, passes, _ = compiled
    cache = plan.sizes()["cache"]
    assert cache >= 4 * GIB and plan.sampled == ROWS and plan.P + plan.T == LENGTH
    assert passes["decode"].temporaries <= 0.1 * cache


@pytest.mark.aot
def test_what_is_donated_is_aliased(compiled):
    for name in ("decode", "update"):
        p = compiled[2][name]
        assert p.donated > 0 and p.aliased >= p.donated, name


@pytest.mark.aot
def test_no_collective_of_the_heads_size_runs_in_a_loop(compiled):
    _, plan, passes, _ = compiled
    head = 151_936 * 1024 * 2  # bytes in bfloat16
    update = passes["update"].collectives
    assert not fit.head_in_loops(plan, list(passes.values()))
    assert max(c.bytes for c in update if not c.loops) >= head, "outside of loops it is gathered"
    assert any(c.loops for c in update), "the layers' own are in loops"
    assert max(c.bytes for p in passes.values() for c in p.collectives if c.loops) < head / 4


@pytest.mark.aot
@pytest.mark.parametrize("topology, count", [("v6e:2x2", 4), ("v5p:2x2x1", 4), ("tpu7x:2x2x1", 8), ("v5e:16x16", 256)])
def test_other_slices(student, topology, count):
    """Two JAX devices a chip of tpu7x. The largest is only asked for its devices."""
    assert len(topologies.devices(topology)) == count
    if count < 256:
        _, (decode,), fits = fit.check(recipe(student, micro_batches=16), topology, ["decode"], say=lambda _: None)
        assert fits and 0 < decode.temporaries < decode.total


@pytest.mark.aot
@pytest.mark.parametrize("topology, tp", [("v5p:4x4x4", 4), ("v5p:4x4x4", 2), ("v5e:4x4", 4), ("v5e:8x8", 8)])
def test_tensor_parallel_groups_stay_on_a_host(topology, tp):
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tp": tp}, topologies.devices(topology))
    hosts = [{d.process_index for d in group} for group in mesh.devices.reshape(-1, tp)]
    per_host = max(sum(d.process_index == h for d in mesh.devices.flat) for h in {min(h) for h in hosts})
    assert tp > per_host or all(len(h) == 1 for h in hosts)
    assert len(set(mesh.devices.flat)) == mesh.size


@pytest.mark.aot
def test_a_reference_in_host_memory_is_no_argument_of_the_chip(compiled, student):
    """The peak may rise: the compiler plans its temporaries otherwise (docs/results/aot.md), which `--suggest` finds
    out."""
    plan, (update,), fits = fit.check(recipe(student, **{"anchor.ref_offload": True}), "v5e:2x2", ["update"], say=print)
    assert fits and plan.sizes()["reference"] == STAYS
    gone = compiled[1].sizes()["reference"] - STAYS
    assert gone > 0.2 * compiled[1].sizes()["reference"]
    assert update.arguments == pytest.approx(compiled[2]["update"].arguments - gone, rel=1e-3)


@pytest.mark.aot
def test_an_unknown_slice_is_one_line():
    with pytest.raises(UserError, match="v9"):
        topologies.devices("v9:2x2")
    with pytest.raises(UserError, match="v5e:3x5"):
        topologies.devices("v5e:3x5")


@pytest.mark.aot
def test_what_does_not_fit_ends_with_3_and_a_suggestion(student):
    """Four times the rows: 16 GiB of cache a chip. The command tells what would do."""
    values = settings(student, prompts_per_step=ROWS)
    command = [
        tiny.PYTHON,
        "-m",
        "omniopd_jax.aot",
        *tiny.arguments(values),
        "--topology=v5e:2x2",
        "--passes=decode",
        "--suggest",
    ]
    done = subprocess.run(command, cwd=tiny.REPO, env=tiny.environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == fit.NOT_FIT, done.stderr[-2000:]
    assert "decode  DOES NOT FIT" in done.stdout
    assert "suggest: it fits with --config.rollout.slots=" in done.stdout
