"""Checkpoints: any mesh reads them, broken ones are moved aside loudly, and what is kept is what was asked for."""

import dataclasses
import functools
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import FrozenConfigDict

from omniopd_jax import model, step
from omniopd_jax.errors import UserError
from omniopd_jax.parallel import sharding
from omniopd_jax.run import checkpoint
from omniopd_jax.run.checkpoint import Checkpoints
from omniopd_jax.teachers.journal import Journal, Totals

CFG = FrozenConfigDict(tiny.recipe("", "", ""))


@pytest.fixture(scope="module")
def state_on(model_cfg):
    """state_on((data, fsdp, tp)) -> a TrainState with every leaf different, and one of its shape with shardings."""

    @functools.cache
    def maker(shape):
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape)), jax.devices()[: shape[0] * shape[1] * shape[2]])
        where = step.state_shardings(model_cfg, CFG, mesh)

        def new(number):
            state = step.new_state(model.init(jax.random.key(0), model_cfg), CFG, jax.random.key(9))
            leaves, tree = jax.tree.flatten(state.opt_state)
            filled = [a + jnp.asarray(i, a.dtype) for i, a in enumerate(leaves)]
            return state.replace(opt_state=tree.unflatten(filled), step=state.step + number)

        return jax.jit(new, out_shardings=where), where

    def make(shape, number=1):
        new, where = maker(shape)
        state = new(np.int32(number))
        return state, jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, where)

    return make


@pytest.mark.slow
def test_a_bfloat16_first_moment_is_sharded_saved_and_resumed(model_cfg, tmp_path):
    cfg = FrozenConfigDict(tiny.recipe("", "", "", **{"optimizer.mu_dtype": "bfloat16"}))

    def on(shape):
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape)), jax.devices()[: shape[0] * shape[1] * shape[2]])
        where = step.state_shardings(model_cfg, cfg, mesh)
        abstract = step.abstract_state(model_cfg, cfg)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, where), where

    def new():
        state = step.new_state(model.init(jax.random.key(0), model_cfg), cfg, jax.random.key(9))
        return state.replace(opt_state=jax.tree.map(lambda a: a + jnp.asarray(1 / 3, a.dtype), state.opt_state))

    state = jax.jit(new, out_shardings=on((2, 2, 2))[1])()
    half = [a for a in jax.tree.leaves(state.opt_state) if a.dtype == jnp.bfloat16]
    assert len(half) == len(jax.tree.leaves(state.params))
    q = next(a for a in half if a.shape == (2, 16, 4, 8))
    assert {s.data.shape for s in q.addressable_shards} == {(2, 8, 2, 8)}
    points = Checkpoints(tmp_path, keep=1)
    points.save(state, {})
    points.wait()
    got, _ = points.restore(on((1, 1, 1))[0])  # checks the fingerprint
    points.close()
    assert equal(data_of(got), data_of(state))
    other = jax.tree.map(lambda a: jnp.nextafter(a, jnp.inf) if a.dtype == jnp.bfloat16 else a, state.opt_state)
    assert checkpoint.fingerprint(state.replace(opt_state=other)) != checkpoint.fingerprint(state)


def data_of(state):
    return checkpoint._plain(state)


def equal(a, b) -> bool:
    """To the last bit; leaves of no dimension too."""
    a, b = ([np.asarray(x) for x in jax.tree.leaves(jax.device_get(t))] for t in (a, b))
    return len(a) == len(b) and all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b))


@pytest.fixture(scope="module")
def written(state_on, tmp_path_factory):
    """A run folder with steps 1, 2 and 3 of a (2, 2, 2) mesh."""
    folder = tmp_path_factory.mktemp("run")
    points = Checkpoints(folder, keep=3)
    for number in (1, 2, 3):
        points.save(state_on((2, 2, 2), number)[0], {"steps": number})
    points.close()
    return folder


def copy(written, to):
    shutil.copytree(written, to)
    return to


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 1, 1), (4, 2, 1)])
def test_a_checkpoint_resumes_on_another_mesh(written, state_on, tmp_path, shape):
    points = Checkpoints(copy(written, tmp_path / "run"), keep=3)
    same, like = state_on(shape, 3)
    state, meta = points.restore_newest(like)
    assert meta == {"steps": 3} and equal(data_of(state), data_of(same))
    for leaf, want in zip(jax.tree.leaves(data_of(state)), jax.tree.leaves(data_of(like))):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
    points.close()


