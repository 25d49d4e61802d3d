"""Peaks -> prefixes -> continuations -> k_sem: the texts against decode itself, the traffic, the arithmetic, the
log."""

import asyncio
import time

import numpy as np
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omniopd_jax import audit, config, similarity, teachers
from omniopd_jax.data import prompts as data
from omniopd_jax.teachers import Continuation, ContinuationResult, Failure, Usage
from omniopd_jax.teachers.simulated import SimulatedTeacher

TEXT = "héllo 日本語 😀 naïve 👩‍👩‍👧 3 + 4 = 7 — \u2028 end"
BYTES = tiny.world.train_tokenizer(["a"], 259)  # no merges: every byte is a token
WORDS = tiny.tokenizer()
SPECIAL = WORDS.convert_tokens_to_ids("<|im_start|>")
END = WORDS.eos_token_id


def small(**more):
    c = config.default()
    c.update_from_flattened_dict({"audit.num_chunks": 2, "audit.chunk_tokens": 4, "audit.num_continuations": 4} | more)
    return c


def prompts(*texts):
    return [data.Prompt(f"p{i}", ({"role": "user", "content": t},)) for i, t in enumerate(texts)]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- text of a chunk, and where a chunk may start
# -----------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
def test_chunk_is_what_decode_adds(tokenizer):
    ids, decoder = ids_of(tokenizer, TEXT), audit.Decoder(tokenizer)
    eligible = decoder.eligible(ids, 5)
    assert 0 < eligible.sum() < len(ids), "the text must have both kinds of positions"
    for t in np.flatnonzero(eligible):
        prefix, chunk = decoder.chunk(ids, int(t), 5)
        assert prefix == decode(tokenizer, ids[:t])
        assert prefix + chunk == decode(tokenizer, ids[: t + 5])
        assert TEXT.startswith(prefix)


def test_chunk_leaves_special_tokens_out():
    ids = ids_of(WORDS, "The answer is 12.") + [END]
    prefix, chunk = audit.Decoder(WORDS).chunk(ids, len(ids) - 3, 3)
    assert chunk == decode(WORDS, ids[-3:-1])
    assert "<|" not in prefix + chunk


def test_a_leading_space_belongs_to_the_chunk():
    ids = ids_of(WORDS, "The answer is")
    first = len(ids_of(WORDS, "The"))
    assert audit.Decoder(WORDS).chunk(ids, first, 2)[1].startswith(" ")


def test_positions_inside_a_character_are_not_eligible():
    """Brute force: byte by byte, a position is eligible exactly where the text so far is whole."""
    ids = ids_of(BYTES, TEXT)
    raw = TEXT.encode()
    assert len(ids) == len(raw)
    begins = [t == len(raw) or (raw[t] & 0xC0) != 0x80 for t in range(len(raw) + 1)]
    whole = [begins[t] and begins[min(t + 3, len(raw))] for t in range(len(raw))]
    np.testing.assert_array_equal(audit.Decoder(BYTES).eligible(ids, 3), whole)


