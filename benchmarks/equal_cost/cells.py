"""The small worlds at equal cost: methods, budgets, the order in which cells are run, and what is left out."""

import dataclasses

from benchmarks.grid import command, page
from benchmarks.grid import runs as g
from benchmarks.grid.runs import Cell, Grid, Method
from benchmarks.small_world import cells as small_world
from configs import tiny
from omniopd_jax.teachers.prices import listed_price

NO_ANCHOR = {"anchor.kl_coef": 0.0}
MEAN = NO_ANCHOR | {"objective.normalizer": "separate_means"}
CUT = MEAN | {"objective.name": "continuation", "continuation.max_tokens": 48}
CONTEXT = MEAN | {"objective.name": "context", "context.template": "{prompt}\n{solution}"}
SELF, REVERSE = {"context.model": "self"}, {"context.divergence": "reverse"}
ADAPTIVE = {"audit.num_continuations": 10, "audit.adaptive": True}
GATE = {"audit.gate": "graded", "audit.gate_attempts": 2}
OMNI = 3_280  # of a step of OmniOPD with 11 prompts: the free methods sample as much of the student as it does

METHODS = {
    "sft": Method("the teacher's whole solutions (a cut at zero)", MEAN | {"objective.name": "sft"}, 32, 3_160,
                  texts=2, in_world={"style": 2_390}),
    "cont_peak": Method("continuation, cut at the highest entropy", CUT | {"continuation.cut": "peak"}, 24, 3_120),
    "omni": Method("OmniOPD as published: no baseline", {"objective.advantage": "none"}, 11, OMNI, texts=4),
    "omni_baseline": Method("OmniOPD with the batch's mean as baseline", {}, 11, OMNI, texts=4),
    "cont_fixed": Method("continuation, cut after 8 tokens", CUT | {"continuation.cut_tokens": 8}, 24, 3_150),
    "cont_uniform": Method("continuation, cut anywhere", CUT | {"continuation.cut": "uniform"}, 24, 3_170),
    "omni_adaptive": Method("the baseline, N up to 10 in rounds of 3", ADAPTIVE, 6, 3_080, texts=3,
                            like="omni_baseline"),
    "omni_gated": Method("the baseline, behind a gate of 2 graded solutions", GATE, 8, 3_150, texts=4,
                         like="omni_baseline", in_world={"style": 2_960}),
    "context": Method("context: the frozen student scores, forward KL", CONTEXT, 48, 3_160, in_world={"style": 2_580}),
    "context_self": Method("context: the student itself scores, forward KL", CONTEXT | SELF, 48, 3_160,
                           in_world={"style": 2_580}),
    "context_reverse": Method("context: the frozen student, reverse KL", CONTEXT | REVERSE, 48, 3_160,
                              like="context", in_world={"style": 2_580}),
    "context_self_reverse": Method("context: the student itself, reverse KL", CONTEXT | SELF | REVERSE, 48, 3_160,
                                   like="context_self", in_world={"style": 2_580}),
    "opd": Method("white box: reverse KL by the sampled token", {"objective.name": "opd"} | NO_ANCHOR, 11, OMNI,
                  buys=False),
    "grpo": Method("no teacher: a right answer is worth 1, 3 prompts x 8", {
        "objective.name": "grpo", "num_generations": 8} | NO_ANCHOR, 3, OMNI, buys=False),
    "constant": Method("control: no teacher, weight 1 on the same chunks", {"objective.name": "constant"}, 11, OMNI,
                       buys=False, like="omni"),
}  # fmt: skip
CONTEXTS = [m for m in METHODS if m.startswith("context")]


def _frontier(about: str, prompts: int, step_tokens: float, texts: int = 4, **audit) -> Method:
    overrides = {f"audit.{key}": value for key, value in audit.items()}
    return Method(f"frontier: {about}", overrides, prompts, step_tokens, texts, like="omni_baseline")


