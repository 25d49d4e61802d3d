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
_CONFIG = config_flags.DEFINE_config_file("config", None, "the recipe")


def main(_) -> int:
    """Makes what is missing, runs, prints the table; returns the main command's exit code."""
    started, cfg = time.time(), _CONFIG.value
    prepare.server_environment()
    prepare.student()
    prepare.data()
    teacher = prepare.TEACHERS[one_of(cfg.teacher.model, prepare.TEACHERS, "teacher.model")]()
    code = 0
    if cfg.num_steps not in accuracy.evaluations(cfg.run_dir):
        print("== real: starting vLLM with the teacher (1 to 2 minutes)", flush=True)
        with server.ended_by_signals(), server.vllm(teacher, name=cfg.teacher.model) as vllm:
            print(f"== real: the teacher answers at {vllm.url} after {time.time() - started:.0f} s", flush=True)
            url = f"--config.teacher.base_url={vllm.url}"
            code = _run([sys.executable, "-m", "omniopd_jax.main", *sys.argv[1:], url])
    print(
        f"== real: {(time.time() - started) / 60:.1f} minutes\n{accuracy.table(cfg.run_dir, cfg.num_steps)}", flush=True
    )
    return code


def _run(command: list[str]) -> int:
    """Its exit code. A signal to this process is handed on, so that the run saves before the server goes."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


if __name__ == "__main__":
    if not any(argument.startswith("--config=") for argument in sys.argv):
        sys.argv.insert(1, f"--config={RECIPE}")  # for the parser here, and for the main command
    cli.run(main)
