"""The loop in process, on tiny random models: what a run writes, and what its settings change."""

import contextlib
import json
import os
import pathlib
import re
import signal
import struct
import types

import jax
import numpy as np
import pytest
import tiny
from rapidfuzz.distance.Levenshtein import distance as edit_distance

from omniopd_jax import config, hf, rollout, train, world
from omniopd_jax.errors import UserError
from omniopd_jax.evaluation import sampling
from omniopd_jax.parallel import sharding
from omniopd_jax.run import checkpoint, cli, health, host, logging, reporting, terminal, validation

METRICS = {
    "step", "loss", "grad_norm", "learning_rate", "entropy", "completions/mean_length", "completions/max_length",
    "completions/truncated_fraction", "completions/repeated_fraction", "audit/k_sem_mean", "audit/pi_hat_mean",
    "audit/pi_bar_mean", "audit/pi_hat_var", "audit/n_eff", "audit/token_fraction", "audit/entropy_at_peak",
    "audit/midband_fraction", "audit/dropped", "audit/similarity_p10", "audit/similarity_p50", "audit/similarity_p90",
    "anchor/kl_ref_to_student_exact", "teacher/calls", "teacher/retries", "teacher/failed", "teacher/latency_p50",
    "teacher/latency_p95", "teacher/tokens_in", "teacher/tokens_out", "teacher/cost_usd", "teacher/cost_usd_total",
    "teacher/cache_hit_rate", "time/rollout", "time/score", "time/teacher_wait", "time/update", "time/step",
}  # fmt: skip
AUDIT = {
    "step",
    "prompt_id",
    "peak",
    "entropy",
    "chunk_entropy",
    "chunk",
    "continuations",
    "similarity",
    "k_sem",
    "pi_bar",
    "pi_hat",
    "weight",
    "latency_s",
    "cost_usd",
}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        yield tiny.on_one_device(patch)


@pytest.fixture
def make(models, tmp_path):
    """make(**{"dotted.key": value}) -> a recipe of two steps."""

    def one(name="run", **more):
        return tiny.recipe(*models, tmp_path / name, **{"prompts_per_step": 8, "num_generations": 1} | more)

    return one


@pytest.fixture(scope="module")
def run(models, tmp_path_factory, one_device):
    """(folder, what `train` returned) of one whole run of three steps, with evaluation and TensorBoard."""
    folder = tmp_path_factory.mktemp("run")
    c = tiny.recipe(*models, folder, **{
        "prompts_per_step": 8, "num_generations": 2, "num_steps": 3, "eval.num_prompts": 8, "eval.every": 2,
        "log.tensorboard": True, "audit.log_per_step": 20,
    })  # fmt: skip
    return folder, train.train(c), c


def params_of(c):
    return checkpoint.restore_params(c.run_dir)[0]


# --- what a run writes
# --------------------------------------------------------------------------------------------------


def test_metrics_have_one_line_a_step_with_the_names_of_the_design(run):
    rows = tiny.lines(run[0] / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2]
    for row in rows:
        assert not METRICS - row.keys()
        assert all(np.isfinite(v) for v in row.values())
    assert rows[0]["anchor/kl_ref_to_student_exact"] == pytest.approx(0, abs=1e-6), (
        "the student starts as the reference"
    )
    assert rows[2]["anchor/kl_ref_to_student_exact"] > 1e-5
    assert rows[0]["rollout/score_logp_gap"] < 1e-4


