"""Prompts: from a JSONL file, a hub data set or the small world; and their order, a pure function of seed and step."""

import dataclasses
import json
import pathlib

import numpy as np

from omniopd_jax import world
from omniopd_jax.errors import UserError, one_of
from omniopd_jax.hf import hub


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt. `messages` are chat messages; `token_ids` the rendered prompt, empty before `encode`."""

    id: str
    messages: tuple[dict, ...]
    answer: str | None = None
    extra: dict = dataclasses.field(default_factory=dict)
    token_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a split, and what was left out on the way."""

    prompts: list[Prompt]
    duplicates: int = 0
    overlong: int = 0

    def __len__(self):
        return len(self.prompts)


def load(cfg, *, source: str, split: str, path: str, count: int, section: str = "data") -> Prompts:
    """Reads prompts; duplicates (by the content of their messages) are dropped and counted.

    Args:
      cfg: for `data.name` and `data.fields`.
      source: world | jsonl | hub.
      split: of the world or the hub data set.
      path: of the JSONL file.
      count: the first so many; 0 = all (world: 4,096).
      section: of the config, for the messages: whose `path` and `split` these are.

    Raises:
      UserError: names the file and line, the data set, or the empty set.
    """
    readers = {"world": _world, "jsonl": _jsonl, "hub": _hub}
    seen, kept, duplicates = set(), [], 0
    for prompt in readers[source](cfg, split, path, count, section):
        content = json.dumps(prompt.messages, sort_keys=True)
        if content in seen:
            duplicates += 1
            continue
        seen.add(content)
        kept.append(prompt)
        if count and len(kept) == count:
            break
    if not kept:
        raise UserError(f"no prompts in {_where(cfg, source, split, path)}: it is empty")
    if len({p.id for p in kept}) < len(kept):
        raise UserError(f"prompt ids repeat in {_where(cfg, source, split, path)}: each `id` must be unique, or left out")
    return Prompts(kept, duplicates)


def encode(data: Prompts, tokenizer, cfg) -> Prompts:
    """Renders each prompt with its generation prompt and tokenizes it; overlong ones are an error, or dropped and counted.

    Raises:
      UserError: a prompt longer than `max_prompt_length` under `data.overlong = error`, or none left.
    """
    texts = [render(tokenizer, p.messages, cfg.student.chat_template_kwargs) for p in data.prompts]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = []
    for prompt, token_ids in zip(data.prompts, ids, strict=True):
        if len(token_ids) <= cfg.max_prompt_length:
            kept.append(dataclasses.replace(prompt, token_ids=tuple(token_ids)))
        elif cfg.data.overlong == "error":
            raise UserError(
                f"prompt {prompt.id!r} has {len(token_ids)} tokens, more than max_prompt_length = {cfg.max_prompt_length}; "
                f"raise it, or set data.overlong = 'drop'"
            )
    if not kept:
        raise UserError(f"all {len(ids)} prompts are longer than max_prompt_length = {cfg.max_prompt_length}")
    return Prompts(kept, data.duplicates, len(ids) - len(kept))


def render(tokenizer, messages, chat_template_kwargs=None) -> str:
    """The prompt as text, with the tokenizer's chat template and its generation prompt."""
    kwargs = dict(chat_template_kwargs or {})
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **kwargs)


def batch_indices(seed: int, step: int, batch: int, size: int) -> np.ndarray:
    """Which prompts step `step` takes: a slice of one endless order, a fresh seeded permutation each epoch.

    The data position is the step: nothing else need be saved. Every process computes the same indices and takes its slice.
    """
    position = np.arange(step * batch, (step + 1) * batch)
    epochs = position // size
    out = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, int(epoch)])).permutation(size)
        out[epochs == epoch] = order[position[epochs == epoch] % size]
    return out


def _world(cfg, split, path, count, section):
    name = one_of(cfg.data.name or "forks", world.WORLDS, "data.name")
    one_of(split, world.SPLITS, f"{section}.split")
    problems = world.problems(name, split, count or 4096)
    for p in problems:
        yield Prompt(p.id, ({"role": "user", "content": p.prompt},), p.answer, {"fork": p.fork})


def _jsonl(cfg, split, path, count, section):
    if not path:
        raise UserError(f"data.source = 'jsonl' needs {section}.path, a file with one JSON object a line")
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"{section}.path = {path!r} is not a file")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{where}: not a JSON object ({error})") from error
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected an object with `prompt`, found {type(record).__name__}")
            yield _prompt(record, where, f"{number:06d}")


def _hub(cfg, split, path, count, section):
    if not cfg.data.name:
        raise UserError("data.source = 'hub' needs data.name, e.g. 'open-r1/DAPO-Math-17k-Processed'")
    advice = "check the name and the network, or set data.source = 'jsonl' and data.path"
    rows = load_hub(cfg.data.name, split, subset=cfg.data.subset or None, setting="data.name", advice=advice)
    fields = cfg.data.fields
    if fields.prompt not in rows.column_names:
        raise UserError(f"data.fields.prompt = {fields.prompt!r} is no column of {cfg.data.name}; it has: {rows.column_names}")
    for number, row in enumerate(rows):
        mapped = {k: v for k, v in row.items() if k not in (fields.prompt, fields.answer, fields.id)}
        mapped |= {ours: row[column] for ours, column in fields.items() if column in row}
        yield _prompt(mapped, f"{cfg.data.name}, row {number}", f"{number:06d}")


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
        raise UserError(f"{setting} = {name!r} is on the hub: needs the `datasets` package (requirements.txt)") from error
    try:
        with hub.offline_unless_reachable(name, "dataset"):
            return datasets.load_dataset(*([name, subset] if subset else [name]), split=split)
    except Exception as error:  # offline, unknown name and unknown split come as different types
        raise UserError(
            f"{setting} = {name!r} (split {split!r}) can't be loaded from the hub: {_first_line(error)}; {advice}"
        ) from error


def _prompt(record: dict, where: str, default_id: str) -> Prompt:
    """A record with `prompt` (a string, or messages), optional `answer` and `id`; the rest is kept as extra."""
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    good = isinstance(prompt, list) and prompt and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )  # fmt: skip
    if not good or not any(m["content"].strip() for m in prompt):
        raise UserError(f"{where}: `prompt` must be a non-empty string or a list of messages with `role` and `content`")
    try:
        json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a surrogate pair, which is no text ({error.reason})") from error
    answer = record.get("answer")
    extra = {k: v for k, v in record.items() if k not in ("prompt", "answer", "id")}
    name = record.get("id")
    return Prompt(
        default_id if name is None else str(name), tuple(prompt), None if answer is None else str(answer), extra
    )


def _where(cfg, source: str, split: str, path: str) -> str:
    return {
        "world": f"the small world {cfg.data.name!r}, split {split!r}",
        "jsonl": f"data.path = {path!r}",
        "hub": f"data.name = {cfg.data.name!r}, split {split!r}",
    }[source]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