def test_the_fingerprint_is_the_meshes_same_and_every_bits_own(state_on):
    state, _ = state_on((2, 2, 2))
    found = checkpoint.fingerprint(state)
    assert found == checkpoint.fingerprint(state_on((1, 1, 1))[0])
    embed = state.params["embed"]
    for changed in (
        embed.at[3, 2].set(jnp.nextafter(embed[3, 2], 9.0)),
        embed.at[jnp.array([0, 1])].set(embed[:2][::-1]),
    ):
        assert checkpoint.fingerprint(state.replace(params=state.params | {"embed": changed})) != found
    assert checkpoint.fingerprint(state.replace(step=state.step + 1)) != found


def damages():
    def truncate(file):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    def garble(file):
        data = bytearray(file.read_bytes())
        for i in range(len(data) // 3, len(data), max(1, len(data) // 7)):
            data[i] ^= 0x5A
        file.write_bytes(bytes(data))

    return {"truncated": truncate, "garbled": garble, "removed": pathlib.Path.unlink}


def files_of(folder):
    """The files of the newest step that hold numbers or say how to read them."""
    found = [f for f in sorted((folder / "checkpoints" / "3").rglob("*")) if f.is_file() and f.stat().st_size]
    return [f for f in found if f.name not in ("commit_success.txt", "_sharding", "_CHECKPOINT_METADATA")]


@pytest.mark.parametrize("damage", damages())
@pytest.mark.parametrize("which", ["data", "manifest.ocdbt", "_METADATA", "metadata"])
def test_a_broken_newest_step_falls_back_to_the_one_before_loudly(written, state_on, tmp_path, capsys, damage, which):
    folder = copy(written, tmp_path / "run")
    # all data files: Orbax may leave some that the merged manifest does not name any more
    chosen = [f for f in files_of(folder) if f.name == which or (which == "data" and f.parent.name == "d")]
    assert chosen
    for file in chosen:
        damages()[damage](file)
    points = Checkpoints(folder, keep=3)
    same, like = state_on((1, 1, 1), 2)
    state, meta = points.restore_newest(like)
    assert meta == {"steps": 2} and equal(data_of(state), data_of(same))
    said = capsys.readouterr().err
    assert "warning: checkpoint 3" in said and "can't be restored" in said and "moved the broken checkpoint 3" in said
    assert len(list((folder / checkpoint.CORRUPT).iterdir())) == 1
    points.save(state_on((1, 1, 1), 3)[0], {"steps": 3})  # and is saved anew
    points.wait()
    assert points.latest() == 3
    assert int(points.restore_newest(state_on((1, 1, 1), 3)[1])[0].step) == 3
    points.close()


def test_no_damage_to_any_one_file_loads_wrong_numbers(written, state_on, tmp_path):
    """Whatever file is garbled: either the numbers are right to the last bit, or the step is refused."""
    same, like = state_on((1, 1, 1), 3)
    before = state_on((1, 1, 1), 2)[0]
    refused = 0
    for i, name in enumerate(f.relative_to(written) for f in files_of(written)):
        folder = copy(written, tmp_path / str(i))
        damages()["garbled"](folder / name)
        points = Checkpoints(folder, keep=3)
        state, meta = points.restore_newest(like)
        refused += meta["steps"] == 2
        assert equal(data_of(state), data_of(same if meta["steps"] == 3 else before)), name
        points.close()
    assert refused


def test_all_broken_is_an_error_that_names_the_newest(written, state_on, tmp_path):
    folder = copy(written, tmp_path / "run")
    for file in (folder / "checkpoints").rglob("manifest.ocdbt"):
        file.write_bytes(b"nothing")
    points = Checkpoints(folder, keep=3)
    with pytest.raises(UserError, match="checkpoint 3 .* can't be restored"):
        points.restore_newest(state_on((1, 1, 1))[1])
    assert not (folder / checkpoint.CORRUPT).exists(), "nothing is moved where nothing could be read"
    points.close()


def test_a_save_that_was_cut_off_does_not_count(written, state_on, tmp_path):
    folder = copy(written, tmp_path / "run")
    step_3 = folder / "checkpoints" / "3"
    step_3.rename(step_3.with_name("3.orbax-checkpoint-tmp"))
    points = Checkpoints(folder, keep=3)
    assert points.latest() == 2
    assert points.restore_newest(state_on((1, 1, 1), 2)[1])[1] == {"steps": 2}
    points.close()


def test_a_reader_creates_and_removes_nothing(written, tmp_path):
    folder = copy(written, tmp_path / "run")
    (folder / "config.json").write_text("{}")
    unfinished = folder / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(folder / "checkpoints" / "3", unfinished)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    points = Checkpoints.reader(folder)
    assert points.latest() == 3
    points.close()
    checkpoint.restore_params(folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    with pytest.raises(UserError, match="no checkpoint yet"):
        Checkpoints.reader(tmp_path)
    assert not list(tmp_path.glob("checkpoints"))


READER = """
import pathlib, sys
from omniopd_jax.run import checkpoint
run, count = pathlib.Path(sys.argv[1]), 0
while not (run / "done").exists():
    points = checkpoint.Checkpoints.reader(run)
    points.latest()
    points.close()
    count += 1
    (run.parent / "reads.new").write_text(str(count))
    (run.parent / "reads.new").replace(run.parent / "reads")
"""


def test_a_process_that_reads_all_the_time_costs_a_live_run_no_save(state_on, tmp_path):
    run = tmp_path / "run"
    points = Checkpoints(run, keep=30)
    (run / "config.json").write_text("{}")
    child = subprocess.Popen([sys.executable, "-c", READER, str(run)], cwd=tiny.REPO, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "reads").exists() and child.poll() is None:
            time.sleep(0.05)
        before = int((tmp_path / "reads").read_text())
        for number in range(1, 13):
            points.save(state_on((1, 1, 1), number)[0], {})
            points.wait()
        (run / "done").touch()
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
        assert int((tmp_path / "reads").read_text()) > before
        for number in range(1, 13):
            state, like = state_on((1, 1, 1), number)
            assert equal(data_of(points.restore(like, number)[0]), data_of(state))
    finally:
        child.kill()
        points.close()


def test_steps_are_kept_by_count_and_by_interval(state_on, tmp_path):
    points = Checkpoints(tmp_path, keep=2, keep_every=3)
    for number in range(1, 9):
        points.save(state_on((1, 1, 1), number)[0], {})
    points.close()
    assert sorted(int(f.name) for f in (tmp_path / "checkpoints").iterdir()) == [3, 6, 7, 8]


def test_an_earlier_step_is_saved_beside_later_ones_that_are_dropped(state_on, tmp_path):
    """A best of a run that was cut off and went another way: the manager alone would skip the save in silence."""
    points = Checkpoints(tmp_path, keep=1)
    points.save(state_on((1, 1, 1), 5)[0], {"best": 5})
    points.drop_after(3)
    points.save(state_on((1, 1, 1), 3)[0], {"best": 3})
    points.wait()
    assert points.latest() == 3 and points.restore(state_on((1, 1, 1), 3)[1])[1] == {"best": 3}
    points.close()


def test_a_stop_in_the_step_behind_a_checkpoint_copies_what_that_step_paid_for(state_on, tmp_path):
    journal, sent = Journal(tmp_path / "journal"), []
    points = Checkpoints(tmp_path, keep=3)
    points.before_save = lambda: sent.append(journal.totals().usd)
    for usd in (1.0, 7.0):  # the second: the step was cut off, so the state is still that of step 1
        journal.settle(journal.ask(b"key", 1, 100, usd, Totals()), "ok", usage=(30, 0, 20, usd))
        points.save(state_on((1, 1, 1), 1)[0], {}, journal=journal)
    points.close()
    journal.close()
    shutil.rmtree(tmp_path / "journal")
    checkpoint.restore_journal(tiny.recipe("", "", tmp_path))
    assert Journal(tmp_path / "journal").totals().usd == 8.0 and sent == [1.0, 8.0]


def test_the_journal_and_the_budget_come_back_where_their_disk_is_gone(state_on, tmp_path):
    journal = Journal(tmp_path / "journal")
    call = journal.ask(b"key", 2, 100, 0.5, Totals())
    journal.settle(call, "ok", usage=(30, 0, 20, 0.01))
    position = journal.position()
    points = Checkpoints(tmp_path, keep=3)
    points.save(state_on((1, 1, 1), 1)[0], {"steps": 1}, journal=journal)
    journal.settle(journal.ask(b"key", 2, 100, 0.5, Totals()), "ok", usage=(300, 0, 200, 0.1))  # after the checkpoint
    journal.close()
    shutil.rmtree(tmp_path / "journal")
    assert checkpoint.restore_journal(tiny.recipe("", "", tmp_path)) == [0]
    again = Journal(tmp_path / "journal")
    meta = points.restore_newest(state_on((1, 1, 1), 1)[1])[1]
    assert meta == {"steps": 1, "journal": position, "budget": {"calls": 1, "tokens": 50, "usd": pytest.approx(0.01)}}
    assert again.position() == position and dataclasses.asdict(again.totals()) == meta["budget"]
    points.close()
    again.close()