def test_whole_responses_are_kept_with_what_became_of_their_chunks(run):
    folder, _, c = run
    whole, audits = tiny.lines(folder / "completions.jsonl"), tiny.lines(folder / "audits.jsonl")
    rows = tiny.lines(folder / "metrics.jsonl")
    assert len(whole) == 3 * c.log.completions_per_step
    for row in rows:
        left = c.prompts_per_step * c.num_generations - c.log.completions_per_step
        assert row["completions/log_left_out"] == left and {row[f"health/{name}"] for name in health.CHECKS} <= {0, 1}
    for w in whole:
        own = [a for a in audits if a["sample_id"] == w["sample_id"]]
        assert "".join(w["pieces"]) == w["text"] and len(w["pieces"]) == len(w["entropy"]) == w["tokens"]
        assert {a["peak"] for a in own} == {k["peak"] for k in w["chunks"]}
        for a, k in zip(own, w["chunks"], strict=True):
            assert (a["k_sem"], a["weight"], a["grade"]) == (k["k_sem"], k["weight"], w["grade"])
            assert w["text"].startswith(a["prefix_end"] + a["chunk"])
            assert a["entropy"] == pytest.approx(w["entropy"][a["peak"]], abs=1e-3)


def test_every_metric_is_in_the_page_of_metrics(run):
    page = (tiny.REPO / "docs/metrics.md").read_text().splitlines()
    named = {n for line in page if line.startswith("| `") for n in re.findall(r"`([\w/]+)`", line.split(" | ")[0])}
    for row in tiny.lines(run[0] / "metrics.jsonl"):
        left = {key for key in set(row) - named if not key.startswith("health/")}  # `health/*`: report.md names them
        assert left == set(), "add these to docs/metrics.md"


def test_accuracy_is_measured_before_within_and_after(run):
    folder, summary, _ = run
    assert [("eval/accuracy" in r) for r in tiny.lines(folder / "metrics.jsonl")] == [True, True, True]
    first, second, last = tiny.lines(folder / "metrics.jsonl")
    assert [r["eval/updates"] for r in (first, second, last)] == [0, 2, 3]
    assert first["eval/accuracy"] == first["eval/accuracy_before"] == summary["accuracy_before"]
    assert last["eval/accuracy"] == summary["accuracy_after"]
    assert [r["eval/num_prompts"] for r in tiny.lines(folder / "metrics.jsonl")] == [8, 8, 8]
    answers = tiny.lines(folder / "evaluations.jsonl")
    assert {a["step"] for a in answers} == {0, 2, 3} and len(answers) == 3 * 8
    assert np.mean([a["correct"] for a in answers if a["step"] == 3]) == summary["accuracy_after"]


def test_the_phases_account_for_the_steps_time(run):
    """`time/step` is made of its phases: what no phase holds is time that nobody can explain."""
    for row in tiny.lines(run[0] / "metrics.jsonl"):
        phases = sum(v for k, v in row.items() if k.startswith("time/") and k != "time/step")
        assert row["time/step"] * 0.7 - 0.2 < phases <= row["time/step"] + 0.01


def test_mean_pi_hat_is_that_of_the_mean_k_sem(run):
    """method.md, section 5: with full audits, mean(pi_hat) = (mean(k_sem) + alpha mean(pi_bar)) / (N + alpha)."""
    c = run[2]
    full = [r for r in tiny.lines(run[0] / "metrics.jsonl") if r["audit/n_eff"] == c.audit.num_continuations]
    assert full  # random weights write half a character now and then, which is no continuation
    for row in full:
        expected = (row["audit/k_sem_mean"] + c.prior.alpha * row["audit/pi_bar_mean"]) / (
            c.audit.num_continuations + c.prior.alpha
        )
        assert row["audit/pi_hat_mean"] == pytest.approx(expected, rel=1e-5)


