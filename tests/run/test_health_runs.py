"""Health checks on real runs of the small worlds: the default recipes trip none, and each check has a run that trips it."""

import json

import numpy as np
import pytest
import teacher_runs
import tiny
from wire_server import WireServer

from omniopd_jax import hf
from omniopd_jax.run import health

pytestmark = pytest.mark.slow
WORLDS = tiny.REPO / "omniopd_jax" / "world" / "checkpoints"
SMALL = {"num_steps": 2, "prompts_per_step": 32, "log.tensorboard": False, "eval.num_prompts": 0}
LONGER = {"num_steps": 12, "prompts_per_step": 16}  # the checks that compare with the start wait for ten steps
WILD = LONGER | {"objective.name": "constant"}  # pushes all chunks alike; far too fast below


def tripped(rows) -> set[str]:
    return {name for r in rows for name in health.CHECKS if r[f"health/{name}"]}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("world", ["forks", "style"])
def test_a_default_run_trips_no_check(tmp_path, world, seed):
    """As `make demo` on forks and `python -m benchmarks.small_world --method=default` on both have it."""
    values = {"run_dir": str(tmp_path), "data.name": world, "teacher.model": str(WORLDS / world / "teacher")}
    values |= {"seed": seed}
    run = tiny.start(tiny.arguments(values | {"log.tensorboard": False}))
    out, err = run.communicate(timeout=1200)
    rows = tiny.lines(tmp_path / "metrics.jsonl")
    assert run.returncode == 0, err[-2000:]
    assert "health:" not in out and len(rows) == 20 and tripped(rows) == set()


def says(folder, *texts) -> dict:
    """A teacher that says these texts, whatever it is asked."""
    (folder / "teacher.json").write_text(json.dumps({"texts": texts, "probs": [1 / len(texts)] * len(texts)}))
    return {"teacher.provider": "simulated", "teacher.model": str(folder / "teacher.json")}


def certain(folder) -> dict:
    """A random student with logits of hundreds: it is certain of every token."""
    tokenizer = tiny.tokenizer()
    params, cfg = tiny.random_model(len(tokenizer), 3, sharpness=150.0)
    hf.save(folder / "student", params, cfg, tokenizer, dtype="float32")
    return {"student.path": str(folder / "student"), "max_prompt_length": 160, "prompts_per_step": 8}


def large_keys(folder) -> dict:
    """An int8 cache, and a student with two key channels 100 times the others, as real models have large ones.

    The queries there are as much smaller, so in float32 it computes what it did before.
    """
    tokenizer = tiny.tokenizer()
    params, cfg = tiny.random_model(len(tokenizer), 3)
    large = np.ones(cfg.head_dim, np.float32)
    large[[0, cfg.head_dim // 2]] = 100.0  # a pair that RoPE turns together
    norms = {name: params["layers"][name] * scale[None] for name, scale in (("k_norm", large), ("q_norm", 1 / large))}
    hf.save(folder / "student", params | {"layers": params["layers"] | norms}, cfg, tokenizer, dtype="float32")
    small = {"max_prompt_length": 160, "prompts_per_step": 8, "rollout.cache_dtype": "int8"}
    return small | {"student.path": str(folder / "student")}


TRIPS = {  # check -> (the folder of the run -> settings that trip it)
    "teacher_not_sampling": lambda folder: {"teacher.temperature": 0.0},
    "teacher_restarting": lambda folder: says(folder, "Sure, here is the rest: 7", "Okay, let me continue: 3"),
    "weights_without_signal": lambda folder: says(folder, "so the answer is 7"),
    "entropy_collapse": certain,
    "kl_runaway": lambda folder: WILD | {"objective.constant": -1.0, "optimizer.learning_rate": 5e-3},
    "anchor_holds": lambda folder: LONGER
    | {"num_steps": 21, "audit.num_chunks": 1, "audit.chunk_tokens": 4, "anchor.kl_coef": 2.0}
    | {"optimizer.learning_rate": 1e-4},
    "repetition": lambda folder: WILD | {"optimizer.learning_rate": 2e-2},
    "truncation": lambda folder: {"max_completion_length": 16},
    "length_drift": lambda folder: WILD | {"objective.constant": -1.0, "optimizer.learning_rate": 1e-2},
    "few_chunks": lambda folder: {"audit.chunk_tokens": 24, "audit.num_chunks": 4},
    "sampler_gap": large_keys,
    "agreement_alone": lambda folder: says(folder, "so the answer is 7")
    | {"num_steps": 12, "prompts_per_step": 64, "audit.num_chunks": 1, "eval.num_prompts": 64, "eval.every": 6}
    | {"optimizer.learning_rate": 3e-3, "optimizer.schedule": "constant"},
    "no_progress": lambda folder: LONGER
    | {"optimizer.learning_rate": 0.0, "eval.num_prompts": 32, "eval.every": 10},
}  # fmt: skip


@pytest.mark.parametrize("name", TRIPS)
def test_a_run_made_for_it_trips_this_check(runner, tmp_path, name):
    run = runner.begin(tmp_path, SMALL | TRIPS[name](tmp_path)).wait()
    assert run.code == 0, run.err[-2000:]
    assert f"health: {name}: " in run.out and name in tripped(run.metrics()), (tripped(run.metrics()), run.out)


def test_a_budget_that_ends_too_early_is_told_before_it_ends(runner, tmp_path):
    with WireServer() as server:
        settings = teacher_runs.wire(server) | {"num_steps": 40, "budget.calls": 60}
        run = runner.run(tmp_path, settings)
    assert "health: budget_pace: at this pace the 60 calls of budget.calls end at step" in run.out, run.out
    assert 2 <= len(run.metrics()) < 40 and "budget_pace" in tripped(run.metrics())


def test_the_same_student_without_int8_has_no_gap(runner, tmp_path):
    run = runner.begin(tmp_path, SMALL | large_keys(tmp_path) | {"rollout.cache_dtype": ""}).wait()
    assert run.code == 0 and max(row["rollout/score_logp_gap"] for row in run.metrics()) < 1e-4


def test_every_check_has_such_a_run():
    assert {*TRIPS, "budget_pace"} == set(health.CHECKS)


def test_a_teacher_that_echoes_trips_two_checks_within_two_steps(runner, tmp_path):
    run = runner.begin(tmp_path, SMALL | says(tmp_path, "so the answer is 7") | {"prompts_per_step": 64}).wait()
    assert run.code == 0 and tripped(run.metrics()) >= {"weights_without_signal", "teacher_not_sampling"}
