"""A grid of runs at equal cost: what a cell is, which learning rate it takes, which cells are missing, and one run.

Nothing here knows a model or a task: they are a `Grid`'s. A budget is counted in the teacher's
tokens, in and out, and imposed by the number of updates: a step of every method buys about as much (its number of
prompts is chosen so), the learning rate is constant, and so a run that has reached one budget goes on to the next from
its checkpoint, and a smaller budget's result is exactly that of a run that had been stopped there.
"""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable

from benchmarks import sides
from omniopd_jax import objective, train
from omniopd_jax.errors import UserError
from omniopd_jax.run import files
from omniopd_jax.teachers import probe
from omniopd_jax.teachers.journal import Journal
from omniopd_jax.teachers.prices import Price

VALIDATION, TEST = "validation", "test"
BOUGHT = ("tokens_in", "tokens_out", "calls")
SWEEP_SEED = 100  # no seed of the tables
HOPELESS = 0.2  # a rate of a sweep this far behind its method's best at a budget is not taken to the next


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to learn, in a grid.

    Attributes:
      about: one line for the table.
      overrides: of the grid's recipe.
      prompts: of a step; what makes a step of each method cost about the same.
      step_tokens: teacher tokens, in and out, that a step buys, as measured; of a method that buys none those of
        `like`, which samples as many of the student's tokens. in_world: where a world differs.
      texts: texts of one call at most: a service that returns one a call is sent the input as often.
      like: the method whose swept rate it takes; "": its own.
      buys: whether it asks a text teacher for anything.
      updates: a long run of so many, whatever it buys; 0: as many as the budget pays for.
    """

    about: str
    overrides: dict
    prompts: int
    step_tokens: float
    texts: int = 1
    like: str = ""
    buys: bool = True
    updates: int = 0
    in_world: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One result that is wanted: after the updates that `budget` pays for; a rate makes it a cell of a sweep."""

    world: str
    method: str
    budget: float
    seed: int
    rate: float | None = None

    @property
    def split(self) -> str:
        """The problems that it is measured on."""
        return TEST if self.rate is None else VALIDATION


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is run, and where its lines are.

    Attributes:
      name: docs/results/NAME.jsonl and NAME.md; what its command is called.
      worlds: tasks, or teachers of one task; the first is the command's default.
      recipe: (world, method, seed) -> config with everything but the learning rate, the length and the folder.
      unit: teacher tokens of budget 1.
      budgets: in units, ascending. swept: those that rates are tried at; a larger one takes the last's.
      swept_in: the world of the sweeps; the others take its rates.
      plan: (grid, lines) -> every cell that is wanted, in order. body: (grid, lines) -> the page's tables.
      at_run: cell -> settings that only a run knows, the address of a server that it started say.
      measured: (run folder, its config, updates) -> what else is known of the student after so many; a line holds
        each as [before the first update, after the last].
      one_student: the worlds train one student on one test split: it is evaluated before the first update of one run.
      beside: the name of an eval set of every run: a rate is chosen by the accuracy on it, and the sweep's runs, of
        `sweep_seed`, are those of the test split's table too. "": a sweep has runs of its own.
    """

    name: str
    worlds: tuple[str, ...]
    methods: dict[str, Method]
    recipe: Callable
    unit: float
    budgets: tuple[float, ...]
    swept: tuple[float, ...]
    rates: tuple[float, ...]
    swept_in: str
    price: Price
    plan: Callable = lambda grid, lines: []
    body: Callable = lambda grid, lines: ""
    at_run: Callable = lambda cell: {}
    measured: Callable = lambda folder, cfg, updates: {}
    one_student: bool = False
    beside: str = ""
    sweep_seed: int = SWEEP_SEED

    def lines(self) -> list[dict]:
        """Those so far."""
        return sides.read(self.name)

    def updates(self, cell: Cell) -> int:
        """Updates that a cell's budget pays for; at least 1."""
        method = self.methods[cell.method]
        cost = method.in_world.get(cell.world, method.step_tokens)
        return method.updates or max(1, round(cell.budget * self.unit / cost))

    def command(self, cell: Cell) -> str:
        """What runs the cell again."""
        rate = "" if cell.rate is None else f" --rate={cell.rate:g}"
        where = f"--world={cell.world} --method={cell.method} --budget={cell.budget:g} --seed={cell.seed}{rate}"
        return f"python -m benchmarks.{self.name} {where} --again"


def of(lines: list[dict], split: str = TEST, **wanted) -> list[dict]:
    """The lines of a split that agree with what is wanted; of a run that was made twice the last."""
    found = [r for r in lines if r["split"] == split and all(r[k] == v for k, v in wanted.items())]
    return list({(r["world"], r["method"], r["budget"], r["seed"], r["learning_rate"]): r for r in found}.values())