def fallback_tokenizer():
    """A tokenizer with byte fallback, as Llama 2's: what its vocabulary lacks becomes tokens of one byte each."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789.,+=?é", "\ufffd"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    bpe = models.BPE(
        {name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    raw = Tokenizer(bpe)
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


FALLBACK = fallback_tokenizer()


def is_eligible(tokenizer, ids, t, chunk_tokens) -> bool:
    """By decoding whole prefixes: both borders stand on their own, one text continues the other, half of it is
    readable."""
    prefix, whole = decode(tokenizer, ids[:t]), decode(tokenizer, ids[: t + chunk_tokens])
    chunk = whole[len(prefix) :]
    whole_borders = not prefix.endswith("\ufffd") and not whole.endswith("\ufffd")
    return whole_borders and whole.startswith(prefix) and 2 * chunk.count("\ufffd") <= len(chunk)


def check_eligible(tokenizer, ids, chunk_tokens=3):
    decoder = audit.Decoder(tokenizer)
    eligible = decoder.eligible(ids, chunk_tokens)
    np.testing.assert_array_equal(eligible, [is_eligible(tokenizer, ids, t, chunk_tokens) for t in range(len(ids))])
    for t in range(len(ids)):  # nothing raises, wherever a chunk starts
        prefix, chunk = decoder.chunk(ids, t, chunk_tokens)
        assert not eligible[t] or prefix + chunk == decode(tokenizer, ids[: t + chunk_tokens])


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS, FALLBACK], ids=["bytes", "words", "fallback"])
@given(
    st.lists(st.one_of(st.integers(0, 258), st.sampled_from(ids_of(BYTES, "é😀日"))), min_size=1, max_size=24),
    st.integers(1, 9),
)
@example(ids_of(BYTES, "é")[1:] + ids_of(BYTES, "a😀"), 3)  # a stray second byte
@example(ids_of(BYTES, "\ufffd\ufffda"), 3)  # a true U+FFFD in the text
@settings(max_examples=150)
def test_any_tokens(tokenizer, ids, chunk_tokens):
    """A random student writes broken UTF-8 too: an eligible prefix is always a prefix, and nothing raises."""
    check_eligible(tokenizer, ids, chunk_tokens)


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["\u65e5", "\U0001f600", "é", "ß", "a", " b", "\ufffd"]).map(lambda c: ids_of(FALLBACK, c)),
            st.integers(0, 258).map(lambda i: [i]),
            st.sampled_from([[2], [0], [259]]),
        ),
        min_size=1,
        max_size=10,
    ),
    st.integers(1, 9),
)
@example([ids_of(FALLBACK, "\u65e5\u672c"), [3 + 0xE6]], 3)  # two characters that the vocabulary lacks, side by side
@settings(max_examples=300)
def test_characters_outside_the_vocabulary_side_by_side(parts, chunk_tokens):
    """The bytes of neighbours are decoded at once: one bad byte turns the whole characters before it into marks."""
    check_eligible(FALLBACK, sum(parts, []), chunk_tokens)


def test_the_byte_fallback_tokenizer_is_one():
    ids = ids_of(FALLBACK, "a \u65e5\u672c")
    assert decode(FALLBACK, ids) == "a \u65e5\u672c" and len(ids) == 9
    assert decode(FALLBACK, ids[:-1]).endswith("\ufffd" * 5), "all bytes of the run, the whole character's too"


def test_a_chunk_of_replacement_marks_is_not_audited():
    """More than half of it unreadable: nothing that a teacher could agree with."""
    bad = [i for i in range(3, 259) if decode(BYTES, [i]) == "\ufffd"][:1]
    row = ids_of(BYTES, "ab") + bad + ids_of(BYTES, "c") + bad * 2 + ids_of(BYTES, "de")
    assert (
        [is_eligible(BYTES, row, t, 4) for t in (0, 1)]
        == list(audit.Decoder(BYTES).eligible(row, 4)[:2])
        == [True, False]
    )


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["bytes", "fallback"])
def test_a_long_row_of_characters_in_bytes_takes_no_seconds(tokenizer):
    """7,000 tokens, each a part of a character: the positions of a whole response at the paper's length."""
    ids = (ids_of(tokenizer, "\u65e5\u672c\u8a9e") * 800)[:7000]
    begun = time.perf_counter()
    eligible = audit.Decoder(tokenizer).eligible(ids, 60)
    assert time.perf_counter() - begun < 5 and eligible.sum() > 2000


def test_a_special_token_between_two_bytes_of_a_character():
    """Left out of the text, it joins what is around it; the position after it is still inside the character."""
    first, second = ids_of(BYTES, "é")
    special = BYTES.convert_tokens_to_ids("<|im_start|>")
    check_eligible(BYTES, [first, special, second, *ids_of(BYTES, "abc")])