FRONTIER = {  # one setting at a time, from M = 2, N = 4, C = 8, which is `omni_baseline`
    "m_1": _frontier("M = 1", 22, 3_200, num_chunks=1),
    "m_4": _frontier("M = 4", 5, 3_000, num_chunks=4),
    "n_1": _frontier("N = 1", 16, 3_230, texts=1, num_continuations=1),
    "n_2": _frontier("N = 2", 14, 3_280, texts=2, num_continuations=2),
    "n_8": _frontier("N = 8", 8, 3_410, texts=8, num_continuations=8),
    "c_4": _frontier("C = 4", 14, 3_280, chunk_tokens=4),
    "c_16": _frontier("C = 16", 9, 3_240, chunk_tokens=16),
}


def _long(about: str, near: str, overrides: dict) -> Method:
    changed = METHODS[near].overrides | overrides
    return dataclasses.replace(METHODS[near], about=f"long: {about}", overrides=changed, like=near, updates=1_000)


ANCHOR = {"anchor.kl_coef": 0.1, "anchor.scope": "all"}
LONG = {  # 1,000 updates, at the rate of the same method at the grid's budget 1
    "long_omni": _long("OmniOPD as published", "omni", {}),
    "long_omni_free": _long("as published, without the anchor", "omni", NO_ANCHOR),
    "long_baseline": _long("OmniOPD with the baseline", "omni_baseline", {}),
    "long_baseline_free": _long("with the baseline, without the anchor", "omni_baseline", NO_ANCHOR),
    "long_opd": _long("white box, without an anchor", "opd", {}),
    "long_opd_anchor": _long("white box, with an anchor on all tokens", "opd", ANCHOR),
}
WORLDS = ("forks", "style", "slips")
HARMFUL = 0.33  # the base student's accuracy on forks: a sweep that nowhere beats it ends its method there


def recipe(which: str, method: Method, seed: int):
    """configs/tiny.py in a world, with a method's settings and its number of prompts."""
    cfg = tiny.get_config()
    cfg.student.path, cfg.teacher.model = map(str, small_world.checkpoints(which))
    cfg.data.name = which
    cfg.update_from_flattened_dict(method.overrides)
    cfg.seed, cfg.prompts_per_step = seed, method.prompts
    cfg.micro_batches = g.micro_batches(cfg.prompts_per_step * cfg.num_generations)
    cfg.eval.num_prompts, cfg.eval.every = 256 if seed == g.SWEEP_SEED else 512, 100 if method.updates else 0
    cfg.log.tensorboard, cfg.log.completions_per_step = False, 0
    cfg.audit.log_per_step = cfg.log.chance_pairs = 0
    return cfg


def is_hopeless(grid: Grid, method: str, lines: list[dict]) -> bool:
    """Whether a method has been swept and no rate is above the base student at any budget: on forks seed 0 it stays."""
    name = grid.methods[method].like or method
    if g.rate(grid, name, 1, lines) is None:
        return False
    found = g.of(lines, g.VALIDATION, method=name)
    return max(map(g.accuracy, found)) <= HARMFUL


def plan(grid: Grid, lines: list[dict]) -> list[Cell]:
    """Every cell in the order of docs/results/equal_cost.md; cells of a method that is left out are not in it."""
    alive = [m for m in METHODS if not is_hopeless(grid, m, lines)]
    free = [m for m, method in METHODS.items() if not method.buys]
    texts = [m for m in METHODS if m not in free + CONTEXTS]
    core = [m for m in ("sft", "cont_peak", "omni", "omni_baseline", "opd", "grpo") if m in alive]
    rest = [m for m in alive if m not in core]
    small, large = [b for b in grid.budgets if b <= 1], [b for b in grid.budgets if b > 1]

    def cells(worlds, methods, seeds, budgets):
        return [Cell(w, m, b, s) for s in seeds for w in worlds for m in methods for b in budgets]

    def first(methods):
        """The sweeps of methods, then forks, seed 0."""
        sweeps = [c for m in methods if not grid.methods[m].like for c in g.sweep(grid, m)]
        return sweeps + cells(["forks"], methods, [0], small)

    out = first(texts) + cells(["forks"], [m for m in texts if m in alive], [0], large)
    out += first(free) + cells(["forks"], [m for m in free if m in alive], [0], large)
    out += cells(["style", "slips"], core, [0], grid.budgets)
    out += first(CONTEXTS) + cells(["forks"], [m for m in CONTEXTS if m in alive], [0], large)
    out += cells(["style", "slips"], rest, [0], grid.budgets)
    out += cells(["forks"], alive, [1, 2], grid.budgets)
    out += cells(["forks"], FRONTIER, [0], small)
    out += cells(["style", "slips"], alive, [1, 2], grid.budgets)
    out += cells(["forks"], FRONTIER, [1, 2], small)
    out += cells(WORLDS, [m for m in finalists(grid, lines) if m in alive], [3, 4], grid.budgets)
    out += cells(["forks"], ["m_1"], range(3), large) + cells(["style", "slips"], ["m_1"], range(3), grid.budgets)
    return out + cells(["forks", "style"], LONG, [0], [1.0]) + cells(["forks", "style"], LONG, [1, 2], [1.0])


