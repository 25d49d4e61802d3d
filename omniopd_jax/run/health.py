"""Health checks of a run: pure functions from its metrics and texts to findings that say what was seen and what to do.

The thresholds come from the traps of the method (docs/method.md) and from runs of the small world, whose default
recipes trip none of them. A check that lacks its metric says nothing: a missing figure is no finding.
"""

import dataclasses
import math
import zlib

import numpy as np

WINDOW = 10  # steps that a check looks back
FIRST = 3  # steps that "at the start" means
MIN_AUDITS = 100  # in the window, before texts of audits are judged
FEW_AUDITS = 20  # of one process's records, however many there are
MIN_SPREAD = 0.03  # standard deviation of pi_hat; weights between 0.23 and 0.29 have 0.02
MIN_LIFT = 0.02  # similarity above that of shuffled pairs
MIN_MIDBAND = 0.02  # share of chunks that the teacher's samples neither all match nor all miss
MAX_RESTARTS = 0.1  # share of continuations that start over or announce themselves
ENTROPY_LEFT = 0.25  # of the entropy at the start
MIN_PEAK_ENTROPY = 0.02  # nats at the chosen peaks
MAX_KL = 0.2  # nats per token, exact KL(ref || student), without its coefficient
FEW_AUDITED = 0.2  # share of an answer's tokens; below it the anchor holds more than four times what learns
MIN_MOVED = 0.01  # nats per token of the same KL after PROGRESS_STEPS steps
MAX_REPEATED = 0.2  # share of repeated 4-grams
MAX_ZLIB = 10.0  # characters for each byte after compression; prose has 2 to 3
MIN_ZLIB_BYTES = 200  # shorter texts are not compressed: the ratio says nothing
MAX_TRUNCATED = 0.3  # share of responses cut at the cap
MAX_DRIFT = 1.5  # mean length against the start, either way
MAX_GAP = 0.05  # nats per token between the sampler's log-probs and the training graph's
SPENT = ("teacher/cost_usd", "teacher/tokens_in", "teacher/tokens_out", "teacher/calls")
MIN_STEPS = 10  # steps before entropy and length are compared with the start
PROGRESS_STEPS = 20  # steps before a reward that does not rise is a finding
MAX_LONE_RISE = 0.05  # of pi_hat between two evaluations of which the later is no better


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check saw, why it matters, and which setting to turn."""

    check: str
    saw: str
    why: str
    turn: str

    def line(self) -> str:
        """One line for a terminal."""
        return f"health: {self.check}: {self.saw}. {self.turn}"


class History:
    """What the checks would read all rows for, kept as the rows come."""

    def __init__(self, rows=()):
        self.evaluations: dict[int, float] = {}  # updates before it -> accuracy
        self.prompts: int | None = None  # of the newest evaluation
        self.spent = dict.fromkeys(SPENT, 0.0)
        self.rewards = [(0.0, 0.0)]  # sums of them and of their squares, so far
        self.agreed: list[float | None] = []  # pi_hat, one a row
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> None:
        """The next row."""
        self.evaluated(row)
        for key in SPENT:
            self.spent[key] += float(row.get(key) or 0)
        reward, agreed = row.get("reward/mean"), row.get("audit/pi_hat_mean")
        if _number(reward):
            total, squares = self.rewards[-1]
            self.rewards.append((total + reward, squares + reward**2))
        self.agreed.append(agreed if _number(agreed) else None)

    def evaluated(self, row: dict) -> None:
        """What a row says of evaluations: the last one's may get more of it."""
        if _number(row.get("eval/accuracy_before")):
            self.evaluations[0] = row["eval/accuracy_before"]
        if _number(row.get("eval/accuracy")):
            self.evaluations[int(row.get("eval/updates", row["step"] + 1))] = row["eval/accuracy"]
        if _number(row.get("eval/num_prompts")) and row["eval/num_prompts"]:
            self.prompts = int(row["eval/num_prompts"])

    def reward(self, first: int, last: int) -> tuple[float, float]:
        """(mean, variance) of rewards `first` to `last` - 1."""
        (a, aa), (b, bb), n = self.rewards[first], self.rewards[last], last - first
        return (b - a) / n, max(0.0, (bb - aa) / n - ((b - a) / n) ** 2)

    def pi_hat(self, count: int) -> tuple[float, float] | None:
        """(the first, the mean of the last FIRST) of those of the first `count` rows; None: there is none."""
        first = next((a for a in self.agreed if a is not None), None)
        last, i = [], min(count, len(self.agreed)) - 1
        while i >= 0 and len(last) < FIRST:
            last += [] if self.agreed[i] is None else [self.agreed[i]]
            i -= 1
        return (first, float(np.mean(last))) if last else None

    @property
    def points(self) -> list[tuple[int, float]]:
        """[(updates before it, accuracy), ...], the one before training included."""
        return sorted(self.evaluations.items())


