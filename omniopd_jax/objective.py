"""Feedback -> per-token weight and anchor mask. Every method of the project is one function here and the same step.

OmniOPD (arXiv 2606.01476; method.md, section 2), and what was kept, dropped and added:

- kept: peak-entropy chunks, k_sem over n independent continuations, the Dirichlet-Multinomial posterior mean as a
  constant multiplier of the chunk's log-prob, the exact KL to the frozen base on every token outside the chunks;
- dropped: nothing. No clamp on loss or log-prob, no importance ratio, no length reward: each is from another loss;
- added (ours): the normaliser (the paper gives a bare sum), `advantage` baselines, audits with too few continuations
  returned to the anchor instead of trained on.

The loss is sum_t -weight_t * logp_t + kl_coef * mask_t * KL(ref || student)_t, with both already normalised.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from omniopd_jax import cuts
from omniopd_jax.config import min_continuations
from omniopd_jax.context import SCORERS, ContextRows, Scorer
from omniopd_jax.parallel.packing import Packed
from omniopd_jax.scheduler import chunk_mask

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Num

RATIO_BAND = (0.5, 2.0)  # chunks whose importance ratio lies outside are dropped (max_staleness = 1)


@flax.struct.dataclass
class Batch:
    """What one update is made from. Rows are responses; all arrays have the global batch's B in front.

    Attributes:
      token_BL: int32, prompt directly followed by the response, right-padded; None where `packed` holds them.
      prompt_length_B, length_B: int32 tokens of prompt and response (a sampled end token counted; 0: an empty row).
      peak_BM: int32 response positions where chunks start, ascending, -1 where none.
      k_sem_BM: float32, sum of similarities of the continuations that arrived.
      n_BM: int32, how many arrived.
      n_min_BM: int32, fewest continuations of an audit that is kept, where fewer than N were asked; None: the config's.
      advantage_B: float32, of a task reward (`group_advantage`); None: no reward.
      old_logp_BT: float32, log-probs under the policy that sampled, where there are several updates a batch, or that
        policy has been updated since (max_staleness = 1); None: the policy is still that one.
      ratio_BM: float32, `chunk_ratio`, where the policy has moved on since it sampled (max_staleness = 1); else None.
      teacher_logp_BT: float32, the teacher's log-probs of the response tokens (white-box `opd`); None elsewhere.
      packed: the tokens in packed rows (packing.py), where several responses share one; None: a row each.
      context: the responses behind privileged prompts (`context`); None elsewhere.
      more: batches of the parts of `objective.mix` that bring rows of their own, where this one is not theirs.
      width: T, where the batch was not scored and no array says it.
    """

    token_BL: jax.Array | None
    prompt_length_B: jax.Array
    length_B: jax.Array
    peak_BM: jax.Array
    k_sem_BM: jax.Array
    n_BM: jax.Array
    n_min_BM: jax.Array | None = None
    advantage_B: jax.Array | None = None
    old_logp_BT: jax.Array | None = None
    ratio_BM: jax.Array | None = None
    teacher_logp_BT: jax.Array | None = None
    packed: Packed | None = None
    context: ContextRows | None = None
    more: tuple[Batch, ...] = ()
    width: int = flax.struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A way to learn: how tokens are weighed, and what must be known of a step before they can be.

    Callable as its weights. A new one is a function and a line in `OBJECTIVES`; everything else of the program reads
    the fields here.

    Attributes:
      weights: (logp_BT, batch, cfg) -> (weight_BT, anchor_mask_BT), float32, not yet normalised.
      about: one line for the reader of a model card; empty: its name says enough.
      asks: of a teacher: `continuations` at the peaks, whole `solutions`, a text behind each of the student's
        `prefixes`, `logp` of the student's tokens, its whole `distribution`; empty: there is no teacher.
      chunks: weighs the tokens of chunks at entropy peaks; else every token of a response.
      reads_logp: `weights` reads log-probs under the policy that sampled (chunks always need the scoring pass).
      needs_reward: reads a task reward's advantage.
      clips: takes several updates a batch, by a clipped ratio.
      divergence: the exact full-vocabulary term beside the weights, on the anchor mask's tokens: a key of
        `vocab.DIVERGENCES`; empty: there is none.
      cut: its rows are the teacher's texts behind prefixes of the student's that end by this rule (cuts.py); None: its
        rows are the student's responses.
      scorer: who gives the divergence's other distribution, under a privileged prompt (context.py); None: the teacher.
      settle: (the record, cfg) -> the record as the config's settings make it; None: they change nothing of it.
    """

    weights: Callable
    about: str = ""
    asks: str | frozenset[str] = frozenset()
    chunks: bool = False
    reads_logp: bool = False
    needs_reward: bool = False
    clips: bool = False
    divergence: str = ""
    cut: cuts.Cut | None = None
    scorer: Scorer | None = None
    settle: Callable | None = None

    def __post_init__(self):
        if isinstance(self.asks, str):  # one thing, by its name
            object.__setattr__(self, "asks", frozenset(filter(None, [self.asks])))

    def __call__(self, logp_BT, batch: Batch, cfg):
        """(weight_BT, anchor_mask_BT), not yet normalised."""
        return self.weights(logp_BT, batch, cfg)

    @property
    def audited(self) -> bool:
        """Whether a chunk counts only once enough of the teacher's continuations have arrived."""
        return self.chunks and "continuations" in self.asks

    @property
    def samples(self) -> bool:
        """Whether the student answers: not where all that is trained on are whole solutions."""
        return self.cut is None or self.cut.places is not None