def test_audits_are_logged_with_all_that_they_were_made_of(run):
    folder, _, c = run
    audits, rows = tiny.lines(folder / "audits.jsonl"), tiny.lines(folder / "metrics.jsonl")
    for row in rows:
        own = [a for a in audits if a["step"] == row["step"]]
        assert len(own) == min(20, row["audit/chunks"])
        assert row["audit/log_left_out"] == row["audit/chunks"] + row["audit/dropped"] - len(own)
    assert any(row["audit/log_left_out"] > 0 for row in rows)
    for a in audits:
        assert not AUDIT - a.keys()
        assert len(a["continuations"]) == len(a["similarity"]) == a["n"] <= c.audit.num_continuations
        assert a["k_sem"] == pytest.approx(sum(a["similarity"]), abs=1e-4)
        assert a["pi_hat"] == pytest.approx((a["k_sem"] + a["pi_bar"]) / (a["n"] + 1), abs=1e-4)
        assert 0 <= a["peak"] <= c.max_completion_length - c.audit.chunk_tokens
        assert a["entropy"] <= np.log(tiny.VOCAB) + 1e-4
    assert len({a["sample_id"] for a in audits}) > 20


def test_the_resolved_config_lies_beside_the_run(run):
    folder, _, c = run
    written = json.loads((folder / "config.json").read_text())
    assert {"the training prompts", "the student's folder (student.path)"} <= written.pop("digests").keys()
    assert written == json.loads(json.dumps(c.to_dict()))


def test_the_summary_is_written_and_adds_up(run):
    folder, summary, c = run
    rows = tiny.lines(folder / "metrics.jsonl")
    assert json.loads((folder / "summary.json").read_text()).items() <= summary.items()
    assert summary["exit_code"] == 0
    assert summary["step"] == 3
    for key in ("teacher/calls", "teacher/tokens_in", "teacher/tokens_out"):
        assert summary[key] == sum(r[key] for r in rows)
    assert summary["student_tokens"] == pytest.approx(sum(r["completions/mean_length"] for r in rows) * 16)
    assert summary["time/rollout"] == pytest.approx(sum(r["time/rollout"] for r in rows), rel=1e-3)


def test_checkpoints_are_kept_and_open(run):
    folder, _, c = run
    params, saved = checkpoint.restore_params(folder)
    assert saved["num_steps"] == 3
    start, _ = hf.load(c.student.path)
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), params, start)
    assert all(0 < m < 0.02 for m in jax.tree.leaves(moved)), "every parameter moved, by three steps of 1e-3"
    assert not tiny.same(checkpoint.restore_params(folder, 2)[0], params)
    for missing in (1, 7):
        with pytest.raises(UserError, match=f"no step {missing}; it has"):
            checkpoint.restore_params(folder, missing)


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(UserError, match=r"not a run.*config\.json"):
        checkpoint.restore_params(tmp_path)


def test_tensorboard_holds_the_same_figures(run):
    """The event file, record by record: length, its checksum, an Event, its checksum."""
    from tensorboardX.proto import event_pb2

    scalars = {}
    for path in (run[0] / "tensorboard").glob("events*"):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (size,) = struct.unpack("<Q", raw[at : at + 8])
            event = event_pb2.Event.FromString(raw[at + 12 : at + 12 + size])
            scalars |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            at += 16 + size
    for row in tiny.lines(run[0] / "metrics.jsonl"):
        for key in ("loss", "audit/pi_hat_mean", "teacher/calls"):
            assert scalars[key, row["step"]] == pytest.approx(row[key], rel=1e-5)


@pytest.mark.slow  # tests/test_resume.py compares two runs to the last bit, one of them through a kill
def test_the_same_run_again_is_the_same_to_the_last_bit(make):
    runs = [make(name) for name in ("a", "b")]
    for c in runs:
        train.train(c)
    assert tiny.same(*map(params_of, runs))
    losses = [[r["loss"] for r in tiny.lines(f"{c.run_dir}/metrics.jsonl")] for c in runs]
    assert losses[0] == losses[1]


def test_another_seed_is_another_run(make):
    a, b = make("a", num_steps=1), make("b", num_steps=1, seed=1)
    for c in (a, b):
        train.train(c)
    assert not tiny.same(params_of(a), params_of(b))


