"""Teachers: text in, text out (protocol.py); here the registry of providers, and `make`."""

import dataclasses
from collections.abc import Callable

from omniopd_jax import objective
from omniopd_jax.errors import TeacherStopped, UserError, one_of
from omniopd_jax.teachers import by_row, local, probe, simulated
from omniopd_jax.teachers.protocol import (
    DISTRIBUTION,
    LOGP,
    TEXT,
    Continuation,
    ContinuationRequest,
    ContinuationResult,
    Counts,
    Failure,
    PaidTeacher,
    Teacher,
    Usage,
    gather_all,
    need_of,
    sample_id,
    stable_hash,
)
from omniopd_jax.teachers.wire import anthropic, gemini, openai

__all__ = [
    "DISTRIBUTION", "LOGP", "TEACHERS", "TEXT", "Continuation", "ContinuationRequest", "ContinuationResult", "Counts",
    "Failure", "PaidTeacher", "Provider", "Teacher", "TeacherStopped", "Usage", "gather_all", "make", "probe_report",
    "sample_id", "stable_hash",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Provider:
    """How a kind of teacher is made, and what it can give beside text (of `openai`'s servers: vLLM and SGLang).

    `make` takes the config; where `white_box` names something, also `needs`, what it will be asked for.
    """

    make: Callable[..., Teacher]
    white_box: frozenset[str] = frozenset()


TEACHERS = {  # their SDKs are imported when a client connects
    "local": Provider(local.make, frozenset({LOGP, DISTRIBUTION})),
    "simulated": Provider(simulated.make),
    "openai": Provider(openai.make, frozenset({LOGP})),
    "anthropic": Provider(anthropic.make),
    "gemini": Provider(gemini.make),
}


def make(cfg, needs: str | None = None, asks: dict[str, int] | None = None) -> Teacher:
    """The teacher that `cfg.teacher.provider` names.

    Args:
      cfg: the recipe.
      needs: what the objective asks of it: TEXT, LOGP or DISTRIBUTION; None: what the record of the config's says.
      asks: for its estimate (`budget.estimate`); None: continuations at the peaks, or log-probs where those are needed.

    Raises:
      UserError: unknown provider, one that does not give what is needed, or whatever the provider finds wrong with its
        settings.
    """
    needs = needs or need_of(objective.of(cfg).asks)
    if asks is None and needs == LOGP:
        asks = {"logp": 1}
    if cfg.teachers:
        return _by_row(cfg, needs, asks)
    one_of(cfg.teacher.provider, TEACHERS, "teacher.provider")
    provider = TEACHERS[cfg.teacher.provider]
    if needs == TEXT:
        teacher = provider.make(cfg)
        teacher.asks = asks
        return teacher
    if needs not in provider.white_box:
        able = ", ".join(name for name, p in TEACHERS.items() if needs in p.white_box)
        raise UserError(
            f"objective.name = {cfg.objective.name!r} needs a teacher's token log-probs, which teacher.provider = "
            f"{cfg.teacher.provider!r} does not give; set one of: {able}"
        )
    teacher = provider.make(cfg, needs)
    teacher.asks = asks
    if teacher.foreign_tokenizer:
        raise UserError(
            f"objective.name = {cfg.objective.name!r} needs a teacher with the student's own tokenizer"
            + (
                ""
                if cfg.teacher.provider == "local"
                else ": set teacher.tokenizer to student.path, where it is the same"
            )
        )
    return teacher


def _by_row(cfg, needs: str, asks: dict[str, int] | None) -> Teacher:
    """The named teachers, each made as if it were the run's only one; what has been made is closed where one fails."""
    if needs == DISTRIBUTION:
        raise UserError(
            f"objective.name = {cfg.objective.name!r} reads one teacher's weights: `teachers` names several"
        )
    cfgs = by_row.configs(cfg)
    made: dict[str, Teacher] = {}
    for name, own in cfgs.items():
        try:
            made[name] = make(own, needs, asks)
        except UserError as error:
            for journal in (t.journal for t in made.values() if t.journal is not None):
                journal.close()
            raise UserError(f"teachers.{name}: {error}") from error
    return by_row.RowTeachers(cfgs, made)


async def probe_report(cfg) -> probe.ProbeReport:
    """Makes the teacher that `cfg` names, probes it and closes it again.

    Raises:
      UserError: it cannot be a teacher, and what to change; or its provider has no probe (`local`, `simulated`).
    """
    teacher = make(cfg)
    try:
        await teacher.check()
        if teacher.report is None:
            raise UserError(f"teacher.provider = {cfg.teacher.provider!r} has no probe")
        return teacher.report
    finally:
        await teacher.close()
