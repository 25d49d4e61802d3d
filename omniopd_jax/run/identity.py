"""What makes two starts the same run: its settings, and what it reads under their names (digests of files and
texts)."""

import datetime
import hashlib
import json
import os
import pathlib

from ml_collections import ConfigDict

from omniopd_jax import config, hf
from omniopd_jax.data import prompts
from omniopd_jax.errors import UserError
from omniopd_jax.hf import hub
from omniopd_jax.hf.template import read_preamble, read_template
from omniopd_jax.parallel import processes
from omniopd_jax.run import files, host, logging
from omniopd_jax.teachers import by_row
from omniopd_jax.teachers.protocol import stable_hash
from omniopd_jax.teachers.wire import secrets

DIGESTS = "digests"  # beside the settings, in config.json
STUDENT = "the student's folder (student.path)"  # among them
TEMPLATE = "student_template"  # there too: the text of the Jinja file that student.template names
DIGESTED = (  # how the names of `digests_of` begin
    "the training prompts", "the held-out prompts", "the prompts of eval.sets ", "the student's ", "the teacher's ",
    "the embedding model ",
)  # fmt: skip
HARMLESS = (  # keys, or beginnings of keys, that change no result: how long, how fast, where, and what is written
    "run_dir",
    "local_dir",
    "checkpoint.",
    "log.",
    "audit.log_per_step",
    "eval.before",
    "eval.every",
    "data.overlong",  # the prompts that are left have a digest
    "eval.overlong",
    "eval.patience",
    "eval.stop_below",
    "budget.",
    "distributed.",
    "profile.",
    "resume.",
    "mesh.",
    "micro_batches",
    "rollout.slots",
    "rollout.parts",
    "rollout.turn",
    "rollout.cache_gib",
    "packing.",
    "vocab_block",
    "model.remat",
    "anchor.ref_offload",
    "teacher.base_url",
    "teacher.max_concurrency",
    "teacher.requests_per_minute",
    "teacher.tokens_per_minute",
    "teacher.timeout_s",
    "teacher.deadline_s",
    "teacher.max_retries",
    "teacher.prefix_order",
    "teacher.replay",
    "teacher.journal",
    "teacher.price_",
    "teacher.key_over_http",
    "teacher.pin_model",
    "teacher.budget_share",
)
EARLIER = {"reward.grader": "world", "eval.grader": "world"}  # defaults of runs from before November 2026, where unused
REMOVED = {"teacher.hedge_s": 0.0, "rollout_groups": 1}  # keys that are gone: at this default they said nothing
SAMPLES, SAMPLE_BYTES = 64, 65_536  # of a file too large to be read whole


def check_same_run(cfg: ConfigDict, digests: dict[str, str], file: pathlib.Path) -> None:
    """A run that is resumed must be the run that was begun: same settings, same inputs.

    Keys of `HARMLESS` and `resume.allow` may differ; `num_steps` too, unless the learning rate's schedule reads it. A
    key that the old config has and this program no longer knows is reported unless it was at its default, as is a run
    from before there were digests.

    Args:
      digests: `digests_of` now.
      file: the run's config.json; nothing is compared where there is none.

    Raises:
      UserError: names what differs.
    """
    saved = read(file)
    if saved is None:
        return
    saved.pop(TEMPLATE, None)  # has a digest
    before, known = saved.pop(DIGESTS, None), config.flat(config.default())
    old, now = known | config.flat(ConfigDict(saved)), config.flat(ConfigDict(json.loads(as_json(cfg))))
    names = [sorted(teachers) for teachers in (saved.get("teachers", {}), cfg.teachers)]
    old, now = by_row.whole(old, names[0]), by_row.whole(now, names[1])
    for values in (old, now):  # what nothing reads says nothing of the run
        values.update({k: known[k] for k in prompts.unread(values["data.source"])})
    if old["data.source"] == "hub" and "overlong" not in saved.get("eval", {}):
        old["eval.path"] = known["eval.path"]  # a run from before that was read
    old = {k: "" if v == EARLIER.get(k) and now.get(k) == "" else v for k, v in old.items()}
    if removed := sorted(k for k in set(old) - set(now) if k not in REMOVED or old[k] != REMOVED[k]):
        logging.say(f"warning: {file} has keys that are no longer known: {', '.join(removed)}")
    may = (*HARMLESS, *cfg.resume.allow, *(("num_steps",) if cfg.optimizer.schedule == "constant" else ()))
    changed = [
        f"{k} was {old[k]!r}, is {now[k]!r}"
        for k in now
        if k in old and plain(old[k]) != plain(now[k]) and not allowed(k, may)
    ]
    if names[0] != names[1] and not allowed("teachers", may):
        changed.append(f"teachers were {', '.join(names[0]) or 'not named'}, are {', '.join(names[1]) or 'not named'}")
    if before is None:
        logging.say(f"warning: {file} is from before inputs were compared: what this run reads is taken as it is now")
    else:
        changed += [
            f"{name} has changed"
            for name in digests
            if name in before and before[name] != digests[name] and not allowed(name, may)
        ]
    if changed:
        raise UserError(
            f"{file.parent} holds a run with other settings or inputs ({'; '.join(changed)}): set them back, set "
            "another "
            "run_dir, or name what may change in resume.allow"
        )


def settle_date(cfg: ConfigDict, file: pathlib.Path) -> None:
    """Sets `data.date` where it is empty: a resumed run's is that of its config.json, a new one's is today, the same
    for all processes. A run of a version that had no such key goes on without one: its templates see the day.

    Raises:
      UserError: the run's config.json is damaged.
    """
    saved = read(file)
    date = datetime.date.today().isoformat() if saved is None else saved.get("data", {}).get("date", "")
    cfg.data.date = processes.first("date", cfg.data.date or date)


