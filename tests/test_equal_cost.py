"""The equal-cost grid: budgets, rates chosen from lines, what is run next, intervals. No run is made."""

import dataclasses

import numpy as np
import pytest

from benchmarks.equal_cost import cells
from benchmarks.grid import command, page
from benchmarks.grid import runs as g
from benchmarks.grid.runs import Cell
from benchmarks.real_model import cells as real
from omniopd_jax.errors import UserError
from omniopd_jax.run import validation
from omniopd_jax.run.files import place
from omniopd_jax.teachers import Continuation, probe
from omniopd_jax.teachers.journal import Journal, Totals

RATES = {2e-4: 0.6, 8e-4: 0.7, 5e-5: 0.35}


def line(cell: Cell, accuracy: float, rate: float, problems: int = 100) -> dict:
    """What a run would have left."""
    right = g.as_hex([i < accuracy * problems for i in range(problems)])
    return dataclasses.asdict(cell) | {
        "split": cell.split, "learning_rate": rate, "problems": problems, "right": right, "before": right,
    }  # fmt: skip


@pytest.fixture
def grid():
    return cells.GRID


def test_answers_survive_their_writing_down():
    right = [False, False, True, True, False, True, False]
    assert g.bits({"right": g.as_hex(right), "problems": 7}) == [int(r) for r in right]
    assert g.accuracy({"right": g.as_hex(right), "problems": 7}) == 3 / 7


def test_every_method_makes_about_as_many_updates_and_buys_the_budget(grid):
    for name, method in grid.methods.items():
        for budget, about in zip(grid.budgets, (5, 10, 20, 80), strict=True):
            cell = Cell("forks", name, budget, 0)
            updates = grid.updates(cell)
            if method.updates:
                assert updates == method.updates
            else:
                assert abs(updates - about) <= 0.1 * about, name
                assert abs(updates * method.step_tokens / (budget * grid.unit) - 1) < 0.11, name


def test_a_rate_is_chosen_at_each_budget_and_a_hopeless_one_goes_no_further(grid):
    lines = [line(Cell("forks", "sft", 0.25, g.SWEEP_SEED, r), a, r) for r, a in RATES.items()]
    assert g.rate(grid, "sft", 0.25, lines) is None  # two go on, so the sweep is not whole
    wanted = [c for c in g.sweep(grid, "sft") if g.is_wanted(grid, c, lines)]
    assert {(c.budget, c.rate) for c in wanted} == {(0.5, 2e-4), (0.5, 8e-4)}
    states = [command.state(grid, c, lines) for c in g.sweep(grid, "sft") if c.rate != 2e-4]
    assert states == [command.DONE, command.OPEN, command.OPEN, command.DONE, command.SKIPPED, command.SKIPPED]
    for budget, best in ((0.5, 8e-4), (1.0, 2e-4)):
        lines += [line(Cell("forks", "sft", budget, g.SWEEP_SEED, r), 0.5 + (r == best) / 10, r) for r in (2e-4, 8e-4)]
    assert [g.rate(grid, "sft", b, lines) for b in grid.budgets] == [8e-4, 8e-4, 2e-4, 2e-4]


def test_what_takes_anothers_rate_waits_for_its_sweep(grid):
    lines = [line(Cell("forks", "omni_baseline", b, g.SWEEP_SEED, r), 0.5, r) for b in grid.swept for r in grid.rates]
    assert g.rate(grid, "n_2", 1.0, lines) == min(grid.rates)
    assert g.rate(grid, "sft", 1.0, lines) is None


def test_a_result_counts_only_at_the_rate_that_was_chosen(grid):
    sweep = [line(Cell("forks", "sft", b, g.SWEEP_SEED, r), a, r) for b in grid.swept for r, a in RATES.items()]
    cell = Cell("slips", "sft", 1.0, 0)
    assert g.result(grid, cell, [*sweep, line(cell, 0.9, 5e-5)]) is None
    assert g.accuracy(g.result(grid, cell, [*sweep, line(cell, 0.9, 5e-5), line(cell, 0.8, 8e-4)])) == 0.8


def test_a_method_that_only_harms_stays_on_forks_with_one_seed(grid):
    lines = [line(Cell("forks", "context", b, g.SWEEP_SEED, r), 0.2, r) for b in grid.swept for r in grid.rates]
    assert cells.is_hopeless(grid, "context_reverse", lines) and not cells.is_hopeless(grid, "sft", lines)
    left = {(c.world, c.seed, c.budget) for c in grid.plan(grid, lines) if c.method == "context" and c.rate is None}
    assert left == {("forks", 0, b) for b in grid.budgets if b <= 1}


@pytest.mark.parametrize("grid", [cells.GRID, real.GRID], ids=lambda grid: grid.name)
def test_the_plan_names_each_cell_once_and_a_sweep_before_what_takes_its_rate(grid):
    plan = grid.plan(grid, [])
    assert len(set(plan)) == len(plan)
    for i, cell in enumerate(plan):
        name = grid.methods[cell.method].like or cell.method
        assert cell.rate is not None or set(g.sweep(grid, name)) <= set(plan[:i]), cell


