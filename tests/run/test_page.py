"""The report's page without a browser: what it says of runs in any state, its bounds, its rule for what is left out."""

import base64
import json
import pathlib
import random
import re
import time
import types
import zlib

import pytest
import report_runs as runs

from omniopd_jax import report
from omniopd_jax.errors import UserError
from omniopd_jax.run import card, health, page
from omniopd_jax.run.page import choose, figures


def data_of(html: str) -> dict:
    packed = re.search(r'<script type="application/octet-stream" id="data">(.*?)</script>', html)[1]
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def made(*folders) -> dict:
    return data_of(report.make([str(f) for f in folders]))


def facts(run) -> dict:
    return dict(run["verdict"]["facts"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.write(tmp_path_factory.mktemp("page") / "run")


def test_the_verdict_has_before_after_interval_cost_time_and_health(folder):
    (run,) = made(folder)["runs"]
    assert run["verdict"]["headline"] == "omniopd: 37.5% to 75.0%, better; finished: 20 steps"
    told = facts(run)
    assert (told["accuracy before"], told["accuracy after"]) == ("37.5%", "75.0%")
    assert told["change (95% interval)"] == "+37.5 points ± 12.0", "paired: 24 gained, none lost, of 64"
    assert (told["teacher cost"], told["time"], told["health"]) == ("$0.40", "2 min 0 s", "no check warns")
    assert run["notes"] == [] and run["health"] == []


@pytest.mark.parametrize("counted", [True, False], ids=["now", "before eval/num_prompts was written"])
def test_the_interval_goes_by_the_prompts_that_were_evaluated(tmp_path, counted):
    """eval.num_prompts = 10,000 means all: of 30, ten right and then twelve are no gain."""
    cfg = runs.settings(num_steps=20, **{"eval.num_prompts": 10_000})
    folder = runs.write(tmp_path / "run", audits=2, completions=1, cfg=cfg)
    right = {0: 10, 20: 12}
    answers = [runs.evaluation(s, i, correct=i < n) for s, n in right.items() for i in range(30)]
    runs.lines(folder / "evaluations.jsonl", answers)
    rows = [runs.row(t) for t in range(20)]
    for r, s in ((rows[0], 0), (rows[-1], 20)):
        r |= {"eval/accuracy": right[s] / 30, "eval/updates": s, "eval/log_left_out": 0}
        r |= {"eval/num_prompts": 30} if counted else {}
    runs.lines(folder / "metrics.jsonl", rows)
    told = {"step": 20, "accuracy_before": 10 / 30, "accuracy_after": 12 / 30}
    (folder / "summary.json").write_text(json.dumps(told))
    (run,) = made(folder)["runs"]
    assert run["verdict"]["headline"] == "omniopd: 33.3% to 40.0%, no change beyond noise; finished: 20 steps"
    assert facts(run)["change (95% interval)"] == "+6.7 points ± 10.4", "paired: two gained, none lost, of 30"
    text = card.write(tmp_path, folder, name="a/b", adapter=False).read_text()
    assert "33.3% and 40.0%, greedy, 30 held-out prompts" in text and "10,000" not in text


@pytest.mark.parametrize("won, of, sure", [(4, 16, False), (8, 16, True), (8, 8, True)])
def test_few_prompts_have_an_interval_of_some_width(tmp_path, won, of, sure):
    """All that changed were gained: without lost ones a plain interval has no width where all changed."""
    folder = runs.write(tmp_path / "run", audits=2, completions=1, cfg=runs.settings(**{"eval.num_prompts": of}))
    answers = [runs.evaluation(s, i, correct=bool(s) and i < won) for s in (0, 20) for i in range(of)]
    runs.lines(folder / "evaluations.jsonl", answers)
    rows = [runs.row(t) for t in range(20)]
    rows[0] |= {"eval/accuracy": 0.0, "eval/updates": 0, "eval/num_prompts": of}
    rows[-1] |= {"eval/accuracy": won / of, "eval/updates": 20, "eval/num_prompts": of}
    runs.lines(folder / "metrics.jsonl", rows)
    (folder / "summary.json").write_text(json.dumps({"step": 20, "accuracy_before": 0.0, "accuracy_after": won / of}))
    (run,) = made(folder)["runs"]
    assert ("better" in run["verdict"]["headline"]) == sure
    assert float(facts(run)["change (95% interval)"].split()[-1]) > 10


@pytest.mark.parametrize(
    "won, lost, differ", [(6, 0, True), (5, 0, False), (600, 500, True), (550, 500, False), (0, 0, False)]
)
def test_many_pairs_are_judged_as_few_are(won, lost, differ):
    assert figures._differs(won, lost) == figures._differs(lost, won) == differ


def test_a_live_run_s_verdict_is_of_one_evaluation(tmp_path):
    """The next one's answers are written at once, its figures with the next step."""
    folder = runs.write(tmp_path / "run", audits=2, completions=1)
    (folder / "summary.json").unlink()
    rows = [runs.row(t) for t in range(11)]
    for row, accuracy, updates in ((rows[0], 0.25, 0), (rows[10], 0.75, 10)):
        row |= {"eval/accuracy": accuracy, "eval/updates": updates, "eval/num_prompts": 40}
    runs.lines(folder / "metrics.jsonl", rows)
    right = {0: 10, 10: 30, 20: 0}
    answers = [runs.evaluation(s, i, correct=i < n) for s, n in right.items() for i in range(40)]
    runs.lines(folder / "evaluations.jsonl", answers[:80])
    told = [facts(made(folder)["runs"][0])["change (95% interval)"]]
    runs.lines(folder / "evaluations.jsonl", answers)
    assert facts(made(folder)["runs"][0])["change (95% interval)"] == told[0]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # being written
    assert not [n for n in made(folder)["runs"][0]["notes"] if "could not be read" in n]


def test_the_loss_is_split_where_its_parts_are_known(tmp_path):
    for objective, more, split in (("omniopd", {}, True), ("continuation", {}, False),
                                   ("omniopd", {"objective.mix": {"omniopd": 1.0, "continuation": 0.5}}, False)):  # fmt: skip
        cfg = runs.settings(**{"objective.name": objective} | more)
        folder = runs.write(tmp_path / f"{objective}{len(more)}", cfg=cfg)
        assert ("loss/anchor" in made(folder)["runs"][0]["curves"]["series"]) == split


def test_curves_run_against_steps_tokens_and_dollars(folder):
    curves = made(folder)["runs"][0]["curves"]
    assert curves["x"]["step"] == list(range(20))
    assert curves["x"]["student_tokens"][:2] == [30 * 16, 60 * 16] and curves["x"]["teacher_tokens"][0] == 4600
    assert curves["x"]["usd"][-1] == pytest.approx(0.4)
    series = curves["series"]
    assert series["eval/accuracy"][0] == 0.375 and series["eval/accuracy"][1] is None
    assert series["audit/pi_hat_spread"][0] == pytest.approx(0.2)
    anchor = 0.1 * 0.019 * 0.7 * 30 / 7168  # kl_coef, the KL at step 19, the share outside of chunks, tokens of the cap
    assert series["loss/anchor"][19] == pytest.approx(anchor, rel=1e-4)
    assert series["loss/chunks"][19] == pytest.approx(-0.019 - anchor, rel=1e-4)


def test_agreement_is_set_against_chance_and_against_right_and_wrong(folder):
    a = made(folder)["runs"][0]["agreement"]
    assert a["source"] == "recorded by the run" and a["own_mean"] > a["chance_mean"] > 0
    assert sum(a["own"]) == pytest.approx(1, abs=1e-3) and len(a["own"]) == figures.BINS
    assert a["right_count"] + a["wrong_count"] == 640


def test_an_audit_finds_its_whole_response(folder):
    (run,) = made(folder)["runs"]
    whole = [a for a in run["audits"] if a["whole"] >= 0]
    assert len(run["audits"]) == 640 and len(whole) == 20 * 4 * 2
    for a in whole:
        c = run["completions"][a["whole"]]
        assert c["sample_id"] == a["sample_id"] and a["peak"] in [k["peak"] for k in c["chunks"]]
        assert run["texts"][a["question"]].startswith("Problem")


def test_what_is_beyond_the_bounds_is_chosen_by_the_rule_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "AUDITS", 100)
    monkeypatch.setattr(page, "COMPLETIONS", 20)
    (run,) = made(runs.write(tmp_path / "run"))["runs"]
    assert len(run["audits"]) == 100 and run["left_out"] == {"audits": 540, "responses": 60}
    for step in range(20):
        own = [a for a in run["audits"] if a["step"] == step]
        assert len(own) == 5 and sum(a["whole"] >= 0 for a in own) == 2, (
            "a step's share; those of whole responses first"
        )


def test_a_page_never_exceeds_its_bytes(tmp_path, monkeypatch):
    rng = random.Random(0)
    folder = runs.write(tmp_path / "run", 10, 2, 1)
    noise = [runs.audit(t, i, chunk=rng.randbytes(500).hex()) for t in range(10) for i in range(40)]
    runs.lines(folder / "audits.jsonl", noise)
    whole = len(report.make([str(folder)]))
    monkeypatch.setattr(page, "MAX_BYTES", whole - 100_000)
    html = report.make([str(folder)])
    (run,) = data_of(html)["runs"]
    assert len(html) <= whole - 100_000 and run["left_out"]["audits"] == 400 - len(run["audits"]) > 0


@pytest.mark.slow
def test_200_steps_of_real_lengths_stay_within_5_mb_and_20_seconds(tmp_path):
    """Chunks of 50 words that no other chunk has, 10 continuations each, answers of 400 tokens."""
    rng, words = random.Random(0), [f"w{i:x}" for i in range(50_000)]
    folder = runs.write(tmp_path / "run", 200, 0, 0, cfg=runs.settings(num_steps=200))

    def say(n):
        return " " + " ".join(rng.choices(words, k=n))

    audits = [
        runs.audit(
            t, i, chunk=say(50), continuations=[say(50) for _ in range(10)], similarity=[0.2] * 10, prefix_end=say(80)
        )
        for t in range(200)
        for i in range(10)
    ]
    pieces = [say(1) for _ in range(400)]
    whole = [runs.completion(t, 0, 400, pieces=rng.sample(pieces, 400)) for t in range(200)]
    runs.lines(folder / "audits.jsonl", audits)
    runs.lines(folder / "completions.jsonl", whole)
    start = time.process_time()
    html = report.make([str(folder)])
    spent = time.process_time() - start
    print(f"{len(html) / 1e6:.2f} MB in {spent:.1f} CPU s")
    assert len(html) <= page.MAX_BYTES and spent < 60, "far above what it takes (3 s)"


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda f: (f / "metrics.jsonl").unlink(), "no curves"),
        (lambda f: (f / "metrics.jsonl").write_text(""), "no curves"),
        (lambda f: (f / "audits.jsonl").unlink(), "no audits: none was written"),
        (lambda f: (f / "completions.jsonl").unlink(), "completions.jsonl"),
        (lambda f: (f / "evaluations.jsonl").unlink(), "evaluations.jsonl"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "summary.json").write_text("[1]"), "summary.json is damaged"),
        (lambda f: (f / "metrics.jsonl").open("ab").write(b'{"step": 9, "lo\xff'), "1 line could not be read"),
        (lambda f: (f / "audits.jsonl").open("ab").write(b"[" * 100_000 + b"\n\x00\n"), "2 lines could not be read"),
    ],
)
def test_a_damaged_run_gives_a_page_that_says_what_is_missing(tmp_path, spoil, told):
    folder = runs.write(tmp_path / "run", 4, 4, 1)
    spoil(folder)
    (run,) = made(folder)["runs"]
    assert any(told in note for note in run["notes"]), run["notes"]


