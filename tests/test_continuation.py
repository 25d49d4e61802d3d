"""Continuation fine-tuning: golden values of sft, cuts and joints against plain Python, whole runs."""

import golden_sft
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers import models as models_

from omniopd_jax import audit, config, continuation, cuts, experience, model, objective, step
from omniopd_jax.data import prompts as data
from omniopd_jax.errors import NumberError
from omniopd_jax.hf import template
from omniopd_jax.teachers import Continuation, ContinuationResult, Failure


@pytest.fixture
def one_device(monkeypatch):
    tiny.on_one_device(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "continuation"])
def test_cut_zero_is_the_sft_of_before(models, tmp_path, one_device, name):
    """Losses, norms and parameters of the code from before the change: a teacher's solutions, and a file's."""
    golden = np.load(golden_sft.FILE)
    for kind, settings in golden_sft.runs(tmp_path).items():
        settings |= {"objective.name": name, "continuation.cut": "zero"}
        got = golden_sft.train_once(models, tmp_path / kind, settings)
        keys = [key for key in golden.files if key.startswith(f"{kind}/")]
        assert len(keys) >= 2
        for key in keys:
            # 2e-6: the golden run was compiled by XLA's other CPU emitter, and AdamW divides by small gradients
            np.testing.assert_allclose(got[key.partition("/")[2]], golden[key], rtol=1e-5, atol=2e-6, err_msg=key)


# --- where an answer is cut -------------------------------------------------------------------------------------------


def config_of(**more):
    c = config.default()
    c.update_from_flattened_dict({f"continuation.{k}": v for k, v in more.items()})
    c.audit.chunk_tokens = 4
    return c


def test_fixed_cuts_are_multiples_of_k_moved_back_to_where_a_cut_may_be():
    open_T = np.array([True] * 4 + [False] * 3 + [True] * 5)
    assert cuts.fixed(open_T, None, 0, config_of(cut_tokens=5, cuts=3)) == [3, 10]  # 5 -> 3; 15 is past the end
    assert cuts.fixed(open_T, None, 0, config_of(cut_tokens=12)) == [], "the answer ended before k"
    assert cuts.fixed(np.zeros(9, bool), None, 0, config_of(cut_tokens=5)) == []


def test_uniform_cuts_are_every_place_alike_and_the_responses_own():
    open_T = np.array([True, False, True, True, False, True])
    c = config_of(cuts=2)
    drawn = [cuts.uniform(open_T, None, i, c) for i in range(3000)]
    assert drawn[7] == cuts.uniform(open_T, None, 7, c) and all(a < b for a, b in drawn)
    count = np.bincount(np.ravel(drawn), minlength=6)
    assert count[1] == count[4] == 0
    np.testing.assert_allclose(count[open_T] / 3000, 0.5, atol=0.04)  # two of four places
    assert cuts.uniform(np.array([False, True]), None, 0, c) == [1]


@pytest.mark.parametrize("count", [1, 3])
def test_peak_cuts_are_those_of_a_plain_search(count):
    rng = np.random.default_rng(0)
    for _ in range(50):
        entropy = rng.integers(0, 6, 20).astype(float)  # ties
        open_T = rng.random(21) < 0.7  # the place behind the last token has no entropy
        taken: list[int] = []
        for _ in range(count):
            free = [t for t in range(20) if open_T[t] and all(abs(t - o) >= 4 for o in taken)]
            if free:
                taken.append(max(free, key=lambda t: (entropy[t], t)))
        assert cuts.peak(open_T, entropy, 0, config_of(cuts=count)) == sorted(taken)


