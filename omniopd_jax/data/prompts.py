"""Prompts: from a file, a hub data set or the small world; and their order, a pure function of seed and step."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from omniopd_jax import config, world
from omniopd_jax.data import files
from omniopd_jax.errors import UserError, one_of
from omniopd_jax.hf import bounded, hub
from omniopd_jax.hf.template import Template

READ = {  # data.source -> the keys below that name its prompts
    "world": ("data.name", "data.split", "eval.split"),
    "jsonl": ("data.path", "eval.path"),
    "hub": ("data.name", "data.subset", "data.split", "eval.split", "eval.path"),  # held-out prompts may be a file
}
PLACES = tuple(dict.fromkeys(key for keys in READ.values() for key in keys))
WORD = "Zq7message"  # a text that no template writes by itself
WORLD = 4096  # prompts of the small world where data.num_prompts is 0
# names that ShareGPT and others give them, in small letters
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "model": "assistant"}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt. `messages` are chat messages; `token_ids` the rendered prompt, empty before `encode`.

    `answer` is what a grader compares with, an object or a list as its JSON; `solution` a worked one, which `sft`
    reads. `teacher` is the one of `teachers.NAME` that is asked; "" where the run has but one.
    """

    id: str
    messages: tuple[dict, ...]
    answer: str | None = None
    solution: str | None = None
    token_ids: tuple[int, ...] = ()
    teacher: str = ""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a split, and what was left out on the way."""

    prompts: list[Prompt]
    duplicates: int = 0
    overlong: int = 0

    def __len__(self):
        return len(self.prompts)


def unread(source: str) -> tuple[str, ...]:
    """The keys of `PLACES` that nothing reads under a `data.source`."""
    return tuple(key for key in PLACES if key not in READ.get(source, PLACES))


def count_known(cfg) -> int:
    """How many training prompts there are at the most, before any is read; 0: not known."""
    return cfg.data.num_prompts or (WORLD if cfg.data.source == "world" else 0)


def first_has_solution(cfg) -> bool:
    """Whether the first row of a file of training prompts brings a solution; a file that can't be read does not."""
    if cfg.data.source != "jsonl":
        return False
    try:
        _, prompt, _ = next(iter(_file(cfg, "", cfg.data.path, 1, "data")))
    except (UserError, StopIteration):
        return False
    return prompt.solution is not None


def load(
    cfg, *, source: str, split: str, path: str, count: int, section: str = "data",
    check: Callable[[Any], None] | None = None,
) -> Prompts:  # fmt: skip
    """Reads prompts; duplicates (by the content of their messages) are dropped and counted.

    Args:
      cfg: for `data.name` and `data.fields`.
      source: world | jsonl | hub.
      split: of the world or the hub data set.
      path: of the file (`files`).
      count: the first N; 0 = all (world: 4,096).
      section: of the config, for the messages: whose `path` and `split` these are.
      check: of the grader that will read the answers (`Grader.check_answer`): raises a `UserError` for an answer of a
        form that it can't compare with, which then names the row's file and line. None: answers are not asked for.

    Raises:
      UserError: names the file and line, the data set, or the empty set.
    """
    readers = {"world": _world, "jsonl": _file, "hub": _hub}
    seen, kept, duplicates = set(), [], 0
    for where, prompt, answer in readers[source](cfg, split, path, count, section):
        if check is not None:
            _check_answer(answer, check, where)
        prompt = _with_teacher(prompt, cfg, where) if section == "data" else dataclasses.replace(prompt, teacher="")
        content = json.dumps([prompt.messages, prompt.teacher], sort_keys=True)
        if content in seen:
            duplicates += 1
            continue
        seen.add(content)
        kept.append(prompt)
        if count and len(kept) == count:
            break
    if not kept:
        raise UserError(f"no prompts in {_where(cfg, source, split, path, section)}: it is empty")
    if len({p.id for p in kept}) < len(kept):
        raise UserError(
            f"prompt ids repeat in {_where(cfg, source, split, path, section)}: each `id` must be unique, or left out"
        )
    return Prompts(kept, duplicates)


