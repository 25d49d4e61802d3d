"""Money before it is spent: what a run will ask of a paid teacher, from the recipe alone; no weights, no call.

python -m omniopd_jax.main --config=RECIPE --estimate      prints the table and ends
python -m omniopd_jax.main --config=RECIPE --yes           starts a run above budget.confirm_usd without a cap
"""

import pathlib

from omniopd_jax.errors import UserError
from omniopd_jax.teachers import budget
from omniopd_jax.teachers.wire import anthropic, gemini, openai

LATENCY_S = (1.0, 5.0)  # median and slow call of a few tokens: nothing was asked yet, so nothing was measured
CLIENTS = {"openai": openai.OpenAIClient, "anthropic": anthropic.AnthropicClient, "gemini": gemini.GeminiClient}
FREE, OWN, KNOWN, UNKNOWN = "no price", "a server of your own", "known", "unknown"


def price_state(cfg, asks_teacher: bool) -> str:
    """FREE (in process, or nobody is asked), OWN, KNOWN or UNKNOWN: an unknown price is never shown as $0.00."""
    t = cfg.teacher
    if not asks_teacher or t.provider not in CLIENTS or t.replay == "only":
        return FREE
    if t.price_input >= 0 and t.price_output >= 0:
        return KNOWN
    if CLIENTS[t.provider](cfg).self_hosted:
        return OWN
    return KNOWN if budget.price(cfg, self_hosted=False).known else UNKNOWN


def dollars(usd: float, state: str) -> str:
    """A cost for a person, in words where there is no figure."""
    if state == UNKNOWN or (state == OWN and not usd):
        return "unknown" if state == UNKNOWN else "no price"
    return f"${usd:,.2f}"


def table(e: budget.Estimate, state: str) -> str:
    """Calls, tokens, dollars and hours, low, middle and high; a price that is unknown stays so."""
    rows = [("", "low", "middle", "high")]
    rows += [
        (name, *(format(v, form) for v in values))
        for name, values, form in (
            ("calls", e.calls, ",.0f"), ("tokens in", e.tokens_in, ",.0f"), ("tokens out", e.tokens_out, ",.0f")
        )
    ]  # fmt: skip
    rows.append(("dollars", *(dollars(v, state) for v in e.usd)))
    rows.append(("hours of the teacher", *(format(v, ",.2f") for v in e.hours)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows
    )


def confirm(cfg, asks_teacher: bool, bought: dict[str, int] | None = None) -> None:
    """`Preview.confirm`; settings that can't be priced are left to the run's own checks, which name all that is wrong.

    Raises:
      UserError: the run is likely to cost more than `budget.confirm_usd` and has no cap.
    """
    try:
        preview = Preview(cfg, asks_teacher, bought)
    except UserError:
        return
    preview.confirm()


class Preview:
    """A run's estimate and what it is made of.

    Args:
      cfg: the recipe.
      asks_teacher: whether its objective asks a teacher.
      bought: what it asks for (`budget.estimate`); None: continuations at the peaks.

    Raises:
      UserError: settings of the teacher that can't be priced (`budget.usd` without a price).
    """

    def __init__(self, cfg, asks_teacher: bool, bought: dict[str, int] | None = None):
        self.cfg, self.state = cfg, price_state(cfg, asks_teacher)
        self.steps = max(0, cfg.num_steps - steps_done(cfg.run_dir))
        self.estimate = None
        if self.state != FREE:
            client = CLIENTS[cfg.teacher.provider](cfg)
            price = budget.price(cfg, self_hosted=client.self_hosted)
            takes_n = bool(client.seen.takes_n)
            how = {"takes_n": takes_n, "latency_s": LATENCY_S, "steps": self.steps, "asks": bought}
            self.estimate = budget.estimate(cfg, price, **how)

    def text(self) -> str:
        """The table, where each cap would stop the run, and what was assumed."""
        cfg, e = self.cfg, self.estimate
        if e is None:
            why = (
                "is in process" if cfg.teacher.provider not in CLIENTS else "is not asked, or replayed from its journal"
            )
            return f"objective {named(cfg)}: nothing is bought (teacher.provider = {cfg.teacher.provider!r} {why})"
        lines = [f"{named(cfg)} with {cfg.teacher.model} ({cfg.teacher.provider}): {self.steps} steps to come"]
        lines.append(table(e, self.state))
        lines += self.caps()
        if self.state == UNKNOWN:
            lines.append(
                "the price is unknown: set teacher.price_input and teacher.price_output (USD per million tokens)"
            )
        if self.state == OWN:
            lines.append("a server of your own has no price; teacher.price_input and teacher.price_output set one")
        low, slow = LATENCY_S
        lines.append(
            f"a call is one request; assumed: {low:g} to {slow:g} s each, {cfg.teacher.max_concurrency} at a time"
        )
        return "\n".join(lines)

    def caps(self) -> list[str]:
        """Where each cap that is set would stop the run, counted from the next step."""
        e, b, out = self.estimate, self.cfg.budget, []
        totals = {"usd": e.usd, "tokens": tuple(i + o for i, o in zip(e.tokens_in, e.tokens_out)), "calls": e.calls}
        for name, total in totals.items():
            cap = b[name]
            if not cap or (name == "usd" and self.state == UNKNOWN):
                continue
            after = [int(cap / t * self.steps) if t > cap else None for t in total]
            said = ["is enough" if a is None else f"ends after {a:,} of {self.steps:,} steps" for a in after]
            out.append(f"budget.{name} = {cap:,}: low {said[0]}; middle {said[1]}; high {said[2]}")
        return out or ["no cap is set (budget.usd, budget.tokens, budget.calls)"]

    def confirm(self) -> None:
        """Refuses a run that is likely to cost more than `budget.confirm_usd` and has no cap.

        Raises:
          UserError: with the table; the command's exit code is 2.
        """
        cfg, limit = self.cfg, self.cfg.budget.confirm_usd
        capped = any(cfg.budget[name] for name in ("usd", "tokens", "calls"))
        if self.state != KNOWN or capped or self.estimate.usd[1] <= limit:
            return
        if CLIENTS[cfg.teacher.provider](cfg).self_hosted:
            return
        raise UserError(
            f"{self.text()}\nthe middle estimate, ${self.estimate.usd[1]:,.2f}, is above budget.confirm_usd = "
            f"{limit:g} and no "
            "cap is set: set budget.usd, or add --yes to start all the same"
        )


def named(cfg) -> str:
    """The objective's name, or those of a mix."""
    return " + ".join(sorted(cfg.objective.mix)) or cfg.objective.name


def steps_done(run_dir) -> int:
    """The newest checkpoint's step in a run's folder; 0 where there is none."""
    folder = pathlib.Path(run_dir).expanduser() / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []
    return max(steps, default=0)
