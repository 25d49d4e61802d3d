"""Each health check: a run made small on purpose that trips it and nothing else, and its nearest healthy neighbour."""

import pytest
import report_runs as runs

from omniopd_jax.run import health

STEPS = range(20)
HELD = {"audit/token_fraction": 0.13, "anchor/kl_ref_to_student_exact": lambda t: 0.0004 * t}
PUBLISHED = {"audit.num_chunks": 10, "audit.chunk_tokens": 50}


def rows(**changed):
    """20 steps; a changed value may be a function of the step. Evaluations are of 64 prompts."""
    changed = {"eval/num_prompts": 64} | changed if "eval/accuracy" in changed else changed
    return [runs.row(t, **{k: v(t) if callable(v) else v for k, v in changed.items()}) for t in STEPS]


def audits(**changed):
    places = [(t, i) for t in STEPS for i in range(32)]
    return [runs.audit(t, i, **{k: v(t, i) if callable(v) else v for k, v in changed.items()}) for t, i in places]


def test_a_healthy_run_trips_nothing():
    assert runs.checks() == set()


def test_an_empty_window_and_missing_metrics_are_no_findings():
    assert health.check([], [], [], runs.flat()) == []
    assert health.check([{"step": t, "loss": 0.0} for t in STEPS], [], [], {}) == []
    nan = rows(**{"completions/truncated_fraction": float("nan"), "entropy": None})
    assert runs.checks(nan) == set()


TRIPS = {  # check -> (run that trips it alone, the nearest one that does not)
    "teacher_not_sampling": (
        {"audits": audits(continuations=lambda t, i: [f" text {i % 8}"] * 4)},
        {"audits": audits(continuations=lambda t, i: [f" text {i % 8}"] * 4 if i else [" text", " other"])},
    ),
    "teacher_restarting": (
        {"audits": audits(restarted=lambda t, i: int(i % 4 < 2))},
        {"audits": audits(restarted=lambda t, i: int(i % 4 < 1))},
    ),
    "weights_without_signal": (
        {"audits": audits(pi_hat=lambda t, i: 0.23 + 0.002 * i)},
        {"audits": audits(pi_hat=lambda t, i: 0.20 + 0.005 * i)},
    ),
    "entropy_collapse": (
        {"rows": rows(entropy=lambda t: 0.5 if t < 8 else 0.05)},
        {"rows": rows(entropy=lambda t: 0.5 if t < 8 else 0.2)},
    ),
    "kl_runaway": (
        {"rows": rows(**{"anchor/kl_ref_to_student_exact": lambda t: 0.02 * t})},
        {"rows": rows(**{"anchor/kl_ref_to_student_exact": lambda t: 0.01 * t})},
    ),
    "anchor_holds": (
        {"rows": rows(**HELD)},
        {"rows": rows(**HELD | {"audit/token_fraction": 0.21})},
    ),
    "repetition": (
        {"rows": rows(**{"completions/repeated_fraction": 0.3})},
        {"rows": rows(**{"completions/repeated_fraction": 0.1})},
    ),
    "truncation": (
        {"rows": rows(**{"completions/truncated_fraction": 0.4})},
        {"rows": rows(**{"completions/truncated_fraction": 0.2})},
    ),
    "length_drift": (
        {"rows": rows(**{"completions/mean_length": lambda t: 30 - 1.2 * t})},
        {"rows": rows(**{"completions/mean_length": lambda t: 30 - 0.6 * t})},
    ),
    "few_chunks": (
        {"rows": rows(**{"audit/chunks": 16, "completions/mean_length": 64})} | PUBLISHED,
        {"rows": rows(**{"audit/chunks": 96, "completions/mean_length": 400})} | PUBLISHED,
    ),
    "sampler_gap": (
        {"rows": rows(**{"rollout/score_logp_gap": 0.1})},
        {"rows": rows(**{"rollout/score_logp_gap": 0.02})},
    ),
    "no_progress": (
        {"rows": rows(**{"eval/accuracy": lambda t: 0.4 + 0.001 * t})},
        {"rows": rows(**{"eval/accuracy": lambda t: 0.3 + 0.02 * t})},
    ),
    "agreement_alone": (
        {"rows": rows(**{"audit/pi_hat_mean": lambda t: 0.36 + 0.02 * t, "eval/accuracy": lambda t: 0.4 - 0.001 * t})[:9]},
        {"rows": rows(**{"audit/pi_hat_mean": lambda t: 0.36 + 0.02 * t, "eval/accuracy": lambda t: 0.4 + 0.001 * t})[:9]},
    ),
    "budget_pace": ({"budget.usd": 0.41, "num_steps": 200}, {"budget.usd": 4.1, "num_steps": 200}),
}  # fmt: skip


