"""Evaluation: the loop's greedy accuracy, and the command that samples whole benchmarks.

    python -m omniopd_jax.evaluate --config=configs/math.py --checkpoint=runs/math --benchmarks=math500,aime24 --samples=16

`--checkpoint` is a run (its newest checkpoint), RUN/checkpoints/STEP or a Hugging Face folder; without it the recipe's
`student.path` is evaluated. Benchmarks: suites.py. `--out` (default: RUN_DIR/evaluate of the recipe) gets one JSON line a
completion, results.json and table.md; the same command goes on where an interrupted one was. One process.

Programs run in a sandbox (graders/code.py). Where the machine gives none, the command refuses before weights are read,
unless `--unsafe` says that they may run as you.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
from collections import Counter

import jax
import numpy as np
from absl import flags

from omniopd_jax import graders, model, rollout, teachers, world
from omniopd_jax.data import prompts as data
from omniopd_jax.data.prompts import Prompt
from omniopd_jax.errors import UserError, one_of
from omniopd_jax.parallel import processes, sharding
from omniopd_jax.run import cli, logging


def _code(unsafe: bool = False):
    from omniopd_jax.graders.code import extract_program

    grader = graders.make("code", unsafe=unsafe)
    grader.grade("", {"stdin": "", "stdout": ""})  # a machine without a sandbox says so now
    return lambda text, tests: bool(grader.grade(extract_program(text), json.loads(tests)))


GRADERS = {  # name -> () -> ((text, answer) -> bool); started when first used
    "world": lambda: world.grade,
    "math": lambda: graders.make("math").grade,
    "code": _code,  # `answer` is JSON: stdin/stdout pairs or asserts (graders/code.py)
    "code_unsafe": functools.partial(_code, unsafe=True),  # the same as the current user, under rlimits alone
    "reasoning_gym": lambda: graders.make("reasoning_gym").grade,  # `answer` names the problem (graders/gym.py)
}


@functools.cache
def grader(name: str):
    """The grader of that name, one a process: (text, answer) -> bool.

    Raises:
      UserError: unknown name, or a machine that can't run it.
    """
    return GRADERS[one_of(name, GRADERS, "grader")]()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """accuracy in [0, 1]; mean length in tokens; share of responses cut at the cap; share of repeated 4-grams."""

    accuracy: float
    mean_length: float
    truncated_fraction: float
    repeated_fraction: float
    texts: tuple[str, ...]
    correct: tuple[bool, ...]


def greedy(
    params, model_cfg, prompts: list[Prompt], tokenizer, end_ids, *, grader, max_new_tokens: int, rows=256,
    compute: model.Compute | None = None,
):  # fmt: skip
    """Greedy answers, graded.

    Args:
      params: the model's parameters, stacked or as `rollout.prepare` returns them.
      prompts: encoded, each with an answer.
      grader: (text, answer) -> bool.
      rows: prompts a batch; the last batch is filled up, so that there is one shape. Each process of the mesh
        answers and grades its slice of every batch.
      compute: None: float32 on the default device.

    Returns:
      Evaluation, the same in every process.
    """
    compute = compute or model.Compute()
    mesh = compute.mesh
    if isinstance(params["layers"], dict):
        params = rollout.prepare(params, model_cfg, compute=compute)
    rank, count = (jax.process_index(), jax.process_count()) if mesh.is_multi_process else (0, 1)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-min(rows, len(prompts)) // shards) * shards
    own = rows // count
    width = rollout.bucket(max(len(p.token_ids) for p in prompts))
    batches = []
    for start in range(rank * own, len(prompts) + rank * own, rows):
        part = prompts[start : start + own]
        ids = [p.token_ids for p in part] + [(0,)] * (own - len(part))
        put = functools.partial(sharding.put_rows, mesh=mesh)
        padded, index_B = put(rollout.pad_rows(ids, width)), put(np.arange(own, dtype=np.uint32))
        out = rollout.sample(
            params, model_cfg, *padded, rollout.row_keys(_unused_key(), index_B), max_new_tokens=max_new_tokens,
            temperature=0.0, end_ids=end_ids, compute=compute,
        )  # fmt: skip
        answers = []
        arrays = (sharding.local_rows(a) for a in (out.token_BT, out.length_B, out.finished_B))
        for prompt, tokens, n, done in zip(part, *arrays):
            text = tokenizer.decode(tokens[:n], skip_special_tokens=True)
            correct = bool(grader(text, prompt.answer))
            answers.append([text, correct, int(n), bool(done), repeated_ngrams(tokens[:n].tolist())])
        batches.append(answers)
    parts = [batches] if count == 1 else processes.gather("evaluation", batches)
    answers = [a for batch in zip(*parts, strict=True) for piece in batch for a in piece]
    texts, correct, lengths, finished, repeats = zip(*answers, strict=True)
    means = [float(np.mean(a)) for a in (correct, lengths, finished, repeats)]
    return Evaluation(means[0], means[1], 1 - means[2], means[3], texts, correct)


def repeated_ngrams(tokens: list[int], n: int = 4) -> float:
    """Share of a response's n-grams that it has had before: what repetition loops push to 1."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(Counter(grams)) / len(grams) if grams else 0.0


