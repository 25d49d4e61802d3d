"""Losses and parameters of three updates of `sft`: the golden values that `continuation.cut = zero` must reproduce.

tests/golden/sft.npz was written by the code from before `sft` became a cut of `continuation`. It may be written anew only
where a change is meant to move these numbers: python tests/support/golden_sft.py (from the repository's root).
"""

import json
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import numpy as np
import tiny

from omniopd_jax import train
from omniopd_jax.parallel import sharding
from omniopd_jax.run import checkpoint

FILE = tiny.REPO / "tests" / "golden" / "sft.npz"
ROWS = [{"prompt": f"Tom has {i} apples.", "solution": f"so {i}"} for i in range(8)]


def runs(folder) -> dict[str, dict]:
    """{name: dotted settings} beside those of `tiny.recipe`: a teacher's solutions, and the prompts file's own."""
    common = {"num_steps": 3, "objective.name": "sft", "objective.normalizer": "separate_means"}
    file = pathlib.Path(folder) / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = {"data.source": "jsonl", "data.name": "", "data.path": str(file)}
    given |= {"data.num_prompts": 0, "num_generations": 1}
    return {"teacher": common | {"anchor.kl_coef": 0.05}, "given": common | given | {"anchor.kl_coef": 0.0}}


def train_once(models, run_dir, settings: dict) -> dict[str, np.ndarray]:
    """losses, gradient norms and every parameter after the last update, by name."""
    c = tiny.recipe(*models, run_dir, **settings)
    assert train.train(c)["exit_code"] == 0
    rows = tiny.lines(pathlib.Path(run_dir) / "metrics.jsonl")
    out = {key: np.array([r[key] for r in rows]) for key in ("loss", "grad_norm")}
    params = checkpoint.restore_params(run_dir)[0]
    return out | {jax.tree_util.keystr(k): np.asarray(a) for k, a in jax.tree_util.tree_leaves_with_path(params)}


def is_kept(key: str) -> bool:
    """Whether the file holds it: of the run on given solutions, which takes the same step, only the losses."""
    return key.startswith("teacher/") or key.endswith(("loss", "grad_norm"))


def main() -> None:
    """Writes the golden file."""
    real = sharding.make_mesh
    sharding.make_mesh = lambda sizes, devices=None: real(sizes, jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder:
        models = tiny.make_folders(pathlib.Path(folder) / "models")
        got = {
            f"{name}/{key}": value
            for name, settings in runs(folder).items()
            for key, value in train_once(models, pathlib.Path(folder) / name, settings).items()
            if is_kept(f"{name}/{key}")
        }
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **got)
    print(f"wrote {FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
