"""Money before it is spent: what a run will ask of a paid teacher, from the recipe alone; no weights, no call.

python -m omniopd_jax.main --config=RECIPE --estimate      prints the table and ends
python -m omniopd_jax.main --config=RECIPE --yes           starts a run above budget.confirm_usd without a cap
"""

import contextlib
import math

from omniopd_jax.data import prompts as data
from omniopd_jax.errors import UserError
from omniopd_jax.run import files
from omniopd_jax.teachers import budget, by_row, prices
from omniopd_jax.teachers.journal import Journal, folder_of
from omniopd_jax.teachers.wire import anthropic, gemini, openai

CLIENTS = {"openai": openai.OpenAIClient, "anthropic": anthropic.AnthropicClient, "gemini": gemini.GeminiClient}
ASKED_USD = 1.0  # for a million tokens of an unknown price, where a run must be confirmed; no cost is shown by it
FREE, OWN, KNOWN, UNKNOWN = "no price", "a server of your own", "known", "unknown"


def price_state(cfg, asks_teacher: bool) -> str:
    """FREE (in process, or nobody is asked), OWN, KNOWN or UNKNOWN: an unknown price is never shown as $0.00.

    Of several teachers: UNKNOWN where any price is, else KNOWN where any has one.
    """
    if cfg.teachers:
        states = [price_state(own, asks_teacher) for own in by_row.configs(cfg).values()]
        return next(state for state in (UNKNOWN, KNOWN, OWN, FREE) if state in states)
    t = cfg.teacher
    if not asks_teacher or t.provider not in CLIENTS or t.replay == "only":
        return FREE
    if t.price_input >= 0 and t.price_output >= 0:
        return KNOWN
    client = CLIENTS[t.provider](cfg)
    if client.self_hosted:
        return OWN
    return KNOWN if budget.price(cfg, self_hosted=False, official=client.official).known else UNKNOWN


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
    """`Preview.confirm` of every teacher; settings that can't be priced are left to the run's own checks, which name
    all that is wrong.

    Raises:
      UserError: the run is likely to cost more than `budget.confirm_usd` and has no cap.
    """
    try:
        found = previews(cfg, asks_teacher, bought)
    except UserError:
        return
    found[0].confirm(found)


def previews(cfg, asks_teacher: bool, bought: dict[str, int] | None = None) -> list["Preview"]:
    """One for each of the run's teachers; of several, each is taken to get an equal part of the prompts: which row
    names whom is read with the prompts.

    Raises:
      UserError: as `Preview`.
    """
    own = by_row.configs(cfg)
    if not own:
        return [Preview(cfg, asks_teacher, bought)]
    how = {"part": 1 / len(own), "folder": cfg.run_dir}
    return [Preview(one, asks_teacher, bought, name=name, **how) for name, one in own.items()]


