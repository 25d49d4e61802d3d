"""Thoughts between student and teacher: what is warned of, gpt-oss's channels over the wire, a student that thinks."""

import contextlib
import types

import pytest
import teacher_runs
import tiny
from teacher_kit import ask, cfg_for, check, request
from wire_server import WireServer

from omniopd_jax import config, hf
from omniopd_jax.errors import UserError
from omniopd_jax.hf import template
from omniopd_jax.run import thinking
from omniopd_jax.teachers.probe import ProbeReport

TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
ENDS = {
    thinking.OPENS: "assistant:\n<think>\n",
    thinking.CLOSES: "assistant:\n<think>\n\n</think>\n\n",
    thinking.FREE: "assistant:\n{% if enable_thinking is defined and not enable_thinking %}<think>{% endif %}",
    thinking.UNKNOWN: "assistant:\n",
}


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """A Jinja file of each kind."""
    folder = tmp_path_factory.mktemp("templates")
    for name, end in ENDS.items():
        (folder / f"{name or 'none'}.jinja").write_text(TURNS + "{% if add_generation_prompt %}" + end + "{% endif %}")
    return {name: str(folder / f"{name or 'none'}.jinja") for name in ENDS}


def made(path):
    return template.make(tiny.tokenizer(), template=path)


def test_what_a_template_does_with_thoughts_is_seen(templates):
    assert all(thinking.mode(made(path)) == name for name, path in templates.items())


def test_thoughts_of_a_student_that_has_none_are_refused(templates):
    c = config.default()
    for name, path in templates.items():
        c.audit.span = "answer"
        thinking.check_span(c, made(path))
        c.audit.span = "thinking"
        if name == thinking.CLOSES:
            with pytest.raises(UserError, match=r"audit\.span = 'thinking', .*enable_thinking = True"):
                thinking.check_span(c, made(path))
        else:
            thinking.check_span(c, made(path))


def remarks(student, *, thinks="", mode="completion", teacher_template="chat", provider="openai"):
    c = config.default()
    c.update_from_flattened_dict(
        {"teacher.provider": provider, "teacher.model": "m", "teacher.template": teacher_template}
    )
    report = ProbeReport("m", mode, (), (1.0, 1.0), 0.0, 1, thinks=thinks)
    return thinking.remarks(c, made(student), types.SimpleNamespace(report=report))


def test_a_run_in_which_one_side_thinks_says_so(templates):
    quiet, free = templates[thinking.CLOSES], templates[thinking.FREE]
    for student in (quiet, templates[thinking.UNKNOWN]):
        [line] = remarks(student, thinks="open")
        assert "begins an answer with its thoughts" in line and "enable_thinking = False" in line
        [line] = remarks(student, teacher_template=templates[thinking.OPENS])
        assert "begins an answer with its thoughts" in line
        assert remarks(student, mode="continue_final_message") == []
    assert remarks(free, thinks="open") == remarks(templates[thinking.OPENS], thinks="open") == []
    [line] = remarks(free, mode="continue_final_message")
    assert "close or drop an open <think> block" in line and "teacher.tokenizer" in line
    assert remarks(free, mode="prefill", provider="anthropic") == []
    [line] = remarks(quiet, thinks="hidden", mode="instruct", provider="anthropic")
    assert "thinks out of sight" in line


