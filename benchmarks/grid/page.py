"""Tables and plots of a grid, from its lines; runs nothing.

Intervals are 95%. With one seed they say what other problems of the kind would do; with several the variance over seeds
is added to that over problems (a t quantile for the few seeds), which is a little too wide. Two seeds say next to
nothing of that variance (a quantile of 12.7), so a cell with two takes the mean variance of its world's cells, a
difference that of its table's.
Differences are paired: by problem, and by seed where both have it.
"""

import pathlib

import numpy as np
from scipy import special

from benchmarks import sides
from benchmarks.grid import runs as g
from benchmarks.grid.runs import Cell, Grid

NOT_RUN = "not run"
BEFORE = "the base student"
SEEDS = range(5)


def over_seeds(cells: list[np.ndarray]) -> tuple[float, int]:
    """(variance of a cell's mean from seed to seed, its degrees of freedom) of [seeds, problems] cells together."""
    several = [right_SP.mean(1) for right_SP in cells if len(right_SP) > 1]
    freedom = sum(len(mean_S) - 1 for mean_S in several)
    return sum((len(mean_S) - 1) * mean_S.var(ddof=1) for mean_S in several) / max(freedom, 1), freedom


def interval(right_SP: np.ndarray, table: tuple[float, int] | None = None) -> tuple[float, float]:
    """(mean, half width) of what [seeds, problems] values say: 0 or 1, or differences of such; `table`: the
    `over_seeds` that two seeds take."""
    seeds, problems = right_SP.shape
    square = (1.96 * right_SP.mean(0).std(ddof=1)) ** 2 / problems
    if seeds > 1:
        variance, freedom = table if table and seeds == 2 else over_seeds([right_SP])
        square += special.stdtrit(freedom, 0.975) ** 2 * variance / seeds
    return float(right_SP.mean()), float(np.sqrt(square))


def percent(right_SP: np.ndarray, table: tuple[float, int] | None = None, sign: str = "") -> str:
    """In percent; the number of seeds where there are several."""
    mean, half = interval(right_SP, table)
    seeds = f" ({len(right_SP)})" if len(right_SP) > 1 else ""
    return f"{100 * mean:{sign}.1f} ± {100 * half:.1f}{seeds}"


def found(grid: Grid, world: str, method: str, budget: float, lines) -> dict[int, dict]:
    """{seed: line} of a table's cell."""
    got = {s: g.result(grid, Cell(world, method, budget, s), lines) for s in SEEDS}
    return {s: line for s, line in got.items() if line is not None}


def values(got: dict[int, dict], key: str = "right") -> np.ndarray:
    """[seeds, problems] of 0 and 1."""
    return np.array([g.bits(line, key) for line in got.values()], float)


def against(got: dict[int, dict], base: dict[int, dict]) -> np.ndarray:
    """[seeds, problems] of differences, of the seeds that both have."""
    both = [s for s in got if s in base]
    return np.array([np.subtract(g.bits(got[s]), g.bits(base[s])) for s in both], float)


def of_world(grid: Grid, world: str, lines) -> tuple[float, int]:
    """`over_seeds` of every cell of a world, whatever table it stands in: a cell has one interval."""
    return over_seeds([values(found(grid, world, m, b, lines)) for m in grid.methods for b in grid.budgets])


def accuracy_table(grid: Grid, world: str, methods, lines, budgets=None) -> str:
    """Accuracy by method and budget."""
    budgets = grid.budgets if budgets is None else budgets
    head = ["method", "what", *(f"{b:g} ({b * grid.unit / 1000:,.0f}k tokens)" for b in budgets)]
    cells = {m: [values(found(grid, world, m, b, lines)) for b in budgets] for m in methods}
    table = of_world(grid, world, lines)
    texts = {m: [percent(c, table) if len(c) else NOT_RUN for c in row] for m, row in cells.items()}
    return sides.table(head, [(m, grid.methods[m].about, *texts[m]) for m in methods])


def difference_table(grid: Grid, world: str, methods, base: str, lines, budgets=None) -> str:
    """Paired differences to a method at the same budget, or to the student `BEFORE`; those whose interval does not hold
    0 in bold."""
    budgets = grid.budgets if budgets is None else budgets
    cells = {}
    for m in methods:
        for b in budgets:
            got = found(grid, world, m, b, lines)
            if base == BEFORE:
                first = {s: line | {"right": line["before"]} for s, line in got.items()}
            else:
                first = found(grid, world, base, b, lines)
            cells[m, b] = against(got, first)
    table = over_seeds(list(cells.values()))
    texts = dict.fromkeys(cells, NOT_RUN)
    for at, apart in cells.items():
        if len(apart):
            mean, half = interval(apart, table)
            text = percent(apart, table, "+")
            texts[at] = f"**{text}**" if abs(mean) > half else text
    rows = [(m, *(texts[m, b] for b in budgets)) for m in methods]
    return sides.table([f"against {base}", *(f"{b:g}" for b in budgets)], rows)


