"""Whole runs for the teachers' end-to-end tests: `python -m omniopd_jax.main` in a process of its own, quickly,
killable.

One process imports everything once and forks a run a request, so that a run costs its own seconds and not the imports'.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading

import tiny

from omniopd_jax import teachers
from omniopd_jax.run import checkpoint

_REQUESTS = """
import ml_collections.config_flags, openai, transformers
import omniopd_jax.train, orbax.checkpoint
from omniopd_jax import hf
from omniopd_jax.teachers import probe, remote
from omniopd_jax.teachers.wire import openai
hf.load_tokenizer("omniopd_jax/world/checkpoints/forks/student")  # transformers imports torch only now
for line in sys.stdin:
    args, env, out, err = json.loads(line)
    pid = fork(args, out, err, env)
    print(pid, flush=True)
    print(code_of(pid), flush=True)
"""


@dataclasses.dataclass
class Run:
    """A run under way, or ended (`code` is set; negative: killed by that signal)."""

    pid: int
    folder: pathlib.Path
    ended: threading.Thread
    code: int | None = None

    def wait(self, timeout: float = 240) -> "Run":
        """Until it has ended."""
        self.ended.join(timeout)
        assert self.code is not None, f"still running after {timeout} s\n{self.out[-2000:]}\n{self.err[-2000:]}"
        return self

    def kill(self, signal) -> None:
        """Sends a signal, if it still runs."""
        if self.code is None:
            os.kill(self.pid, signal)

    @property
    def out(self) -> str:
        """Its stdout so far."""
        return (self.folder / "run.out").read_text()

    @property
    def err(self) -> str:
        """Its stderr so far."""
        return (self.folder / "run.err").read_text()

    def metrics(self) -> list[dict]:
        """The steps written so far; a line that is being written is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def audits(self) -> list[dict]:
        """The audits written."""
        return tiny.lines(self.folder / "audits.jsonl")

    def params(self) -> dict:
        """Of the newest checkpoint."""
        return checkpoint.restore_params(self.folder)[0]


class Runner:
    """Starts runs, one at a time."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", tiny.FORK + _REQUESTS], cwd=tiny.REPO, env=tiny.environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, folder, settings: dict, *, env=None, args=()) -> Run:
        """Starts the main command on the small world in tiny sizes with these settings, dotted keys.

        `env`: variables of the run; None takes one away.
        """
        return self.begin(folder, SIZES | settings, env=env, args=args)

    def begin(self, folder, settings: dict, *, env=None, args=()) -> Run:
        """The same in the recipe's own sizes."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arguments = tiny.arguments({"run_dir": str(folder)} | settings) + list(args)
        request = [arguments, env or {}, str(folder / "run.out"), str(folder / "run.err")]
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        run = Run(int(self.process.stdout.readline()), folder, None)

        def wait():
            run.code = int(self.process.stdout.readline())

        run.ended = threading.Thread(target=wait, daemon=True)
        run.ended.start()
        return run

    def run(self, *args, **kwargs) -> Run:
        """Starts a run and waits for its end."""
        return self.start(*args, **kwargs).wait()

    def close(self) -> None:
        """Ends the process that forks."""
        self.process.stdin.close()
        self.process.wait(20)


SIZES = {
    "num_steps": 3,
    "prompts_per_step": 4,
    "num_generations": 2,
    "rollout.parts": 2,
    "max_completion_length": 32,
    "audit.num_chunks": 2,
    "audit.chunk_tokens": 6,
    "audit.num_continuations": 3,
    "audit.log_per_step": 1000,
    "data.num_prompts": 64,
    "eval.num_prompts": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 2,
    "log.tensorboard": False,
}


def wire(server, **more) -> dict:
    """Settings for a wire server that speaks OpenAI's protocol."""
    return {
        "teacher.provider": "openai", "teacher.model": "m", "teacher.base_url": server.url("openai"),
        "teacher.continuation": "continue_final_message", "teacher.timeout_s": 3.0, "teacher.deadline_s": 40.0,
    } | more  # fmt: skip


def seeds(audit: dict, n: int) -> list[int]:
    """What an audit's continuations send as `seed`: the server's log tells by it who asked."""
    return [teachers.stable_hash(audit["sample_id"], audit["peak"], i) & 0x7FFFFFFF for i in range(n)]


def answered(calls) -> dict[int, int]:
    """{seed: texts that went out whole} of the server's log; a call that was answered twice counts twice."""
    out = {}
    for entry in calls:
        if entry["texts"]:
            seed = entry["body"]["seed"]
            out[seed] = out.get(seed, 0) + len(entry["texts"])
    return out
