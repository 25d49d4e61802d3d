"""What a run may start from, and the base that its adapters stand beside."""

import json

import jax
import numpy as np
import pytest
from hf_params import BASE, random_params
from ml_collections import ConfigDict

from omniopd_jax import config, hf, model
from omniopd_jax.errors import UserError
from omniopd_jax.model import lora
from omniopd_jax.run import checkpoint, identity, trained


def test_adapters_beside_another_base_than_they_were_trained_on_are_told(tmp_path, capsys):
    """Of the same shape, so that nothing else would."""
    folder = tmp_path / "student"
    hf.save(folder, random_params(BASE), BASE)
    digests = {identity.STUDENT: identity.folder_digest(str(folder))}
    saved = {"student": {"path": str(folder)}, identity.DIGESTS: digests}
    run = trained.Trained({"layers": {}}, {}, BASE, ConfigDict({"rank": 2}), saved)
    run.whole()
    assert "warning" not in capsys.readouterr().out
    hf.save(folder, random_params(BASE, seed=1), BASE)
    run.whole()
    assert "has changed since the run began" in capsys.readouterr().out


def test_adapters_go_on_only_where_they_mean_the_same(tmp_path, monkeypatch):
    """A run that starts from another's: its scale, its base's weights and its base's config are the other's."""
    folder, other, first = (tmp_path / name for name in ("student", "other", "first"))
    hf.save(folder, random_params(BASE), BASE)
    hf.save(other, random_params(BASE, seed=1), BASE)
    cfg = config.default()
    cfg.student.path, cfg.student.start, cfg.lora.rank, cfg.lora.alpha = str(folder), str(first), 2, 4.0
    shapes = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, np.float32), lora.table(BASE, cfg.lora), is_leaf=model.is_param
    )
    digests = {identity.STUDENT: identity.folder_digest(str(folder))}
    run = {"student": {"path": str(folder)}, "lora": cfg.lora.to_dict(), identity.DIGESTS: digests}
    first.mkdir()
    (first / "config.json").write_text(json.dumps(run))
    monkeypatch.setattr(checkpoint, "saved_params", lambda *_: checkpoint.Saved(first, 1, shapes, run))
    trained.check_start(cfg, BASE)
    cfg.lora.alpha = 8.0
    with pytest.raises(UserError, match="has lora.rank = 2, lora.alpha = 4.0, .*adapters go on with the same"):
        trained.check_start(cfg, BASE)
    cfg.lora.alpha, cfg.student.path = 4.0, str(other)
    with pytest.raises(UserError, match="other files than those of student.path"):
        trained.check_start(cfg, BASE)
    cfg.student.path, run["student"]["path"] = str(folder), str(tmp_path / "gone")
    trained.check_start(cfg, BASE)  # the base has moved: its files are the same
    cfg.student.path, run["student"]["path"] = str(other), str(folder)
    longer = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (folder / "config.json").write_text(json.dumps(longer))
    with pytest.raises(UserError, match="was not trained from the model in"):
        trained.check_start(cfg, BASE)
    run.pop("lora")  # of a run from before LoRA
    with pytest.raises(UserError, match="has lora.rank = 0"):
        trained.check_start(cfg, BASE)