def test_every_check_has_a_run_that_trips_it():
    assert set(TRIPS) == set(health.CHECKS)


@pytest.mark.parametrize("name", TRIPS)
def test_a_run_trips_this_check_alone(name):
    bad, good = TRIPS[name]
    assert runs.checks(**bad) == {name}
    assert runs.checks(**good) == set()


def test_a_teacher_temperature_of_0_trips_at_the_first_audits():
    assert runs.checks([runs.row(0)], [runs.audit(0, 0)], **{"teacher.temperature": 0.0}) == {"teacher_not_sampling"}


def test_a_span_that_holds_no_chunk_trips_few_chunks_though_nothing_was_audited():
    empty = rows(**{"audit/span_fraction": 0.0, "audit/chunks": 0, "completions/mean_length": 400})
    assert runs.checks(empty, [], **PUBLISHED | {"audit.span": "answer"}) == {"few_chunks"}
    full = rows(**{"audit/span_fraction": 0.5, "audit/chunks": 96, "completions/mean_length": 400})
    assert runs.checks(full, **PUBLISHED | {"audit.span": "answer"}) == set()


def test_chunks_that_a_gate_a_budget_or_a_silent_teacher_took_are_no_few_chunks():
    """16 responses of 3,000 tokens have room for 60 chunks of 50, whoever left them without an answer."""
    long = {"completions/mean_length": 3000}
    assert runs.checks(rows(**long | {"audit/chunks": 40, "gate/closed_fraction": 0.7}), **PUBLISHED) == set()
    assert runs.checks(rows(**long | {"audit/chunks": 40}), **PUBLISHED) == set()  # M lowered by a budget
    dropped = {"audit/chunks": 16, "audit/dropped": 80, "audit/stale_dropped": 10, "completions/mean_length": 450}
    assert runs.checks(rows(**dropped), **PUBLISHED) == set()


def test_the_anchor_is_no_finding_where_the_student_moves_or_learns_or_has_hardly_begun():
    assert runs.checks(rows(**HELD)[:19]) == set()
    assert runs.checks(rows(**HELD | {"anchor/kl_ref_to_student_exact": lambda t: 0.001 * t})) == set()
    assert runs.checks(rows(**HELD), **{"anchor.kl_coef": 0.0}) == set()
    assert runs.checks(rows(**HELD | {"eval/accuracy": lambda t: 0.3 + 0.02 * t})) == set()
    assert runs.checks(rows(**HELD | {"eval/accuracy": lambda t: 0.3 + 0.001 * t})) == {"anchor_holds", "no_progress"}


def test_noise_goes_by_the_prompts_that_were_evaluated_not_by_the_config():
    """30 prompts in the file and eval.num_prompts = 10,000: a gain of two answers is noise, as it is of 30."""
    changed = {"eval/accuracy": lambda t: 1 / 3 + t / 19 / 15}
    few, many = (rows(**changed, **{"eval/num_prompts": n}) for n in (30, 10_000))
    assert runs.checks(few, **{"eval.num_prompts": 10_000}) == {"no_progress"}
    assert runs.checks(many, **{"eval.num_prompts": 30}) == set()
    unknown = rows(**changed, **{"eval/num_prompts": None})
    assert health.evaluated(unknown) is None and runs.checks(unknown, **{"eval.num_prompts": 30}) == set()


def test_the_middle_band_alone_can_trip_teacher_not_sampling():
    assert runs.checks(rows(**{"audit/midband_fraction": 0.01})) == {"teacher_not_sampling"}
    agreed = {"audit/midband_fraction": 0.01, "audit/k_sem_mean": 3.95}  # a student that writes what the teacher does
    assert runs.checks(rows(**agreed)) == set()


def test_no_more_agreement_than_by_chance_trips_weights_without_signal():
    same = audits(chance=lambda t, i: runs.audit(t, i)["similarity"])
    assert runs.checks(audits=same) == {"weights_without_signal"}


def test_an_echo_teacher_trips_two_checks():
    """The same sentence to everything: equal texts, and as near to one prompt as to another."""
    echo = audits(continuations=["so the answer is 7"] * 4, similarity=[0.4] * 4, chance=[0.4], k_sem=1.6)
    assert runs.checks(audits=echo) >= {"teacher_not_sampling", "weights_without_signal"}


