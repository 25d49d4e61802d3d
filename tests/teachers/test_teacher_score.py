"""White-box scores over the wire: log-probs of exactly the tokens that were sent, or a clear end."""

import asyncio
import json
import pathlib

import jax
import numpy as np
import pytest
import teacher_runs
import tiny
from teacher_kit import check, teacher_of
from wire_server import WireServer

from omniopd_jax import config, hf, model, teachers
from omniopd_jax.errors import UserError
from omniopd_jax.teachers import TeacherStopped, journal, wire
from omniopd_jax.teachers import local as local_teacher

WAYS = ("prompt_logprobs", "echo")
MESSAGES = ({"role": "user", "content": "Add 3 and 4."},)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.make_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def local(folders):
    c = config.default()
    c.student.path, c.teacher.model = map(str, folders)
    return teachers.make(c)


def forward(folder):
    """ids -> log-prob of each under the model of a folder, None for the first; padded, so that it is compiled once."""
    params, cfg = hf.load(folder)

    @jax.jit
    def logp(token_BL):
        return jax.nn.log_softmax(model.logits(params, cfg, model.hidden(params, cfg, token_BL)))

    def of(ids):
        token_BL = np.zeros((1, 128), np.int32)
        token_BL[0, : len(ids)] = ids
        out = np.asarray(logp(token_BL))[0]
        return [None, *(float(out[i - 1, ids[i]]) for i in range(1, len(ids)))]

    return of


@pytest.fixture(scope="module")
def scores(folders):
    return forward(folders[1])


@pytest.fixture
def server_of(scores, folders):
    running, tokenizer = [], hf.load_tokenizer(folders[0])

    def make(way="prompt_logprobs", **settings):
        settings = {"scores": scores, "name_of": lambda i: tokenizer.decode([i])} | settings
        running.append(WireServer(extensions={"completion", way}, **settings).start())
        return running[-1]

    yield make
    for server in running:
        server.stop()


@pytest.fixture
def cfg_for(folders, tmp_path):
    def make(server, **more):
        c = config.default()
        settings = {
            "run_dir": str(tmp_path / "run"), "objective.name": "opd", "student.path": str(folders[0]),
            "teacher.provider": "openai", "teacher.model": "m", "teacher.base_url": server.url("openai"),
            "teacher.tokenizer": str(folders[1]), "teacher.timeout_s": 10.0, "teacher.deadline_s": 20.0,
        }  # fmt: skip
        c.update_from_flattened_dict(settings | more)
        return c

    return make


def pairs(count=3):
    """(prompt ids, response ids) of lengths that differ."""
    rng = np.random.default_rng(4)
    return [(rng.integers(0, 300, 5 + 3 * i).tolist(), rng.integers(0, 300, 2 + 7 * i).tolist()) for i in range(count)]


def score(c, asked):
    async def run():
        async with teacher_of(c) as teacher:
            return await asyncio.gather(*(teacher.score_tokens(MESSAGES, p, r) for p, r in asked))

    return asyncio.run(run())


def of_scores(server):
    """Calls that scored something else than the probe's text."""
    return [e for e in server.calls() if e["body"]["prompt"][:5] in [p[:5] for p, _ in pairs(9)]]


