"""Whole benchmarks: every problem answered several times, graded, scored with intervals; an interrupted one goes on."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import re

import jax
import numpy as np

from omniopd_jax import config, graders, hf, model, rollout
from omniopd_jax.data import benchmarks as suites
from omniopd_jax.data import prompts as data
from omniopd_jax.errors import UserError
from omniopd_jax.evaluation import scores
from omniopd_jax.evaluation.sampling import repeated_ngrams
from omniopd_jax.hf.template import Template, of_student
from omniopd_jax.hf.tokenizer import check_fits
from omniopd_jax.model import attention, lora
from omniopd_jax.parallel import sharding
from omniopd_jax.run import files, host, identity, logging
from omniopd_jax.run import trained as trained_run
from omniopd_jax.run.checkpoint import Checkpoints
from omniopd_jax.teachers.protocol import stable_hash


@dataclasses.dataclass(frozen=True)
class Student:
    """A model ready to answer; `source` names its weights: a folder, or RUN/checkpoints/STEP. `cache`: the size and the
    dtype of the sampler's cache, as the recipe has them. `files`: of the folder that was read (`folder_digest`)."""

    params: dict
    model_cfg: model.ModelConfig
    compute: model.Compute
    template: Template
    end_ids: tuple[int, ...]
    source: str
    cache: rollout.How = rollout.DEFAULT
    files: str = ""