def test_intervals_are_of_problems_and_of_seeds():
    one = np.array([[1.0, 0.0] * 50])
    mean, half = page.interval(one)
    assert mean == 0.5 and half == pytest.approx(1.96 * np.sqrt(0.25 * 100 / 99) / 10)
    assert page.interval(np.repeat(one, 3, axis=0))[1] == pytest.approx(half)  # seeds that agree add nothing
    apart = np.concatenate([one, np.zeros((1, 100)), np.ones((1, 100))])
    assert page.interval(apart)[1] > 1
    two = np.concatenate([one, np.ones((1, 100))])  # means 0.5 and 1: a variance of 1/8 with one degree of freedom
    problems = page.interval(two, (0.0, 1))[1]
    assert page.interval(two)[1] == pytest.approx(np.hypot(problems, 12.706 * 0.25), rel=1e-3)
    table = page.over_seeds([two, np.repeat(one, 3, axis=0), one])
    assert table == pytest.approx((0.125 / 3, 3))
    assert page.interval(two, table)[1] == pytest.approx(np.hypot(problems, 3.182 * np.sqrt(0.125 / 6)), rel=1e-3)
    assert page.interval(apart, table) == page.interval(apart)  # three seeds keep their own
    got = {0: line(Cell("forks", "sft", 1.0, 0), 0.6, 2e-4), 1: line(Cell("forks", "sft", 1.0, 1), 0.7, 2e-4)}
    assert page.against(got, {1: line(Cell("forks", "omni", 1.0, 1), 0.5, 2e-4)}).mean() == pytest.approx(0.2)


def test_a_cell_of_two_seeds_has_one_interval_whatever_table_it_stands_in():
    lines = [line(c, 0.5, c.rate) for m in ("sft", "omni_baseline") for c in g.sweep(real.GRID, m)]
    for method, accuracies in (("sft", (0.5, 0.7)), ("omni_baseline", (0.6, 0.61))):
        lines += [line(Cell("teacher", method, 1.0, s), a, min(real.GRID.rates)) for s, a in enumerate(accuracies)]
    rows = [
        next(r for r in page.accuracy_table(real.GRID, "teacher", names, lines, [1.0]).splitlines() if "baseline" in r)
        for names in (["sft", "omni_baseline"], ["omni_baseline", "omni_instruct"])
    ]
    assert rows[0] == rows[1] and rows[0].endswith("(2) |")


def test_a_line_counts_what_was_bought_also_inside_a_step_that_was_cut_off(tmp_path):
    step = {"teacher/calls": 3, "teacher/tokens_in": 40, "teacher/tokens_out": 7, "teacher/replayed_fraction": 0.0}
    cut_off = [step, step | {"teacher/replayed_fraction": 0.1}]
    assert g.bought([step] * 2, tmp_path) == {"tokens_in": 80, "tokens_out": 14, "calls": 6}
    with pytest.raises(UserError, match="was stopped inside a step, whose purchases"):
        g.bought(cut_off, tmp_path)
    journal = Journal(tmp_path / "journal", str(place(tmp_path)))
    for number, who in enumerate((probe.WHO, *(f"sample {i}" for i in range(7)))):  # seven calls, of which six in steps
        key = bytes([number])
        call = journal.ask(key, 1, 100, 0.0, Totals())
        text = (key, who, 0, Continuation(0, "text", "stop"), None)
        journal.settle(call, "ok", usage=(13, 0, 2, 0.0), results=[text])
    journal.close()
    assert g.bought(cut_off, tmp_path) == {"tokens_in": 7 * 13, "tokens_out": 7 * 2, "calls": 7}


def test_the_real_models_recipes_are_valid_and_buy_their_budget():
    for name, method in real.GRID.methods.items():
        for world in real.WORLDS:
            cfg = real.recipe(world, method, 0)
            validation.validate(cfg)
            assert not cfg.data.fields.solution  # the prompts' own would be free
        updates = {b: real.GRID.updates(Cell("teacher", name, b, 0)) for b in real.GRID.budgets}
        assert method.updates or abs(updates[1.0] - 30) <= 2


def test_the_real_models_page_pairs_with_the_base_student_and_shows_the_first_answers():
    sweep = [line(c, 0.5, c.rate) for c in g.sweep(real.GRID, "sft")]
    one = line(Cell("teacher", "sft", 1.0, 0), 0.6, min(real.GRID.rates))
    kept = {key: [0.5, 0.25] for key in ("cut", "no_number", "length", "facts", "perplexity")}
    shown = [[["How many?", "7", "It is\n6."]], [["How many?", "7", "It is 7."]]]
    bought = dict.fromkeys(("tokens_in", "tokens_out", "calls", "student_tokens", "usd", "usd_one_text_a_call"), 1)
    more = {"prompts": 4, "generations": 2, "updates": 30, "samples": shown} | kept | bought
    text = real.body(real.GRID, [*sweep, one | more | {"before": g.as_hex([i < 40 for i in range(100)])}])
    table = text[text.index("| against the base student |") :].splitlines()
    assert table[2] == "| sft | not run | **+20.0 ± 7.9** |"
    assert "**How many?** (7)\n\n- before: It is 6.\n- sft: It is 7." in text


def test_a_long_run_shows_its_curve_and_no_kl_where_none_was_computed(grid):
    sweep = [line(c, 0.5, c.rate) for c in g.sweep(grid, "omni")]
    at = {100: 0.5, 200: 0.6, 500: 0.4, 1000: 0.2}
    points = [{"updates": n, "accuracy": a, "repeated": 0.01, "entropy": 0.05, "length": 30.0, "zlib_most": 1.5}
              for n, a in at.items()]  # fmt: skip
    rows = []
    for method, more in (("long_omni", {"kl": 0.25}), ("long_omni_free", {})):
        cell = Cell("forks", method, 1.0, 0)
        run = line(cell, 0.2, min(grid.rates)) | {"curve": [p | more for p in points]}
        rows.append(page.long_table(grid, "forks", [method], [*sweep, run]).splitlines()[-1].split(" | "))
    assert [r[3:] for r in rows] == [
        ["50.0", "60.0", "40.0", "20.0", "60.0", "1.00%", "1.5", "0.050", kl, "30.0 |"] for kl in ("0.250", "-")
    ]
