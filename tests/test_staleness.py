"""max_staleness = 1: the importance ratio and what it drops against NumPy; without it nothing changes; exact resume."""

import concurrent.futures
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import teacher_runs
import tiny
from wire_server import WireServer

from omniopd_jax import config, experience, measures, objective, staleness
from omniopd_jax.errors import Stopped, UserError
from omniopd_jax.run import validation
from omniopd_jax.run.host import StopFlag

B, T, M, C = 6, 20, 3, 4
FULL = 4  # continuations of a full audit


def case(seed, drift):
    """(logp now, logp then, batch) with full audits; the policy moved by `drift` a token."""
    rng = np.random.default_rng(seed)
    old = -2 * rng.random((B, T))
    now = old + drift * rng.standard_normal((B, T))
    peak = np.array([[0, 5, 12], [3, 9, -1], [1, 6, 16], [-1, -1, -1], [2, 8, 15], [0, 4, 8]])
    n = np.full((B, M), FULL)
    n[0, 1] = 1  # too few: dropped whatever its ratio
    i32 = jnp.int32
    batch = objective.Batch(
        jnp.zeros((B, T), i32), jnp.zeros(B, i32), jnp.full(B, T, i32), jnp.asarray(peak, i32),
        jnp.asarray(rng.random((B, M)) * n, jnp.float32), jnp.asarray(n, i32),
    )  # fmt: skip
    return now.astype(np.float32), old.astype(np.float32), batch


@pytest.mark.parametrize("advantage", ["none", "batch_mean", "leave_one_out"])
@pytest.mark.parametrize("drift", [0.05, 0.3, 3.0])
def test_ratio_and_dropping_equal_numpy(make_cfg, drift, advantage):
    cfg = make_cfg(**{"objective.advantage": advantage, "audit.chunk_tokens": C, "audit.num_continuations": FULL})
    now, old, batch = case(3, drift)
    ratio_BM = objective.chunk_ratio(now, old, batch.peak_BM, chunk_tokens=C)
    weight_BT, mask_BT = objective.omniopd(now, batch.replace(ratio_BM=ratio_BM), cfg)
    targets = objective.chunk_targets(now, batch.replace(ratio_BM=ratio_BM), cfg)

    pi_hat, ratio = {}, {}
    for b, row in enumerate(np.asarray(batch.peak_BM)):
        for m, t in enumerate(row):
            if t < 0:
                assert ratio_BM[b, m] == 1
                continue
            there = slice(t, t + C)
            ratio[b, m] = np.prod(np.exp(now[b, there].astype(np.float64)) / np.exp(old[b, there].astype(np.float64)))
            assert float(ratio_BM[b, m]) == pytest.approx(ratio[b, m], rel=1e-4)
            if batch.n_BM[b, m] == FULL and 0.5 <= ratio[b, m] <= 2.0:
                prior = np.exp(now[b, there].astype(np.float64).mean())
                pi_hat[b, m] = (float(batch.k_sem_BM[b, m]) + prior) / (FULL + 1)
    in_band = sum(0.5 <= r <= 2.0 for who, r in ratio.items() if who != (0, 1))
    assert len(pi_hat) == in_band and (drift < 0.1 or in_band < len(ratio) - 1)
    expected_weight, expected_mask = np.zeros((B, T)), np.ones((B, T))
    for (b, m), value in pi_hat.items():
        others = {"none": [], "batch_mean": list(pi_hat.values())}.get(
            advantage, [v for (b2, _), v in pi_hat.items() if b2 != b]
        )
        t = int(batch.peak_BM[b, m])
        expected_weight[b, t : t + C] = ratio[b, m] * (value - (np.mean(others) if others else 0.0))
        expected_mask[b, t : t + C] = 0
    np.testing.assert_allclose(weight_BT, expected_weight, rtol=2e-4, atol=2e-6)
    np.testing.assert_array_equal(mask_BT, expected_mask)  # a dropped chunk's tokens are the anchor's again
    got = measures.of_batch(batch.replace(ratio_BM=ratio_BM), targets, jnp.ones((B, T)), cfg)
    assert got["audit/stale_dropped"] == len(ratio) - 1 - in_band
    assert got["audit/dropped"] == 1  # the stale ones are counted apart


def test_the_ratio_carries_no_gradient_and_the_band_holds_at_its_ends(make_cfg):
    cfg = make_cfg(**{"audit.chunk_tokens": C})
    now, old, batch = case(1, 0.1)

    def total(logp):
        ratio_BM = objective.chunk_ratio(logp, old, batch.peak_BM, chunk_tokens=C)
        return objective.omniopd(logp, batch.replace(ratio_BM=ratio_BM), cfg)[0].sum()

    assert float(jnp.abs(jax.grad(total)(jnp.asarray(now))).max()) == 0
    ends = jnp.array([0.5, 2.0, 0.4999, 2.0001, jnp.nan, jnp.inf, 0.0])
    assert objective.in_band(ends).tolist() == [True, True, False, False, False, False, False]