# --- settings
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_micro_batches_slots_and_parts_do_not_change_the_result(make):
    """Gradient accumulation carries sums and counts; a step sampled in few slots and scored in parts is the same
    step."""
    more = {"num_generations": 2, "num_steps": 2}
    runs = [
        make("one", **more),
        make("two", micro_batches=2, **more),
        make("pieces", **more, **{"rollout.slots": 5, "rollout.parts": 4}),
    ]
    for c in runs:
        train.train(c)
    base = tiny.lines(f"{runs[0].run_dir}/metrics.jsonl")
    for c in runs[1:]:
        for a, b in zip(tiny.lines(f"{c.run_dir}/metrics.jsonl"), base, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["audit/k_sem_mean"] == pytest.approx(b["audit/k_sem_mean"], rel=1e-5)
        difference = jax.tree.map(
            lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), params_of(c), params_of(runs[0])
        )
        assert max(jax.tree.leaves(difference)) < 1e-4


def test_without_the_anchor_the_reference_does_not_matter(make):
    c = make(**{"anchor.kl_coef": 0.0})
    train.train(c)
    rows = tiny.lines(f"{c.run_dir}/metrics.jsonl")
    assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in rows)


def test_random_chunks_are_other_chunks_and_reproducible(make):
    peaks = {}
    for name, selection in (("peak", "peak"), ("random", "random"), ("again", "random")):
        c = make(name, **{"audit.selection": selection, "num_steps": 1})
        train.train(c)
        peaks[name] = [(a["sample_id"], a["peak"]) for a in tiny.lines(f"{c.run_dir}/audits.jsonl")]
    assert peaks["random"] == peaks["again"]
    assert [s for s, _ in peaks["random"]] == [s for s, _ in peaks["peak"]], "the same responses"
    assert peaks["random"] != peaks["peak"]


def test_responses_shorter_than_a_chunk_are_not_audited(make, monkeypatch):
    """T < C everywhere: no audit, no call, the anchor alone; the run goes on."""
    real = rollout.stream

    def short(*args, **kwargs):
        if isinstance(kwargs["max_new_tokens"], int):  # the student's; the teacher's requests have each their own
            kwargs["max_new_tokens"] = 3
        return real(*args, **kwargs)

    monkeypatch.setattr(rollout, "stream", short)
    c = make()
    train.train(c)
    for row in tiny.lines(f"{c.run_dir}/metrics.jsonl"):
        assert (row["audit/chunks"], row["teacher/calls"], row["audit/token_fraction"]) == (0, 0, 0)
        assert row["completions/max_length"] <= 3
        assert np.isfinite(row["loss"])
    assert tiny.lines(f"{c.run_dir}/audits.jsonl") == []


@pytest.mark.slow  # the peaks of such a row: tests/test_scheduler.py
def test_a_chunk_as_long_as_the_response_is_audited(make):
    c = make(**{"audit.chunk_tokens": 24, "num_steps": 1})
    train.train(c)
    (row,) = tiny.lines(f"{c.run_dir}/metrics.jsonl")
    assert 0 < row["audit/chunks"] <= 8
    assert all(a["peak"] == 0 for a in tiny.lines(f"{c.run_dir}/audits.jsonl"))


def test_a_teacher_with_a_tokenizer_of_its_own_teaches(make, tmp_path):
    """Two tokenizers trained here: the whole loop, continuations cut to the chunk's characters before they are
    compared."""
    tok = tiny.tokenizer(tiny.VOCAB - 40, count=25)
    params, cfg = tiny.random_model(len(tok), 7)
    hf.save(tmp_path / "foreign", params, cfg, tok, dtype="float32")
    c = make(**{"teacher.model": str(tmp_path / "foreign")})
    student = hf.load_tokenizer(c.student.path)
    text = world.corpus("forks", "student", 1, 0)[0][1]
    assert student.get_vocab() != tok.get_vocab() and student(text)["input_ids"] != tok(text)["input_ids"]
    train.train(c)
    rows, audits = (tiny.lines(f"{c.run_dir}/{name}.jsonl") for name in ("metrics", "audits"))
    # a text that is half a character, as its random weights write, is no continuation
    assert len(rows) == 2 and all(r["grad_norm"] > 0 and 2.5 < r["audit/n_eff"] <= 3 for r in rows)
    assert rows[1]["anchor/kl_ref_to_student_exact"] > 1e-6  # the update moved the student
    assert any(len(t) > len(a["chunk"]) for a in audits for t in a["continuations"])  # else nothing had to be cut
    for a in audits:
        near = [
            1 - edit_distance(a["chunk"], t[: len(a["chunk"])]) / max(1, len(a["chunk"])) for t in a["continuations"]
        ]
        assert a["similarity"] == pytest.approx(near, abs=1e-4)


