"""docs/results/small_world.md and its plots, from the result lines of benchmarks/small_world.py; runs nothing.

Intervals are 95% t intervals over seeds: they say what another seed would do, not another set of problems. Differences
to `default` are paired by seed; one whose interval holds 0 is within noise.
"""

import pathlib

import numpy as np

from benchmarks.small_world import cells as runs

FOLDER = pathlib.Path("docs/results")
PAGE = FOLDER / "small_world.md"
BEGIN, END = "<!-- table: python -m benchmarks.small_world --table -->", "<!-- end of table -->"
HEAD = (
    "| method | what | by seed | mean (95%) | gain | steps | lr | student tokens | teacher tokens | effort | repeated |"
)
ABLATION_HEAD = "| ablation | what | by seed | mean (95%) | against default (95%) | beyond noise | repeated |"


def interval(values) -> tuple[float, float] | None:
    """(mean, half width) of the 95% t interval; None of fewer than two values."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return None
    return float(np.mean(values)), float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))


def _percent(values, sign: str = "") -> str:
    """Mean and half width, in percent."""
    got = interval(values)
    return f"{100 * np.mean(values):{sign}.1f}" + ("" if got is None else f" ± {100 * got[1]:.1f}")


def _seeds(rows) -> str:
    return ", ".join(f"{100 * r['after']:.1f}" for r in rows)


def _mean(rows, key) -> float:
    return float(np.mean([r.get(key, 0) for r in rows]))


def method_row(method: str, which: str, lines) -> str:
    """A row of the first table."""
    rows = runs.chosen(method, which, lines)
    if not rows:
        return f"| {method} | {runs.ABOUT[method]} | not run |" + "  |" * 8
    after = [r["after"] for r in rows]
    gain = [r["after"] - r["before"] for r in rows]
    swept = "" if runs.rate(method, which) else " (forks' sweep)" if runs.rate(method, "forks") else " (not swept)"
    rate = f"{rows[0]['learning_rate']:g}{swept}"
    teacher, scored = _mean(rows, "teacher_tokens"), _mean(rows, "teacher_scored")
    data = runs.chosen("sft", which, lines)
    effort = f"{teacher / _mean(data, 'teacher_tokens'):.2f}x" if data and teacher else ""
    cells = [
        method,
        runs.ABOUT[method],
        _seeds(rows),
        _percent(after),
        f"{100 * np.mean(gain):+.1f}",
        str(rows[0]["steps"]),
        rate,
        f"{_mean(rows, 'student_tokens'):,.0f}",
        f"{teacher:,.0f}" + (f" + {scored:,.0f} scored" if scored else ""),
        effort,
        f"{100 * _mean(rows, 'repeated'):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def ablation_row(method: str, which: str, lines) -> str:
    """A row of the ablations: paired by seed with `default`."""
    rows = runs.chosen(method, which, lines)
    if not rows:
        return f"| {method} | {runs.ABOUT[method]} | not run |" + "  |" * 4
    base = {r["seed"]: r["after"] for r in runs.chosen("default", which, lines)}
    differences = [r["after"] - base[r["seed"]] for r in rows if r["seed"] in base]
    got = interval(differences)
    beyond = "" if got is None else "yes" if abs(got[0]) > got[1] else "no"
    cells = [
        method,
        runs.ABOUT[method],
        _seeds(rows),
        _percent([r["after"] for r in rows]),
        _percent(differences, sign="+") if differences else "",
        beyond,
        f"{100 * _mean(rows, 'repeated'):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def sweep_rows(which: str) -> list[str]:
    """The learning-rate sweeps: accuracy on the validation split after a run, by rate; the best in bold."""
    out = [f"| sweep | {' | '.join(f'{r:g}' for r in runs.SWEEP)} |", "| --- " * (1 + len(runs.SWEEP)) + "|"]
    for method in (m for m in runs.IN_WORLD[which] if m in runs.METHODS):
        known, best = runs.rates().get(which, {}).get(method, {}), runs.rate(method, which)
        cells = [f"{100 * known[f'{r:g}']:.1f}" if f"{r:g}" in known else "not run" for r in runs.SWEEP]
        out.append(f"| {method} | {' | '.join(f'**{c}**' if r == best else c for c, r in zip(cells, runs.SWEEP))} |")
    return out


def tables(which: str, lines) -> str:
    """A world's part of the page."""
    own = [r for r in lines if r["world"] == which]
    base = f"{100 * own[0]['before']:.1f}" if own else "not run"
    asked = runs.IN_WORLD[which]
    out = [f"## {which}", "", f"Base student: {base}.", "", HEAD, "| --- " * 11 + "|"]
    out += [method_row(m, which, lines) for m in asked if m in runs.METHODS]
    ablations = [m for m in asked if m in runs.ABLATIONS]
    if ablations:
        out += ["", ABLATION_HEAD, "| --- " * 7 + "|"]
        out += [ablation_row(m, which, lines) for m in ablations]
        out += ["", "C = 8 and N = 4 are `default`'s own."]
    out += ["", *sweep_rows(which)]
    if own:
        out += ["", f"![accuracy against steps, student tokens and teacher tokens](small_world_{which}.png)"]
    return "\n".join(out)


