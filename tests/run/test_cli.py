"""The command line and the recipes: every mistake is one line that names the thing, the place and what is allowed."""

import importlib.util
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import pytest
import tiny

from omniopd_jax import config, objective, similarity, teachers
from omniopd_jax.errors import UserError
from omniopd_jax.parallel import sharding
from omniopd_jax.run import cli, preflight, setup, validation
from omniopd_jax.teachers import simulated

CONFIGS = sorted((tiny.REPO / "configs").glob("*.py"))
SOURCES = [p for p in (tiny.REPO / "omniopd_jax").rglob("*.py") if p.name != "config.py"]

GOOD = '{"prompt": "What is 1 + 1?"}\n'


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Prompt files and recipes, right and wrong, beside tiny models."""
    folder = tmp_path_factory.mktemp("cli")
    student, teacher = tiny.make_folders(folder)
    (folder / "broken.jsonl").write_text(
        "".join(f'{{"prompt": "question {i}"}}\n' for i in range(6)) + '{"prompt": "x"\n' + GOOD
    )
    (folder / "empty.jsonl").write_text("")
    (folder / "long.jsonl").write_text(GOOD + json.dumps({"prompt": "word " * 200, "id": "the-long-one"}) + "\n")
    held = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "word " * 200, "answer": "2", "id": "the-long-one"}]
    (folder / "long_held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    (folder / "good.jsonl").write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(8)))
    body = "from omniopd_jax import config\n\n\ndef get_config(arg=None):\n    c = config.default()\n    {}\n    return c\n"
    for name, line in {
        "unknown_key": "c.audit.num_chunk = 3",
        "wrong_type": "c.num_steps = 'many'",
        "syntax": "c.num_steps = = 3",
        "wrong_value": "c.audit.selection = 'best'",
        "missing_import": "import no_such_module",
    }.items():
        (folder / f"{name}.py").write_text(body.format(line))
    return {"folder": folder, "student": student, "teacher": teacher, "number": itertools.count()}


def base(files, **more) -> list[str]:
    """A recipe whose models and prompts are there, so that only what `more` says can be wrong."""
    run_dir = files["folder"] / "runs" / str(next(files["number"]))
    values = tiny.overrides(files["student"], files["teacher"], run_dir)
    return tiny.arguments(values | {"data.num_prompts": 8, "num_steps": 1} | more)


def jsonl(files, name, **more) -> list[str]:
    return base(files, **{"data.source": "jsonl", "data.path": str(files["folder"] / name)} | more)


CASES = {  # name -> (arguments, what the line must hold)
    "unknown key": (lambda f: base(f, **{"audit.num_chunk": 3}), ["audit.num_chunk", "audit.num_chunks"]),
    "unknown top key": (lambda f: base(f, num_step=3), ["num_step", "num_steps"]),
    "unknown section": (lambda f: base(f, **{"audits.num_chunks": 3}), ["audits.num_chunks", "audit.num_chunks"]),
    "unknown key in a recipe": (
        lambda f: [f"--config={f['folder']}/unknown_key.py"],
        ["unknown_key.py", "num_chunk", "num_chunks"],
    ),
    "unknown flag": (lambda f: [*base(f), "--confg=x"], ["confg"]),
    "stray argument": (lambda f: [*base(f), "train"], ["'train'", "--config."]),
    "no recipe at all": (lambda f: [], ["--config", "configs/tiny.py"]),
    "missing recipe": (lambda f: ["--config=configs/nowhere.py"], ["configs/nowhere.py", "no such file"]),
    "unknown variant": (lambda f: ["--config=configs/math.py:no_ancor"], ["no_ancor", "no_anchor", "m5", "rouge1"]),
    "recipe with a syntax error": (lambda f: [f"--config={f['folder']}/syntax.py"], ["syntax.py", "6"]),
    "recipe with a missing import": (
        lambda f: [f"--config={f['folder']}/missing_import.py"],
        ["missing_import.py", "no_such_module"],
    ),
    "wrong type": (lambda f: base(f, num_steps="many"), ["num_steps", "many"]),
    "wrong type, fraction": (lambda f: base(f, **{"audit.chunk_tokens": 2.5}), ["audit.chunk_tokens", "2.5"]),
    "wrong type, bool": (lambda f: base(f, **{"audit.shuffle_texts": "perhaps"}), ["audit.shuffle_texts", "perhaps"]),
    "wrong type in a recipe": (lambda f: [f"--config={f['folder']}/wrong_type.py"], ["wrong_type.py", "num_steps"]),
    "wrong value in a recipe": (
        lambda f: [f"--config={f['folder']}/wrong_value.py"],
        ["audit.selection", "'best'", "peak", "random"],
    ),
    "unknown objective": (
        lambda f: base(f, **{"objective.name": "ppo"}),
        ["objective.name", "'ppo'", *objective.OBJECTIVES],
    ),
    "unknown teacher": (
        lambda f: base(f, **{"teacher.provider": "oracle"}),
        ["teacher.provider", "'oracle'", *teachers.TEACHERS],
    ),
    "unknown similarity": (
        lambda f: base(f, **{"audit.similarity": "bleu"}),
        ["audit.similarity", "'bleu'", *similarity.SIMILARITIES],
    ),
    "unknown data source": (
        lambda f: base(f, **{"data.source": "web"}),
        ["data.source", "'web'", "world", "jsonl", "hub"],
    ),
    "unknown world": (lambda f: base(f, **{"data.name": "narnia"}), ["data.name", "'narnia'", "forks"]),
    "unknown split": (lambda f: base(f, **{"data.split": "dev"}), ["data.split", "'dev'", "train", "test"]),
    "unknown hub data set": (
        lambda f: base(f, **{"data.source": "hub", "data.name": "no-such-org/no-such-set"}),
        ["data.name", "no-such-org/no-such-set", "data.source"],
    ),
    "unknown grader": (
        lambda f: base(f, **{"eval.grader": "taste", "eval.num_prompts": 4}),
        ["eval.grader", "'taste'", "world"],
    ),
    "unknown reward grader": (
        lambda f: base(f, **{"reward.grader": "taste", "objective.name": "grpo"}),
        ["reward.grader", "'taste'", "world"],
    ),
    "no grader for answers from a file": (
        lambda f: jsonl(f, "good.jsonl", **{"eval.num_prompts": 2}),
        ["eval.grader", "empty", "math"],
    ),
    "a bucket as run_dir": (
        lambda f: base(f, run_dir="s3://bucket/run"),
        ["run_dir", "s3://bucket/run", "gs://BUCKET/PATH"],
    ),
    "a file beside the small world": (
        lambda f: base(f, **{"data.path": str(f["folder"] / "good.jsonl")}),
        ["data.path", "good.jsonl", "data.source = 'jsonl'"],
    ),
    "a held-out file beside the small world": (
        lambda f: base(f, **{"eval.path": str(f["folder"] / "good.jsonl"), "eval.num_prompts": 4}),
        ["eval.path", "data.source = 'world'", "data.source = 'jsonl' or data.source = 'hub'"],
    ),
    "a file beside the hub": (
        lambda f: base(f, **{"data.source": "hub", "data.name": "o/d", "data.path": "prompts.jsonl"}),
        ["data.path = 'prompts.jsonl'", "data.source = 'hub'", "set data.path = ''", "data.source = 'jsonl'"],
    ),
    "a slip in what may differ": (
        lambda f: base(f, **{"resume.allow": "('optimzer.learning_rate',)"}),
        ["resume.allow", "optimzer.learning_rate", "optimizer.learning_rate"],
    ),
    "grpo with one generation": (
        lambda f: base(f, **{"objective.name": "grpo", "num_generations": 1}),
        ["num_generations = 1", "2 or more"],
    ),
    "broken line 7": (lambda f: jsonl(f, "broken.jsonl"), ["broken.jsonl", "line 7"]),
    "empty prompt set": (lambda f: jsonl(f, "empty.jsonl"), ["empty.jsonl", "no prompts"]),
    "missing prompt file": (lambda f: jsonl(f, "nowhere.jsonl"), ["data.path", "nowhere.jsonl"]),
    "missing held-out file": (
        lambda f: jsonl(
            f, "good.jsonl", **{"eval.num_prompts": 2, "eval.path": "/nowhere.jsonl", "eval.grader": "math"}
        ),
        ["eval.path", "/nowhere.jsonl"],
    ),
    "held-out prompts without answers": (
        lambda f: jsonl(
            f,
            "good.jsonl",
            **{"eval.num_prompts": 2, "eval.path": str(f["folder"] / "good.jsonl"), "eval.grader": "math"},
        ),
        ["answer", "good.jsonl"],
    ),
    "prompt too long": (
        lambda f: jsonl(f, "long.jsonl", **{"data.overlong": "error"}),
        ["'the-long-one'", "max_prompt_length = 160", "data.overlong"],
    ),
    "held-out prompt too long": (
        lambda f: jsonl(
            f,
            "good.jsonl",
            **{"eval.num_prompts": 99, "eval.path": str(f["folder"] / "long_held.jsonl"), "eval.grader": "math"},
        ),
        ["'the-long-one'", "max_prompt_length = 160", "eval.overlong = 'drop'"],
    ),
    "empty held-out set": (
        lambda f: jsonl(
            f,
            "good.jsonl",
            **{"eval.num_prompts": 99, "eval.path": str(f["folder"] / "empty.jsonl"), "eval.grader": "math"},
        ),
        ["no prompts in eval.path", "empty.jsonl"],
    ),
    "all prompts too long": (lambda f: base(f, max_prompt_length=3), ["max_prompt_length = 3"]),
    "chunk longer than a response": (
        lambda f: base(f, **{"audit.chunk_tokens": 25}),
        ["audit.chunk_tokens = 25", "max_completion_length = 24", "1 to 24"],
    ),
    "missing student": (lambda f: base(f, **{"student.path": "/no/student"}), ["student.path", "/no/student"]),
    "missing teacher": (lambda f: base(f, **{"teacher.model": "/no/teacher"}), ["teacher.model", "/no/teacher"]),
    "no teacher model": (lambda f: base(f, **{"teacher.model": ""}), ["teacher.model"]),
    "negative seed": (lambda f: base(f, seed=-1), ["seed", "-1"]),
    "mesh of no devices": (lambda f: base(f, **{"mesh.data": 0}), ["mesh", "0"]),
    "rows that do not divide": (lambda f: base(f, micro_batches=3), ["micro_batches", "3"]),
    "a reward for one response a prompt": (
        lambda f: base(f, **{"reward.coef": 1.0, "num_generations": 1}),
        ["num_generations = 1", "reward.coef = 1.0"],
    ),
    "parts that do not divide": (lambda f: base(f, **{"rollout.parts": 5}), ["rollout.parts", "5", "4"]),
    "top_p of zero": (lambda f: base(f, top_p=0.0), ["top_p", "0.0"]),
    "no continuations": (
        lambda f: base(f, **{"audit.num_continuations": 0}),
        ["audit.num_continuations", "at least 1"],
    ),
    "embedding without a model": (lambda f: base(f, **{"audit.similarity": "embedding"}), ["audit.embedding_model"]),
    "math recipe without its hub": (lambda f: ["--config=configs/math.py"], ["student.path", "Qwen/Qwen3-1.7B"]),
}


@pytest.fixture(scope="module")
def ended(files):
    """Every case run as a command, in one go."""
    cases = {name: make(files) for name, (make, _) in CASES.items()}
    several = {"student.path": "/no/student", "teacher.model": "/no/teacher", "data.name": "narnia"}
    cases["several mistakes"] = base(files, **several)
    paid = {"teacher.provider": "anthropic", "teacher.model": "claude-haiku-4-5", "student.path": "/no/student"}
    dear = base(
        files, **paid, num_steps=500, prompts_per_step=64, **{"audit.num_chunks": 10, "audit.num_continuations": 10}
    )
    cases |= {"estimate": [*dear, "--estimate"], "dear": dear, "dear, --yes": [*dear, "--yes"]}
    return dict(zip(cases, tiny.commands(list(cases.values()), limit=300)))


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_that_names_it(ended, name):
    got, (_, words) = ended[name], CASES[name]
    assert got.code not in (0, 75)
    assert got.errors, f"no error line in: {(got.err or got.out)[-2000:]}"
    assert "Traceback" not in got.err + got.out
    if name != "math recipe without its hub":  # there the data and the teacher are missing too, a line each
        assert len(got.errors) == 1
    missing = [w for w in words if w not in got.errors[0]]
    assert not missing, f"{missing} not in: {got.errors[0]}"
    assert len(got.errors[0]) < 600


def test_nothing_was_trained(ended, files):
    assert not list(files["folder"].glob("runs/*/checkpoints/*"))


def test_the_math_recipe_says_all_that_cannot_be_reached(ended):
    """Model, data and teacher: one run tells of all three."""
    said = " ".join(ended["math recipe without its hub"].errors)
    for word in ("student.path", "data.name", "OPENAI_API_KEY"):
        assert word in said


def test_several_mistakes_are_told_at_once(ended):
    named = [re.search(r"(student\.path|teacher\.model|data\.name)", e)[1] for e in ended["several mistakes"].errors]
    assert sorted(named) == ["data.name", "student.path", "teacher.model"]


def test_an_estimate_is_printed_without_weights_and_without_a_call(ended):
    """The student's folder does not exist and there is no key: neither is looked for."""
    got = ended["estimate"]
    assert got.code == 0 and got.err == ""
    for word in ("calls", "tokens in", "dollars", "hours", "low", "middle", "high", "no cap is set"):
        assert word in got.out


