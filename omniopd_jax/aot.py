"""Will it fit? Compiles a recipe's passes for a TPU slice, or for GPUs, that you do not have, on any CPU machine.

    pip install -r requirements-tpu.txt          # the TPU compiler; for GPUs: -r requirements-gpu.txt
    python -m omniopd_jax.aot --config=configs/math.py --topology=v5e:4x4 [--suggest] [--config.key=value ...]

Score, decode and update are compiled as the run would compile them, at the recipe's longest lengths, and what the
compiler says is printed per chip (per JAX device: a tpu7x chip has two). Exit code 3: it does not fit. Topologies:
v5e and v6e 2x2 to 16x16, v5p 2x2x1 to 4x4x4, tpu7x 2x2x1 and up; H100:8 is one node of eight GPUs, H100:2x8 two of
them, H200 and A100 likewise; several with commas. For a GPU nothing is tuned, so kernels may differ from the run's.
"""

from absl import flags
from ml_collections import config_flags

from omniopd_jax.errors import UserError, one_of
from omniopd_jax.run import cli, fit, logging, topologies, validation


def main(argv) -> int:
    """See the module."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; settings look like --config.micro_batches=16")
    if flags.FLAGS.config is None:
        raise UserError("--config is missing, e.g. --config=configs/math.py")
    cfg, names = flags.FLAGS.config, [n for n in flags.FLAGS.passes.split(",") if n]
    for name in names:
        one_of(name, fit.PASSES, "--passes")
    validation.validate(cfg)
    topologies.compile_only()
    cli.setup_jax(cfg.compute_dtype)
    whole = True
    for topology in flags.FLAGS.topology.split(","):
        plan, done, fits = fit.check(cfg, topology, names, say=logging.say)
        whole &= fits
        if not fits and flags.FLAGS.suggest:
            fit.suggest(cfg, topology, plan, [p.name for p in done])
    if not whole:
        print("\nIt does not fit." + ("" if flags.FLAGS.suggest else " Try --suggest."))
    return 0 if whole else fit.NOT_FIT


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "A recipe: configs/math.py, configs/math.py:4b ...")
    flags.DEFINE_string(
        "topology", "v5e:4x4", "Slices or GPUs: v5e:4x4, v5p:4x4x4, tpu7x:2x2x1, H100:8; several with commas."
    )
    flags.DEFINE_string("passes", ",".join(fit.PASSES), "Which passes to compile.")
    flags.DEFINE_bool("suggest", False, "Where it does not fit, try the knobs in order.")
    cli.run(main)