def _unused_key():
    """Greedy decoding draws nothing; the sampler still wants keys."""
    return jax.random.key(jax.device_put(np.uint32(0)))


# --- whole benchmarks -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Student:
    """A model ready to answer; `source` names its weights: a folder, or RUN/checkpoints/STEP."""

    params: dict
    model_cfg: object
    compute: model.Compute
    tokenizer: object
    end_ids: tuple[int, ...]
    source: str


@dataclasses.dataclass(frozen=True)
class How:
    """How completions are drawn. `rows` is the size of a batch, rounded so that it holds whole prompts."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    rows: int = 64

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "rows"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} = {getattr(self, name)} must be at least 1")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise UserError(f"--temperature = {self.temperature}, --top_p = {self.top_p}: at least 0, and in (0, 1]")
        if self.temperature == 0 and self.samples > 1:
            raise UserError(f"--temperature = 0 makes all samples equal: --samples = {self.samples} must be 1")

    def prompts(self, mesh) -> int:
        """Prompts a batch: part of what decides the last bits of a completion, so fixed for a table."""
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        return -(-max(1, self.rows // self.samples) // shards) * shards


def load_student(cfg, checkpoint: str | None) -> Student:
    """The model of a run's checkpoint, of a Hugging Face folder, or of `cfg.student.path`, on the recipe's mesh.

    Raises:
      UserError: nothing there, or weights that do not fit their config.
    """
    from omniopd_jax import export, hf
    from omniopd_jax.model import attention, lora
    from omniopd_jax.run.checkpoint import Checkpoints

    folder, source, trained, setting = cfg.student.path, cfg.student.path, None, "student.path"
    if checkpoint:
        run, step = export.locate(checkpoint)
        if _is_run(run):
            if step is None:
                with contextlib.closing(Checkpoints.reader(run)) as checkpoints:
                    step = checkpoints.latest()
            if step is None:
                raise UserError(f"--checkpoint = {checkpoint!r}: the run has no checkpoint yet")
            trained = export.read(run, step)
            folder, source = trained.student, f"{run}/checkpoints/{step}"
        else:
            folder, source, setting = checkpoint, str(checkpoint), "--checkpoint"
    mesh = sharding.make_mesh(cfg.mesh)
    if trained is None:
        params, model_cfg = hf.load(folder, mesh=mesh, setting=setting)
    else:
        params, model_cfg = trained.whole(mesh), trained.model_cfg
    kernel = attention.resolve(cfg.model.attention, cfg.compute_dtype, on=sharding.platform(mesh))
    scale = None if trained is None else lora.scale(trained.lora)
    compute = model.Compute(cfg.compute_dtype, attention=kernel, mesh=mesh, lora_scale=scale)
    tokenizer = hf.load_tokenizer(folder, setting=setting)
    params = rollout.prepare(params, model_cfg, compute=compute)
    return Student(params, model_cfg, compute, tokenizer, hf.end_ids(folder, tokenizer, setting=setting), source)


def _is_run(folder: pathlib.Path) -> bool:
    """Whether its config.json is a run's, not a model's."""
    try:
        return "student" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def answer(student: Student, suite, how: How, path: pathlib.Path) -> list[dict]:
    """`how.samples` completions of every prompt of a suite, graded; those that `path` holds already are kept.

    Completions are written a batch at a time. The batches are the same whatever was there before, and the key of a
    completion is a function of seed, benchmark, problem and sample alone.

    Returns:
      One dict a completion: id, sample, text, finish, correct, answer, tokens, repeated.
    """
    per = how.prompts(student.compute.mesh)
    batches = [suite.prompts[i : i + per] for i in range(0, len(suite.prompts), per)]
    width = rollout.bucket(max(len(p.token_ids) for p in suite.prompts))
    done = _whole_batches(path, batches, how.samples)
    if done:
        logging.say(f"{suite.name}: {len(done)} of {len(batches)} batches were there already")
    grade = grader(suite.grader)
    with path.open("a", encoding="utf-8") as file:
        for i in range(len(done), len(batches)):
            done.append(_sample_batch(student, suite, how, batches[i], per, width, grade))
            file.writelines(json.dumps(line) + "\n" for line in done[-1])
            file.flush()
            if (i + 1) * 10 // len(batches) > i * 10 // len(batches):
                logging.say(f"{suite.name}: {i + 1} of {len(batches)} batches")
    return [line for batch in done for line in batch]


def _sample_batch(student: Student, suite, how: How, prompts, per: int, width: int, grade) -> list[dict]:
    mesh, n = student.compute.mesh, how.samples
    put = functools.partial(sharding.put_rows, mesh=mesh)
    padded = put(rollout.pad_rows([p.token_ids for p in prompts] + [(0,)] * (per - len(prompts)), width))
    names = [teachers.stable_hash(suite.name, p.id, r) for p in prompts for r in range(n)] + [0] * ((per - len(prompts)) * n)
    key = jax.random.key(jax.device_put(np.uint32(how.seed % 2**32)))
    out = rollout.sample(
        student.params, student.model_cfg, *padded, rollout.row_keys(key, put(np.array(names).astype(np.uint32))),
        max_new_tokens=how.max_new_tokens, temperature=how.temperature, top_p=how.top_p, num_samples=n, end_ids=student.end_ids,
        compute=student.compute,
    )  # fmt: skip
    token_BT, length_B, finished_B = (sharding.local_rows(a) for a in (out.token_BT, out.length_B, out.finished_B))
    lines = []
    for b in range(len(prompts) * n):
        prompt, tokens = prompts[b // n], token_BT[b, : length_B[b]].tolist()
        text = student.tokenizer.decode(tokens, skip_special_tokens=True)
        lines.append({
            "id": prompt.id, "sample": b % n, "text": text, "finish": "stop" if finished_B[b] else "length",
            "correct": bool(grade(text, prompt.answer)), "answer": suite.extract(text) if suite.extract else None,
            "tokens": len(tokens), "repeated": repeated_ngrams(tokens),
        })  # fmt: skip
    return lines


def _whole_batches(path: pathlib.Path, batches, samples: int) -> list[list[dict]]:
    """The batches that a file holds in full; whatever comes after them, as of a write that was cut off, is taken out."""
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
      UserError: in seconds, before weights are read, where a benchmark can't be had or its programs can't be isolated and
        `unsafe` is false; or an `out` of another evaluation.
    """
    from omniopd_jax.data import benchmarks as suites
    from omniopd_jax.evaluation import scores

    if jax.process_count() > 1:
        raise UserError("omniopd_jax.evaluate runs in one process: start it on one host")
    loaded = [suites.load(name, limit) for name in benchmarks]
    if unsafe:
        loaded = [dataclasses.replace(s, grader="code_unsafe") if s.grader == "code" else s for s in loaded]
    for suite in loaded:
        grader(suite.grader)
    files = [re.sub(r"[^\w.-]+", "_", s.name) + ".jsonl" for s in loaded]
    if len(set(files)) < len(files):
        raise UserError(f"--benchmarks = {','.join(benchmarks)}: the same benchmark twice")
    student = load_student(cfg, checkpoint)
    cfg = cfg.copy_and_resolve_references()
    cfg.data.overlong = "error"  # a benchmark with problems left out is another benchmark
    encoded = [data.encode(data.Prompts(s.prompts), student.tokenizer, cfg).prompts for s in loaded]
    loaded = [dataclasses.replace(s, prompts=p) for s, p in zip(loaded, encoded)]
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _same_evaluation(out, student, how, loaded, cfg.compute_dtype)
    results = {}
    for suite, file in zip(loaded, files, strict=True):
        results[suite.name] = scores.of(answer(student, suite, how, out / file), vote=suite.extract is not None)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text(scores.table(results) + "\n")
    return results