def test_records_of_the_wrong_form_are_left_out(tmp_path):
    folder = runs.write(tmp_path / "run", 3, 4, 1)
    odd = [{"step": 0}, {"step": "x"}, [], 7, {"step": 1, "continuations": [1], "similarity": ["a"], "chunk": 3}]
    nan = runs.audit(1, 0, k_sem=float("nan"), weight=float("inf"))
    runs.lines(folder / "audits.jsonl", [*odd, nan, runs.audit(2, 0, n=0, k_sem=0.0)])
    (run,) = made(folder)["runs"]
    assert len(run["audits"]) == 1 and run["completions"]
    notes = " ".join(run["notes"])
    assert "3 lines could not be read" in notes and "audits: 3 records of an unknown form" in notes


@pytest.mark.parametrize("name", ["sft", "grpo", "opd", "constant", "grpo + sft"])
def test_objectives_without_audits_say_so(tmp_path, name):
    mix = {"objective.mix": dict.fromkeys(name.split(" + "), 1.0)}
    cfg = runs.settings(**mix if " + " in name else {"objective.name": name})
    (run,) = made(runs.write(tmp_path / "run", audits=0, cfg=cfg))["runs"]
    assert f"no audits: the objective {name} asks for none" in run["notes"] and run["agreement"]["own_count"] == 0


