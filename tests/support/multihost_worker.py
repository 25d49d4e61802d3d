"""One process of `test_multihost.py`: the loss and every gradient of a saved batch, on the mesh of all processes.

    python tests/support/multihost_worker.py STUDENT BATCH.npz OUT.npz DATA      with the environment of processes.init

DATA: the size of the mesh's data axis; the rest is fsdp.
"""

import functools
import sys

import jax
import numpy as np
import tiny
from ml_collections import FrozenConfigDict

from omniopd_jax import hf, model, objective, step, vocab
from omniopd_jax.parallel import processes, sharding

SETTINGS = {
    "micro_batches": 2,
    "audit.num_chunks": 2,
    "vocab_block": 16,
    "prior.alpha": 1.0,
    "max_completion_length": 24,
}
FIELDS = ("token_BL", "prompt_length_B", "length_B", "peak_BM", "k_sem_BM", "n_BM")


def loss_and_grads(student, saved: dict, data: int):
    """{leaf: gradient}, with `loss`, as host arrays; `saved` holds this process's rows."""
    mesh = sharding.make_mesh({"data": data, "fsdp": -1, "tp": 1})
    params, model_cfg = hf.load(student, mesh=mesh)
    cfg = FrozenConfigDict(tiny.recipe("", "", "", **SETTINGS))
    batch = objective.Batch(*(saved[k] for k in FIELDS))
    batch, stats = sharding.put_rows((batch, vocab.TokenStats(saved["logp_BT"], saved["entropy_BT"])), mesh)
    ref = jax.jit(functools.partial(jax.tree.map, lambda a: a * 1.05))(params)

    def run(params, ref, batch, stats):
        weight_BT, mask_BT = objective.weights(stats.logp_BT, batch, cfg)
        how = {"model_cfg": model_cfg, "cfg": cfg, "compute": model.Compute(mesh=mesh)}
        loss, grads, _ = step.loss_and_grads(params, ref, batch, weight_BT, mask_BT, **how)
        return loss, grads

    loss, grads = jax.jit(run, out_shardings=sharding.replicated(mesh))(params, ref, batch, stats)
    return {"loss": jax.device_get(loss)} | {
        jax.tree_util.keystr(k): jax.device_get(g) for k, g in jax.tree.leaves_with_path(grads)
    }


if __name__ == "__main__":
    processes.init(tiny.recipe("", "", ""))
    with np.load(sys.argv[2]) as file:
        own = {k: np.split(a, jax.process_count())[jax.process_index()] for k, a in file.items()}
    result = loss_and_grads(sys.argv[1], own, int(sys.argv[4]))
    if jax.process_index() == 0:
        np.savez(sys.argv[3], **result)
