"""Records of audits, whole responses and evaluations: what they hold, their bounds, and that what is left out is
counted."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from omniopd_jax import audit, config, experience, similarity
from omniopd_jax.data.prompts import Prompt
from omniopd_jax.evaluation.sampling import Evaluation
from omniopd_jax.objective import ChunkTargets
from omniopd_jax.run import records
from omniopd_jax.teachers import Continuation, ContinuationResult, Failure, Usage

TEXTS = ("So there are 12 - 5 = 7 apples left.", "First 12 + 5 = 17: héllo, 世界 🌍!", "Ann has 7.", "7")
B, M, C, N = len(TEXTS), 2, 2, 3


@pytest.fixture(scope="module")
def decoder():
    return audit.Decoder(tiny.tokenizer())


@pytest.fixture(scope="module")
def tokens(decoder):
    return [decoder._tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]


@pytest.fixture
def cfg():
    c = config.default()
    c.num_generations, c.audit.num_chunks, c.audit.chunk_tokens, c.audit.num_continuations = 2, M, C, N
    return c


@pytest.fixture
def step(decoder, tokens, cfg):
    """Two prompts with two responses each, a chunk at token 1 and one at 4 where it fits."""
    T = max(map(len, tokens))
    prompts = [Prompt(f"p{b // 2}", ({"role": "user", "content": f"Question {b // 2}"},), "7") for b in range(B)]
    peaks = np.array([[1 if len(t) >= 3 else -1, 4 if len(t) >= 6 else -1] for t in tokens], np.int32)
    grid = np.linspace(0.1, 2, B * T, dtype=np.float32).reshape(B, T)
    ids = [f"s{b}" for b in range(B)]
    responses = experience.Responses(prompts, ids, tokens, np.ones(B, bool))
    scores = experience.Scores(-grid, grid, None, None)
    audits = audit.plan(decoder, prompts, tokens, peaks, ids, cfg)
    for a in audits:
        texts = [a.chunk, a.chunk + "!", "Sure! Here is the continuation: 7"]
        found = tuple(Continuation(i, t, "length") for i, t in enumerate(texts))
        a.result = ContinuationResult(found, (), Usage(calls=1, cost_usd=0.5), 0.25)
    feedback = audit.compare(similarity.edit, audits, (B, M), cfg, trim=False)
    keep = peaks >= 0
    half = np.full((B, M), 0.5, np.float32)
    return records.Step(3, cfg, responses, scores, peaks, feedback, ChunkTargets(keep, half, half, half - 0.25))


def made(step, decoder, *, limit=64, completions=4, grade=None, pairs=0):
    audits, rows, left, left_whole = records.choose(step.feedback, B, limit, completions)
    graded = records.grades(step.responses, None, grade, decoder, list(range(B)))
    by_chance = records.chance(similarity.edit, audits, pairs)
    return (
        records.audit_records(step, audits, by_chance=by_chance, graded=graded),
        records.completion_records(step, rows, decoder, graded=graded), left, left_whole,
    )  # fmt: skip


def test_an_audit_says_who_asked_where_and_what_came(step, cfg, decoder, tokens):
    def grade(texts, answers):
        return [a in t for t, a in zip(texts, answers, strict=True)]

    (first, *_), _, left, _ = made(step, decoder, grade=grade)
    assert first["question"] == "Question 0" and first["answer"] == "7" and first["grade"] is True and left == 0
    assert (first["step"], first["prompt_id"], first["sample_id"], first["response"]) == (3, "p0", "s0", 0)
    assert (first["peak"], first["response_tokens"], first["cost_usd"], first["latency_s"]) == (
        1,
        len(tokens[0]),
        0.5,
        0.25,
    )
    assert first["prefix_end"] == decoder.text(tokens[0][:1]) and first["prefix_characters"] == len(first["prefix_end"])
    assert TEXTS[0].startswith(first["prefix_end"] + first["chunk"])
    assert (first["explained"], first["restarted"], first["n"]) == (1, 0, N)
    assert first["prefix_perplexity"] == pytest.approx(np.exp(0.1), rel=1e-3)
    json.dumps(first, allow_nan=False)


def test_a_response_is_kept_whole_with_its_tokens_entropies_and_chunks(step, cfg, decoder, tokens):
    _, whole, _, left = made(step, decoder)
    assert [c["text"] for c in whole] == list(TEXTS) and left == 0
    for c, row in zip(whole, tokens, strict=True):
        assert "".join(c["pieces"]) == c["text"] and len(c["pieces"]) == len(c["entropy"]) == c["tokens"] == len(row)
        assert c["grade"] is None and c["answer"] == "7"
    assert [k["peak"] for k in whole[0]["chunks"]] == [1, 4] and whole[0]["chunks"][0]["weight"] == 0.25
    assert [c["response"] for c in whole] == [0, 1, 0, 1]


def test_pieces_of_characters_that_several_tokens_share_stand_at_the_last_one(decoder):
    row = decoder._tokenizer("a 世界 🌍 b", add_special_tokens=False)["input_ids"]
    pieces = records.pieces(decoder, row, 1000)
    assert "".join(pieces) == "a 世界 🌍 b" and "" in pieces and "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 64])
def test_audits_are_bounded_and_taken_over_the_whole_batch(step, decoder, limit):
    audits, _, left, _ = made(step, decoder, limit=limit, completions=0)
    total = len(step.feedback.audits)
    assert len(audits) == min(limit, total) and left == total - len(audits)
    even = (
        [step.feedback.audits[i * total // limit] for i in range(len(audits))]
        if limit < total
        else step.feedback.audits
    )
    assert [(a["sample_id"], a["peak"]) for a in audits] == [(a.request.sample_id, a.request.peak) for a in even]


def test_what_nothing_scored_and_nobody_audited_is_still_kept_whole(step, decoder):
    bare = dataclasses.replace(step, scores=None, targets=None)
    (whole, *_) = records.completion_records(bare, [0], decoder, graded={0: 1.0})
    assert whole["text"] == TEXTS[0] and whole["entropy"] == [] and whole["chunks"] == [] and whole["grade"] == 1.0


def test_what_is_left_out_is_counted(step, cfg, decoder):
    audits, whole, left, left_whole = made(step, decoder, limit=2, completions=1)
    assert len(audits) == 2 and left == len(step.feedback.audits) - 2 and len(whole) == 1 and left_whole == B - 1
    cfg.log.text_characters = 5
    audits, whole, *_ = made(step, decoder)
    assert all(len(t) <= 5 for a in audits for t in [a["question"], a["chunk"], a["prefix_end"], *a["continuations"]])
    assert audits[0]["left_out_characters"] > 0
    assert all(len(c["text"]) <= 5 for c in whole)
    assert whole[0]["left_out_tokens"] == whole[0]["tokens"] - len(whole[0]["pieces"]) > 0


def test_audits_of_whole_responses_come_first(step, cfg, decoder):
    audits, rows, *_ = records.choose(step.feedback, B, 2, 1)
    assert rows == [0] and {a.row for a in audits} == {0}
    assert records.choose(step.feedback, B, 0, 0)[:2] == ([], [])


def test_grades_are_the_step_s_rewards_where_it_has_them(step, decoder):
    assert records.grades(step.responses, np.array([1, 0, 0.5, 1], np.float32), None, decoder, [0, 2]) == {
        0: 1.0,
        2: 0.5,
    }
    assert records.grades(step.responses, None, None, decoder, [0]) == {}


def test_chance_compares_with_another_prompt_and_stays_within_its_bound(step, cfg, decoder):
    by_chance = records.chance(similarity.edit, step.feedback.audits, 4)
    assert sum(map(len, by_chance.values())) <= 4 and by_chance
    alone = [a for a in step.feedback.audits if a.row < 2]
    assert records.chance(similarity.edit, alone, 4) == {}
    assert records.chance(similarity.edit, step.feedback.audits, 0) == {}


def test_chance_is_measured_as_agreement_was_on_texts_cut_to_the_chunk(step):
    """A text ten times as long agrees with nothing by edits, and with something once it is cut."""
    audits = step.feedback.audits
    for a in audits:
        (first, *_), chunk = a.result.continuations, a.chunk
        a.result = dataclasses.replace(a.result, continuations=(dataclasses.replace(first, text=chunk + " and" * 40),))
    plain = records.chance(similarity.edit, audits, 4)
    cut = records.chance(similarity.edit, audits, 4, lambda i, texts: audit.trimmed(audits[i].chunk, texts))
    assert plain.keys() == cut.keys()
    for i, (value,) in cut.items():
        (other,) = records._of_another_prompt(audits, i)
        size = len(audits[i].chunk)
        assert value == pytest.approx(float(similarity.edit([audits[i].chunk], [other[:size]])[0]), abs=1e-5)
    assert cut != plain


def test_failures_and_lone_surrogates_survive_as_json(step, cfg, decoder):
    step.feedback.audits[0].result = ContinuationResult(
        (Continuation(0, "\ud800 \x00 \u202e", "stop"),), (Failure(1, "gone"), Failure(2, "gone")), Usage(), 0.0
    )
    step.feedback.audits[0].similarity = np.array([0.1], np.float32)
    (first, *_), *_ = made(step, decoder)
    assert first["failures"] == ["gone", "gone"]
    assert json.loads(json.dumps(first))["continuations"] == ["\ud800 \x00 \u202e"]


def test_an_answer_that_starts_over_is_told_from_one_that_goes_on():
    prefix = "First we count all the apples that Ann has, then"
    assert records.restarts(prefix, "First we count all the apples again")
    assert not records.restarts(prefix, " we take away") and not records.restarts(
        "First", "First we count all the apples"
    )
    assert records.explains("Sure! Here is the rest: 7") and not records.explains(" so there are 7")


def test_evaluations_keep_the_first_answers_and_count_the_others(cfg):
    prompts = [Prompt(f"e{i}", ({"role": "user", "content": "Q"},), "7") for i in range(5)]
    evaluation = Evaluation(0.4, 3.0, 0.0, 0.0, tuple("abcde"), (True, False, True, False, False))
    cfg.log.evaluation_answers = 3
    kept, left = records.evaluation_records(evaluation, prompts, 20, cfg)
    found = [(r["prompt_id"], r["text"], r["correct"], r["step"]) for r in kept]
    assert found == [("e0", "a", True, 20), ("e1", "b", False, 20), ("e2", "c", True, 20)]
    assert left == 2
