"""Several processes of one program: starting JAX on them, and what they must agree on.

Device data crosses hosts inside jitted code. What the *host* decides (which checkpoint, whether to stop, how wide a
batch is, what the teacher counted) goes through JAX's coordination service as small messages with a name: every
process waits for every other, a wait that takes long says on stderr who is missing, and one that takes too long ends
the run. A process that died is found by its heartbeat, and the service then ends the others. With one process all is
local.
"""

import base64
import json
import os
import pathlib
import secrets
import sys
import traceback
import zlib

import jax
from jax.experimental import multihost_utils

from omniopd_jax.errors import Stopped, TeacherStopped, UserError

EXPLICIT = ("OMNIOPD_COORDINATOR", "OMNIOPD_NUM_PROCESSES", "OMNIOPD_PROCESS_ID")
AUTO = "OMNIOPD_DISTRIBUTED"  # =1: let JAX find the hosts of a TPU slice or of a SLURM step by itself
_settings = {"barrier_s": 30.0, "limit_s": 3600.0}
_calls: dict[str, int] = {}


def init(cfg) -> None:
    """Joins the run's processes, before the first computation. From the environment, the first of these that is there:

    - OMNIOPD_COORDINATOR=host:port, OMNIOPD_NUM_PROCESSES, OMNIOPD_PROCESS_ID: explicit.
    - OMNIOPD_DISTRIBUTED=1, a SLURM step of several tasks, or TPU_WORKER_HOSTNAMES with several names: JAX's own
      detection.
    - nothing: one process.

    Raises:
      UserError: only some of the explicit three, or values that are no numbers.
    """
    d = cfg.distributed
    _settings.update(barrier_s=d.barrier_s, limit_s=d.limit_s)
    arguments = explicit(os.environ)
    if arguments is None and not several(os.environ):
        return
    # JAX's defaults are minutes: a dead host would hold the others for that long
    jax.distributed.initialize(
        **(arguments or {}), initialization_timeout=int(d.start_s), heartbeat_timeout_seconds=int(d.heartbeat_s),
        shutdown_timeout_seconds=int(d.start_s),
    )  # fmt: skip
    if jax.default_backend() == "cpu":
        # Process 0 alone fills the compile cache. A program from it beside one compiled now may order its collectives
        # otherwise (XLA's CPU schedule depends on the cores it is given), and then each waits in another one for ever.
        jax.config.update("jax_enable_compilation_cache", False)
    barrier("start")
    # the first collective connects everyone to everyone, for which gloo allows 30 s: now, not after different compile
    # times
    multihost_utils.sync_global_devices("start")


def explicit(environment) -> dict | None:
    """The arguments of `jax.distributed.initialize` that the environment spells out, or None."""
    given = [environment.get(name) for name in EXPLICIT]
    if not any(given):
        return None
    try:
        address, count, rank = given[0], int(given[1]), int(given[2])
        if not address or ":" not in address or not 0 <= rank < count:
            raise ValueError
    except (TypeError, ValueError):
        shown = ", ".join(f"{n}={v}" for n, v in zip(EXPLICIT, given))
        raise UserError(
            f"{shown}: set all three, host:port, a number of processes and a rank below it; or none"
        ) from None
    return {"coordinator_address": address, "num_processes": count, "process_id": rank}