def of(cfg) -> Objective:
    """The objective that `objective.name` names, or of a mix what its parts need together."""
    if cfg.objective.mix:
        return _together([of(part) for _, part in parts(cfg)])
    own = OBJECTIVES[cfg.objective.name]
    return own.settle(own, cfg) if own.settle else own


def parts(cfg) -> list[tuple[float, ConfigDict | FrozenConfigDict]]:
    """(weight, the config with this objective alone) of each part of `objective.mix`, or the one that there is."""
    if not cfg.objective.mix:
        return [(1.0, cfg)]
    out = []
    for name, weight in sorted(cfg.objective.mix.items()):
        alone = ConfigDict(cfg.to_dict())
        alone.objective.name, alone.objective.mix = name, ConfigDict()
        out.append((float(weight), FrozenConfigDict(alone)))
    return out


def title(cfg) -> str:
    """The objective's name, or the parts of a mix with their weights."""
    mix = cfg.objective.mix
    return " + ".join(f"{weight:g} {name}" for name, weight in sorted(mix.items())) if mix else cfg.objective.name


def row_groups(cfg) -> list[list[tuple[float, ConfigDict | FrozenConfigDict]]]:
    """The parts by the rows that they train on: first those that share the responses, then each with rows of its own.

    In the order of a step's batches: `Batch`, then its `more`.
    """
    every = parts(cfg)
    shared = [p for p in every if of(p[1]).cut is None]
    return ([shared] if shared else []) + [[p] for p in every if of(p[1]).cut is not None]


def _together(records: list[Objective]) -> Objective:
    """What several parts need: of the loop, not of their weights, which are formed one by one."""
    shared = [r for r in records if r.cut is None]

    def weights(logp_BT, batch, cfg):
        raise TypeError("the parts of objective.mix are weighed one by one: objective.token_weights")

    return Objective(
        weights,
        asks=frozenset().union(*(r.asks for r in records)),
        chunks=any(r.chunks for r in records),
        reads_logp=any(r.reads_logp for r in records),
        needs_reward=any(r.needs_reward for r in records),
        clips=all(r.clips for r in records),
        divergence=next((r.divergence for r in records if r.divergence), ""),
        cut=None if shared else next((r.cut for r in records if r.samples), records[0].cut),
        scorer=next((r.scorer for r in records if r.scorer), None),
    )


def needs_scores(cfg) -> bool:
    """Whether a step's responses are scored before its update: for their chunks, their cuts, their weights, or a
    ratio."""
    own = [of(part) for _, part in parts(cfg)]
    read = any(o.chunks or o.reads_logp or (o.cut is not None and o.cut.reads_entropy) for o in own)
    return read or cfg.num_iterations > 1


def needs_reward(cfg) -> bool:
    """Whether a step's responses are graded."""
    return of(cfg).needs_reward or cfg.reward.coef != 0