def test_a_run_that_goes_on_is_no_finished_one(tmp_path):
    (run,) = made(runs.write(tmp_path / "run", 7, summary=False))["runs"]
    assert run["state"] == "7 of 20 steps: still running, or stopped" and "accuracy after" not in facts(run)


def test_an_unknown_price_is_unknown_and_a_local_teacher_is_free(tmp_path):
    paid = runs.settings(**{"teacher.provider": "openai", "teacher.model": "gpt-of-tomorrow"})
    rows = [
        runs.row(t, **{"teacher/cost_usd": 0, "teacher/cost_usd_total": 0, "teacher/price_known": 0}) for t in range(5)
    ]
    (run,) = made(runs.write(tmp_path / "unknown", 5, cfg=paid, rows=rows))["runs"]
    assert facts(run)["teacher cost"] == "unknown"
    free = [runs.row(t, **{"teacher/cost_usd": 0, "teacher/cost_usd_total": 0}) for t in range(5)]
    (run,) = made(runs.write(tmp_path / "free", 5, rows=free))["runs"]
    assert facts(run)["teacher cost"] == "none"


def test_a_run_that_has_ended_shows_what_its_journal_had_also_of_a_step_that_was_killed(tmp_path):
    folder = runs.write(tmp_path / "run", 5)
    told = json.loads((folder / "summary.json").read_text()) | {"teacher/cost_usd": 3.0, "teacher/calls": 9_999}
    (folder / "summary.json").write_text(json.dumps(told))
    shown = facts(made(folder)["runs"][0])
    assert (shown["teacher cost"], shown["teacher calls"]) == ("$3.00", "9,999")


