"""A key is written nowhere: not in any of its usual forms, not by any of the ways that an answer has into a file or a
line."""

import asyncio
import base64
import html
import json
import logging
import pathlib
import urllib.parse

import pytest
from teacher_kit import EXTENSIONS, ask, cfg_for, check, request, teacher_of
from wire_server import WireServer

from omniopd_jax import teachers
from omniopd_jax.errors import UserError
from omniopd_jax.run import cli, identity
from omniopd_jax.teachers import TeacherStopped, wire
from omniopd_jax.teachers.wire import secrets

KEY = "Zq7+/wX%9 kM=aa"  # characters that every encoding changes
FORMS = {
    "as it is": lambda k: k,
    "typed with white space": lambda k: f" {k}\n",
    "URL-encoded": lambda k: urllib.parse.quote(k, safe=""),
    "URL-encoded, plus for space": urllib.parse.quote_plus,
    "base64": lambda k: base64.b64encode(k.encode()).decode(),
    "URL-safe base64": lambda k: base64.urlsafe_b64encode(k.encode()).decode().rstrip("="),
    "inside longer base64": lambda k: base64.b64encode(f"user:{k}".encode()).decode(),
    "upper case": str.upper,
    "lower case": str.lower,
    "as JSON escapes it": lambda k: json.dumps(k),
    "as HTML escapes it": html.escape,
    "hexadecimal": lambda k: k.encode().hex(),
    "in a header": lambda k: f"Authorization: Bearer {k}",
    "in an address": lambda k: f"https://h/v1?key={urllib.parse.quote(k)}&x=1",
}


def leaks(form: str) -> str:
    """What of a key may nowhere be found: the form without what stands around the key."""
    return (
        form.strip()
        .strip('"')
        .replace("Authorization: Bearer ", "")
        .replace("https://h/v1?key=", "")
        .replace("&x=1", "")
    )


@pytest.fixture(autouse=True)
def key(monkeypatch):
    for name in sum(wire.KEYS.values(), ()):
        monkeypatch.setenv(name, KEY)


def test_a_librarys_log_of_an_address_does_not_tell_the_key_in_its_path():
    path = "sk-abcdef0123456789"
    secrets.check_url(f"http://127.0.0.1:9/{path}/v1")
    said = logging.LogRecord("httpx2", logging.INFO, "", 0, "POST %s: %d", (f"http://h/{path}/v1/chat", 200), None)
    assert cli.hide_keys(said) and said.getMessage() == "POST http://h/***/v1/chat: 200"
    assert cli.hide_keys(logging.LogRecord("x", logging.INFO, "", 0, "%d", ("no number",), None))


def test_https_is_https_in_capitals_too():
    assert secrets.check_url("HTTPS://h/v1/") == "https://h/v1"


@pytest.mark.parametrize("form", FORMS)
def test_a_key_is_hidden_in_each_of_its_forms(form):
    said = f"we saw {FORMS[form](KEY)} here"
    hidden = wire.scrub(said)
    # base64 of a longer text shares its first characters with what stands before
    middle = leaks(FORMS[form](KEY))[3:-6]
    assert "***" in hidden and middle not in hidden and hidden.startswith("we saw") and hidden.endswith("here")