@flax.struct.dataclass
class ChunkTargets:
    """Per chunk: keep (audited with n >= n_min), pi_bar, pi_hat, and the weight its tokens get before normalising."""

    keep_BM: jax.Array
    pi_bar_BM: jax.Array
    pi_hat_BM: jax.Array
    weight_BM: jax.Array


def smoothed_target(
    k_sem: Float[Array, "*chunks"], n: Num[Array, "*chunks"], mean_logp: Float[Array, "*chunks"], *, alpha: float
) -> Float[Array, "*chunks"]:
    """pi_hat = sg[(k_sem + alpha * pi_bar) / (n + alpha)], pi_bar = exp(mean log-prob) (method.md; detached: fork).

    Args:
      k_sem, n, mean_logp: arrays of one shape; n counts the continuations that arrived.
      alpha: pseudo-counts of the prior, >= 0; with alpha = 0, n must be positive.

    Returns:
      pi_hat in [0, 1], without gradient.
    """
    pi_bar = jnp.exp(mean_logp)
    return jax.lax.stop_gradient((k_sem + alpha * pi_bar) / (n + alpha))


def mean_chunk_logp(logp_BT, peak_BM, chunk_tokens: int):
    """Mean log-prob of each chunk's tokens [B, M]; 0 where there is no chunk."""
    B, M = peak_BM.shape
    index = jnp.maximum(peak_BM, 0)[..., None] + jnp.arange(chunk_tokens, dtype=jnp.int32)[None, None]
    index = jnp.minimum(index, logp_BT.shape[1] - 1)
    chunk_BMC = jnp.take_along_axis(logp_BT, index.reshape(B, -1), axis=1).reshape(B, M, chunk_tokens)
    return jnp.where(peak_BM >= 0, chunk_BMC.mean(-1), 0.0)


def kept(batch: Batch, cfg):
    """bool [B, M]: audits with enough continuations, not too stale; the others' tokens go back to U.

    Chunks that no teacher is asked about are all kept.
    """
    if not of(cfg).audited:
        return batch.peak_BM >= 0
    n_min = min_continuations(cfg) if batch.n_min_BM is None else batch.n_min_BM
    enough_BM = (batch.peak_BM >= 0) & (batch.n_BM >= n_min)
    return enough_BM if batch.ratio_BM is None else enough_BM & in_band(batch.ratio_BM)


def in_band(ratio_BM):
    """bool [B, M]: the ratio lies in RATIO_BAND, ends included; nan does not."""
    return (ratio_BM >= RATIO_BAND[0]) & (ratio_BM <= RATIO_BAND[1])


@functools.partial(jax.jit, static_argnames="chunk_tokens")
def chunk_ratio(logp_BT, old_logp_BT, peak_BM, *, chunk_tokens: int):
    """pi_now(y_c | y_<t) / pi_old(y_c | y_<t), the product over a chunk's tokens; 1 where there is no chunk (ours).

    A stale step's weights are multiplied by it, detached: the chunk's own choice is corrected, its prefix is not. What
    lies outside RATIO_BAND is dropped, so the clip to the band never changes a ratio that is used. pi_hat's prior and
    the anchor are those of the present policy and need no ratio.
    """
    return jnp.exp(chunk_tokens * mean_chunk_logp(logp_BT - old_logp_BT, peak_BM, chunk_tokens))


def chunk_targets(logp_BT, batch: Batch, cfg) -> ChunkTargets:
    """The posterior and the advantage of every chunk of the global batch (method.md, section 2)."""
    keep_BM = kept(batch, cfg)
    mean_logp_BM = mean_chunk_logp(logp_BT, batch.peak_BM, cfg.audit.chunk_tokens)
    n_BM = jnp.where(keep_BM, batch.n_BM, 1).astype(jnp.float32)
    k_sem_BM = jnp.where(keep_BM, batch.k_sem_BM, 0.0)
    pi_hat_BM = jnp.where(keep_BM, smoothed_target(k_sem_BM, n_BM, mean_logp_BM, alpha=cfg.prior.alpha), 0.0)
    weight_BM = jnp.where(keep_BM, pi_hat_BM - baseline(pi_hat_BM, keep_BM, cfg.objective.advantage), 0.0)
    if batch.ratio_BM is not None:
        weight_BM = jnp.where(keep_BM, weight_BM * batch.ratio_BM, 0.0)
    pi_bar_BM = jnp.where(keep_BM, jnp.exp(mean_logp_BM), 0.0)
    return jax.lax.stop_gradient(ChunkTargets(keep_BM, pi_bar_BM, pi_hat_BM, weight_BM))


