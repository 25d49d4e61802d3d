"""Teachers: text in, text out (protocol.py); here the registry of providers, and `make`."""

from omniopd_jax.errors import TeacherStopped, UserError, one_of
from omniopd_jax.teachers import local, probe, simulated
from omniopd_jax.teachers.protocol import (
    WHITE_BOX,
    Continuation,
    ContinuationRequest,
    ContinuationResult,
    Failure,
    Teacher,
    Usage,
    sample_id,
    stable_hash,
    together,
)
from omniopd_jax.teachers.wire import anthropic, gemini, openai

__all__ = [
    "TEACHERS", "WHITE_BOX", "Continuation", "ContinuationRequest", "ContinuationResult", "Failure", "Teacher",
    "TeacherStopped", "Usage", "make", "probe_report", "sample_id", "stable_hash", "together",
]  # fmt: skip
TEACHERS = {  # provider -> make(cfg); their SDKs are imported when a client connects
    "local": local.make,
    "simulated": simulated.make,
    "openai": openai.make,
    "anthropic": anthropic.make,
    "gemini": gemini.make,
}


def make(cfg) -> Teacher:
    """The teacher that `cfg.teacher.provider` names, built by its module's `make(cfg)`.

    Raises:
      UserError: unknown provider, one that gives no log-probs to an objective that wants them, or whatever the provider
        finds wrong with its settings.
    """
    one_of(cfg.teacher.provider, TEACHERS, "teacher.provider")
    able = WHITE_BOX.get(cfg.objective.name)
    if able and cfg.teacher.provider not in able:
        raise UserError(
            f"objective.name = {cfg.objective.name!r} needs a teacher's token log-probs, which teacher.provider = "
            f"{cfg.teacher.provider!r} does not give; set one of: {', '.join(able)}"
        )
    teacher = TEACHERS[cfg.teacher.provider](cfg)
    if able and teacher.foreign_tokenizer:
        raise UserError(
            f"objective.name = {cfg.objective.name!r} needs a teacher with the student's own tokenizer"
            + ("" if cfg.teacher.provider == "local" else ": set teacher.tokenizer to student.path, where it is the same")
        )
    return teacher


async def probe_report(cfg) -> probe.ProbeReport:
    """Makes the teacher that `cfg` names, probes it and closes it again.

    Raises:
      UserError: it cannot be a teacher, and what to change; or its provider has no probe (`local`, `simulated`).
    """
    teacher = make(cfg)
    try:
        await teacher.check()
        if getattr(teacher, "report", None) is None:
            raise UserError(f"teacher.provider = {cfg.teacher.provider!r} has no probe")
        return teacher.report
    finally:
        await teacher.close()