def test_a_dear_run_without_a_cap_needs_to_be_confirmed(ended):
    """Exit code 2 with the table; nothing waits for an answer at the terminal. With --yes the run's own checks
    follow."""
    got = ended["dear"]
    assert (
        got.code == 2 and "middle" in got.err and "--yes" in got.errors[-1] and "budget.confirm_usd" in got.errors[-1]
    )
    passed = ended["dear, --yes"]
    assert passed.code == 2 and "/no/student" in passed.err and "--yes" not in passed.err


def test_the_real_command_and_its_traceback_on_demand(files):
    """Through `python -m`, as a person types it: one line; with --verbosity=1 the traceback above it."""
    wrong = base(files, **{"audit.similarity": "bleu"})
    runs = [tiny.start(args) for args in (wrong, [*wrong, "--verbosity=1"])]
    (out, err), (_, loud) = (run.communicate(timeout=120) for run in runs)
    assert [run.returncode for run in runs] == [2, 2]
    assert err.strip().count("\n") == 0
    assert err.startswith("error: audit.similarity = 'bleu'")
    assert out == ""
    assert "Traceback" in loud
    assert "error: audit.similarity = 'bleu'" in loud


def test_help_shows_the_flag():
    done = tiny.start(["--help"])
    out, err = done.communicate(timeout=120)
    assert "--config" in out
    assert "Traceback" not in err