@pytest.mark.parametrize("short", ["k9Xq2z", "abc1", "Pw-7"])
def test_a_short_key_is_hidden_where_it_stands_alone(short, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", short)
    assert short not in wire.scrub(f"key {short}, '{short}' ({short.upper()})")
    assert wire.scrub("the word xabc1x") == "the word xabc1x"


def test_a_word_that_is_no_secret_changes_no_text(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    assert wire.hide_keys("the set is empty, EMPTY") == "the set is empty, EMPTY"


WAYS = {  # how an answer may carry a key -> what the server does
    "a text": {"speak": lambda form: lambda *_: f" so {form} it is"},
    "an error's message": {
        "mangle": lambda form: lambda a: (500, {}, json.dumps({"error": {"message": form}}).encode())
    },
    "an error's page": {"mangle": lambda form: lambda a: (503, {}, f"<p>{form}</p>".encode())},
    "a refusal": {"mangle": lambda form: lambda a: (400, {}, json.dumps({"error": {"message": form}}).encode())},
    "an error inside 200": {"mangle": lambda form: lambda a: {"error": {"code": 500, "message": form}}},
    "a detail": {"mangle": lambda form: lambda a: {"detail": form}},
    "a finish reason": {"mangle": lambda form: lambda a: _finish(a, f"filter {form}")},
    "a location": {"mangle": lambda form: lambda a: (302, {"Location": urllib.parse.quote(form)}, b"")},
    "the model's name": {"mangle": lambda form: lambda a: a | {"model": form, "modelVersion": form}},
    "a content type": {"mangle": lambda form: lambda a: (200, {"Content-Type": form.strip()}, b"no JSON")},
}


def _finish(answer, value):
    for choice in answer.get("choices") or answer.get("candidates") or [answer]:
        choice |= {"finish_reason": value, "stop_reason": value, "finishReason": value}
    return answer


@pytest.mark.parametrize("provider", ["openai", "anthropic", "gemini"])
def test_no_answer_brings_a_key_into_a_file_or_a_line(provider, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("omniopd_jax.teachers.traffic.FIRST_BACKOFF_S", 0.01)
    forms = [f for f in FORMS.values() if "\n" not in f(KEY)]

    async def run(server, c):
        async with teacher_of(c) as teacher:
            for i, (way, make) in enumerate(WAYS.items()):
                for j, form in enumerate(forms):
                    server.mangle, server.speak = None, lambda *_: " ok"
                    for name, value in make.items():
                        setattr(server, name, value(form(KEY)))
                    try:
                        print(way, await teacher.continue_text(request(f"s{i}.{j}", n=1)))
                    except TeacherStopped as e:
                        print(way, e)
                        teacher.stopped = None
            teacher.journal.export_jsonl(tmp_path / "out.jsonl")

    with WireServer(extensions=EXTENSIONS[provider]) as server:
        c = cfg_for(server.url(provider), provider, tmp_path, **{"teacher.max_retries": 0})
        asyncio.run(run(server, c))
    (tmp_path / "config.json").write_text(identity.as_json(c))
    said = capfd.readouterr()
    everything = {"stdout": said.out.encode(), "stderr": said.err.encode()}
    everything |= {str(p): p.read_bytes() for p in pathlib.Path(tmp_path).rglob("*") if p.is_file()}
    assert len(everything) >= 5
    found = [
        (name, where)
        for name, form in FORMS.items()
        for where, content in everything.items()
        if leaks(form(KEY))[3:-6].encode() in content
    ]
    assert not found


def test_a_key_in_the_address_is_refused_or_hidden(tmp_path, monkeypatch, capfd):
    other = "a1b2c3d4e5f6a7b8c9d0e1f2"  # no key of the environment: it looks like one
    with WireServer() as server:
        c = cfg_for(f"http://127.0.0.1:{server.port}/v1/{other}/openai", "openai", tmp_path)
        with pytest.raises(UserError) as e:
            check(c)
        assert other not in str(e.value)
        assert other not in identity.as_json(c) and "***" in identity.as_json(c)
    assert other not in wire.scrub(f"GET /v1/{other}/openai")
    assert secrets.public_url("https://models.example.com/v1beta/openai") == "https://models.example.com/v1beta/openai"


def test_no_character_that_a_terminal_obeys_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("omniopd_jax.teachers.traffic.FIRST_BACKOFF_S", 0.01)
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ereversed\u2066\r\x08"
    with WireServer(mangle=lambda a: (500, {}, json.dumps({"error": {"message": evil}}).encode())) as server:
        c = cfg_for(
            server.url("openai"), "openai", tmp_path, **{"teacher.max_retries": 0, "teacher.continuation": "auto"}
        )
        with pytest.raises(UserError) as e:
            check(c)
        [result] = ask(cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.max_retries": 0}), request())
    for line in (str(e.value), *(f.error for f in result.failures)):
        assert line.replace("\n", " ").isprintable() and "owned" in line


def test_a_key_goes_unencrypted_to_another_machine_only_where_a_setting_says_so(tmp_path, monkeypatch):
    for provider, path in (("openai", "/v1"), ("anthropic", ""), ("gemini", "")):
        c = cfg_for(f"http://10.1.2.3:8000{path}", provider, tmp_path)
        with pytest.raises(UserError, match="teacher.key_over_http") as e:
            teachers.make(c)
        assert KEY not in str(e.value)
        c.teacher.key_over_http = True
        teachers.make(c)
        c.teacher.key_over_http = False
        c.teacher.base_url = f"https://10.1.2.3:8000{path}"
        teachers.make(c)
        for name in wire.KEYS[provider]:
            monkeypatch.delenv(name)
        c.teacher.base_url = f"http://10.1.2.3:8000{path}"
        teachers.make(c)  # nothing to send


@pytest.mark.parametrize(
    "key,text",
    [
        ("1234", " so the result is 1234."), ("secret", " the secret number is 7"), ("abc", " triangle ABC has"),
        ("123", "= 123"),
    ],
)  # fmt: skip
def test_a_short_dummy_key_cuts_nothing_out_of_a_teachers_text(key, text, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with WireServer(speak=lambda *_: text) as server:
        [result] = ask(cfg_for(server.url("openai"), "openai", tmp_path), request(n=1))
    assert [c.text for c in result.continuations] == [text]
    assert key not in wire.scrub(f"key {key}")  # in a message it is hidden all the same


TOKEN = "gw-verysecret-0123456789abcdef"


@pytest.mark.parametrize(
    "variable,provider,line",
    [
        ("ANTHROPIC_CUSTOM_HEADERS", "anthropic", f"X-Team: research\nX-Gateway-Token: {TOKEN}"),
        ("OPENAI_CUSTOM_HEADERS", "openai", f"X-Gateway: Bearer {TOKEN}"),
    ],
)
def test_a_token_in_a_custom_header_is_a_key(variable, provider, line, tmp_path, monkeypatch):
    """The SDK sends it; a server that repeats it brings it into no file, and it goes nowhere unencrypted."""
    monkeypatch.setenv(variable, line)
    said = f"who are you, {TOKEN}? Bearer {TOKEN}, research"
    with WireServer(
        extensions=EXTENSIONS[provider], mangle=lambda a: (400, {}, json.dumps({"error": {"message": said}}).encode())
    ) as server:
        [result] = ask(cfg_for(server.url(provider), provider, tmp_path), request(n=1))
    [failure] = result.failures
    assert "who are you, ***" in failure.error and TOKEN not in failure.error and "research" in failure.error
    assert all(TOKEN.encode() not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert wire.hide_keys(f"so {TOKEN} research it is") == "so *** research it is"
    for name in wire.KEYS[provider]:
        monkeypatch.delenv(name)
    c = cfg_for("http://gateway.example:8080", provider, tmp_path)
    with pytest.raises(UserError, match=f"{variable} would be sent unencrypted") as e:
        teachers.make(c)
    assert TOKEN not in str(e.value)
    monkeypatch.setenv(variable, "X-Team: research")  # no token
    teachers.make(c)
