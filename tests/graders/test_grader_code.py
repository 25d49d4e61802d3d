"""The code grader: what passes, what fails and why, and that nothing gets out of the sandbox or stays behind."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid

import hostile_programs
import numpy as np
import pytest

from omniopd_jax import graders
from omniopd_jax.errors import UserError
from omniopd_jax.graders import code, sandbox
from omniopd_jax.graders.code import extract_program

MARKER = f"mark-{uuid.uuid4().hex}"
SQUARE = {"asserts": "assert f(3) == 9 and f(5) == 25", "entry_point": "f"}


def isolations(*names):
    """Marks a fixture or test to run with each way to make a box, those of `names` in the quick part."""
    here = [n for n in sandbox.ISOLATIONS if n == "namespaces" or sandbox.bwrap()]
    return [pytest.param(n, marks=() if n in names else pytest.mark.slow) for n in here]


@pytest.fixture(scope="module", params=isolations("namespaces", "bubblewrap"))
def grader(request):
    with graders.make("code", wall_seconds=10, workers=2, isolation=request.param) as g:
        yield g


def reason(grader, program, tests):
    return grader.grade(program, tests).reason


def stdio(stdin, stdout):
    return {"stdin": stdin, "stdout": stdout}


# -- ordinary programs


def test_stdin_programs(grader):
    double = "print(2 * int(input()))"
    assert grader.grade(double, stdio(["2\n", "5\n"], ["4\n", "10\n"]))
    assert grader.grade(double, [stdio("2", "4"), stdio("5", "10")])
    verdict = grader.grade(double, stdio(["2\n", "5\n"], ["4\n", "11\n"]))
    assert (verdict.passed, verdict.reason, verdict.detail) == (False, "wrong_answer", "line 1: '10', expected '11'")
    assert grader.grade(double, stdio("x", "4")).reason == "error"
    assert "ValueError" in grader.grade(double, stdio("x", "4")).detail


@pytest.mark.parametrize(
    "printed, expected, same",
    [
        ("1 2 \n3\n\n", "1 2\n3", True), ("1.50", "1.5", True), ("1e3 x", "1000 x", True), ("1 2", "1\n2", False),
        ("Yes", "yes", False),
        ("1.50001", "1.5", False), ("1.5000001", "1.5", True), ("15000001e-7", "15e-1", False),
        ("1_000", "1000", False), ("\n\n 1", "1", True), ("3", "3.0000001", True), ("3.0000001", "3", False),
        ("1e-9", "0.0", True), ("", "0", False), ("nan", "nan", True), ("é", "é", True),
    ],
)  # fmt: skip
def test_output_is_compared_by_lines_and_numbers(grader, printed, expected, same):
    assert grader.grade(f"print({printed!r})", stdio("", expected)).passed is same


def test_assert_programs(grader):
    assert grader.grade("def f(x):\n    return x * x", SQUARE)
    assert reason(grader, "def f(x):\n    return x + x", SQUARE) == "wrong_answer"
    assert reason(grader, "def g(x):\n    return x", SQUARE) == "error"
    assert reason(grader, "def f(x) return x", SQUARE) == "error"
    human_eval = "METADATA = {}\ndef check(candidate):\n    assert candidate([1, 2.5]) == (1, 2.5)\n"
    assert grader.grade("def f(x):\n    return tuple(x)", {"asserts": human_eval, "entry_point": "f"})
    mbpp = ["assert set(similar((3, 4), (4, 5))) == {4}", "assert not similar((1,), (2,))"]
    assert grader.grade("def similar(a, b):\n    return set(a) & set(b)", {"asserts": mbpp})


def test_assert_programs_of_unusual_shape(grader):
    node = "class Node:\n    def __init__(self, v):\n        self.v, self.next = v, None\n"
    node += "def total(n):\n    return n.v + total(n.next) if n else 0\n"
    assert grader.grade(node, {"asserts": "n = Node(1)\nn.next = Node(2)\nassert total(n) == 3 and n.next.v == 2"})
    inplace = "def f(a, d):\n    a.sort()\n    d['k'] = a\n    return None"
    assert grader.grade(inplace, {"asserts": "x, d = [2, 1], {}\nf(x, d)\nassert x == [1, 2] and d == {'k': [1, 2]}"})
    assert grader.grade("def f(g, x):\n    return g(g(x))", {"asserts": "assert f(lambda x: x + 1, 1) == 3"})
    raises = "try:\n    f(0)\nexcept ZeroDivisionError as e:\n    assert 'division' in str(e)\nelse:\n    assert False"
    assert grader.grade("def f(x):\n    return 1 / x", {"asserts": raises})
    assert grader.grade("def f(n):\n    yield from range(n)", {"asserts": "assert list(f(3)) == [0, 1, 2]"})
    assert grader.grade("def f(x):\n    return x", {"asserts": "assert math.isclose(f(0.1) + f(0.2), 0.3)"})
    solution = "class Solution:\n    def two(self, a, t):\n        return [0, 1]"
    assert grader.grade(solution, {"asserts": "assert Solution().two([2, 7], 9) == [0, 1]"})
    builtin = {"asserts": "assert sum(10, 15) == 25", "entry_point": "sum"}
    assert grader.grade("def sum(a, b):\n    return a + b", builtin)


def test_tests_import_the_program_as_solution_and_nothing_that_is_not_there(grader):
    square = "def f(x):\n    return x * x"
    for line, name in (("from solution import f", "f"), ("from solution import f as g, f", "g"), ("", "f")):
        case = f"import math\n{line}\n\ndef test():\n    assert {name}(3) == math.pow(3, 2)"
        assert grader.grade(square, {"asserts": case}), line
        assert grader.grade("def f(x):\n    return x", {"asserts": case}).reason == "wrong_answer"
    assert grader.grade(square, {"asserts": "import solution\n\ndef test():\n    assert solution.f(3) == 9"})
    own = {"asserts": "from solution import f, sorted\nassert f(3) == 9 and sorted([2, 1]) == [1, 2]"}
    assert grader.grade(square, own).reason == "error", "Python's own is not the program's"
    assert grader.grade(square + "\ndef sorted(x):\n    return x[::-1]", own)
    for line, missing in (("import numpy as np", "numpy"), ("from pytest import mark", "pytest")):
        with pytest.raises(UserError, match=f"import {missing}.*standard library alone"):
            grader.check_answer({"asserts": f"{line}\nassert f(3) == 9"})
    for held in ("try:", "if False:", "with contextlib.suppress(ImportError):", "def never():"):
        case = f"import contextlib, __main__\n{held}\n    import numpy\n"
        case += "except ImportError:\n    pass\n" * (held == "try:") + "assert f(3) == 9"
        assert grader.grade(square, {"asserts": case}), held


def test_what_a_program_returns_and_changes_arrives(grader):
    for program, case in (
        ("import collections\ndef f(s): return collections.Counter(s)", "f('aab').most_common(1) == [('a', 2)]"),
        ("def f(d): return d.keys()", "f({3: 1}) == {3} and list(f({3: 1, 2: 1})) == [3, 2]"),
        ("def f(d): return d.values()", "list(f({3: 1, 2: 1})) == [1, 1]"),
        ("def f(d): return d.items()", "list(f({3: 1})) == [(3, 1)]"),
        ("def f(nums): nums.sort()", "[f(nums=(x := [3, 1])), x] == [None, [1, 3]]"),
        ("def f(a, b): a.append(1), b.add(2)", "[f(x := [], b=(y := set())), x, y] == [None, [1], {2}]"),
    ):
        verdict = grader.grade(program, {"asserts": f"assert {case}"})
        assert verdict, (program, verdict)


def test_plain_data_survives_the_line(grader):
    values = (
        "[None, True, -1, 10 ** 400, 1.5, float('inf'), 'é\\ud800\\0', b'\\xff', 1 + 2j, (1, (2,)), {1, 2}, "
        "frozenset({3}), {(1, 2): [3], None: {}}, range(3), decimal.Decimal('0.10'), fractions.Fraction(1, 3), "
        "collections.deque([1]), datetime.date(2020, 1, 2), collections.Counter('aab')]"
    )
    asserts = f"for v in {values}:\n    assert f(v) == v and type(f(v)) in (type(v), dict), v\nassert f(True) is True"
    verdict = grader.grade("def f(x):\n    return x", {"asserts": asserts})
    assert verdict, verdict


def test_programs_find_what_they_expect(grader):
    program = (
        "import sys, os, json, math, random, threading, multiprocessing, tempfile, datetime, zoneinfo, getpass, "
        "ctypes\n"
        "assert __name__ == '__main__' and sys.argv == [__file__] and not sys.path[0].startswith('/work')\n"
        "open('note', 'w').write('x'); assert os.listdir() == ['note'] and os.getcwd() == os.path.expanduser('~')\n"
        "tempfile.TemporaryFile().write(b'x'); os.urandom(4); zoneinfo.ZoneInfo('Europe/Paris'); getpass.getuser()\n"
        "threading.stack_size(1 << 26); t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "p = multiprocessing.get_context('fork').Process(target=print, args=('fork',)); p.start(); p.join()\n"
        "print(hash('x') == hash('x'), input(), sys.stdin.readline())\nexit()\n"
    )
    verdict = grader.grade(program, stdio("a\nb", "thread\nfork\nTrue a b"))
    assert verdict, verdict


def test_a_case_finds_nothing_of_the_one_before(grader):
    program = "import os\nprint(os.listdir('.'), os.listdir('/tmp'), os.listdir('/dev/shm'))\n"
    program += "for d in '.', '/tmp', '/dev/shm':\n    open(d + '/x', 'w').close()\n"
    program += "if os.fork() == 0:\n    import time\n    time.sleep(100)\n"
    assert grader.grade(program, stdio(["", ""], ["[] [] []\n"] * 2))


def test_hashes_are_the_same_in_two_gradings(grader):
    told = [grader.grade("print(hash('seed'))", stdio("", "")).detail for _ in range(2)]
    assert told[0] == told[1]
    shown = {"asserts": "assert not list(f()), list(f())"}  # a set is made anew where the tests are
    told = []
    for _ in range(3):
        with graders.make("code", isolation=grader._sandbox.isolation) as own:
            told.append(own.grade("def f():\n    return {'banana', 'apple', 'kiwi', 'cherry'}", shown).detail)
    assert told[0] == told[1] == told[2] != ""


def test_limits_are_kept_and_named(monkeypatch):
    quick = graders.make("code", wall_seconds=1, total_seconds=2, memory_mb=200, output_kb=1)
    start = time.monotonic()
    nine = stdio([""] * 9, [""] * 9)
    with monkeypatch.context() as only:
        only.setattr(code, "MOST_CASES_SECONDS", 0)
        assert reason(quick, "import time\ntime.sleep(0.9)", nine) == "timeout"
        assert time.monotonic() - start < 8
    assert reason(quick, "import time\ntime.sleep(0.25)", nine) == "ok"  # a second more for each
    assert reason(quick, "x = bytearray(300 << 20)", stdio("", "")) == "memory"
    assert reason(quick, "print('x' * 2000)", stdio("", "")) == "output"
    assert reason(quick, "def f(x):\n    return bytearray(300 << 20)", SQUARE) == "error"
    assert reason(quick, "def f(x):\n    while True: pass", SQUARE) == "timeout"
    slow = "import time\nclass Solution:\n    def f(self, x):\n        time.sleep(0.4)\n        return x"
    cases = "\n".join(f"assert Solution().f({i}) == {i}" for i in range(3))  # LiveCodeBench's: a second more for each
    assert reason(quick, slow, {"asserts": cases}) == "ok"
    assert (
        reason(quick, slow.replace("Solution", "Other"), {"asserts": cases.replace("Solution", "Other")}) == "timeout"
    )


def test_wrong_settings_and_tests_are_user_errors(grader):
    with pytest.raises(UserError, match="memory_gb"):
        graders.make("code", memory_gb=1)
    with pytest.raises(UserError, match="wall_seconds"):
        graders.make("code", wall_seconds=0)
    with pytest.raises(UserError, match="unknown"):
        graders.make("prose")
    for tests in ({}, {"stdin": "x"}, {"stdin": [], "stdout": []}, {"stdin": ["1", "2"], "stdout": ["1"]}):
        with pytest.raises(UserError, match="code tests"):
            grader.grade("", tests)


def test_programs_are_taken_from_responses():
    assert (
        extract_program("text\n```python\nprint(1)\n```\nthen\n```py\nprint(2)\n```\n```text\nout\n```") == "print(2)\n"
    )
    assert extract_program("print(3)") == "print(3)"


def test_without_isolation_it_refuses(monkeypatch, grader):
    """A kernel that grants no namespace: simulated by one level in which the limit on them is 0."""
    script = (
        "import os, sys\nfrom omniopd_jax import graders\nfrom omniopd_jax.errors import UserError\n"
        "t = {'stdin': '1', 'stdout': '2'}\n"
        "try:\n    print(graders.make('code').grade('print(2)', t))\n"
        "except UserError as e:\n    print('refused', 'isolate' in str(e), graders.make('code', unsafe=True).grade("
        "'print(2)', t).reason)\n"
    )
    command = ["unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" -c "$1"']
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    done = subprocess.run([*command, sys.executable, script], capture_output=True, text=True, env=env, check=False)
    if "refused" not in done.stdout and shutil.which("unshare") is None:
        pytest.skip("no unshare(1)")
    assert done.stdout.strip() == "refused True ok", done


def test_it_works_for_an_ordinary_user():
    """Another uid and another Python, in a tree that it may not write to."""
    python = shutil.which("python3", path="/usr/bin")
    version = python and subprocess.run(
        [python, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True
    )
    if os.geteuid() or shutil.which("setpriv") is None or not version or version.stdout != b"True\n":
        pytest.skip("needs root, setpriv(1) and a system Python 3.11")
    script = (
        "from omniopd_jax import graders\ng = graders.make('code')\n"
        "print(g.grade('import os\\nprint(os.getuid(), os.path.exists(\"/home\"))', {'stdin': '', 'stdout': '65534 "
        "False'}))\n"
        "print(g.grade('def f(x): return x', {'asserts': 'assert f(1) == 1'}).reason)\n"
    )
    user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", python, "-c", script]
    env = {"PYTHONPATH": f"{pathlib.Path(__file__).parents[2]}:{pathlib.Path(np.__file__).parents[1]}", "HOME": "/"}
    done = subprocess.run(user, capture_output=True, text=True, env=env, cwd="/", check=False)
    assert done.stdout == "Verdict(passed=True, reason='ok', detail='')\nok\n", done


def test_unsafe_runs_still_end(tmp_path):
    loose = graders.make("code", unsafe=True, wall_seconds=1, memory_mb=300)
    before = set(os.listdir(tempfile.gettempdir()))
    assert loose.grade("print(int(input()) + 1)", stdio("1", "2"))
    assert loose.grade("def f(x):\n    return x * x", SQUARE)
    assert reason(loose, "import time\ntime.sleep(99)", stdio("", "")) == "timeout"
    assert reason(loose, "x = bytearray(400 << 20)", stdio("", "")) == "memory"
    assert not {n for n in set(os.listdir(tempfile.gettempdir())) - before if n.startswith("grading-")}


def test_unsafe_leaves_no_daemon(tmp_path):
    mark = tmp_path / "mark"
    daemon = (
        "import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(99)', '{0}'])\n    "
        "os._exit(0)\n"
        "time.sleep(0.3)\n"
    ).replace("{0}", str(mark))
    with graders.make("code", unsafe=True, wall_seconds=2) as loose:
        assert loose.grade(daemon + "print(1)", stdio("", "1"))
        assert loose.grade(daemon + "def f(x):\n    return x * x\n", SQUARE)
        assert not loose.grade(daemon + "while True:\n    pass\n", stdio("", "1"))
    assert not commands_with(str(mark).encode())


def test_a_lost_server_is_replaced():
    with graders.make("code") as g:
        assert g.grade("print(1)", stdio("", "1"))
        g._sandbox._server[0].kill()
        g._sandbox._server[0].wait()
        assert g.grade("print(1)", stdio("", "1"))
        server = g._sandbox._server[0]
    assert server.returncode == 0
    assert g.grade("print(1)", stdio("", "1"))  # closed, it starts again


def test_programs_end_with_the_process_that_grades_them():
    program = "import sys, subprocess; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)', '{0}'])"
    asserts = "import time\ndef f(x):\n    {0} = time.sleep(99)\n"
    for mark, tests in (("mark_a" + MARKER[-8:], stdio("", "1")), ("mark_b" + MARKER[-8:], SQUARE)):
        source = program.format(mark) if tests is not SQUARE else asserts.format(mark)
        script = f"from omniopd_jax import graders\ngraders.make('code').grade({source!r}, {tests!r})"
        env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
        before = jailed()
        process = subprocess.Popen([sys.executable, "-c", script], env=env)
        wait_until(lambda before=before: jailed() - before)
        time.sleep(0.2)
        process.kill()
        process.wait()
        wait_until(lambda before=before: not jailed() - before)


def jailed():
    """The PIDs of this machine's processes that run the sandbox's Python."""
    return set(commands_with(b"/python/bin/python")) - set(commands_with(b"box.main()"))


def commands_with(word):
    """The PIDs of processes with `word` in their command line."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if word in pathlib.Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(name)
        except OSError:
            continue
    return found


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# -- hostile programs