def test_an_entropy_that_is_no_number_raises_and_cuts_nowhere_in_silence():
    tok = tiny.tokenizer()
    ids = tok("so 3 and 4 is 7")["input_ids"]
    prompt = data.Prompt("p", ({"role": "user", "content": "3 + 4?"},), token_ids=tuple(tok("3 + 4?")["input_ids"]))
    responses = experience.Responses([prompt] * 2, ["a", "b"], [ids, ids], np.array([True, True]))
    entropy_BT = np.ones((2, len(ids) + 2))
    entropy_BT[:, len(ids) :] = np.nan  # behind a row's end it means nothing
    rule, c = cuts.CUTS["peak"], config_of(cuts=1)
    assert len(continuation.plan(audit.Decoder(tok), rule, responses, entropy_BT, c)) == 2
    entropy_BT[1, 1] = np.nan
    with pytest.raises(NumberError, match=r"row\(s\) \[1\]"):
        continuation.plan(audit.Decoder(tok), rule, responses, entropy_BT, c)


def test_a_cut_is_never_inside_a_character_nor_behind_a_finished_answer():
    tok = tiny.tokenizer()
    decoder, ids = audit.Decoder(tok), tok("é has 3")["input_ids"]
    assert len(tok("é")["input_ids"]) == 2, "the case needs a character of two tokens"
    finished = continuation.open_places(decoder, ids, True)
    assert finished.tolist() == [True, False] + [True] * (len(ids) - 2)
    assert continuation.open_places(decoder, ids, False).tolist() == [*finished.tolist(), True]


def test_in_a_mix_a_text_is_not_drawn_with_the_numbers_of_an_audit_of_the_same_place():
    tok = tiny.tokenizer()
    ids = tok("so 3 and 4 is 7")["input_ids"]
    prompt = data.Prompt("p", ({"role": "user", "content": "3 + 4?"},), token_ids=tuple(tok("3 + 4?")["input_ids"]))
    responses = experience.Responses([prompt], ["a"], [ids], np.array([True]))
    entropy_BT = np.arange(len(ids), dtype=float)[None]
    c = config_of(cuts=1)
    c.objective.name = "continuation"
    [alone] = continuation.plan(audit.Decoder(tok), cuts.CUTS["peak"], responses, entropy_BT, c)
    c.objective.mix = {"omniopd": 1.0, "continuation": 1.0}
    [mixed] = continuation.plan(audit.Decoder(tok), cuts.CUTS["peak"], responses, entropy_BT, c)
    assert alone.request.sample_id == "a" != mixed.request.sample_id and alone.request.peak == mixed.request.peak
    assert alone.request.seed(0) != mixed.request.seed(0)


# --- the joint --------------------------------------------------------------------------------------------------------


def test_a_joint_that_would_merge_stays_two_tokens():
    """The prefix keeps the ids that the student sampled; what follows is tokenized as it stands."""
    tok = tiny.tokenizer()
    whole = next(w for w in ("apples", "The answer is", " answer") if len(tok(w)["input_ids"]) == 1)
    for at in range(1, len(whole)):
        before, after = tok(whole[:at])["input_ids"], whole[at:]
        ids = template.Template(tok, None).follow(before, after, begins=False)
        assert ids == tok(after)["input_ids"] and tok.decode(before + ids) == whole
        assert before + ids != tok(whole)["input_ids"]


