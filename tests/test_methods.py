"""What holds for every way to learn: exact resume, packed rows, eight devices, LoRA, failed calls, caps, offline replay.

Whole runs in process on tiny random models. The equations of each are in tests of their own.
"""

import json

import jax
import numpy as np
import pytest
import tiny
from methods import METHODS
from wire_server import WireServer

from omniopd_jax import graders, teachers, train, world
from omniopd_jax.errors import TeacherStopped
from omniopd_jax.graders import small_world as world_grader
from omniopd_jax.parallel import sharding
from omniopd_jax.run import checkpoint
from omniopd_jax.teachers import Provider
from omniopd_jax.teachers.simulated import SimulatedTeacher

KEYS = ("loss", "grad_norm", "completions/mean_length")
slow = pytest.mark.slow


def of(names):
    """The first of them by default, the others slow."""
    return [pytest.param(n, marks=() if i == 0 else slow) for i, n in enumerate(names)]


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """One device, unless a test appends another count."""
    count, real = [1], sharding.make_mesh
    monkeypatch.setattr(
        sharding, "make_mesh", lambda sizes, devices=None: real(sizes, devices or jax.devices()[: count[-1]])
    )
    return count


def run(models, folder, method: str, **more) -> list[dict]:
    """Trains and returns the steps' metrics."""
    c = tiny.recipe(
        *models, folder, **{"prompts_per_step": 8, "num_steps": 2, "checkpoint.every": 1} | METHODS[method] | more
    )
    assert train.train(c)["exit_code"] == 0
    return tiny.lines(folder / "metrics.jsonl")


def params(folder):
    return checkpoint.restore_params(folder)[0]


def close(a: list[dict], b: list[dict], rtol=1e-4) -> None:
    for key in KEYS:
        np.testing.assert_allclose([r[key] for r in a], [r[key] for r in b], rtol=rtol, err_msg=key)


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """whole(method) -> (steps, folder) of a run that nobody stopped, once for all tests."""
    done = {}

    def one(method):
        if method not in done:
            folder = tmp_path_factory.mktemp(method) / "run"
            done[method] = (run(models, folder, method), folder)
        return done[method]

    return one


@slow  # by default tests/test_resume.py and model/test_lora.py
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_in_the_same_bits(models, tmp_path, whole, method):
    steps, folder = whole(method)
    assert len(run(models, tmp_path / "run", method, num_steps=1)) == 1
    again = run(models, tmp_path / "run", method)
    assert [[r[k] for k in KEYS] for r in again] == [[r[k] for k in KEYS] for r in steps]
    assert tiny.same(params(tmp_path / "run"), params(folder))
    assert all(r["grad_norm"] > 0 and r["teacher/calls"] > 0 for r in steps)


@pytest.mark.parametrize("method", of(["ema", "continuation", "context", "peak", "mix"]))
def test_packed_rows_and_micro_batches_change_nothing(models, tmp_path, whole, method):
    close(run(models, tmp_path / "run", method, **{"packing.length": 256, "micro_batches": 2}), whole(method)[0])


@slow
@pytest.mark.parametrize("method", METHODS)
def test_eight_devices_are_one(models, tmp_path, whole, devices, method):
    devices.append(8)
    more = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tp": 2}
    close(run(models, tmp_path / "run", method, **more), whole(method)[0], rtol=1e-3)


@slow
@pytest.mark.parametrize("method", ["ema", "continuation", "context", "mix"])
def test_adapters_learn_and_the_base_stays(models, tmp_path, method):
    more = {"lora.rank": 2, "lora.alpha": 4.0, "optimizer.learning_rate": 1e-2}
    steps = run(models, tmp_path / "run", method, **more)
    assert all(r["grad_norm"] > 0 for r in steps)
    assert set(params(tmp_path / "run")) == {"layers"}
    assert [r["loss"] for r in steps] != [steps[0]["loss"]] * 2


class Failing(SimulatedTeacher):
    """Every third request of a kind fails for good; the others say a few words and end."""

    def __init__(self):
        self.asked, self.failed = [], []
        super().__init__(["so it is 3.", "that makes 12 apples"], [0.5, 0.5], fails=self._fails_now)

    def _fails_now(self, request, index):
        self.asked.append(request)
        bad = len(self.asked) % 3 == 0
        self.failed += [request] if bad else []
        return bad


