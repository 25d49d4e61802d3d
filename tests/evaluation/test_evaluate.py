"""The evaluation command: scores against closed forms, the same numbers twice, and after an interruption."""

import base64
import dataclasses
import itertools
import json
import pathlib
import pickle
import shutil
import subprocess
import time
import types
import zlib

import numpy as np
import pytest
import tiny

from omniopd_jax import evaluate, graders, rollout
from omniopd_jax.data import benchmarks
from omniopd_jax.errors import UserError
from omniopd_jax.evaluation import runner, scores
from omniopd_jax.graders import sandbox, small_world
from omniopd_jax.run import trained as trained_run
from omniopd_jax.run import validation

HOW = runner.How(samples=3, temperature=1.0, top_p=0.9, max_new_tokens=12, seed=5, rows=6)  # two problems a batch


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for correct in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([i < correct for i in range(n)], k))
            assert scores.pass_at_k(n, correct, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_pass_at_k_on_synthetic_counts():
    """Binomial counts: the mean of pass@k is 1 - (1 - p)^k."""
    n, p = 16, 0.2
    correct = np.random.default_rng(0).binomial(n, p, 20_000)
    for k in (1, 4, 16):
        assert np.mean([scores.pass_at_k(n, int(c), k) for c in correct]) == pytest.approx(1 - (1 - p) ** k, abs=0.01)
    for bad in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError):
            scores.pass_at_k(*bad)


@pytest.mark.parametrize(("answers", "correct", "value"), [
    (["4", "4", "5"], [True, True, False], 1.0),
    (["4", "5", "5"], [True, False, False], 0.0),
    (["1/2", "0.5", "3", "3", "7"], [True, True, False, False, False], 0.5),  # right answers are one, then a tie
    (["4", None, None], [True, False, False], 1.0),
    ([None, None], [False, False], 0.0),
    (["a b", "ab", "4"], [False, False, True], 0.0),
])  # fmt: skip
def test_majority(answers, correct, value):
    assert scores.majority(answers, correct) == value


def test_bootstrap_interval_covers_the_mean_and_shrinks():
    """About the normal interval on many problems; nothing to vary, no width; the same for the same data."""
    values = (np.arange(400) % 4 == 0).astype(float)
    low, high = scores.interval(values)
    assert low < 0.25 < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 * 0.75 / 400), rel=0.1)
    assert scores.interval(values) == (low, high)
    assert scores.interval(np.ones(9)) == (1.0, 1.0)
    covered = 0
    for seed in range(200):
        low, high = scores.interval(np.random.default_rng(seed).random(40) < 0.3, resamples=400)
        covered += low <= 0.3 <= high
    assert covered >= 180


def completion(i, sample, correct, answer="1"):
    return {
        "id": i,
        "sample": sample,
        "correct": correct,
        "answer": answer,
        "finish": "stop",
        "tokens": 4,
        "repeated": 0.0,
    }


def test_scores_of_a_benchmark():
    got = scores.of([completion(i, s, s < i, str(s >= i)) for i in range(3) for s in range(2)], vote=True)
    assert {k: v["mean"] for k, v in got.items() if isinstance(v, dict)} == {
        "avg@2": pytest.approx(0.5),
        "pass@1": pytest.approx(0.5),
        "pass@2": pytest.approx(2 / 3),
        "maj@2": pytest.approx(0.5),  # wrong and right, one each: half
    }
    assert (got["problems"], got["samples"]) == (3, 2)
    assert "| b | 3 | 50.0" in scores.table({"b": got})
    with pytest.raises(ValueError, match="as many of each"):
        scores.of([completion(0, 0, True), completion(1, 0, True), completion(1, 1, True)], vote=False)


# --- benchmarks -----------------------------------------------------------------------------------------------------

