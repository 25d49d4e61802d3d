"""Programs that try to be graded right without being right: none is, wherever the checkout is stored.

cases/forged.jsonl has one program per line, each with a mechanism of its own; where a line has no tests, the task is to
square a number. {jail}, {checkout}, {prefix}, {python} stand for the folders of the judge's files, of the checkout and
of the Python installation, and for the name of its executable.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading

import pytest

from omniopd_jax import graders
from omniopd_jax.errors import UserError
from omniopd_jax.graders import sandbox

REPO = pathlib.Path(__file__).parents[2]
FORGED = [json.loads(line) for line in (pathlib.Path(__file__).parent / "cases/forged.jsonl").open()]
SQUARE = {"asserts": "assert f(3) == 9 and f(5) == 25", "entry_point": "f"}
GRADE = """
import json, sys
from omniopd_jax import graders
limits = {"cpu_seconds": 1, "wall_seconds": 2, "memory_mb": 512}
with graders.make("code", isolation=sys.argv[2]) as unhurried:
    right = unhurried.grade("def f(x):\\n    return x * x", {"asserts": "assert f(3) == 9"})
with graders.make("code", workers=4, isolation=sys.argv[2], **limits) as grader:
    pairs = [(p["program"], p["tests"]) for p in json.load(open(sys.argv[1]))]
    print(json.dumps([str(right.reason)] + [[v.passed, v.reason, v.detail] for v in grader.grade_all(*zip(*pairs))]))
"""


# the folder $0 becomes a mount that nothing can be written to, in a namespace of the command's own
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && ! touch "$0/x" 2>/dev/null && exec "$@"'
needs_mounts = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "mount", "--bind", "/tmp", "/tmp"], capture_output=True, check=False).returncode,
    reason="no mounts of one's own here",
)


def grade_from(checkout: pathlib.Path, cases, isolation: str = "namespaces", *, read_only: bool = False) -> dict:
    """name -> (passed, reason, detail) of every case, graded by a copy of the package stored in `checkout`.

    `read_only`: on a mount that nothing can be written to; else the files have no permission for it.
    """
    shutil.copytree(
        REPO / "omniopd_jax/graders", checkout / "omniopd_jax/graders", ignore=shutil.ignore_patterns("*.pyc")
    )
    shutil.copytree(
        REPO / "omniopd_jax/world",
        checkout / "omniopd_jax/world",
        ignore=shutil.ignore_patterns("*.pyc", "checkpoints"),
    )
    for name in ("__init__.py", "errors.py"):
        shutil.copy(REPO / "omniopd_jax" / name, checkout / "omniopd_jax" / name)
    jail = checkout / "omniopd_jax/graders/sandbox"
    fill = {
        "{jail}": str(jail), "{checkout}": str(checkout), "{prefix}": sys.base_prefix,
        "{python}": f"python{sys.version_info.major}.{sys.version_info.minor}",
    }  # fmt: skip
    pairs = []
    for case in cases:
        program = case["program"]
        for key, value in fill.items():
            program = program.replace(key, value)
        pairs.append({"program": program, "tests": case.get("tests", SQUARE)})
    orders = checkout / "orders.json"
    orders.write_text(json.dumps(pairs))
    for path in [*checkout.rglob("*"), checkout]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    mounted = ["unshare", "-m", "sh", "-c", READ_ONLY, str(checkout)] if read_only else []
    done = subprocess.run(
        [*mounted, sys.executable, "-c", GRADE, str(orders), isolation], env=os.environ | {"PYTHONPATH": str(checkout)}, cwd="/",
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, *told = json.loads(done.stdout)
    assert first == "ok", first
    return {case["name"]: verdict for case, verdict in zip(cases, told, strict=True)}


@pytest.fixture
def folder():
    """Makes a folder below one that is given, and removes it at the end."""
    made = []

    def make(parent):
        made.append(pathlib.Path(tempfile.mkdtemp(prefix="checkout-", dir=parent)))
        return made[-1]

    yield make
    for path in made:
        for item in [path, *path.rglob("*")]:
            if item.is_dir():
                item.chmod(0o755)
        shutil.rmtree(path)


def test_the_list_is_long_and_each_mechanism_its_own():
    assert len({case["mechanism"] for case in FORGED}) == len({case["name"] for case in FORGED}) == len(FORGED) > 40


needs_bwrap = pytest.mark.skipif(not sandbox.bwrap(), reason="bubblewrap is not installed")
BOXES = ["namespaces", pytest.param("bubblewrap", marks=needs_bwrap)]
PLANTED = [case for case in FORGED if "plant" in case["name"]]


def forged(told):
    """The cases that were graded right."""
    return {name: v for name, v in told.items() if v[0] or v[1] == "ok"}


def test_no_grade_is_forged_from_a_temporary_folder(folder):
    assert not forged(grade_from(folder("/tmp"), FORGED))


@pytest.mark.parametrize("parent", ["/dev/shm", "/var/tmp", "~"])
def test_no_planted_module_is_imported_from_elsewhere(folder, parent):
    told = grade_from(folder(os.path.expanduser(parent)), PLANTED)
    assert len(told) > 15 and not forged(told)


@needs_bwrap
def test_no_planted_module_is_imported_by_a_judge_in_bubblewrap(folder):
    assert not forged(grade_from(folder("/tmp"), PLANTED, "bubblewrap"))


@pytest.mark.slow
@pytest.mark.parametrize("isolation", BOXES)
@pytest.mark.parametrize("parent", ["/tmp", "/dev/shm", "/var/tmp", "~", "/opt"])
def test_no_grade_is_forged_from_elsewhere(folder, parent, isolation):
    assert not forged(grade_from(folder(os.path.expanduser(parent)), FORGED, isolation))


@needs_mounts
@pytest.mark.slow
@pytest.mark.parametrize("isolation", BOXES)
@pytest.mark.parametrize("parent", ["/tmp", "~"])
def test_no_grade_is_forged_from_a_read_only_mount(folder, parent, isolation):
    assert not forged(grade_from(folder(os.path.expanduser(parent)), FORGED, isolation, read_only=True))


READY = b'{"ready": true}\n'
OK = b'{"reason": "ok", "detail": ""}\n'
ODD_ANSWERS = {
    "nothing": b"",
    "no JSON": READY + b"no JSON\n",
    "no line": READY + b'{"reason": "ok", "detail": ""}',
    "no object": READY + b"[1]\n",
    "no text": READY + b"\xff\xfe\n",
    "nested deep": READY + b"[" * 100_000 + b"\n",
    "long number": READY + b"1" * 100_000 + b"\n",
    "refusal after the start": READY + b'{"refused": "x"}\n',
    "unknown reason": READY + b'{"reason": "fine", "detail": ""}\n',
    "truth as reason": READY + b'{"reason": true, "detail": ""}\n',
    "list as detail": READY + b'{"reason": "ok", "detail": []}\n',
    "field too many": READY + b'{"reason": "ok", "detail": "", "passed": true}\n',
    "verdict without a start": OK,
    "start twice": READY + READY + OK,
    "start that is no truth": b'{"ready": 1}\n'.replace(b"1", b'"1"') + OK,
}


class Taken:
    """The sandbox's other end in the hands of a program that runs code there."""

    def __init__(self, monkeypatch, grader, act):
        self.sent = 0

        def hand_over(connection):
            line = connection.dup()
            threading.Thread(target=self.answer, args=(line, act), daemon=True).start()

        monkeypatch.setattr(grader._sandbox, "_hand_over", hand_over)

    def answer(self, line, act):
        with line:
            for data in act():
                try:
                    line.sendall(data)
                except OSError:
                    return
                self.sent += len(data)


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_an_odd_answer_is_an_error_of_that_program(monkeypatch, name):
    grader = graders.make("code", wall_seconds=1, total_seconds=1, isolation="namespaces")
    Taken(monkeypatch, grader, lambda: [ODD_ANSWERS[name]])
    for tests in (SQUARE, {"stdin": ["", ""], "stdout": ["", ""]}):
        verdict = grader.grade("", tests)
        assert not verdict.passed and verdict.reason in ("error", "timeout"), verdict