def test_text_ends_before_a_stop_string_and_no_chunk_starts_inside_one():
    """As an end token, which is in the row and not in the text."""
    decoder, ids = audit.Decoder(WORDS, ("\nQuestion:",)), ids_of(WORDS, "It is 12.\nQuestion:")
    assert decoder.text(ids) == "It is 12."
    inside = [t for t in range(len(ids)) if len(decode(WORDS, ids[:t])) > len("It is 12.")]
    assert inside and not decoder.eligible(ids, 2)[inside].any() and decoder.eligible(ids, 2)[: inside[0]].all()
    prefix, chunk = decoder.chunk(ids, inside[0] - 1, 2)
    assert prefix + chunk == "It is 12."


def test_eligible_is_per_row_and_false_past_the_end():
    rows = [ids_of(BYTES, "aéa"), ids_of(BYTES, "a"), []]
    out = audit.eligible_positions(audit.Decoder(BYTES), rows, 5, 2)
    np.testing.assert_array_equal(out, [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])


# --- the plan
# -----------------------------------------------------------------------------------------------------------


def make_plan(c, peaks=((0, 9), (5, -1)), samples=("s0", "s1"), text="The answer is 12. Then 3 + 4 = 7 so it is 12."):
    rows = [ids_of(WORDS, text)] * 2
    return audit.plan(
        audit.Decoder(WORDS), prompts("one", "two"), rows, np.array(peaks, np.int32), list(samples), c
    ), rows


def test_plan_asks_once_a_peak_in_ascending_order():
    c = small()
    audits, rows = make_plan(c)
    assert [(a.row, a.m, a.request.peak) for a in audits] == [(0, 0, 0), (0, 1, 9), (1, 0, 5)]
    for a in audits:
        r = a.request
        assert r.prefix == decode(WORDS, rows[a.row][: r.peak])
        assert a.chunk == decode(WORDS, rows[a.row][r.peak : r.peak + 4])
        assert a.chunk not in r.prefix[-len(a.chunk) :], "the teacher saw the audited tokens"
        assert r.messages == ({"role": "user", "content": ("one", "two")[a.row]},)
        assert (r.indices, r.max_tokens, r.temperature, r.top_p) == ((0, 1, 2, 3), 4, 1.0, 1.0)
        assert r.sample_id == f"s{a.row}"


def test_no_two_continuations_share_a_seed():
    """Runs, steps, prompts, generations, peaks and continuation indices: each alone gives another stream."""
    ids = [
        teachers.sample_id(run, step, prompt, g)
        for run in range(3) for step in range(3) for prompt in ("a", "b", "1") for g in range(3)
    ]  # fmt: skip
    assert len(set(ids)) == len(ids)
    c = small(**{"audit.num_chunks": 8})
    audits, _ = make_plan(c, peaks=(tuple(range(8)), tuple(range(8))))
    seeds = [a.request.seed(i) for a in audits for i in a.request.indices]
    assert len(set(seeds)) == len(seeds) == 64
    assert all(0 <= s < 2**31 for s in seeds)


def test_seed_does_not_depend_on_the_peaks_rank():
    """Peak 9 as the second chunk or as the only one: the same stream (method.md, section 5)."""
    (_, second, _), _ = make_plan(small())
    (only, _), _ = make_plan(small(), peaks=((9, -1), (5, -1)))
    assert (second.m, only.m) == (1, 0)
    assert [second.request.seed(i) for i in range(4)] == [only.request.seed(i) for i in range(4)]


def test_sample_id_is_stable_across_processes_and_releases():
    assert teachers.stable_hash("a", "b") != teachers.stable_hash("ab")
    assert teachers.stable_hash(1, 23) != teachers.stable_hash(12, 3)
    assert teachers.stable_hash("x") == 2697552496229297191, "journals of older runs would no longer be found"
    assert teachers.sample_id(0, 0, "p", 0) == "5f3c9be1e4724993"


