"""Sharing an export: a model card made from the run's own files, and the upload to the hub."""

import json
import os
import pathlib
import re

from omniopd_jax.errors import UserError
from omniopd_jax.hf import hub
from omniopd_jax.objective import OBJECTIVES
from omniopd_jax.run import estimate, health

ADAPTER = "adapter_config.json"
WEIGHTS = re.compile(  # as an export writes them
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|adapter_(config\.json|model\.safetensors)"
)
SETTINGS = (  # of the run's config, in the card's table
    "objective.name", "objective.advantage", "num_steps", "prompts_per_step", "num_generations", "max_prompt_length",
    "max_completion_length", "audit.num_chunks", "audit.chunk_tokens", "audit.num_continuations", "audit.similarity",
    "prior.alpha", "anchor.kl_coef", "optimizer.learning_rate", "lora.rank", "lora.alpha", "compute_dtype", "seed",
)  # fmt: skip


def write(folder, run, *, name: str, adapter: bool, step: int | None = None) -> pathlib.Path:
    """Writes README.md, the model card, into an export; returns its path.

    Args:
      folder: the export. run: the run's folder, whose config.json, metrics.jsonl and summary.json are read.
      name: the model's name on the hub. adapter: whether the export is adapters alone.
      step: the checkpoint that was exported; None: the newest.
    """
    run = pathlib.Path(run)
    config, summary = _object(run / "config.json"), _object(run / "summary.json")
    rows = _rows(run / "metrics.jsonl")
    newest = rows[-1].get("step", -1) + 1 if rows else summary.get("step")
    if summary.get("step") != (newest if step is None else step):
        summary = {}  # its accuracy and cost are those of another step
    health.count_evaluated(rows, _rows(run / "evaluations.jsonl"))
    path = pathlib.Path(folder) / "README.md"
    path.write_text(
        text(config, summary, rows, name=name, adapter=adapter, step=step), encoding="utf-8", errors="replace"
    )
    return path


def text(config: dict, summary: dict, rows: list[dict], *, name: str, adapter: bool, step: int | None) -> str:
    """The card: front matter that the hub reads, then base, teacher, method, settings, before and after, cost,
    licence."""
    base = str(config["student"]["path"])
    mix = sorted(config["objective"].get("mix") or {})
    parts = {name: OBJECTIVES.get(name) for name in mix or [config["objective"]["name"]]}  # None: of another version
    asked = any(own is None or own.asks for own in parts.values())
    done = step if step is not None else summary.get("step", len(rows))
    head = {
        "library_name": "peft" if adapter else "transformers",
        "base_model": _hub_name(base),
        "base_model_relation": "adapter" if adapter else "finetune",
        "tags": list(dict.fromkeys(["on-policy-distillation", "omniopd", *parts])),
        **_licence(base),
    }
    method = "; ".join((own and own.about) or name for name, own in parts.items())
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in head.items() if v), "---", "", f"# {_line(name)}", ""]
    lines += [
        f"{'LoRA adapters of' if adapter else 'A fine-tuned copy of'} `{_shown(base)}`, trained with omniopd_jax.",
        "",
    ]
    each = (f"`{_shown(str(t.get('model')))}` ({_line(str(t.get('provider')))})" for t in _teachers(config))
    who = ", ".join(each) if asked else "none"
    lines += ["| | |", "| --- | --- |", f"| base | `{_shown(base)}` |", f"| teacher | {who} |"]
    lines += [f"| method | {method} |", f"| updates | {done} of {config['num_steps']} |"]
    lines += [f"| {k} | {v} |" for k, v in _results(config, summary, rows, asked)]
    lines += ["", "## Settings", "", "| key | value |", "| --- | --- |"]
    lines += [f"| `{key}` | `{_line(str(value))}` |" for key in SETTINGS if (value := _get(config, key)) is not None]
    data = config.get("data", {})
    where = [str(data.get(k) or "") for k in ("source", "name", "split")] + [
        pathlib.Path(str(data.get("path") or "")).name
    ]
    lines += [f"| `data` | `{_line(' '.join(filter(None, where)))}` |", ""]
    lines += ["## Licence", "", _licence_words(base, asked), ""]
    return "\n".join(lines)


def _teachers(config: dict) -> list[dict]:
    """The settings of the run's teacher, or of each of several."""
    own, named = config.get("teacher", {}), config.get("teachers") or {}
    return [own | changed for changed in named.values()] or [own]