@dataclasses.dataclass(frozen=True)
class View:
    """What the checks look at.

    Attributes:
      rows: the metrics of all steps so far, in order.
      audits, completions: records of the last WINDOW steps (records.py).
      cfg: {dotted key: value}.
      processes: of the run; the records are one process's.
      history: of the rows.
    """

    rows: list[dict]
    audits: list[dict]
    completions: list[dict]
    cfg: dict
    processes: int
    history: History

    @property
    def audited(self) -> bool:
        """Whether a teacher has been compared with of late: by the metrics, for records may be left out."""
        return bool(self.audits or (self.mean("audit/k_sem_mean") is not None and self.mean("audit/chunks")))

    @property
    def enough(self) -> int:
        """Records of audits before their texts are judged: a process logs its share alone."""
        return max(FEW_AUDITS, MIN_AUDITS // self.processes)

    def mean(self, key: str, rows: list[dict] | None = None) -> float | None:
        """The mean of a metric over the last WINDOW steps; None where no step has it."""
        values = [r[key] for r in (self.rows[-WINDOW:] if rows is None else rows) if _number(r.get(key))]
        return float(np.mean(values)) if values else None

    def start(self, key: str) -> float | None:
        """The mean of a metric over the first FIRST steps; None before MIN_STEPS steps."""
        return self.mean(key, self.rows[:FIRST]) if len(self.rows) >= MIN_STEPS else None


def check(
    rows: list[dict], audits: list[dict], completions: list[dict], cfg: dict, processes: int = 1,
    history: History | None = None,
) -> list[Finding]:  # fmt: skip
    """The findings at the last of `rows`; `audits` and `completions`, of one process, may hold older steps, which are
    left out. `history`: of these rows, where somebody keeps it."""
    last = rows[-1]["step"] if rows else 0
    recent = [[r for r in records if last - WINDOW < r.get("step", 0) <= last] for records in (audits, completions)]
    view = View(rows, *recent, cfg, processes, History(rows) if history is None else history)
    found = ((name, function(view)) for name, function in CHECKS.items())
    return [Finding(name, *parts) for name, parts in found if parts]


def metrics(findings: list[Finding]) -> dict[str, int]:
    """`health/*`: 1 for each check that tripped, 0 for the others."""
    tripped = {f.check for f in findings}
    return {f"health/{name}": int(name in tripped) for name in CHECKS}


class Watch:
    """The checks of a run that is going on: given each step, it returns what trips and what was not reported lately.

    Args:
      cfg: {dotted key: value}.
      rows, audits, completions: of the steps before, of a run that was resumed: it then says what it would have said.
      processes: of the run.
    """

    def __init__(self, cfg: dict, rows: list[dict], audits: list[dict], completions: list[dict], processes: int = 1):
        self._cfg, self._rows, self._said, self._processes = cfg, list(rows), {}, processes
        self._recent, self._history = [(audits, completions)], History(self._rows)

    def step(self, row: dict, audits: list[dict], completions: list[dict]) -> tuple[list[Finding], list[Finding]]:
        """(all findings, those that were not said within the last WINDOW steps)."""
        self._rows.append(row)
        self._history.add(row)
        self._recent = [*self._recent, (audits, completions)][-WINDOW - 1 :]  # `check` leaves out what is older
        return self._check(row)

    def amended(self, step: int, values: dict) -> tuple[list[Finding] | None, list[Finding]]:
        """The same where the last row got more values, of an evaluation behind it; (None, []) where it is not
        `step`'s."""
        if not self._rows or self._rows[-1]["step"] != step:
            return None, []
        self._rows[-1] = self._rows[-1] | values
        self._history.evaluated(self._rows[-1])
        return self._check(self._rows[-1])

    def _check(self, row: dict) -> tuple[list[Finding], list[Finding]]:
        records = ([r for step in self._recent for r in step[i]] for i in (0, 1))
        found = check(self._rows, *records, self._cfg, self._processes, self._history)
        new = [f for f in found if row["step"] - self._said.get(f.check, -WINDOW) >= WINDOW]
        self._said |= {f.check: row["step"] for f in found}
        return found, new


def teacher_not_sampling(v: View):
    """A greedy teacher makes all continuations of a chunk equal."""
    if not v.audited:
        return None
    turn = "Set teacher.temperature = 1, and look whether the server ignores it (some answer all n from one sample)"
    why = "k_sem is an estimate only if the continuations are independent samples; equal ones count one opinion n times"
    names = sorted({k.split(".")[1] for k in v.cfg if k.startswith("teachers.")})
    keys = [f"teachers.{name}.temperature" for name in names] or ["teacher.temperature"]
    if greedy := [k for k in keys if v.cfg.get(k, v.cfg.get("teacher.temperature")) == 0]:
        return f"{greedy[0]} = 0", why, turn
    several = [a for a in v.audits if len(a["continuations"]) > 1]
    equal = sum(len(set(a["continuations"])) == 1 for a in several)
    if len(several) >= v.enough and equal == len(several):
        return f"in all {equal} audits of the last steps the continuations are the same text", why, turn
    band, n = v.mean("audit/midband_fraction"), v.mean("audit/n_eff")
    agree = v.mean("audit/k_sem_mean")
    if band is None or band >= MIN_MIDBAND or not n or agree is None or agree / n > 0.95:
        return None
    return f"{band:.1%} of the chunks are neither fully matched nor fully missed", why, turn


def teacher_restarting(v: View):
    """Continuations that start the answer over, or say what they are going to do."""
    counted = [a for a in v.audits if "restarted" in a and a["continuations"]]
    total = sum(len(a["continuations"]) for a in counted)
    restarted, explained = (sum(a[key] for a in counted) for key in ("restarted", "explained"))
    if total < v.enough or restarted + explained <= MAX_RESTARTS * total:
        return None
    return (
        f"of {total} continuations {restarted} start the answer over and {explained} announce themselves",
        "what does not continue the prefix is compared with a chunk that does: the student is marked down for the "
        "format",
        "Set teacher.continuation to completion, prefill or continue_final_message where the server takes one",
    )


def weights_without_signal(v: View):
    """pi_hat hardly differs between chunks, or agreement is no higher than with another prompt's continuations."""
    kept = [a for a in v.audits if a["kept"]]
    why = "every chunk is pushed alike, sense and nonsense: the update then follows the student's own samples"
    turn = (
        "Look at audits in the report; try audit.similarity = embedding, other audit.chunk_tokens, or another teacher"
    )
    if len(kept) >= v.enough:
        spread = float(np.std([a["pi_hat"] for a in kept]))
        if spread < MIN_SPREAD:
            low, high = np.quantile([a["pi_hat"] for a in kept], [0.05, 0.95])
            return f"pi_hat is between {low:.2f} and {high:.2f} for 9 of 10 chunks (spread {spread:.3f})", why, turn
    pairs = [
        [sum(x) / len(x) for x in (a["similarity"], a["chance"])] for a in kept if a.get("chance") and a["similarity"]
    ]
    if len(pairs) < v.enough // 2:
        return None
    own, chance = np.mean(pairs, axis=0)
    lift = np.subtract(*np.transpose(pairs))
    noise = 2 * float(lift.std()) / len(lift) ** 0.5
    if own - chance > max(noise, MIN_LIFT):
        return None
    return f"similarity is {own:.3f}, with another prompt's continuations {chance:.3f} (noise {noise:.3f})", why, turn


def entropy_collapse(v: View):
    """The student has become sure of everything."""
    first, now, peak = v.start("entropy"), v.mean("entropy"), v.mean("audit/entropy_at_peak")
    why = "a student that is always certain samples one answer: nothing is left to explore or to audit"
    turn = "Lower optimizer.learning_rate, raise anchor.kl_coef, and check that temperature is 1"
    if first and now is not None and now < ENTROPY_LEFT * first:
        return f"entropy fell from {first:.3g} to {now:.3g} nats per token", why, turn
    if v.audited and peak is not None and peak < MIN_PEAK_ENTROPY:
        return f"even at the peaks the entropy is only {peak:.3g} nats", why, turn
    return None


def kl_runaway(v: View):
    """The student leaves the base model behind."""
    kl = v.mean("anchor/kl_ref_to_student_exact", v.rows[-FIRST:])
    if kl is None or kl <= MAX_KL:
        return None
    return (
        f"KL(ref || student) is {kl:.3g} nats per token",
        "the anchor holds everything that is not audited; far from the base model answers fall apart",
        "Lower optimizer.learning_rate or raise anchor.kl_coef; go back to a checkpoint from before",
    )


def anchor_holds(v: View):
    """Little is audited, and the anchor keeps the rest, and so the student, at the base model."""
    share, kl = v.mean("audit/token_fraction"), v.mean("anchor/kl_ref_to_student_exact")
    coef = v.cfg.get("anchor.kl_coef")
    if not coef or share is None or kl is None or len(v.rows) < PROGRESS_STEPS:
        return None
    if share >= FEW_AUDITED or kl >= MIN_MOVED or _has_risen(v):
        return None
    return (
        f"{share:.0%} of an answer's tokens are audited, and after {len(v.rows)} steps KL(ref || student) is {kl:.2g} "
        "nats per token",
        "the anchor pulls back on every token that is not audited: on SmolLM2 with 13% audited it left nothing to "
        "learn at a coefficient of 0.1, and 13 points more at 0.025",
        f"Lower anchor.kl_coef ({coef:g} now; try a quarter), or raise audit.num_chunks or audit.chunk_tokens; if the "
        "learning rate is still warming up, wait",
    )


def repetition(v: View):
    """Loops: repeated 4-grams, or texts that compress to a tenth."""
    why = "loops fill answers with text that teaches nothing, and are what token-level distillation is known to bring"
    turn = (
        "Lower optimizer.learning_rate; look at the longest answers; a shorter max_completion_length costs "
        "less meanwhile"
    )
    repeated = v.mean("completions/repeated_fraction")
    if repeated is not None and repeated > MAX_REPEATED:
        return f"{repeated:.0%} of the 4-grams in an answer repeat", why, turn
    texts = [t for c in v.completions if len(t := c["text"].encode("utf-8", "replace")) >= MIN_ZLIB_BYTES]
    loops = sum(len(t) / len(zlib.compress(t)) > MAX_ZLIB for t in texts)
    if len(texts) >= WINDOW and loops > 0.1 * len(texts):
        return f"{loops} of {len(texts)} answers compress to less than a tenth", why, turn
    return None


def truncation(v: View):
    """Too many responses end at the cap."""
    cut = v.mean("completions/truncated_fraction")
    if cut is None or cut <= MAX_TRUNCATED:
        return None
    return (
        f"{cut:.0%} of the responses are cut at max_completion_length = {v.cfg.get('max_completion_length')}",
        "most responses that were cut have no result to grade, and their end is never trained",
        "Raise max_completion_length, or look whether who writes them (the student; with sft the teacher) still ends "
        "its answers",
    )


def length_drift(v: View):
    """Responses grow or shrink."""
    first, now = v.start("completions/mean_length"), v.mean("completions/mean_length")
    if not first or not now or 1 / MAX_DRIFT <= now / first <= MAX_DRIFT:
        return None
    return (
        f"the mean length went from {first:.0f} to {now:.0f} tokens",
        "answers that shrink skip their steps, answers that grow cost more and are cut more often",
        "Compare answers of early and late steps in the report; lower optimizer.learning_rate",
    )


def few_chunks(v: View):
    """The settings ask for more chunks than a response has room for; those that the teacher left without an answer,
    and prompts that a gate closed, are another matter."""
    M, C = v.cfg.get("audit.num_chunks", 0), v.cfg.get("audit.chunk_tokens", 0)
    chunks, length = v.mean("audit/chunks"), v.mean("completions/mean_length")
    rows = v.cfg.get("prompts_per_step", 0) * v.cfg.get("num_generations", 0)
    span, share = v.cfg.get("audit.span", "all"), v.mean("audit/span_fraction")
    if chunks is not None:
        chunks += (v.mean("audit/dropped") or 0) + (v.mean("audit/stale_dropped") or 0)
    rows *= 1 - (v.mean("gate/closed_fraction") or 0)
    if share is not None and chunks is not None and rows and chunks / rows < M / 2:
        return (
            f"audit.span = {span!r} is {share:.0%} of the tokens: {chunks / rows:.1f} of {M} chunks a response fit",
            "with few chunks most of what a response decides is never compared with the teacher",
            "Raise max_completion_length (thoughts that were cut have no answer), lower audit.chunk_tokens, or set "
            "audit.span = all",
        )
    if not (v.audited and rows and C and chunks and length) or chunks / rows >= M / 2:
        return None
    room = int(length // C)
    if room >= M:  # a budget that asks for fewer
        return None
    return (
        f"C = {C} of {length:.0f} tokens leaves room for {room} of {M} chunks: {chunks / rows:.1f} per response",
        "with few chunks most of what a response decides is never compared with the teacher",
        f"Set audit.chunk_tokens to {max(1, int(length / (2 * M)))} or less, or audit.num_chunks to what fits",
    )


def sampler_gap(v: View):
    """The sampler and the training graph disagree."""
    gap = v.mean("rollout/score_logp_gap")
    if gap is None or gap <= MAX_GAP:
        return None
    return (
        f"the sampler's and the training graph's log-probs differ by {gap:.3g} nats per token",
        "the student is then trained on samples of a slightly different model, off-policy without anyone asking for it",
        "Set compute_dtype = float32 and rollout.cache_dtype = '' to see whether rounding is the cause; other "
        "model.attention",
    )


def no_progress(v: View):
    """Accuracy or reward does not rise."""
    why = "the run costs the same whether it helps or not"
    turn = (
        "Look at weights_without_signal and the audits first; then optimizer.learning_rate; then the "
        "teacher's own accuracy"
    )
    points, steps = v.history.points, v.cfg.get("num_steps", 0)
    noise = _noise(v, points)
    if noise is not None and points[-1][0] - points[0][0] >= max(MIN_STEPS, steps / 2):
        (_, before), (step, after) = points[0], points[-1]
        if after - before <= noise:
            return (
                f"accuracy was {before:.1%}, is {after:.1%} at step {step} (noise {100 * noise:.1f} points)",
                why,
                turn,
            )
        return None
    count = len(v.history.rewards) - 1
    if count < max(PROGRESS_STEPS, steps / 2):
        return None
    part = count // 4
    (first, before), (last, after) = v.history.reward(0, part), v.history.reward(count - part, count)
    noise = 2 * (before / part + after / part) ** 0.5
    if last - first <= noise:
        return f"the reward was {first:.3f}, is {last:.3f} (noise {noise:.3f})", why, turn
    return None


def _noise(v: View, points: list[tuple[int, float]]) -> float | None:
    """Two standard errors of the newest evaluation less the first; None where there are not two."""
    n = v.history.prompts
    if len(points) < 2 or not n:
        return None
    before, after = points[0][1], points[-1][1]
    return 2 * ((before * (1 - before) + after * (1 - after)) / n) ** 0.5


def _has_risen(v: View) -> bool:
    """Whether accuracy is above the first evaluation's beyond noise."""
    points = v.history.points
    noise = _noise(v, points)
    return noise is not None and points[-1][1] - points[0][1] > noise


def agreement_alone(v: View):
    """pi_hat rises and accuracy does not: the student has found what the teacher says whatever was written before."""
    points, n = v.history.points, v.history.prompts
    if len(points) < 2 or not n or points[-1][0] - points[0][0] < FIRST:
        return None
    (_, before), (step, after) = points[0], points[-1]
    found = v.history.pi_hat(step)
    if found is None or after > before:
        return None
    first, last = found
    if last - first <= MAX_LONE_RISE:
        return None
    chunks = [(a["chunk"].strip(), a["question"]) for a in v.audits if a.get("question") and a.get("chunk", "").strip()]
    copied = sum(chunk in question for chunk, question in chunks)
    seen = f"; {copied} of {len(chunks)} audited chunks stand in their question" if copied else ""
    return (
        f"pi_hat rose from {first:.2f} to {last:.2f} while accuracy went from {before:.1%} to {after:.1%} "
        f"at step {step}{seen}",
        "some texts are agreed on whatever was written before (the question again, a formula that ends every answer): "
        "writing them pays and teaches nothing",
        "Look at the chunks with the highest pi_hat in the report; have the teacher end without a formula; raise "
        "audit.chunk_tokens or anchor.kl_coef",
    )


def evaluations(rows: list[dict]) -> list[tuple[int, float]]:
    """[(updates before it, accuracy), ...] of a run's evaluations, the one before training included."""
    return History(rows).points


def evaluated(rows: list[dict]) -> int | None:
    """How many held-out prompts the newest evaluation answered, often fewer than `eval.num_prompts`; None: no row says
    it."""
    return History(rows).prompts


def count_evaluated(rows: list[dict], answers: list[dict]) -> None:
    """Adds `eval/num_prompts` to the rows of a run from before it was written: the answers that evaluations.jsonl kept
    and those that it left out."""
    for r in rows:
        if not _number(r.get("eval/accuracy", r.get("eval/accuracy_before"))) or "eval/num_prompts" in r:
            continue
        updates = r.get("eval/updates", r.get("step", -1) + 1)
        kept = len({a.get("prompt_id") for a in answers if a.get("step") == updates})
        if kept:
            r["eval/num_prompts"] = kept + int(r.get("eval/log_left_out") or 0)


def budget_pace(v: View):
    """A cap that the run reaches before its last step."""
    spent = {
        "usd": ("teacher/cost_usd",),
        "tokens": ("teacher/tokens_in", "teacher/tokens_out"),
        "calls": ("teacher/calls",),
    }
    for name, keys in spent.items():
        cap, steps = v.cfg.get(f"budget.{name}", 0), v.cfg.get("num_steps", 0)
        if not cap or len(v.rows) < 2:
            continue
        used = sum(v.history.spent[k] for k in keys)
        if not used:
            continue
        paid = v.rows[-1].get("teacher/cost_usd_total") if name == "usd" else None
        left = cap - max(used, paid or 0.0)
        end = v.rows[-1]["step"] + 1 + int(max(0.0, left) / (used / len(v.rows)))
        if end >= steps:
            continue
        amount = f"${cap:,.2f}" if name == "usd" else f"{cap:,} {name}"
        return (
            f"at this pace the {amount} of budget.{name} end at step {end} of {steps}",
            "the run then stops" if v.cfg.get("budget.on_exhausted") == "stop" else "later steps are then audited less",
            f"Raise budget.{name}, lower num_steps, audit.num_chunks or audit.num_continuations, or set "
            "budget.on_exhausted",
        )
    return None


CHECKS = {
    f.__name__: f
    for f in (
        teacher_not_sampling, teacher_restarting, weights_without_signal, entropy_collapse, kl_runaway, anchor_holds,
        repetition, truncation, length_drift, few_chunks, sampler_gap, no_progress, agreement_alone, budget_pace,
    )
}  # fmt: skip


def _number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