# --- asking
# -------------------------------------------------------------------------------------------------------------


class Scripted(teachers.Teacher):
    """A teacher that answers by a function of the request."""

    def __init__(self, answer):
        self.answer = answer
        self.ended = []

    async def continue_text(self, request):
        try:
            return await self.answer(request)
        finally:
            self.ended.append((request.sample_id, request.peak))


def full(request, text=None, **more):
    return ContinuationResult(tuple(Continuation(i, text or f"t{i}", "length") for i in request.indices), **more)


@pytest.mark.parametrize(
    "broken",
    [
        lambda r: full(r).continuations[:-1],
        lambda r: full(r).continuations[:-1] + (Continuation(0, "again", "length"),),
        lambda r: full(r).continuations + (Continuation(9, "more", "length"),),
        lambda r: (),
    ],
    ids=["one lost", "one twice", "one too many", "none"],
)
def test_a_teacher_that_loses_a_continuation_raises(broken):
    async def answer(r):
        return ContinuationResult(broken(r))

    with pytest.raises(RuntimeError, match="indices"):
        asyncio.run(audit.ask(Scripted(answer), make_plan(small())[0]))


def test_failures_are_no_loss():
    async def answer(r):
        return ContinuationResult((Continuation(2, "x", "stop"),), tuple(Failure(i, "no") for i in (3, 0, 1)))

    audits, _ = make_plan(small())
    asyncio.run(audit.ask(Scripted(answer), audits))
    assert all(len(a.result.continuations) == 1 for a in audits)


def test_a_stopped_teacher_is_told_after_the_calls_under_way_ended():
    """What was paid for comes in before the stop is raised."""

    async def answer(r):
        if r.sample_id == "s0" and r.peak == 0:
            raise teachers.TeacherStopped("budget.usd = 1 is spent")
        await asyncio.sleep(0.05)
        return full(r)

    audits, _ = make_plan(small())
    teacher = Scripted(answer)
    with pytest.raises(teachers.TeacherStopped, match="budget.usd"):
        asyncio.run(audit.ask(teacher, audits))
    assert len(teacher.ended) == 3
    assert [a.result is None for a in audits] == [True, False, False]


def test_a_real_error_goes_before_a_stop():
    async def answer(r):
        if r.peak == 0:
            raise teachers.TeacherStopped("spent")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(audit.ask(Scripted(answer), make_plan(small())[0]))


def test_responses_are_audited_at_the_same_time():
    """Four audits of 50 ms take nowhere near 200."""

    async def answer(r):
        await asyncio.sleep(0.05)
        return full(r)

    audits, _ = make_plan(small(), peaks=((0, 9), (5, 12)))

    async def timed():
        start = asyncio.get_running_loop().time()
        await audit.ask(Scripted(answer), audits)
        return asyncio.get_running_loop().time() - start

    assert asyncio.run(timed()) < 0.15


# --- comparing
# ----------------------------------------------------------------------------------------------------------


def answered(c, texts_of, **more):
    """A plan whose audits hold `texts_of(audit)` as continuations."""
    audits, _ = make_plan(c, **more)
    for a in audits:
        texts = texts_of(a)
        arrived = tuple(Continuation(i, t, "length") for i, t in enumerate(texts))
        lost = tuple(Failure(i, "lost") for i in range(len(texts), len(a.request.indices)))
        a.result = ContinuationResult(arrived, lost, Usage(calls=1, tokens_in=10, tokens_out=2), 0.25)
    return audits


