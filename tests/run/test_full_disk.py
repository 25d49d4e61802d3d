"""A disk that is really full, as a small tmpfs (which root alone can mount): one line, and on after room was made."""

import os
import subprocess

import pytest
import tiny


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 14 MB; resize("60m") makes room."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no mount as user {os.getuid()}")
    yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_after_room_was_made(small_disk):
    folder, resize = small_disk
    values = {
        "run_dir": str(folder / "run"),
        "eval.num_prompts": 0,
        "prompts_per_step": 16,
        "checkpoint.every": 1,
        "num_steps": 4,
        "log.tensorboard": False,
    }
    args = [tiny.PYTHON, "-m", "omniopd_jax.main", *tiny.arguments(values)]
    full = subprocess.run(
        args, capture_output=True, text=True, cwd=tiny.REPO, env=tiny.environment(), timeout=300, check=False
    )
    assert full.returncode == 2
    assert len(full.stderr.splitlines()) == 1 and "the disk is full" in full.stderr, full.stderr[-2000:]
    resize("60m")
    rest = subprocess.run(
        args, capture_output=True, text=True, cwd=tiny.REPO, env=tiny.environment(), timeout=300, check=False
    )
    assert rest.returncode == 0, rest.stderr[-2000:]
    assert [r["step"] for r in tiny.lines(folder / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