def baseline(pi_hat_BM, keep_BM, advantage: str):
    """What is taken off pi_hat: nothing (published), or a mean over the global batch's kept chunks (ours).

    `leave_one_out` leaves out the chunks of the response itself; where no other response has one, it is 0.
    """
    if advantage == "none":
        return jnp.zeros_like(pi_hat_BM)
    count_B = keep_BM.sum(1).astype(pi_hat_BM.dtype)
    total_B = jnp.where(keep_BM, pi_hat_BM, 0.0).sum(1)
    if advantage == "batch_mean":
        return jnp.broadcast_to(total_B.sum() / jnp.maximum(count_B.sum(), 1.0), pi_hat_BM.shape)
    others = count_B.sum() - count_B
    mean_B = jnp.where(others > 0, (total_B.sum() - total_B) / jnp.maximum(others, 1.0), 0.0)
    return jnp.broadcast_to(mean_B[:, None], pi_hat_BM.shape)


def has_baseline(cfg) -> bool:
    """Whether a chunk's weight may be negative: a mean is taken off pi_hat."""
    return cfg.objective.advantage != "none"


def omniopd(logp_BT, batch: Batch, cfg):
    """The published objective: pi_hat (less a baseline) on the chunks' tokens, the anchor on U.

    Returns:
      (weight_BT, anchor_mask_BT), float32, not yet normalised.
    """
    targets = chunk_targets(logp_BT, batch, cfg)
    chunk_BT = chunk_mask(batch.peak_BM, targets.keep_BM, cfg.audit.chunk_tokens, logp_BT.shape[1])
    weight_BT = jnp.take_along_axis(targets.weight_BM, jnp.maximum(chunk_BT, 0), axis=1)
    weight_BT = jnp.where(chunk_BT >= 0, weight_BT, 0.0)
    return weight_BT, anchor_mask(chunk_BT, batch.length_B, cfg.anchor.scope)


def response_mask(length_B, T: int):
    """float32 [B, T]: 1 on response tokens, a sampled end token included."""
    return (jnp.arange(T, dtype=jnp.int32)[None] < length_B[:, None]).astype(jnp.float32)


def anchor_mask(chunk_BT, length_B, scope: str):
    """U (scope `unaudited`), or every response token (`all`), as float32 [B, T]."""
    real_BT = response_mask(length_B, chunk_BT.shape[1])
    return real_BT if scope == "all" else real_BT * (chunk_BT < 0)


def weighted_mask(batch: Batch, cfg, T: int):
    """float32 [B, T]: 1 on the tokens that the policy term speaks of: those of kept chunks, or the whole response."""
    if not of(cfg).chunks:
        return response_mask(batch.length_B, T)
    return (chunk_mask(batch.peak_BM, kept(batch, cfg), cfg.audit.chunk_tokens, T) >= 0).astype(jnp.float32)


def normalize(weight_BT, mask_BT, weighted_BT, cfg):
    """Divides by the global counts, once, so that micro-batches and hosts just add up (method.md, section 2, Z: ours).

    `constant`: both by rows x max_completion_length, or x E where the rows are the teacher's texts. `separate_means`:
    each by its own token count.
    """
    if cfg.objective.normalizer == "constant":
        most = cfg.max_completion_length if of(cfg).cut is None else cuts.most_tokens(cfg)
        z = float(weight_BT.shape[0] * most)
        return weight_BT / z, mask_BT / z
    return weight_BT / jnp.maximum(weighted_BT.sum(), 1.0), mask_BT / jnp.maximum(mask_BT.sum(), 1.0)