@pytest.mark.parametrize("method", ["continuation", "context"])
def test_a_failed_call_leaves_its_row_out_and_is_counted(models, tmp_path, monkeypatch, method):
    teacher = Failing()
    monkeypatch.setitem(teachers.TEACHERS, "failing", Provider(lambda cfg: teacher))
    (step,) = run(models, tmp_path / "run", method, num_steps=1, **{"teacher.provider": "failing"})
    assert teacher.failed and step["teacher/failed"] == len(teacher.failed)
    if method == "continuation":
        assert step["continuation/failed"] == len(teacher.failed)
        assert all(r.peak >= 0 and r.indices == (0,) and r.max_tokens == 10 for r in teacher.asked)
        peaks = {}
        for r in teacher.asked:
            peaks.setdefault(r.sample_id, []).append(r.peak)
        assert all(p == sorted(set(p)) and len(p) <= 2 for p in peaks.values()), "ascending, for a prefix cache"
        assert max(map(len, peaks.values())) == 2
        told = [c for r in tiny.lines(tmp_path / "run" / "completions.jsonl") for c in r.get("continued", ())]
        assert told and all(c["text"] in ("so it is 3.", "that makes 12 apples") and c["cut"] >= 0 for c in told)
    else:
        assert step["context/left_out"] == 2 * len(teacher.failed)
        assert all(r.peak == -1 and r.indices == (0,) and r.prefix == "" for r in teacher.asked)
        assert len(teacher.asked) == 8, "one solution a prompt"
    assert np.isfinite(step["loss"]) and step["grad_norm"] > 0


def wire(server, **more) -> dict:
    return {
        "teacher.provider": "openai", "teacher.model": "m", "teacher.base_url": server.url("openai"), "num_steps": 2,
        "teacher.continuation": "continue_final_message", "teacher.timeout_s": 3.0, "teacher.deadline_s": 40.0,
        "prompts_per_step": 4,
    } | more  # fmt: skip


@pytest.mark.parametrize("method", of(["continuation", "context"]))
def test_a_service_is_replayed_offline_and_a_cap_is_never_overshot(models, tmp_path, method):
    """Foreign tokenizer (none is named), a journal, a cap on calls that ends a run, and the whole run from the journal."""
    with WireServer() as server:
        whole = run(models, tmp_path / "run", method, **wire(server))
        calls = len(server.calls())
        assert calls > 4
        capped = tiny.recipe(
            *models,
            tmp_path / "capped",
            **METHODS[method] | wire(server, **{"budget.calls": 9, "teacher.max_retries": 0}),
        )
        with pytest.raises(TeacherStopped, match="budget.calls"):
            train.train(capped)
        assert len(server.calls()) - calls <= 9
    offline = wire(server, **{"teacher.replay": "only", "teacher.journal": str(tmp_path / "run" / "journal")})
    again = run(models, tmp_path / "again", method, **offline)
    assert [r["loss"] for r in again] == [r["loss"] for r in whole]
    assert tiny.same(params(tmp_path / "run"), params(tmp_path / "again"))
    assert sum(r["teacher/calls"] for r in again) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == 2


class Shut(world_grader.WorldGrader):
    """Right where the answer is an odd number: the simulated teacher's texts say nothing."""

    def grade(self, text, answer):
        return int(answer) % 2 == 1


@pytest.mark.parametrize("name", of(["omniopd", "continuation"]))
def test_prompts_that_the_gate_closes_are_not_bought_further(models, tmp_path, monkeypatch, name):
    asked = []

    class Counting(SimulatedTeacher):
        async def continue_text(self, request):
            asked.append(request)
            return await super().continue_text(request)

    monkeypatch.setitem(teachers.TEACHERS, "counting", Provider(lambda cfg: Counting(["a b c d", "so"], [0.5, 0.5])))
    monkeypatch.setitem(graders.GRADERS, "odd", Shut)
    more = {"teacher.provider": "counting", "reward.grader": "odd", "audit.gate": "graded", "audit.gate_attempts": 2}
    (step,) = run(models, tmp_path / "run", "continuation", num_steps=1, **more | {"objective.name": name})
    first = [r for r in asked if r.peak < 0]
    assert len(first) == 8 and all(r.indices == (0, 1) for r in first)
    problems = {p.prompt: p.answer for p in world.problems("forks", "train", 24)}
    answer = [int(problems[r.messages[-1]["content"]]) for r in asked]
    odd = {r.messages[-1]["content"] for r, a in zip(asked, answer) if a % 2 == 1}
    further = {r.messages[-1]["content"] for r in asked if r.peak >= 0}
    assert further and further <= odd and 0 < len(odd) < 8
    assert step["gate/closed_fraction"] == 1 - len(odd) / 8 and step["gate/accuracy"] == len(odd) / 8
    assert step["grad_norm"] > 0
    if name == "continuation":  # rows of closed prompts are not among those that had no place to cut
        rows = len(odd) * 2 * METHODS[name]["continuation.cuts"]
        assert step["continuation/uncut"] == rows - sum(r.peak >= 0 for r in asked)