def test_findings_name_their_steps_and_whether_they_still_hold(tmp_path):
    gap = {"rollout/score_logp_gap": 0.2}
    rows = [runs.row(t, **gap, **{"completions/truncated_fraction": 0.9 if t < 8 else 0.0}) for t in range(20)]
    (run,) = made(runs.write(tmp_path / "run", rows=rows))["runs"]
    found = {f["check"]: f for f in run["health"]}
    assert set(found) == {"truncation", "sampler_gap"} and run["health"][0]["check"] == "sampler_gap"
    assert (found["truncation"]["first"], found["truncation"]["now"]) == (0, False) and found["truncation"]["last"] < 19
    assert found["sampler_gap"]["now"] and facts(run)["health"] == f"1 of {len(health.CHECKS)} checks warn"


def test_settings_that_differ_are_listed(tmp_path):
    a = runs.write(tmp_path / "a", 2, 2, 1)
    b = runs.write(tmp_path / "b", 2, 2, 1, cfg=runs.settings(**{"anchor.kl_coef": 0.0}))
    data = made(a, b)
    assert data["differ"] == [["anchor.kl_coef", 0.1, 0.0]] and [r["name"] for r in data["runs"]] == ["a", "b"]


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_folder_that_holds_no_run_is_one_line(tmp_path, kind):
    path = tmp_path / "run"
    if kind == "empty":
        path.mkdir()
    if kind == "file":
        path.write_text("x")
    with pytest.raises(UserError) as error:
        report.make([str(path)])
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_nothing_of_a_run_stands_in_the_page_as_html(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)> @DATA@"
    folder = runs.write(tmp_path / "run <b>", 2, 4, 1, chunk=evil, question=evil, prompt_id=evil)
    html = report.make([str(folder)])
    assert "alert(1)" not in html and "<b>" not in html and "run &lt;b&gt;" in html and html.count("<script") == 2
    assert data_of(html)["runs"][0]["texts"].count(evil) == 1
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', html)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'none'" in policy