class Listener:
    """Counts who connects to a TCP port and to an abstract socket of this machine."""

    def __init__(self):
        self.tcp, self.local, self.visits = socket.create_server(("0.0.0.0", 0)), socket.socket(socket.AF_UNIX), 0
        self.local.bind("\0" + MARKER)
        self.local.listen()
        for server in (self.tcp, self.local):
            threading.Thread(target=self.accept, args=(server,), daemon=True).start()

    def accept(self, server):
        while True:
            try:
                server.accept()
            except OSError:
                return
            self.visits += 1


def left_behind():
    """What the machine holds that a program might have left: processes, mounts, System V objects, files."""
    mounts = [line for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines() if "box" in line]
    ipc = [pathlib.Path(f"/proc/sysvipc/{kind}").read_text().count("\n") for kind in ("shm", "sem", "msg")]
    groups = [
        p
        for root in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")
        for p in pathlib.Path(root).glob(f"**/omniopd-{os.getpid()}-*")
    ]
    aio = pathlib.Path("/proc/sys/fs/aio-nr").read_text()
    return {
        "processes": commands_with(MARKER.encode()),
        "mounts": mounts,
        "ipc": ipc,
        "shm": sorted(os.listdir("/dev/shm")),
        "groups": groups,
        "aio": aio,
    }