def test_an_endless_answer_is_given_up(monkeypatch):
    grader = graders.make("code", output_kb=64, isolation="namespaces")
    taken = Taken(monkeypatch, grader, lambda: iter([READY] + [b"x" * 65536] * 1000))
    assert not grader.grade("", SQUARE)
    assert taken.sent < 4 << 20


def test_a_refusal_before_the_start_is_the_users_to_know(monkeypatch):
    grader = graders.make("code", isolation="namespaces")
    Taken(monkeypatch, grader, lambda: [b'{"refused": "no namespaces"}\n'])
    with pytest.raises(UserError, match="no namespaces"):
        grader.grade("", SQUARE)


def test_the_judge_sees_no_file_of_the_program():
    program = (
        "import os\nfor d in '/work', '/tmp', '/dev/shm':\n    open(d + '/x', 'w').close()\ndef f(x):\n    return x\n"
    )
    look = (
        "import os, sys\nassert f(1) == 1\nfor d in '/work', '/tmp', '/dev/shm':\n    assert os.listdir(d) == [], d\n"
    )
    look += "for path in sys.path + [p for m in sys.modules.values() for p in getattr(m, '__path__', None) or ()]:\n"
    look += "    assert path.startswith('/python/lib'), path\n    assert 'packages' not in path, path\n"
    for isolation in sandbox.ISOLATIONS if sandbox.bwrap() else ("namespaces",):
        with graders.make("code", isolation=isolation) as grader:
            verdict = grader.grade(program, {"asserts": look})
        assert verdict, verdict
