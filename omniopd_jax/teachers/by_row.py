"""Several teachers in one run: each prompt's `teacher` names one of `teachers.NAME`, and only that one is asked.

A named teacher is a teacher like any other: its own settings (what `teachers.NAME` does not say is `teacher`'s), its
own probe, its own journal in a folder of that name, its own part of every cap. No teacher knows of the others.
"""

import asyncio
import dataclasses
import math
import pathlib
import re
from collections import Counter
from collections.abc import Iterator

from ml_collections import ConfigDict

from omniopd_jax import config
from omniopd_jax.errors import TeacherStopped, UserError
from omniopd_jax.teachers import budget as money
from omniopd_jax.teachers.journal import Spent, Totals, folder_of
from omniopd_jax.teachers.protocol import ContinuationRequest, ContinuationResult, PaidTeacher, Teacher, gather_all

NAME = re.compile(r"[A-Za-z][\w-]*")
ADDED_UP = ("calls", "retries", "failed", "tokens_in", "tokens_cached", "tokens_out", "cost_usd", "cost_usd_total")


# settings


def configs(cfg: ConfigDict) -> dict[str, ConfigDict]:
    """{name: the run's config as that teacher alone sees it}; empty where no teacher is named.

    Raises:
      UserError: a name or a key that cannot be, shares that are more than the whole, a cap too small to be divided.
    """
    shares = _shares(cfg)
    return {name: _config(cfg, name, shares[name]) for name in cfg.teachers}


def each(cfg: ConfigDict, teacher: Teacher) -> Iterator[tuple[ConfigDict, Teacher]]:
    """(its config, it) of every teacher of a run; of a run's only one the run's own config."""
    if not cfg.teachers:
        yield cfg, teacher
    for name, own in configs(cfg).items():
        yield own, teacher.named(name)


def whole(flat: dict, names) -> dict:
    """{dotted key: value} with every key of every named teacher, also those that it has from `teacher`."""
    own = {key.removeprefix("teacher."): value for key, value in flat.items() if key.startswith("teacher.")}
    return {f"teachers.{name}.{key}": value for name in names for key, value in own.items()} | flat


def key_of(key: str) -> str:
    """A config key with `teachers.NAME.` as `teacher.`: what is said of the one holds for the other."""
    return re.sub(r"^teachers\.[^.]+\.", "teacher.", key)


def set_by_flag(cfg: ConfigDict, path: str, text: str) -> None:
    """Sets `teachers.PATH` from the command line, in the type that the key has under `teacher`; a new name is made.

    Raises:
      UserError: no such key, or a value of another type.
    """
    name, _, key = path.partition(".")
    known = config.flat(cfg.teacher)
    free = key.startswith("chat_template_kwargs.")
    if key not in known and not free:
        raise _unknown(name, key)
    value = config.read_flag(f"teachers.{path}", text, None if free else type(known[key]))
    with cfg.unlocked():
        section = cfg.teachers.get(name) or ConfigDict()
        section.update(ConfigDict({"chat_template_kwargs": {key.partition(".")[2]: value}} if free else {key: value}))
        cfg.teachers[name] = section


def _config(cfg: ConfigDict, name: str, share: float) -> ConfigDict:
    if not NAME.fullmatch(name):
        raise UserError(f"teachers.{name}: a teacher's name is letters, digits, _ and -, a letter first")
    own = cfg.copy_and_resolve_references()
    own.teachers = ConfigDict()
    given = config.flat(cfg.teachers[name])
    for key, value in given.items():
        if key == "journal":
            raise UserError(f"teachers.{name}.journal: its journal is the folder {name!r} of teacher.journal")
        if key not in config.flat(own.teacher):
            raise _unknown(name, key)
        try:
            own.teacher.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise UserError(f"teachers.{name}.{key} = {value!r} is of another type than teacher.{key}") from error
    own.teacher.journal = str(folder_of(cfg) / name)
    own.local_dir = str(config.local_folder(cfg) / "teachers" / name)  # read only where run_dir is a bucket
    own.run_dir = f"{cfg.run_dir.rstrip('/')}/teachers/{name}"
    for cap in ("usd", "tokens", "calls"):
        limit = cfg.budget[cap]
        part = limit * share if cap == "usd" else math.floor(limit * share)
        if limit and not part:
            raise UserError(f"budget.{cap} = {limit} leaves nothing for teachers.{name}, whose part is {share:.0%}")
        own.budget[cap] = part
    return own


def _unknown(name: str, key: str) -> UserError:
    said = config.unknown_key_message(config.default(), f"teacher.{key}")
    return UserError(said.replace("teacher.", f"teachers.{name}."))