def _results(config: dict, summary: dict, rows: list[dict], asked: bool) -> list[tuple[str, str]]:
    before, after = summary.get("accuracy_before"), summary.get("accuracy_after")
    n, grader = health.evaluated(rows), config.get("eval", {}).get("grader")
    out = []
    if after is not None:
        measured = f"{after:.1%}, greedy, {'' if n is None else f'{n:,} '}held-out prompts, grader {grader}"
        known = before is not None
        when, first = ("before and after", f"{before:.1%} and ") if known else ("after", "")
        out.append((f"accuracy {when}", first + measured))
    else:
        out.append(("accuracy before and after", "not measured at this step"))
    if not asked or not summary:
        return [*out, ("teacher cost", "no teacher was asked" if not asked else "not known at this step")]
    known = rows[-1].get("teacher/price_known", 1) if rows else 1
    usd = summary.get("teacher/cost_usd", 0)
    free = not usd and all(t.get("provider") not in (None, *estimate.CLIENTS) for t in _teachers(config))
    cost = "none" if free else f"${usd:,.2f}" if known else "unknown price"
    calls = f"{summary.get('teacher/calls', 0):,.0f} requests"
    tokens = f"{summary.get('teacher/tokens_in', 0):,.0f} tokens in, {summary.get('teacher/tokens_out', 0):,.0f} out"
    return [*out, ("teacher cost", f"{cost}; {calls}; {tokens}")]


def _licence(base: str) -> dict:
    """The hub's licence fields: the base model's own, where its folder has a card that says so."""
    return _base_licence(base) or {"license": "other", "license_name": "see-base-model"}


def _base_licence(base: str) -> dict:
    """`license`, with `license_name` and `license_link` where there are, of the base's card; {} where it names none."""
    folder = hub.local(base)
    card = None if folder is None else folder / "README.md"
    if card is None or not card.is_file():
        return {}
    import huggingface_hub

    try:
        said = huggingface_hub.metadata_load(card)
    except Exception:  # whatever YAML's parser makes of somebody's text
        return {}
    if not isinstance(said, dict):
        return {}
    named = said.get("license")
    if isinstance(named, list) and named:
        named = named[0]
    if not isinstance(named, str) or not named:
        return {}
    more = {key: said[key] for key in ("license_name", "license_link") if isinstance(said.get(key), str)}
    return {"license": named} | more


def _licence_words(base: str, asked: bool) -> str:
    own = _base_licence(base)
    named = own.get("license_name", own.get("license"))
    words = (
        f"The base model's licence is `{_line(named)}`."
        if named
        else "The base model's licence applies; its folder names none."
    )
    return words + (" The teacher's terms may limit what models trained on its output are used for." if asked else "")


def _hub_name(base: str) -> str | None:
    """A name on the hub; None for a folder of this machine, whose path says nothing to others."""
    folder = hub.local(base)
    if folder is not None:  # transformers writes there where it read it from: a folder of another machine, perhaps
        base = str(_object(folder / "config.json").get("_name_or_path") or "")
    return base if re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) and hub.local(base) is None else None


def _shown(base: str) -> str:
    """A model for a reader elsewhere: its hub name, or its folder's last name without the way there."""
    return _line(_hub_name(base) or pathlib.Path(base).name or base)


def push(folder, name: str) -> str:
    """Uploads a folder to the hub as the model `name`, private unless it is there already; returns its address.

    Raises:
      UserError: no token, a name that is none, a hub that refuses or does not answer.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        files = sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file() and not p.name.startswith("."))
        ours = {str(p.relative_to(folder)): _without_path(p) or p for p in files}
        old = [n for n in api.list_repo_files(name) if WEIGHTS.fullmatch(n) and n not in ours]
        operations = [huggingface_hub.CommitOperationAdd(n, content) for n, content in ours.items()]
        operations += [huggingface_hub.CommitOperationDelete(n) for n in old]  # readers would take them beside ours
        api.create_commit(name, operations, commit_message="Export of omniopd_jax")
    except Exception as error:  # the transports' errors share no base class
        raise UserError(
            f"--push_to_hub={name}: the upload failed: {_reason(error)}; the export is in {folder}"
        ) from error
    return f"{api.endpoint}/{name}"


def _without_path(file: pathlib.Path) -> bytes | None:
    """An adapter's config for others, where it names a folder of this machine as its base: by its name alone."""
    said = _object(file) if file.name == ADAPTER else {}
    base = str(said.get("base_model_name_or_path") or "")
    if not base or hub.local(base) is None:
        return None
    return json.dumps(said | {"base_model_name_or_path": _hub_name(base) or pathlib.Path(base).name}, indent=2).encode()


def check(name: str) -> None:
    """What can be known before anything is exported: the name's form, a token, and that the hub takes it.

    Raises:
      UserError: one line that says which.
    """
    import huggingface_hub

    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise UserError(f"--push_to_hub={name!r} is no hub name: write OWNER/MODEL")
    if not huggingface_hub.get_token():
        raise UserError("--push_to_hub needs a token with write access: set HF_TOKEN")
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:
        raise UserError(
            f"--push_to_hub={name}: the hub refuses the token or does not answer: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """One line without the token."""
    words = " ".join(str(error).split())[:300] or type(error).__name__
    token = os.environ.get("HF_TOKEN")
    return words.replace(token, "***") if token else words


def _line(text: str) -> str:
    """A text that can't leave its table cell or its code span."""
    return "".join(c if c.isprintable() else " " for c in text).replace("`", "'").replace("|", "\\|")[:200]


def _get(config: dict, path: str):
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _object(path: pathlib.Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _rows(path: pathlib.Path) -> list[dict]:
    if not path.is_file():
        return []
    out = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            out.append(found)
    return out