@dataclasses.dataclass(frozen=True)
class How:
    """How completions are drawn. `rows` of them, rounded to whole prompts, are written at once, which is what a killed
    evaluation loses at most; `slots` are decoded at a time, 0: what the cache's memory holds."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    rows: int = 512
    slots: int = 0
    top_k: int = 0

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "rows"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} = {getattr(self, name)} must be at least 1")
        for name in ("slots", "top_k"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} = {getattr(self, name)} must be at least 0")
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            raise UserError(f"--temperature = {self.temperature}, --top_p = {self.top_p}: at least 0, and in (0, 1]")
        if self.temperature == 0 and self.samples > 1:
            raise UserError(f"--temperature = 0 makes all samples equal: --samples = {self.samples} must be 1")

    @property
    def prompts(self) -> int:
        """Prompts of a batch: part of what decides the last bits of a completion, so fixed for a table."""
        return max(1, self.rows // self.samples)


def load_student(cfg, checkpoint: str | None, *, max_new_tokens: int | None = None) -> Student:
    """The model of a run's checkpoint, of a Hugging Face folder, or of `cfg.student.path`, on the recipe's mesh.

    Args:
      max_new_tokens: of an answer; default: the recipe's `max_completion_length`.

    Raises:
      UserError: nothing there, or weights that do not fit their config.
    """
    mesh = sharding.make_mesh(cfg.mesh)
    folder, source, trained, setting = cfg.student.path, cfg.student.path, None, "student.path"
    if checkpoint:
        run, step = trained_run.locate(checkpoint)
        if trained_run.is_run(run):
            if step is None:
                with contextlib.closing(Checkpoints.reader(run)) as checkpoints:
                    step = checkpoints.latest()
            if step is None:
                raise UserError(f"--checkpoint = {checkpoint!r}: the run has no checkpoint yet")
            trained = trained_run.read(run, step, mesh)
            folder, source = trained.student, f"{run}/checkpoints/{step}"
        else:
            folder, source, setting = checkpoint, str(checkpoint), "--checkpoint"
    tokenizer = hf.load_tokenizer(folder, setting=setting)
    template = of_student(cfg, tokenizer, None if trained is None else trained.template_of(cfg))
    end_ids, note = template.end_ids(hf.end_ids(folder, tokenizer, setting=setting))
    if note:
        logging.say(note)
    longest = cfg.max_prompt_length + (cfg.max_completion_length if max_new_tokens is None else max_new_tokens)
    own = hf.read_config(folder, setting=setting)
    check_fits(tokenizer, own, longest, setting=setting)
    template = dataclasses.replace(template, rows=own.vocab_size)
    if trained is None:
        params, model_cfg = hf.load(folder, mesh=mesh, setting=setting)
    else:
        params, model_cfg = trained.whole(mesh), trained.model_cfg
    kernel = attention.resolve(
        cfg.model.attention, cfg.compute_dtype, on=sharding.platform(mesh), head_dim=model_cfg.head_dim
    )
    scale = None if trained is None else lora.scale(trained.lora)
    compute = model.Compute(cfg.compute_dtype, attention=kernel, mesh=mesh, lora_scale=scale)
    params = rollout.prepare(params, model_cfg, compute=compute)
    cache = rollout.How(cache_gib=cfg.rollout.cache_gib, cache_dtype=cfg.rollout.cache_dtype)
    return Student(params, model_cfg, compute, template, end_ids, source, cache, identity.folder_digest(str(folder)))


def answer(student: Student, suite, how: How, path: pathlib.Path) -> list[dict]:
    """`how.samples` completions of every prompt of a suite, graded; those that `path` holds already are kept.

    Completions are written a batch at a time. The batches are the same whatever was there before, and the key of a
    completion is a function of seed, benchmark, problem and sample alone.

    Returns:
      One dict a completion: id, sample, text, finish, correct, answer, tokens, repeated.
    """
    per = how.prompts
    batches = [suite.prompts[i : i + per] for i in range(0, len(suite.prompts), per)]
    done = _whole_batches(path, batches, how.samples)
    if done:
        logging.say(f"{suite.name}: {len(done)} of {len(batches)} batches were there already")
    grader = graders.shared(suite.grader)
    with path.open("a", encoding="utf-8") as file:
        for i in range(len(done), len(batches)):
            done.append(_sample_batch(student, suite, how, batches[i], grader))
            file.writelines(json.dumps(line) + "\n" for line in done[-1])
            file.flush()
            if (i + 1) * 10 // len(batches) > i * 10 // len(batches):
                logging.say(f"{suite.name}: {i + 1} of {len(batches)} batches")
    return [line for batch in done for line in batch]


def _sample_batch(student: Student, suite, how: How, prompts, grader: graders.Grader) -> list[dict]:
    n = how.samples
    names = [stable_hash(suite.name, p.id, r) % 2**32 for p in prompts for r in range(n)]
    key = jax.random.key(jax.device_put(np.uint32(how.seed % 2**32)))
    [rows] = rollout.stream(
        student.params, student.model_cfg, [p.token_ids for p in prompts], rollout.key_data(key, names),
        max_new_tokens=how.max_new_tokens, temperature=how.temperature, top_p=how.top_p, top_k=how.top_k,
        num_samples=n, end_ids=student.end_ids, how=dataclasses.replace(student.cache, slots=how.slots),
        compute=student.compute,
    )  # fmt: skip
    read = [student.template.read(row.tokens.tolist()) for row in rows]
    grades = grader.grade_all([text for text, _, _ in read], [p.answer for p in prompts for _ in range(n)])
    return [
        {
            "id": prompts[b // n].id,
            "sample": b % n,
            "text": text,
            "finish": "stop" if rows[b].finished or stopped else "length",
            "correct": bool(grades[b]),
            "answer": suite.extract(text) if suite.extract else None,
            "tokens": length,
            "repeated": repeated_ngrams(rows[b].tokens[:length].tolist()),
        }
        for b, (text, length, stopped) in enumerate(read)
    ]


def _whole_batches(path: pathlib.Path, batches, samples: int) -> list[list[dict]]:
    """The batches that a file holds in full; whatever comes after them, as of a write that was cut off, is taken
    out."""
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    whole, at = [], 0
    for batch in batches:
        wanted = [(p.id, r) for p in batch for r in range(samples)]
        own = lines[at : at + len(wanted)]
        if [(c.get("id"), c.get("sample")) for c in own] != wanted:
            break
        whole.append(own)
        at += len(wanted)
    if path.exists():
        cut = path.with_suffix(".tmp")
        cut.write_text("".join(json.dumps(c) + "\n" for batch in whole for c in batch), encoding="utf-8")
        os.replace(cut, path)
    return whole


def run(cfg, how: How, *, checkpoint: str | None, benchmarks: list[str], limit: int, out, unsafe: bool = False) -> dict:
    """Answers the benchmarks and writes completions, results.json and table.md into `out`.

    Returns:
      {benchmark: scores (scores.of)}.

    Raises:
      UserError: in seconds, before weights are read, where a benchmark can't be had or its programs can't be isolated
      and
        `unsafe` is false; or an `out` of another evaluation.
    """
    if jax.process_count() > 1:
        raise UserError("omniopd_jax.evaluate runs in one process: start it on one host")
    loaded = [suites.load(name, limit, cfg.eval.suffix if cfg is not None else "") for name in benchmarks]
    if unsafe:
        loaded = [dataclasses.replace(s, grader="code_unsafe") if s.grader == "code" else s for s in loaded]
    for suite in loaded:
        graders.shared(suite.grader)
    names = [re.sub(r"[^\w.-]+", "_", s.name) + ".jsonl" for s in loaded]
    if len(set(names)) < len(names):
        raise UserError(f"--benchmarks = {','.join(benchmarks)}: the same benchmark twice")
    out = _writable(out)
    cfg = None if cfg is None else _dated(cfg, checkpoint, out)
    student = load_student(cfg, checkpoint, max_new_tokens=how.max_new_tokens)
    # a benchmark with problems left out is another benchmark: no overlong one is dropped
    encoded = [data.encode(data.Prompts(s.prompts), student.template, cfg, overlong="").prompts for s in loaded]
    loaded = [dataclasses.replace(s, prompts=p) for s, p in zip(loaded, encoded)]
    _same_evaluation(out, student, how, loaded, cfg.compute_dtype, cfg.data.date)
    results = {}
    for suite, file in zip(loaded, names, strict=True):
        results[suite.name] = scores.of(answer(student, suite, how, out / file), vote=suite.extract is not None)
    kept = out / "results.json"  # of other benchmarks under the same settings, too
    every = (files.read_json(kept, "remove it") if kept.exists() else {}) | results
    host.write_whole(kept, json.dumps(every, indent=1) + "\n")
    host.write_whole(out / "table.md", scores.table(every) + "\n")
    return results


def _dated(cfg, checkpoint: str | None, out: pathlib.Path):
    """The recipe with the day that templates are told: its own, that of the run that is evaluated, the one on which
    this evaluation began, today."""
    date = cfg.data.date
    if not date and checkpoint and (run := trained_run.recipe(checkpoint)) is not None:
        date = run.data.date
    if not date and (out / "settings.json").exists():
        date = files.read_json(out / "settings.json", "set another --out").get("date", "")
    cfg = cfg.copy_and_resolve_references()
    cfg.data.date = date or datetime.date.today().isoformat()
    return cfg


def _writable(out) -> pathlib.Path:
    """The folder of the results, which is there then.

    Raises:
      UserError: a file, or a place that can't be written.
    """
    out = config.expanded(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.try_writing(out)
    except OSError as error:
        raise UserError(f"--out = {out} can't be written ({error.strerror}): set another --out") from error
    return out


def _same_evaluation(out: pathlib.Path, student: Student, how: How, loaded, dtype: str, date: str = "") -> None:
    """Writes settings.json, or refuses to mix completions of different models, settings or problems."""
    per = how.prompts
    now = {"checkpoint": student.source, **dataclasses.asdict(how), "prompts_a_batch": per, "dtype": dtype}
    now |= {"stop_strings": list(student.template.stop_strings), "end_ids": list(map(int, student.end_ids)),
            "cache_dtype": student.cache.cache_dtype, "files": student.files}  # fmt: skip
    for suite in loaded:
        parts = [x for p in suite.prompts for x in (p.id, p.token_ids, p.answer)]
        now[f"prompts of {suite.name}"] = stable_hash(*parts)
    file = out / "settings.json"
    before = files.read_json(file, "set another --out") if file.exists() else {}
    if before:
        before.setdefault("top_k", 0)  # which earlier versions sampled without
    changed = [f"{k} was {before[k]!r}, is {now[k]!r}" for k in now if k in before and before[k] != now[k]]
    if changed:
        raise UserError(f"{out} holds another evaluation ({'; '.join(changed)}): set another --out")
    host.write_whole(file, json.dumps(before | now | {"date": date}, indent=1) + "\n")
