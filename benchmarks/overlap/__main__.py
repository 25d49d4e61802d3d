"""Does the teacher's time hide behind the device's? Step time over the bound of perfect scheduling of the same
latencies.

    python -m benchmarks.overlap [--scale 10] [--steps 3] [--quick]

The loop's own `begin` and `finish` with the real scheduler, audit, traffic, order, budget and journal; two things are
simulated: the provider answers after a latency drawn for each call (lognormal, median 2 s, p95 6 s), and the jitted
passes sleep. All
times run `--scale` times faster and are printed as seconds of the real thing, so the host's own work weighs that much
more here than it would. Fixed: rows, M, N, groups and concurrency as in FIXED; one call brings all N texts of a chunk.

The bound is an event simulation that knows every latency before it starts: whenever one of the calls in flight ends,
the response with the longest rest goes next, no host work costs anything, and it may not break what the run may not
break: a group is audited after it was sampled, prefixes of a response one after the other where `ascending`, the update
after the last answer, and with staleness 1 step t's update before step t + 2 is sampled. `strict` is a true lower bound
(longest chain and total work, on-policy only): no schedule reaches it in general.

Device time is given as a multiple of the teacher's (the time its calls need with nothing else going on): 60% sampling,
15% scoring, 25% update. With staleness 1 a batch is scored a second time by the policy that learns from it.
"""

import argparse
import asyncio
import dataclasses
import functools
import heapq
import itertools
import json
import pathlib
import tempfile
import time
import unittest.mock

import jax
import numpy as np

from omniopd_jax import (
    audit,
    config,
    experience,
    hf,
    model,
    objective,
    rollout,
    similarity,
    step,
    teachers,
    train,
    vocab,
)
from omniopd_jax.data import prompts as data
from omniopd_jax.hf.template import of_student
from omniopd_jax.parallel import sharding
from omniopd_jax.run import host, logging, setup
from omniopd_jax.run.state import TrainState
from omniopd_jax.staleness import Ahead
from omniopd_jax.teachers import wire
from omniopd_jax.teachers.remote import RemoteTeacher

FIXED = {
    "prompts_per_step": 16,
    "num_generations": 4,
    "rollout.parts": 4,
    "max_completion_length": 64,
    "max_prompt_length": 160,
    "audit.num_chunks": 4,
    "audit.chunk_tokens": 8,
    "audit.num_continuations": 4,
    "teacher.max_concurrency": 8,
}
MEDIAN_S, P95_S = 2.0, 6.0
SHARES = {"rollout": 0.6, "score": 0.15, "update": 0.25}
WORLD = "omniopd_jax/world/checkpoints/forks"


def latency(seed: int) -> float:
    """Seconds of the call that carries this seed."""
    sigma = np.log(P95_S / MEDIAN_S) / 1.6448536
    return float(np.random.default_rng(seed).lognormal(np.log(MEDIAN_S), sigma))


class SlowClient:
    """A provider's client whose only property is its latency."""

    provider, model, url, takes_seed = "simulated", "slow", "http://127.0.0.1:9", True
    self_hosted, official = True, False
    most_texts = 128  # a call

    def __init__(self, scale: float):
        self.scale, self.seen = scale, wire.Learner(takes_n=True)

    def check_settings(self):
        """No key."""

    async def open(self):
        """Nothing to connect to."""

    async def close(self):
        """Nothing to close."""

    def learn(self, error, call) -> bool:
        """Nothing is refused."""
        return False

    def max_input_tokens(self, call) -> int:
        """An upper bound of what a call sends."""
        return call.max_input_tokens()

    async def call(self, call: wire.Call) -> wire.Reply:
        """n texts, after their time."""
        await asyncio.sleep(latency(call.seed) / self.scale)
        texts = tuple(wire.Text(f"text {i} of {call.seed}", "length") for i in range(call.n))
        return wire.Reply(texts, billed=wire.Billed(100, 8 * call.n))


@dataclasses.dataclass
class Case:
    """One line of the table: device seconds a step (real ones), and what the run did."""

    device_s: float
    order: str
    staleness: int
    scale: float
    plans: dict = dataclasses.field(default_factory=dict)  # step -> groups -> responses -> latencies, ascending
    phases: dict = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


