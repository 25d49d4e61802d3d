"""What models cost: a table with the day and the page of each entry, found by exact name.

No price was read off a bill, or off the service's own page as it is today: pages are copies, most of them of people who
say that they read the service's page on that day. Check before spending; `teacher.price_input`, `price_cached` and
`price_output` go before the table.
"""

import dataclasses
import datetime
import re


@dataclasses.dataclass(frozen=True)
class Price:
    """USD per million tokens: fresh input, input served from the provider's cache, output, input written to it.

    A request with more than `long_from` tokens of input (0: there is no such step) costs `long_factor` times as much.
    From the day `then_from` on, `then` holds (`on`).
    """

    input: float = 0.0
    cached: float = 0.0
    output: float = 0.0
    written: float = 0.0
    known: bool = True  # False: no table has the model, and the config names no price: its cost is not 0, it is unknown
    long_from: int = 0
    long_factor: float = 1.0
    then: "Price | None" = None
    then_from: datetime.date = datetime.date.max

    def on(self, day: datetime.date) -> "Price":
        """The price of that day."""
        return self.then.on(day) if self.then and day >= self.then_from else self

    def cost(self, tokens_in: int, tokens_cached: int, tokens_out: int, tokens_written: int | None = 0) -> float:
        """Dollars of one request; `tokens_in` holds the cached and the written ones. None: which were written is not
        known, and all that are fresh count as dear as that."""
        if tokens_written is None:
            tokens_written = tokens_in - tokens_cached if self.written > self.input else 0
        fresh = tokens_in - tokens_cached - tokens_written
        parts = fresh * self.input + tokens_cached * self.cached + tokens_written * self.written
        return (parts + tokens_out * self.output) * self._factor(tokens_in) / 1e6

    def most(self, tokens_in: int, tokens_out: int) -> float:
        """The most that a request of at most so many tokens can cost, in dollars."""
        dearest = max(self.input, self.cached, self.written)
        return (tokens_in * dearest + tokens_out * self.output) * self._factor(tokens_in) / 1e6

    def _factor(self, tokens_in: int) -> float:
        return self.long_factor if self.long_from and tokens_in > self.long_from else 1.0


@dataclasses.dataclass(frozen=True)
class Listed:
    """An entry of the table: the price, the day on which it was read (a month, or a year, told from what the copy holds
    where it names no day), the page, and what to know of it."""

    price: Price
    read: str
    page: str
    note: str = ""


CLAUDE = "https://platform.claude.com/docs/en/about-claude/pricing"
CLAUDE_OF_OCTOBER = "https://github.com/kurofune/claudit/releases/tag/v1.9.2, of " + CLAUDE
OPENAI_OF_MAY = (
    "api-evangelist/openai, plans/openai-plans-pricing.yml, of https://developers.openai.com/api/docs/pricing"
)
OPENAI_4 = "https://raw.githubusercontent.com/Sraleik/undetermini/HEAD/PRICING.md, of secondary pages"
OPENAI_JUNE = "https://www.powershellgallery.com/packages/ShellPilot/0.3.1/Content/data%5CPriceTable.psd1"
OPENAI_CACHED = (
    "input and output; cached by the family's discount in https://docs.rs/crate/adk-model/0.6.0 (March 2026)"
)
LUNA = "https://github.com/merefield/codexometer/releases/tag/v0.18.4, of OpenAI's page"
GEMINI_25 = "https://www.morphllm.com/gemini-api-pricing, of https://ai.google.dev/gemini-api/docs/pricing"
GEMINI_CACHED = "input and output; cached by the discount of 90% in https://deploybase.ai/articles/gemini-2.5-pricing"
GEMINI_JULY = "https://github.com/simstudioai/sim/pull/5812"


def _openai(price_in: float, cached: float, out: float) -> Price:
    """A model whose cache costs nothing to write to."""
    return Price(price_in, cached, out, price_in)


