"""The scripts under launch/: clean by shellcheck, right by their dry runs, and a run that asks for it is started
again."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from configs import math as math_recipe

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
    options = ["--spot", "--mount", "10.0.0.2:/share", "--env", "KEY", "--dry-run"]
    lines = dry("tpu_pod.sh", "all", *POD, *options, "--", *MAIN, KEY="secret")
    assert all("secret" not in word for line in lines for word in line), "a key must not be printed"
    gcloud = [line for line in lines if line[0] == "gcloud"]
    assert [line[3:5] for line in gcloud] == [
        ["queued-resources", "create"], ["queued-resources", "describe"], ["tpu-vm", "scp"], ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"], ["tpu-vm", "scp"], ["tpu-vm", "ssh"], ["tpu-vm", "ssh"], ["tpu-vm", "ssh"],
        ["queued-resources", "delete"],
    ]  # fmt: skip
    assert "--spot" in gcloud[0] and "v5litepod-16" in gcloud[0]
    assert all("us-west4-a" in line for line in gcloud)
    assert all("--worker=all" in line for line in gcloud if line[3] == "tpu-vm")
    assert "mount -t nfs 10.0.0.2:/share /mnt/omniopd" in gcloud[4][-1] and "tpu_vm.sh --setup" in gcloud[4][-1]
    assert gcloud[8][-1] == "pod-logs/pod" and gcloud[8][-2] == "--output-directory"
    remote = gcloud[6][-1]  # what every host's shell will see: nohup setsid bash -c INNER >> job.log
    inner = shlex.split(remote)[shlex.split(remote).index("-c") + 1]
    assert shlex.split(inner.split("; echo")[0].split(".job.env; ")[-1]) == [
        "launch/tpu_vm.sh", "--pod", "--cache", "/mnt/omniopd/xla", "--", *MAIN,
    ]  # fmt: skip


GCLOUD = r"""#!/usr/bin/env bash
# Two hosts as folders, one state. POD: where; a file `preempt` there takes the slice away while its job is being followed.
echo "$*" >> "$POD/calls"
case "$3 $4" in
  "queued-resources create") rm -rf "$POD"/home-*; mkdir "$POD/home-0" "$POD/home-1"; echo ACTIVE > "$POD/state" ;;
  "queued-resources describe")
    if [[ -s "$POD/silent" ]]; then sed -i 1d "$POD/silent"; echo "ERROR: the service is unavailable" >&2; exit 1; fi
    cat "$POD/state" 2> /dev/null || { echo "ERROR: NOT_FOUND: Resource 'x' was not found" >&2; exit 1; }
    ;;
  "queued-resources delete") if [[ -e "$POD/stays" ]]; then exit 1; fi; rm -f "$POD/state" ;;
  "tpu-vm scp") for w in 0 1; do cp "$5" "$POD/home-$w/${6#*:}"; done ;;
  "tpu-vm ssh")
    while (($# > 0)); do
      if [[ "$1" == --command ]]; then command="$2"; fi
      if [[ "$1" == --output-directory ]]; then into="$2"; fi
      shift
    done
    if [[ "$command" == *job.code\ \]* && -f "$POD/broken" ]]; then
      rm "$POD/broken"; printf '\n\n' > "$POD/silent"; exit 255
    fi
    if [[ "$command" == *job.code\ \]* && -f "$POD/preempt" ]]; then
      rm "$POD/preempt"; echo SUSPENDED > "$POD/state"; exit 255
    fi
    code=0
    for w in 0 1; do
      cd "$POD/home-$w"
      out=/dev/stdout
      if [[ -n "${into:-}" ]]; then out="$OLDPWD/$into/$w.log"; fi
      env -u KEY WORKER="$w" bash -c "$command" > "$out" || code=$?
      cd - > /dev/null
      if [[ "$command" == *tar\ -x* ]]; then cp "$POD/tpu_vm.sh" "$POD/home-$w/omniopd_jax/launch/"; fi
    done
    exit "$code"
    ;;
