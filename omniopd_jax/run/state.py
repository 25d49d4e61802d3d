"""What a run trains and a checkpoint holds."""

import flax.struct
import jax
import optax


@flax.struct.dataclass
class TrainState:
    """params: float32, what is trained: all weights, or with LoRA the adapters alone. key: the run's PRNG key; every
    use folds the step in, so it never changes. average: a running average of `params`, where `context.model = ema`
    reads one; else None.
    """

    params: dict
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array
    average: dict | None = None
