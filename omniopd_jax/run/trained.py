"""What a run's checkpoint holds, for export and evaluation."""

import dataclasses
import json
import pathlib

from etils import epath
from ml_collections import ConfigDict

from omniopd_jax import config, hf, model
from omniopd_jax.errors import UserError
from omniopd_jax.model import lora
from omniopd_jax.run import checkpoint, files, identity, logging


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a checkpoint holds: all parameters or adapters, and of which model; `config` is the run's."""

    params: dict
    table: dict  # their model.Params
    model_cfg: model.ModelConfig
    lora: ConfigDict
    config: dict

    @property
    def student(self) -> str:
        """The run's `student.path`."""
        return self.config["student"]["path"]

    def template_of(self, cfg) -> str | None:
        """The text of the Jinja file that the run was trained with, where `cfg` names the same; None: not kept."""
        same = cfg.student.template == self.config["student"].get("template")
        return self.config.get(identity.TEMPLATE) if same else None

    def whole(self, mesh=None) -> dict:
        """The model's parameters, on the mesh that they were read to; with LoRA the float32 base with the adapters
        attached."""
        if not self.lora.rank:
            return self.params
        self.tell_other_base()
        return lora.attach(hf.load(self.student, mesh=mesh)[0], self.params)

    def tell_other_base(self) -> None:
        """Says where the student's folder is no longer the one that adapters were trained beside."""
        if _other_base(self.config, self.student):
            logging.say(
                f"warning: {self.student} (student.path) has changed since the run began, and its adapters belong to "
                "what it was: give it back its files"
            )


def read(run_dir, step: int | None, mesh=None) -> Trained:
    """What a run's checkpoint trained; `step` None: the newest.

    Args:
      mesh: each device gets its part of the parameters; None: numpy arrays on this host.

    Raises:
      UserError: no such run or step, or a student folder that is gone or holds another model.
    """
    saved = checkpoint.saved_params(run_dir, step)
    student, settings = saved.config["student"]["path"], lora.settings_of(saved.config)
    model_cfg = hf.read_config(student)
    table = lora.trained_table(model_cfg, settings)
    if not model.fits(saved.shapes, table):
        raise UserError(
            f"{run_dir} was not trained from the model in {student}: their parameters differ in name or shape"
        )
    params = checkpoint.read_params(saved, None if mesh is None else model.table_shardings(table, mesh))
    return Trained(params, table, model_cfg, settings, saved.config)


def is_run(folder: pathlib.Path | epath.Path) -> bool:
    """Whether its config.json is a run's, not a model's."""
    try:
        return "student" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def locate(source) -> tuple[pathlib.Path | epath.Path, int | None]:
    """(run folder, step or None for the newest) of RUN, RUN/checkpoints or RUN/checkpoints/STEP."""
    path = files.place(source)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return (path.parent if path.name == "checkpoints" else path), None


def _other_base(run_config: dict, student: str) -> bool:
    """Whether the folder `student` is surely not the one that a run began with; of older runs it is not known."""
    before = (run_config.get(identity.DIGESTS) or {}).get(identity.STUDENT)
    return bool(before) and before != identity.folder_digest(student)


def _is_another(student: str, model_cfg: model.ModelConfig) -> bool:
    """Whether the folder that a run began with holds another model; where it is gone, shapes alone can tell."""
    try:
        found = hf.read_config(student, setting="student.start")
    except UserError:
        return False
    return dataclasses.replace(found, prefix=model_cfg.prefix) != model_cfg


def check_start(cfg, model_cfg: model.ModelConfig) -> None:
    """`student.start` must hold what this run trains.

    Raises:
      UserError: nothing there, another model, adapters where whole weights are trained on, or the other way, or
        adapters that would mean something else here.
    """
    start = cfg.student.start
    if not start:
        return
    run, at = locate(start)
    if not is_run(run):
        if cfg.lora.rank:
            raise UserError(
                f"student.start = {start!r} is no run with adapters: set student.path to it for lora.rank > 0"
            )
        if hf.read_config(start, setting="student.start") != model_cfg:
            raise UserError(f"student.start = {start!r} is another model than student.path = {cfg.student.path!r}")
        return
    saved = checkpoint.saved_params(run, at)
    old = lora.settings_of(saved.config)
    there, here = ([s.get("rank"), s.get("alpha"), tuple(s.get("targets") or ())] for s in (old, cfg.lora))
    if cfg.lora.rank and there != here:
        raise UserError(
            f"student.start = {start!r} has lora.rank = {there[0]}, lora.alpha = {there[1]}, lora.targets = "
            f"{there[2]}: adapters go on with the same, or from an export as student.path"
        )
    if _is_another(saved.config["student"]["path"], model_cfg) or not model.fits(
        saved.shapes, lora.trained_table(model_cfg, old)
    ):
        raise UserError(f"student.start = {start!r} was not trained from the model in {cfg.student.path}")
    if cfg.lora.rank and _other_base(saved.config, cfg.student.path):
        raise UserError(
            f"student.start = {start!r}: its adapters were trained beside other files than those of student.path = "
            f"{cfg.student.path!r}: export it, and set student.path to the export"
        )


def recipe(source) -> ConfigDict | None:
    """The config of the run that `source` (RUN or RUN/checkpoints/STEP) names; None where it is no run.

    Keys that this program no longer knows are left out.
    """
    if not source:
        return None
    file = locate(source)[0] / "config.json"
    saved = files.read_json(file, "write it again from the run's recipe") if file.is_file() else {}
    if "student" not in saved:
        return None
    cfg = config.default()
    known = config.flat(cfg)
    for key, value in config.flat(ConfigDict(saved)).items():
        if key in known:
            cfg.update_from_flattened_dict({key: tuple(value) if isinstance(known[key], tuple) else value})
    return cfg