def constant(logp_BT, batch: Batch, cfg):
    """The control without a teacher: the chunks that an audit would have had, one constant weight (arXiv
    2608.31046)."""
    keep_BM = batch.peak_BM >= 0
    weight_BM = jnp.full(keep_BM.shape, cfg.objective.constant, jnp.float32)
    if batch.ratio_BM is not None:  # in a mix with audits, of a step that an older policy sampled
        keep_BM = keep_BM & in_band(batch.ratio_BM)
        weight_BM = jnp.where(keep_BM, weight_BM * batch.ratio_BM, 0.0)
    chunk_BT = chunk_mask(batch.peak_BM, keep_BM, cfg.audit.chunk_tokens, logp_BT.shape[1])
    weight_BT = jnp.where(chunk_BT >= 0, jnp.take_along_axis(weight_BM, jnp.maximum(chunk_BT, 0), axis=1), 0.0)
    return jax.lax.stop_gradient(weight_BT), anchor_mask(chunk_BT, batch.length_B, cfg.anchor.scope)


def cross_entropy(logp_BT, batch: Batch, cfg):
    """Cross-entropy on every token of somebody's texts: whole solutions (`sft`), or what the teacher wrote behind the
    student's prefix (`continuation`), which counts among the prompt."""
    real_BT = response_mask(batch.length_B, logp_BT.shape[1])
    return real_BT, real_BT


def context(logp_BT, batch: Batch, cfg):
    """The divergence from the distribution under the privileged prompt, on every token of a row that has one."""
    real_BT = response_mask(batch.length_B, logp_BT.shape[1])
    if batch.context is not None:
        real_BT *= batch.context.given_B[:, None]
    return jnp.zeros_like(real_BT), real_BT


def opd(logp_BT, batch: Batch, cfg):
    """White-box on-policy distillation, reverse KL by the sampled token: weight log q(y_t) - log pi(y_t), detached.

    Its gradient is an unbiased estimate of -grad KL(pi || q) at each position with the prefix held fixed: the score
    function's term that is left out, E[grad log pi], is zero. Both hold where the tokens are drawn from pi itself, at
    temperature 1 and untruncated. `opd_exact` takes the whole vocabulary instead, whatever was drawn.
    """
    real_BT = response_mask(batch.length_B, logp_BT.shape[1])
    return jax.lax.stop_gradient(batch.teacher_logp_BT - logp_BT) * real_BT, real_BT


def opd_exact(logp_BT, batch: Batch, cfg):
    """White-box OPD with the exact full-vocabulary reverse KL: that term is the vocabulary pass's; no weight here."""
    real_BT = response_mask(batch.length_B, logp_BT.shape[1])
    return jnp.zeros_like(real_BT), real_BT


def grpo(logp_BT, batch: Batch, cfg):
    """Group-relative policy optimisation from a task reward; clipped where old_logp_BT says the policy has moved on.

    The gradient of min(r A, clip(r, 1 - eps, 1 + eps) A) is A r grad log pi where the clip is not active and 0 where it
    is: a constant weight, like everything else here (Shao et al., arXiv 2402.03300, without its token-mean a response).
    """
    real_BT = response_mask(batch.length_B, logp_BT.shape[1])
    return policy_gradient_weight(logp_BT, batch, cfg) * real_BT, real_BT


def policy_gradient_weight(logp_BT, batch: Batch, cfg):
    """A_b, times the clipped importance ratio where the batch has old log-probs; [B, T]."""
    assert batch.advantage_B is not None, "a task reward needs graded responses"
    advantage_BT = jnp.broadcast_to(batch.advantage_B[:, None], logp_BT.shape)
    if batch.old_logp_BT is None:
        return advantage_BT
    ratio_BT = jnp.exp(logp_BT - batch.old_logp_BT)
    return jax.lax.stop_gradient(jnp.where(clipped(logp_BT, batch, cfg), 0.0, advantage_BT * ratio_BT))


def clipped(logp_BT, batch: Batch, cfg):
    """bool [B, T]: where the ratio has left [1 - clip, 1 + clip] on the side that the advantage pushes to; one of 0
    pushes nowhere."""
    assert batch.advantage_B is not None, "a task reward needs graded responses"
    ratio_BT, eps = jnp.exp(logp_BT - batch.old_logp_BT), cfg.objective.clip
    advantage_BT = batch.advantage_B[:, None]
    return jnp.where(advantage_BT > 0, ratio_BT > 1 + eps, (ratio_BT < 1 - eps) & (advantage_BT < 0))


