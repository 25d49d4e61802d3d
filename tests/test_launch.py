"""The scripts under launch/: clean by shellcheck, right by their dry runs, and a run that asks for it is started again."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted(p.name for p in (REPO / "launch").glob("*.sh") if p.name != "lib.sh")
MAIN = ["--config=configs/math.py", "--config.run_dir=/mnt/omniopd/a run"]
POD = ["--name", "pod", "--zone", "us-west4-a"]


def run(*args, **env):
    command = ["bash", *map(str, args)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, env=dict(os.environ, **env))


def dry(script, *args, **env):
    """The commands of a dry run, each as a list of words."""
    done = run(f"launch/{script}", *args, **env)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line, comments=True) for line in done.stdout.splitlines() if not line.startswith("#")]


def test_shellcheck_finds_nothing():
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert shellcheck, "shellcheck is not installed: make .venv/.full"
    done = subprocess.run(
        [shellcheck, "-x", *(f"launch/{s}" for s in [*SCRIPTS, "lib.sh"])], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_help_and_refuses_what_it_does_not_know(script):
    done = run(f"launch/{script}", "--help")
    assert done.returncode == 0 and f"launch/{script}" in done.stdout and not done.stdout.startswith("#")
    done = run(f"launch/{script}", "--no-such-thing")
    assert done.returncode == 2 and "no-such-thing" in done.stderr + done.stdout or "first argument" in done.stderr


def test_tpu_vm():
    (command,) = dry("tpu_vm.sh", "--dry-run", "--cache", "/tmp/c", "--", *MAIN)
    assert command[0] == "env" and command[-4:] == ["-m", "omniopd_jax.main", *MAIN]
    assert "JAX_PLATFORMS=tpu" in command and "JAX_COMPILATION_CACHE_DIR=/tmp/c" in command
    assert "OMNIOPD_DISTRIBUTED=1" not in command
    setup, command = dry("tpu_vm.sh", "--setup", "--pod", "--dry-run", *MAIN)
    assert "requirements-tpu.txt" in setup[-1] and "OMNIOPD_DISTRIBUTED=1" in command
    assert len(dry("tpu_vm.sh", "--setup", "--dry-run")) == 1


def test_tpu_pod_from_nothing_to_nothing():
    lines = dry(
        "tpu_pod.sh",
        "all",
        *POD,
        "--spot",
        "--mount",
        "10.0.0.2:/share",
        "--env",
        "KEY",
        "--dry-run",
        "--",
        *MAIN,
        KEY="secret",
    )
    assert all("secret" not in word for line in lines for word in line), "a key must not be printed"
    actions = [line[3:5] for line in lines if line[0] == "gcloud"]
    assert actions == [
        ["queued-resources", "create"], ["queued-resources", "describe"], ["tpu-vm", "scp"], ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"], ["tpu-vm", "ssh"], ["tpu-vm", "scp"], ["queued-resources", "delete"],
    ]  # fmt: skip
    gcloud = [line for line in lines if line[0] == "gcloud"]
    assert "--spot" in gcloud[0] and "v5litepod-16" in gcloud[0]
    assert all("us-west4-a" in line for line in gcloud)
    assert all("--worker=all" in line for line in gcloud if line[3] == "tpu-vm")
    assert "mount -t nfs 10.0.0.2:/share /mnt/omniopd" in gcloud[4][-1] and "tpu_vm.sh --setup" in gcloud[4][-1]
    remote = gcloud[5][-1]  # what every host's shell will see
    assert "launch/tpu_vm.sh --pod -- " in remote and "KEY=... " in remote
    words = shlex.split(remote.split(" 2>&1")[0])
    assert words[-2:] == MAIN


def test_tpu_pod_with_a_bucket_and_a_project():
    (line,) = dry("tpu_pod.sh", "setup", *POD, "--project", "p", "--mount", "gs://bucket", "--dry-run")
    assert "gcsfuse --implicit-dirs bucket /mnt/omniopd" in line[-1] and "p" in line
    done = run("launch/tpu_pod.sh", "create", "--name", "x")
    assert done.returncode == 2 and "--zone" in done.stderr


def test_gpu_node_alone_and_under_slurm():
    (command,) = dry("gpu_node.sh", "--dry-run", "--", *MAIN, SLURM_JOB_ID="")
    assert command[0] == "env" and "JAX_PLATFORMS=cuda" in command and command[-2:] == MAIN
    step, again = dry("gpu_node.sh", "--dry-run", "--", *MAIN, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(REPO))
    assert step[0] == "srun" and again == ["scontrol", "requeue", "7"]


def again(folder, tries, codes, **kwargs):
    """`run_again` over a command that ends with one code of `codes` after the other: (exit code, how often it ran)."""
    command = folder / "command"
    command.write_text(
        f"echo x >> {folder}/ran; n=$(wc -l < {folder}/ran); codes=({' '.join(map(str, codes))}); exit ${{codes[n - 1]}}"
    )
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source launch/lib.sh; run_again {tries} bash {command}"], cwd=REPO, timeout=60
    )
    return done.returncode, (folder / "ran").read_text().count("x")


@pytest.mark.parametrize(
    "tries, codes, want",
    [(3, [75, 75, 0], (0, 3)), (3, [75, 2], (2, 2)), (1, [75, 75, 0], (75, 2)), (3, [0], (0, 1)), (3, [1], (1, 1))],
)
def test_a_run_that_asks_for_it_is_started_again(tmp_path, tries, codes, want):
    assert again(tmp_path, tries, codes) == want


def test_a_signal_to_the_script_reaches_the_run_which_saves_and_is_not_started_again(tmp_path):
    command = tmp_path / "command"
    command.write_text(
        f"trap 'sleep 0.5; echo saved >> {tmp_path}/log; exit 75' TERM; echo up >> {tmp_path}/log; while :; do sleep 0.05; done"
    )
    script = subprocess.Popen(["bash", "-euo", "pipefail", "-c", f"source launch/lib.sh; run_again 5 bash {command}"], cwd=REPO)
    while not (tmp_path / "log").exists():
        time.sleep(0.02)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 75
    assert (tmp_path / "log").read_text().split() == ["up", "saved"]