ROWS = {  # a row with each benchmark's own fields
    "math500": {"problem": "1 + 1?", "answer": "2", "unique_id": "test/1.json", "level": 1},
    "aime24": {"id": 60, "problem": "1 + 1?", "answer": "2"},
    "aime25": {"id": "0", "problem": "1 + 1?", "answer": "2"},
    "amc23": {"id": 3, "question": "1 + 1?", "answer": "2.0", "url": ""},
    "olympiadbench": {"id": 9, "question": "1 + 1?", "context": "Add.", "final_answer": ["2"]},
    "gsm8k": {"question": "1000 + 1?", "answer": "It is.\n#### 1,001"},
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": 'def two():\n    """Two."""\n',
        "entry_point": "two",
        "test": "def check(candidate):\n    assert candidate() == 2\n",
    },
    "mbpp": {"task_id": 2, "prompt": "Write two.", "test_list": ["assert two() == 2"], "test_imports": ["import math"]},
    "livecodebench": {
        "question_id": "a1",
        "question_content": "Double.",
        "starter_code": "class Solution:\n    def two(self, n): ...",
        "public_test_cases": json.dumps([{"input": "1\n", "output": "2", "testtype": "functional"}]),
        "private_test_cases": base64.b64encode(
            zlib.compress(pickle.dumps(json.dumps([{"input": "[3]", "output": "6", "testtype": "functional"}])))
        ).decode(),
        "metadata": '{"func_name": "two"}',
    },
}
ANSWERS = {"amc23": "2.0", "gsm8k": "1001"}


@pytest.mark.parametrize("name", benchmarks.SUITES)
def test_a_benchmark_reads_its_own_fields_from_a_local_file(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n")
    suite = benchmarks.load(f"{name}={path}", suffix=benchmarks.BOXED)
    (prompt,) = suite.prompts
    assert (suite.name, suite.grader) == (name, benchmarks.SUITES[name].grader)
    if suite.grader == "math":
        assert prompt.answer == ANSWERS.get(name, "2")
        assert prompt.messages[0]["content"].endswith(f"\n\n{benchmarks.BOXED}")
        (plain,) = benchmarks.load(f"{name}={path}").prompts
        assert prompt.messages[0]["content"] == f"{plain.messages[0]['content'].strip()}\n\n{benchmarks.BOXED}"
    else:
        assert "```python" in prompt.messages[0]["content"]
        assert json.loads(prompt.answer)["asserts"]


def test_livecodebench_tests_are_calls_and_its_pickles_hold_strings_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS["livecodebench"]) + "\n")
    asserts = json.loads(benchmarks.load(f"livecodebench={path}").prompts[0].answer)["asserts"]
    assert asserts == ["assert Solution().two(1) == 2", "assert Solution().two([3]) == 6"]
    hostile = base64.b64encode(zlib.compress(pickle.dumps(shutil.rmtree))).decode()
    path.write_text(json.dumps(ROWS["livecodebench"] | {"private_test_cases": hostile}) + "\n")
    with pytest.raises(UserError, match="refused"):
        benchmarks.load(f"livecodebench={path}")


def test_other_sources(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": 2}\n{"prompt": "2?", "answer": "2", "id": "b"}\n')
    own = benchmarks.load(str(path))
    assert [(p.id, p.answer) for p in own.prompts] == [("00000", "2"), ("b", "2")]
    assert (own.name, own.grader) == ("own", "math")
    assert len(benchmarks.load("world:forks:validation", 5).prompts) == 5


def test_procedural_problems_are_named_by_seed_and_graded_by_their_own_rule():
    procedural = benchmarks.load("rg:gsm_symbolic:7", 2)
    assert [p.id for p in procedural.prompts] == ["gsm_symbolic:7:2:0", "gsm_symbolic:7:2:1"]
    grade = graders.make("reasoning_gym").grade
    right = graders.gym.dataset("gsm_symbolic", 7, 2)[1]["answer"]
    assert grade(f"so \\boxed{{{right}}}", procedural.prompts[1].answer)
    assert not grade(f"so {right} \\boxed{{{right}1}}", procedural.prompts[1].answer)


@pytest.mark.parametrize(("name", "words"), [
    ("math501", ["'math501'", "math500", "FILE.jsonl"]),
    ("math501=x.jsonl", ["math501", "math500"]),
    ("nowhere.jsonl", ["nowhere.jsonl is not a file"]),
    ("world:narnia:test", ["'narnia'", "forks"]),
    ("rg:no_such_set", ["no_such_set", "gsm_symbolic"]),
    ("rg:gsm_symbolic:x", ["seed"]),
])  # fmt: skip
def test_an_unknown_benchmark_is_one_line(name, words):
    with pytest.raises(UserError) as caught:
        benchmarks.load(name)
    assert "\n" not in str(caught.value)
    assert all(w in str(caught.value) for w in words)


@pytest.mark.parametrize("name", ["aime24", "livecodebench"])
def test_a_hub_out_of_reach_is_one_line_in_seconds(name, monkeypatch):
    import datasets  # noqa: F401  (its import is no part of the wait)
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    started = time.perf_counter()
    with pytest.raises(UserError, match=f"benchmark {name} = .*{name}=FILE.jsonl") as caught:
        benchmarks.load(name)
    assert time.perf_counter() - started < 15
    assert "\n" not in str(caught.value)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        tiny.on_one_device(patch)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny student, and one evaluation of it: five problems, three samples."""
    folder = tmp_path_factory.mktemp("evaluate")
    student, teacher = tiny.make_folders(folder)
    path = folder / "sums.jsonl"
    rows = [
        {"id": f"p{i}", "problem": f"Tom has {i} pens. How many?", "answer": str(i), "grader": "world"}
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = tiny.recipe(student, teacher, folder / "run")
    return cfg, str(path), folder / "first", run(cfg, str(path), folder / "first")


def run(cfg, path, out, how=HOW):
    return runner.run(cfg, how, checkpoint=None, benchmarks=[path, "world:forks:test"], limit=5, out=out)


def test_two_runs_are_equal(whole, tmp_path):
    cfg, path, first, results = whole
    assert run(cfg, path, tmp_path / "again") == results
    for name in ("sums.jsonl", "world_forks_test.jsonl", "table.md"):
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes()
    lines = tiny.lines(first / "sums.jsonl")
    assert [(c["id"], c["sample"]) for c in lines] == [(f"p{i}", r) for i in range(5) for r in range(3)]
    assert len({c["text"] for c in lines}) > 5, "samples differ"
    assert {"text", "finish", "correct", "answer", "tokens"} <= set(lines[0])


def test_interrupted_and_resumed_is_the_same_table(whole, tmp_path, monkeypatch):
    """Stopped in the middle of the second batch by an exception, then cut within a line as by a crash."""
    cfg, path, first, results = whole
    graded = itertools.count()

    class Stops(small_world.WorldGrader):
        def grade(self, text, answer):
            if next(graded) == 8:
                raise KeyboardInterrupt
            return super().grade(text, answer)

    with monkeypatch.context() as patch:
        patch.setattr(graders, "shared", lambda name: Stops())
        with pytest.raises(KeyboardInterrupt):
            run(cfg, path, tmp_path / "out")
    file = tmp_path / "out" / "sums.jsonl"
    assert len(tiny.lines(file)) == 6
    assert run(cfg, path, tmp_path / "out") == results
    file.write_bytes(file.read_bytes()[:-30])
    asked = []

    class Counts(small_world.WorldGrader):
        def grade(self, text, answer):
            asked.append(text)
            return super().grade(text, answer)

    with monkeypatch.context() as patch:
        patch.setattr(graders, "shared", lambda name: Counts())
        assert run(cfg, path, tmp_path / "out") == results
    assert len(asked) == 3, "the last batch alone was sampled again"
    for name in ("sums.jsonl", "world_forks_test.jsonl", "table.md"):
        assert (tmp_path / "out" / name).read_bytes() == (first / name).read_bytes()


def test_the_key_depends_on_seed_benchmark_problem_and_sample_alone(whole, tmp_path):
    """Another order of the problems, other neighbours: the same texts (this model's floats do not move them)."""
    cfg, path, first, _ = whole
    rows = tiny.lines(path)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[3:] + rows[:1]))
    run(cfg, str(tmp_path / "sums.jsonl"), tmp_path / "out")

    def texts(folder):
        return {(c["id"], c["sample"]): c["text"] for c in tiny.lines(folder / "sums.jsonl")}

    assert texts(tmp_path / "out").items() <= texts(first).items()


