"""A whole step of the small world with a teacher that takes 2 s a call: does its time hide behind the device's?

    python -m benchmarks.overlap.streaming [--rounds 3]      # lines in docs/results/streaming.jsonl, and a table

Nothing of the student is simulated: it samples answers of varied lengths, is scored and updated. The teacher's texts
are made up; each call takes its time. Three runs of the same step:

    device     the teacher answers at once: what the device and the host need by themselves
    teacher    the same requests as one batch, sent to the teacher alone: the path that it needs by itself
    step       both, as the loop runs them with `rollout.parts`

The claim: a step takes at most 1.1 of the longer of the first two. What no schedule saves while the policy that
samples is the one that is updated: nothing is asked before the first part has ended, and the update follows the last
answer. The bound is the teacher's path with these two, taken from the first side, or that side itself if it is longer.
"""

import argparse
import asyncio
import dataclasses
import tempfile
import time

import jax

from benchmarks import sides
from omniopd_jax import audit, config, step, train
from omniopd_jax.run import host, setup
from omniopd_jax.teachers.protocol import Continuation, ContinuationResult, Counts, Teacher, Usage

WORLD = "omniopd_jax/world/checkpoints/forks"
CASES = (  # calls at a time, and parts
    {"concurrency": 64, "parts": 8},
    {"concurrency": 256, "parts": 8},
    {"concurrency": 64, "parts": 16},
    {"concurrency": 64, "parts": 1},
)
SECONDS = 2.0


class Slow(Teacher):
    """Answers after `seconds`, at most `concurrency` requests at a time; a response's prefixes one after the other."""

    foreign_tokenizer = False

    def __init__(self, concurrency: int, seconds: float):
        self.seconds, self.places, self.counts = seconds, asyncio.Semaphore(concurrency), Counts()
        self.first = self.last = 0.0  # when it was asked first, and when it answered last

    async def check(self) -> str:
        """Nothing to check."""
        return "slow"

    async def continue_text(self, request) -> ContinuationResult:
        """The same text each time, after its time."""
        self.first = self.first or time.perf_counter()
        async with self.places:
            await asyncio.sleep(self.seconds)
        self.last = time.perf_counter()
        texts = tuple(Continuation(i, " 3 and 4 is 7", "length") for i in request.indices)
        return self.counts.add(ContinuationResult(texts, (), Usage(calls=1), self.seconds))

    def metrics(self) -> dict[str, float]:
        """Of the step."""
        return self.counts.take()

    async def close(self) -> None:
        """Nothing to close."""


def recipe(case: dict, folder: str):
    """512 answers of the small world's student, sampled 64 at a time."""
    c = config.default()
    c.update_from_flattened_dict({
        "run_dir": folder, "student.path": f"{WORLD}/student", "teacher.model": f"{WORLD}/teacher",
        "data.name": "forks", "prompts_per_step": 128, "num_generations": 4, "max_prompt_length": 64,
        "max_completion_length": 96,
        "audit.num_chunks": 2, "audit.chunk_tokens": 8, "audit.num_continuations": 4, "rollout.slots": 64,
        "rollout.parts": case["parts"], "eval.num_prompts": 0, "num_steps": 100, "model.remat": "none",
    })  # fmt: skip
    return c


def one_step(run, state, teacher):
    """A step with this teacher: (seconds, of these before it was asked and after it answered, its audits)."""
    run = dataclasses.replace(run, teacher=teacher)
    begun = time.perf_counter()
    group, N = train.begin(run, state, 0)
    got = train.finish(run, state, group, N)
    state, *_ = run.steps.train_step(state, run.reference, got.batch, got.stats, None)
    jax.block_until_ready(state.step)
    end = time.perf_counter()
    audits = [a for asked in group.asked for a in asked.audits]
    return end - begun, teacher.first - begun + end - teacher.last, audits


def measure(case: dict, rounds: int) -> dict:
    """Seconds of each side, a list over rounds."""
    out = {"device": [], "around": [], "teacher": [], "step": []}
    with tempfile.TemporaryDirectory() as folder, host.StopFlag() as stop:
        cfg = recipe(case, folder)
        with setup.prepared(cfg, stop, [0]) as run:
            key = jax.random.key(cfg.seed)

            def fresh():
                return step.create_state(setup.first_params(run, key), setup.frozen(cfg), run.steps, key)

            one_step(run, fresh(), Slow(10_000, 0.0))  # compiles
            for _ in range(rounds):
                seconds, around, audits = one_step(run, fresh(), Slow(10_000, 0.0))
                out["device"].append(seconds)
                out["around"].append(around)
                alone = Slow(case["concurrency"], SECONDS)
                begun = time.perf_counter()
                run.thread.submit(audit.ask(alone, audits)).result()
                out["teacher"].append(time.perf_counter() - begun)
                out["step"].append(one_step(run, fresh(), Slow(case["concurrency"], SECONDS))[0])
            times = {name: [round(s, 2) for s in seconds] for name, seconds in out.items()}
            return case | {"calls": len(audits), "seed": cfg.seed, "times": times}


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="of what is there")
    args = parser.parse_args()
    done = {(line["concurrency"], line["parts"]) for line in sides.read("streaming")}
    for case in () if args.table else CASES:
        if (case["concurrency"], case["parts"]) not in done:
            sides.append("streaming", measure(case, args.rounds))
    rows = []
    for line in sides.read("streaming"):
        took = {name: sides.median(seconds) for name, seconds in line["times"].items()}
        longer, bound = max(took["device"], took["teacher"]), ""
        if "around" in took:  # the first lines were measured without it
            bound = max(took["device"], took["teacher"] + took["around"])
        seconds = [f"{s:.1f}" if s else "" for s in (took["device"], took["teacher"], bound, took["step"])]
        shares = f"{took['step'] / longer:.2f}", f"{took['step'] / bound:.2f}" if bound else ""
        rows.append((line["calls"], line["concurrency"], line["parts"], *seconds, *shares))
    head = ["calls", "at a time", "parts", "device s", "teacher s", "bound s", "step s", "of the longer", "of bound"]
    print(sides.table(head, rows))


if __name__ == "__main__":
    main()