def test_long_texts_are_cut_and_counted(tmp_path):
    folder = runs.write(tmp_path / "run", 1, 2, 1, chunk="x" * 100_000)
    (run,) = made(folder)["runs"]
    assert max(map(len, run["texts"])) == choose.TEXT and run["left_out"]["characters"] == 2 * (100_000 - choose.TEXT)


def test_the_library_is_one_small_file_with_its_licence():
    web = pathlib.Path(page.__file__).parent / "web"
    assert (web / "uplot.iife.min.js").stat().st_size < 300_000 and "MIT" in (web / "uplot.LICENSE").read_text()


def test_what_a_run_came_to_at_an_earlier_end_is_not_what_it_has_come_to(tmp_path):
    """It went on from step 10 with a larger num_steps: its summary is of then."""
    folder = runs.write(tmp_path / "run", 15, cfg=runs.settings(num_steps=40), summary=False)
    (folder / "summary.json").write_text(json.dumps({"step": 10, "accuracy_before": 24 / 64, "accuracy_after": 0.75}))
    (run,) = made(folder)["runs"]
    assert "accuracy after" not in facts(run) and run["state"] == "15 of 40 steps: still running, or stopped"
    text = card.write(tmp_path, folder, name="a/b", adapter=False).read_text()
    assert "15 of 40" in text and "75.0%" not in text
    (folder / "summary.json").write_text(json.dumps({"step": 15, "accuracy_before": 24 / 64, "accuracy_after": 0.75}))
    assert facts(made(folder)["runs"][0])["accuracy after"] == "75.0%"


@pytest.mark.parametrize("place", ["nowhere/page.html", "."])
def test_a_page_that_can_not_be_written_is_one_line(folder, tmp_path, monkeypatch, place):
    given = {"out": str(tmp_path / place), "watch": False, "port": 0}
    monkeypatch.setattr(report.flags, "FLAGS", {k: types.SimpleNamespace(value=v) for k, v in given.items()})
    with pytest.raises(UserError, match="can't be written .*: name another file by --out"):
        report.main(["report", str(folder)])


def test_a_page_is_served_or_written(folder, monkeypatch):
    given = {"out": "page.html", "watch": True, "port": 0}
    monkeypatch.setattr(report.flags, "FLAGS", {k: types.SimpleNamespace(value=v) for k, v in given.items()})
    with pytest.raises(UserError, match="leave out --out or --watch"):
        report.main(["report", str(folder)])


@pytest.mark.parametrize(
    ("num_steps", "summary", "state"),
    [
        (5, {}, "finished: 10 steps"),  # lowered after step 10
        (20, {"stopped_early": "eval.patience"}, "ended early: 10 of 20 steps"),
        (20, {}, "10 of 20 steps: still running, or stopped"),  # raised after step 10
    ],
)
def test_how_a_run_ended_is_said_as_it_was(tmp_path, num_steps, summary, state):
    folder = runs.write(tmp_path / "run", 10, 0, 0, cfg=runs.settings(num_steps=num_steps))
    (folder / "summary.json").write_text(json.dumps({"step": 10} | summary))
    assert page.Folder(folder).state() == state