def test_in_a_mix_the_control_s_chunks_are_corrected_and_dropped_as_the_audited_ones_are(make_cfg):
    cfg = make_cfg(**{"audit.chunk_tokens": C, "objective.name": "constant", "objective.constant": 0.7})
    now, old, batch = case(3, 0.5)
    ratio_BM = objective.chunk_ratio(now, old, batch.peak_BM, chunk_tokens=C)
    weight_BT, mask_BT = objective.constant(now, batch.replace(ratio_BM=ratio_BM), cfg)
    weight, mask = np.zeros((B, T)), np.ones((B, T))
    for b, row in enumerate(np.asarray(batch.peak_BM)):
        for m, t in enumerate(row):
            if t >= 0 and 0.5 <= ratio_BM[b, m] <= 2.0:
                weight[b, t : t + C], mask[b, t : t + C] = 0.7 * ratio_BM[b, m], 0
    assert len(set(np.asarray(ratio_BM).ravel())) > 3 and (weight == 0).sum() > (np.asarray(batch.peak_BM) < 0).sum()
    np.testing.assert_allclose(weight_BT, weight, rtol=1e-6)
    np.testing.assert_array_equal(mask_BT, mask)


def test_a_policy_that_has_not_moved_weighs_bit_for_bit_as_on_policy(make_cfg):
    cfg = make_cfg(**{"objective.advantage": "batch_mean", "audit.chunk_tokens": C})
    now, _, batch = case(2, 0.0)
    ratio_BM = objective.chunk_ratio(now, now, batch.peak_BM, chunk_tokens=C)
    assert (np.asarray(ratio_BM) == 1).all()
    for a, b in zip(objective.weights(now, batch, cfg), objective.weights(now, batch.replace(ratio_BM=ratio_BM), cfg)):
        np.testing.assert_array_equal(a, b)
    plain = measures.of_batch(batch, objective.chunk_targets(now, batch, cfg), jnp.ones((B, T)), cfg)
    assert not {"audit/stale_dropped", "audit/ratio_mean"} & plain.keys()


def test_staleness_needs_a_text_teacher_and_is_0_or_1():
    gated = {"max_staleness": 1, "audit.gate": "graded", "reward.grader": "math"}
    for settings in ({"max_staleness": 2}, {"max_staleness": 1, "objective.name": "grpo"}, gated):
        c = config.default()
        c.update_from_flattened_dict(settings)
        with pytest.raises(UserError, match="max_staleness"):
            validation.validate(c)


def test_what_was_sampled_ahead_is_taken_up_by_another_number_of_processes(tmp_path, monkeypatch):
    """Two processes save their rows; one takes both up, in its own order; where a file is missing nothing is taken."""
    rng, T = np.random.default_rng(0), (9, 7)
    ids = [["a0", "a1"], ["b0", "b1"]]
    rows = [[[int(i) for i in rng.integers(0, 50, n)] for n in lengths] for lengths in ((3, 9), (7, 0))]
    parts = []
    for rank in (0, 1):
        logp_BT, peak_BM = rng.normal(size=(2, T[rank])).astype(np.float32), rng.integers(0, 5, (2, 3))
        own = experience.Responses(["q"] * 2, ids[rank], rows[rank], np.array([True, False]), logp_BT - 1)
        parts.append(experience.Group(own, experience.Scores(logp_BT, -logp_BT, None, None), peak_BM, []))
        begun = staleness.Ahead()
        begun.take(4, 5, 1, lambda t, rank=rank: (parts[rank], 3))
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_index", lambda rank=rank: rank)
            begun.save(tmp_path, 5, 2)
    asked = []

    def ask(responses, peak_BM, N):
        asked.append((responses.sample_ids, peak_BM.tolist(), N))
        return []

    drawn = experience.Drawn(["p", "q"], [ids[1], ids[0]])
    one = staleness.Ahead()
    one.load(tmp_path, 5, drawn, ask)
    got, N = one.take(5, 5, 1, None)
    assert got.responses.tokens == rows[1] + rows[0] and got.responses.prompts == ["p", "p", "q", "q"] and N == 3
    assert asked == [(ids[1] + ids[0], [*parts[1].peak_BM.tolist(), *parts[0].peak_BM.tolist()], 3)]
    padded = np.pad(parts[1].scores.logp_BT, ((0, 0), (0, 2)))
    np.testing.assert_array_equal(got.scores.logp_BT, np.concatenate([padded, parts[0].scores.logp_BT]))
    np.testing.assert_array_equal(got.peak_BM, np.concatenate([parts[1].peak_BM, parts[0].peak_BM]))
    (tmp_path / "ahead" / "5.1.npz").unlink()
    alone = staleness.Ahead()
    alone.load(tmp_path, 5, drawn, ask)
    assert alone.take(5, 5, 1, lambda t: ("anew", 1)) == ("anew", 1)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_all_processes_save_again_where_any_waited_for_calls(elsewhere, monkeypatch):
    """Saving is everyone's: one that does it alone waits for the others until it is given up."""
    monkeypatch.setattr(staleness.processes, "gather", lambda name, value: [value, elsewhere])
    assert staleness.Ahead().drain(0.0) is elsewhere