def _with_teacher(prompt: Prompt, cfg, where: str) -> Prompt:
    """The prompt with the teacher that it names, where the run has several; else with none.

    Raises:
      UserError: it names none of them; names the row.
    """
    names = ", ".join(sorted(cfg.teachers))
    if not names:
        return dataclasses.replace(prompt, teacher="")
    if prompt.teacher not in cfg.teachers:
        said = f"`{cfg.data.fields.teacher}` = {prompt.teacher!r} is none" if prompt.teacher else "names none"
        raise UserError(f"{where}: {said} of the run's teachers ({names}); name one, or add it to `teachers`")
    return prompt


def with_suffix(data: Prompts, suffix: str) -> Prompts:
    """The same with `suffix` behind each last message, a blank line between; as they are where it is empty."""
    if not suffix:
        return data

    def one(p: Prompt) -> Prompt:
        last = p.messages[-1]
        return dataclasses.replace(p, messages=(*p.messages[:-1], last | {"content": f"{last['content']}\n\n{suffix}"}))

    return dataclasses.replace(data, prompts=[one(p) for p in data.prompts])


def encode(data: Prompts, template: Template, cfg, *, overlong: str = "data.overlong") -> Prompts:
    """Renders each prompt with its generation prompt and tokenizes it; overlong ones are an error, or dropped and
    counted.

    Args:
      overlong: the config key that says which of the two; "": an error.

    Raises:
      UserError: a prompt that the template refuses, one longer than `max_prompt_length` that may not be dropped, or
        none left.
    """
    drop = bool(overlong) and config.get(cfg, overlong) == "drop"
    check_rendering(template, data)
    texts = [render(template, prompt) for prompt in data.prompts]
    ids = template.ids(texts)
    kept = []
    for prompt, token_ids in zip(data.prompts, ids, strict=True):
        if len(token_ids) <= cfg.max_prompt_length:
            kept.append(dataclasses.replace(prompt, token_ids=tuple(token_ids)))
        elif not drop:
            raise UserError(
                f"prompt {prompt.id!r} has {len(token_ids)} tokens, more than max_prompt_length = "
                f"{cfg.max_prompt_length}; raise it" + (f", or set {overlong} = 'drop'" if overlong else "")
            )
    if not kept:
        raise UserError(f"all {len(ids)} prompts are longer than max_prompt_length = {cfg.max_prompt_length}")
    return Prompts(kept, data.duplicates, len(ids) - len(kept))


def render(template: Template, prompt: Prompt) -> str:
    """The prompt's text. Raises `UserError`, which names the prompt, where the template refuses it."""
    try:
        return template.render(prompt.messages)
    except UserError as error:
        raise UserError(f"prompt {prompt.id!r}: {error}") from None


def check_rendering(template: Template | None, data: Prompts) -> None:
    """Renders one prompt of each sequence of roles, before a model is loaded for it. None: messages go out as they are.

    Raises:
      UserError: the template refuses one of them, or leaves a message out.
    """
    kinds = {tuple(m["role"] for m in p.messages): p for p in data.prompts} if template is not None else {}
    for prompt in kinds.values():
        text = render(template, prompt)
        for i, m in enumerate(prompt.messages):
            if m["role"] != "assistant" and m["content"].strip() not in text and not _written(template, prompt, i):
                raise UserError(
                    f"prompt {prompt.id!r}: {template.what} leaves the message of role {m['role']!r} out: give it a "
                    "role that the template writes (user, mostly system), or put its text into the user's message"
                )


def _written(template: Template, prompt: Prompt, i: int) -> bool:
    """Whether the template writes message i, which it may change on the way: by a word in its place."""
    other = dict(prompt.messages[i], content=WORD)
    try:
        return WORD in template.render((*prompt.messages[:i], other, *prompt.messages[i + 1 :]))
    except UserError:  # it wants more of it than a word
        return True