@pytest.mark.parametrize("processes,trips", [(1, False), (8, True)])
def test_one_process_of_many_logs_its_share_and_is_judged_by_it(processes, trips):
    """`audit.log_per_step` is the run's: of 64 audits a step process 0 of 8 logs 8."""
    few = [runs.audit(t, i, continuations=["the same"] * 4) for t in range(10) for i in range(8)]
    found = health.check([runs.row(t) for t in range(10)], few, [], runs.flat(), processes)
    assert ("teacher_not_sampling" in {f.check for f in found}) == trips


def test_announcements_count_as_not_continuing():
    assert runs.checks(audits=audits(explained=4)) == {"teacher_restarting"}


def test_texts_that_compress_to_a_tenth_are_loops():
    loops = [runs.completion(t, 0, text=" and so on" * 200) for t in STEPS]
    assert runs.checks(completions=loops) == {"repetition"}
    assert runs.checks(completions=[runs.completion(t, 0) for t in STEPS]) == set()


def test_a_reward_that_stands_still_is_a_finding_and_one_that_rises_is_not():
    still = rows(**{"reward/mean": lambda t: 0.3 + 0.01 * (t % 3)})
    assert runs.checks(still, []) == {"no_progress"}
    assert runs.checks(rows(**{"reward/mean": lambda t: 0.3 + 0.01 * t}), []) == set()


def test_the_pace_names_the_step_at_which_the_money_ends():
    (found,) = health.check(rows()[:10], [], [], runs.flat(**{"budget.usd": 0.5, "num_steps": 200}))
    assert found.saw == "at this pace the $0.50 of budget.usd end at step 25 of 200"
    (found,) = health.check(rows()[:10], [], [], runs.flat(**{"budget.calls": 640, "num_steps": 200}))
    assert found.saw == "at this pace the 640 calls of budget.calls end at step 20 of 200"


def test_chunks_that_do_not_fit_are_named_with_the_numbers():
    view = rows(**{"audit/chunks": 16, "completions/mean_length": 64})
    (found,) = health.check(view, audits(), [], runs.flat(**{"audit.num_chunks": 10, "audit.chunk_tokens": 50}))
    assert "C = 50 of 64 tokens leaves room for 1 of 10 chunks" in found.saw and "audit.chunk_tokens to 3" in found.turn


def test_only_the_last_steps_are_looked_at():
    """What was wrong at the start and is not any more is no finding now."""
    early = rows(**{"completions/truncated_fraction": lambda t: 0.9 if t < 8 else 0.0})
    assert runs.checks(early[:8]) == {"truncation"} and runs.checks(early) == set()


def test_findings_say_what_was_seen_why_and_what_to_turn_and_become_metrics():
    found = health.check(rows(**{"completions/truncated_fraction": 0.4}), [], [], runs.flat())
    assert [(f.check, bool(f.saw), bool(f.why), bool(f.turn)) for f in found] == [("truncation", True, True, True)]
    assert found[0].line().startswith("health: truncation: 40% of the responses")
    values = health.metrics(found)
    assert (
        values.pop("health/truncation") == 1 and set(values.values()) == {0} and len(values) == len(health.CHECKS) - 1
    )


def test_a_resumed_run_says_what_it_would_have_said():
    """Its checks go on from the lines and records of the steps before."""
    every = [(runs.row(t), [runs.audit(t, i, continuations=[" same"] * 4) for i in range(20)], []) for t in range(20)]
    whole = health.Watch(runs.flat(), [], [], [])
    said = [[f.check for f in whole.step(*step)[0]] for step in every]
    for start in (1, 7, 15):
        before = every[:start]
        audits = [a for _, of_step, _ in before[-health.WINDOW :] for a in of_step]
        again = health.Watch(runs.flat(), [row for row, _, _ in before], audits, [])
        assert [[f.check for f in again.step(*step)[0]] for step in every[start:]] == said[start:]
    assert said[3] == [] and said[4] == ["teacher_not_sampling"], "100 audits are there"


def test_a_warning_is_said_again_only_after_a_while():
    watch = health.Watch(runs.flat(), [], [], [])
    new = [bool(watch.step(runs.row(t, **{"completions/truncated_fraction": 0.9}), [], [])[1]) for t in STEPS]
    assert new[0] and not any(new[1:])