# --- the recipes
# --------------------------------------------------------------------------------------------------------


def recipe(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variants():
    for path in CONFIGS:
        yield path, None
        yield from ((path, name) for name in getattr(recipe(path), "VARIANTS", {}))


@pytest.mark.parametrize(("path", "variant"), list(variants()), ids=lambda x: getattr(x, "stem", x) or "")
def test_every_recipe_and_variant_loads_and_is_valid(path, variant):
    c = recipe(path).get_config(variant)
    validation.validate(c)
    assert config.flat(c).keys() == config.flat(config.default()).keys()
    if variant:
        assert c.run_dir == f"{recipe(path).get_config().run_dir}-{variant}", "another run has a folder of its own"
        plain = config.flat(recipe(path).get_config())
        changed = {k for k, v in config.flat(c).items() if plain[k] != v}
        assert changed - {"run_dir"} == set(recipe(path).VARIANTS[variant]), (
            "a variant changes what it says, and nothing that was so already"
        )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_rows_of_every_recipe_and_variant_fit_its_hardware(path):
    """4 and 8 chips, as the cards have them; one for what runs on two cores."""
    sizes = (1,) if path.stem in ("tiny", "smollm2") else (4, 8)
    for variant in (None, *getattr(recipe(path), "VARIANTS", {})):
        for size in sizes:
            c = recipe(path).get_config(variant)
            preflight.check_rows(sharding.make_mesh({"data": 1, "fsdp": size, "tp": 1}, jax.devices()[:size]), c)


def test_shuffled_texts_need_two_prompts_on_each_host(monkeypatch):
    c, mesh = (
        recipe(tiny.REPO / "configs" / "tiny.py").get_config(),
        sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1]),
    )
    c.audit.shuffle_texts, c.prompts_per_step = True, 2
    preflight.check_rows(mesh, c)
    monkeypatch.setattr(preflight.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="two prompts on each of 2 process"):
        preflight.check_rows(mesh, c)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_is_an_experiment_card(path):
    """Its docstring has the command, which names the recipe itself, and the hardware."""
    card = recipe(path).__doc__
    assert f"--config=configs/{path.name}" in card
    assert "Hardware:" in card