def accuracy(line: dict) -> float:
    """Of a line's problems."""
    return sum(bits(line)) / line["problems"] if "right" in line else line["accuracy"]


def bits(line: dict, key: str = "right") -> list[int]:
    """1 for each problem that was answered right, in the order of the split."""
    return [int(b) for b in f"{int(line[key], 16):0{line['problems']}b}"]


def as_hex(right: list[bool]) -> str:
    """The inverse of `bits`."""
    return f"{int(''.join('1' if r else '0' for r in right), 2):x}"


def swept(grid: Grid, method: str, budget: float, lines: list[dict]) -> dict[float, float]:
    """{rate: accuracy on the validation split} of a method at a budget, or at the largest swept one below it."""
    name = grid.methods[method].like or method
    at = max((b for b in grid.swept if b <= budget), default=grid.swept[-1])
    found = of(lines, VALIDATION, world=grid.swept_in, method=name, budget=at)
    return {r["learning_rate"]: accuracy(r) for r in found}


def rate(grid: Grid, method: str, budget: float, lines: list[dict]) -> float | None:
    """The best rate of the sweep, the lower one of equals; None where the sweep is not whole."""
    if any(is_wanted(grid, cell, lines) for cell in sweep(grid, grid.methods[method].like or method)):
        return None
    known = swept(grid, method, budget, lines)
    return max(sorted(known), key=known.get) if known else None


def sweep(grid: Grid, method: str) -> list[Cell]:
    """The cells of a method's sweep: each rate through the budgets."""
    return [Cell(grid.swept_in, method, b, grid.sweep_seed, r) for r in grid.rates for b in grid.swept]


def is_wanted(grid: Grid, cell: Cell, lines: list[dict]) -> bool:
    """Whether a cell of a sweep has no line yet, and its rate was not hopeless at the budget before."""
    if of(lines, VALIDATION, world=cell.world, method=cell.method, budget=cell.budget, learning_rate=cell.rate):
        return False
    begun = [b for b in grid.swept if b < cell.budget][-1:]
    known = [cell.rate in swept(grid, cell.method, b, lines) for b in begun]
    return all(known) and not is_hopeless(grid, cell, lines)


def is_hopeless(grid: Grid, cell: Cell, lines: list[dict]) -> bool:
    """Whether a cell of a sweep is left out, since its rate was hopeless at a smaller budget."""
    known = [swept(grid, cell.method, b, lines) for b in grid.swept if b < cell.budget]
    return any(cell.rate in k and k[cell.rate] <= max(k.values()) - HOPELESS for k in known)


def result(grid: Grid, cell: Cell, lines: list[dict]) -> dict | None:
    """The line of a cell, at the rate that it takes; None where it has not run."""
    value = cell.rate if cell.rate is not None else rate(grid, cell.method, cell.budget, lines)
    wanted = {"world": cell.world, "method": cell.method, "budget": cell.budget, "seed": cell.seed}
    found = of(lines, cell.split, learning_rate=value, **wanted)
    return found[-1] if found else None