def finalists(grid: Grid, lines: list[dict]) -> list[str]:
    """The three text methods with the best mean over forks' budgets of seeds 0 to 2; none until those have run."""
    means = {}
    for m, method in METHODS.items():
        got = [g.result(grid, Cell("forks", m, b, s), lines) for b in grid.budgets for s in range(3)]
        if method.buys and all(got):
            means[m] = sum(map(g.accuracy, got)) / len(got)
    return sorted(means, key=means.get, reverse=True)[:3]


def body(grid: Grid, lines: list[dict]) -> str:
    """The page's tables; draws the plots."""
    left_out = [m for m in METHODS if is_hopeless(grid, m, lines)]
    out = [f"{command.progress(grid, lines)} Left out by the rule: {', '.join(left_out) or 'none'}. "
           f"Finalists: {', '.join(finalists(grid, lines)) or 'not known yet'}."]  # fmt: skip
    shown = [*METHODS, "m_1"]
    near = [m for m in METHODS if METHODS[m].like == "omni_baseline"]
    for world in WORLDS:
        out += [f"## {world}", f"Base student: {page.base(grid, world, lines)}.",
                page.accuracy_table(grid, world, shown, lines),
                page.difference_table(grid, world, [m for m in shown if m != "sft"], "sft", lines),
                page.difference_table(grid, world, ["cont_peak", "omni", *near, "m_1", "opd"], "omni_baseline", lines),
                page.difference_table(grid, world, ["cont_fixed", "cont_uniform", "m_1", "opd"], "cont_peak", lines),
                f"What budget 1 bought in {world}:", page.bought_table(grid, world, shown, lines, 1.0)]  # fmt: skip
        if page.plot(grid, world, METHODS, lines):
            out.append(f"![accuracy against tokens bought and dollars]({grid.name}_{world}.png)")
    settings, small = ["omni_baseline", "omni_adaptive", *FRONTIER], [b for b in grid.budgets if b <= 1]
    out += ["## The frontier of OmniOPD (forks)", "M = 2, N = 4, C = 8 is `omni_baseline`.",
            page.accuracy_table(grid, "forks", settings, lines, small),
            page.difference_table(grid, "forks", settings[1:], "omni_baseline", lines, small),
            page.bought_table(grid, "forks", settings, lines, 1.0), "## Long runs"]  # fmt: skip
    for world in ("forks", "style"):
        out += [f"In {world}:", page.long_table(grid, world, LONG, lines)]
    out += ["## The sweeps (forks, validation split)",
            page.sweep_table(grid, [m for m, method in METHODS.items() if not method.like], lines)]  # fmt: skip
    return "\n\n".join(out)


GRID = Grid(
    "equal_cost", WORLDS, METHODS | FRONTIER | LONG, recipe,
    unit=64_000, budgets=(0.25, 0.5, 1.0, 4.0), swept=(0.25, 0.5, 1.0),
    rates=(2e-4, 8e-4, 5e-5), swept_in="forks", price=listed_price("claude-haiku-4-5"), plan=plan, body=body,
)  # fmt: skip