def test_the_ablations_are_arguments_of_the_math_recipe():
    math = recipe(tiny.REPO / "configs" / "math.py")
    flat = {name: config.flat(math.get_config(name)) for name in
            ("no_anchor", "random_chunks", "no_smoothing", "m5", "c25", "c100", "alpha5", "rouge1")}  # fmt: skip
    assert flat["no_anchor"]["anchor.kl_coef"] == 0
    assert flat["random_chunks"]["audit.selection"] == "random"
    assert flat["no_smoothing"]["prior.alpha"] == 0
    assert flat["m5"]["audit.num_chunks"] == 5
    assert flat["c25"]["audit.chunk_tokens"] == 25
    assert flat["c100"]["audit.chunk_tokens"] == 100
    assert flat["alpha5"]["prior.alpha"] == 5
    assert flat["rouge1"]["audit.similarity"] == "rouge1"
    both = config.flat(math.get_config("m5,c100"))
    assert (both["audit.num_chunks"], both["audit.chunk_tokens"]) == (5, 100)


def test_the_math_recipe_is_the_published_method_but_for_the_baseline():
    """method.md, section 3, and what docs/choosing.md found."""
    math = recipe(tiny.REPO / "configs" / "math.py")
    default, c = config.flat(math.get_config()), config.flat(math.get_config("published"))
    assert {k: v for k, v in default.items() if v != c[k]} == {
        "objective.advantage": "batch_mean",
        "run_dir": "runs/math",
    }
    published = {
        "audit.num_chunks": 10, "audit.num_continuations": 10, "audit.chunk_tokens": 50, "prior.alpha": 1.0,
        "anchor.kl_coef": 0.1, "anchor.scope": "unaudited", "audit.similarity": "edit", "audit.selection": "peak",
        "temperature": 1.0, "top_p": 1.0, "teacher.temperature": 1.0, "teacher.top_p": 1.0, "objective.name": "omniopd",
        "objective.advantage": "none", "objective.normalizer": "constant", "optimizer.learning_rate": 1e-6,
        "prompts_per_step": 64, "num_generations": 4, "max_prompt_length": 1024, "max_completion_length": 7168,
    }  # fmt: skip
    assert {k: c[k] for k in published} == published


