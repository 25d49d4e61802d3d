"""Several real processes over loopback: the same numbers as one, and no process that waits for a dead one for long."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import types

import jax
import multihost_worker
import numpy as np
import pytest
import tiny

from configs import tiny as tiny_recipe
from omniopd_jax.errors import UserError
from omniopd_jax.parallel import processes, sharding
from omniopd_jax.run import checkpoint, logging, reporting
from omniopd_jax.teachers.journal import Spent

STEPS = 6
PATIENCE = 600  # seconds; other work may share the machine
# Several processes compile for themselves, each time (processes.init): without LLVM's optimisation that is what takes
# long
FLAGS = {"XLA_FLAGS": f"--xla_backend_optimization_level=0 {tiny.XLA_FLAGS}"}
LAUNCH = str(tiny.REPO / "launch" / "multihost_cpu.sh")


class Launched:
    """launch/multihost_cpu.sh at work, its output read as it comes."""

    def __init__(self, count, values):
        self.process = subprocess.Popen(
            [LAUNCH, str(count), *tiny.arguments(values)],
            cwd=tiny.REPO,
            env=tiny.environment(PYTHON=tiny.PYTHON, **FLAGS),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines, self._reader = [], threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def text(self):
        return "".join(self.lines)

    def pid(self, rank):
        return int(re.search(rf"process {rank} is pid (\d+)", self.text).group(1))

    def wait_for(self, pattern, seconds=PATIENCE):
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end and self.process.poll() is None, self.text
            time.sleep(0.02)

    def end(self, seconds=PATIENCE):
        code = self.process.wait(timeout=seconds)
        self._reader.join(timeout=10)
        return code


def recipe(models, folder, **more):
    return (
        tiny.overrides(*models, folder)
        | {
            "num_steps": STEPS,
            "checkpoint.every": 1,
            "audit.log_per_step": 1000,
            "rollout.slots": 4,
            "rollout.parts": 2,
        }
        | more
    )


def audits(folder, step):
    """{(prompt, sample id, peak)} of a step, from every process's file."""
    rows = [r for f in folder.glob("audits*.jsonl") for r in tiny.lines(f)]
    return sorted((r["prompt_id"], r["sample_id"], r["peak"]) for r in rows if r["step"] == step)


def without_time(folder):
    rows = tiny.lines(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith(("time/", "perf/")) and "latency" not in k} for r in rows]


def same_run(a, b):
    assert tiny.same(checkpoint.restore_params(a)[0], checkpoint.restore_params(b)[0])
    assert without_time(a) == without_time(b)
    assert audits(a, STEPS - 1) == audits(b, STEPS - 1)


