"""Health checks on real runs of the small worlds: the default recipes trip none, a teacher that echoes trips two."""

import json

import pytest
import tiny

from omniopd_jax.run import health

pytestmark = pytest.mark.slow
WORLDS = tiny.REPO / "omniopd_jax" / "world" / "checkpoints"


def train(folder, **values):
    run = tiny.start(tiny.arguments({"run_dir": str(folder), "log.tensorboard": False} | values))
    out, err = run.communicate(timeout=1200)
    assert run.returncode == 0, err[-2000:]
    return out, tiny.lines(folder / "metrics.jsonl")


@pytest.mark.parametrize("world", ["forks", "style"])
def test_a_default_run_trips_no_check(tmp_path, world):
    teacher = WORLDS / world / "teacher"
    out, rows = train(tmp_path / "run", **{"data.name": world, "teacher.model": str(teacher)})
    assert "health:" not in out and len(rows) == 20
    assert {name for r in rows for name in health.CHECKS if r[f"health/{name}"]} == set()


def test_a_teacher_that_echoes_trips_two_checks_within_two_steps(tmp_path):
    spec = tmp_path / "echo.json"
    spec.write_text(json.dumps({"texts": ["so the answer is 7"], "probs": [1.0]}))
    values = {"teacher.provider": "simulated", "teacher.model": str(spec), "num_steps": 2, "eval.num_prompts": 0}
    out, rows = train(tmp_path / "run", **values)
    assert "health: weights_without_signal" in out and "health: teacher_not_sampling" in out
    assert rows[-1]["health/weights_without_signal"] == rows[-1]["health/teacher_not_sampling"] == 1