def test_k_sem_is_the_sum_over_what_arrived():
    c = small()
    texts = {0: ["The answer is", "x", "y", "z"], 9: ["never"], 5: []}
    audits = answered(c, lambda a: texts[a.request.peak])
    feedback = audit.compare(similarity.edit, audits, (2, 2), c, trim=False)
    np.testing.assert_array_equal(feedback.n_BM, [[4, 1], [0, 0]])
    for a in audits:
        phi = similarity.edit([a.chunk] * len(texts[a.request.peak]), texts[a.request.peak])
        np.testing.assert_allclose(feedback.k_sem_BM[a.row, a.m], phi.sum(), rtol=1e-6)
        np.testing.assert_array_equal(a.similarity, phi)
    assert feedback.k_sem_BM[1, 1] == 0, "nothing was asked there"
    assert feedback.k_sem_BM.dtype == np.float32
    assert feedback.n_BM.dtype == np.int32


def test_trim_cuts_a_continuation_to_the_chunks_characters():
    c = small()
    audits = answered(c, lambda a: [a.chunk + " and much more", a.chunk[:-1], "", a.chunk])
    trimmed = audit.compare(similarity.edit, audits, (2, 2), c, trim=True)
    for a in audits:
        np.testing.assert_allclose(a.similarity, [1, 1 - 1 / len(a.chunk), 0, 1], rtol=1e-6)
    loose = audit.compare(similarity.edit, audits, (2, 2), c, trim=False)
    assert (loose.k_sem_BM < trimmed.k_sem_BM)[loose.n_BM > 0].all()


def test_a_chunk_of_special_tokens_agrees_with_no_text_trimmed_or_not():
    """It has no characters to cut a text to: cut to none, every text would agree in full."""
    assert audit.trimmed("", [" 12", ""]) == [" 12", ""] and audit.trimmed(" 1", [" 12", ""]) == [" 1", ""]
    c = small(**{"audit.num_chunks": 1, "audit.chunk_tokens": 4})
    decoder = audit.Decoder(WORDS)
    (one,) = audit.plan(decoder, prompts("q"), [[SPECIAL] * 8], np.array([[2]]), ["s"], c)
    assert one.chunk == ""
    texts = tuple(Continuation(i, " so it is", "length") for i in range(4))
    one.result = ContinuationResult(texts, (), Usage(), 0.0)
    for trim in (True, False):
        assert audit.compare(similarity.edit, [one], (1, 1), c, trim=trim).k_sem_BM[0, 0] == 0


def test_shuffled_texts_come_from_another_prompt():
    c = small(**{"audit.shuffle_texts": True})
    rows = 6
    ids = ids_of(WORDS, "The answer is 12. Then 3 + 4 = 7 so it is 12.")
    peaks = np.tile(np.array([[0, 6]], np.int32), (rows, 1))
    asked = prompts(*(f"question {i // 2}" for i in range(rows)))  # two responses a prompt
    audits = audit.plan(audit.Decoder(WORDS), asked, [ids] * rows, peaks, [f"s{i}" for i in range(rows)], c)
    for a in audits:
        a.result = full(a.request, text=a.request.messages[0]["content"])
    seen = []

    def phi(student, teacher):
        seen.extend(teacher)
        return np.zeros(len(teacher), np.float32)

    audit.compare(phi, audits, (rows, 2), c, trim=False)
    own = [a.request.messages[0]["content"] for a in audits for _ in a.request.indices]
    assert len(seen) == len(own)
    assert all(s != o for s, o in zip(seen, own))
    assert set(seen) == set(own), "the control uses every prompt's answers"


def test_shuffled_texts_without_another_prompt_are_refused():
    """A control that scores a chunk against its own teacher's answers is no control: it must not run in silence."""
    c = small(**{"audit.shuffle_texts": True})
    audits, _ = make_plan(c)
    audits = [a for a in audits if a.row == 0]
    for a in audits:
        a.result = full(a.request)
    with pytest.raises(Exception, match=r"shuffle|another prompt"):  # noqa: B017
        audit.compare(similarity.edit, audits, (2, 2), c, trim=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1.1])
def test_a_similarity_outside_its_range_raises(bad):
    c = small()
    audits = answered(c, lambda a: ["x"])
    with pytest.raises(FloatingPointError, match=r"audit\.similarity"):
        audit.compare(lambda a, b: np.full(len(a), bad, np.float32), audits, (2, 2), c, trim=False)


