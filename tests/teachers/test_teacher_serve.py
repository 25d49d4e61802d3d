"""A real OpenAI-compatible server: `transformers serve` on a tiny random checkpoint, over HTTP."""

import json

import pytest
from teacher_kit import ask, cfg_for, check, request, texts

from benchmarks.real.server import serve_transformers
from omniopd_jax.errors import UserError

pytestmark = pytest.mark.slow  # the server alone takes 10 to 20 s to come up


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(base_url, checkpoint folder) of a running server."""
    import hf_fixtures

    folder = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = hf_fixtures.tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": 0}
    hf_fixtures.torch_checkpoint(folder, "qwen3", logit_std=1.0, **sizes)
    tokenizer.save_pretrained(folder)
    # without do_sample the server is greedy whatever the request says
    generation = {"do_sample": True, "eos_token_id": end, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with serve_transformers(folder, log=folder.parent / "log") as made:
        yield made.url, folder


def test_the_probe_finds_out_what_it_can_do(served, tmp_path):
    url, folder = served
    settings = {
        "teacher.model": str(folder), "teacher.tokenizer": str(folder), "teacher.continuation": "auto",
        "teacher.timeout_s": 30.0, "teacher.deadline_s": 60.0,
    }  # fmt: skip
    _, report = check(cfg_for(url, "openai", tmp_path, **settings))
    rows = dict(report.rows)
    assert report.mode == "completion" and rows["texts a call"] == "one", report.table()
    assert rows["samples at temperature 1"] == "yes" and rows["seed"] == "repeats", report.table()


def test_continuations_by_completion_and_by_instruction(served, tmp_path):
    url, folder = served
    settings = {
        "teacher.model": str(folder), "teacher.tokenizer": str(folder), "teacher.timeout_s": 30.0,
        "teacher.deadline_s": 60.0, "teacher.continuation": "completion",
        "teacher.max_concurrency": 1,  # its seed is the process's: calls side by side disturb each other
    }  # fmt: skip
    c = cfg_for(url, "openai", tmp_path, **settings)
    result, other = ask(c, request(prefix="The answer "), request(peak=9, prefix="The answer is 4"))
    for r in (result, other):
        assert len(r.continuations) == 4 and len(set(texts(r))) >= 3 and r.usage.tokens_out <= 32
    c.teacher.replay = "off"
    [again] = ask(c, request(prefix="The answer "))
    assert texts(again) == texts(result)  # the seed is derived from who asks, and the server keeps it
    c.teacher.replay, c.teacher.continuation = "prefer", "instruct"
    [instructed] = ask(c, request(prefix="The answer "))
    assert len(instructed.continuations) + len(instructed.failures) == 4 and instructed.continuations


def test_it_gives_no_log_probs_and_is_refused_for_opd(served, tmp_path):
    url, folder = served
    settings = {
        "objective.name": "opd",
        "student.path": str(folder),
        "teacher.model": str(folder),
        "teacher.tokenizer": str(folder),
        "teacher.timeout_s": 30.0,
    }
    with pytest.raises(UserError, match="gives no log-probs of a prompt") as e:
        check(cfg_for(url, "openai", tmp_path, **settings))
    assert "prompt_logprobs: HTTP" in str(e.value) and "echo: HTTP" in str(e.value)


def test_an_extension_that_it_refuses_is_said_so(served, tmp_path):
    url, folder = served
    c = cfg_for(url, "openai", tmp_path, **{"teacher.model": str(folder), "teacher.timeout_s": 30.0})
    [result] = ask(c, request())
    assert not result.continuations and "HTTP 422" in result.failures[0].error