def bought_table(grid: Grid, world: str, methods, lines, budget: float) -> str:
    """What a budget bought: means over seeds."""
    head = ["method", "prompts x responses", "updates", "tokens in", "out", "of the budget", "calls", "student tokens",
            "USD", "USD, one text a call", "rates by budget"]  # fmt: skip
    rows = []
    for m in methods:
        got = list(found(grid, world, m, budget, lines).values())
        if not got:
            rows.append((m, NOT_RUN, *[""] * 9))
            continue
        mean = {k: np.mean([r[k] for r in got]) for k in ("tokens_in", "tokens_out", "calls", "student_tokens", "usd",
                                                         "usd_one_text_a_call")}  # fmt: skip
        rates = [g.rate(grid, m, b, lines) for b in grid.swept]
        share = (mean["tokens_in"] + mean["tokens_out"]) / (budget * grid.unit)
        money = [f"{mean[k]:.3f}" for k in ("usd", "usd_one_text_a_call")] if grid.methods[m].buys else ["0", "0"]
        rows.append(
            (m, f"{got[0]['prompts']} x {got[0]['generations']}", got[0]["updates"],
             *(f"{mean[k]:,.0f}" for k in ("tokens_in", "tokens_out")), f"{share:.0%}" if grid.methods[m].buys else "",
             *(f"{mean[k]:,.0f}" for k in ("calls", "student_tokens")), *money,
             ", ".join("?" if r is None else f"{r:g}" for r in rates))
        )  # fmt: skip
    return sides.table(head, rows)


def sweep_table(grid: Grid, methods, lines) -> str:
    """Accuracy on the validation split by rate, at each budget that was swept; the best in bold."""
    rates = sorted(grid.rates)
    rows = []
    for m in methods:
        for b in grid.swept:
            known = {r["learning_rate"]: g.accuracy(r) for r in
                     g.of(lines, g.VALIDATION, world=grid.swept_in, method=m, budget=b)}  # fmt: skip
            best = g.rate(grid, m, b, lines)
            cells = [NOT_RUN if r not in known else f"{100 * known[r]:.1f}" for r in rates]
            rows.append((m, f"{b:g}", *(f"**{c}**" if r == best else c for c, r in zip(cells, rates))))
    return sides.table(["sweep", "budget", *(f"{r:g}" for r in rates)], rows)


def long_table(grid: Grid, world: str, methods, lines) -> str:
    """Accuracy along the long runs, and how the last answers looked."""
    marks = (100, 200, 500, 1000)
    head = ["method", "what", "seeds", *(f"after {n}" for n in marks), "best", "repeated 4-grams", "zlib, at most",
            "entropy", "KL to the base", "length"]  # fmt: skip
    rows = []
    for m in methods:
        got = list(found(grid, world, m, 1.0, lines).values())
        if not got:
            rows.append((m, grid.methods[m].about, NOT_RUN, *[""] * (len(head) - 3)))
            continue
        curves = [{p["updates"]: p for p in r["curve"]} for r in got]
        at = [", ".join(f"{100 * c[n]['accuracy']:.1f}" for c in curves) for n in marks]
        best = ", ".join(f"{100 * max(p['accuracy'] for p in c.values()):.1f}" for c in curves)
        ends = [max(c.items())[1] for c in curves]
        zlib = max(p["zlib_most"] for c in curves for p in c.values())
        looks = [mean_of(ends, "repeated", ".2%"), f"{zlib:.1f}", mean_of(ends, "entropy", ".3f"),
                 mean_of(ends, "kl", ".3f"), mean_of(ends, "length", ".1f")]  # fmt: skip
        rows.append((m, grid.methods[m].about, ", ".join(str(r["seed"]) for r in got), *at, best, *looks))
    return sides.table(head, rows)


def mean_of(points: list[dict], key: str, form: str) -> str:
    """The mean over points of curves; "-" where none has it: without an anchor no KL to the base is computed."""
    got = [p[key] for p in points if key in p]
    return f"{np.mean(got):{form}}" if got else "-"


def base(grid: Grid, world: str, lines) -> str:
    """The student before any update, on the test split."""
    got = g.of(lines, world=world)
    return percent(values({0: got[0]}, "before")) if got else NOT_RUN


def plot(grid: Grid, world: str, methods, lines) -> pathlib.Path | None:
    """Accuracy against tokens bought and against dollars at one text a call; None where nothing has run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = {}
    for m in methods:
        got = [c for b in grid.budgets if (c := found(grid, world, m, b, lines))]
        if got:
            curves[m] = got
    if not curves:
        return None
    table = of_world(grid, world, lines)
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.8), sharey=True)
    colours, styles = plt.get_cmap("tab10").colors, ("-", "--")
    for i, m in enumerate(methods):
        if m not in curves:
            continue
        points = [interval(values(c), table) for c in curves[m]]
        look = {"color": colours[i % 10], "linestyle": styles[i // 10 % 2]}
        mean, half = 100 * np.array(points).T
        if not grid.methods[m].buys:
            for axis in axes:
                axis.axhline(mean[-1], label=f"{m} (buys none)" if axis is axes[0] else None, alpha=0.6, **look)
            continue
        tokens = [np.mean([r["tokens_in"] + r["tokens_out"] for r in c.values()]) for c in curves[m]]
        dollars = [np.mean([r["usd_one_text_a_call"] for r in c.values()]) for c in curves[m]]
        axes[0].errorbar(tokens, mean, half, marker=".", capsize=2, label=m, **look)
        axes[1].errorbar(dollars, mean, half, marker=".", capsize=2, **look)
    for axis, name in zip(axes, ("teacher tokens bought, in and out", "dollars, one text a call, no cache")):
        axis.set_xscale("log")
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on the test split, percent")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=8)
    figure.suptitle(f"{world}: accuracy at equal cost (lines without a budget: at the most updates that were run)")
    figure.tight_layout(rect=(0, 0, 0.84, 1))
    path = sides.RESULTS / f"{grid.name}_{world}.png"
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
    return path