def batch_indices(seed: int, step: int, batch: int, size: int) -> np.ndarray:
    """Which prompts step `step` takes: a slice of one endless order, a fresh seeded permutation each epoch.

    The data position is the step: nothing else need be saved. Every process computes the same indices and takes its
    slice.
    """
    position = np.arange(step * batch, (step + 1) * batch)
    epochs = position // size
    out = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, int(epoch)])).permutation(size)
        out[epochs == epoch] = order[position[epochs == epoch] % size]
    return out


def _world(cfg, split, path, count, section):
    if path:
        raise UserError(f"{section}.path = {path!r} is not read under data.source = 'world': set data.source = 'jsonl'")
    name = one_of(cfg.data.name or "forks", world.WORLDS, "data.name")
    one_of(split, world.SPLITS, f"{section}.split")
    problems = world.problems(name, split, count or WORLD)
    for p in problems:
        yield p.id, Prompt(p.id, ({"role": "user", "content": p.prompt},), p.answer), p.answer


def _file(cfg, split, path, count, section):
    if not path:
        raise UserError(f"data.source = 'jsonl' needs {section}.path, a file of rows ({', '.join(files.FORMS)})")
    for where, number, row in files.rows(path, f"{section}.path"):
        yield where, _prompt(row, cfg.data.fields, where, number), field(row, cfg.data.fields.answer)


def _hub(cfg, split, path, count, section):
    if not cfg.data.name:
        raise UserError("data.source = 'hub' needs data.name, e.g. 'open-r1/DAPO-Math-17k-Processed'")
    advice = "check the name and the network, or set data.source = 'jsonl' and data.path"
    rows = load_hub(cfg.data.name, split, subset=cfg.data.subset or None, setting="data.name", advice=advice)
    for number, row in enumerate(rows):
        where = f"{cfg.data.name}, row {number}"
        yield where, _prompt(row, cfg.data.fields, where, number), field(row, cfg.data.fields.answer)


def load_hub(name: str, split: str, *, subset: str | None = None, setting: str, advice: str):
    """The rows of a hub data set, or of its local cache where the hub does not answer within seconds.

    Args:
      name, split, subset: as the hub has them; `subset` is what it calls a configuration.
      setting: what the error names; advice: what it ends in.

    Raises:
      UserError: one line.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{setting} = {name!r} is on the hub: needs the `datasets` package (requirements.txt)"
        ) from error
    try:
        with hub.offline_unless_reachable(name, "dataset"):
            return datasets.load_dataset(*([name, subset] if subset else [name]), split=split)
    except Exception as error:  # offline, unknown name and unknown split come as different types
        raise UserError(
            f"{setting} = {name!r} (split {split!r}) can't be loaded from the hub: {bounded.line(error)}; {advice}"
        ) from error


def _prompt(row: dict, fields, where: str, number: int) -> Prompt:
    """The prompt of a row; `fields` say which of the row's own fields are its prompt, answer, solution and id."""
    messages = _messages(field(row, fields.prompt), row, fields.prompt, where)
    # a worked solution only where that column is not said to be the answer
    solution = field(row, fields.solution) if fields.solution != fields.answer else None
    if isinstance(solution, str) and not solution.strip():  # an empty cell
        solution = None
    if solution is not None and not isinstance(solution, str):
        raise UserError(f"{where}: `{fields.solution}` is no text; set data.fields.solution to another field, or to ''")
    answer, name = _answer(field(row, fields.answer), fields.answer, where), field(row, fields.id)
    try:
        check_text([messages, answer, solution, str(name)], where)
    except (TypeError, RecursionError) as error:
        raise UserError(f"{where}: `{fields.prompt}` holds what is no JSON, or is nested too deep") from error
    teacher = field(row, fields.teacher)
    return Prompt(
        f"{number:06d}" if name in (None, "") else str(name), messages, answer, solution,
        teacher="" if teacher is None else str(teacher),
    )  # fmt: skip