def curve(row: dict) -> np.ndarray:
    """[points, 4]: step, student tokens, teacher tokens, accuracy, the base first.

    Lines of before `curve_tokens` was kept get their totals in equal parts a step.
    """
    points = [[0, 0, 0, row["before"]]]
    tokens = row.get("curve_tokens") or [
        [row[k] * step / row["steps"] for k in ("student_tokens", "teacher_tokens")] for step, _ in row["curve"]
    ]
    for (step, accuracy), (student, teacher) in zip(row["curve"], tokens, strict=True):
        if row.get("teacher_scored"):
            teacher += student
        points.append([step, student, teacher, accuracy])
    return np.array(points, float)


def plot(which: str, lines) -> pathlib.Path | None:
    """The world's three panels as a PNG; None where nothing has run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = [(i, m, rows) for i, m in enumerate(runs.METHODS) if (rows := runs.chosen(m, which, lines))]
    if not methods:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), sharey=True)
    colours, styles = plt.get_cmap("tab10").colors, ("-", "--")
    names = ("optimizer steps", "student tokens sampled", "teacher tokens, written or scored")
    for i, method, rows in methods:  # i gives a method the same look in every world
        curves = [curve(r) for r in rows]
        points = np.mean([c for c in curves if c.shape == curves[0].shape], axis=0)
        for axis, x in zip(axes, points.T[:3]):
            if x[-1]:
                look = {"color": colours[i % 10], "linestyle": styles[i // 10 % 2], "marker": "."}
                axis.plot(x, 100 * points[:, 3], label=f"{method} ({len(rows)})", **look)
    for axis, name in zip(axes, names):
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_xticks(range(0, 1 + max(row["steps"] for *_, rows in methods for row in rows), 4))
    axes[0].set_ylabel("accuracy on the test split, percent")
    if data := runs.chosen("sft", which, lines):
        once = _mean(data, "teacher_tokens")
        top = axes[2].secondary_xaxis("top", functions=(lambda x: x / once, lambda x: x * once))
        top.set_xlabel("teacher effort: times the tokens of the SFT data")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=8, title="method (seeds)")
    figure.suptitle(f"small world {which}: mean over seeds")
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    path = FOLDER / f"small_world_{which}.png"
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
    return path


def write() -> None:
    """Puts the tables between the page's markers, the words around them being a person's, and draws the plots."""
    lines = runs.lines()
    for which in runs.IN_WORLD:
        plot(which, lines)
    page = PAGE.read_text() if PAGE.exists() else f"# The small world\n\n{BEGIN}\n{END}\n"
    head, rest = page.split(BEGIN)
    body = "\n\n".join(tables(which, lines) for which in runs.IN_WORLD)
    PAGE.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}")
