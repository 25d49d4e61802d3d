"""A fresh clone as a new user meets it: the README's first command, pip install, a recipe of one's own. It installs."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["--config.num_steps=1", "--config.eval.num_prompts=8", "--config.prompts_per_step=8"]
MINE = """
from configs import tiny
def get_config(arg=None):
    c = tiny.get_config()
    c.run_dir = "runs/mine"
    return c
"""
VERSIONS = ("3.11", "3.12", "3.13")


def interpreter(version: str) -> str | None:
    """A Python of this version that runs: from the path, where pyenv's are only names, or from pyenv's own folders."""
    own = sorted(pathlib.Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for path in filter(None, [shutil.which(f"python{version}"), *own]):
        show = [str(path), "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(show, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return str(path)
    return None


def run(command: list[str], cwd) -> str:
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "XLA_FLAGS")}
    done = subprocess.run(command, cwd=cwd, env=keep, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone") / "omniopd_jax"
    run(["git", "clone", "-q", str(ROOT), str(folder)], ROOT)
    return folder


def test_make_demo_raises_the_students_accuracy(clone):
    said = run(["make", "demo"], clone)
    before, after = (float(said.split(f"accuracy {when}")[-1].split("%")[0]) for when in ("before", "after"))
    assert after > before + 20


@pytest.mark.parametrize("version", VERSIONS)
def test_pip_install_and_one_step_from_an_empty_folder(clone, tmp_path, version):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    run([python, "-m", "venv", str(tmp_path / "venv")], tmp_path)
    run([str(tmp_path / "venv/bin/pip"), "install", "-q", "."], clone)
    empty = tmp_path / "empty"
    empty.mkdir()
    said = run([str(tmp_path / "venv/bin/omniopd"), "main", "--config=configs/tiny.py", *SMALL], empty)
    assert "accuracy after" in said and (empty / "runs/tiny/summary.json").is_file()
    (tmp_path / "mine.py").write_text(MINE)
    run([str(tmp_path / "venv/bin/python"), "-m", "omniopd_jax.main", "--config=../mine.py", *SMALL], empty)
    assert (empty / "runs/mine/metrics.jsonl").is_file()
    page = (clone / "docs/your_own.md").read_text()
    (empty / "mine.py").write_text(re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1])
    prompts = [
        {"prompt": f"Ann has {i} apples and buys {i % 7} bags of {i % 5}. How many are there?"} for i in range(2, 40)
    ]
    (empty / "prompts.jsonl").write_text("".join(f"{json.dumps(p)}\n" for p in prompts))
    trial = re.search(
        r"^python (-m omniopd_jax.main --config=mine.py --config.run_dir=runs/small (?:.*\\\n)+.*)$", page, re.M
    )[1]
    run([str(tmp_path / "venv/bin/python"), *shlex.split(trial.replace("\\\n", " "))], empty)
    assert len((empty / "runs/small/metrics.jsonl").read_text().splitlines()) == 2
    site = next((tmp_path / "venv/lib").glob("python3.*/site-packages"))
    assert not [p.name for p in site.iterdir() if p.name in ("configs", "tests", "benchmarks", "docs")], sys.version