def test_every_key_is_read_by_some_code():
    """No key without a reader: `cfg.section.key`, or the section under a short name (`o.key`, `fields.key`)."""
    text = "\n".join(p.read_text() for p in SOURCES)
    keys = list(config.flat(config.default()))
    unread = []
    for key in keys:
        section, _, leaf = key.rpartition(".")
        owner = section.rpartition(".")[2]
        direct = rf"\b{owner}\.{leaf}\b" if owner else rf"\b(cfg|c|_CONFIG\.value)\.{leaf}\b"
        alias = rf"^\s+(\w+) = (?:\w+\.)*{owner}$" if owner else "(?!)"
        names = set(re.findall(alias, text, re.M))
        if not re.search(direct, text) and not any(re.search(rf"\b{n}\.{leaf}\b", text) for n in names):
            unread.append(key)
    unread = [k for k in unread if not (k.startswith("mesh.") and "sizes[a] for a in AXES" in text)]
    own = ("audit.min_continuations", "local_dir")  # config.min_continuations and config.local_folder read them
    unread = [k for k in unread if k not in own]
    assert not unread


def test_every_key_says_what_it_is():
    assert sorted(k for k, _, what in config.describe() if what) == sorted(config.flat(config.default()))


def test_defaults_are_valid_and_locked():
    c = config.default()
    validation.validate(c)
    with pytest.raises(KeyError):
        c.update_from_flattened_dict({"audit.nothing": 1})
    c.student.chat_template_kwargs.enable_thinking = False  # the one place where keys may be added


