"""The pages keep true: links, cited sections, commands, config keys, metrics' names, letters, the recipe to copy."""

import importlib.util
import pathlib
import re

import pytest

from omniopd_jax import config
from omniopd_jax.run import estimate, recipes, validation
from omniopd_jax.teachers import by_row

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
COMMANDED = [p for p in PAGES if p.name not in ("CHANGELOG.md", "not_run.md")]
SOURCES = sorted(
    path
    for folder, end in (
        ("omniopd_jax", "py"),
        ("configs", "py"),
        ("benchmarks", "py"),
        ("tests", "py"),
        ("launch", "sh"),
    )
    for path in (ROOT / folder).rglob(f"*.{end}")
)


def name_of(path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_resolves(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{name_of(page)} links to {target}: no such heading"


def test_every_cited_section_of_the_method_exists():
    sections = set(re.findall(r"^## (\d)\.", (ROOT / "docs/method.md").read_text(), re.M))
    cited = 0
    for path in [*SOURCES, *PAGES]:
        for number in re.findall(r"method\.md,? \(?(?:section )?(\d)\b", " ".join(path.read_text().split())):
            assert number in sections, f"{name_of(path)} cites method.md, section {number}"
            cited += 1
    assert cited > 10 and sections == set("123456")


def test_pages_that_the_code_names_and_tests_that_the_pages_name_exist():
    for page in PAGES:
        for test in re.findall(r"\btests/[\w/]+\.py\b", page.read_text()):
            assert (ROOT / test).is_file(), f"{name_of(page)} names {test}"
    for path in [p for p in SOURCES if p != pathlib.Path(__file__)]:
        for page in re.findall(r"\bdocs/[\w/]+\.(?:md|png)\b", path.read_text()):
            known = (ROOT / page).is_file() or page == "docs/results/NAME.md"
            assert known, f"{name_of(path)} names {page}"


def commands(page: pathlib.Path) -> list[str]:
    """The commands of a page's bash blocks, continued lines joined, comments left out."""
    out = []
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(), re.M | re.S):
        lines = (re.sub(r"(^|\s+)#.*", "", line) for line in block.replace("\\\n", " ").splitlines())
        out += [" ".join(line.split()) for line in lines if line.strip()]
    return out


def test_every_command_is_run_by_a_test_or_listed_with_its_reason():
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", (ROOT / "docs/not_run.md").read_text(), re.M)
    listed = dict(rows)
    assert len(listed) == len(rows)
    found = {c for page in COMMANDED for c in commands(page)}
    assert found - set(listed) == set(), "add these to docs/not_run.md"
    assert set(listed) - found == set(), "docs/not_run.md lists what no page has"
    for test in re.findall(r"`(tests/[\w/]+\.py)`", " ".join(listed.values())):
        assert (ROOT / test).is_file(), test


def test_the_page_of_config_keys_is_the_configs():
    assert (ROOT / "docs/config.md").read_text() == config.markdown(), "run python -m omniopd_jax.config"


def test_keys_in_the_pages_exist():
    known = set(config.flat(config.default()))
    sections = {key.split(".")[0] for key in known if "." in key} - {"log"}
    for page in PAGES:
        for key in re.findall(r"--config\.([\w.]+)=", page.read_text()):
            assert by_row.key_of(key) in known, f"{name_of(page)}: --config.{key}"
        for key in re.findall(r"`(\w+\.\w+)(?: ?=[^`]*)?`", page.read_text()):
            if key.split(".")[0] in sections and not re.search(r"\.(md|py|jsonl?|safetensors|_\w*)$", key):
                ok = (
                    key in known
                    or key == "budget.X"
                    or any(k.startswith(f"{key}.") for k in known)
                    or hasattr_of_module(key)
                )
                assert ok, f"{name_of(page)}: {key}"


def hasattr_of_module(name: str) -> bool:
    """Whether `name` is a function or class of one of our modules (objective.weights, model.project)."""
    module, attribute = name.split(".")
    files = [*ROOT.glob(f"omniopd_jax/**/{module}.py"), *ROOT.glob(f"omniopd_jax/{module}/*.py")]
    return any(re.search(rf"^(def|class) {attribute}\b|^{attribute}\b", f.read_text(), re.M) for f in files)


def test_the_letters_of_shapes_are_those_of_the_model():
    legend = (ROOT / "omniopd_jax/model/__init__.py").read_text()
    assert re.search(r"\bN continuations\b", legend) and "| N | teacher continuations" in (
        text := (ROOT / "CONTRIBUTING.md").read_text()
    )
    letters = re.findall(r"\| ([A-Z](?:, [A-Z])*) (?=\|)", text.split("## Letters of shapes")[1].split("##")[0])
    for letter in ", ".join(letters).split(", "):
        assert re.search(rf"\b{letter} [a-z]", legend), letter


def test_each_choice_of_a_key_is_in_the_table_of_keys():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", (ROOT / "docs/config.md").read_text(), re.M))
    for key, names in validation._choices().items():
        row = rows[said[1]] if (said := re.search(r"\| as ([\w.]+)$", rows[key])) else rows[key]
        for name in filter(None, names):
            assert re.search(rf"(?<![\w-]){re.escape(str(name))}(?![\w-])", row), (key, name)


def load(path: str, variants: str | None = None):
    """The config of a recipe's file, as the command line finds and loads it."""
    path = recipes.find(path)
    with recipes.importable(path):
        spec = importlib.util.spec_from_file_location("recipe", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config(variants)


def test_the_recipe_to_copy_is_a_recipe(tmp_path, monkeypatch):
    """docs/your_own.md's own lines, as a file in an empty folder, and the README's: what --estimate prints of each."""
    source = re.search(r"^```python\n(.*?)^```", (ROOT / "docs/your_own.md").read_text(), re.M | re.S)[1]
    assert len(source.splitlines()) <= 30
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    for path, variants in (("mine.py", None), ("configs/math.py", None), ("configs/math.py", "thinking")):
        c = load(path, variants)
        c.teacher.base_url = "http://HOST:8000/v1"
        validation.validate(c)
        text = estimate.Preview(c, asks_teacher=True).text()
        assert "steps to come" in text and "tokens out" in text and "hours of the teacher" in text


def test_the_lines_that_make_the_copied_recipe_a_baseline_are_those_of_its_recipe(tmp_path, monkeypatch):
    """docs/your_own.md on comparing: what differs between configs/continuation.py or sft.py and configs/math.py."""
    source, lines = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/your_own.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    for name in ("continuation", "sft"):
        kept = [line for line in source.splitlines() if not re.match(r" *c\.(audit|objective|optimizer)\.", line)]
        at = kept.index(next(line for line in kept if "return config.apply" in line))
        kept[at:at] = lines.replace('name = "continuation"', f'name = "{name}"').splitlines()
        (tmp_path / f"{name}.py").write_text("\n".join(kept))
        c = load(f"{name}.py")
        c.teacher.base_url = "http://HOST:8000/v1"
        validation.validate(c)
        own, base = (config.flat(load(f"configs/{recipe}.py")) for recipe in (name, "math"))
        apart = [k for k in own if own[k] != base[k] and k.startswith(("objective.", "anchor.", "optimizer.learn"))]
        assert len(apart) == 4 and [config.flat(c)[k] for k in apart] == [own[k] for k in apart], name


def test_recipes_that_the_pages_name_come_with_the_package():
    for page in PAGES:
        for path in re.findall(r"configs/\w+\.py", page.read_text()):
            assert path in recipes.names() or path == "configs/NAME.py", f"{name_of(page)}: {path}"


def test_every_page_is_linked_from_the_readme_or_the_index_of_results():
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name}" in (ROOT / "README.md").read_text(), name_of(page)
    index = (ROOT / "docs/results/README.md").read_text()
    for page in ROOT.glob("docs/results/*.md"):
        assert page.name == "README.md" or f"({page.name}" in index, name_of(page)
