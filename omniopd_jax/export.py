"""A run's checkpoint as a Hugging Face folder: python -m omniopd_jax.export --checkpoint=runs/tiny --out=FOLDER

`--checkpoint` is a run's folder (its newest checkpoint) or one of its checkpoints, RUN/checkpoints/STEP. Tokenizer,
chat template and generation defaults come from the student that the run started from.
"""

import pathlib

from absl import flags

from omniopd_jax import checkpoint, cli, hf, model
from omniopd_jax.errors import UserError


def export(source, out, *, dtype: str = "bfloat16") -> pathlib.Path:
    """Writes the parameters of a checkpoint to a folder that transformers and vLLM open; returns the folder.

    Args:
      source: RUN or RUN/checkpoints/STEP.
      out: an empty or missing folder, or an earlier export, which is replaced.
      dtype: of the tensors: bfloat16 | float16 | float32.

    Raises:
      UserError: no such run or step, a student folder that is gone or holds another model, an `out` that is in use.
    """
    run_dir, step = locate(source)
    params, config = checkpoint.restore_params(run_dir, step)
    student = hf.resolve(config["student"]["path"])
    model_cfg = hf.read_config(student)
    if not model.fits(params, model_cfg):
        raise UserError(
            f"{source} was not trained from the model in {student}: their parameters differ in name or shape"
        )
    tokenizer = hf.load_tokenizer(student)
    hf.save(out, params, model_cfg, tokenizer, dtype=dtype, generation_config=hf.generation_config(student))
    return pathlib.Path(out)


def locate(source) -> tuple[pathlib.Path, int | None]:
    """(run folder, step or None for the newest) of RUN, RUN/checkpoints or RUN/checkpoints/STEP."""
    path = pathlib.Path(source).absolute()
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return (path.parent if path.name == "checkpoints" else path), None


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "a run's folder, or RUN/checkpoints/STEP")
    flags.DEFINE_string("out", None, "the folder to write")
    flags.DEFINE_enum("dtype", "bfloat16", hf.SAVE_DTYPES, "of the tensors")


def main(argv) -> int:
    """Exports; returns the exit code: 0 done, 2 a wrong setting."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; use --checkpoint=RUN --out=FOLDER")
    given = flags.FLAGS
    for name in ("checkpoint", "out"):
        if not given[name].value:
            raise UserError(f"--{name} is missing: python -m omniopd_jax.export --checkpoint=RUN --out=FOLDER")
    cli.setup_jax()
    folder = export(given["checkpoint"].value, given["out"].value, dtype=given["dtype"].value)
    print(f"wrote {folder}", flush=True)
    return 0


if __name__ == "__main__":
    _define_flags()  # here, not on import: other commands have a --checkpoint too
    cli.run(main)
