"""The Anthropic client against an implementation of `/v1/messages` that is not ours: vLLM's."""

import asyncio

import pytest
import real_kit
from teacher_kit import ask, check, teacher_of, texts

from omniopd_jax.errors import UserError
from omniopd_jax.teachers import wire

pytestmark = pytest.mark.real


def config(url, tmp_path, **more):
    settings = {"teacher.provider": "anthropic", "teacher.continuation": "instruct"}
    return real_kit.cfg(url, tmp_path, **(settings | more))


def test_text_usage_and_the_reason_of_the_end(vllm, real, cuts, greedy, tmp_path):
    """A whole answer: the prompt as the template writes it; cut at the cap, or ended by the model."""
    [cut] = [cut for cut in cuts if cut.name == "a first chunk"]
    ids, tail = greedy[cut.name]
    short = cut.request(1, 16, temperature=0.0)
    ended = real_kit.Cut("short", ({"role": "user", "content": "Say only the word yes."},), "")
    [first, last] = ask(config(vllm, tmp_path), short, ended.request(1, 200, temperature=0.0))
    real.assert_greedy(texts(first)[0], ids, tail)
    assert first.continuations[0].finish == "length" and first.usage.tokens_out == 16
    assert first.usage.tokens_in == len(ids)
    [own] = real.sample([real.continued(ended)], 200, temperature=0.0)
    assert own[-1] in real.end_ids and last.continuations[0].finish == "stop", (own, last)
    assert last.usage.tokens_out == len(own)
    assert not any(mark in text for r in (first, last) for text in texts(r) for mark in real_kit.MARKS)


def test_a_system_message_and_a_temperature_arrive(vllm, real, tmp_path):
    messages = (
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is the capital of France?"},
    )
    cut = real_kit.Cut("system", messages, "")
    [greedy] = ask(config(vllm, tmp_path), cut.request(1, 8, temperature=0.0))
    [(ids, tail)] = real.greedy([real.continued(cut)], 8)
    real.assert_greedy(texts(greedy)[0], ids, tail)
    [drawn] = ask(config(vllm, tmp_path), cut.request(6, 8, temperature=1.5))
    assert len(set(texts(drawn))) > 1 and drawn.usage.calls == 6


def test_the_probe_sees_that_a_last_turn_is_closed(vllm, tmp_path):
    """`instruct` is chosen, or nothing where this model starts over by that too: it is small, and there is no seed."""
    try:
        _, report = check(config(vllm, tmp_path, **{"teacher.continuation": "auto"}))
    except UserError as error:
        assert "prefill: restarts; instruct: restarts" in str(error)
        return
    rows = dict(report.rows)
    assert report.mode == "instruct" and rows["continues by prefill"].startswith("restarts"), report.table()
    assert rows["samples at temperature 1"] == "yes" and rows["texts a call"] == "one", report.table()


def test_errors_mean_what_they_mean_elsewhere(vllm, tmp_path):
    [cut] = [c for c in real_kit.by_hand() if c.name == "a first chunk"]
    long = real_kit.Cut("long", ({"role": "user", "content": "one two three " * 1000},), "")

    async def error_of(c, messages=cut.messages):
        async with teacher_of(c) as teacher:
            await teacher.client.open()
            with pytest.raises(wire.CallError) as e:
                await teacher.client.call(wire.Call(messages, "", 1, 4, 1.0, 1.0, 1, "instruct"))
            return e.value

    too_long = asyncio.run(error_of(config(vllm, tmp_path), long.messages))
    assert (too_long.kind, too_long.status, too_long.field) == ("refused", 400, "context"), vars(too_long)
    other = asyncio.run(error_of(config(vllm, tmp_path, **{"teacher.model": "another"})))
    assert (other.status, other.outcome) == (404, "rejected") and "another" in str(other), vars(other)
    with pytest.raises(UserError, match="another"):
        check(config(vllm, tmp_path, **{"teacher.model": "another", "teacher.continuation": "auto"}))