@pytest.mark.parametrize("name", ["edit", "rouge1", "rougeL_fast"])
def test_no_audit_at_all_is_no_error(name):
    c = small()
    feedback = audit.compare(similarity.SIMILARITIES[name](c), [], (3, 2), c, trim=True)
    assert feedback.k_sem_BM.shape == (3, 2)
    assert not feedback.k_sem_BM.any()
    assert not feedback.n_BM.any()
    asyncio.run(audit.ask(SimulatedTeacher(["x"]), []))
    figures = audit.metrics(feedback, c)
    assert figures["audit/short"] == 0
    assert np.isfinite(list(figures.values())).all()


# --- figures and records
# ------------------------------------------------------------------------------------------------


def test_metrics_say_how_the_similarities_are_distributed_and_which_audits_are_short():
    c = small()  # N = 4, n_min = 2
    texts = {0: ["a", "b", "c"], 9: ["d"], 5: []}
    audits = answered(c, lambda a: texts[a.request.peak])
    figures = audit.metrics(audit.compare(similarity.edit, audits, (2, 2), c, trim=False), c)
    assert figures["audit/short"] == 1
    all_phi = np.concatenate([a.similarity for a in audits])
    assert figures["audit/similarity_p90"] == pytest.approx(np.quantile(all_phi, 0.9))


def test_a_teachers_counts_are_of_what_it_did_since_they_were_last_taken():
    counts = teachers.Counts()
    one = Continuation(0, "x", "stop")
    fresh = Usage(calls=3, retries=2, tokens_in=100, tokens_cached=40, tokens_out=7, cost_usd=0.5)
    counts.add(ContinuationResult((one,) * 3, (Failure(3, "late"),), fresh, 2.0))
    counts.add(ContinuationResult((one,) * 4, (), Usage(calls=1, tokens_in=20, tokens_out=4), 0.5, replayed=4))
    expected = {
        "teacher/calls": 4,
        "teacher/retries": 2,
        "teacher/failed": 1,
        "teacher/tokens_in": 120,
        "teacher/tokens_cached": 40,
        "teacher/tokens_out": 11,
        "teacher/cost_usd": 0.5,
        "teacher/cache_hit_rate": 40 / 120,
        "teacher/replayed_fraction": 4 / 8,
        "teacher/latency_p50": 1.25,
        "teacher/latency_p95": 0.5 + 0.95 * 1.5,
    }
    assert counts.take() == pytest.approx(expected)
    assert not any(counts.take().values())


# --- the simulated teacher
# ----------------------------------------------------------------------------------------------


def test_the_simulated_teacher_gives_a_request_the_same_answer_twice():
    audits, _ = make_plan(small(**{"audit.num_continuations": 8}))
    teacher = SimulatedTeacher(list("abcdefgh"))

    def texts(a):
        return [c.text for c in asyncio.run(teacher.continue_text(a.request)).continuations]

    assert texts(audits[0]) == texts(audits[0])
    assert texts(audits[0]) != texts(audits[1])
    assert len(set(texts(audits[0]))) > 1


@pytest.mark.parametrize(
    "spec",
    [
        "nothing",
        "[1, 2",
        '{"texts": ["a"]}',
        '{"texts": ["a", "b"], "probs": [1.0]}',
        '{"texts": ["a"], "probs": [0.5]}',
        "[]",
    ],
)
def test_a_simulated_teachers_file_that_is_wrong_is_one_line(tmp_path, spec):
    c = small()
    c.teacher.provider = "simulated"
    c.teacher.model = str(tmp_path / "teacher.json")
    if spec != "nothing":
        (tmp_path / "teacher.json").write_text(spec)
    with pytest.raises(teachers.UserError, match=r"teacher\.model = .*teacher\.json"):
        teachers.make(c)