def test_a_prompt_met_twice_in_a_step_gives_two_samples(make, tmp_path):
    """Fewer prompts than rows, or the turn of an epoch: the same prompt again must be a fresh sample (method.md, 5)."""
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(3)))
    file = {"data.source": "jsonl", "data.name": "", "data.path": str(tmp_path / "p.jsonl"), "data.num_prompts": 0}
    c = make(num_steps=1, **file)
    train.train(c)
    audits = tiny.lines(f"{c.run_dir}/audits.jsonl")
    asked = [(a["sample_id"], a["peak"]) for a in audits]
    assert len(audits) > 8
    assert len(set(asked)) == len(asked), "two responses share their sample id, and with it every random draw"
    assert len({a["chunk"] for a in audits}) > 8


@pytest.mark.slow  # the quick part: a step and decoding over eight devices (test_step.py), a run of two processes
@pytest.mark.parametrize("mesh", [{"data": 1, "fsdp": 4, "tp": 2}, {"data": 2, "fsdp": 4, "tp": 1}], ids=str)
def test_a_mesh_of_eight_devices_gives_the_run_of_one(make, monkeypatch, one_device, mesh):
    alone, many = make("alone"), make("many", **{f"mesh.{k}": v for k, v in mesh.items()})
    train.train(alone)
    monkeypatch.setattr(sharding, "make_mesh", one_device)
    train.train(many)
    for a, b in zip(*(tiny.lines(f"{c.run_dir}/metrics.jsonl") for c in (alone, many)), strict=True):
        for key in ("loss", "grad_norm", "audit/k_sem_mean", "entropy"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key


@pytest.mark.slow
def test_a_step_whose_prompts_do_not_divide_over_the_devices(make, monkeypatch, one_device):
    """8 devices, 4 prompts x 2: the rows divide, the prompts alone do not. Either it runs, or it says so before
    compiling."""
    monkeypatch.setattr(sharding, "make_mesh", one_device)
    c = make(prompts_per_step=4, num_generations=2, num_steps=1)
    try:
        train.train(c)
    except UserError as error:
        assert "prompts_per_step" in str(error)  # noqa: PT017
    else:
        assert len(tiny.lines(f"{c.run_dir}/metrics.jsonl")) == 1


def test_zero_steps_evaluate_and_end(make, models, tmp_path, capsys):
    jinja = tmp_path / "student.jinja"
    jinja.write_text(hf.load_tokenizer(models[0]).chat_template)
    c = make(num_steps=0, **{"eval.num_prompts": 8, "student.template": str(jinja)})
    out = train.train(c)
    kept = json.loads(pathlib.Path(c.run_dir, "config.json").read_text())
    assert kept["student_template"] == jinja.read_text(), "an export needs it when the file has gone"
    said = "evaluated on 8 held-out prompts (eval.num_prompts = 8; 0 duplicates and 0 overlong left out)"
    assert said in capsys.readouterr().out
    assert (out["step"], out["accuracy_before"]) == (0, out["accuracy_after"])
    out = train.train(make(num_steps=0, **{"eval.num_prompts": 8, "eval.before": False}))
    assert out["accuracy_before"] is None and 0 <= out["accuracy_after"] <= 1


def test_a_run_in_the_same_folder_with_other_prompts_is_refused(make):
    train.train(make(num_steps=1))
    for key, value in (("seed", 5), ("data.num_prompts", 16)):
        with pytest.raises(UserError, match=f"other settings.*{key}"):
            train.train(make(num_steps=2, **{key: value}))


# --- what goes wrong
# ----------------------------------------------------------------------------------------------------


def steps_saved(c) -> list[str]:
    return sorted(p.name for p in pathlib.Path(c.run_dir, "checkpoints").iterdir() if p.name.isdigit())


def test_poisoned_parameters_raise_and_are_not_saved(make, models, tmp_path, capsys):
    params, cfg = hf.load(models[0])
    params["layers"]["down"] = params["layers"]["down"].at[0, 0, 0].set(np.nan)
    hf.save(tmp_path / "poisoned", params, cfg, hf.load_tokenizer(models[0]), dtype="float32")
    c = make(**{"student.path": str(tmp_path / "poisoned"), "checkpoint.every": 1})
    with pytest.raises(FloatingPointError):
        train.train(c)
    assert steps_saved(c) == []
    assert cli._guarded(lambda argv: train.train(c)["exit_code"], []) == 2, "as of every error of the user's to act on"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "diverged" in line and "optimizer.learning_rate" in line


def test_a_step_that_turns_to_nan_raises_and_keeps_the_last_good_checkpoint(make):
    """A learning rate that throws the parameters away: the second step is not finite, and only the first is there."""
    c = make(num_steps=4, **{"optimizer.learning_rate": 1e30, "checkpoint.every": 1, "optimizer.max_grad_norm": 0.0})
    with pytest.raises(FloatingPointError):
        train.train(c)
    assert steps_saved(c) in ([], ["1"])
    if steps_saved(c):
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(params_of(c))), "what was saved can be used"