def _shares(cfg: ConfigDict) -> dict[str, float]:
    """{name: its part of every cap}: what `budget_share` says; the others get equal parts of what is left."""
    given = {name: float(cfg.teachers[name].get("budget_share", 0.0)) for name in cfg.teachers}
    left, others = 1.0 - sum(given.values()), sum(not share for share in given.values())
    if any(share < 0 for share in given.values()) or left < -1e-9 or (others and left < 1e-9):
        said = ", ".join(f"teachers.{name}.budget_share = {share:g}" for name, share in given.items())
        raise UserError(f"{said}: parts of the caps are at least 0, and leave something for those that name none")
    return {name: share or left / others for name, share in given.items()}


# the teachers


@dataclasses.dataclass(frozen=True)
class Reports:
    """The probes' reports of several teachers."""

    by_name: dict

    def table(self) -> str:
        """The tables, one under the other."""
        return "\n".join(f"teachers.{name}\n{report.table()}" for name, report in self.by_name.items())


@dataclasses.dataclass(frozen=True)
class Journals:
    """The journals of several teachers, as a checkpoint takes them."""

    by_name: dict

    def totals(self) -> Totals:
        """Spent by all."""
        return sum((journal.totals() for journal in self.by_name.values()), Totals())

    def position(self) -> dict:
        """How far each file has got, by `NAME/FILE`."""
        return {
            f"{name}/{file}": at for name, journal in self.by_name.items() for file, at in journal.position().items()
        }

    def copy_to(self, folder) -> None:
        """Copies each into a folder of its name."""
        for name, journal in self.by_name.items():
            journal.copy_to(pathlib.Path(folder) / name)


class RowTeachers(PaidTeacher):
    """The named teachers of a run as one: each request goes to the one that it names.

    Args:
      cfgs: {name: its config}, from `configs`.
      teachers: {name: the teacher}.
    """

    def __init__(self, cfgs: dict[str, ConfigDict], teachers: dict[str, Teacher]):
        self._cfgs, self._teachers = cfgs, teachers
        self._parts = {name: 1 / len(teachers) for name in teachers}
        journals = {name: t.journal for name, t in teachers.items() if t.journal is not None}
        self.journal = Journals(journals) if journals else None

    def named(self, name: str) -> Teacher:
        """The teacher of that name."""
        return self._teachers[name]

    def take_rows(self, names: list[str]) -> None:
        """Learns which teacher each training prompt names: what estimates and allowances go by."""
        count = Counter(names)
        self._parts = {name: count[name] / max(1, len(names)) for name in self._teachers}
        for name, teacher in self._teachers.items():
            teacher.take_rows([name] * count[name])

    async def check(self) -> str:
        """Each one's line. Raises `UserError` with what is wrong with any of them."""
        done = await asyncio.gather(*(t.check() for t in self._teachers.values()), return_exceptions=True)
        if other := next((e for e in done if isinstance(e, BaseException) and not isinstance(e, UserError)), None):
            raise other
        said = [f"teachers.{name}: {line}" for name, line in zip(self._teachers, done)]
        wrong = [line for line, e in zip(said, done) if isinstance(e, UserError)]
        if wrong:
            raise UserError("\n".join(wrong))
        return "\n".join(said)

    @property
    def report(self) -> Reports | None:
        """The probes' reports; None where no teacher has been probed."""
        found = {name: t.report for name, t in self._teachers.items() if t.report is not None}
        return Reports(found) if found else None

    async def continue_text(self, request: ContinuationRequest) -> ContinuationResult:
        """Asks the teacher that the request names, at its own temperature. Raises `TeacherStopped`, with its name."""
        t = self._cfgs[request.teacher].teacher
        request = dataclasses.replace(request, temperature=t.temperature, top_p=t.top_p)
        try:
            return await self._teachers[request.teacher].continue_text(request)
        except TeacherStopped as e:
            raise TeacherStopped(f"teachers.{request.teacher}: {e}") from e.__cause__

    async def close(self) -> None:
        """Closes all."""
        await gather_all(t.close() for t in self._teachers.values())

    def metrics(self) -> dict[str, float]:
        """`teacher/NAME/*` of each, and `teacher/*` of all: sums, the slowest one's 95th percentile, means of those
        that were asked."""
        by_name = {name: t.metrics() for name, t in self._teachers.items()}
        out = _as_one([m for m in by_name.values() if m])
        for name, own in by_name.items():
            out |= {key.replace("teacher/", f"teacher/{name}/", 1): value for key, value in own.items()}
        return out

    def allowance(self, steps_left: int, rows: int, num_chunks: int, num_continuations: int) -> tuple[int, int]:
        """The least (M, N) of any: a batch has one shape."""
        own = (
            t.allowance(steps_left, rows * self._parts[name], num_chunks, num_continuations)
            for name, t in self._teachers.items()
            if self._parts[name]
        )
        return tuple(map(min, zip(*own)))

    def given(self, step: str) -> tuple[int, int] | None:
        """Of whichever keeps it."""
        return next((found for t in self._teachers.values() if (found := t.given(step)) is not None), None)

    def give(self, step: str, value: tuple[int, int]) -> None:
        """To each."""
        for t in self._teachers.values():
            t.give(step, value)

    def spent(self) -> Spent | None:
        """Spent by all over the run's starts; None where nobody counts."""
        found = [spent for t in self._teachers.values() if (spent := t.spent()) is not None]
        return sum(found, Spent()) if found else None

    def paid(self) -> list:
        """Of each, one after another."""
        return [totals for t in self._teachers.values() for totals in t.paid()]

    def divide_budget(self, disks: list[list]) -> None:
        """Each divides its own part."""
        at = 0
        for t in self._teachers.values():
            own = slice(at, at + len(t.paid()))
            t.divide_budget([paid[own] for paid in disks])
            at = own.stop

    @property
    def price(self) -> money.Price:
        """Known where every price is; the figures are each teacher's own."""
        return money.Price(known=all(t.price.known for t in self._paid().values()))

    def estimate(self, steps: int | None = None, part: float = 1.0) -> money.Estimate:
        """The sum of what is to come of each; the hours are those of the slowest."""
        own = [t.estimate(steps, part * self._parts[name]) for name, t in self._paid().items()]
        return total(own)

    def forecast(self, steps: int | None = None, part: float = 1.0) -> str:
        """Each one's table, with its part of the prompts."""
        return "\n".join(
            f"teachers.{name}, {self._parts[name]:.0%} of the prompts\n{t.forecast(steps, part * self._parts[name])}"
            for name, t in self._paid().items()
        )

    def _paid(self) -> dict:
        return {name: t for name, t in self._teachers.items() if t.journal is not None}