def measure(case: Case, steps: int, folder: str) -> None:
    """Runs `steps` steps of the loop's `begin` and `finish` and fills in the case."""
    cfg = config.default()
    cfg.update_from_flattened_dict(FIXED)
    cfg.update_from_flattened_dict(
        {
            "run_dir": folder, "num_steps": steps, "max_staleness": case.staleness, "student.path": f"{WORLD}/student",
            "data.name": "forks", "data.num_prompts": 256, "teacher.prefix_order": case.order, "teacher.model": "slow",
            "teacher.provider": "openai", "teacher.base_url": SlowClient.url, "teacher.continuation": "prefill",
            "teacher.replay": "off",
        }
    )  # fmt: skip
    run = fake_run(cfg, SlowClient(case.scale))
    state = TrainState(None, None, None, None)
    seconds = {k: case.device_s * share / case.scale for k, share in SHARES.items()}
    groups = cfg.rollout.parts

    count = itertools.count()

    def sample(params, drawn, student, key, cfg):
        for part in np.array_split(np.arange(cfg.prompts_per_step * cfg.num_generations), groups):
            time.sleep(seconds["rollout"] / groups)
            yield canned(student, drawn, cfg, part)

    def score(passes, policy, responses, student, cfg):
        rows = len(responses.tokens)
        time.sleep(seconds["score"] * rows / (cfg.prompts_per_step * cfg.num_generations))
        return scores(rows, cfg, student.mesh)

    def ask(*args, **kwargs):
        asked = real_ask(*args, **kwargs)
        chains = {}
        for a in asked[0].audits:
            chains.setdefault(a.row, []).append(latency(a.request.seed(0)))
        case.plans.setdefault(next(count) // groups, []).append(list(chains.values()))
        return asked

    real_ask = experience.ask
    patch = unittest.mock.patch.object
    with (
        patch(experience, "sample", sample), patch(experience, "score", score), patch(experience, "ask", ask),
        patch(rollout, "prepare", lambda *_, **how: None), patch(step, "policy", lambda *_: None),
    ):  # fmt: skip
        warm(run)
        begun = time.perf_counter()
        for t in range(steps):
            begin = functools.partial(train.begin, run, state)
            train.finish(run, state, *run.ahead.take(t, steps - 1, case.staleness, begin))
            with run.timer.phase("update"):
                time.sleep(seconds["update"])
        case.seconds = (time.perf_counter() - begun) * case.scale
    case.phases = {k: v * case.scale / steps for k, v in run.timer.total.items()}
    run.thread.submit(run.teacher.close()).result()
    run.thread.close()


def fake_run(cfg, client) -> setup.Run:
    """A run without a model: its passes are replaced by sleeps."""
    tokenizer = hf.load_tokenizer(cfg.student.path)
    prompts = data.load(cfg, source="world", split="train", path="", count=cfg.data.num_prompts)
    mesh = sharding.make_mesh(cfg.mesh)
    template = of_student(cfg, tokenizer)
    student = experience.Student(None, model.Compute(mesh=mesh), template, audit.Decoder(tokenizer), ())
    return setup.Run(
        cfg,
        student,
        data.encode(prompts, template, cfg),
        None,
        RemoteTeacher(cfg, client),
        similarity.make(cfg),
        None,
        None,
        None,
        None,
        host.AsyncThread(),
        host.StopFlag(),
        [0],
        Ahead(),
        logging.PhaseTimer(),
        None,
        None,
        {},
    )


def canned(student, drawn, cfg, place_B) -> experience.Responses:
    """Full-length responses, all alike: who asks differs by the sample id."""
    T, G, names = cfg.max_completion_length, cfg.num_generations, sum(drawn.sample_ids, [])
    ids = (student.template.tokenizer("She adds 3 and 4 apples to nine pears. ")["input_ids"] * T)[:T]
    prompts, rows = [drawn.prompts[b // G] for b in place_B], len(place_B)
    own = [names[b] for b in place_B]
    return experience.Responses(
        prompts, own, [ids] * rows, np.ones(rows, bool), np.zeros((rows, T), np.float32), place_B
    )  # fmt: skip


def scores(rows: int, cfg, mesh) -> experience.Scores:
    """Random entropies, so that peaks fall anywhere."""
    shape = (rows, cfg.max_completion_length)
    logp_BT, entropy_BT = np.full(shape, -1.0, np.float32), np.random.default_rng(rows).random(shape, np.float32)
    stats = vocab.TokenStats(*sharding.put_rows((logp_BT, entropy_BT), mesh))
    return experience.Scores(logp_BT, entropy_BT, None, stats)


def warm(run) -> None:
    """Compiles and imports outside the clock."""
    cfg, student = run.cfg, run.student
    drawn = experience.draw(run.prompts, cfg, 0)
    rows = cfg.prompts_per_step * cfg.num_generations // cfg.rollout.parts
    responses = canned(student, drawn, cfg, np.arange(rows))
    experience.peaks(scores(rows, cfg, student.mesh), responses, student, cfg, cfg.audit.num_chunks)
    run.similarity(["a"], ["b"])
    if cfg.max_staleness:
        objective.chunk_ratio(
            *jax.device_put((np.zeros((4 * rows, 64), np.float32),) * 2),
            np.zeros((4 * rows, cfg.audit.num_chunks), np.int32),
            chunk_tokens=cfg.audit.chunk_tokens,
        )


class Perfect:
    """The event simulation: `concurrency` calls at a time, every latency known, the longest rest first."""

    def __init__(self, concurrency: int, ascending: bool):
        self.free, self.ascending, self.now = concurrency, ascending, 0.0
        self.ready, self.running, self.left = [], [], {}

    def release(self, batch: int, chains) -> None:
        """A group's calls may go from now on."""
        for chain in chains:
            parts = [chain] if self.ascending else [[s] for s in chain]
            self.left[batch] = self.left.get(batch, 0) + len(chain)
            for part in parts:
                heapq.heappush(self.ready, (batch, -sum(part), len(self.ready) + 1e6 * self.now, part))
        self._start()

    def _start(self):
        while self.free and self.ready:
            batch, _, tie, chain = heapq.heappop(self.ready)
            heapq.heappush(self.running, (self.now + chain[0], batch, tie, chain[1:]))
            self.free -= 1

    def until(self, when: float = float("inf"), batch: int | None = None) -> float:
        """Goes on to the time `when`, or until all calls of `batch` have ended; returns the time."""
        while self.running and self.running[0][0] <= when and not (batch is not None and not self.left.get(batch)):
            self.now, ended, tie, rest = heapq.heappop(self.running)
            self.free, self.left[ended] = self.free + 1, self.left[ended] - 1
            if rest:
                heapq.heappush(self.ready, (ended, -sum(rest), tie, rest))
            self._start()
        if batch is None and when < float("inf"):
            self.now = max(self.now, when)
        return self.now


def bound(case: Case, steps: int) -> float:
    """Seconds that `steps` steps take under perfect scheduling."""
    concurrency, groups = FIXED["teacher.max_concurrency"], FIXED["rollout.parts"]
    part = {k: case.device_s * share for k, share in SHARES.items()}
    sim, clock, begun = Perfect(concurrency, case.order == "ascending"), 0.0, 0
    for t in range(steps):
        while begun < min(steps, t + 1 + case.staleness):
            for chains in case.plans[begun]:
                clock += (part["rollout"] + part["score"]) / groups
                sim.until(clock)
                sim.release(begun, chains)
            begun += 1
        clock = max(clock, sim.until(batch=t))
        clock += part["update"] + (part["score"] if case.staleness else 0.0)
    return clock


def strict_bound(case: Case, steps: int) -> float:
    """A time that no schedule beats, on-policy: from each group on, its longest chain and all work over the slots."""
    concurrency, groups = FIXED["teacher.max_concurrency"], FIXED["rollout.parts"]
    sampled = case.device_s * (SHARES["rollout"] + SHARES["score"])
    total = 0.0
    for t in range(steps):
        ends = []
        for g in range(groups):
            late = [chain for group in case.plans[t][g:] for chain in group]
            longest = max(sum(c) if case.order == "ascending" else max(c) for c in late)
            ends.append(sampled * (g + 1) / groups + max(longest, sum(map(sum, late)) / concurrency))
        total += max(ends) + case.device_s * SHARES["update"]
    return total


def teacher_time(order: str) -> float:
    """Seconds that the calls of a step need by themselves, the mean over steps like those of the benchmark."""
    rows, M = FIXED["prompts_per_step"] * FIXED["num_generations"], FIXED["audit.num_chunks"]
    times = []
    for t in range(8):
        sim = Perfect(FIXED["teacher.max_concurrency"], order == "ascending")
        draw = [[latency(teachers.stable_hash(t, b, m) & 0x7FFFFFFF) for m in range(M)] for b in range(rows)]
        sim.release(0, draw)
        times.append(sim.until(batch=0))
    return float(np.mean(times))


def main():
    """Runs every case and prints the table; one JSON line a case with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one case: device time 1, ascending, both stalenesses")
    parser.add_argument("--json", default="", help="append the lines to this file")
    args = parser.parse_args()
    print(json.dumps(FIXED | {"median_s": MEDIAN_S, "p95_s": P95_S, "scale": args.scale, "steps": args.steps}))
    print("| device / teacher | order | staleness | s a step | bound | ratio | ratio to strict | phases, s a step |")
    print("| --- " * 8 + "|")
    multiples, orders = ((1.0,), ("ascending",)) if args.quick else ((0.5, 1.0, 2.0), ("ascending", "free"))
    worst = 0.0
    for multiple in multiples:
        for order in orders:
            for staleness in (0, 1):
                case = Case(multiple * teacher_time(order), order, staleness, args.scale)
                with tempfile.TemporaryDirectory() as folder:
                    measure(case, args.steps, folder)
                least = bound(case, args.steps)
                strict = f"{case.seconds / strict_bound(case, args.steps):.3f}" if not staleness else ""
                worst = max(worst, case.seconds / least)
                phases = ", ".join(f"{k} {v:.1f}" for k, v in case.phases.items())
                row = (
                    f"{multiple:g}", order, staleness, f"{case.seconds / args.steps:.1f}", f"{least / args.steps:.1f}",
                    f"{case.seconds / least:.3f}", strict, phases,
                )  # fmt: skip
                print("| " + " | ".join(map(str, row)) + " |", flush=True)
                if args.json:
                    line = {
                        "device": multiple,
                        "order": order,
                        "staleness": staleness,
                        "seconds": case.seconds,
                        "bound": least,
                    }
                    with pathlib.Path(args.json).open("a") as file:
                        file.write(
                            json.dumps(line | {"phases": case.phases, "steps": args.steps, "scale": args.scale}) + "\n"
                        )
    print(f"worst ratio {worst:.3f}")


if __name__ == "__main__":
    main()