def check_allowed(cfg: ConfigDict) -> None:
    """Each name in `resume.allow` must be of something that is compared: else a slip of the pen allows nothing.

    Raises:
      UserError: names the nearest keys.
    """
    known = (*config.flat(cfg), *config.flat(config.default()), "teachers", *REMOVED)
    for name in cfg.resume.allow:
        if not any(allowed(key, (name,)) for key in known) and not name.startswith((*DIGESTED, "teachers.")):
            raise UserError(f"resume.allow: {config.unknown_key_message(cfg, name)}")


def allowed(key: str, may) -> bool:
    """Whether a key is named by `may`: whole, or by a beginning that ends in a dot or underscore."""
    keys = {key, by_row.key_of(key)}
    return any(
        k == m or (m.endswith((".", "_")) and k.startswith(m)) or k.startswith(f"{m}.") for m in may for k in keys
    )


def plain(value):
    """A config's value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def read(file: pathlib.Path) -> dict | None:
    """A run's config.json; None where there is none.

    Raises:
      UserError: it is damaged, and how to go on.
    """
    if not file.is_file():
        return None
    return files.read_json(file, "remove it to go on from the checkpoint with the settings given now")


def as_json(cfg: ConfigDict) -> str:
    """The resolved config as a run's config.json holds it."""
    values = cfg.to_dict()
    for teacher in (values["teacher"], *values["teachers"].values()):
        if "base_url" in teacher:
            teacher["base_url"] = secrets.public_url(teacher["base_url"])  # its path may hold a key
    return secrets.hide_keys(json.dumps(values, indent=1, default=str))


def write(cfg: ConfigDict, digests: dict[str, str], file: pathlib.Path, template: str | None = None) -> None:
    """Writes config.json, whole or not at all; with the student's template where a file of the user's has it."""
    beside = {DIGESTS: digests}
    if cfg.student.template not in ("chat", "plain") and template is not None:
        beside[TEMPLATE] = template
    host.write_whole(file, json.dumps(json.loads(as_json(cfg)) | beside, indent=1) + "\n")


def digests_of(cfg: ConfigDict, training, held_out, template: str, sets=()) -> dict[str, str]:
    """Digests of what a run reads under names that stay the same when the content changes.

    Args:
      training, held_out: data.Prompts, encoded; None: none is read.
      template: the student's chat template.
      sets: data.benchmarks.Suites of `eval.sets`.
    """
    out = {"the training prompts": _prompts(training), "the student's chat template": f"{stable_hash(template):x}"}
    if any(p.solution for p in training.prompts):
        out["the training prompts' solutions"] = f"{stable_hash(*(p.solution or '' for p in training.prompts)):016x}"
    if held_out is not None:
        out["the held-out prompts"] = _prompts(held_out)
    out |= {f"the prompts of eval.sets {s.name!r}": _prompts(s) for s in sets}
    folders = {STUDENT: cfg.student.path}
    named = {f"teachers.{name}": own.teacher for name, own in by_row.configs(cfg).items()}
    for key, teacher in (named or {"teacher": cfg.teacher}).items():
        if teacher.provider == "local" and teacher.model:
            folders[f"the teacher's folder ({key}.model)"] = teacher.model
        if teacher.tokenizer:
            folders[f"the teacher's tokenizer ({key}.tokenizer)"] = teacher.tokenizer
        if teacher.preamble:
            text = read_preamble(teacher.preamble, f"{key}.preamble")
            out[f"the teacher's preamble ({key}.preamble)"] = f"{stable_hash(text):016x}"
        if teacher.template not in ("chat", "plain"):
            out[f"the teacher's template ({key}.template)"] = (
                f"{stable_hash(read_template(teacher.template, f'{key}.template')):016x}"
            )
    if cfg.audit.similarity == "embedding":
        folders["the embedding model (audit.embedding_model)"] = cfg.audit.embedding_model
    return out | {name: folder_digest(path) for name, path in folders.items()}


def check_same_inputs(digests: dict[str, str]) -> None:
    """All processes must read the same: each takes its slice of one permutation, and its shards of one model.

    Args:
      digests: `digests_of` in this process.

    Raises:
      UserError: in every process, names what differs.
    """
    told = processes.gather("inputs", digests)
    if wrong := sorted({name for d in told for name in d if any(e.get(name) != d[name] for e in told)}):
        raise UserError(f"the processes read different inputs: {', '.join(wrong)}: give all hosts the same files")


def folder_digest(name: str) -> str:
    """Of a model's folder, or of a hub name's cached one (without its licence, which may have come later): names and
    contents of its files; '' where there is none.

    A file over 4 MB gives its size and evenly spaced samples: training changes every weight, so samples see it, and a
    file of weights is too large to be read at each start.
    """
    try:
        folder = hf.resolve(name)
    except UserError:
        return ""
    digest, of_hub = hashlib.blake2b(digest_size=16), hub.local(name) is None
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if of_hub and hub.licence_alone(path.name):
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for i in range(SAMPLES):
                file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1), os.SEEK_SET)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _prompts(found) -> str:
    parts = (x for p in found.prompts for x in (p.id, json.dumps(p.messages, sort_keys=True), p.answer, p.token_ids))
    teachers = [p.teacher for p in found.prompts if p.teacher]  # one a prompt, or none at all
    return f"{stable_hash(*parts, *teachers):016x}"
