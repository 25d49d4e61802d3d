"""Teachers by row: who is asked what, each within its part of the caps; a whole run with two, resumed and replayed."""

import asyncio
import contextlib
import json

import pytest
import teacher_runs
import tiny
from teacher_kit import cfg_for, request, teacher_of
from wire_server import WireServer

from omniopd_jax import config, world
from omniopd_jax.data import prompts as data
from omniopd_jax.errors import UserError
from omniopd_jax.run import estimate, identity, validation
from omniopd_jax.teachers import TeacherStopped, budget, by_row
from omniopd_jax.teachers.journal import Journal


def named(c, **sections):
    c.teachers.update(sections)
    return c


def test_a_named_teacher_is_the_teacher_with_what_differs():
    c = named(config.default(), a={"model": "x", "budget_share": 0.25, "temperature": 0.5}, b={"provider": "openai"})
    c.update_from_flattened_dict({"teacher.model": "y", "budget.calls": 101, "budget.usd": 1.0})
    a, b = by_row.configs(c).values()
    assert (a.teacher.model, a.teacher.temperature, b.teacher.model, b.teacher.provider) == ("x", 0.5, "y", "openai")
    assert (a.budget.calls, b.budget.calls, a.budget.usd, b.budget.usd) == (25, 75, 0.25, 0.75)
    assert a.teacher.journal == "runs/default/journal/a" and not a.teachers
    validation.validate(c)


@pytest.mark.parametrize(
    "sections,said",
    [
        ({"a": {"modle": "x"}}, r"unknown config key 'teachers\.a\.modle'; nearest known: .*teachers\.a\.model"),
        ({"a": {"temperature": -1.0}}, r"teachers\.a\.temperature = -1\.0 must be at least 0"),
        ({"a": {"provider": "b"}}, r"teachers\.a\.provider = 'b' is unknown"),
        ({"a": {"top_p": "high"}}, r"teachers\.a\.top_p = 'high' is of another type"),
        ({"a": {"journal": "x"}}, r"teachers\.a\.journal: its journal is the folder 'a'"),
        ({"a b": {}}, r"teachers\.a b: a teacher's name is letters"),
        ({"a": {"budget_share": 1.0}, "b": {}}, r"leave something for those that name none"),
        ({"a": {"budget_share": 0.01}, "b": {}}, r"budget\.calls = 9 leaves nothing for teachers\.a"),
    ],
)
def test_a_wrong_section_is_one_line(sections, said):
    c = named(config.default(), **sections)
    c.budget.calls = 9
    with pytest.raises(UserError, match=said):
        validation.validate(c)


def test_flags_name_teachers_that_the_recipe_does_not_have():
    c = config.default()
    for path, text in (("a.model", "m"), ("a.temperature", "1"), ("a.pin_model", "true"), ("a.max_concurrency", "3")):
        by_row.set_by_flag(c, path, text)
    by_row.set_by_flag(c, "a.chat_template_kwargs.enable_thinking", "False")
    own = by_row.configs(c)["a"].teacher
    assert (own.model, own.temperature, own.pin_model, own.max_concurrency) == ("m", 1.0, True, 3)
    assert own.chat_template_kwargs.to_dict() == {"enable_thinking": False}
    for path, text in (("a.modle", "m"), ("a.max_concurrency", "many")):
        with pytest.raises(UserError, match=rf"teachers\.{path}|unknown config key 'teachers\.{path}'"):
            by_row.set_by_flag(c, path, text)


