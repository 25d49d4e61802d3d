"""The method in plain NumPy float64, loop by loop, written from method.md (section 2), not from the code under test."""

import numpy as np


def log_softmax(z_V):
    z_V = np.asarray(z_V, np.float64)
    z_V = z_V - z_V.max()
    return z_V - np.log(np.exp(z_V).sum())


def entropy(logits_V) -> float:
    """H = -sum_v pi log pi, nats."""
    logp_V = log_softmax(logits_V)
    return float(-(np.exp(logp_V) * logp_V).sum())


def kl(ref_logits_V, logits_V) -> float:
    """sum_v ref * (log ref - log pi): exact KL(ref || student)."""
    ref_V, logp_V = log_softmax(ref_logits_V), log_softmax(logits_V)
    return float((np.exp(ref_V) * (ref_V - logp_V)).sum())


def entropy_peaks(entropy_T, length: int, num_chunks: int, chunk_tokens: int, eligible_T=None) -> list[int]:
    """One response: the M largest H, greedily, t + C <= T, |t - t'| >= C for all taken; ties to the larger t."""
    taken: list[int] = []
    for _ in range(num_chunks):
        best = None
        for t in range(length):
            if t + chunk_tokens > length:
                continue
            if eligible_T is not None and not eligible_T[t]:
                continue
            if any(abs(t - other) < chunk_tokens for other in taken):
                continue
            if best is None or entropy_T[t] >= entropy_T[best]:
                best = t
        if best is None:
            break
        taken.append(best)
    return sorted(taken) + [-1] * (num_chunks - len(taken))


def smoothed_target(k_sem: float, n: int, chunk_logp, alpha: float) -> float:
    """pi_hat = (k_sem + alpha * pi_bar) / (n + alpha), pi_bar the geometric mean of the chunk's token probabilities."""
    pi_bar = np.exp(np.mean(np.asarray(chunk_logp, np.float64)))
    return float((k_sem + alpha * pi_bar) / (n + alpha))


def targets(logp_BT, peak_BM, k_sem_BM, n_BM, *, chunk_tokens, n_min, alpha, advantage):
    """{(b, m): (pi_hat, weight)} of the kept chunks; weight is pi_hat less the baseline."""
    pi_hat = {}
    for b in range(len(peak_BM)):
        for m, t in enumerate(peak_BM[b]):
            if t < 0 or n_BM[b][m] < n_min:
                continue
            pi_hat[b, m] = smoothed_target(k_sem_BM[b][m], n_BM[b][m], logp_BT[b][t : t + chunk_tokens], alpha)
    out = {}
    for (b, m), value in pi_hat.items():
        if advantage == "none":
            base = 0.0
        elif advantage == "batch_mean":
            base = np.mean(list(pi_hat.values()))
        elif advantage == "leave_one_out":
            others = [v for (row, _), v in pi_hat.items() if row != b]
            base = np.mean(others) if others else 0.0
        else:
            raise ValueError(advantage)
        out[b, m] = (value, value - base)
    return out


def weights_and_mask(logp_BT, length_B, peak_BM, k_sem_BM, n_BM, *, chunk_tokens, scope, **how):
    """Per token: the chunk's weight, whether a kept chunk holds it, and whether the anchor does. Not normalised."""
    weight_BT, audited_BT, mask_BT = (np.zeros(np.shape(logp_BT)) for _ in range(3))
    chunks = targets(logp_BT, peak_BM, k_sem_BM, n_BM, chunk_tokens=chunk_tokens, **how)
    for (b, m), (_, weight) in chunks.items():
        for t in range(peak_BM[b][m], peak_BM[b][m] + chunk_tokens):
            weight_BT[b, t] = weight
            audited_BT[b, t] = 1.0
    for b in range(len(length_B)):
        for t in range(length_B[b]):
            if scope == "all" or not audited_BT[b, t]:
                mask_BT[b, t] = 1.0
    return weight_BT, audited_BT, mask_BT


def normalized(weight_BT, audited_BT, mask_BT, *, normalizer, max_completion_length):
    """The constant Z, or each term by its own token count (nothing to divide by: the term is zero anyway)."""
    if normalizer == "constant":
        z = weight_BT.shape[0] * max_completion_length
        return weight_BT / z, mask_BT / z
    return weight_BT / max(audited_BT.sum(), 1.0), mask_BT / max(mask_BT.sum(), 1.0)


def weighted_loss(logits_BTV, ref_logits_BTV, target_BT, weight_BT, mask_BT, beta: float):
    """(sum_t -weight * log pi(y) + beta * mask * KL(ref || pi), its gradient with respect to the logits)."""
    loss, grad_BTV = 0.0, np.zeros(logits_BTV.shape)
    for b in range(logits_BTV.shape[0]):
        for t in range(logits_BTV.shape[1]):
            logp_V = log_softmax(logits_BTV[b, t])
            loss -= weight_BT[b, t] * logp_V[target_BT[b, t]]
            grad_BTV[b, t] += weight_BT[b, t] * np.exp(logp_V)
            grad_BTV[b, t, target_BT[b, t]] -= weight_BT[b, t]
            if beta:
                ref_V = log_softmax(ref_logits_BTV[b, t])
                loss += beta * mask_BT[b, t] * kl(ref_logits_BTV[b, t], logits_BTV[b, t])
                grad_BTV[b, t] += beta * mask_BT[b, t] * (np.exp(logp_V) - np.exp(ref_V))
    return loss, grad_BTV


def truncate(q_V, top_p: float, top_k: int):
    """Top-k, then top-p on what is left, by sorting; ties with the last one kept are kept. Not renormalised."""
    q_V = np.array(q_V, np.float64)
    if top_k:
        q_V[q_V < np.sort(q_V)[::-1][min(top_k, len(q_V)) - 1]] = 0.0
    order = np.sort(q_V)[::-1]
    total, mass = q_V.sum(), 0.0
    for value in order:
        mass += value
        if mass >= top_p * total:
            break
    q_V[q_V < value] = 0.0
    return q_V


def last_query(q_BQH, k_BSKH, v_BSKH, lengths, window=0):
    """Attention of one query per row over the row's first positions, of the window where there is one."""
    B, Q, H = q_BQH.shape
    out, of_key = np.zeros((B, Q, H)), Q // k_BSKH.shape[2]
    for b, n in enumerate(lengths):
        first = max(0, n - window) if window else 0
        for h in range(Q):
            k, v = (np.asarray(a[b, first:n, h // of_key], np.float64) for a in (k_BSKH, v_BSKH))
            score = k @ np.asarray(q_BQH[b, h], np.float64) / np.sqrt(H)
            p = np.exp(score - score.max())
            out[b, h] = p / p.sum() @ v
    return out