def test_a_tokenizer_that_begins_a_text_with_a_space_writes_none_at_the_joint():
    made = tokenizers.Tokenizer(models_.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>"])
    made.train_from_iterator(["the answer is 12 and. the others.\n are apples a b c"] * 3, trainer)
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    before = tok("the answ")["input_ids"]
    for text in ("er is 12", " is 12"):
        ids = template.Template(tok, None).follow(before, text, begins=False)
        assert tok.decode(before + ids) == "the answ" + text
    assert tok.decode(before + tok("er is 12")["input_ids"]) != "the answer is 12", "the case must tell them apart"
    plain = template.Template(
        tok, None, lead=" "
    )  # an answer begins as the student samples one: with the space in its piece
    assert plain.follow(before, "the apples", begins=True) == tok("the apples")["input_ids"]
    assert tok.decode(before + plain.follow(before, "\nare", begins=True)) == "the answ\nare"


def test_rows_hold_the_students_ids_the_teachers_text_and_its_end():
    """Against plain lists: end of turn only where the teacher ended within E; a failed call and no cut are empty rows."""
    tok = tiny.tokenizer()
    made, c = template.make(tok), config_of(cuts=2, max_tokens=6)
    ids = tok("Tom has 3 apples and 4 pears.")["input_ids"]
    prompts = [data.Prompt(f"p{i}", ({"role": "user", "content": "?"},), token_ids=(7, 8)) for i in range(2)]
    responses = experience.Responses(prompts, ["a", "b"], [ids, ids[:3]], np.array([True, True]))
    rule = cuts.CUTS["uniform"]
    audits = continuation.plan(audit.Decoder(tok), rule, responses, None, c)
    assert [(a.row, a.m) for a in audits] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    said = [(" so 5.", "stop"), (" one two three four five six", "length"), None, (" it is twelve", "stop")]
    for a, what in zip(audits, said):
        assert a.request.prefix == tok.decode(responses.tokens[a.row][: a.request.peak])
        texts = () if what is None else (Continuation(0, *what),)
        a.result = ContinuationResult(texts, () if what else (Failure(0, "gone"),))
    got = continuation.rows(audits, responses, made, c)
    end = list(made.turn_end_ids[:1])
    for a, what, prompt, row, whole in zip(audits, said, got.prompts, got.tokens, got.finished):
        assert list(prompt.token_ids) == [7, 8, *responses.tokens[a.row][: a.request.peak]]
        text = [] if what is None else tok(what[0])["input_ids"]
        assert row == (text + (end if what and what[1] == "stop" else []))[:6]
        assert whole == (what is not None and what[1] == "stop" and len(text) < 6)
    assert got.cut == [a.request.peak for a in audits]
    assert continuation.metrics(got, 1)["failed"] == 1
    no_cut = continuation.rows([], responses, made, c)
    assert no_cut.tokens == [[]] * 4 and no_cut.cut == [-1] * 4
    assert continuation.metrics(no_cut, 0)["uncut"] == 4, "the answers ended before their cuts"
    assert continuation.metrics(no_cut, 0, closed=3)["uncut"] == 1, "three rows are a gate's"
    assert continuation.rates(continuation.metrics(no_cut, 0, closed=4))["continuation/cut_mean"] == 0


def test_loss_and_gradient_are_cross_entropy_on_the_teachers_tokens_alone(params, ref_params, model_cfg, make_cfg):
    """Prompt and prefix are masked: float64 from plain logits, Z = rows x E; the gradient against JAX's own."""
    rng = np.random.default_rng(1)
    before, length, E = np.array([5, 9, 3]), np.array([4, 0, 6]), 6
    rows = [rng.integers(1, 38, n).tolist() for n in before + length]
    token = jnp.asarray([r + [0] * (12 - len(r)) for r in rows], jnp.int32)
    none = jnp.full((3, 1), -1, jnp.int32)
    batch = objective.Batch(token, jnp.asarray(before), jnp.asarray(length), none, jnp.zeros((3, 1)), 0 * none, width=E)
    cfg = make_cfg(**{"objective.name": "continuation", "continuation.max_tokens": E, "anchor.kl_coef": 0.0})

    def naive(params):
        logp = jax.nn.log_softmax(model.logits(params, model_cfg, model.hidden(params, model_cfg, token)))
        picked = jnp.take_along_axis(logp[:, :-1], token[:, 1:, None], -1)[..., 0]
        at = jnp.arange(1, 12)[None]
        on = (at >= jnp.asarray(before)[:, None]) & (at < jnp.asarray(before + length)[:, None])
        return -(picked * on).sum() / (3 * E)

    weight, mask = objective.weights(jnp.zeros((3, E)), batch, cfg)
    loss, grads, _ = step.loss_and_grads(params, None, batch, weight, mask, model_cfg=model_cfg, cfg=cfg)
    logits = np.asarray(model.logits(params, model_cfg, model.hidden(params, model_cfg, token)), np.float64)
    want = -sum(
        oracle.log_softmax(logits[b, t - 1])[rows[b][t]]
        for b in range(3)
        for t in range(before[b], before[b] + length[b])
    ) / (3 * E)
    assert float(loss) == pytest.approx(want, rel=1e-5)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(jax.jit(jax.grad(naive))(params))):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-6)