@pytest.mark.parametrize("names_ids", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_they_equal_the_in_process_teachers(way, names_ids, server_of, cfg_for, local):
    server = server_of(way, names_ids=names_ids)
    asked = pairs()
    got = score(cfg_for(server), asked)

    async def here():
        return await asyncio.gather(*(local.score_tokens(MESSAGES, p, r) for p, r in asked))

    for a, b, (_, response) in zip(got, asyncio.run(here()), asked):
        assert a.dtype == np.float32 and a.shape == (len(response),)
        np.testing.assert_allclose(a, b, atol=1e-4)
    bodies = [e["body"] for e in of_scores(server)]
    assert sorted(b["prompt"] for b in bodies) == sorted(p + r for p, r in asked)  # ids as they are
    assert all(b["max_tokens"] == 1 and "temperature" not in b for b in bodies)
    assert all((b.get("prompt_logprobs") is not None) == (way == "prompt_logprobs") for b in bodies)


@pytest.mark.parametrize("count, most, rows", [(3, 128, [4]), (9, 128, [16]), (9, 4, [4, 4, 1]), (7, 6, [6, 1])])
def test_the_in_process_teacher_pays_for_the_rows_it_has(count, most, rows, local, monkeypatch):
    computed, compiled = [], local_teacher._score

    def counted(params, token_BL, *rest):
        computed.append(len(token_BL))
        return compiled(params, token_BL, *rest)

    monkeypatch.setattr(local_teacher, "_score", counted)
    monkeypatch.setattr(local_teacher, "SCORE_ROWS", most)

    async def of(asked):
        return await asyncio.gather(*(local.score_tokens(MESSAGES, p, r) for p, r in asked))

    together = asyncio.run(of(pairs(count)))
    assert computed == rows
    for pair, got in zip(pairs(count), together, strict=True):
        np.testing.assert_allclose(got, asyncio.run(of([pair]))[0], atol=1e-5)


def test_the_probe_says_how_and_the_estimate_counts_scores(server_of, cfg_for):
    server = server_of("echo")
    c = cfg_for(server, num_steps=5, prompts_per_step=4, num_generations=2)
    line, report = check(c)
    assert report.mode == "echo" and "echo" in line
    assert "for the ids that were sent" in dict(report.rows)["log-probs of a prompt"]
    estimate = teachers.make(c).estimate()
    assert estimate.calls[0] == 40 and estimate.tokens_out[0] == 40
    most = c.max_prompt_length + c.max_completion_length
    assert estimate.tokens_in[0] < estimate.tokens_in[2] == estimate.calls[2] * most


@pytest.mark.parametrize(
    "settings",
    [
        {"scores": None}, {"extensions": {"completion"}}, {"extensions": {"continue_final_message"}},
        {"extensions": {"completion", "ignore_unknown"}}, {"misfit": "nameless", "extensions": {"completion", "echo"}},
    ],
    ids=["none", "refused", "no route", "ignored", "nameless"],
)  # fmt: skip
def test_a_server_that_gives_none_is_refused_at_the_start(settings, server_of, cfg_for):
    server = server_of()
    for name, value in settings.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match="gives no log-probs of a prompt.*vLLM|does not say which tokens") as e:
        check(cfg_for(server))
    assert "\n" not in str(e.value)


