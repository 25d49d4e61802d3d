"""`make real`: a real student learns from a real server's texts, and a table says what came of it.

    python -m benchmarks.real [--config.KEY=VALUE ...]     # settings go to the main command

Makes what is missing (prepare.py), serves the teacher with vLLM on a free port of 127.0.0.1, runs configs/smollm2.py
against it, stops the server. A run that was stopped goes on; of one that is done the table is printed again.
"""

import subprocess
import sys
import time

from ml_collections import config_flags

from benchmarks.real import accuracy, prepare, server
from omniopd_jax.errors import one_of
from omniopd_jax.run import cli

RECIPE = "configs/smollm2.py"
_CONFIG = config_flags.DEFINE_config_file("config", RECIPE, "the recipe")


def main(_) -> int:
    """Makes what is missing, runs, prints the table; returns the main command's exit code."""
    started, cfg = time.time(), _CONFIG.value
    prepare.server_environment()
    prepare.student(), prepare.data()
    teacher = prepare.TEACHERS[one_of(cfg.teacher.model, prepare.TEACHERS, "teacher.model")]()
    code = 0
    if cfg.num_steps not in accuracy.evaluations(cfg.run_dir):
        print("== real: starting vLLM with the teacher (1 to 2 minutes)", flush=True)
        with server.ended_by_signals(), server.vllm(teacher, name=cfg.teacher.model) as vllm:
            print(f"== real: the teacher answers at {vllm.url} after {time.time() - started:.0f} s", flush=True)
            url = f"--config.teacher.base_url={vllm.url}"
            code = subprocess.run([sys.executable, "-m", "omniopd_jax.main", *_for_main(), url]).returncode
    print(
        f"== real: {(time.time() - started) / 60:.1f} minutes\n{accuracy.table(cfg.run_dir, cfg.num_steps)}", flush=True
    )
    return code


def _for_main() -> list[str]:
    """The command line's settings, with the recipe where it names none."""
    given = sys.argv[1:]
    return given if any(a.startswith("--config=") for a in given) else [f"--config={RECIPE}", *given]


if __name__ == "__main__":
    cli.run(main)
