"""Counts against sums written out by hand, the recompilation warning, and the profiler's window."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import pytest

from omniopd_jax import model
from omniopd_jax.errors import UserError
from omniopd_jax.run import flops, logging, profiling

CFG = model.ModelConfig(
    family="qwen3", vocab_size=50, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=4, qk_norm=True,
)  # fmt: skip


def test_a_forward_pass_is_counted_as_written_out():
    D, F, N, K, H, V = 8, 12, 4, 2, 4, 50
    rows, want = [5, 2], 0
    for n in rows:
        want += 3 * n * 2 * (D * N * H + 2 * D * K * H + N * H * D + 3 * D * F)  # q, k and v, o, feed-forward
        want += 3 * 2 * 2 * N * H * sum(i + 1 for i in range(n))  # scores and their product with the values
        want += (n - 1) * 2 * D * V
    assert flops.forward(CFG, rows, [n - 1 for n in rows]) == want
    assert flops.update(CFG, rows, [4, 1], anchored=False) == 3 * want
    assert flops.update(CFG, rows, [4, 1], anchored=True) == 4 * want
    assert flops.update(CFG, rows, [4, 1], anchored=True, teacher=CFG) == 5 * want


def test_the_layers_products_hold_all_parameters_but_norms_and_embedding():
    for cfg in (CFG, model.ModelConfig("qwen3", 151_936, 2048, 6144, 28, 16, 8, 128, tied=True, qk_norm=True)):
        layers, head = flops.matmul_params(cfg)
        norms = cfg.num_layers * (2 * cfg.hidden_size + 2 * cfg.head_dim) + cfg.hidden_size
        assert layers + head + norms == model.num_params(cfg)  # tied: the embedding is the head


def test_decoding_reads_parameters_a_step_and_keys_a_row():
    layers, head = flops.matmul_params(CFG)
    per_token = 2 * 3 * 2 * 4
    one = 2 * ((layers + head) * 3 + per_token * (4 * 3 + 1 + 2 + 3))
    assert flops.decode_bytes(CFG, [4], [3], rows_together=1, itemsize=2) == one
    assert flops.decode_bytes(CFG, [4, 4], [3, 3], rows_together=1, itemsize=2) == 2 * one
    assert flops.decode_bytes(CFG, [4, 4], [3, 3], rows_together=2, itemsize=2) == 2 * one - 2 * (layers + head) * 3
    assert flops.decode_bytes(CFG, [4, 4], [3, 3], rows_together=1, itemsize=2, shards=2) == 2 * one
    cache = 2 * per_token * sum(n * 4 + n * (n + 1) // 2 for n in (1, 2, 6))
    for slots, steps in ((1, 9), (2, 6), (3, 6)):  # 9 tokens; a slot that is free takes the next row
        got = flops.decode_bytes(CFG, [4] * 3, [1, 2, 6], rows_together=slots, itemsize=2)
        assert got == 2 * (layers + head) * steps + cache, slots
    int8 = flops.decode_bytes(CFG, [4], [3], rows_together=1, itemsize=2, cache_dtype="int8")
    assert int8 == 2 * (layers + head) * 3 + 3 * 2 * 2 * (4 + 4) * (4 * 3 + 1 + 2 + 3)  # a scale a head and position


def test_devices_are_found_by_their_kind():
    for kind, name in (
        ("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
    ):  # fmt: skip
        assert flops.chip(types.SimpleNamespace(device_kind=kind)) == flops.CHIPS[name], kind
    assert flops.chip() is None, "a CPU has no peak"
    assert flops.chip_of("NVIDIA GH200 480GB") is None, "another memory than an H200's"


def test_metrics_have_shares_only_where_the_chip_is_known(make_cfg):
    mesh = types.SimpleNamespace(size=2, shape={"tp": 1})
    seconds = {"time/rollout": 2.0, "time/score": 1.0, "time/update": 4.0, "time/step": 10.0}
    got = flops.metrics(make_cfg(), CFG, None, [4, 4], [6, 2], seconds, mesh, None)
    assert got == {
        "perf/rollout_tokens_per_s": 2.0, "perf/score_tokens_per_s": 4.0, "perf/update_tokens_per_s": 1.0,
    }  # fmt: skip
    chip = flops.Chip(1e6, 1e9, 1e6, 1e6)
    got = flops.metrics(make_cfg(), CFG, None, [4, 4], [6, 2], seconds, mesh, chip)
    assert got["perf/update_mfu"] == flops.update(CFG, [10, 6], [6, 2], anchored=True) / 4.0 / 2 / 1e6
    assert {"perf/score_mfu", "perf/step_mfu", "perf/decode_bandwidth"} < got.keys()


def test_slots_read_the_weights_once_each_and_a_prompt_is_prefilled_once(make_cfg):
    """8 rows in 4 slots: the parameters are read twice as often; 2 generations of a prompt: half of the prefill."""
    mesh, chip = types.SimpleNamespace(size=1, shape={"tp": 1}), flops.Chip(1e6, 1e9, 1e6, 1e6)
    prompts, responses = [5] * 8, [6] * 8
    seconds = {"time/rollout": 1.0, "time/step": 1.0}

    def metrics(**more):
        return flops.metrics(make_cfg(**more), CFG, None, prompts, responses, seconds, mesh, chip)

    def moved(rows):
        return flops.decode_bytes(CFG, prompts, responses, rows_together=rows, itemsize=4) / 1e6

    for slots in (8, 4, 2):
        assert metrics(**{"rollout.slots": slots})["perf/decode_bandwidth"] == pytest.approx(moved(slots))
    each, shared = (metrics(num_generations=g)["perf/step_mfu"] for g in (1, 2))
    assert (each - shared) * 1e6 == pytest.approx(
        flops.forward(CFG, prompts, [0]) - flops.forward(CFG, prompts[::2], [0])
    )


def test_rows_behind_a_privileged_prompt_count_and_an_evaluation_does_not(make_cfg):
    mesh, chip = types.SimpleNamespace(size=1, shape={"tp": 1}), flops.Chip(1e6, 1e9, 1e6, 1e6)

    def metrics(behind=((), ()), **seconds):
        seconds = {"time/update": 2.0, "time/step": 4.0} | seconds
        return flops.metrics(make_cfg(), CFG, None, [4, 4], [6, 2], seconds, mesh, chip, behind=behind)

    once, again = metrics(), metrics(behind=([9, 7], [6, 2]))
    more = flops.forward(CFG, [15, 9], [6, 2]) / 1e6
    assert again["perf/update_mfu"] - once["perf/update_mfu"] == pytest.approx(more / 2.0)
    assert again["perf/step_mfu"] - once["perf/step_mfu"] == pytest.approx(more / 4.0)
    assert metrics(**{"time/step": 9.0, "time/eval": 5.0}) == once


def unanchored(*args):
    return flops.update(*args, anchored=False)


def test_what_a_step_did_not_do_is_not_counted(make_cfg):
    """Texts of a teacher are neither sampled nor scored; of a GRPO step no one reads scores. What was sampled is counted
    as one pass over whole rows."""
    mesh, chip = types.SimpleNamespace(size=1, shape={"tp": 1}), flops.Chip(1e6, 1e9, 1e6, 1e6)
    prompts, responses = [5] * 4, [6] * 4
    rows = prompts, responses
    update, once = (count(CFG, [11] * 4, responses) for count in (unanchored, flops.forward))
    for seconds, scored, passes in (
        ({}, False, 0),
        ({"time/rollout": 1.0, "time/score": 1e-6}, False, 1),
        ({"time/rollout": 1.0, "time/score": 1.0}, True, 2),
    ):
        seconds |= {"time/update": 1.0, "time/step": 1.0}
        cfg = make_cfg(**{"num_generations": 1, "anchor.kl_coef": 0.0})
        got = flops.metrics(cfg, CFG, None, *rows, seconds, mesh, chip, scored=scored)
        assert got["perf/step_mfu"] * 1e6 == pytest.approx(update + passes * once)
        assert ("perf/score_mfu" in got, "perf/score_tokens_per_s" in got) == (scored, scored)


def test_decoding_reads_every_expert_that_some_row_chooses():
    moe = dataclasses.replace(CFG, num_experts=8, experts_per_token=2, expert_size=6)
    one = 3 * 3 * 8 * 6  # of an expert, in three layers
    rest = flops.matmul_params(moe)[0] - 2 * one
    assert flops.read_params(moe, 1) == pytest.approx(rest + 2 * one)
    assert flops.read_params(moe, 2) == pytest.approx(rest + (2 + 6 / 4) * one)  # the second's two: a quarter are there
    assert flops.read_params(moe, 64) == pytest.approx(rest + 8 * one)
    assert flops.read_params(CFG, 64) == flops.matmul_params(CFG)[0]
    read = flops.decode_bytes(moe, [1] * 64, [1] * 64, rows_together=64, itemsize=1)
    assert read > rest + 7.9 * one


def test_late_compilations_are_told_with_their_shapes():
    said = []
    with profiling.Recompilations(said.append) as compiled:
        double = jax.jit(lambda x: 2 * x)
        double(jnp.ones(3))
        assert compiled.count and not said
        compiled.step_done(profiling.QUIET_STEPS)
        x5, x6 = jnp.ones(5), jnp.ones(6)
        said.clear()
        double(x5)
        double(x5)
        assert len(said) == 1 and "<lambda>" in said[0] and "float32[5]" in said[0]
        with compiled.expected():
            double(x6)
        assert len(said) == 1
    double(jnp.ones(7))
    assert len(said) == 1


def test_the_profilers_window():
    assert list(profiling.window("5:8")) == [5, 6, 7] and not profiling.window("")
    for wrong in ("5", "8:5", "a:b", "5:", "-1:3"):
        with pytest.raises(UserError, match="profile.steps"):
            profiling.window(wrong)


def test_xprof_opens_the_trace_of_the_steps_asked_for_and_finds_their_phases(tmp_path):
    from xprof.convert import raw_to_tool_data

    cfg = types.SimpleNamespace(profile=types.SimpleNamespace(steps="1:3"), run_dir=tmp_path)
    profiler, timer = profiling.Profiler(cfg), logging.PhaseTimer()
    for t in range(4):
        with profiler.step(t):
            for phase in ("rollout", "update"):
                with timer.phase(phase):
                    jnp.ones(3).sum().block_until_ready()
        assert profiler._on == (t == 1)
    files = [str(f) for f in (tmp_path / "profile").rglob("*.xplane.pb")]
    assert len(files) == 1 and {"trace_viewer@", "overview_page"} <= set(raw_to_tool_data.xspace_to_tool_names(files))
    data, kind = raw_to_tool_data.xspace_to_tool_data(files, "trace_viewer", {})
    spans = [e for e in json.loads(data)["traceEvents"] if e.get("ph") == "X"]
    assert kind == "application/json" and len(spans) < 1000, "Python's own calls are left out"
    for phase in ("rollout", "update"):
        assert sum(e["name"] == phase for e in spans) == 2, phase
    assert [e["name"] for e in spans if e["name"].startswith("step")] == ["step 1", "step 2"]


def test_what_mixes_tokens_is_counted_pair_by_pair():
    """Sliding and full attention by the pairs that see each other; a linear layer by its state and its convolution."""
    n, window = 10, 4
    layered = dataclasses.replace(
        CFG, num_layers=3, layer_kinds=("sliding", "full", "linear"), window=window, linear_key_heads=2,
        linear_value_heads=4, linear_key_dim=6, linear_value_dim=5, conv_width=3,
    )  # fmt: skip
    seen = {"full": 0, "sliding": 0}
    for t in range(n):
        for i in range(t + 1):
            seen["full"] += 1
            seen["sliding"] += t - i < window
    attention = 4 * CFG.num_heads * CFG.head_dim * sum(seen.values())
    reads_and_write = 3 * 2 * 6 * 5 * 4  # of a matrix of 6 x 5 in each of 4 heads
    convolution = 2 * 3 * (2 * 2 * 6 + 4 * 5)
    assert flops.mixing(layered, n) == attention + n * (reads_and_write + convolution)
    narrow = dataclasses.replace(layered, attention_gate=False)
    gate = flops.matmul_params(dataclasses.replace(layered, attention_gate=True))[0] - flops.matmul_params(narrow)[0]
    assert gate == 2 * CFG.hidden_size * CFG.num_heads * CFG.head_dim  # q_proj is as wide again in two layers