def test_a_teacher_that_thinks_out_of_sight_before_a_whole_answer_is_asked_to_stop(tmp_path):
    """vLLM with a reasoning parser: only an empty prefix shows it. What can be switched off is."""
    reasoned = []

    def reasons(answer):
        message = answer["choices"][0].get("message")
        if message is not None and len(answer["choices"]) == 1 and whole_answer(server) and not quiet(server):
            reasoned.append(1)
            message |= {"content": None, "reasoning_content": "hm"}
        return answer

    def whole_answer(server):
        return server.calls()[-1]["body"]["messages"][-1]["role"] == "user"

    def quiet(server):
        return server.calls()[-1]["body"].get("reasoning_effort") == "none"

    with WireServer(mangle=reasons) as server:
        _, report = check(cfg_for(server.url("openai"), "openai", tmp_path))
        rows = dict(report.rows)
        assert reasoned and report.thinks == "" and rows["a whole answer"] == "begins with the answer"
        assert quiet(server)
    with WireServer(mangle=reasons, refuses={"reasoning_effort"}) as server:
        _, report = check(cfg_for(server.url("openai"), "openai", tmp_path / "always"))
        assert report.thinks == "hidden" and "hidden thoughts" in dict(report.rows)["a whole answer"]


HARMONY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
FINAL = "<|channel|>final<|message|>"


def test_gpt_oss_goes_on_in_the_channel_that_the_answer_is_in(tmp_path):
    """Marks in, marks out: by raw completion, where they are not left out of what comes."""
    (tmp_path / "harmony.jinja").write_text(HARMONY)

    def speaks(context, max_tokens, seed, index):
        assert context.count("<|channel|>") == context.count("assistant<|channel|>") > 0, context
        if "analysis" in context and FINAL not in context:
            return f" so 7.<|end|><|start|>assistant{FINAL}It is 7.<|return|>"
        return " is 7.<|return|>"

    with WireServer(speak=speaks, extensions={"completion", "skip_special_tokens"}) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path)
        c.update_from_flattened_dict(
            {"teacher.template": str(tmp_path / "harmony.jinja"), "teacher.continuation": "completion"}
        )
        inside, answer, whole = ask(
            c, request(prefix="<think>\n3 and 4,"), request("s1", prefix="It"), request("s2", prefix="")
        )
        assert {k.text for k in inside.continuations} == {" so 7.\n</think>\n\nIt is 7."}
        for result in (answer, whole):
            assert {(k.text, k.finish) for k in result.continuations} == {(" is 7.", "stop")}
        bodies = [e["body"] for e in server.calls()]
        assert all(body["skip_special_tokens"] is False for body in bodies)
        ends = {body["prompt"].rpartition("<|start|>assistant")[2] for body in bodies}
        assert ends == {"<|channel|>analysis<|message|>3 and 4,", FINAL + "It", FINAL}


@pytest.mark.slow  # two whole runs
def test_a_student_that_thinks_is_audited_where_it_is_said(templates, tmp_path):
    """Its prompt has opened the block; a random student never closes it: all is thoughts, and there is no answer."""
    with WireServer() as server, contextlib.closing(teacher_runs.Runner()) as runner:
        settings = teacher_runs.wire(server) | {"num_steps": 1, "student.template": templates[thinking.OPENS]}
        run = runner.run(tmp_path / "thoughts", settings | {"audit.span": "thinking"})
        assert run.code == 0, run.err[-3000:]
        assert "close or drop an open <think> block" in run.out
        audits, metrics = run.audits(), run.metrics()[0]
        assert audits and all(a["prefix_end"].startswith("<think>\n") for a in audits if a["prefix_characters"] < 600)
        assert metrics["audit/span_fraction"] == 1.0 and metrics["audit/chunks"] > 0
        turns = [e["body"]["messages"][-1] for e in server.calls() if e["body"]["seed"] > 1000]
        assert turns and all(t["role"] == "assistant" and t["content"].startswith("<think>") for t in turns)
        asked = len(server.calls())
        run = runner.run(tmp_path / "answers", settings | {"audit.span": "answer"})
        assert run.code == 0, run.err[-3000:]
        assert not run.audits() and run.metrics()[0]["audit/span_fraction"] == 0.0
        assert all(e["body"]["seed"] < 1000 for e in server.calls()[asked:])


def test_the_tiny_students_own_template_knows_no_thoughts():
    assert thinking.mode(template.make(hf.load_tokenizer(tiny.TRAINED / "student"))) == thinking.UNKNOWN
