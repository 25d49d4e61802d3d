"""What the side-by-side benchmarks share: alternating timings, the machine's matrix rate, result lines and the page's
table."""

import json
import pathlib
import statistics
import time

RESULTS = pathlib.Path("docs/results")


def alternate(sides: dict, rounds: int) -> dict:
    """Runs every side once a round, A B A B, so that a slow minute of the machine meets all of them.

    Args:
      sides: name -> function without arguments that returns when its work is done.

    Returns:
      name -> {"wall": [seconds a round], "cpu": [CPU seconds of this process a round]}.
    """
    times = {name: {"wall": [], "cpu": []} for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            wall, cpu = timed(run)
            times[name]["wall"].append(round(wall, 4))
            times[name]["cpu"].append(round(cpu, 4))
    return times


def timed(run, *args) -> tuple[float, float]:
    """(wall seconds, CPU seconds of the whole process) of `run(*args)`, which returns when its work is done."""
    cpu, wall = time.process_time(), time.perf_counter()
    run(*args)
    return time.perf_counter() - wall, time.process_time() - cpu


def matrix_rate(size: int = 2048, tries: int = 5) -> float:
    """float32 operations a second of the best of a few square products: what is called the machine's matrix rate."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.dot)
    a = jnp.ones((size, size))
    jax.block_until_ready(product(a, a))
    return 2 * size**3 / min(timed(lambda: jax.block_until_ready(product(a, a)))[0] for _ in range(tries))


def median(values) -> float:
    """Of the rounds."""
    return statistics.median(values)


def read(name: str) -> list[dict]:
    """The result lines of a benchmark; none where it has not run."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(name: str, line: dict) -> None:
    """Adds a result line and prints it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def table(head: list[str], rows: list) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def write_page(name: str, text: str, module: str = "") -> None:
    """Puts `text` between the table's marks of docs/results/NAME.md, whose prose is written by hand, and prints it.
    `module`: of benchmarks/, where its name is not the page's."""
    page = RESULTS / f"{name}.md"
    begin, end = f"<!-- table: python -m benchmarks.{module or name} --table -->", "<!-- end of table -->"
    old = page.read_text() if page.exists() else f"# {name}\n\n{begin}\n{end}\n"
    page.write_text(old[: old.index(begin)] + f"{begin}\n\n{text}\n\n" + old[old.index(end, old.index(begin)) :])
    print(text)
