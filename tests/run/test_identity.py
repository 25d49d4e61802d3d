"""What makes a resumed run the same run: settings, and what is read under the same names."""

import datetime
import json

import pytest
import tiny

from omniopd_jax import config
from omniopd_jax.data.prompts import Prompt, Prompts
from omniopd_jax.errors import UserError
from omniopd_jax.run import identity

DIGESTS = {"the training prompts": "a", "the student's chat template": "b"}


def recipe(**more):
    return tiny.recipe("student", "teacher", "runs/x", **more)


@pytest.fixture
def written(tmp_path):
    """config.json of a run with the plain recipe."""
    file = tmp_path / "config.json"
    identity.write(recipe(), DIGESTS, file)
    return file


@pytest.mark.parametrize(
    "change",
    [
        {"objective.name": "grpo"},
        {"objective.advantage": "batch_mean"},
        {"audit.num_chunks": 1},
        {"anchor.kl_coef": 0.2},
        {"teacher.model": "other"},
        {"teacher.temperature": 0.5},
        {"optimizer.learning_rate": 1e-4},
        {"seed": 3},
        {"student.path": "other"},
        {"prior.alpha": 2.0},
        {"temperature": 0.7},
        {"data.num_prompts": 5},
        {"lora.rank": 4},
        {"eval.num_prompts": 9},
        {"reward.coef": 0.5},
        {"max_staleness": 1},
        {"objective.clip": 0.3},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_setting_that_changes_results_is_named(written, change):
    key = next(iter(change))
    with pytest.raises(UserError, match=rf"{key} was .*, is .*resume\.allow"):
        identity.check_same_run(recipe(**change), DIGESTS, written)
    identity.check_same_run(recipe(**change, **{"resume.allow": (key,)}), DIGESTS, written)
    identity.check_same_run(recipe(**change, **{"resume.allow": (key.split(".")[0],)}), DIGESTS, written)


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 9},
        {"checkpoint.every": 7},
        {"log.tensorboard": True},
        {"eval.every": 1},
        {"audit.log_per_step": 8},
        {"data.overlong": "error"},
        {"budget.usd": 5.0},
        {"teacher.max_concurrency": 2},
        {"teacher.timeout_s": 9.0},
        {"teacher.replay": "only"},
        {"mesh.fsdp": 1},
        {"micro_batches": 2},
        {"profile.steps": "1:2"},
        {"teacher.base_url": "http://other:1/v1"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_setting_that_changes_no_result_may_change(written, change):
    identity.check_same_run(recipe(**change), DIGESTS, written)


def test_the_number_of_steps_is_fixed_where_the_schedule_reads_it(tmp_path):
    file = tmp_path / "config.json"
    identity.write(recipe(**{"optimizer.schedule": "linear"}), DIGESTS, file)
    with pytest.raises(UserError, match="num_steps was 2, is 9"):
        identity.check_same_run(recipe(**{"optimizer.schedule": "linear", "num_steps": 9}), DIGESTS, file)


def test_inputs_that_changed_under_the_same_name_are_named(written):
    changed = DIGESTS | {"the training prompts": "other"}
    with pytest.raises(UserError, match="the training prompts has changed"):
        identity.check_same_run(recipe(), changed, written)
    identity.check_same_run(recipe(**{"resume.allow": ("the training prompts",)}), changed, written)


def test_a_run_of_an_earlier_version_goes_on(written, capsys):
    """Removed keys at their default are left out, new ones had their default, and inputs get their digests."""
    old = json.loads(written.read_text())
    old.pop("digests")
    old["teacher"] |= {"hedge_s": 0.0, "lanes": 3}
    old["reward"]["grader"] = "world"
    del old["resume"], old["eval"]["suffix"]
    written.write_text(json.dumps(old))
    identity.check_same_run(recipe(), DIGESTS, written)
    said = capsys.readouterr().out
    assert "teacher.lanes" in said and "hedge_s" not in said and "from before inputs were compared" in said
    with pytest.raises(UserError, match="eval.suffix was '', is 'x'"):
        identity.check_same_run(recipe(**{"eval.suffix": "x"}), DIGESTS, written)


def test_keys_that_nothing_read_do_not_keep_an_old_run_from_going_on(tmp_path):
    """Earlier versions took data.name beside a file, and eval.path beside the hub, and read neither."""
    file = tmp_path / "config.json"
    from_file = {"data.source": "jsonl", "data.path": "p.jsonl"}
    identity.write(recipe(**from_file), DIGESTS, file)  # its data.name is forks
    identity.check_same_run(recipe(**from_file, **{"data.name": ""}), DIGESTS, file)
    identity.check_same_run(recipe(**from_file), DIGESTS, file)  # with the name that it had
    from_hub = {"data.source": "hub", "data.name": "o/d"}
    identity.write(recipe(**from_hub, **{"eval.path": "x"}), DIGESTS, file)
    with pytest.raises(UserError, match="eval.path was 'x', is ''"):
        identity.check_same_run(recipe(**from_hub), DIGESTS, file)
    old = json.loads(file.read_text())
    del old["eval"]["overlong"]
    file.write_text(json.dumps(old))
    identity.check_same_run(recipe(**from_hub), DIGESTS, file)
    with pytest.raises(UserError, match="eval.path was '', is 'x'"):
        identity.check_same_run(recipe(**from_hub, **{"eval.path": "x"}), DIGESTS, file)


def test_what_resume_may_allow_is_known():
    for name in ("seed", "optimizer", "optimizer.", "teacher.price_", "teachers", "teachers.a.model", "reward",
                 "rollout_groups", "the training prompts", "the prompts of eval.sets 'x'"):  # fmt: skip
        identity.check_allowed(recipe(**{"resume.allow": (name,)}))
    for name in ("sed", "optimzer.learning_rate", "the weather", ""):
        with pytest.raises(UserError, match=f"resume.allow: unknown config key '{name}'"):
            identity.check_allowed(recipe(**{"resume.allow": (name,)}))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": ' * 50_000, "null"])
def test_a_damaged_config_is_one_line_that_says_how_to_go_on(written, text):
    written.write_text(text)
    with pytest.raises(UserError, match="remove it to go on") as caught:
        identity.check_same_run(recipe(), DIGESTS, written)
    assert "\n" not in str(caught.value)


def test_digests_see_a_line_put_in_front_and_a_weight_that_changed(tmp_path):
    one, two = Prompt("1", ({"role": "user", "content": "a"},)), Prompt("2", ({"role": "user", "content": "b"},))
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = bytearray(9_000_000)
    (folder / "model.safetensors").write_bytes(weights)
    c = config.default()
    c.student.path, c.teacher.provider = str(folder), "openai"
    first = identity.digests_of(c, Prompts([one, two]), None, "template")
    assert first == identity.digests_of(c, Prompts([one, two]), None, "template")
    moved = identity.digests_of(c, Prompts([two, one]), None, "other template")
    assert {k for k in first if first[k] != moved[k]} == {"the training prompts", "the student's chat template"}
    (folder / "model.safetensors").write_bytes(bytes(b + 1 for b in weights))
    retrained = identity.digests_of(c, Prompts([one, two]), None, "template")
    assert {k for k in first if first[k] != retrained[k]} == {"the student's folder (student.path)"}


def test_digests_see_solutions_and_the_files_of_a_teacher_s_prompt(tmp_path):
    for name in ("examples.txt", "teacher.jinja"):
        (tmp_path / name).write_text("one")
    c = config.default()
    c.student.path, c.teacher.provider, c.teacher.template = str(tmp_path), "openai", str(tmp_path / "teacher.jinja")
    c.teacher.preamble = str(tmp_path / "examples.txt")

    def digests(solution):
        prompt = Prompt("1", ({"role": "user", "content": "a"},), solution=solution)
        found = identity.digests_of(c, Prompts([prompt]), None, "template")
        return {k: v for k, v in found.items() if not k.startswith("the student's folder")}

    first = digests("It is 2.")
    assert first == digests("It is 2.") and not digests(None).keys() & {"the training prompts' solutions"}
    (tmp_path / "examples.txt").write_text("two")
    (tmp_path / "teacher.jinja").write_text("two")
    then = digests("It is 3.")
    assert {k for k in first if first[k] != then[k]} == {
        "the training prompts' solutions", "the teacher's preamble (teacher.preamble)",
        "the teacher's template (teacher.template)",
    }  # fmt: skip
    for name in first:
        identity.check_allowed(recipe(**{"resume.allow": (name,)}))


def test_today_is_the_day_on_which_the_run_began(tmp_path):
    """A template that writes the date would give a run that goes on tomorrow other prompts."""
    file, c = tmp_path / "config.json", recipe()
    identity.settle_date(c, file)
    assert c.data.date == datetime.date.today().isoformat()
    identity.write(recipe(**{"data.date": "2026-01-02"}), DIGESTS, file)
    identity.settle_date(later := recipe(), file)
    assert later.data.date == "2026-01-02"
    identity.check_same_run(later, DIGESTS, file)
    identity.settle_date(told := recipe(**{"data.date": "2026-01-03"}), file)
    with pytest.raises(UserError, match="data.date was '2026-01-02', is '2026-01-03'"):
        identity.check_same_run(told, DIGESTS, file)
    old = json.loads(file.read_text())
    del old["data"]["date"]
    file.write_text(json.dumps(old))
    identity.settle_date(c := recipe(), file)
    assert c.data.date == ""
    identity.check_same_run(c, DIGESTS, file)


def test_processes_that_read_different_inputs_are_told_which(monkeypatch):
    same = {"the training prompts": "1", identity.STUDENT: "2"}
    monkeypatch.setattr(identity.processes, "gather", lambda name, value: [value, same])
    identity.check_same_inputs(same)
    for other in (same | {identity.STUDENT: "3"}, {"the training prompts": "1"}):
        with pytest.raises(UserError, match=r"different inputs: the student's folder \(student.path\): give all hosts"):
            identity.check_same_inputs(other)