esac
"""
HOST = """#!/usr/bin/env bash
if [[ "$1" == --setup ]]; then exit 0; fi
echo "host $WORKER, key $KEY: $*"
code="$(cat "$POD/code-$WORKER" 2> /dev/null || echo 0)"
if [[ "$code" == 75 ]]; then rm "$POD/code-$WORKER"; fi
exit "$code"
"""


@pytest.fixture
def pod(tmp_path):
    """pod(action, ...) runs tpu_pod.sh with a stand-in for gcloud, whose hosts run a stand-in for tpu_vm.sh."""
    for name, text in {"bin/gcloud": GCLOUD, "bin/sleep": "#!/bin/sh\nexec /bin/sleep 0.4", "tpu_vm.sh": HOST}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    name = f"test-{tmp_path.name}"
    more = {"POD": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "KEY": "a secret"}

    def act(action, *args, **env):
        return run("launch/tpu_pod.sh", action, "--name", name, "--zone", "z", "--env", "KEY", *args, **more | env)

    yield tmp_path, act
    shutil.rmtree(REPO / "pod-logs" / name, ignore_errors=True)
    pathlib.Path(f"/tmp/{name}.tar.gz").unlink(missing_ok=True)


def test_a_pod_job_runs_on_every_host_and_its_output_and_code_come_back(pod):
    folder, act = pod
    done = act("all", "--", *MAIN)
    assert done.returncode == 0, done.stderr + done.stdout
    for w in (0, 1):
        said = f"host {w}, key a secret: --pod -- {' '.join(MAIN)}"
        assert said in done.stdout and said in (REPO / "pod-logs" / f"test-{folder.name}" / f"{w}.log").read_text()
        assert not (folder / f"home-{w}" / "omniopd_jax" / ".job.env").exists(), "the keys stay on no disk"
    calls = (folder / "calls").read_text()
    assert "a secret" not in calls and not (folder / "state").exists(), "the slice is given back"
    assert calls.count("queued-resources create") == calls.count("queued-resources delete") == 1
    (folder / "code-1").write_text("2")
    assert act("all", "--", *MAIN).returncode == 2 and not (folder / "state").exists()


def test_a_slice_that_was_taken_away_is_asked_for_again(pod):
    folder, act = pod
    (folder / "preempt").touch()
    done = act("all", "--spot", "--", *MAIN)
    assert done.returncode == 0, done.stderr
    assert "was taken away; asking for it again (1 of 20)" in done.stderr
    calls = (folder / "calls").read_text()
    assert calls.count("queued-resources create") == 2 and not (folder / "state").exists()
    (folder / "preempt").touch()
    assert act("all", "--", *MAIN).returncode == 255, "not spot: it ends"
    assert not (folder / "state").exists()


def test_a_job_that_a_notice_ended_is_started_again_on_the_slice_that_is_still_there(pod):
    folder, act = pod
    (folder / "code-0").write_text("75")
    done = act("all", "--spot", "--", *MAIN)
    assert done.returncode == 0 and "is still there; starting the job again (1 of 20)" in done.stderr, done.stderr
    assert (folder / "calls").read_text().count("queued-resources create") == 1


def test_a_service_that_does_not_answer_is_not_a_slice_that_is_gone(pod):
    """While it is asked for, and after a connection has broken; a slice that can't be given back is told."""
    folder, act = pod
    (folder / "bin" / "gcloud").write_text(GCLOUD.replace("; echo ACTIVE", "; echo > $POD/silent; echo ACTIVE"))
    (folder / "broken").touch()
    done = act("all", "--", *MAIN)
    assert done.returncode == 0 and "is UNKNOWN" in done.stdout, done.stderr + done.stdout
    calls = (folder / "calls").read_text()
    assert calls.count("queued-resources create") == calls.count("queued-resources delete") == 1
    (folder / "stays").touch()
    done = act("all", "--", *MAIN)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "could not be deleted and may still cost money" in done.stderr


def test_a_slice_that_does_not_come_up_runs_nothing(pod):
    folder, act = pod
    (folder / "bin" / "gcloud").write_text(GCLOUD.replace("echo ACTIVE", "echo FAILED"))
    done = act("all", "--", *MAIN)
    assert done.returncode == 1 and "is FAILED" in done.stdout
    assert "launch/tpu_vm.sh" not in (folder / "calls").read_text() and not (folder / "state").exists()


def test_the_teacher_of_the_thinking_recipe_holds_its_longest_row():
    c = math_recipe.get_config("thinking")
    (told,) = re.findall(r"--max-len (\d+)", math_recipe.__doc__)
    assert int(told) >= c.max_prompt_length + c.max_completion_length + c.audit.chunk_tokens
    assert f"needs {told}" in (REPO / "launch/teacher_vllm.sh").read_text()


@pytest.mark.parametrize("args", [["--cpu", "--tp", "2"], ["--python", "x"]])
def test_a_teachers_server_takes_no_setting_that_it_does_not_use(args):
    done = run("launch/teacher_vllm.sh", *args, "--dry-run")
    assert done.returncode == 2 and done.stderr.startswith("teacher_vllm.sh: --")