def check_text(value, where: str) -> None:
    """Raises a UserError where a text within `value` cannot be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a surrogate pair, which is no text ({error.reason})") from error


def field(row: dict, name: str):
    """A field by its name, or by a path of names with dots between; None where there is none, or NaN: how tables write
    nothing."""
    path = [name] if name in row or "." not in name else name.split(".")
    found = row if name else None
    for part in path:
        found = found.get(part) if isinstance(found, dict) else None
    return None if isinstance(found, float) and math.isnan(found) else found


def _messages(prompt, row: dict, field: str, where: str) -> tuple[dict, ...]:
    """The row's prompt as chat messages, each a role and a text, the last of them not the assistant's.

    Raises:
      UserError: it is none of the forms that are known; names the row's own fields where `field` is not among them.
    """
    if prompt is None and field not in row:
        hint = f"; set data.fields.prompt to the one that holds the prompt (it is {field!r})" if row else ""
        raise UserError(
            f"{where}: no field `{field}`; the row's fields: {', '.join(map(str, row))[:150] or 'none'}{hint}"
        )
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = [_message(m) for m in prompt] if isinstance(prompt, list) else []
    if not messages or None in messages or not any(m["content"].strip() for m in messages):
        raise UserError(
            f"{where}: `{field}` must be a non-empty string or a list of messages with `role` and `content`, a text"
        )
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: `{field}` ends in the assistant's answer, which the student would have to go on from; leave "
            "that "
            "message out (its text may be the row's `solution`)"
        )
    return tuple(messages)


def _message(m) -> dict | None:
    """One message with its content as text: parts that are all text are joined; other names of the roles are
    translated."""
    if not isinstance(m, dict):
        return None
    if "from" in m and "role" not in m:
        m = {"role": m["from"], "content": m.get("value")}
    if isinstance(m.get("role"), str):  # a template writes the roles that it knows, and leaves others out
        role = m["role"].strip().lower()
        m = m | {"role": ROLES.get(role, role)}
    content = m.get("content")
    if isinstance(content, list) and content:
        parts = [
            p if isinstance(p, str) else p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None
            for p in content
        ]
        content = "".join(parts) if all(isinstance(p, str) for p in parts) else None
    if not isinstance(m.get("role"), str) or not isinstance(content, str):
        return None
    return {k: v for k, v in m.items() if v is not None} | {"content": content}


def _check_answer(answer, check: Callable[[Any], None], where: str) -> None:
    """Asks the grader about an answer as the row has it. Raises `UserError`, which names the row."""
    if answer is None:
        raise UserError(f"{where}: no answer; set data.fields.answer to the row's field that holds it")
    try:
        check(answer)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _answer(value, field: str, where: str) -> str | None:
    """An answer as text: a number as it is written, an object or a list as its JSON.

    Raises:
      UserError: true or false, or an object around the answer, which no grader would look into.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        raise UserError(f"{where}: `{field}` = {json.dumps(value)} is no answer; write it as a text")
    if isinstance(value, dict) and "ground_truth" in value:
        raise UserError(
            f"{where}: `{field}` is an object around the answer; set data.fields.answer = '{field}.ground_truth'"
        )
    if isinstance(value, bytes):  # a parquet file's
        raise UserError(f"{where}: `{field}` is binary; write it as a text")
    try:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, (int, float, dict, list)) else str(value)
    except (TypeError, RecursionError) as error:
        raise UserError(f"{where}: `{field}` holds what is no JSON, or is nested too deep") from error


def _where(cfg, source: str, split: str, path: str, section: str) -> str:
    return {
        "world": f"the small world {cfg.data.name!r}, split {split!r}",
        "jsonl": f"{section}.path = {path!r}",
        "hub": f"data.name = {cfg.data.name!r}, split {split!r}",
    }[source]