def total(estimates: list[money.Estimate]) -> money.Estimate:
    """Several teachers' estimates as one: they are asked side by side, so the hours are those of the slowest."""
    sums = {
        field: tuple(map(sum, zip(*(getattr(e, field) for e in estimates))))
        for field in ("calls", "tokens_in", "tokens_out", "usd")
    }
    hours = tuple(map(max, zip(*(e.hours for e in estimates))))
    return money.Estimate(**sums, hours=hours, price_known=all(e.price_known for e in estimates))


def _as_one(parts: list[dict]) -> dict[str, float]:
    """`teacher/*` of several teachers as one."""
    asked = [m for m in parts if m.get("teacher/calls") or m.get("teacher/replayed_fraction")] or parts
    out = {}
    for key in dict.fromkeys(k for m in parts for k in m):
        added = key.removeprefix("teacher/") in ADDED_UP
        having = [m for m in parts if key in m]
        values = [m[key] for m in having if added or m in asked] or [m[key] for m in having]
        if added:
            out[key] = sum(values)
        elif key.endswith("_p95"):
            out[key] = max(values)
        elif key.endswith("price_known"):
            out[key] = min(values)
        else:
            out[key] = sum(values) / len(values)
    if "teacher/tokens_cached" in out:
        out["teacher/cache_hit_rate"] = out["teacher/tokens_cached"] / max(out["teacher/tokens_in"], 1)
    return out


def agreement(audits, gather) -> dict[str, float]:
    """`teacher/NAME/audits` and `teacher/NAME/similarity_mean` of a step's audits, over all processes.

    Args:
      audits: audit.Audit, compared; those that name no teacher are left out.
      gather: `processes.gather`.
    """
    own: dict[str, list] = {}
    for a in audits:
        if a.request.teacher and a.similarity is not None and a.request.peak >= 0:
            sums = own.setdefault(a.request.teacher, [0, 0, 0.0])
            sums[:] = sums[0] + 1, sums[1] + len(a.similarity), sums[2] + float(sum(a.similarity))
    parts, out = gather("agreement by teacher", own), {}
    for name in sorted({name for part in parts for name in part}):
        count, texts, value = (sum(part.get(name, [0, 0, 0.0])[i] for part in parts) for i in range(3))
        out |= {f"teacher/{name}/audits": count, f"teacher/{name}/similarity_mean": value / max(1, texts)}
    return out
