"""Checkpoints by Orbax's manager: sharded, asynchronous, atomic, kept by count and by interval.

Beside the state is a fingerprint of its bits, the same on any mesh: what comes back must have it. A newest step that
does not is moved aside, and the one before it is taken.
"""

import contextlib
import dataclasses
import functools
import pathlib
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from omniopd_jax import config
from omniopd_jax.errors import UserError
from omniopd_jax.parallel import processes
from omniopd_jax.run import files, host
from omniopd_jax.run.bucket import Mirror
from omniopd_jax.run.state import TrainState
from omniopd_jax.teachers import journal as journals
from omniopd_jax.teachers.protocol import stable_hash

JOURNALS = "journal_snapshots"  # beside the checkpoints: <step>/<rank>/*.sqlite
WHOLE = "disks"  # in a part of a snapshot whose files are all there: how many parts the step has
CORRUPT = "corrupt_checkpoints"  # steps that could not be restored, moved out of the way


def restore_journal(cfg) -> list[int]:
    """Puts back what the journal's folder lacks of the newest snapshot, before a resume on another machine.

    Processes whose folder is on disks of their own take a part of the snapshot each, whatever their number was, but for
    what one of these disks still has: that one takes what its journal got since, on another machine.

    Returns:
      For each process the lowest rank that shares its journal's disk.
    """
    folder = journals.folder_of(cfg)
    disks = processes.disks(folder) if jax.process_count() > 1 else [0]
    snapshots = config.local_folder(cfg) / JOURNALS
    newest = processes.first("newest journal", newest_snapshot(snapshots))
    owners, rank = sorted(set(disks)), jax.process_index()
    held = processes.gather("journals held", journals.known(folder) if rank in owners else ([], []))
    imported_elsewhere = {name for other in owners if other != rank for name in held[other][1]}
    if rank in owners and imported_elsewhere & set(held[rank][0]):
        journals.renew(folder, imported_elsewhere)
    if newest is not None:
        holds = {owner: set(sum(held[owner], [])) for owner in owners}
        elsewhere = {
            n for other in owners if other != rank for n in holds[other] if other < rank or n not in holds[rank]
        }
        for i, part in enumerate(parts_of(snapshots / str(newest)) if rank in owners else ()):
            journals.restore(part, folder, elsewhere, takes=owners[i % len(owners)] == rank)
        processes.barrier("journal restored")
    return disks


def parts_of(snapshot: pathlib.Path) -> list[pathlib.Path]:
    """A step's copies of journals, one a disk."""
    return sorted(f for f in snapshot.iterdir() if f.is_dir() and f.name.isdigit())


def newest_snapshot(snapshots: pathlib.Path) -> int | None:
    """The newest step of which every disk's copy is there: a run may have been killed between the first and the last.

    Copies of versions that did not write `WHOLE` are taken for complete where no other step is.
    """
    found = {int(f.name): parts_of(f) for f in snapshots.glob("*") if f.name.isdigit() and f.is_dir()}
    marks = {step: [mark for part in parts if (mark := _mark(part))] for step, parts in found.items()}
    whole = [step for step, counts in marks.items() if counts and len(counts) >= max(counts)]
    return max(whole or found, default=None)


def _mark(part: pathlib.Path) -> int:
    """How many parts the step has, by a part's own mark; 0: there is none, or none that can be read."""
    try:
        return int((part / WHOLE).read_text())
    except (OSError, ValueError):  # a disk that was full, a power cut
        return 0


@contextlib.contextmanager
def opened(cfg, disks: list[int], mirror: Mirror):
    """The run's own `Checkpoints`, closed at the end. `disks`: what `restore_journal` found. `mirror`: sends the rest
    of the run to its bucket before each save."""
    checkpoints = Checkpoints(
        cfg.run_dir, keep=cfg.checkpoint.keep, keep_every=cfg.checkpoint.keep_every, local=config.local_folder(cfg)
    )
    checkpoints.disks, checkpoints.before_save = disks, mirror.send
    try:
        yield checkpoints
    finally:
        checkpoints.close()