def test_another_tokenizer_is_refused_at_the_start(server_of, cfg_for, tmp_path):
    with pytest.raises(UserError, match="another tokenizer than the student"):
        check(cfg_for(server_of(name_of=lambda i: f"w{i}")))
    with pytest.raises(UserError, match="student's own tokenizer: set teacher.tokenizer"):
        teachers.make(cfg_for(server_of(), **{"teacher.tokenizer": ""}))
    foreign = tmp_path / "foreign"
    tiny.tokenizer(tiny.VOCAB - 20).save_pretrained(foreign)
    with pytest.raises(UserError, match="student's own tokenizer"):
        teachers.make(cfg_for(server_of(), **{"teacher.tokenizer": str(foreign)}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "misfit,says", [("missing", "without log-probs"), ("count", "were sent, and"), ("ids", "was sent"), ("nan", "nan"),
                    ("zero", "probability 0")],
)  # fmt: skip
def test_what_does_not_fit_ends_the_run(way, misfit, says, server_of, cfg_for):
    server = server_of(way)
    c = cfg_for(server)

    async def run():
        async with teacher_of(c) as teacher:
            await teacher.check()
            server.misfit = misfit
            calls = len(server.calls())
            with pytest.raises(TeacherStopped, match=says):
                await teacher.score_tokens(MESSAGES, *pairs()[1])
            assert len(server.calls()) == calls + 1  # the same question would have the same answer
            server.misfit = None
            with pytest.raises(TeacherStopped, match=says):  # and nobody else is asked
                await teacher.score_tokens(MESSAGES, *pairs()[2])

    asyncio.run(run())
    assert np.isfinite(score(c, pairs())[1]).all()  # the resumed run asks again


def test_they_are_journaled_paid_once_and_budgeted(server_of, cfg_for):
    server = server_of(delay_s=0.05)
    price = {"teacher.price_input": 2.0, "teacher.price_output": 5.0}
    asked = [*pairs(), pairs()[1], pairs()[1]]  # three responses are the same: asked once
    c = cfg_for(server, **price)
    first = score(c, asked)
    assert len(of_scores(server)) == 3
    again = score(c, asked)
    assert len(of_scores(server)) == 3 and all(np.array_equal(a, b) for a, b in zip(first, again))
    kept = journal.Journal(pathlib.Path(c.run_dir) / "journal")
    sent = [len(e["body"]["prompt"]) for e in server.calls()]
    totals = kept.totals()
    assert totals.calls == len(sent) and totals.tokens == sum(sent) + len(sent)
    assert totals.usd == pytest.approx((sum(sent) * 2 + len(sent) * 5) / 1e6)
    out = pathlib.Path(c.run_dir) / "out.jsonl"
    assert kept.export_jsonl(out) == 3
    kept.close()
    line = next(
        x for x in map(json.loads, out.read_text().splitlines()) if json.loads(x["prefix"]) == sum(pairs()[0], [])
    )
    assert line["mode"] == "score" and np.array_equal(np.array(json.loads(line["text"]), np.float32), first[0])

    c.teacher.replay, c.teacher.base_url = "only", ""  # no key, no server, no probe
    offline = score(c, asked)
    assert all(np.array_equal(a, b) for a, b in zip(first, offline))
    with pytest.raises(TeacherStopped, match="no log-probs"):
        score(c, pairs(4)[3:])

    capped = cfg_for(server, **price | {"budget.calls": totals.calls + 1, "run_dir": c.run_dir})
    with pytest.raises(TeacherStopped, match="budget.calls"):
        score(capped, pairs(6)[3:])
    assert len(server.calls()) <= totals.calls + 1


@pytest.mark.parametrize("fault", ["429_after", "500", "reset", "stall", "truncated", "html"])
def test_a_fault_is_asked_again(fault, server_of, cfg_for, monkeypatch):
    monkeypatch.setattr("omniopd_jax.teachers.traffic.FIRST_BACKOFF_S", 0.05)
    server = server_of(faults=[None, fault], stall_s=2.0, retry_after_s=0.1)  # the first is the probe's
    [got] = score(cfg_for(server, **{"teacher.timeout_s": 1.0}), pairs()[:1])
    assert got.shape == (2,) and len(of_scores(server)) == 2


def test_a_failing_service_is_a_clean_stop(server_of, cfg_for):
    server = server_of(faults=[None])
    server.share, server.kinds = 1.0, ["503"]
    with pytest.raises(TeacherStopped, match="gives no log-probs of 9 tokens.*503.*start again"):
        score(cfg_for(server, **{"teacher.deadline_s": 1.0}), pairs()[1:2])


@pytest.mark.slow
def test_a_whole_run_distils_over_the_wire_and_replays_offline(runner, server_of, tmp_path):
    """opd with the small world's own teacher behind vLLM's protocol, against the same run with that teacher in
    process."""
    folder = str(tiny.TRAINED / "teacher")
    tokenizer = hf.load_tokenizer(folder)
    server = server_of(scores=forward(folder), name_of=lambda i: tokenizer.decode([i]))
    common = {"objective.name": "opd", "anchor.kl_coef": 0.0, "num_steps": 3, "rollout.parts": 1}
    remote = teacher_runs.wire(server) | common | {"teacher.tokenizer": folder, "teacher.timeout_s": 30.0}
    first = runner.run(tmp_path / "first", remote)
    assert first.code == 0, first.err[-2000:]
    assert "prompt_logprobs" in first.out
    metrics = first.metrics()
    assert len(metrics) == 3 and all(m["teacher/calls"] > 0 and np.isfinite(m["loss"]) for m in metrics)

    inside = runner.run(tmp_path / "inside", common | {"teacher.provider": "local", "teacher.model": folder})
    assert inside.code == 0, inside.err[-2000:]
    for a, b in zip(metrics, inside.metrics()):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)

    calls = len(server.calls())
    offline = remote | {"teacher.replay": "only", "teacher.journal": str(tmp_path / "first" / "journal")}
    again = runner.run(tmp_path / "again", offline, env={"OPENAI_API_KEY": None})
    assert again.code == 0 and len(server.calls()) == calls, again.err[-2000:]
    assert tiny.same(first.params(), again.params())


def test_the_bound_of_a_score_is_its_ids():
    assert wire.ScoreCall((1, 2), (3, 4, 5), "echo").max_input_tokens() == 6
