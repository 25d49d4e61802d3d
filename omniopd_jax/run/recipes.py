"""Recipes: where `--config=PATH` is found, and what a recipe may import while it is loaded.

An existing path wins. Otherwise `configs/NAME.py` or `NAME.py` is the recipe of that name that comes with the package:
in an installed package they are the folder `omniopd_jax/recipes`, in a checkout `configs/`.
"""

import contextlib
import os
import pathlib
import sys
import types

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = "configs"


def shipped() -> pathlib.Path:
    """The folder of the recipes that come with the package."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / CONFIGS


def names() -> list[str]:
    """The names of the shipped recipes, for messages: configs/tiny.py ..."""
    return sorted(f"{CONFIGS}/{path.name}" for path in shipped().glob("*.py"))


def find(path: str) -> str:
    """The file that `path` means: itself where it exists, else the shipped recipe of that name, else `path`."""
    if os.path.exists(path):
        return path
    parent, name = os.path.split(path)
    packaged = shipped() / name
    return str(packaged) if parent in ("", CONFIGS) and packaged.is_file() else path


@contextlib.contextmanager
def importable(path: str):
    """While a recipe is loaded: `import helper` finds files beside it, `from configs import math` the recipes.

    The recipe's folder is searched after the standard library (a recipe may be called `math`) and before installed
    packages. The name `configs` stands for that folder, ./configs and the shipped recipes, in this order, whatever else
    has this name. Modules imported from the recipe's folder are removed again, so that the next recipe reads its own.
    """
    folder = str(pathlib.Path(path).resolve().parent)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == CONFIGS}
    known = set(sys.modules)
    package = types.ModuleType(CONFIGS)
    package.__path__ = [folder, os.path.abspath(CONFIGS), str(shipped())]
    sys.modules[CONFIGS] = package
    sys.path.insert(_behind_the_standard_library(), folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - known:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if name.split(".")[0] == CONFIGS or os.path.dirname(file) == folder:
                del sys.modules[name]
        sys.modules.update(hidden)


def _behind_the_standard_library() -> int:
    ends = ("site-packages", "dist-packages")
    return next((i for i, entry in enumerate(sys.path) if entry.endswith(ends)), len(sys.path))
