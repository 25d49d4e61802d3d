"""What a run's checkpoint holds, for export and evaluation."""

import dataclasses
import pathlib

import jax
from ml_collections import ConfigDict

from omniopd_jax import hf, model
from omniopd_jax.errors import UserError
from omniopd_jax.model import lora
from omniopd_jax.run import checkpoint


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a checkpoint holds: all parameters or adapters, and of which model; `student` is the run's `student.path`."""

    params: dict
    table: dict  # their model.Params
    model_cfg: model.ModelConfig
    lora: ConfigDict
    student: str

    def whole(self, mesh=None) -> dict:
        """The model's parameters on a mesh (None: one device); with LoRA the float32 base with the adapters attached."""
        params = self.params
        if mesh is not None:
            params = jax.device_put(params, model.table_shardings(self.table, mesh))
        return lora.attach(hf.load(self.student, mesh=mesh)[0], params) if self.lora.rank else params


def read(run_dir, step: int | None) -> Trained:
    """What a run's checkpoint trained; `step` None: the newest.

    Raises:
      UserError: no such run or step, or a student folder that is gone or holds another model.
    """
    params, config = checkpoint.restore_params(run_dir, step)
    student, settings = config["student"]["path"], lora.settings_of(config)
    model_cfg = hf.read_config(student)
    table = lora.table(model_cfg, settings) if settings.rank else model.table(model_cfg)
    if not model.fits(params, table):
        raise UserError(
            f"{run_dir} was not trained from the model in {student}: their parameters differ in name or shape"
        )
    return Trained(params, table, model_cfg, settings, student)


def locate(source) -> tuple[pathlib.Path, int | None]:
    """(run folder, step or None for the newest) of RUN, RUN/checkpoints or RUN/checkpoints/STEP."""
    path = pathlib.Path(source).absolute()
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return (path.parent if path.name == "checkpoints" else path), None
