r"""Losses that compare the policy's choice among the candidates of a prompt with a target distribution.

Softmax over the implicit rewards `beta * (log policy - log reference)` of a few candidates is the policy's choice `p`
among them, and a reward model's scores, or the knowledge of which one is best, make a target `q`. Plackett-Luce
(`jaxdpo.losses.ranking`) is maximum likelihood of draws from `q`, the forward KL divergence; EXO is the reverse.

>>> import jax, jax.numpy as jnp
>>> from jaxdpo.losses.listwise import exo_loss
>>> ref_logps, scores = jnp.array([-12.0, -15.0, -11.0]), jnp.array([2.0, 1.0, 0.0])
>>> print(f"{exo_loss(ref_logps + 10 * scores, ref_logps, beta=0.1, targets=jax.nn.softmax(scores)):.4f}")  # p is q
0.0000
>>> print(f"{exo_loss(ref_logps, ref_logps, beta=0.1, targets=jax.nn.softmax(scores)):.4f}")  # p is uniform
0.3090
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import best_candidate, beta_option, given_targets, option
from jaxdpo.losses._scores import candidate_scores, subtract_best
from jaxdpo.losses.divergences import MAX_EXPONENT, reverse_kl


def exo_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 1e-3,
    targets: ArrayLike | None = None,
    divergence: Callable[[jax.Array], jax.Array] = reverse_kl,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Efficient exact optimization: reverse KL from the policy's choice among the candidates to a target distribution.

    .. math:: \sum_k p_k (\log p_k - \log q_k), \quad p = \text{softmax}(β \log π / π^{ref})

    Maximum likelihood, and so DPO, is the forward KL `sum_k q_k log(q_k / p_k)` and covers all modes of `q`; this one
    seeks one, as reinforcement learning does. By default `q` is `1 - ε` on the best candidate and `ε / (K - 1)` on each
    of the others, `ε = label_smoothing`. For two candidates it is TRL's `exo_pair`, `-log(4 ε (1 - ε)) / 2` where
    policy and reference agree.

    Args:
      policy_logps: `[..., candidates]` float, summed log-probability of each completion, best first, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced.
      label_smoothing: in (0, 0.5), what the default target leaves to the others; may be traced.
      targets: `[..., candidates]` float, the target distribution instead of the default, such as
        `softmax(scores / temperature)` of a reward model's scores. Each is counted as e^-80 or more, since the log of 0
        is infinite; they should sum to 1 over a group, or else the loss is off by a constant. None: the default.
      divergence: score of a log-ratio that takes its place, see `jaxdpo.losses.divergences`.
      where: `[..., candidates]` bool, which candidates exist. Groups of fewer than two return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if shapes differ or an option is out of range; the message states the value.
    References:
      Ji et al. 2024, https://arxiv.org/abs/2402.00856, Eq. 16 for pairs.
    Example:
      >>> logps = jnp.array([-12.0, -15.0, -11.0])
      >>> print(f"{exo_loss(logps, logps, targets=jnp.full(3, 1 / 3)):.4f}")  # the policy chooses as the target does
      0.0000
    """
    scores, exists = candidate_scores(policy_logps, ref_logps, divergence, where)  # [..., candidates]
    gap = subtract_best(scores, exists)  # [..., candidates], at most 0
    logits = beta_option(beta, gap.dtype) * gap
    present = exists | ~exists.any(axis=-1, keepdims=True)  # a group without candidates has no log-sum-exp, its 0s have
    log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True, where=present)
    smoothing = option(
        "label_smoothing", label_smoothing, "above 0 to below 0.5, such as 0.001", lambda e: 0 < e < 0.5, gap.dtype
    )
    if targets is None:
        others = jnp.maximum(exists.sum(axis=-1, keepdims=True) - 1, 1).astype(gap.dtype)  # [..., 1]
        log_q = jnp.where(best_candidate(exists), jnp.log1p(-smoothing), jnp.log(smoothing / others))
    else:
        log_q = jnp.log(jnp.maximum(given_targets(targets, where, gap), math.exp(-MAX_EXPONENT)))
    return jnp.where(exists, jnp.exp(log_p) * (log_p - log_q), 0).sum(axis=-1)  # [...]