def _same_evaluation(out: pathlib.Path, student: Student, how: How, loaded, dtype: str) -> None:
    """Writes settings.json, or refuses to mix completions of different models, settings or problems."""
    per = how.prompts(student.compute.mesh)
    now = {"checkpoint": student.source, **dataclasses.asdict(how), "prompts_a_batch": per, "dtype": dtype}
    for suite in loaded:
        parts = [x for p in suite.prompts for x in (p.id, p.token_ids, p.answer)]
        now[f"prompts of {suite.name}"] = teachers.stable_hash(*parts)
    file = out / "settings.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    changed = [f"{k} was {before[k]!r}, is {now[k]!r}" for k in now if k in before and before[k] != now[k]]
    if changed:
        raise UserError(f"{out} holds another evaluation ({'; '.join(changed)}): set another --out")
    file.write_text(json.dumps(before | now, indent=1) + "\n")


def _define_flags() -> None:
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "A recipe: configs/tiny.py, configs/math.py ...")
    flags.DEFINE_string("checkpoint", None, "RUN, RUN/checkpoints/STEP or a Hugging Face folder; default: student.path")
    flags.DEFINE_list("benchmarks", [], "names, files, world:NAME:SPLIT, rg:NAME (suites.py)")
    flags.DEFINE_integer("samples", 16, "completions a problem")
    flags.DEFINE_float("temperature", None, "of the student's sampling; default: the recipe's")
    flags.DEFINE_float("top_p", None, "default: the recipe's")
    flags.DEFINE_integer("max_new_tokens", None, "default: the recipe's max_completion_length")
    flags.DEFINE_integer("limit", 0, "the first so many problems of each benchmark; 0 = all")
    flags.DEFINE_integer("rows", 64, "completions sampled at once")
    flags.DEFINE_integer("seed", None, "of the sampling; default: the recipe's")
    flags.DEFINE_bool("unsafe", False, "run graded programs as you, without the sandbox")
    flags.DEFINE_string("out", None, "folder of the results; default: evaluate in the recipe's run_dir")


