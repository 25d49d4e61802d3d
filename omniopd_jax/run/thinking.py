"""Who thinks: what a run's settings and its teacher's probe say of thoughts on both sides (docs/teachers.md)."""

from omniopd_jax.errors import UserError
from omniopd_jax.hf import thoughts
from omniopd_jax.hf.template import Template, check_teacher

OPENS, CLOSES, FREE, UNKNOWN = "opens", "closes", "free", ""
_QUESTION = ({"role": "user", "content": "1 + 1?"},)
_BY_CHAT = ("continue_final_message", "prefix", "prefill")  # ways in which a server's own template writes the prefix


def mode(template: Template) -> str:
    """What a model's prompts do with its thoughts.

    OPENS: they leave the block open. CLOSES: they end in an empty one, thinking is off. FREE: the template knows the
    mark and leaves it to the model. UNKNOWN: it does not know it.
    """
    prompt = template.render(_QUESTION)
    if thoughts.left_open(prompt):
        return OPENS
    if thoughts.closed(prompt):
        return CLOSES
    return FREE if thoughts.OPEN in (template.source or "") else UNKNOWN


def check_span(cfg, template: Template) -> None:
    """Refuses a span that no response of the student can have.

    Raises:
      UserError: `audit.span = thinking`, and the student's prompts switch its thinking off.
    """
    if cfg.audit.span == "thinking" and mode(template) == CLOSES:
        raise UserError(
            "audit.span = 'thinking', and the student's prompts end in an empty <think> block, so that it has no "
            "thoughts: set student.chat_template_kwargs.enable_thinking = True, or audit.span = 'all'"
        )


def remarks(cfg, student: Template, teacher) -> list[str]:
    """What a person should know before a run in which one side thinks and the other does not, one line each."""
    own, name, out = mode(student), cfg.teacher.model, []
    thinks = own in (OPENS, FREE)
    report = teacher.report
    off = "teacher.chat_template_kwargs.enable_thinking = False"
    written_here = None if thinks else check_teacher(cfg)
    opens = written_here is not None and mode(written_here) == OPENS
    if not thinks and (opens or (report is not None and report.thinks == "open")):
        out.append(
            f"warning: the teacher {name!r} begins an answer with its thoughts, and the student does not think: first "
            f"chunks and whole solutions are compared with thoughts; set {off}"
        )
    if report is not None and report.thinks == "hidden":
        out.append(
            f"warning: the teacher {name!r} thinks out of sight before a whole answer; what it thinks is paid for and "
            "counts towards the length of first chunks and solutions"
        )
    if thinks and cfg.teacher.provider == "openai" and report is not None and report.mode in _BY_CHAT:
        out.append(
            f"warning: the student thinks, and {report.mode!r} lets the server's chat template write its unfinished "
            "answer: some templates (Qwen3's) close or drop an open <think> block; set teacher.tokenizer to the "
            "teacher's Hugging Face folder, for raw completion"
        )
    return out
