"""Evaluation: the loop's greedy accuracy, and the command that samples whole benchmarks.

    python -m omniopd_jax.evaluate --config=configs/math.py --checkpoint=runs/math --benchmarks=math500,aime24
    --samples=16

`--checkpoint` is a run (its newest checkpoint; without --config also the recipe), RUN/checkpoints/STEP or a Hugging
Face folder; without it the recipe's `student.path` is evaluated. Problems are asked as the loop's evaluation asks them:
`eval.suffix`. Benchmarks: data/benchmarks.py. `--out` (default: RUN_DIR/evaluate of the recipe) gets one JSON line per
completion, results.json and table.md; the same command goes on where an interrupted one was. One process.

Programs run in a sandbox (graders/code.py). Where the machine gives none, the command refuses before weights are read,
unless `--unsafe` says that they may run as you.
"""

from absl import flags
from ml_collections import config_flags

from omniopd_jax import config
from omniopd_jax.errors import UserError
from omniopd_jax.evaluation import runner, scores
from omniopd_jax.run import cli, logging, trained, validation


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "A recipe: configs/tiny.py, configs/math.py ...")
    flags.DEFINE_string("checkpoint", None, "RUN, RUN/checkpoints/STEP or a Hugging Face folder; default: student.path")
    flags.DEFINE_list("benchmarks", [], "names, files, world:NAME:SPLIT, rg:NAME (data/benchmarks.py)")
    flags.DEFINE_integer("samples", 16, "completions a problem")
    flags.DEFINE_float("temperature", None, "of the student's sampling; default: the recipe's")
    flags.DEFINE_float("top_p", None, "default: the recipe's")
    flags.DEFINE_integer("top_k", None, "0 = off; default: the recipe's")
    flags.DEFINE_integer("max_new_tokens", None, "default: the recipe's max_completion_length")
    flags.DEFINE_integer("limit", 0, "the first N problems of each benchmark; 0 = all")
    flags.DEFINE_integer("rows", 512, "completions written at once")
    flags.DEFINE_integer("slots", 0, "completions decoded at a time; 0 = what the cache's memory holds")
    flags.DEFINE_integer("seed", None, "of the sampling; default: the recipe's")
    flags.DEFINE_bool("unsafe", False, "run graded programs as you, without the sandbox")
    flags.DEFINE_string("out", None, "folder of the results; default: evaluate in the recipe's run_dir")


def main(argv) -> int:
    """Evaluates; returns the exit code: 0 done, 2 a wrong setting."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; use --config=RECIPE --benchmarks=NAMES")
    given = flags.FLAGS.flag_values_dict()
    cfg = given["config"] or trained.recipe(given["checkpoint"])
    if cfg is None or not given["benchmarks"]:
        raise UserError(
            "--benchmarks and --config, or a run as --checkpoint, are needed, e.g. --config=configs/math.py "
            "--benchmarks=math500,aime24"
        )

    validation.check_values(cfg, validation.EVALUATED)
    if given["limit"] < 0:
        raise UserError(f"--limit = {given['limit']} must be at least 0")

    def default(name, value):
        return value if given[name] is None else given[name]

    how = runner.How(
        given["samples"], default("temperature", cfg.temperature), default("top_p", cfg.top_p),
        default("max_new_tokens", cfg.max_completion_length), default("seed", cfg.seed), given["rows"], given["slots"],
        default("top_k", cfg.top_k),
    )  # fmt: skip
    out = given["out"] or config.local_folder(cfg) / "evaluate"
    cli.setup_jax(cfg.compute_dtype)
    results = runner.run(
        cfg, how, checkpoint=given["checkpoint"], benchmarks=given["benchmarks"], limit=given["limit"], out=out,
        unsafe=given["unsafe"],
    )  # fmt: skip
    logging.say(
        f"each problem is followed by eval.suffix = {cfg.eval.suffix!r}" if cfg.eval.suffix else "problems as they are"
    )
    logging.say(f"{scores.table(results)}\n\nwritten to {out}")
    return 0


if __name__ == "__main__":
    _define_flags()  # here, not on import: other commands have a --checkpoint too
    cli.run(main)
