"""The best checkpoint, early stops, several evaluation sets, and runs that start from another's weights."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from omniopd_jax import config, export, hf, train
from omniopd_jax.errors import UserError
from omniopd_jax.evaluation import runner, sampling
from omniopd_jax.run import best, checkpoint, validation
from omniopd_jax.run.state import TrainState


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    tiny.on_one_device(monkeypatch)


def watch(values, **more):
    """(what `take` said after each value, the totals), without a checkpoint to keep."""
    c = config.default()
    c.update_from_flattened_dict(more)
    kept, said = best.Best(c, totals := {}), []
    for i, value in enumerate(values):
        said.append(kept.take(types.SimpleNamespace(step=np.int32(i)), {"eval/accuracy": value}))
        if said[-1]:
            break
    return said, totals


def test_patience_counts_evaluations_without_a_new_best():
    said, totals = watch([0.1, 0.3, 0.2, 0.3, 0.4], **{"eval.patience": 2})
    assert said[:3] == ["", "", ""] and "has not risen above 0.3 for 2 evaluations" in said[3] and len(said) == 4
    assert (totals[best.BEST], totals[best.STEP], totals[best.LAST]) == (0.3, 1, 0.3) and totals[best.STOPPED] == said[
        3
    ]
    assert watch([0.1, 0.3, 0.2, 0.4, 0.2], **{"eval.patience": 2})[0] == [""] * 5


def test_a_run_ends_where_it_falls_below_but_not_before_its_first_step():
    said, totals = watch([0.02, 0.3, 0.04, 0.9], **{"eval.stop_below": 0.05})
    assert said[:2] == ["", ""] and "eval/accuracy = 0.04 is below eval.stop_below = 0.05" in said[2]
    assert totals[best.BEST] == 0.3


def test_a_run_that_had_ended_early_goes_on_where_it_would_not_end_now():
    _, waited = watch([0.1, 0.3, 0.2, 0.2], **{"eval.patience": 2})
    _, fell = watch([0.3, 0.04], **{"eval.stop_below": 0.05})
    for totals, key, values in ((waited, "patience", {2: True, 3: False, 0: False}),
                                (fell, "stop_below", {0.05: True, 0.03: False, 0.0: False})):  # fmt: skip
        for value, ended in values.items():
            c, own = config.default(), dict(totals)
            c.eval[key] = value
            best.Best(c, own)
            assert [name in own for name in (best.STOPPED, best.LAST, best.VALUE)] == [ended] * 3, (key, value)


def test_values_of_two_metrics_are_not_compared():
    _, totals = watch([0.1, 0.9])
    best.Best(config.default(), same := dict(totals))
    assert same[best.BEST] == 0.9
    best.Best(config.default(), other := totals | {best.METRIC: "eval/accuracy/world:slips:test"})
    assert not {best.BEST, best.STEP, best.WAITED} & other.keys()


def test_the_best_that_the_last_evaluation_found_is_known_where_the_run_goes_on(tmp_path):
    """It comes after the last checkpoint, whose totals lack it."""
    c = config.default()
    c.run_dir, c.checkpoint.best_metric = str(tmp_path), "eval/accuracy"
    (tmp_path / "config.json").write_text("{}")
    ended = TrainState({"w": jnp.ones(2)}, {"m": jnp.ones(2)}, jnp.int32(2), jax.random.key(0))
    with best.watched(c, {}, 2) as kept:
        kept.take(ended, {"eval/accuracy": 0.7})
    for start, found in ((2, 0.7), (1, None)):  # from step 1 on it is evaluated again
        with best.watched(c, totals := {best.BEST: 0.1, best.STEP: 0} if start == 2 else {}, start):
            assert (totals.get(best.BEST), totals.get(best.STEP)) == (found, found and 2)


def test_the_best_of_another_way_that_the_run_took_is_replaced(tmp_path):
    """Killed behind step 3 and gone on from step 2 with something changed: what RUN/best has of step 3 is not its."""
    c = config.default()
    c.run_dir, c.checkpoint.best_metric = str(tmp_path), "eval/accuracy"
    (tmp_path / "config.json").write_text("{}")
    for weight, value in ((1.0, 0.9), (2.0, 0.6), (2.0, 0.6)):
        at_3 = TrainState({"w": jnp.ones(2) * weight}, {"m": jnp.ones(2)}, jnp.int32(3), jax.random.key(0))
        with best.watched(c, totals := {best.BEST: 0.1, best.STEP: 1}, 2) as kept:
            kept.take(at_3, {"eval/accuracy": value})
        saved = checkpoint.saved_params(tmp_path / best.FOLDER)
        assert saved.step == 3 and totals[best.BEST] == value
        assert checkpoint.read_params(saved)["w"].tolist() == [weight] * 2


GREEDY = sampling.greedy


def scripted(monkeypatch, values):
    """Evaluations in the order in which they are made, whatever the model says."""
    left = list(values)
    monkeypatch.setattr(sampling, "greedy", lambda *a, **k: dataclasses.replace(GREEDY(*a, **k), accuracy=left.pop(0)))
    return left


def recipe(models, folder, **more):
    settings = {
        "num_steps": 6, "checkpoint.every": 1, "checkpoint.keep": 1, "eval.num_prompts": 4, "eval.every": 1,
        "checkpoint.best_metric": "eval/accuracy", "eval.patience": 3, "prompts_per_step": 4, "num_generations": 1,
    }  # fmt: skip
    return tiny.recipe(*models, folder, **settings | more)


SCRIPT = [0.1, 0.2, 0.5, 0.4, 0.3, 0.2]  # before, then after steps 1 to 5: the best is step 2, the end step 5


def test_the_best_is_kept_through_a_crash_and_the_run_ends_at_the_same_step(models, tmp_path, monkeypatch):
    """A crash between two steps loses nothing: best, patience and parameters are those of a run without it."""
    scripted(monkeypatch, SCRIPT)
    out = train.train(recipe(models, tmp_path / "whole"))
    assert out["step"] == 5 and "has not risen above 0.5" in out["stopped_early"]
    assert (out["accuracy_before"], out["accuracy_after"]) == (0.1, 0.2)

    left, real = scripted(monkeypatch, SCRIPT), train.begin
    with monkeypatch.context() as patch:
        patch.setattr(train, "begin", lambda run, state, t: real(run, state, t) if t < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(recipe(models, tmp_path / "run"))
    assert left == SCRIPT[4:]
    again = train.train(recipe(models, tmp_path / "run"))
    assert {k: again[k] for k in (best.BEST, best.STEP, best.WAITED, "step")} == {
        k: out[k] for k in (best.BEST, best.STEP, best.WAITED, "step")
    }
    for name in ("", best.FOLDER):
        a, b = (checkpoint.saved_params(tmp_path / run / name) for run in ("whole", "run"))
        assert a.step == b.step == (2 if name else 5)
        assert tiny.same(checkpoint.read_params(a), checkpoint.read_params(b))

    assert train.train(recipe(models, tmp_path / "run"))["step"] == 5, "a run that has ended early stays at its end"
    export.export(tmp_path / "run" / "best", tmp_path / "out", dtype="float32")
    exported, _ = hf.load(tmp_path / "out")
    assert tiny.same(exported, checkpoint.restore_params(tmp_path / "run" / "best")[0])
    student = runner.load_student(recipe(models, tmp_path / "x"), str(tmp_path / "run" / "best"))
    assert student.source == f"{tmp_path}/run/best/checkpoints/2"


def test_a_signal_where_an_evaluation_is_due_costs_none_and_no_answer_is_written_twice(models, tmp_path, monkeypatch):
    """Stopped in the step after which it was to be evaluated, and killed before the first checkpoint."""
    scripted(monkeypatch, SCRIPT)
    out = train.train(recipe(models, tmp_path / "whole"))
    real, left = train.begin, scripted(monkeypatch, SCRIPT[:1] + SCRIPT)

    def signalled(run, state, t):
        run.stop.requested = "SIGTERM" if t == 2 else None
        return real(run, state, t)

    with monkeypatch.context() as patch:
        patch.setattr(train, "begin", lambda run, state, t: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(recipe(models, tmp_path / "run"))
        patch.setattr(train, "begin", signalled)
        assert train.train(recipe(models, tmp_path / "run"))["exit_code"] == 75 and left == SCRIPT[3:]
    again = train.train(recipe(models, tmp_path / "run"))
    assert left == [] and {k: again[k] for k in out if "best" in k or "accuracy" in k} == {
        k: out[k] for k in out if "best" in k or "accuracy" in k
    }
    told, answers = {}, {}
    for name in ("whole", "run"):
        rows = tiny.lines(tmp_path / name / "metrics.jsonl")
        told[name] = [{k: v for k, v in r.items() if k.startswith("eval/")} for r in rows]
        answers[name] = [(a["step"], a["prompt_id"]) for a in tiny.lines(tmp_path / name / "evaluations.jsonl")]
        assert len(set(answers[name])) == len(answers[name])
    assert told["run"] == told["whole"] and answers["run"] == answers["whole"]
    assert [r["eval/updates"] for r in told["run"]] == [1, 2, 3, 4, 5]


def test_a_run_that_has_ended_evaluates_again_and_a_longer_one_keeps_the_better_best(models, tmp_path, monkeypatch):
    more = {"num_steps": 2, "eval.patience": 0, "resume.allow": ("num_steps",)}
    scripted(monkeypatch, [0.1, 0.2, 0.9, 0.9])
    for _ in range(2):
        assert train.train(recipe(models, tmp_path / "run", **more))["accuracy_after"] == 0.9
    answers = [(a["step"], a["prompt_id"]) for a in tiny.lines(tmp_path / "run" / "evaluations.jsonl")]
    assert len(set(answers)) == len(answers)
    assert len(answers) == 3 * 4
    left = scripted(monkeypatch, [0.9, 0.6, 0.5])
    out = train.train(recipe(models, tmp_path / "run", **more | {"num_steps": 4}))
    assert left == [] and (out[best.BEST], out[best.STEP]) == (0.9, 2)
    assert checkpoint.saved_params(tmp_path / "run" / "best").step == 2


def test_several_sets_are_evaluated_beside_the_held_out_prompts(models, tmp_path, monkeypatch):
    more = {"eval.sets": ("world:slips:test", "world:forks:validation"), "num_steps": 2, "eval.patience": 0}
    scripted(monkeypatch, [0.1, 0.2, 0.3] * 3)
    c = recipe(models, tmp_path / "run", **more | {"checkpoint.best_metric": "eval/accuracy/world:slips:test"})
    assert train.train(c)[best.BEST] == 0.2
    rows = tiny.lines(tmp_path / "run" / "metrics.jsonl")
    names = ["eval/accuracy", "eval/accuracy/world:slips:test", "eval/accuracy/world:forks:validation"]
    assert [rows[-1][n] for n in names] == [0.1, 0.2, 0.3]
    with pytest.raises(UserError, match="holds a run with other settings.*eval.sets"):
        train.train(recipe(models, tmp_path / "run", **more | {"eval.sets": ("world:slips:test",)}))


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on_from_anothers_weights_and_the_anchor_stays_at_its_student(models, tmp_path, rank):
    """From a run (adapters go on as adapters), and from its export: at rate 0 what is trained is what was there."""
    lora = {"lora.rank": rank, "lora.alpha": 4.0, "optimizer.learning_rate": 0.02}
    plain = {"eval.num_prompts": 0, "eval.every": 0, "checkpoint.best_metric": "", "eval.patience": 0, "num_steps": 1}
    train.train(recipe(models, tmp_path / "first", **plain | lora))
    on = plain | lora | {"optimizer.learning_rate": 0.0}
    sources = [("run", tmp_path / "first", on)]
    if not rank:
        export.export(tmp_path / "first", tmp_path / "out", dtype="float32")
        sources += [("export", tmp_path / "out", on), ("step", tmp_path / "first" / "checkpoints" / "1", on)]
    for name, start, settings in sources:
        train.train(recipe(models, tmp_path / name, **settings | {"student.start": str(start)}))
        first, then = (checkpoint.restore_params(tmp_path / n)[0] for n in ("first", name))
        assert tiny.same(first, then)
        (row,) = tiny.lines(tmp_path / name / "metrics.jsonl")
        assert row["anchor/kl_ref_to_student_exact"] > 1e-4, "the reference is student.path, not where the run starts"


REFUSED = {
    "best of nothing": ({"eval.num_prompts": 0, "eval.every": 0, "eval.patience": 0}, "set eval.num_prompts"),
    "patience without evaluations": ({"eval.every": 0}, "eval.patience = 3 needs evaluations during the run"),
    "no such run": ({"student.start": "/nowhere"}, "/nowhere"),
    "a metric of no evaluation": (
        {"checkpoint.best_metric": "eval/acuracy"},
        "must be eval/accuracy, or eval/accuracy/",
    ),
    "a set that is not evaluated": (
        {"checkpoint.best_metric": "eval/accuracy/gsm", "eval.sets": ("world:slips:test",)},
        "choose one of: eval/accuracy, eval/accuracy/world:slips:test",
    ),
    "a floor above the rate": ({"optimizer.min_learning_rate": 1.0}, "min_learning_rate = 1 is above"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_can_not_be_are_one_line(models, tmp_path, case):
    more, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        train.train(recipe(models, tmp_path / "run", **more))


@pytest.mark.slow
def test_adapters_go_on_with_the_same_alone(models, tmp_path):
    plain = {"eval.num_prompts": 0, "eval.every": 0, "checkpoint.best_metric": "", "eval.patience": 0, "num_steps": 1}
    train.train(recipe(models, tmp_path / "first", **plain | {"lora.rank": 2}))
    c = recipe(models, tmp_path / "run", **plain | {"lora.rank": 3, "student.start": str(tmp_path / "first")})
    validation.validate(c)
    with pytest.raises(UserError, match="has lora.rank = 2.*adapters go on with the same"):
        train.train(c)