def test_flags_set_keys_that_the_recipe_does_not_have_where_any_may_be():
    own = ["main", "--config.student.chat_template_kwargs.enable_thinking=False", "--config.objective.mix.omniopd=1",
           "--config.teacher.chat_template_kwargs.effort=low", "--config.num_steps=3"]  # fmt: skip
    rest, pairs = cli._set_here(own)
    assert rest == ["main", "--config.num_steps=3"]
    c = config.default()
    for path, text in pairs:
        config.set_open(c, path, text)
    assert c.student.chat_template_kwargs.to_dict() == {"enable_thinking": False}
    assert c.objective.mix.to_dict() == {"omniopd": 1} and c.teacher.chat_template_kwargs.effort == "low"
    for text, value in (("FALSE", False), ("1", True), ("true", True)):
        config.set_open(c, "student.chat_template_kwargs.enable_thinking", text)
        assert c.student.chat_template_kwargs.enable_thinking is value
    config.set_open(c, "teacher.chat_template_kwargs.effort", "2")
    assert c.teacher.chat_template_kwargs.effort == "2"
    for path, text in (("student.chat_template_kwargs.enable_thinking", "maybe"), ("objective.mix.a.b", "1")):
        with pytest.raises(UserError, match=path.replace(".", r"\.")):
            config.set_open(c, path, text)


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_k": 1}])
def test_responses_that_are_all_the_same_are_not_compared(how):
    c = config.default()
    c.update_from_flattened_dict({"objective.name": "grpo", "num_generations": 4, "reward.grader": "math"} | how)
    with pytest.raises(UserError, match="samples the same response 4 times.*nothing would be learned"):
        validation.validate(c)
    c.objective.name = "omniopd"
    validation.validate(c)


@pytest.mark.parametrize("value", [-1, 0])
def test_least_values(value):
    for key in ("prompts_per_step", "num_generations", "micro_batches", "audit.num_chunks", "checkpoint.every"):
        c = config.default()
        c.update_from_flattened_dict({key: value})
        with pytest.raises(UserError, match=rf"{key} = {value} must be at least 1"):
            validation.validate(c)


