"""The main command: python -m omniopd_jax.main --config=configs/tiny.py [--config.key=value ...] [--estimate | --yes]

--estimate prints what the teacher would cost and ends, without weights and without a call.
Short on purpose: everything else can be imported.
"""

from absl import flags
from ml_collections import config_flags

from omniopd_jax import solutions, train
from omniopd_jax.data import prompts
from omniopd_jax.errors import UserError
from omniopd_jax.parallel import processes
from omniopd_jax.run import cli, estimate, validation

_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe: configs/tiny.py, configs/math.py:no_anchor ...")
_ESTIMATE = flags.DEFINE_bool("estimate", False, "print calls, tokens, dollars and hours of the teacher, and end")
_YES = flags.DEFINE_bool("yes", False, "start though the estimate is above budget.confirm_usd and no cap is set")


def main(argv) -> int:
    """Trains; returns the exit code: 0 done, 2 a wrong setting, 75 stopped by a signal with its state saved."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; settings look like --config.num_steps=20")
    if _CONFIG.value is None:
        raise UserError("--config is missing, e.g. --config=configs/tiny.py")
    cfg = _CONFIG.value
    cli.setup_jax(cfg.compute_dtype)
    validation.validate(cfg)
    bought = solutions.bought(cfg)
    if prompts.first_has_solution(cfg):
        bought.pop("solutions", None)
    if _ESTIMATE.value:
        print("\n\n".join(p.text() for p in estimate.previews(cfg, bool(bought), bought)), flush=True)
        return 0
    if not _YES.value:
        estimate.confirm(cfg, bool(bought), bought)
    try:
        processes.init(cfg)
        return train.train(cfg)["exit_code"]
    except BaseException as error:
        processes.abandon(error)
        raise


if __name__ == "__main__":
    cli.run(main)
