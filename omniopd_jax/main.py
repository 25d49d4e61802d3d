"""The main command: python -m omniopd_jax.main --config=configs/tiny.py [--config.key=value ...]

Short on purpose: everything else can be imported.
"""

from ml_collections import config_flags

from omniopd_jax.errors import UserError
from omniopd_jax.run import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe: configs/tiny.py, configs/math.py:no_anchor ...")


def main(argv) -> int:
    """Trains; returns the exit code: 0 done, 2 a wrong setting, 75 stopped by a signal with its state saved."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; settings look like --config.num_steps=20")
    if _CONFIG.value is None:
        raise UserError("--config is missing, e.g. --config=configs/tiny.py")
    from omniopd_jax import train
    from omniopd_jax.parallel import processes

    cli.setup_jax(_CONFIG.value.compute_dtype)
    try:
        processes.init(_CONFIG.value)
        return train.train(_CONFIG.value)["exit_code"]
    except BaseException as error:
        processes.abandon(error)
        raise


if __name__ == "__main__":
    cli.run(main)