def rows_file(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(c, path):
    return data.load(c, source="jsonl", split="", path=path, count=0).prompts


def test_a_row_that_names_no_teacher_of_the_run_is_named_with_its_line(tmp_path):
    c = named(config.default(), a={}, b={})
    good = [{"prompt": "1", "teacher": "a"}, {"prompt": "1", "teacher": "b"}]
    assert [p.teacher for p in load(c, rows_file(tmp_path, good))] == ["a", "b"], "one prompt may have both"
    for row, said in (
        ({"prompt": "2", "teacher": "gpt"}, "`teacher` = 'gpt' is none"),
        ({"prompt": "2"}, "names none"),
    ):
        with pytest.raises(UserError, match=rf"rows\.jsonl, line 3: {said} of the run's teachers \(a, b\)"):
            load(c, rows_file(tmp_path, [*good, row]))
    c.data.fields.teacher = "who"
    assert load(c, rows_file(tmp_path, [{"prompt": "1", "teacher": "x", "who": "b"}]))[0].teacher == "b"
    plain = load(config.default(), rows_file(tmp_path, good))
    assert [p.teacher for p in plain] == [""], "a column of that name means nothing to a run with one teacher"


def two(servers, folder, **more):
    """A config with teachers a and b, each on a server of its own."""
    urls = {name: {"base_url": server.url("openai")} for name, server in servers.items()}
    return named(cfg_for("http://127.0.0.1:9/v1", "openai", folder, **more), **urls)


def test_each_request_goes_to_its_teacher_alone_and_no_part_of_a_cap_is_passed(tmp_path):
    async def run(c, requests):
        async with teacher_of(c) as teacher:
            teacher.take_rows(["a", "a", "a", "b"])
            out = await asyncio.gather(*(teacher.continue_text(r) for r in requests), return_exceptions=True)
            return out, teacher.metrics(), teacher.spent(), teacher.allowance(4, 8, 2, 4), teacher.forecast(4)

    asked = [request(f"{who}{i}", prefix=f"of {who} {i}", teacher=who) for i in range(6) for who in "ab"]
    with WireServer() as a, WireServer() as b:
        servers = {"a": a, "b": b}
        c = two(servers, tmp_path, **{"budget.calls": 12})
        c.teachers.b.temperature = 0.7
        c.teachers.a.budget_share = 0.75
        out, metrics, spent, allowed, forecast = asyncio.run(run(c, asked))
        for who, server in servers.items():
            bodies = [json.dumps(e["body"]) for e in server.calls()]
            assert bodies and all(f"of {who} " in body for body in bodies), "another teacher's row"
            assert {e["body"].get("temperature") for e in server.calls()} == {{"a": 1.0, "b": 0.7}[who]}
        stopped = [e for e in out if isinstance(e, TeacherStopped)]
        assert len(a.calls()) == 6 and len(b.calls()) == 3 and len(stopped) == 3, "a's part is 9 calls, b's 3"
        assert all("teachers.b: budget.calls = 3 is used up" in str(e) for e in stopped)
        assert metrics["teacher/calls"] == 9 == metrics["teacher/a/calls"] + metrics["teacher/b/calls"] == spent.calls
        assert metrics["teacher/b/calls"] == 3 and allowed == (2, 4)
        assert "teachers.a, 75% of the prompts" in forecast and "teachers.b, 25% of the prompts" in forecast
        for name in "ab":
            with contextlib.closing(Journal(tmp_path / "journal" / name)) as journal:
                assert journal.totals().calls == len(servers[name].calls())


def test_each_teacher_has_its_own_probe(tmp_path):
    async def check(c):
        async with teacher_of(c) as teacher:
            return await teacher.check(), teacher.report.table()

    with WireServer() as a, WireServer(extensions=set(), models=["other"]) as b:
        c = two({"a": a, "b": b}, tmp_path, **{"teacher.continuation": "auto"})
        c.teachers.b.model = "other"
        line, table = asyncio.run(check(c))
        assert "teachers.a: teacher 'm': continues by 'continue_final_message'" in line
        assert "teachers.b: teacher 'other': continues by 'instruct'" in line and "teachers.b\n" in table
        for name in "ab":
            assert (tmp_path / "teachers" / name / "teacher_probe.json").is_file()
        c.teachers.b.model = "gone"
        with pytest.raises(UserError, match=r"teachers\.b: teacher\.model = 'gone' is not served at"):
            asyncio.run(check(c))


def test_the_metrics_of_several_have_the_same_names_whoever_was_asked():
    """A step whose rows name the local teacher alone has no price in its own metrics."""
    local = {"teacher/calls": 3, "teacher/replayed_fraction": 0.0, "teacher/latency_p95": 0.1}
    paid = dict.fromkeys(local, 0) | {"teacher/price_known": 1, "teacher/cost_usd_total": 0.5}
    got = by_row._as_one([local, paid])
    assert got["teacher/price_known"] == 1 and got["teacher/cost_usd_total"] == 0.5 and got["teacher/calls"] == 3
    assert got.keys() == by_row._as_one([local | {"teacher/calls": 0}, paid | {"teacher/calls": 2}]).keys()


def test_the_estimate_of_several_teachers_names_each(tmp_path):
    c = named(
        cfg_for("", "anthropic", tmp_path, num_steps=10),
        dear={"model": "claude-opus-4-5"}, cheap={"model": "claude-haiku-4-5", "budget_share": 0.1},
    )  # fmt: skip
    found = estimate.previews(c, True)
    text = "\n".join(p.text() for p in found)
    assert "teachers.dear, taken to get 50% of the prompts" in text and "claude-haiku-4-5" in text
    alone = estimate.Preview(by_row.configs(c)["dear"], True)
    dear = next(p for p in found if p.name == "dear")
    assert dear.estimate.usd[1] == pytest.approx(alone.estimate.usd[1] / 2)
    c.budget.confirm_usd = dear.estimate.usd[1] * 1.05  # more than the dear one's, less than both
    with pytest.raises(UserError, match="--yes"):
        estimate.confirm(c, True)
    assert by_row.total([p.estimate for p in found]).usd[1] == pytest.approx(sum(p.estimate.usd[1] for p in found))
    c.teachers.dear.model = "of-tomorrow"
    assert estimate.price_state(c, True) == estimate.UNKNOWN and budget.listed_price("of-tomorrow") is None


def test_what_may_change_of_a_named_teacher_at_a_resume(tmp_path):
    c = named(
        config.default(), a={"model": "m", "base_url": "http://h:1/sk-0123456789abcdef", "budget_share": 0.5}, b={}
    )
    identity.write(c, {}, tmp_path / "config.json")
    c.teachers.a.base_url, c.teachers.a.budget_share = "http://h:2/v1", 0.25
    identity.check_same_run(c, {}, tmp_path / "config.json")
    assert "sk-0123456789abcdef" not in (tmp_path / "config.json").read_text()
    for section, said in (({"model": "n"}, "was 'm', is 'n'"), ({}, "was 'm', is ''")):
        c.teachers.a = section
        with pytest.raises(UserError, match=rf"teachers\.a\.model {said}"):
            identity.check_same_run(c, {}, tmp_path / "config.json")
    c.teachers = {"a": {"model": "m"}}
    with pytest.raises(UserError, match="teachers were a, b, are a"):
        identity.check_same_run(c, {}, tmp_path / "config.json")


@pytest.mark.slow  # four whole runs
def test_a_run_with_two_teachers_is_resumed_and_replayed_to_the_bit(tmp_path):
    problems = world.problems("forks", "train", 16)
    rows = [{"id": p.id, "prompt": p.prompt, "teacher": "ab"[i % 4 == 3]} for i, p in enumerate(problems)]
    who = {row["id"]: row["teacher"] for row in rows}
    runner = teacher_runs.Runner()
    with WireServer() as a, WireServer() as b, contextlib.closing(runner):
        settings = {
            "data.source": "jsonl", "data.name": "", "data.path": rows_file(tmp_path, rows), "num_steps": 4,
            "teacher.provider": "openai", "teacher.model": "m", "teacher.continuation": "continue_final_message",
            "teachers.a.base_url": a.url("openai"), "teachers.b.base_url": b.url("openai"),
            "teachers.a.budget_share": 0.5,
        }  # fmt: skip
        whole = runner.run(tmp_path / "whole", settings)
        assert whole.code == 0, whole.err[-3000:]
        audits = whole.audits()
        assert {r["teacher"] for r in audits} == {"a", "b"}
        assert all(r["teacher"] == who[r["prompt_id"]] for r in audits)
        text = {row["teacher"]: {x["prompt"] for x in rows if x["teacher"] == row["teacher"]} for row in rows}
        for name, server in (("a", a), ("b", b)):
            asked = {m["content"] for e in server.calls() for m in e["body"]["messages"][:1]}
            assert asked & text[name] and not asked & text["ba"[name == "b"]]
        steps = whole.metrics()
        assert all(m["teacher/calls"] == m["teacher/a/calls"] + m["teacher/b/calls"] for m in steps)
        assert sum(m["teacher/a/audits"] + m.get("teacher/b/audits", 0) for m in steps) == len(audits)
        used = {name: len(server.calls()) for name, server in (("a", a), ("b", b))}

        # a cap that ends it half way: neither part is passed; then the cap is raised
        cap = used["a"]  # half for a: about half of its calls
        part = runner.run(tmp_path / "part", settings | {"budget.calls": cap})
        assert part.code == 2 and "teachers.a: budget.calls" in part.err, part.err[-3000:]
        for name in "ab":
            with contextlib.closing(Journal(tmp_path / "part" / "journal" / name)) as journal:
                assert 0 < journal.totals().calls <= cap // 2
        assert 0 < len(part.metrics()) < 4
        before = {name: len(server.calls()) for name, server in (("a", a), ("b", b))}
        rest = runner.run(tmp_path / "part", settings | {"budget.calls": 10 * cap})
        assert rest.code == 0 and "resumed from step" in rest.out, rest.err[-3000:]
        for name, server in (("a", a), ("b", b)):  # nothing was bought twice, but for the probe's questions
            assert len(server.calls()) - used[name] <= used[name], (before, used)
        assert tiny.same(whole.params(), rest.params())

        journal = {"teacher.replay": "only", "teacher.journal": str(tmp_path / "whole" / "journal")}
        before = len(a.calls()) + len(b.calls())
        again = runner.run(tmp_path / "again", settings | journal)
        assert again.code == 0, again.err[-3000:]
        assert tiny.same(whole.params(), again.params()) and len(a.calls()) + len(b.calls()) == before
        wrong = rows_file(tmp_path, [*rows, {"prompt": "7?", "teacher": "c"}])
        bad = runner.run(tmp_path / "bad", settings | {"data.path": wrong, "student.path": "configs"})
        assert bad.code == 2 and "rows.jsonl, line 17: `teacher` = 'c'" in bad.err and "Traceback" not in bad.err
