"""The README is short, in order, and names what exists."""

import pathlib
import re

from omniopd_jax import config

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_has_at_most_8_kb():
    assert len(README.encode()) <= 8_000


def test_its_sections_are_in_order():
    assert re.findall(r"^## (.*)$", README, re.M) == [
        "Three commands", "Status: what has run where, and what has not", "Install", "The first real run, and its cost",
        "The honest result", "Compared with", "Files", "Licence and citation",
    ]  # fmt: skip


def test_its_figures_are_those_of_the_results():
    pages = ("small_world", "equal_cost", "real_model")
    page = "".join((ROOT / f"docs/results/{name}.md").read_text() for name in pages)
    honest = README.split("## The honest result")[1].split("\n## ")[0]
    figures = set(re.findall(r"\b\d\d\.\d\b", honest))
    assert {"62.5", "60.7", "72.3", "73.9", "18.4", "73.0"} <= figures
    for figure in figures:
        assert figure in page, figure


def test_every_key_has_a_comment():
    assert {key for key, _, _ in config.describe()} == set(config.flat(config.default()))


def test_modules_files_and_targets_that_it_names_exist():
    for module in re.findall(r"python -m (omniopd_jax\.\w+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w[\w-]*)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
    block = README.split("## Files")[1].split("```")[1]
    assert len(block.strip().splitlines()) <= 15
    for path in re.findall(r"[\w/]+\.py\b|[\w/]+/(?=[\s,])", block):
        assert (ROOT / path).exists() or (ROOT / "omniopd_jax" / path).exists(), path