@pytest.fixture(scope="module")
def one_step(models, tmp_path_factory):
    """The folder of a run of one step by two processes."""
    folder = tmp_path_factory.mktemp("one_step")
    run = Launched(2, recipe(models, folder, num_steps=1))
    assert run.end() == 0, run.text
    return folder


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    """The folder of a whole run of two processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Launched(2, recipe(models, folder))
    assert run.end() == 0, run.text
    return folder


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def grads_of(count, data, models, saved, folder):
    """What `multihost_worker` finds over `count` processes."""
    np.savez(folder / "batch.npz", **saved)
    env = FLAGS | {"OMNIOPD_COORDINATOR": f"127.0.0.1:{free_port()}", "OMNIOPD_NUM_PROCESSES": str(count)}
    command = [
        tiny.PYTHON,
        "tests/support/multihost_worker.py",
        models[0],
        folder / "batch.npz",
        folder / "out.npz",
        str(data),
    ]
    workers = [
        subprocess.Popen(command, cwd=tiny.REPO, env=tiny.environment(**env, OMNIOPD_PROCESS_ID=str(r)))
        for r in range(count)
    ]
    assert [w.wait(timeout=PATIENCE) for w in workers] == [0] * count
    with np.load(folder / "out.npz") as file:
        return dict(file)


def saved_batch():
    """A rollout of eight rows and its audits."""
    rng = np.random.default_rng(0)
    B, P, T, C, N = 8, 12, 24, 5, 3
    vocab_size = len(tiny.tokenizer())
    prompt_B, length_B = rng.integers(4, P + 1, B), rng.integers(12, T + 1, B)
    token_BL = np.zeros((B, P + T), np.int32)
    for b in range(B):
        token_BL[b, : prompt_B[b] + length_B[b]] = rng.integers(1, vocab_size, prompt_B[b] + length_B[b])
    peak_BM = np.stack([[0, C + 1]] * B)
    n_BM = rng.integers(0, N + 1, (B, 2))
    k_sem_BM = n_BM * rng.random((B, 2))
    entropy_BT = rng.random((B, T)).astype(np.float32)
    arrays = (token_BL, prompt_B, length_B, peak_BM, k_sem_BM, n_BM)
    kinds = (np.int32, np.int32, np.int32, np.int32, np.float32, np.int32)
    out = {k: a.astype(t) for k, a, t in zip(multihost_worker.FIELDS, arrays, kinds)}
    return out | {"logp_BT": -entropy_BT, "entropy_BT": entropy_BT}


def check_grads(count, data, models, folder):
    saved = saved_batch()
    with pytest.MonkeyPatch.context() as patch:
        real = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda sizes: real({"data": 1, "fsdp": 1, "tp": 1}, jax.devices()[:1]))
        one = multihost_worker.loss_and_grads(models[0], saved, 1)
    many = grads_of(count, data, models, saved, folder)
    assert one.keys() == many.keys() and len(one) > 10
    for name, value in one.items():
        assert np.abs(value).max() > 0, name
        assert np.abs(many[name] - value).max() <= 1e-5 * np.abs(value).max(), name


@pytest.mark.slow  # its quick part: the first batch below, and tests/test_step.py over eight devices
def test_two_processes_find_the_loss_and_gradients_of_one(models, tmp_path):
    check_grads(2, 1, models, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("data", [1, 2, 4])
def test_four_processes_find_the_loss_and_gradients_of_one(models, tmp_path, data):
    check_grads(4, data, models, tmp_path)


def first_batch(count_folder, models, folder, runner):
    one = runner.begin(folder, recipe(models, folder, num_steps=1), env=FLAGS).wait(PATIENCE)
    assert one.code == 0, one.err
    assert audits(folder, 0) == audits(count_folder, 0) and len(audits(folder, 0)) > 8
    ours, theirs = without_time(folder)[0], without_time(count_folder)[0]
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert theirs[key] == pytest.approx(value, rel=2e-5, abs=2e-6), key
    assert ours["teacher/calls"] > 0


def test_the_first_batch_is_that_of_one_process(models, one_step, tmp_path, runner):
    first_batch(one_step, models, tmp_path, runner)


@pytest.mark.slow
def test_packed_rows_of_two_processes_give_the_first_batch_of_one_unpacked(models, tmp_path):
    run = Launched(2, recipe(models, tmp_path / "two", num_steps=1, **{"packing.length": 384}))
    assert run.end() == 0, run.text
    one = tiny.start(tiny.arguments(recipe(models, tmp_path / "one", num_steps=1)))
    assert one.wait(timeout=PATIENCE) == 0, one.stderr.read()
    assert audits(tmp_path / "two", 0) == audits(tmp_path / "one", 0)
    packed, plain = (tiny.lines(tmp_path / name / "metrics.jsonl")[0] for name in ("two", "one"))
    assert packed["perf/padding_fraction"] <= plain["perf/padding_fraction"]  # equal where all rows are nearly as long
    for key in ("loss", "grad_norm", "entropy", "audit/pi_hat_mean", "audit/pi_bar_mean", "audit/entropy_at_peak"):
        assert packed[key] == pytest.approx(plain[key], rel=2e-5), key


def test_each_process_writes_its_own_audits_and_process_0_the_rest(one_step):
    files = {f.name for f in one_step.iterdir()}
    assert {"audits.jsonl", "audits-1.jsonl", "metrics.jsonl", "summary.json"} <= files
    assert [r["step"] for r in tiny.lines(one_step / "metrics.jsonl")] == [0]
    mine, others = (tiny.lines(one_step / f"audits{i}.jsonl") for i in ("", "-1"))
    assert not {r["sample_id"] for r in mine} & {r["sample_id"] for r in others}


def killed_and_resumed(rank, count, models, folder, undisturbed):
    run = Launched(count, recipe(models, folder))
    run.wait_for(r"step 2/")
    start = time.monotonic()
    os.kill(run.pid(rank), signal.SIGKILL)
    assert run.end(30) == 128 + 9, run.text
    assert time.monotonic() - start < 30
    assert f"process {rank} (pid {run.pid(rank)}) is dead: signal 9" in run.text
    for r in range(count):
        with pytest.raises(ProcessLookupError):
            os.kill(run.pid(r), 0)
    again = Launched(count, recipe(models, folder))
    assert again.end() == 0, again.text
    assert re.search(r"resumed from step [1-6]", again.text)
    same_run(folder, undisturbed)


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_run_resumes_bit_identical(models, undisturbed, tmp_path):
    killed_and_resumed(1, 2, models, tmp_path, undisturbed)


@pytest.mark.slow
def test_process_0_killed(models, undisturbed, tmp_path):
    killed_and_resumed(0, 2, models, tmp_path, undisturbed)


@pytest.mark.slow
def test_two_runs_of_four_processes_are_bit_identical_and_survive_a_kill(models, tmp_path, runner):
    runs = [Launched(4, recipe(models, tmp_path / "a"))]
    assert runs[0].end() == 0, runs[0].text
    runs.append(Launched(4, recipe(models, tmp_path / "b")))
    assert runs[1].end() == 0, runs[1].text
    same_run(tmp_path / "a", tmp_path / "b")
    first_batch(tmp_path / "a", models, tmp_path / "one", runner)
    killed_and_resumed(0, 4, models, tmp_path / "killed", tmp_path / "a")


@pytest.mark.slow
def test_the_whole_tiny_run_learns_over_two_processes_as_in_one(tmp_path):
    """configs/tiny.py as it is: the same first batch, and an accuracy that differs by less than three standard
    errors."""
    values = {"audit.log_per_step": 10_000, "log.tensorboard": False}
    one = tiny.start(tiny.arguments(values | {"run_dir": tmp_path / "one"}), **FLAGS)
    assert one.communicate(timeout=PATIENCE)[0] and one.returncode == 0
    two = Launched(2, values | {"run_dir": tmp_path / "two"})
    assert two.end() == 0, two.text
    assert audits(tmp_path / "one", 0) == audits(tmp_path / "two", 0) and len(audits(tmp_path / "one", 0)) > 100
    a, b = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    print(a["accuracy_before"], a["accuracy_after"], b["accuracy_after"])
    assert a["accuracy_before"] == pytest.approx(b["accuracy_before"], abs=0.01)
    n, p = tiny_recipe.get_config().eval.num_prompts, (a["accuracy_after"] + b["accuracy_after"]) / 2
    assert abs(a["accuracy_after"] - b["accuracy_after"]) < 3 * (2 * p * (1 - p) / n) ** 0.5
    assert b["accuracy_after"] > b["accuracy_before"] + 0.1


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(models, undisturbed, tmp_path):
    run = Launched(2, recipe(models, tmp_path))
    run.wait_for(r"step 1/")
    os.kill(run.pid(1), signal.SIGTERM)
    assert run.end() == 75, run.text
    assert "stopped by SIGTERM" in run.text
    again = Launched(2, recipe(models, tmp_path))
    assert again.end() == 0, again.text
    same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_hung_process_is_found_by_its_heartbeat(models, tmp_path):
    run = Launched(2, recipe(models, tmp_path, num_steps=200, **{"distributed.heartbeat_s": 10}))
    run.wait_for(r"step 1/")
    start = time.monotonic()
    os.kill(run.pid(1), signal.SIGSTOP)
    code = run.end(60)
    assert code not in (0, 75) and time.monotonic() - start < 45, run.text
    assert "stopped sending heartbeats" in run.text


@pytest.mark.slow
def test_another_number_of_processes_goes_on_from_the_checkpoint(models, undisturbed, tmp_path):
    stopped = Launched(4, recipe(models, tmp_path, num_steps=3))
    assert stopped.end() == 0, stopped.text
    again = Launched(2, recipe(models, tmp_path))
    assert again.end() == 0, again.text
    assert "resumed from step 3" in again.text
    assert [r["step"] for r in tiny.lines(tmp_path / "metrics.jsonl")] == list(range(STEPS))


@pytest.mark.slow
def test_what_two_processes_sampled_ahead_is_taken_up_by_one(models, tmp_path):
    """max_staleness = 1: the step that was begun is finished with the samples that were drawn, none drawn again."""
    stale = recipe(models, tmp_path, max_staleness=1)
    run = Launched(2, stale)
    run.wait_for(r"step 1/")
    os.kill(run.pid(1), signal.SIGTERM)
    assert run.end() == 75, run.text
    step = max(int(f.name) for f in (tmp_path / "checkpoints").iterdir() if f.name.isdigit())
    lengths = [np.load(tmp_path / "ahead" / f"{step}.{rank}.npz")["length_B"] for rank in (0, 1)]
    again = Launched(1, stale)
    assert again.end() == 0, again.text
    assert f"resumed from step {step}" in again.text and "sampled anew" not in again.text
    metrics = tiny.lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in metrics] == list(range(STEPS))
    assert metrics[step]["completions/mean_length"] == pytest.approx(np.concatenate(lengths).mean())


@pytest.mark.slow
def test_a_wrong_setting_of_one_process_ends_all_with_its_message(models, tmp_path):
    """Here all have it: prompts that do not divide over the processes."""
    run = Launched(2, recipe(models, tmp_path, prompts_per_step=3))
    assert run.end() == 2, run.text
    assert "prompts_per_step = 3" in run.text


# --- the pieces, in one process
# -----------------------------------------------------------------------------------------


def test_the_environment_says_how_to_start():
    full = {"OMNIOPD_COORDINATOR": "10.0.0.1:80", "OMNIOPD_NUM_PROCESSES": "4", "OMNIOPD_PROCESS_ID": "3"}
    assert processes.explicit({}) is None
    assert processes.explicit(full) == {"coordinator_address": "10.0.0.1:80", "num_processes": 4, "process_id": 3}
    for key, value in (("OMNIOPD_PROCESS_ID", "4"), ("OMNIOPD_COORDINATOR", "host"), ("OMNIOPD_NUM_PROCESSES", "")):
        with pytest.raises(UserError, match="set all three"):
            processes.explicit(full | {key: value})
    assert not processes.several({})
    assert not processes.several({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    assert processes.several({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"})
    assert not processes.several({"TPU_WORKER_HOSTNAMES": "localhost"})
    assert processes.several({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert processes.several({"OMNIOPD_DISTRIBUTED": "1"})


def test_one_process_agrees_with_itself(tmp_path):
    assert processes.gather("a", {"x": 1}) == [{"x": 1}]
    assert processes.any_of("b", None) is None and processes.any_of("b", "SIGTERM") == "SIGTERM"
    assert processes.first("c", 3) == 3 and processes.raise_on_all("d", lambda: 4) == 4
    assert processes.disks(tmp_path) == [0]


def test_teachers_counts_of_several_hosts_become_one():
    parts = [
        {"teacher/calls": 3, "teacher/latency_p50": 1.0, "teacher/latency_p95": 4.0, "teacher/cost_usd_total": 2.0},
        {"teacher/calls": 5, "teacher/latency_p50": 3.0, "teacher/latency_p95": 3.0, "teacher/cost_usd_total": 2.5},
    ]
    known = [part | {"teacher/price_known": 1} for part in parts]
    assert logging.total(known, [0, 0])["teacher/price_known"] == 1
    got = logging.total(parts, [0, 0])
    assert got == {
        "teacher/calls": 8, "teacher/latency_p50": 2.0, "teacher/latency_p95": 4.0, "teacher/cost_usd_total": 2.0,
    }  # fmt: skip
    assert logging.total(parts, [0, 1])["teacher/cost_usd_total"] == 4.5


def test_what_hosts_have_spent_counts_each_disks_journal_once(monkeypatch):
    """The end table of a pod: process 0's journal is not all that was paid."""
    spent = [Spent(3, 30, 0.5, 20, 10), Spent(3, 30, 0.5, 20, 10), Spent(2, 9, 0.25, 5, 4)]
    teacher = types.SimpleNamespace(spent=lambda: spent[0], price=types.SimpleNamespace(known=True))
    monkeypatch.setattr(processes, "gather", lambda name, value: [list(dataclasses.astuple(s)) for s in spent])
    got = reporting.spent_by_all(types.SimpleNamespace(teacher=teacher, disks=[0, 0, 2]))
    assert got == Spent(5, 39, 0.75, 25, 14) and reporting.cost(teacher, got.usd) == "$0.75"
    monkeypatch.setattr(processes, "gather", lambda name, value: [value] * 3)
    nobody = types.SimpleNamespace(teacher=types.SimpleNamespace(spent=lambda: None), disks=[0, 0, 2])
    assert reporting.spent_by_all(nobody) is None


def test_a_tree_of_processes_waits_and_says_for_whom(monkeypatch, capsys):
    class Client:
        tries = 0

        def blocking_key_value_get_bytes(self, key, ms):
            self.tries += 1
            raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")

        def key_value_try_get_bytes(self, key):
            if key != "k/2":
                raise RuntimeError("NOT_FOUND")
            return b"there"

    monkeypatch.setattr(processes, "_settings", {"barrier_s": 10.0, "limit_s": 30.0})
    with pytest.raises(TimeoutError, match=r"waited 30 s at 'shapes' for process\(es\) 1, 3: distributed.limit_s"):
        processes._get(Client(), "k/1", "shapes", range(1, 4), lambda r: f"k/{r}")
    assert capsys.readouterr().err.count("waited") == 2


def test_dry_run_prints_a_command_a_process():
    done = subprocess.run(
        [LAUNCH, "2", "--dry-run", "--config=configs/tiny.py"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    for rank, line in enumerate(done.stdout.splitlines()):
        assert f"OMNIOPD_PROCESS_ID={rank}" in line and "omniopd_jax.main --config=configs/tiny.py" in line
    assert json.dumps(done.stderr) == '""'