def test_a_signal_during_an_evaluation_does_not_lose_the_step(make, monkeypatch):
    """SIGTERM while the model is being evaluated mid-run: the finished step is in the metrics and in a checkpoint."""
    c = make(num_steps=4, **{"eval.num_prompts": 8, "eval.every": 1, "checkpoint.every": 10})
    real, calls = sampling.greedy, []

    def greedy(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # the first is the one before training
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(sampling, "greedy", greedy)
    out = train.train(c)
    assert out["exit_code"] == 75
    assert steps_saved(c) == [str(out["step"])]
    assert len(tiny.lines(f"{c.run_dir}/metrics.jsonl")) == out["step"]


# --- the files on their own
# ---------------------------------------------------------------------------------------------


def test_lines_of_steps_that_come_again_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s}) + "\n" for s in range(5)) + '{"step": 5, "lo')
    logging.cut_after(path, 3)
    assert [r["step"] for r in tiny.lines(path)] == [0, 1, 2]


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "a\x1cb", "日本 😀", "a\nb"], ids=ascii)
def test_a_resumed_run_keeps_the_audits_of_any_text(tmp_path, text):
    """A continuation may hold any character: U+2028 ends a line for `str.splitlines`, not in a JSON Lines file."""
    writer = logging.Writer(tmp_path, start_step=0, tensorboard=False)
    writer.audits([{"step": 0, "chunk": text}, {"step": 1, "chunk": text}])
    writer.close()
    logging.Writer(tmp_path, start_step=1, tensorboard=False).close()
    assert tiny.lines(tmp_path / "audits.jsonl") == [{"step": 0, "chunk": text}]


def test_a_line_cut_inside_a_character_is_dropped(tmp_path):
    path = tmp_path / "audits.jsonl"
    path.write_bytes(b'{"step": 0, "chunk": "a"}\n' + '{"step": 1, "chunk": "日'.encode()[:-1])
    logging.cut_after(path, 5)
    assert [r["step"] for r in tiny.lines(path)] == [0]


