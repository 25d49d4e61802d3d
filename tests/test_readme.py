"""The README keeps true: its table of keys is the config's, its recipes and commands exist."""

import pathlib
import re

from omniopd_jax import config

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_of_keys_is_the_configs():
    assert config.markdown() in README, "run python -m omniopd_jax.config"


def test_every_key_has_a_comment():
    assert {key for key, _, _ in config.describe()} == set(config.flat(config.default()))


def test_recipes_modules_and_targets_that_it_names_exist():
    assert (recipes := set(re.findall(r"configs/\w+\.py", README)))
    for path in recipes | set(re.findall(r"\]\((docs/[\w/]+\.md)\)", README)):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"python -m (omniopd_jax\.\w+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w[\w-]*)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_no_file_is_over_500_lines():
    long = {
        str(p.relative_to(ROOT)): n
        for p in [*ROOT.glob("omniopd_jax/**/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("benchmarks/*.py")]
        if (n := len(p.read_text().splitlines())) > 500
    }
    assert not long
