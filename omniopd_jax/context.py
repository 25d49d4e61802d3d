"""Self-distillation with privileged context (method.md, section 6): the student's own answer is scored under a prompt
that also shows a solution; the student is drawn to that distribution, token by token.

Here: which model scores, what its prompt says, and the rows that an update takes. The divergence is the vocabulary
pass's (`vocab.DIVERGENCES`). The text teacher's part is ours: OPSD (arXiv 2601.18734) has solutions from a data set.
"""

import dataclasses

import flax.struct
import jax

from omniopd_jax.parallel.packing import Packed

TEMPLATE_TOKENS = 128  # room for the template's own words, where no cap is set


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Who scores under the privileged prompt. Neither field: the student as it stands, by its own arrays.

    Attributes:
      reference: the frozen initial student (OPSD's default).
      averaged: a running average of what is trained, which the state then holds (`context.ema_decay`).
    """

    reference: bool = False
    averaged: bool = False


SCORERS = {"reference": Scorer(reference=True), "self": Scorer(), "ema": Scorer(averaged=True)}


@flax.struct.dataclass
class ContextRows:
    """The same responses behind their privileged prompts.

    Attributes:
      token_BL, packed: as in `objective.Batch`; a response is in the part of packed rows that its own row is in.
      prompt_length_B: int32 tokens of the privileged prompts.
      given_B: float32, 1 where there is a solution to show; the other rows teach nothing.
    """

    token_BL: jax.Array | None
    prompt_length_B: jax.Array
    given_B: jax.Array
    packed: Packed | None = None

    @property
    def tokens(self) -> jax.Array | Packed:
        """Whichever holds the tokens."""
        return self.token_BL if self.packed is None else self.packed


def messages(original: tuple[dict, ...], solution: str, template: str) -> tuple[dict, ...]:
    """The prompt's messages with the last one written by `context.template`: {prompt} and {solution} are filled in."""
    last = original[-1]
    parts = template.split("{solution}")  # each text goes in as it is, braces of its own included
    content = solution.join(part.replace("{prompt}", last["content"]) for part in parts)
    return (*original[:-1], last | {"content": content})


def most_tokens(cfg) -> int:
    """Tokens of the longest privileged prompt; a longer one's rows are left out and counted."""
    return cfg.context.max_prompt_length or cfg.max_prompt_length + cfg.max_completion_length + TEMPLATE_TOKENS