def test_results_of_different_settings_are_not_mixed(whole):
    cfg, path, first, _ = whole
    with pytest.raises(UserError, match=r"temperature was 1\.0, is 0\.5.*--out"):
        run(cfg, path, first, runner.How(3, 0.5, 0.9, 12, 5, 6))
    for bad in (
        {"samples": 0}, {"top_p": 0.0}, {"temperature": 0.0}, {"temperature": float("inf")}, {"top_k": -3}, {"slots": -1},
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--{next(iter(bad))}"):
            runner.How(**{"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4, "seed": 0} | bad)


def test_a_folder_whose_weights_were_replaced_is_another_model(whole, tmp_path):
    cfg, path, *_ = whole
    cfg, how = cfg.copy_and_resolve_references(), dataclasses.replace(HOW, samples=1, max_new_tokens=4)
    cfg.student.path = str(shutil.copytree(cfg.student.path, tmp_path / "student"))
    run(cfg, path, tmp_path / "out", how)
    weights = tmp_path / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-400] + bytes(400))
    with pytest.raises(UserError, match="another evaluation .*files was"):
        run(cfg, path, tmp_path / "out", how)


def test_the_length_that_is_asked_for_is_the_one_that_must_fit(whole, tmp_path):
    cfg, path, *_ = whole
    cfg, how = cfg.copy_and_resolve_references(), dataclasses.replace(HOW, samples=1, max_new_tokens=4)
    cfg.max_completion_length = 10_000
    run(cfg, path, tmp_path / "out", how)
    with pytest.raises(UserError, match="positions"):
        run(cfg, path, tmp_path / "longer", dataclasses.replace(how, max_new_tokens=10_000))


def test_top_k_is_sampled_with_and_part_of_the_settings(whole, tmp_path):
    """Of the one likeliest token all samples are equal; results from before there was top_k had it off."""
    cfg, path, first, _ = whole
    one = dataclasses.replace(HOW, top_k=1)
    run(cfg, path, tmp_path / "out", one)
    assert len({c["text"] for c in tiny.lines(tmp_path / "out" / "sums.jsonl") if c["id"] == "p0"}) == 1
    settings = shutil.copytree(first, tmp_path / "old") / "settings.json"
    old = json.loads(settings.read_text())
    del old["top_k"]
    settings.write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"top_k was 0, is 1.*--out"):
        run(cfg, path, tmp_path / "old", one)
    run(cfg, path, tmp_path / "old")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mesh.fsdp": 0}, "mesh.fsdp = 0"), ({"model.attention": "foo"}, "model.attention = 'foo'"),
        ({"compute_dtype": "float16"}, "compute_dtype = 'float16'"), ({"top_k": -3}, "top_k = -3"),
        ({"temperature": float("inf")}, "temperature = inf"),
    ],
)  # fmt: skip
def test_what_is_read_of_a_recipe_is_checked_and_nothing_else(whole, change, said):
    cfg = whole[0].copy_and_resolve_references()
    cfg.optimizer.b1 = 1.5  # of a run from before it was refused
    validation.check_values(cfg, validation.EVALUATED)
    cfg.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=f"^{said}"):
        validation.check_values(cfg, validation.EVALUATED)