def main(argv) -> int:
    """Evaluates; returns the exit code: 0 done, 2 a wrong setting."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; use --config=RECIPE --benchmarks=NAMES")
    given = flags.FLAGS.flag_values_dict()
    cfg = given["config"]
    if cfg is None or not given["benchmarks"]:
        raise UserError("--config and --benchmarks are needed, e.g. --config=configs/math.py --benchmarks=math500,aime24")

    def default(name, value):
        return value if given[name] is None else given[name]

    how = How(
        given["samples"], default("temperature", cfg.temperature), default("top_p", cfg.top_p),
        default("max_new_tokens", cfg.max_completion_length), default("seed", cfg.seed), given["rows"],
    )  # fmt: skip
    out = given["out"] or pathlib.Path(cfg.run_dir) / "evaluate"
    cli.setup_jax(cfg.compute_dtype)
    results = run(
        cfg, how, checkpoint=given["checkpoint"], benchmarks=given["benchmarks"], limit=given["limit"], out=out,
        unsafe=given["unsafe"],
    )  # fmt: skip
    from omniopd_jax.evaluation import scores

    logging.say(f"{scores.table(results)}\n\nwritten to {out}")
    return 0


if __name__ == "__main__":
    _define_flags()  # here, not on import: other commands have a --checkpoint too
    cli.run(main)