def test_half_a_surrogate_pair_in_a_continuation_can_be_logged(tmp_path):
    """A provider's JSON may hold one; Python keeps it, UTF-8 does not."""
    writer = logging.Writer(tmp_path, start_step=0, tensorboard=False)
    writer.audits([{"step": 0, "chunk": json.loads('"x \\ud83d"')}])
    writer.close()
    assert tiny.lines(tmp_path / "audits.jsonl")[0]["step"] == 0


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    progress = terminal.Progress(3, 0, terminal=False)
    progress.step(1, {"loss": 0.25, "entropy": 1.5, "time/step": 2.0})
    progress.close()
    out = capsys.readouterr().out
    assert out == "step 1/3  left ?  loss 0.25  H 1.5  2.0 s\n"


def test_repeated_ngrams():
    assert sampling.repeated_ngrams([1, 2, 3]) == 0
    assert sampling.repeated_ngrams(list(range(20))) == 0
    assert sampling.repeated_ngrams([7] * 20) == pytest.approx(16 / 17)


def test_the_phase_timer_adds_up():
    timer = logging.PhaseTimer()
    timer.add("a", 1.0)
    timer.add("a", 2.0)
    assert timer.take()["time/a"] == 3.0
    assert "time/a" not in timer.take()
    assert timer.total["a"] == 3.0


def test_a_config_of_a_run_is_a_valid_recipe(run):
    """What lies beside a run can be loaded back, key by key."""
    saved = json.loads((run[0] / "config.json").read_text())
    assert saved.pop("digests")
    c = config.default()
    c.update(saved)
    validation.validate(c)
    assert config.flat(c) == config.flat(run[2])


def test_a_run_without_steps_is_evaluated_once(monkeypatch):
    c = config.default()
    c.num_steps, asked, told = 0, [], []
    run = types.SimpleNamespace(cfg=c, held_out=True, carried={}, stop=host.StopFlag(), timer=logging.PhaseTimer(),
                                compiled=contextlib.nullcontext())  # fmt: skip
    reports = types.SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(train.setup, "first_state", lambda *_: (types.SimpleNamespace(step=np.int32(0)), {}))
    monkeypatch.setattr(train.reporting, "Reports", lambda *_, **__: contextlib.nullcontext(reports))
    monkeypatch.setattr(train.best, "watched", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(train, "loop", lambda run, state, *_: state)
    monkeypatch.setattr(train, "evaluate", lambda *_: asked.append("evaluated") or 0.25)
    monkeypatch.setattr(train.reporting, "summary", lambda run, step, totals, after: told.append(after) or {})
    train.run_steps(run, None)
    assert asked == ["evaluated"] and told == [0.25]


def test_the_table_counts_evaluations_once_and_of_all_starts(tmp_path, monkeypatch):
    c = config.default()
    c.run_dir, said = str(tmp_path), []
    run = types.SimpleNamespace(cfg=c, teacher=None, disks=[0], timer=logging.PhaseTimer())
    totals = {"time/rollout": 2.0, "time/eval": 7.0, "time/step": 9.0}  # of the checkpoint
    run.timer.add("eval", 3.0)
    train.count_evaluation(run, totals)
    monkeypatch.setattr(reporting.terminal, "say", said.append)
    c.run_dir = str(tmp_path / "my runs")
    (tmp_path / "my runs").mkdir()
    reporting.summary(run, 1, totals, None)
    assert [line.split() for line in said[0].splitlines() if line.startswith("time, e")] == [
        ["time,", "evaluation", "10.0", "s"]
    ]
    assert said[1] == f"see it: python -m omniopd_jax.report '{c.run_dir}'"


def test_solutions_that_never_came_do_not_dilute_what_repeats():
    rows = types.SimpleNamespace(tokens=[[1] * 5, [], [], []])
    assert (
        reporting.repeated_fraction(rows) == 0.5
        and reporting.repeated_fraction(types.SimpleNamespace(tokens=[[]])) == 0
    )