def test_the_command_takes_top_k_from_the_recipe_and_checks_it(whole, monkeypatch):
    cfg = whole[0].copy_and_resolve_references()
    cfg.top_k, asked = 7, []
    given = {"config": cfg, "checkpoint": None, "benchmarks": ["x"], "samples": 1, "limit": 0, "rows": 1, "slots": 0,
             "out": "o", "unsafe": False}  # fmt: skip
    given |= dict.fromkeys(("temperature", "top_p", "top_k", "max_new_tokens", "seed"))
    monkeypatch.setattr(evaluate.flags, "FLAGS", types.SimpleNamespace(flag_values_dict=lambda: given))
    monkeypatch.setattr(evaluate.cli, "setup_jax", lambda dtype: None)
    monkeypatch.setattr(runner, "run", lambda cfg, how, **_: asked.append(how) or {})
    assert evaluate.main(["x"]) == 0 and asked[0].top_k == 7
    given["top_k"] = 3
    assert evaluate.main(["x"]) == 0 and asked[1].top_k == 3
    cfg.mesh.fsdp = 0
    with pytest.raises(UserError, match="^mesh.fsdp = 0 must be at least 1"):
        evaluate.main(["x"])
    assert len(asked) == 2


def small_student(**more) -> runner.Student:
    template = types.SimpleNamespace(stop_strings=("\n\n",))
    return runner.Student(**{"params": {}, "model_cfg": None, "compute": None, "template": template, "end_ids": (1,),
                             "source": "x"} | more)  # fmt: skip


