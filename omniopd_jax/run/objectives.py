"""Checks of the settings that belong to one way to learn, and of several in one step (`objective.mix`)."""

import math

from omniopd_jax import context, cuts, objective, solutions
from omniopd_jax.errors import UserError, one_of
from omniopd_jax.teachers.protocol import WHITE_BOX


def check(c) -> None:
    """What the objective's own settings allow.

    Raises:
      UserError: one line naming the key, its value and what is allowed.
    """
    _check_mix(c)
    own = [objective.of(part) for _, part in objective.parts(c)]
    if c.rollout.parts > 1 and not objective.of(c).samples:
        raise UserError(f"rollout.parts = {c.rollout.parts}: {objective.title(c)} samples nothing, so set it to 1")
    _check_reward(c)
    if any(o.cut is not None and o.samples for o in own):
        _check_continuation(c)
    if any(o.cut is not None for o in own):
        _check_packed(c)
    if any(o.scorer for o in own):
        _check_context(c)
    _check_saving(c)


def _check_mix(c) -> None:
    for name, weight in c.objective.mix.items():
        one_of(name, objective.OBJECTIVES, "objective.mix")
        if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight <= 0:
            raise UserError(f"objective.mix.{name} = {weight!r} must be a number above 0")
    if len(c.objective.mix) < 2:
        return
    own = {part.objective.name: objective.of(part) for _, part in objective.parts(c)}
    apart = [name for name, o in own.items() if o.divergence]
    if len(apart) > 1:
        raise UserError(
            f"objective.mix: {' and '.join(map(repr, apart))} each need a second reference in the vocabulary pass, "
            "which takes one: leave one of them out"
        )
    white = [name for name, o in own.items() if o.asks & WHITE_BOX]
    text = [name for name, o in own.items() if o.asks - WHITE_BOX]
    if white and (text or len(white) > 1):
        raise UserError(
            f"objective.mix: {white[0]!r} needs a teacher's log-probs and {(text + white[1:])[0]!r} another kind of "
            "teacher, and a run has one teacher: leave one of them out"
        )
    if c.reward.coef:
        raise UserError(
            f"reward.coef = {c.reward.coef} with objective.mix: give the reward a part of its own, objective.mix.grpo"
        )


def _check_continuation(c) -> None:
    k = c.continuation.cut_tokens
    if c.continuation.cut == "fixed" and k > c.max_completion_length:
        raise UserError(
            f"continuation.cut_tokens = {k} is more than max_completion_length = {c.max_completion_length}: no answer "
            "would reach it"
        )


def _check_packed(c) -> None:
    longest = longest_row(c)
    if 0 < c.packing.length < longest:
        raise UserError(
            f"packing.length = {c.packing.length} holds no prompt, prefix and continuation at their longest: at least "
            f"{longest}, or 0 for no packing"
        )


def _check_reward(c) -> None:
    [(_, first), *more] = objective.parts(c)
    if c.reward.coef and not more and objective.of(first).cut is not None:
        name = first.objective.name
        raise UserError(
            f"reward.coef = {c.reward.coef} weighs the student's own answers, and objective.name = {name!r} trains on "
            f"the teacher's texts: set objective.mix = {{'{name}': 1.0, 'grpo': {c.reward.coef}}}"
        )


def longest_row(c, *, teacher: bool = False) -> int:
    """Tokens of the longest row that the student computes on: prompt and answer, what the teacher adds to it, what it
    is shown; or of a teacher in process, which is shown nothing."""
    longest = c.max_prompt_length + c.max_completion_length
    for _, part in objective.parts(c):
        own = objective.of(part)
        if own.scorer and not teacher:
            longest = max(longest, context.most_tokens(c) + c.max_completion_length)
        if own.cut is not None and (own.samples or not teacher):  # a teacher writes a solution as long as an answer
            prefix = c.max_completion_length if own.samples else 0
            longest = max(longest, c.max_prompt_length + prefix + cuts.most_tokens(c))
    return longest


def check_privileged(cfg, prompts, template) -> None:
    """A privileged prompt must have room for a solution: of the first prompts, the template's own words are counted.

    Raises:
      UserError: none of them has.
    """
    if objective.of(cfg).scorer is None:
        return
    texts = [
        template.render(context.messages(tuple(p.messages), "", cfg.context.template)) for p in prompts.prompts[:64]
    ]
    least = min(map(len, template.ids(texts)))
    if least >= (most := context.most_tokens(cfg)):
        raise UserError(
            f"a privileged prompt takes at least {least} tokens without any solution, and at most {most} are allowed: "
            "set context.max_prompt_length, or a shorter context.template"
        )


def _check_saving(c) -> None:
    """What buys less: rounds of continuations, and the gate."""
    own, name = objective.of(c), objective.title(c)
    if solutions.gated(c) and not own.asks & {"continuations", "prefixes"}:
        raise UserError(
            f"audit.gate = {c.audit.gate!r} saves audits and continuations, and objective.name = {name!r} buys "
            "neither: set it to 'none'"
        )
    if not c.audit.adaptive:
        return
    for wrong, why in (
        (not own.audited, f"objective.name = {name!r} asks for none"),
        (c.audit.shuffle_texts, "audit.shuffle_texts compares with another prompt's, which are not there in a round"),
        (c.max_staleness, "max_staleness = 1 does not know the step before in time: set it to 0"),
        (c.audit.adaptive_first > c.audit.num_continuations, f"audit.adaptive_first = {c.audit.adaptive_first} is more "
         f"than audit.num_continuations = {c.audit.num_continuations}"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"audit.adaptive asks for continuations in rounds: {why}")


def _check_context(c) -> None:
    for field, why in (("{prompt}", "ask what the student was asked"), ("{solution}", "show a solution")):
        if field not in c.context.template:
            raise UserError(f"context.template has no {field}: the privileged prompt must {why}")
    if not 0 <= c.context.ema_decay < 1:
        raise UserError(f"context.ema_decay = {c.context.ema_decay} must be at least 0 and less than 1")
    if context.most_tokens(c) < c.max_prompt_length:
        raise UserError(
            f"context.max_prompt_length = {c.context.max_prompt_length} is less than max_prompt_length = "
            f"{c.max_prompt_length}: a prompt that also shows a solution is longer; 0 for both caps together"
        )
