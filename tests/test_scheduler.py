"""Where to audit: `entropy_peaks` against the loop-by-loop oracle, and the map from positions to chunks."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_jax import scheduler

# (T, M, C): room for all, more chunks than positions, T < C, C = 1, exactly one chunk, none but two
SHAPES = [(24, 3, 4), (5, 7, 1), (6, 2, 9), (12, 12, 1), (8, 2, 8), (13, 2, 5)]


@st.composite
def responses(draw):
    """Four rows: entropies from few values (many ties), any length from 0 to T, any eligible positions."""
    T, M, C = draw(st.sampled_from(SHAPES))
    level = st.sampled_from([0.0, 0.5, 1.0, 2.5]) if draw(st.booleans()) else st.floats(0, 12, width=32)
    entropy = draw(st.lists(st.lists(level, min_size=T, max_size=T), min_size=4, max_size=4))
    length = draw(st.lists(st.integers(0, T), min_size=4, max_size=4))
    often = draw(st.sampled_from([(True,), (True, True, False), (True, False, False, False), (False,)]))
    eligible = draw(st.lists(st.lists(st.sampled_from(often), min_size=T, max_size=T), min_size=4, max_size=4))
    return np.array(entropy, np.float32), np.array(length, np.int32), np.array(eligible), M, C


@settings(max_examples=200)
@given(responses())
def test_peaks_equal_the_oracle(case):
    entropy, length, eligible, M, C = case
    got = np.asarray(
        scheduler.entropy_peaks(entropy, length, num_chunks=M, chunk_tokens=C, eligible_BT=jnp.asarray(eligible))
    )
    assert got.dtype == np.int32 and got.shape == (4, M)
    for b in range(4):
        assert got[b].tolist() == oracle.entropy_peaks(entropy[b], length[b], M, C, eligible[b])


def peaks(entropy, length, M, C):
    row = jnp.asarray([entropy], jnp.float32)
    return np.asarray(scheduler.entropy_peaks(row, jnp.array([length]), num_chunks=M, chunk_tokens=C))[0].tolist()


def test_by_hand():
    entropy = [1, 5, 4, 0, 3, 3, 2, 9]
    assert peaks(entropy, 8, 3, 3) == [1, 5, -1]  # the 9 has no room; first the 5, then the later 3; no third one fits
    assert peaks(entropy, 8, 3, 1) == [1, 2, 7]
    assert peaks(entropy, 7, 3, 1) == [1, 2, 5]  # the length cuts the 9 off; the tie goes to 5
    assert peaks(entropy, 2, 3, 3) == [-1, -1, -1]
    assert peaks(entropy, 0, 3, 1) == [-1, -1, -1]
    assert peaks(entropy, 8, 2, 8) == [0, -1]  # a chunk as long as the response


def test_the_score_is_the_peak_and_not_the_windows_mean():
    assert peaks([5, 0, 0, 4, 4, 4], 6, 1, 3) == [0]


def test_entropy_past_the_length_means_nothing():
    entropy = np.array([[1.0, 2.0, 3.0, np.nan, np.inf, 7.0]], np.float32)
    got = scheduler.entropy_peaks(entropy, np.array([3], np.int32), num_chunks=2, chunk_tokens=1)
    assert np.asarray(got).tolist() == [[1, 2]]


def test_a_nan_entropy_is_flagged_and_refused():
    entropy = np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 0.0]], np.float32)
    got = scheduler.entropy_peaks(entropy, np.array([3, 3], np.int32), num_chunks=2, chunk_tokens=1)
    assert np.asarray(got).tolist() == [[1, 2], [-2, -2]]
    with pytest.raises(FloatingPointError, match=r"\[1\]"):
        scheduler.check_peaks(got)
    scheduler.check_peaks(got[:1])


def test_chunk_mask_names_the_kept_chunk_of_every_position():
    peak = jnp.array([[1, 4, -1], [-1, -1, -1], [0, 3, 6]])
    keep = jnp.array([[True, True, True], [True, True, True], [True, False, True]])
    got = scheduler.chunk_mask(peak, keep, 3, 8)
    assert np.asarray(got).tolist() == [
        [-1, 0, 0, 0, 1, 1, 1, -1],
        [-1] * 8,
        [0, 0, 0, -1, -1, -1, 2, 2],
    ]
