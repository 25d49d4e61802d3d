"""The laws of the house that import-linter's layers do not say: no circle of files, no hidden import, sizes."""

import ast
import pathlib

import grimp
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "omniopd_jax").rglob("*.py"))
# Imported inside functions: heavy or optional packages alone, so that a command starts in seconds without them.
OPTIONAL = {
    "anthropic", "datasets", "google", "httpx2", "huggingface_hub", "openai", "orbax", "pandas", "pyarrow", "rapidfuzz",
    "reasoning_gym", "rich", "safetensors", "sentence_transformers", "tensorboardX", "tensorflow", "tensorflow_text",
    "tokenizers", "trackio", "transformers", "wandb",
}  # fmt: skip
ALONE = {  # run outside the package, as programs of their own
    "omniopd_jax/graders/sandbox", "omniopd_jax/graders/math_worker.py", "omniopd_jax/graders/gym_worker.py",
}  # fmt: skip


def circles(graph) -> list[set[str]]:
    """Sets of files that import each other in a circle (Tarjan's strongly connected components)."""
    index, low, stack, out = {}, {}, [], []

    def visit(module):
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph.find_modules_directly_imported_by(module):
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            part = set(stack[stack.index(module) :])
            del stack[stack.index(module) :]
            if len(part) > 1:
                out.append(part)

    for module in sorted(graph.modules):
        if module not in index:
            visit(module)
    return out


def test_no_files_import_each_other_in_a_circle():
    assert circles(grimp.build_graph("omniopd_jax", "benchmarks")) == []


def test_a_circle_would_be_seen():
    graph = grimp.ImportGraph()
    for a, b in (("x.a", "x.b"), ("x.b", "x.c"), ("x.c", "x.a"), ("x.c", "x.d")):
        graph.add_module(a), graph.add_module(b)
        graph.add_import(importer=a, imported=b)
    assert circles(graph) == [{"x.a", "x.b", "x.c"}]


def inner_imports(path: pathlib.Path) -> set[str]:
    """The first names of what a file imports inside functions."""
    found = set()
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_imported_inside_a_function_but_optional_packages(path):
    name = str(path.relative_to(ROOT))
    if any(name.startswith(place) for place in ALONE):
        return
    # kernels of TPUs and GPUs: a second for nothing elsewhere
    pallas = {"jax"} if name in ("omniopd_jax/model/attention.py", "omniopd_jax/model/paged.py") else set()
    assert inner_imports(path) <= OPTIONAL | pallas
    assert "importlib.import_module" not in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_under_about_500_lines_and_functions_under_about_80(path):
    text = path.read_text()
    assert text.count("\n") <= 540
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 100
    ]
    assert not [f for f in long if not f.startswith("default:")], "config.default is a table of keys"
