"""Every way in which real servers continue an unfinished answer, at cuts of the real student's own answers."""

import pytest
import real_kit
from teacher_kit import ask, check, texts

from omniopd_jax.errors import UserError
from omniopd_jax.teachers.wire import bare

pytestmark = pytest.mark.real
WAYS = [("vllm", "completion"), ("vllm", "continue_final_message"), ("transformers", "completion")]
N, TOKENS = 4, 8


@pytest.fixture
def asked(request, samples, tmp_path):
    """asked(server, mode, requests, ...) -> results."""

    def go(server, mode, *requests, **more):
        return ask(config(request.getfixturevalue(server), server, mode, samples, tmp_path, **more), *requests)

    return go


def config(url, server, mode, samples, tmp_path, **more):
    settings = {"teacher.continuation": mode}
    if mode in ("completion", "auto"):
        settings["teacher.tokenizer"] = str(real_kit.student())
    if server == "transformers":  # its seed is the process's: calls side by side disturb each other
        settings |= {"teacher.model": str(samples), "teacher.max_concurrency": 1}
    return real_kit.cfg(url, tmp_path, **(settings | more))


@pytest.mark.parametrize("server, mode", WAYS)
def test_a_greedy_text_is_what_the_model_writes_behind_the_prefix(asked, real, cuts, greedy, server, mode):
    """So nothing is started over, repeated, lost or added: every character is the model's own."""
    stripped = {}
    if mode != "completion":  # a chat server gets the prefix without the white space at its end
        ended = [cut for cut in cuts if cut.prefix != cut.prefix.rstrip()]
        shorter = [real_kit.Cut(cut.name, cut.messages, cut.prefix.rstrip()) for cut in ended]
        stripped = dict(zip([c.name for c in ended], real.greedy([real.continued(c) for c in shorter], 16)))
    results = asked(server, mode, *(cut.request(1, 16, temperature=0.0) for cut in cuts))
    same = []
    for cut, result in zip(cuts, results):
        ids, tail = stripped.get(cut.name) or greedy[cut.name]
        assert not result.failures, (cut.name, result.failures)
        sent, space = bare(cut.prefix) if mode != "completion" else ("", "")
        same.append(real.assert_greedy(texts(result)[0], ids, tail, sent, space) / max(1, len(tail)))
        assert result.usage.tokens_in == len(ids), cut.name
    assert sum(same) > 0.9 * len(same)


@pytest.mark.parametrize("server, mode", WAYS)
def test_n_texts_are_sampled_and_the_same_seeds_give_them_again(asked, cuts, server, mode):
    some = cuts[:3] + cuts[-6:] if server == "vllm" else cuts[:2] + cuts[-2:]  # the other computes one text at a time
    first, again, others = (
        asked(server, mode, *(cut.request(N, TOKENS, who=f"{who} {cut.name}") for cut in some))
        for who in ("a", "a", "b")
    )
    for cut, result in zip(some, first):
        assert not result.failures and result.usage.calls == (1 if server == "vllm" else N), (cut.name, result.usage)
        assert 0 < result.usage.tokens_out <= N * TOKENS
        for item in result.continuations:
            assert not any(mark in item.text for mark in real_kit.MARKS), item
            assert item.finish in ("length", "stop")
            assert len(cut.prefix) < 24 or cut.prefix[:24] not in item.text, "started over"
    assert [texts(r) for r in again] == [texts(r) for r in first]
    assert sum(texts(a) != texts(b) for a, b in zip(first, others)) >= len(some) - 1
    assert sum(len(set(texts(r))) for r in first) > len(some) * N / 2


@pytest.mark.parametrize("server", ["vllm", "transformers"])
def test_by_instruction_a_text_is_kept_or_counted_as_no_continuation(asked, cuts, server):
    some = [cut for cut in cuts if cut.prefix][:6]
    for cut, result in zip(some, asked(server, "instruct", *(cut.request(2, 16) for cut in some))):
        assert len(result.continuations) + len(result.failures) == 2
        for text in texts(result):
            assert not any(mark in text for mark in real_kit.MARKS)
            assert len(cut.prefix) < 24 or not text.startswith(cut.prefix[:24])


@pytest.mark.parametrize(
    "server, mode, found",
    [
        ("vllm", "auto", "completion"),
        ("vllm", "auto", "continue_final_message"),
        ("transformers", "auto", "completion"),
    ],
)
def test_the_probe_finds_the_mode_and_says_what_the_server_keeps(request, samples, tmp_path, server, mode, found):
    more = {"teacher.tokenizer": ""} if found != "completion" else {}
    c = config(request.getfixturevalue(server), server, mode, samples, tmp_path, **more)
    _, report = check(c)
    rows = dict(report.rows)
    assert report.mode == found, report.table()
    assert rows["texts a call"] == ("n" if server == "vllm" else "one"), report.table()
    assert rows["samples at temperature 1"] == "yes" and rows["seed"] == "repeats", report.table()
    assert rows["max_tokens"].startswith("kept") and rows["hidden reasoning"] == "none", report.table()


@pytest.mark.parametrize("server, mode", [("vllm", "prefix"), ("vllm", "prefill"), ("transformers", "prefill")])
def test_a_last_turn_that_the_server_closes_is_not_taken_for_continuing(request, samples, tmp_path, server, mode):
    """Both servers take a last assistant turn and begin another one behind it: that is no continuation."""
    c = config(request.getfixturevalue(server), server, mode, samples, tmp_path)
    try:
        _, report = check(c)
    except UserError as error:
        assert "does not continue an unfinished answer" in str(error)
    else:
        assert "not seen to continue" in dict(report.rows)["mode"], report.table()


def test_an_open_thought_stays_open_where_the_servers_template_would_close_it(asked, real, cuts):
    """What the server was sent has the mark once, and the text goes on behind it."""
    [cut] = [cut for cut in cuts if cut.name == "inside a thought"]
    for mode in ("completion", "continue_final_message"):
        [result] = asked("vllm", mode, cut.request(N, 16))
        for text in texts(result):
            assert text.strip() and not text.lstrip().startswith(("<think", "</think")), text