@pytest.mark.parametrize("key", ["prior.alpha", "anchor.kl_coef", "optimizer.learning_rate", "temperature"])
def test_a_value_that_is_no_number_is_refused(key):
    c = config.default()
    c.update_from_flattened_dict({key: float("nan")})
    with pytest.raises(UserError, match=key):
        validation.validate(c)


IMPOSSIBLE = {
    "optimizer.b1": (1.5, 1.0, -0.1), "optimizer.b2": (-1.0, 1.0), "optimizer.eps": (-1.0, 0.0),
    "optimizer.weight_decay": (-3.0,), "optimizer.warmup_steps": (-5,), "objective.clip": (-1.0,),
    "reward.coef": (-2.0,), "temperature": (math.inf,), "optimizer.learning_rate": (math.inf,),
    "anchor.kl_coef": (math.inf,), "budget.usd": (math.inf,), "objective.constant": (math.nan, -math.inf),
    "lora.alpha": (math.nan,), "teacher.budget_share": (1.5, -0.1), "teacher.price_input": (math.inf,),
    "eval.stop_below": (33.0,), "teacher.timeout_s": (math.inf,),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in IMPOSSIBLE.items() for v in values])
def test_impossible_values_are_refused(key, value):
    c = config.default()
    c.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=rf"^{key} = {value} must be "):
        validation.validate(c)


def test_values_at_the_bounds_are_taken():
    c = config.default()
    c.update_from_flattened_dict({
        "optimizer.b1": 0.0, "optimizer.b2": 0.0, "optimizer.eps": 1.0, "objective.clip": 0.0, "reward.coef": 1.0,
        "objective.constant": -1.0, "optimizer.weight_decay": 0.1, "eval.num_prompts": 4, "eval.every": 1,
        "eval.stop_below": 1.0, "teacher.budget_share": 1.0, "optimizer.learning_rate": 0.0,
    })  # fmt: skip
    validation.validate(c)


def test_a_named_teacher_s_number_must_be_finite_too():
    c = config.default()
    c.teachers.update({"a": {"model": "m", "temperature": math.inf}})
    with pytest.raises(UserError, match=r"teachers\.a\.temperature = inf must be a finite number"):
        validation.validate(c)


def test_n_min_is_half_of_n_rounded_up():
    for n, n_min, expected in ((10, 0, 5), (5, 0, 3), (1, 0, 1), (10, 2, 2)):
        c = config.default()
        c.audit.num_continuations, c.audit.min_continuations = n, n_min
        assert config.min_continuations(c) == expected


def test_float32_products_are_asked_for_and_bfloat16_ones_left_alone():
    """In a process of its own: the setting is the whole process's."""
    code = "import jax; from omniopd_jax.run import cli; from absl import flags; flags.FLAGS(['x'])\n"
    for dtype in ("bfloat16", "float32"):
        code += f"cli.setup_jax({dtype!r}); print(jax.config.jax_default_matmul_precision)\n"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tiny.REPO)
    assert out.stdout.split() == ["None", "highest"]


def test_settings_of_the_teacher_that_surprise_are_said():
    """A greedy teacher, and continuations that are cut because nobody said whose tokenizer it is."""
    teacher = simulated.SimulatedTeacher(["a"], [1.0])
    teacher.foreign_tokenizer = True
    c = config.default()
    c.teacher.provider, c.teacher.temperature = "openai", 0.0
    greedy, cut = setup.remarks(c, teacher)
    assert "teacher.temperature = 0" in greedy and "set teacher.tokenizer to student.path" in cut
    c.teacher.temperature, c.teacher.tokenizer = 1.0, "folder"
    assert setup.remarks(c, teacher) == []
    c.objective.name = "sft"
    c.teacher.temperature = 0.0
    assert setup.remarks(c, teacher) == []
