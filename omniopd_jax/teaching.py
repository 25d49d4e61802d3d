"""The stages of a step that have to do with whole texts by the teacher: asked for, graded, trained on or shown.

Beside the stages of experience.py, which the loop (train.py) names as well: the parts of `objective.mix` that sample,
score and audit need none of these.
"""

import dataclasses

import numpy as np

from omniopd_jax import audit, context, continuation, cuts, graders, objective, solutions
from omniopd_jax.experience import Asked, Drawn, Experience, Group, Responses, Scores, Student, audits_of, wait
from omniopd_jax.parallel import processes, sharding
from omniopd_jax.run import batching
from omniopd_jax.run.host import AsyncThread, StopFlag
from omniopd_jax.teachers.protocol import Teacher


def solve(teacher: Teacher | None, thread: AsyncThread, drawn: Drawn, cfg) -> list[Asked]:
    """Starts asking for whole solutions of the step's prompts, where a part reads them and the file brings none."""
    count = solutions.wanted(cfg)
    if not count or solutions.are_given(drawn.prompts):
        return []
    audits = solutions.plan(drawn.prompts, count, cfg)
    return [Asked(thread.submit(audit.ask(teacher, audits)), audits)]


def gate(solving: list[Asked], drawn: Drawn, stop: StopFlag, cfg) -> solutions.Gate:
    """What the gate found, once the teacher's solutions are there; nothing without one."""
    if not solutions.gated(cfg):
        return solutions.Gate()
    wait([asked.future for asked in solving], stop)
    found = solutions.texts(drawn.prompts, audits_of(solving))
    grade_all = graders.shared(cfg.reward.grader).grade_all
    return solutions.closed(drawn.prompts, found, cfg.audit.gate_attempts, grade_all)


def unless_closed(peak_BM: np.ndarray, responses: Responses, shut: frozenset[str]) -> np.ndarray:
    """The peaks without those of prompts that the gate has closed: their tokens are the anchor's."""
    shut_B = np.array([p.id in shut for p in responses.prompts])
    return np.where(shut_B[:, None], -1, peak_BM).astype(np.int32)


def go_on(
    teacher: Teacher | None, thread: AsyncThread, responses: Responses, scores: Scores | None, student: Student, cfg,
    *, shut: frozenset[str] = frozenset(),
) -> list[Asked]:  # fmt: skip
    """Starts asking for texts behind prefixes of the responses, where a part is trained on them; none for prompts in
    `shut`."""
    out = []
    for rule in continued(cfg):
        entropy_BT = scores.entropy_BT if rule.reads_entropy else None
        audits = continuation.plan(student.decoder, rule, responses, entropy_BT, cfg)
        audits = [a for a in audits if responses.prompts[a.row].id not in shut]
        responses.placed(audits)
        out.append(Asked(thread.submit(audit.ask(teacher, audits)), audits))
    return out


def continued(cfg) -> list[cuts.Cut]:
    """The cut rule of the part whose prefixes are the student's; at most one."""
    own = (objective.of(part) for _, part in objective.parts(cfg))
    return [o.cut for o in own if o.cut is not None and o.samples]


def unsampled(drawn: Drawn, solving: list[Asked], cfg) -> Group:
    """A step of whole solutions alone: the student answers nothing."""
    peak_BM = np.full((0, cfg.audit.num_chunks), -1, np.int32)
    return Group(None, None, peak_BM, [], drawn.prompts, solving)


def taught(group: Group, student: Student, cfg) -> tuple[Group, list[Responses], dict[str, float]]:
    """(the group, the rows of each part that is trained on the teacher's texts, counts of them), once all is answered.

    Where the student has not answered, the group's responses are the first of these rows.
    """
    out, notes, template = [], dict(group.notes), student.template
    found = solutions.texts(group.prompts, audits_of(group.solving)) if solutions.wanted(cfg) else []
    for _, part in objective.parts(cfg):
        own = objective.of(part)
        if own.cut is None:
            continue
        if own.samples:
            audits = audits_of(group.continued)
            texts = continuation.rows(audits, group.responses, template, cfg)
            failed = sum(not a.result.continuations for a in audits)
            closed = int(notes.get("gate_closed", 0)) * cfg.num_generations * cfg.continuation.cuts
            notes |= continuation.metrics(texts, failed, closed)
            rows = Responses(texts.prompts, texts.sample_ids, texts.tokens, np.array(texts.finished))
        else:
            count = 1 if solutions.are_given(group.prompts) else cfg.num_generations
            tokens, finished = solutions.rows(
                group.prompts, found, count, template, cuts.most_tokens(cfg), student.decoder.opened
            )
            prompts = [p for p in group.prompts for _ in range(count)]
            ids = [solutions.solution_id(p.id) for p in prompts]
            rows = Responses(prompts, ids, tokens, np.array(finished))
        out.append(rows)
    return (group if group.responses else dataclasses.replace(group, responses=out[0])), out, notes


def with_context(got: Experience, group: Group, student: Student, cfg) -> Experience:
    """The same with its responses behind prompts that also show a solution, where a part scores them so."""
    if objective.of(cfg).scorer is None:
        return got
    batch = got.batch
    rows = batching.Rows(batch.token_BL, batch.packed, batch.prompt_length_B, batch.width)
    found = solutions.texts(group.prompts, audits_of(group.solving))
    prompts, given, template = [], [], student.template
    for prompt, texts in zip(group.prompts, found, strict=True):
        shown, ids = solutions.shown(texts, group.right.get(prompt.id)), ()
        if shown is not None:
            told = context.messages(tuple(prompt.messages), shown.text, cfg.context.template)
            ids = tuple(template.ids([template.render(told)])[0])
        fits = 0 < len(ids) <= context.most_tokens(cfg)
        prompts += [dataclasses.replace(prompt, token_ids=ids if fits else prompt.token_ids)] * cfg.num_generations
        given += [fits] * cfg.num_generations
    sent = batching.put(prompts, group.responses.tokens, student.mesh, cfg, like=rows)
    given_B = sharding.put_rows(np.array(given, np.float32), student.mesh)
    behind = context.ContextRows(sent.token_BL, sent.prompt_length_B, given_B, sent.packed)
    notes = got.notes | {"context_left_out": len(given) - sum(given)}
    return dataclasses.replace(got, batch=batch.replace(context=behind), notes=notes)


def note_metrics(notes: dict[str, float]) -> dict[str, float]:
    """Metrics of all processes' counts of the rows that the teacher's texts made. All processes must call."""
    if not notes:
        return {}
    parts = processes.gather("the teacher's rows", notes)
    total = {key: sum(part[key] for part in parts) for key in notes}
    out = continuation.rates(total) if "cut" in notes else {}
    if "gate_prompts" in notes:
        out["gate/closed_fraction"] = total["gate_closed"] / max(1, total["gate_prompts"])
        out["gate/accuracy"] = total["gate_right"] / max(1, total["gate_graded"])
    if "context_left_out" in notes:
        out["context/left_out"] = total["context_left_out"]
    return out
