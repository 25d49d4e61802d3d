"""The memory check knows every way to learn: the update is lowered with the batch that a run would bring."""

import jax
import pytest
import tiny
from methods import METHODS

from omniopd_jax.parallel import sharding
from omniopd_jax.run import fit


@pytest.mark.parametrize(
    "method,packing",
    [("mix", 0), ("self", 0), *(pytest.param(m, p, marks=pytest.mark.slow) for m in METHODS for p in (0, 256))],
)
def test_the_update_is_lowered_with_the_rows_of_the_method(tmp_path, method, packing):
    """Lowering checks every array's shape against the step; rows of the teacher's texts are there, at their longest."""
    models = tiny.make_folders(tmp_path)
    more = METHODS[method] | {"prompts_per_step": 8, "packing.length": packing}
    cfg = tiny.recipe(*models, tmp_path / "run", **more)
    plan = fit.Plan(cfg, sharding.make_mesh({"data": 2, "fsdp": -1, "tp": 1}, jax.devices()[:4]))
    lowered, donated, _ = plan.lower("update")
    assert lowered.as_text() and donated > 0
    batch = plan.batch()
    rows = [len(b.length_B.shape) and b.length_B.shape[0] for b in (batch, *batch.more)]
    assert rows == {"continuation": [32], "peak": [32], "mix": [16, 32]}.get(method, [16])
    assert (plan.sizes()["average"] > 0) == (method == "ema")
    assert (plan.reference is None) == (method == "self"), "who scores itself takes no second copy of the weights"
    if method in ("peak", "continuation") and "teacher" in plan.samplers:
        asked = plan._asked(cfg)
        assert asked[0] == asked[1] == 16 * cfg.continuation.cuts, "one text behind each cut"
    held = plan.teacher_bytes()
    assert (held > 0) == ("teacher" in plan.samplers), "weights of a teacher in process are there all the time"
    assert (batch.context is not None) == (method in ("context", "self", "ema"))