def group_advantage(reward_B, group: int):
    """(r - mean) / (std + 1e-4) within each prompt's responses, which stand side by side (arXiv 2402.03300; TRL's
    epsilon).

    A group of one, or with equal rewards, gets 0.
    """
    reward_XG = reward_B.reshape(-1, group)
    centred = reward_XG - reward_XG.mean(1, keepdims=True)
    return (centred / (reward_XG.std(1, keepdims=True) + 1e-4)).reshape(-1)


@flax.struct.dataclass
class TokenWeights:
    """Of the vocabulary pass, normalised: weight of -logp, anchor's mask, weight of another divergence or None."""

    weight_BT: jax.Array
    mask_BT: jax.Array
    divergence_BT: jax.Array | None = None


def token_weights(logp_BT, batch: Batch, group) -> TokenWeights:
    """The sum over the parts that share these rows (`row_groups`): each with its own baseline and normaliser."""
    total: TokenWeights | None = None
    for share, cfg in group:
        weight_BT, mask_BT = _normalized(logp_BT, batch, cfg)
        one = TokenWeights(weight_BT, mask_BT, mask_BT if of(cfg).divergence else None)
        one = one if share == 1 else jax.tree.map(lambda a, s=share: s * a, one)
        if total is not None:
            apart = [a for a in (total.divergence_BT, one.divergence_BT) if a is not None]
            weight_BT, mask_BT = total.weight_BT + one.weight_BT, total.mask_BT + one.mask_BT
            one = TokenWeights(weight_BT, mask_BT, apart[0] if apart else None)
        total = one
    assert total is not None, "a group has at least one part"
    return total


def weights(logp_BT: Float[Array, "B T"], batch: Batch, cfg) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(weight_BT, anchor_mask_BT) of an objective, a task reward added where `reward.coef` asks for one, normalised."""
    got = token_weights(logp_BT, batch, parts(cfg))
    return got.weight_BT, got.mask_BT


def _normalized(logp_BT, batch: Batch, cfg):
    weight_BT, mask_BT = of(cfg)(logp_BT, batch, cfg)
    weight_BT, mask_BT = normalize(weight_BT, mask_BT, weighted_mask(batch, cfg, logp_BT.shape[1]), cfg)
    if cfg.reward.coef and not of(cfg).needs_reward:
        real_BT = response_mask(batch.length_B, logp_BT.shape[1])
        reward_BT = cfg.reward.coef * policy_gradient_weight(logp_BT, batch, cfg) * real_BT
        weight_BT += normalize(reward_BT, real_BT, real_BT, cfg)[0]
    return weight_BT, mask_BT


def _by_cut(own: Objective, cfg) -> Objective:
    cut = cuts.CUTS[cfg.continuation.cut]
    return dataclasses.replace(own, cut=cut, asks=frozenset([cut.asks]))


def _by_context(own: Objective, cfg) -> Objective:
    return dataclasses.replace(own, scorer=SCORERS[cfg.context.model], divergence=cfg.context.divergence)


OBJECTIVES = {
    "omniopd": Objective(
        omniopd, "OmniOPD: on-policy distillation from a teacher that only speaks text (arXiv 2606.01476)",
        asks="continuations", chunks=True, reads_logp=True,
    ),
    "constant": Objective(
        constant, "a control: one constant weight on the student's own chunks, no teacher", chunks=True
    ),
    "continuation": Objective(
        cross_entropy, "continuation fine-tuning: cross-entropy on the teacher's text behind the student's own prefix",
        asks="prefixes", settle=_by_cut,
    ),
    "sft": Objective(
        cross_entropy, "cross-entropy on the teacher's own solutions", asks="solutions", cut=cuts.CUTS["zero"]
    ),
    "context": Objective(
        context, "self-distillation: KL to the student's own distribution where it is shown the teacher's solution",
        asks="solutions", settle=_by_context,
    ),
    "opd": Objective(
        opd, "white-box on-policy distillation: reverse KL to the teacher by the sampled token",
        asks="logp", reads_logp=True,
    ),
    "opd_exact": Objective(
        opd_exact, "white-box on-policy distillation: exact KL to the teacher over the vocabulary",
        asks="distribution", divergence="reverse",
    ),
    "grpo": Objective(grpo, "GRPO with a rule-based reward, no teacher", needs_reward=True, clips=True),
}  # fmt: skip