def several(environment) -> bool:
    """Whether the environment is that of several hosts which JAX can find by itself."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
    slurm = "SLURM_PROCID" in environment and int(tasks) > 1
    tpu = len([h for h in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]) > 1
    return environment.get(AUTO) == "1" or slurm or tpu


def gather(name: str, value) -> list:
    """Every process's `value` (anything that JSON can hold), by rank. All must call, in the same order.

    Raises:
      TimeoutError: after `distributed.limit_s`; names who is missing.
    """
    count, rank = jax.process_count(), jax.process_index()
    if count == 1:
        return [value]
    client = _client()
    _calls[name] = _calls.get(name, 0) + 1
    key = f"omniopd/{name}/{_calls[name]}"
    if rank:
        client.key_value_set_bytes(f"{key}/{rank}", _pack(value))
        return _unpack(_get(client, f"{key}/all", name, [0]))
    values = [value]
    for other in range(1, count):
        missing = range(other, count)
        values.append(_unpack(_get(client, f"{key}/{other}", name, missing, lambda r: f"{key}/{r}")))
        client.key_value_delete(f"{key}/{other}")
    client.key_value_set_bytes(f"{key}/all", _pack(values))
    if _calls[name] > 2:  # everyone has read it: they have sent their part of a later one since
        client.key_value_delete(f"omniopd/{name}/{_calls[name] - 2}/all")
    return values


def first(name: str, value):
    """Process 0's value, in every process. Each passes its own; only the first one's counts."""
    return gather(name, value)[0]


def any_of(name: str, value: str | None) -> str | None:
    """The first value that is not empty, in order of rank: one process's wish is everyone's."""
    return next((v for v in gather(name, value) if v), None)


def barrier(name: str) -> None:
    """Waits until every process is here."""
    gather(name, None)


def raise_on_all(name: str, function):
    """`function()`; where it raises a UserError in some process, every process raises one, so that none waits alone.

    Raises:
      UserError: this process's own, or one of its class that says which process had it.
    """
    if jax.process_count() == 1:
        return function()
    value, error = None, None
    try:
        value = function()
    except UserError as e:
        error = e
    problems = gather(name, None if error is None else [type(error).__name__, str(error), error.exit_code])
    if error is not None:
        raise error
    for rank, problem in enumerate(problems):
        if problem:
            kind = {"TeacherStopped": TeacherStopped, "Stopped": Stopped}.get(problem[0], UserError)
            text = problem[1] if kind is Stopped else f"process {rank}: {problem[1]}"
            raise kind(text, exit_code=problem[2])
    return value


def tell(name: str, text: str) -> None:
    """A word to those who are about to `gather(name)`, who need not wait for it to hear it: see `told`."""
    if jax.process_count() > 1:
        _client().key_value_set_bytes(_word(name), _pack(text), allow_overwrite=True)


def told(name: str) -> str:
    """What a process has told before the next `gather(name)`; '' where none has."""
    data = _try_get(_client(), _word(name)) if jax.process_count() > 1 else None
    return "" if data is None else _unpack(data)


def _word(name: str) -> str:
    return f"omniopd/told/{name}/{_calls.get(name, 0)}"


def _client():
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def disks(folder) -> list[int]:
    """For each process the lowest rank that sees the same `folder`: equal numbers share a disk."""
    if jax.process_count() == 1:
        return [0]
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = gather("disks", f".seen-{jax.process_index()}-{secrets.token_hex(6)}")
    own = folder / names[jax.process_index()]
    own.touch()
    barrier("disks written")
    lowest = next(r for r, name in enumerate(names) if (folder / name).exists())
    out = gather("disks seen", lowest)
    own.unlink()
    return out


def once_a_disk(values: list, disks: list[int]) -> list:
    """Of values by rank those of the lowest rank on each disk: the others speak of the same one. `disks`: as `disks`
    returns them."""
    return [value for rank, value in enumerate(values) if disks[rank] == rank]


def abandon(error: BaseException) -> None:
    """Ends this process at once after an error, with its rank on stderr. The others learn it from the heartbeat.

    Returns only where there is one process: an ordinary exit would wait at the service for processes that wait for us.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    code = 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    elif isinstance(error, UserError):
        code = error.exit_code
        for line in str(error).splitlines():
            print(f"error: process {jax.process_index()}: {line}", file=sys.stderr)
    else:
        text = "".join(traceback.format_exception(error))
        print(f"process {jax.process_index()} of {jax.process_count()}:\n{text}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _get(client, key: str, name: str, missing, key_of=None) -> bytes:
    """One message; says every `barrier_s` who is missing, and gives up after `limit_s`."""
    waited = 0.0
    while True:
        try:
            return client.blocking_key_value_get_bytes(key, int(1000 * _settings["barrier_s"]))
        except RuntimeError as error:  # JaxRuntimeError
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        waited += _settings["barrier_s"]
        absent = [r for r in missing if key_of is None or _try_get(client, key_of(r)) is None]
        text = f"waited {waited:.0f} s at {name!r} for process(es) {', '.join(map(str, absent))}"
        if waited >= _settings["limit_s"]:
            raise TimeoutError(f"{text}: distributed.limit_s = {_settings['limit_s']:.0f} s is over")
        print(f"process {jax.process_index()} {text}", file=sys.stderr, flush=True)


def _try_get(client, key: str) -> bytes | None:
    """One message, where it is there by now."""
    try:
        return client.key_value_try_get_bytes(key)
    except RuntimeError:
        return None


def _pack(value) -> bytes:
    return base64.b64encode(zlib.compress(json.dumps(value).encode(), 1))


def _unpack(data: bytes):
    return json.loads(zlib.decompress(base64.b64decode(data)))
