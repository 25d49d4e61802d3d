"""Distributions that are known, and whether counts follow them."""

import numpy as np
import oracle
from scipy import stats


def sampler_distribution(logits_V, temperature, top_p, top_k):
    """NumPy: temperature, then top-k, then top-p, renormalised."""
    q_V = oracle.truncate(np.exp(oracle.log_softmax(np.asarray(logits_V) / temperature)), top_p, top_k)
    return q_V / q_V.sum()


def chi_square(tokens, q_V):
    """p-value of the counts, rare tokens pooled; 0 where a token of no mass was drawn."""
    count = np.bincount(np.asarray(tokens), minlength=len(q_V))
    if count[q_V == 0].any():
        return 0.0
    often = q_V * count.sum() >= 5
    observed = np.append(count[often], count[~often].sum())
    expected = np.append(q_V[often], q_V[~often].sum()) * count.sum()
    keep = expected > 0
    return stats.chisquare(observed[keep], expected[keep]).pvalue if keep.sum() > 1 else 1.0