TABLE = {
    "claude-haiku-4-5": Listed(
        Price(1.00, 0.10, 5.00, 1.25), "2026-02", CLAUDE, "the service's overview of July 2026 has $1 and $5, too"
    ),
    "claude-haiku-5-5": Listed(
        Price(0.10, 0.01, 0.50, 0.125, long_from=100_000, long_factor=5.0), "2026-10-24", CLAUDE_OF_OCTOBER
    ),
    "claude-sonnet-4-5": Listed(Price(3.00, 0.30, 15.00, 3.75), "2026-02", CLAUDE),
    "claude-sonnet-4-6": Listed(Price(3.00, 0.30, 15.00, 3.75), "2026-02", CLAUDE),
    "claude-sonnet-5": Listed(
        Price(2.00, 0.20, 10.00, 2.50), "2026-07", "https://platform.claude.com/docs/zh-CN/models/opus-5/overview",
        "input and output; cached and written by the rule of the other models, 0.1 and 1.25 of the input",
    ),  # fmt: skip
    "claude-sonnet-5-5": Listed(
        Price(2.00, 0.10, 10.00, 2.50), "2026-10-24", CLAUDE_OF_OCTOBER,
        "the cached price; the others of https://github.com/TheKrush/PromptFuel/releases/tag/v1.0.22",
    ),  # fmt: skip
    "claude-opus-4-1": Listed(Price(15.00, 1.50, 75.00, 18.75), "2026-09", CLAUDE, "retired by Anthropic itself"),
    "claude-opus-4-5": Listed(Price(5.00, 0.50, 25.00, 6.25), "2026-09", CLAUDE),
    "claude-opus-4-6": Listed(Price(5.00, 0.50, 25.00, 6.25), "2026-09", CLAUDE),
    "claude-opus-4-7": Listed(Price(5.00, 0.50, 25.00, 6.25), "2026-09", CLAUDE),
    "claude-opus-4-8": Listed(Price(5.00, 0.50, 25.00, 6.25), "2026-09", CLAUDE),
    "claude-opus-5": Listed(Price(5.00, 0.50, 25.00, 6.25), "2026-09", CLAUDE),
    "gpt-4o": Listed(_openai(2.50, 1.25, 10.00), "2025", "https://docs.rs/crate/openai-models/0.1.1, of OpenAI's page"),
    "gpt-4o-mini": Listed(_openai(0.15, 0.075, 0.60), "2026-05-07", OPENAI_4, OPENAI_CACHED),
    "gpt-4.1": Listed(_openai(2.00, 0.50, 8.00), "2026-06-01", OPENAI_JUNE),
    "gpt-4.1-mini": Listed(_openai(0.40, 0.10, 1.60), "2026-05-07", OPENAI_4, OPENAI_CACHED),
    "gpt-4.1-nano": Listed(_openai(0.10, 0.025, 0.40), "2026-05-07", OPENAI_4, OPENAI_CACHED),
    "gpt-5": Listed(_openai(1.25, 0.125, 10.00), "2026-06", "https://docs.rs/crate/openai-cost/0.1.0", OPENAI_CACHED),
    "gpt-5-mini": Listed(_openai(0.25, 0.025, 2.00), "2026-06-01", OPENAI_JUNE),
    "gpt-5-nano": Listed(
        _openai(0.05, 0.005, 0.40), "2026-09", "https://developers.openai.com/api/docs/models/gpt-5-nano"
    ),
    "gpt-5.4": Listed(_openai(2.50, 0.25, 15.00), "2026-05-04", OPENAI_OF_MAY),
    "gpt-5.4-mini": Listed(_openai(0.75, 0.075, 4.50), "2026-05-04", OPENAI_OF_MAY),
    "gpt-6-luna": Listed(
        Price(0.10, 0.01, 0.50, 0.125, long_from=272_000, long_factor=2.0), "2026-09-22", LUNA,
        "the factor above 272,000 tokens is that of gpt-6.2-sol's input: the page of this model's was not seen",
    ),  # fmt: skip
    "gemini-2.5-flash": Listed(_openai(0.30, 0.03, 2.50), "2026-05", GEMINI_25, GEMINI_CACHED),
    "gemini-2.5-flash-lite": Listed(_openai(0.10, 0.01, 0.40), "2026-05", GEMINI_25, GEMINI_CACHED),
    "gemini-3.5-flash-lite": Listed(_openai(0.30, 0.03, 2.50), "2026-07-21", GEMINI_JULY),
    "gemini-3.6-flash": Listed(_openai(1.50, 0.15, 7.50), "2026-07-21", GEMINI_JULY),
    "gemini-3.8-flash": Listed(
        dataclasses.replace(
            _openai(0.75, 0.075, 3.75), then=_openai(1.50, 0.15, 7.50), then_from=datetime.date(2027, 1, 1)
        ),
        "2026-10-07",
        "api-evangelist/deepmind, plans/deepmind-plans-pricing.yml, of https://ai.google.dev/gemini-api/docs/pricing",
        "until 31 December 2026, then twice that; output and cached of github.com/BerriAI/litellm/discussions/39357",
    ),  # fmt: skip
}  # fmt: skip
PRICES = {name: listed.price for name, listed in TABLE.items()}


def listed_price(model: str) -> Price | None:
    """The table's price of a model by its exact name, or by a name and a date, a version or `-latest`; None: not
    listed."""
    return PRICES.get(undated(model))


def source(model: str) -> str:
    """When and where the table's price of a model was read, in one line; "" where it has none."""
    listed = TABLE.get(undated(model))
    note = f"; {listed.note}" if listed and listed.note else ""
    if listed and (then := listed.price.then):
        note = f"; from {listed.price.then_from}: {then.input:g} in, {then.output:g} out{note}"
    return f"read {listed.read}: {listed.page}{note}" if listed else ""


def today() -> datetime.date:
    """The day by which prices go: UTC."""
    return datetime.datetime.now(datetime.UTC).date()


def undated(model: str) -> str:
    """A model's name without what only says which state of it: `models/` before it, a date, a version or `-latest`
    after it."""
    name = model.removeprefix("models/")
    return re.sub(r"(?:-latest|[-@]20\d{6}|-20\d\d-\d\d-\d\d|-\d{3})$", "", name)
