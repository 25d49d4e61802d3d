"""The probe after something was corrected: only answers of a probe that ended well are believed again."""

import asyncio

import pytest
from teacher_kit import EXTENSIONS, cfg_for, check, request, teacher_of
from wire_server import WireServer, speak

from omniopd_jax.errors import UserError
from omniopd_jax.run import preflight
from omniopd_jax.teachers import TeacherStopped, wire
from omniopd_jax.teachers.wire import openai


def thinks(answer):
    for choice in answer["choices"]:
        choice["message"]["reasoning_content"] = "I think"
    return answer


def test_a_server_that_thought_and_was_corrected_is_asked_again(tmp_path):
    with WireServer(mangle=thinks) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.continuation": "auto"})
        server.extensions = {"continue_final_message"}
        for _ in range(2):
            before = len(server.calls())
            with pytest.raises(UserError, match="hidden reasoning"):
                check(c)
            assert len(server.calls()) > before  # it is not the journal that says so
        server.mangle = None
        assert "continue_final_message" in check(c)[0]
        calls = len(server.calls())
        check(c)
        assert len(server.calls()) == calls  # this one ended well: paid once


def test_a_server_that_was_started_without_a_mode_is_asked_again(tmp_path):
    with WireServer(extensions=set()) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path)
        with pytest.raises(UserError, match="does not continue"):
            check(c)
        server.extensions = {"continue_final_message"}
        assert "continue_final_message" in check(c)[0]


def test_a_refusal_after_a_good_probe_is_not_believed_for_ever(tmp_path):
    """The good one was by other settings: what the journal holds of it says nothing of these."""
    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path)
        check(c)
        c.teacher.chat_template_kwargs = {"enable_thinking": False}
        server.extensions = set()
        with pytest.raises(UserError, match="does not continue"):
            check(c)
        server.extensions = {"continue_final_message"}
        assert "continue_final_message" in check(c)[0]


def test_a_greedy_server_that_was_corrected_is_asked_again(tmp_path):
    with WireServer(speak=lambda context, most, seed, index: speak(context, most, 0, 0)) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path)
        assert "samples at temperature 1: NO" in " ".join(check(c)[1].table().split()).replace("1 NO", "1: NO")
        server.speak = speak
        calls = len(server.calls())
        assert dict(check(c)[1].rows)["samples at temperature 1"] == "yes" and len(server.calls()) > calls


def test_a_mode_that_a_run_finds_refused_is_probed_again_at_the_next_start(tmp_path):
    """As where a model is rerouted to one that takes no prefill."""
    with WireServer(extensions={"prefill"}) as server:
        unhurried = {"teacher.timeout_s": 60.0, "teacher.deadline_s": 120.0}
        c = cfg_for(server.url("gemini"), "gemini", tmp_path, **{"teacher.continuation": "auto"} | unhurried)
        assert "prefill" in check(c)[0]
        refused = (
            b'{"error": {"code": 400, "message": "the last turn must be of the user", "status": "INVALID_ARGUMENT"}}'
        )
        server.mangle = lambda answer: (400, {}, refused)

        async def run():
            async with teacher_of(c) as teacher:
                assert "0 calls" in (await teacher.check()) and teacher.mode == "prefill"
                await asyncio.gather(*(teacher.continue_text(request(f"s{i}")) for i in range(20)))

        with pytest.raises(TeacherStopped, match="refuses what it is asked"):
            asyncio.run(run())
        server.mangle, server.extensions = None, set()
        assert "instruct" in check(c)[0]


def test_a_model_that_a_router_does_not_list_may_still_be_served(tmp_path, monkeypatch):
    """A router's variants and a cloud's deployments are in no list: the first question tells."""

    async def listed(client):
        return [{"id": "a"}]

    monkeypatch.setattr(openai.OpenAIClient, "_models", listed)
    with WireServer(models=["b:fast"]) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.model": "b:fast"})
        with pytest.raises(UserError, match="it serves: a"):
            check(c)
        monkeypatch.setattr(wire, "own_server", lambda url: False)
        assert "does not list 'b:fast'" in check(c)[1].table()


@pytest.mark.parametrize("provider", ["openai", "anthropic", "gemini"])
def test_a_key_that_may_not_list_models_is_taken(provider, tmp_path):
    with WireServer(extensions=EXTENSIONS[provider], may_list=False) as server:
        assert check(cfg_for(server.url(provider), provider, tmp_path))


def test_hosts_that_found_different_modes_are_told(tmp_path, monkeypatch):
    """The mode is part of the journal's key, and what is compared must be continued in the same way."""

    async def probed():
        async with teacher_of(c) as teacher:
            await teacher.check()
            return teacher

    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path)
        teacher = asyncio.run(probed())
        preflight.check_same_modes(c, teacher)
        monkeypatch.setattr(preflight.processes, "gather", lambda name, value: [value, ["instruct"]])
        with pytest.raises(UserError, match="continue_final_message, instruct.*set teacher.continuation"):
            preflight.check_same_modes(c, teacher)