def test_tpu_pod_with_a_bucket_and_a_project():
    (line,) = dry("tpu_pod.sh", "setup", *POD, "--project", "p", "--mount", "gs://bucket", "--dry-run")
    assert "gcsfuse --implicit-dirs" in line[-1] and "bucket /mnt/omniopd" in line[-1] and "p" in line
    done = run("launch/tpu_pod.sh", "create", "--name", "x")
    assert done.returncode == 2 and "--zone" in done.stderr


@pytest.mark.parametrize("action", ["all", "run"])
def test_a_key_that_is_not_there_is_noticed_before_anything_is_asked_for(pod, action):
    """Beside one that is: nothing of it is left in a file."""
    folder, act = pod
    (folder / "tmp").mkdir()
    for name, said in {"NOSUCH": "export NOSUCH=", "KEY=secret": "the name of a variable"}.items():
        done = act(action, "--env", name, "--", *MAIN, TMPDIR=str(folder / "tmp"))
        assert done.returncode == 2 and not done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"tpu_pod.sh: --env {name}: ") and said in line
    assert not (folder / "calls").exists() and not list((folder / "tmp").iterdir())
    assert act("logs", "--env", "NOSUCH", "--dry-run").returncode == 0, "which passes no key on"


@pytest.mark.parametrize(("script", "before"), [("tpu_pod.sh", ["all", *POD]), ("tpu_vm.sh", []), ("gpu_node.sh", [])])
def test_tries_are_a_whole_number(script, before):
    for value in ("x", "-1", "2.5", "010", ""):
        done = run(f"launch/{script}", *before, "--tries", value, "--dry-run", "--", *MAIN)
        assert (
            done.returncode == 2 and done.stderr == f"{script}: --tries {value}: a whole number is needed, 0 or more\n"
        )
    assert run(f"launch/{script}", *before, "--tries", "0", "--dry-run", "--", *MAIN).returncode == 0


def test_gpu_node_alone_and_under_slurm():
    (command,) = dry("gpu_node.sh", "--dry-run", "--", *MAIN, SLURM_JOB_ID="")
    assert command[0] == "env" and "JAX_PLATFORMS=cuda" in command and command[-2:] == MAIN
    step, again = dry("gpu_node.sh", "--dry-run", "--", *MAIN, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(REPO))
    assert step[0] == "srun" and again == ["scontrol", "requeue", "7"]


def again(folder, tries, codes, **kwargs):
    """`run_again` over a command that ends with one code of `codes` after the other: (exit code, how often it ran)."""
    command = folder / "command"
    command.write_text(
        f"echo x >> {folder}/ran; n=$(wc -l < {folder}/ran); codes=({' '.join(map(str, codes))}); exit "
        f"${{codes[n - 1]}}"
    )
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source launch/lib.sh; run_again {tries} bash {command}"],
        cwd=REPO,
        timeout=60,
    )
    return done.returncode, (folder / "ran").read_text().count("x")


@pytest.mark.parametrize(
    "tries, codes, want",
    [(3, [75, 75, 0], (0, 3)), (3, [75, 2], (2, 2)), (1, [75, 75, 0], (75, 2)), (3, [0], (0, 1)), (3, [1], (1, 1))],
)
def test_a_run_that_asks_for_it_is_started_again(tmp_path, tries, codes, want):
    assert again(tmp_path, tries, codes) == want


@pytest.mark.parametrize("early", [False, True])  # early: the command is up, the script does not know its number yet
def test_a_signal_to_the_script_reaches_the_run_which_saves_and_is_not_started_again(tmp_path, early):
    command = tmp_path / "command"
    command.write_text(
        f"trap 'sleep 0.5; echo saved >> {tmp_path}/log; exit 75' TERM; echo up >> {tmp_path}/log; while :; do sleep "
        "0.05; done"
    )
    up = f"until [[ -e {tmp_path}/log ]]; do :; done"
    before = f"""set -T; trap 'if [[ "$BASH_COMMAND" == "child=\\$!" ]]; then {up}; kill -TERM $$; fi' DEBUG"""
    text = f"source launch/lib.sh; {before if early else ':'}; run_again 5 bash {command}"
    script = subprocess.Popen(["bash", "-euo", "pipefail", "-c", text], cwd=REPO)
    while not (tmp_path / "log").exists():
        time.sleep(0.02)
    if not early:
        script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 75
    assert (tmp_path / "log").read_text().split() == ["up", "saved"]