class Preview:
    """A run's estimate and what it is made of.

    Args:
      cfg: the recipe.
      asks_teacher: whether its objective asks a teacher.
      bought: what it asks for (`budget.estimate`); None: continuations at the peaks.
      name, part, folder: of a named teacher: its name, its part of the prompts, the run's folder.

    Raises:
      UserError: settings of the teacher that can't be priced (`budget.usd` without a price).
    """

    def __init__(
        self, cfg, asks_teacher: bool, bought: dict[str, int] | None = None, *, name: str = "", part: float = 1.0,
        folder: str = "",
    ):  # fmt: skip
        self.cfg, self.state, self.name, self.part = cfg, price_state(cfg, asks_teacher), name, part
        self.steps = max(0, cfg.num_steps - steps_done(folder or cfg.run_dir))
        self.estimate, self.client = None, None
        if self.state != FREE:
            self.client = client = CLIENTS[cfg.teacher.provider](cfg)
            price = budget.price(cfg, self_hosted=client.self_hosted, official=client.official)
            how = {"takes_n": bool(client.seen.takes_n), "latency_s": budget.LATENCY_S, "steps": self.steps * part}
            how |= {"most": client.most_texts, "asks": bought, "prompts": (data.count_known(cfg) or math.inf) * part}
            self.estimate = budget.estimate(cfg, price.on(prices.today()), **how)

    def text(self) -> str:
        """The table, where each cap would stop the run, and what was assumed."""
        cfg, e = self.cfg, self.estimate
        if e is None:
            why = (
                "is in process" if cfg.teacher.provider not in CLIENTS else "is not asked, or replayed from its journal"
            )
            return f"objective {named(cfg)}: nothing is bought (teacher.provider = {cfg.teacher.provider!r} {why})"
        lines = [f"{named(cfg)} with {cfg.teacher.model} ({cfg.teacher.provider}): {self.steps} steps to come"]
        if self.name:
            lines[0] = f"teachers.{self.name}, taken to get {self.part:.0%} of the prompts: {lines[0]}"
        lines.append(table(e, self.state))
        if self.state == KNOWN and (said := prices.source(cfg.teacher.model)) and cfg.teacher.price_input < 0:
            lines.append(f"the price was {said}")
        lines += self.caps()
        if self.state == UNKNOWN:
            lines.append(
                "the price is unknown: set teacher.price_input and teacher.price_output (USD per million tokens; 0 for "
                "a server of your own)"
            )
        if self.state == OWN:
            lines.append("a server of your own has no price; teacher.price_input and teacher.price_output set one")
        low, slow = budget.LATENCY_S
        lines.append(
            f"a call is one request; assumed: {low:g} to {slow:g} s each, {cfg.teacher.max_concurrency} at a time"
        )
        return "\n".join(lines)

    def caps(self) -> list[str]:
        """Where each cap that is set would stop the run, counted from the next step: what the journal of this host has
        seen is taken off."""
        e, b, out = self.estimate, self.cfg.budget, []
        with contextlib.closing(Journal(folder_of(self.cfg))) as journal:
            spent = journal.totals()
        totals = {"usd": e.usd, "tokens": tuple(i + o for i, o in zip(e.tokens_in, e.tokens_out)), "calls": e.calls}
        for name, total in totals.items():
            cap = b[name]
            if not cap or (name == "usd" and self.state == UNKNOWN):
                continue
            left = max(0, cap - (paid := getattr(spent, name)))
            after = [int(left / t * self.steps) if t > left else None for t in total]
            said = ["is enough" if a is None else f"ends after {a:,} of {self.steps:,} steps" for a in after]
            of_it = f", {left:,.{2 if name == 'usd' else 0}f} of it left" if paid else ""
            out.append(f"budget.{name} = {cap:,}{of_it}: low {said[0]}; middle {said[1]}; high {said[2]}")
        return out or ["no cap is set (budget.usd, budget.tokens, budget.calls)"]

    def middle(self) -> float:
        """The middle estimate in dollars where the price is known; else 0."""
        return self.estimate.usd[1] if self.state == KNOWN else 0.0

    def middle_unknown(self) -> float:
        """The middle estimate in millions of tokens, in and out, where the price is unknown; else 0. Without a key
        nothing can be bought: the run's own checks then say so, with all else that is missing."""
        if self.state != UNKNOWN:
            return 0.0
        try:
            self.client.check_settings()
        except UserError:
            return 0.0
        return (self.estimate.tokens_in[1] + self.estimate.tokens_out[1]) / 1e6

    def confirm(self, beside: "list[Preview] | None" = None) -> None:
        """Refuses a run that is likely to cost more than `budget.confirm_usd` and has no cap. For this question alone
        a million tokens of an unknown price count as ASKED_USD.

        Args:
          beside: the previews of all the run's teachers, where there are several.

        Raises:
          UserError: with the table; the command's exit code is 2.
        """
        limit, every = self.cfg.budget.confirm_usd, beside or [self]
        usd, unknown = sum(p.middle() for p in every), sum(p.middle_unknown() for p in every)
        if any(self.cfg.budget[name] for name in ("usd", "tokens", "calls")) or usd + unknown * ASKED_USD <= limit:
            return
        text = "\n".join(p.text() for p in every)
        said = [f"${usd:,.2f}"] * (not unknown or usd > 0)
        said += [f"{unknown:,.0f} million tokens at an unknown price"] * (unknown > 0)
        asked = f" (a million tokens of an unknown price are asked about as ${ASKED_USD:g})" if unknown else ""
        cap = "budget.tokens, or the prices" if unknown else "budget.usd"
        raise UserError(
            f"{text}\nthe middle estimate, {' and '.join(said)}, is above budget.confirm_usd = {limit:g}{asked} and no "
            f"cap is set: set {cap}, or add --yes to start all the same"
        )


def named(cfg) -> str:
    """The objective's name, or those of a mix."""
    return " + ".join(sorted(cfg.objective.mix)) or cfg.objective.name


def steps_done(run_dir) -> int:
    """The newest checkpoint's step in a run's folder; 0 where there is none."""
    return files.newest_step(run_dir) or 0
