"""A run's checkpoint as a Hugging Face folder: python -m omniopd_jax.export --checkpoint=runs/tiny --out=FOLDER

A run with LoRA gives the merged model, or with --adapter a PEFT folder of the adapters alone. The folder has a model
card; --push_to_hub=OWNER/MODEL uploads it, private (docs/sharing.md). HF_TOKEN holds the token.
`--checkpoint` is a run's folder (its newest checkpoint) or one of its checkpoints, RUN/checkpoints/STEP. Tokenizer and
generation defaults come from the student that the run started from; the chat template is the one that it was trained
with.
"""

import pathlib
import tempfile

import jax
from absl import flags

from omniopd_jax import config, hf
from omniopd_jax.errors import UserError
from omniopd_jax.hf import hub, placed
from omniopd_jax.hf.template import of_student
from omniopd_jax.model import lora
from omniopd_jax.run import bucket, card, checkpoint, cli, files
from omniopd_jax.run.trained import locate, read


def export(source, out, *, dtype: str = "bfloat16", adapter: bool = False) -> pathlib.Path:
    """Writes the parameters of a checkpoint to a folder that transformers and vLLM open; returns the folder.

    Args:
      source: RUN or RUN/checkpoints/STEP.
      out: an empty or missing folder, or an earlier export, which is replaced; neither the run nor a model that its
        config names.
      dtype: of the tensors: bfloat16 | float16 | float32. LoRA: the sum is rounded once, after it was formed in
        float32.
      adapter: LoRA: a PEFT folder instead, which names the student's folder as its base.

    Raises:
      UserError: no such run or step, a student folder that is gone or holds another model, an `out` that is in use.
    """
    run, step = locate(source)
    inputs = _inputs(run)
    placed.check(out, inputs)  # before anything is read: a large model takes minutes
    got = read(run, step)
    student = config.default()  # with the keys that a run from before them lacks
    student.student.update(got.config["student"])
    tokenizer = hf.load_tokenizer(got.student)
    template = of_student(student, tokenizer, got.template_of(student))
    end_ids, _ = template.end_ids(hf.end_ids(got.student, tokenizer))
    if student.student.template != "chat" or template.kwargs:
        tokenizer.chat_template = template.jinja  # what the student was trained on, not the base's
    if adapter:
        if not got.lora.rank:
            raise UserError(f"--adapter: {source} was trained without LoRA (lora.rank = 0): it has no adapters")
        got.tell_other_base()
        base = hub.local(got.student)  # a hub name stays as it is
        peft = lora.peft_config(got.lora, got.student if base is None else base.absolute(), got.model_cfg.prefix)
        hf.save_adapters(out, got.params, got.table, peft, tokenizer, dtype=dtype, keep=inputs)
        return pathlib.Path(out)
    with jax.default_device(_host()):
        params = got.whole()
        if got.lora.rank:
            params = jax.jit(lambda p: lora.merge(p, lora.scale(got.lora), "float32"))(params)
    generation = hf.generation_config(got.student)
    hf.save(
        out,
        params,
        got.model_cfg,
        tokenizer,
        dtype=dtype,
        generation_config=generation,
        end_ids=end_ids,
        source=got.student,
    )
    return pathlib.Path(out)


def _inputs(run) -> list[pathlib.Path]:
    """The folders of this machine that an export is made from, or that its run's config names as models."""
    saved = files.read_json(run / "config.json", "export another run") if (run / "config.json").is_file() else {}
    student, teacher = (saved.get(section) or {} for section in ("student", "teacher"))
    teachers = [teacher, *(saved.get("teachers") or {}).values()]
    named = [student.get("path"), student.get("start"), *(t.get(k) for t in teachers for k in ("model", "tokenizer"))]
    named.append((saved.get("audit") or {}).get("embedding_model"))
    places = [run] if isinstance(run, pathlib.Path) else []  # a bucket is no folder here
    return places + [place for place in map(hub.local, filter(None, named)) if place is not None and place.is_dir()]


def _host() -> jax.Device:
    """The CPU as a device, where there is one beside the accelerator: an export needs none of the accelerator's
    memory."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return jax.local_devices()[0]


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "a run's folder, or RUN/checkpoints/STEP")
    flags.DEFINE_string("out", None, "the folder to write")
    flags.DEFINE_enum("dtype", "bfloat16", hf.SAVE_DTYPES, "of the tensors")
    flags.DEFINE_string(
        "push_to_hub", None, "OWNER/MODEL: upload the folder to the hub, private unless it is there already"
    )
    flags.DEFINE_bool("adapter", False, "a run with LoRA: write its adapters as a PEFT folder, not the merged model")


def main(argv) -> int:
    """Exports; returns the exit code: 0 done, 2 a wrong setting."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; use --checkpoint=RUN --out=FOLDER")
    given = flags.FLAGS
    for name in ("checkpoint", "out"):
        if not given[name].value:
            raise UserError(f"--{name} is missing: python -m omniopd_jax.export --checkpoint=RUN --out=FOLDER")
    name, source, adapter = (given[flag].value for flag in ("push_to_hub", "checkpoint", "adapter"))
    if name:
        card.check(name)
    cli.setup_jax()
    run, step = locate(source)
    if step is None:  # named here, for a run that goes on saves newer ones meanwhile
        step = checkpoint.saved_params(run).step
    out = config.expanded(given["out"].value)
    folder = export(f"{run}/checkpoints/{step}", out, dtype=given["dtype"].value, adapter=adapter)
    with tempfile.TemporaryDirectory() as copies:
        run = bucket.copied(run, copies)
        card.write(folder, run, name=name or folder.name, adapter=adapter, step=step)
    print(f"wrote {folder}", flush=True)
    if name:
        print(f"pushed to {card.push(folder, name)}", flush=True)
    return 0


if __name__ == "__main__":
    _define_flags()  # here, not on import: other commands have a --checkpoint too
    cli.run(main)