@pytest.fixture(scope="module", params=isolations("namespaces"))
def attacked(request):
    """Every hostile program's verdict, and what was found afterwards."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="canary-"))
    folder.chmod(0o777)
    canary = folder / "secret"
    canary.write_text("secret")
    canary.chmod(0o666)
    inherited = os.open(canary, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    os.environ["OMNIOPD_CANARY"] = MARKER
    listener, before = Listener(), left_behind()
    fill = {"canary": str(canary), "port": str(listener.tcp.getsockname()[1]), "marker": MARKER}
    grader = graders.make(
        "code",
        workers=6,
        cpu_seconds=1,
        wall_seconds=4,
        memory_mb=256,
        output_kb=64,
        disk_mb=8,
        file_mb=4,
        isolation=request.param,
    )
    pairs = {}
    for name, (program, _) in hostile_programs.ESCAPES.items():
        for key, value in fill.items():
            program = program.replace(f"{{{key}!r}}", repr(value)).replace(f"{{{key}}}", value)
        pairs[name] = (program.replace("{{", "{").replace("}}", "}"), stdio("", "held\n"))
    try:
        verdicts = dict(zip(pairs, grader.grade_all(*zip(*pairs.values()))))
        time.sleep(0.2)
        grader.close()
        yield verdicts, before, left_behind(), listener.visits, canary.read_text(), sorted(os.listdir(folder))
    finally:
        os.environ.pop("OMNIOPD_CANARY")
        os.close(inherited)
        listener.tcp.close()
        listener.local.close()
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", hostile_programs.ESCAPES)
def test_hostile_program_is_held(attacked, name):
    verdict = attacked[0][name]
    assert verdict.reason in hostile_programs.ESCAPES[name][1], verdict


def test_nothing_is_left_behind(attacked):
    _, before, after, visits, canary, names = attacked
    assert after == before
    assert (visits, canary, names) == (0, "secret", ["secret"])


def test_the_grader_works_after_the_attack(attacked):
    with graders.make("code") as grader:
        assert grader.grade("print(1)", stdio("", "1"))
        assert grader.grade("def f(x):\n    return x * x", SQUARE)