def test_settings_that_were_cut_off_and_other_stop_strings_are_one_line(tmp_path):
    runner._same_evaluation(tmp_path, small_student(), HOW, [], "float32")
    runner._same_evaluation(tmp_path, small_student(), HOW, [], "float32")
    other = types.SimpleNamespace(stop_strings=())
    with pytest.raises(UserError, match=r"stop_strings was \['\\n\\n'\], is \[\].*set another --out"):
        runner._same_evaluation(tmp_path, small_student(template=other), HOW, [], "float32")
    (tmp_path / "settings.json").write_text('{"checkpoint": ')
    with pytest.raises(UserError, match=r"settings\.json is cut off or no JSON: set another --out"):
        runner._same_evaluation(tmp_path, small_student(), HOW, [], "float32")


def test_a_place_that_cannot_be_written_is_told_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_student", lambda *_, **__: 1 / 0)
    (tmp_path / "file").write_text("")
    c = types.SimpleNamespace(eval=types.SimpleNamespace(suffix=""))
    with pytest.raises(UserError, match=r"--out = .*file can't be written \("):
        runner.run(c, HOW, checkpoint=None, benchmarks=["world:forks:test"], limit=1, out=tmp_path / "file")


def test_the_sampler_has_the_cache_that_the_recipe_gives_it(monkeypatch):
    def stream(*_, how, **__):
        assert how == rollout.How(slots=4, cache_gib=7.0, cache_dtype="int8")
        raise UserError("the sampler's turn")

    monkeypatch.setattr(runner.rollout, "stream", stream)
    with pytest.raises(UserError, match="the sampler's turn"):
        suite = types.SimpleNamespace(name="x")
        cache = rollout.How(cache_gib=7.0, cache_dtype="int8")
        runner._sample_batch(small_student(cache=cache), suite, dataclasses.replace(HOW, slots=4), [], None)


@pytest.mark.parametrize("unsafe", [False, True])
def test_a_machine_without_a_sandbox_is_told_before_weights_are_read(tmp_path, monkeypatch, unsafe):
    """Programs are refused, unless --unsafe: then the evaluation goes on to the student."""

    def run(self, program, **_):
        if not self.unsafe:
            raise UserError("can't isolate programs")
        return [{"reason": "ok", "stdout": "", "detail": ""}]

    def load(cfg, checkpoint, **how):
        raise UserError("the student's turn")

    monkeypatch.setattr(sandbox.Sandbox, "run", run)
    monkeypatch.setattr(runner, "load_student", load)
    graders.shared.cache_clear()
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS["humaneval"]) + "\n")
    with pytest.raises(UserError, match="the student's turn" if unsafe else "can't isolate"):
        runner.run(
            None, HOW, checkpoint=None, benchmarks=[f"humaneval={path}"], limit=0, out=tmp_path / "out", unsafe=unsafe
        )  # fmt: skip
    graders.shared.cache_clear()


def test_a_folder_is_a_run_only_with_a_runs_config(whole, tmp_path):
    cfg, *_ = whole
    assert not trained_run.is_run(pathlib.Path(cfg.student.path))
    assert not trained_run.is_run(tmp_path)
    (tmp_path / "config.json").write_text('{"student": {}}')
    assert trained_run.is_run(tmp_path)
    with pytest.raises(UserError, match="no checkpoint yet"):
        runner.load_student(cfg, str(tmp_path))


def test_the_command_says_what_is_missing_in_one_line():
    done = subprocess.run(
        [tiny.PYTHON, "-m", "omniopd_jax.evaluate", "--config=configs/tiny.py", "--benchmarks=math501"],
        cwd=tiny.REPO, env=tiny.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == done.stderr.splitlines()[-1:]
    assert "'math501'" in done.stderr