def test_a_signal_to_another_process_ends_the_wait_here(monkeypatch):
    monkeypatch.setattr(experience.processes, "told", lambda name: "SIGTERM")
    with pytest.raises(Stopped, match="SIGTERM"):
        experience.wait([concurrent.futures.Future()], StopFlag())


def test_a_step_that_is_cut_off_is_saved_as_it_was_sampled(tmp_path):
    """A signal or a used-up budget while step t waits for its teacher: its samples, not new ones, are taken up."""

    def group(t):
        own = experience.Responses(["q"], [f"id{t}"], [[t, t]], np.array([True]), np.zeros((1, 2), np.float32))
        scores = experience.Scores(np.zeros((1, 2)), np.zeros((1, 2)), None, None)
        return experience.Group(own, scores, np.zeros((1, 1), np.int32), []), 3

    begun = staleness.Ahead()
    for t in (0, 1, 2):
        begun.take(t, 9, 1, group)
    begun.save(tmp_path, 2, 2)  # step 2 did not end
    begun.save(tmp_path, 2, 2, C)
    drawn = experience.Drawn(["q"], [["id2"]])
    for sizes, fits in (((C, 1), True), ((C, 4), True), ((C + 1, 1), False), ((C, 0), False)):
        other = staleness.Ahead()
        other.load(tmp_path, 2, drawn, lambda *asked: [], sizes)  # chunks of another size: what was chosen does not fit
        taken, _ = other.take(2, 2, 1, lambda t: ("anew", 1))
        assert (taken != "anew") == fits
        if fits:  # of the further chunks none was chosen
            assert taken.peak_BM.tolist() == [[0] + [-1] * (sizes[1] - 1)]
    again = staleness.Ahead()
    again.load(tmp_path, 2, drawn, lambda *asked: [])
    assert again.take(2, 2, 1, None)[0].responses.tokens == [[2, 2]]
    assert not begun.drain(0.0)
    fresh = staleness.Ahead()
    fresh.take(0, 9, 0, group)
    fresh.save(tmp_path / "none", 0, 2)
    assert not (tmp_path / "none").exists(), "without staleness nothing is sampled ahead"


def records(run):
    drop = ("latency_s", "cost_usd")
    return [{k: v for k, v in a.items() if k not in drop} for a in run.audits()]


# one group: a row's log-prob differs in the last bit between batch shapes, and a stale step is scored again as a whole
LOCAL = {"teacher.provider": "local", "num_steps": 4, "rollout.parts": 1}


@pytest.mark.slow
def test_with_a_learning_rate_of_0_both_are_the_same_run(runner, tmp_path):
    """The policy never moves: every sample, audit and weight of the two must be equal, whatever was asked when."""
    fresh, stale = (
        runner.run(tmp_path / str(s), LOCAL | {"optimizer.learning_rate": 0.0, "max_staleness": s}) for s in (0, 1)
    )
    assert fresh.code == stale.code == 0, fresh.err[-2000:] + stale.err[-2000:]
    assert tiny.same(fresh.params(), stale.params())
    assert records(fresh) == records(stale)
    keys = ("loss", "grad_norm", "audit/pi_hat_mean", "audit/k_sem_mean")
    assert [[m[k] for k in keys] for m in fresh.metrics()] == [[m[k] for k in keys] for m in stale.metrics()]
    assert all(m["audit/ratio_mean"] == 1 and m["audit/stale_dropped"] == 0 for m in stale.metrics())
    assert all("audit/ratio_mean" not in m for m in fresh.metrics())


@pytest.mark.slow
def test_a_stale_run_that_was_killed_and_resumed_is_the_one_that_was_not(runner, tmp_path):
    """The samples of the step ahead are saved with the checkpoint: the policy that drew them is gone at the resume."""
    with WireServer(delay_s=0.15) as server:
        settings = teacher_runs.wire(server) | {"num_steps": 4, "max_staleness": 1, "optimizer.learning_rate": 3e-3}
        whole = runner.run(tmp_path / "whole", settings)
        assert whole.code == 0, whole.err[-2000:]
        calls = len(server.calls())
        killed = runner.start(tmp_path / "killed", settings)
        end = time.monotonic() + 120
        checkpoint = tmp_path / "killed" / "checkpoints" / "2"  # its name is final when it is whole
        while not checkpoint.is_dir() and killed.code is None and time.monotonic() < end:
            time.sleep(0.005)
        killed.kill(signal.SIGKILL)
        assert killed.wait().code == -signal.SIGKILL
        rest = runner.run(tmp_path / "killed", settings)
        assert rest.code == 0 and "resumed from step" in rest.out, rest.err[-2000:]
        sent = teacher_runs.answered(server.calls()[calls:])
    assert tiny.same(whole.params(), rest.params())
    assert records(whole) == records(rest)
    assert any(m["audit/ratio_mean"] != 1 for m in whole.metrics()[1:]) and whole.metrics()[0]["audit/ratio_mean"] == 1
    n = teacher_runs.SIZES["audit.num_continuations"]
    assert all(sent.get(teacher_runs.seeds(a, n)[0], 0) <= 2 * n for a in rest.audits())