def run(grid: Grid, cell: Cell, lines: list[dict], *, fresh: bool = False) -> list[dict]:
    """Trains the cell, from the checkpoint of a smaller budget where there is one, and returns its line; of a rate that
    is measured on both splits the line of each.

    Raises:
      UserError: its learning rate is not known yet; or the run was stopped inside a step and its journal is gone.
    """
    method = grid.methods[cell.method]
    value = cell.rate if cell.rate is not None else rate(grid, cell.method, cell.budget, lines)
    if value is None:
        known = f"python -m benchmarks.{grid.name} --list names the cells of its sweep"
        raise UserError(f"{cell.method}: its learning rates are not swept yet; {known}")
    cfg = grid.recipe(cell.world, method, cell.seed)
    split = TEST if grid.beside else cell.split
    cfg.num_steps, cfg.optimizer.learning_rate, cfg.eval.split = grid.updates(cell), value, split
    cfg.update_from_flattened_dict(grid.at_run(cell))
    name = f"{cell.world}-{cell.method}-{value:g}-{cell.seed}-{split}"
    folder = pathlib.Path(f"runs/{grid.name}{'-again' if fresh else ''}/{name}")
    begun = files.newest_step(folder) or 0
    if fresh or begun > cfg.num_steps:
        shutil.rmtree(folder, ignore_errors=True)
        begun = 0
    cfg.run_dir, cfg.checkpoint.every, cfg.checkpoint.keep = str(folder), min(100, cfg.num_steps), 1
    cfg.log.evaluation_answers = cfg.eval.num_prompts
    base = next(iter(of(lines, split)), None) if grid.one_student and not fresh else None
    cfg.eval.before = base is None
    wall, cpu = time.time(), time.process_time()
    out = train.train(cfg)
    if out["exit_code"]:  # a signal: the run goes on from its checkpoint when it is started again
        raise SystemExit(out["exit_code"])
    texts = read(folder / "evaluations.jsonl")
    count = cfg.eval.num_prompts
    ends = {"before": 0, "right": cfg.num_steps}
    answers = {key: [r["correct"] for r in texts if r["step"] == step][-count:] for key, step in ends.items()}
    right = {key: as_hex(got) for key, got in answers.items() if got}  # the last: a run cut off evaluates again
    after = grid.measured(folder, cfg, cfg.num_steps)
    before = {key: base[key][0] for key in after} if base else grid.measured(folder, cfg, 0)
    steps = read(folder / "metrics.jsonl")
    last, curve = steps[-1], {"curve": curve_of(steps, texts)} if cfg.eval.every else {}
    cost = bought(steps, folder) if method.buys else dict.fromkeys(BOUGHT, 0)
    tokens_in, tokens_out = cost["tokens_in"], cost["tokens_out"]
    which = {"world": cell.world, "method": cell.method, "budget": cell.budget, "seed": cell.seed,
             "learning_rate": value, "updates": out["step"]}  # fmt: skip
    line = which | {
        "split": split, "overrides": method.overrides, "prompts": cfg.prompts_per_step,
        "generations": cfg.num_generations, "problems": count, "before": right.get("before") or base["before"],
        "right": right["right"], "accuracy": round(out["accuracy_after"], 4),
        "student_tokens": out["student_tokens"] if objective.of(cfg).samples else 0,
        "usd": round(grid.price.cost(tokens_in, 0, tokens_out), 4),
        "usd_one_text_a_call": round(grid.price.cost(tokens_in * method.texts, 0, tokens_out), 4),
        "repeated": round(last["completions/repeated_fraction"], 4), "entropy": last.get("entropy"),
        "kl": last.get("anchor/kl_ref_to_student_exact"), "from_update": begun,
        "seconds": round(time.time() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1), "commit": commit(),
    } | cost | curve | {key: [before[key], after[key]] for key in after}  # fmt: skip
    if not grid.beside or cell.rate is None:
        return [line]
    return [which | {"split": VALIDATION, "accuracy": round(last[f"eval/accuracy/{grid.beside}"], 4)}, line]


def bought(steps: list[dict], folder: pathlib.Path) -> dict[str, int]:
    """What the steps of a run bought; the probe at each of its starts is no part of a method's cost.

    A run that was stopped inside a step bought texts that no step counts: then it is what its journal has.

    Raises:
      UserError: so it was, and its journal is gone.
    """
    if not any(s.get("teacher/replayed_fraction") for s in steps):
        return {key: round(sum(s[f"teacher/{key}"] for s in steps)) for key in BOUGHT}
    journal = Journal(folder / "journal", str(files.place(folder)))
    found = journal.spent(without=probe.WHO)
    journal.close()
    if not found.calls:
        raise UserError(
            f"{folder} was stopped inside a step, whose purchases its journal had, and that is gone: delete the folder "
            "and run the cell again"
        )
    return {key: getattr(found, key) for key in BOUGHT}


def curve_of(steps: list[dict], texts: list[dict]) -> list[dict]:
    """What a long run looked like at each evaluation: the step's metrics, and how well the answers compress."""
    names = {"accuracy": "eval/accuracy", "repeated": "completions/repeated_fraction", "entropy": "entropy",
             "kl": "anchor/kl_ref_to_student_exact", "length": "completions/mean_length"}  # fmt: skip
    out = []
    for line in (s for s in steps if s.get("eval/updates")):
        answers = [r["text"].encode() for r in texts if r["step"] == line["eval/updates"]]
        ratio = max(len(a) / len(zlib.compress(a)) for a in answers)
        found = {name: round(line[key], 4) for name, key in names.items() if line.get(key) is not None}
        out.append({"updates": line["eval/updates"], "zlib_most": round(ratio, 2)} | found)
    return out


def read(path: pathlib.Path) -> list[dict]:
    """A file of JSON lines."""
    return [json.loads(s) for s in path.read_text(encoding="utf-8").split("\n") if s]


def micro_batches(rows: int) -> int:
    """The fewest that divide a step's rows and hold at most 16 each: what fits a CPU's caches."""
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= 16)


def commit() -> str:
    """The checkout's."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