class Checkpoints:
    """The checkpoints of a run, under `run_dir`/checkpoints. The data position is the step, so it needs no file.

    Opening them removes what unfinished saves left: only the run itself may, once, at its start. Everyone else, who may
    come while a save is under way, opens them by `reader`.

    Args:
      keep: the newest N.
      keep_every: and for good every step that it divides; 0: none.
      local: the folder of this host that the journal's copies go to; None: `run_dir`.

    Attributes:
      before_save: called when everything but the checkpoint itself is written.
    """

    def __init__(self, run_dir, *, keep: int, keep_every: int = 0, local: pathlib.Path | None = None):
        folder = files.place(run_dir) / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        self._open(
            folder,
            local or folder.parent,
            ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
        )

    @classmethod
    def reader(cls, run_dir) -> "Checkpoints":
        """A run's checkpoints for reading alone: nothing is created, removed or written in its folder.

        Raises:
          UserError: the folder holds no checkpoints.
        """
        folder = files.place(run_dir) / "checkpoints"
        if not folder.is_dir():
            raise UserError(f"{folder.parent} holds no checkpoint yet")
        checkpoints = cls.__new__(cls)
        checkpoints._open(
            folder,
            folder.parent,
            ocp.CheckpointManagerOptions(read_only=True, create=False, enable_async_checkpointing=False),
        )
        return checkpoints

    def _open(self, folder, local, options) -> None:
        self._folder, self._journals, self.before_save = folder, local / JOURNALS, lambda: None
        self.disks = [0] * jax.process_count()  # what `restore_journal` found
        self._manager = ocp.CheckpointManager(folder, options=options)

    def latest(self) -> int | None:
        """The newest complete step, or None. A save that was cut off does not count."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict, *, journal=None) -> None:
        """Starts saving the state under its step; the write goes on while training does.

        Args:
          meta: JSON: running totals of the run (tokens, dollars, seconds).
          journal: the teacher's, copied beside the checkpoint as it is now (its own disk may be gone at the resume).
        """
        step = int(jax.device_get(state.step))
        if journal is not None:
            meta = meta | {"journal": journal.position(), "budget": dataclasses.asdict(journal.totals())}
            self._copy_journal(journal, step)
        self.before_save()
        if step in self._manager.all_steps():  # the step after it did not end; what that has paid for is copied now
            return
        meta = meta | {"fingerprint": fingerprint(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_plain(state)), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=args)

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
        """The state of `step` (default: the newest), laid out as `like` (arrays or sharded ShapeDtypeStructs).

        Raises:
          UserError: no such step, or a checkpoint that does not fit the model.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"no checkpoint in {self._folder}")
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_plain(like)), meta=ocp.args.JsonRestore())
        try:
            got = self._manager.restore(step, args=args)
        except Exception as error:  # files in any state: whatever Orbax and TensorStore make of them
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise UserError(f"checkpoint {step} in {self._folder} can't be restored: {reason}") from error
        s, meta = got["state"], got["meta"]
        key = jax.random.wrap_key_data(s["key"])
        state = TrainState(s["params"], s["opt_state"], s["step"], key, s.get("average"))
        if meta.pop("fingerprint", None) != fingerprint(state):
            raise UserError(
                f"checkpoint {step} in {self._folder} can't be restored: its numbers are not those that were saved"
            )
        return state, meta

    def meta(self, step: int) -> dict:
        """What was saved beside the state of a step; {} where it can't be read."""
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])
        except Exception:  # files in any state: whatever Orbax makes of them
            return {}

    def restore_newest(self, like: TrainState) -> tuple[TrainState, dict] | None:
        """The newest checkpoint that is whole; those after it are moved aside, loudly. None: there is none at all.

        Raises:
          UserError: there are checkpoints, and none can be restored (as where they are of another model).
        """
        problems, step = [], self.latest()
        while (step := processes.first("newest checkpoint", step)) is not None:
            try:
                got, problem = self.restore(like, step), None
            except UserError as error:
                got, problem = None, str(error)
            problem = processes.any_of("checkpoint's problem", problem)
            if problem is None:
                self._set_aside([s for s, _ in problems])
                return got
            problems.append((step, problem))
            step = max((s for s in self._manager.all_steps() if s < step), default=None)
            print(f"warning: {problem}", file=sys.stderr, flush=True)
        if problems:
            raise UserError(problems[0][1])
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Moves broken steps away: they will be saved anew."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self._folder.parent / CORRUPT / f"{step}-{time.time_ns()}"
                target.parent.mkdir(exist_ok=True)
                if config.is_bucket(target):  # which has no empty folder
                    (target.parent / "README").write_text("Checkpoints that could not be restored.\n")
                (self._folder / str(step)).rename(target)
                print(f"warning: moved the broken checkpoint {step} to {target}", file=sys.stderr, flush=True)
        processes.barrier("broken checkpoints moved")
        self._manager.reload()

    def _copy_journal(self, journal, step: int) -> None:
        """A copy a disk, in a folder of its own; copies whose checkpoint is gone go too."""
        rank = jax.process_index()
        if self.disks[rank] == rank:
            part = self._journals / str(step) / str(rank)
            journal.copy_to(part)
            host.write_whole(part / WHOLE, f"{len(set(self.disks))}\n")
        processes.barrier("journal copied")  # before any process answers the next step's calls
        if self.disks[rank] == rank:
            kept = {str(s) for s in self._manager.all_steps()} | {str(step)}
            for old in self._journals.iterdir():
                if old.name.isdigit() and old.is_dir() and old.name not in kept:
                    shutil.rmtree(old, ignore_errors=True)  # another process of the same disk may be at it

    def drop_after(self, step: int) -> None:
        """Removes later steps: the manager would not save an earlier one beside them."""
        if later := [s for s in self._manager.all_steps() if s > step]:
            self._manager.wait_until_finished()
            for s in later:
                self._manager.delete(s)

    def wait(self) -> None:
        """Until every save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the manager's threads."""
        self._manager.wait_until_finished()
        self._manager.close()


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a run's checkpoint holds of parameters, none read: `shapes` is their tree, `config` the run's resolved
    config."""

    folder: pathlib.Path
    step: int
    shapes: dict
    config: dict


def saved_params(run_dir, step: int | None = None) -> Saved:
    """Looks into a run's checkpoint; `step` None: the newest.

    Raises:
      UserError: no run or no checkpoint there.
    """
    run_dir = files.place(run_dir)
    config_file = run_dir / "config.json"
    if not config_file.is_file():
        raise UserError(f"{run_dir} is not a run: it has no config.json")
    with contextlib.closing(Checkpoints.reader(run_dir)) as checkpoints:
        steps = sorted(checkpoints._manager.all_steps())
        step = checkpoints.latest() if step is None else step
        if step is None or step not in steps:
            raise UserError(f"{checkpoints._folder} has no step {step}; it has {steps}")
        folder = checkpoints._folder / str(step) / "state"
    tree = ocp.StandardCheckpointer().metadata(folder).item_metadata.tree["params"]
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree, is_leaf=lambda a: hasattr(a, "shape"))
    return Saved(folder, step, shapes, files.read_json(config_file, "write it again from the run's recipe"))


def read_params(saved: Saved, shardings: dict | None = None) -> dict:
    """The parameters alone: neither of the optimizer's moments is read.

    Args:
      shardings: a tree like `saved.shapes`: each device gets its part. None: numpy arrays on this host.

    Raises:
      UserError: files that can't be read.
    """
    if shardings is None:
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved.shapes)
    else:
        how = jax.tree.map(lambda _, where: ocp.ArrayRestoreArgs(sharding=where), saved.shapes, shardings)
    args = ocp.args.PyTreeRestore(item={"params": saved.shapes}, restore_args={"params": how}, partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(saved.folder, args=args)["params"]
    except Exception as error:  # files in any state: whatever Orbax and TensorStore make of them
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"checkpoint {saved.step} in {saved.folder.parent.parent} can't be read: {reason}") from error


def restore_params(run_dir, step: int | None = None) -> tuple[dict, dict]:
    """(the parameters of a run's checkpoint on this host, its resolved config). Raises `UserError` as
    `saved_params`."""
    saved = saved_params(run_dir, step)
    return read_params(saved), saved.config


def fingerprint(state: TrainState) -> int:
    """63 bits that depend on every bit of the state and not on how it is placed on devices: sums of integers wrap
    exactly."""
    plain = _plain(state)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(plain)]
    where = plain["step"].sharding  # replicated
    return stable_hash(*names, *jax.device_get(_summer(where)(plain)).tolist())


@functools.lru_cache
def _summer(where):
    return jax.jit(_sums, out_shardings=where)


def _sums(tree):
    """For each leaf the sum of its words, each times an odd number of its place, modulo 2**32."""

    def one(a):
        words = jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.zeros(a.shape, jnp.uint32)
        for axis, size in enumerate(a.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
        return jnp.sum(words * (2 * (place * jnp.uint32(0x9E3779B1)) + 1), dtype=jnp.uint32)

    return jnp.stack([one(a) for a in jax.tree.leaves(tree)])


def _plain(state: TrainState) -> dict:
    """The state as Orbax takes it: the PRNG key by its data."""
    key = state.key
    if isinstance(key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, key)
        key = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=state.key.sharding)
    else:
        key = jax.random.key_data(key)
    plain = {"params": state.params, "opt_state": state.opt_state, "step": state.step, "key": key}
    return plain if state.average is None else plain | {"average": state.average}
