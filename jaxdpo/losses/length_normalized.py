"""DPO per token: losses that divide each implicit reward by the length of its completion.

A summed log-ratio grows with the number of tokens, so a pair of long answers has a larger margin than a pair of short
ones, and a loss that asks for a fixed margin treats them differently. Both losses here take `lengths`, the tokens of
each completion, beside the log-probabilities `[..., 2]`, and compare means per token. Their `beta` is that of
`dpo_loss` times about the length of an answer:

>>> import jax.numpy as jnp
>>> from jaxdpo.losses.length_normalized import sigmoid_norm_loss
>>> ref_logps, lengths = jnp.array([[-40.0, -42.0], [-80.0, -84.0]]), jnp.array([[20, 20], [40, 40]])
>>> policy_logps = ref_logps + jnp.array([[10.0, -10.0], [20.0, -20.0]])  # the same change of every token
>>> print(sigmoid_norm_loss(policy_logps, ref_logps, lengths=lengths, beta=2.0).round(4))  # -log sigmoid(2 * 1)
[0.1269 0.1269]
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import beta_option, candidate_arrays, check_pair
from jaxdpo.losses._scores import Wide, candidate, candidate_scores, half_inverse, per_token, subtract
from jaxdpo.losses.divergences import MAX_EXPONENT, reverse_kl


def _mean_margins(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    lengths: ArrayLike,
    divergence: Callable[[jax.Array], jax.Array],
    where: ArrayLike | None,
) -> tuple[Wide, jax.Array]:
    """Score per token of chosen less that of rejected `[...]`, and bool `[...]`: which pairs are complete."""
    scores, exists = candidate_scores(policy_logps, ref_logps, divergence, where)  # [..., 2]
    check_pair(scores.value)
    (_, tokens), _ = candidate_arrays(where, 2, policy_logps=scores.value, lengths=lengths)
    means = per_token(scores, tokens.astype(scores.value.dtype))
    chosen, rejected = candidate(means, 0), candidate(means, 1)
    return jax.tree.map(jnp.subtract, chosen, rejected), exists.all(axis=-1)


def ipo_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    lengths: ArrayLike,
    beta: ArrayLike = 0.1,
    divergence: Callable[[jax.Array], jax.Array] = reverse_kl,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Identity Preference Optimization: pulls the margin to a finite value instead of apart.

    .. math:: \Big(\frac{s_w}{n_w} - \frac{s_l}{n_l} - \frac{1}{2β}\Big)^2

    with `s` the log-ratio `log policy - log reference`. Where DPO drives the margin of a pair that is always preferred
    to infinity whatever beta, this one stops at `1 / (2 beta)` nats per token. The division by the lengths `n` is not
    in the paper's equation, but is what its authors ran. `1 / (4 beta^2)` where policy and reference agree.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      lengths: same shape, number of tokens of each completion, 1 or more where it exists.
      beta: one over twice the margin that is asked for, above 0 (the paper's tau); may be traced.
      divergence: score of a log-ratio, `[...]` to `[...]`, see `jaxdpo.losses.divergences`. Some scores reach e^80, and
        their square is no float32, so the deviation that is squared is clamped at e^40, in float64 too.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in squared nats per token, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Azar et al. 2023, https://arxiv.org/abs/2310.12036, Eq. 17; the mean per token, on its authors' word:
      https://huggingface.co/blog/pref-tuning.
    Example:
      >>> logps, ref_logps = jnp.array([-12.0, -15.0]), jnp.array([-16.0, -15.0])
      >>> print(ipo_loss(logps, ref_logps, lengths=jnp.array([2, 3]), beta=0.5))  # (4 / 2 - 0 / 3 - 1)^2
      1.0
    """
    margin, counts = _mean_margins(policy_logps, ref_logps, lengths, divergence, where)  # [...]
    bound = math.exp(MAX_EXPONENT / 2)
    deviation = jnp.clip(subtract(margin, half_inverse(beta, margin.value.dtype)), -bound, bound)
    return jnp.where(counts, deviation**2, 0)


def sigmoid_norm_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    lengths: ArrayLike,
    beta: ArrayLike = 0.1,
    divergence: Callable[[jax.Array], jax.Array] = reverse_kl,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Length-normalized DPO: Bradley-Terry on the implicit rewards per token.

    .. math:: -\log σ\Big(β \frac{s_w}{n_w} - β \frac{s_l}{n_l}\Big)

    with `s` the log-ratio `log policy - log reference`; SimPO has neither reference nor, here, its margin. Tülu 3
    trains with it at `beta=5`. `log 2` where policy and reference agree.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      lengths: same shape, number of tokens of each completion, 1 or more where it exists.
      beta: strength of the KL penalty per token, above 0; may be traced.
      divergence: score of a log-ratio, `[...]` to `[...]`, see `jaxdpo.losses.divergences`.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Lambert et al. 2024 (Tülu 3), https://arxiv.org/abs/2411.15124; Meng et al. 2024 (SimPO),
      https://arxiv.org/abs/2405.14734.
    Example:
      >>> logps, ref_logps = jnp.array([-12.0, -15.0]), jnp.array([-16.0, -15.0])
      >>> print(f"{sigmoid_norm_loss(logps, ref_logps, lengths=jnp.array([2, 3]), beta=1.0):.4f}")  # -log sigmoid(2)
      0.1269
    """
    margin, counts = _mean_margins(policy_logps, ref_logps, lengths, divergence, where)  # [...]
    logit = beta_option(beta, margin.value.dtype) * (margin.value + margin.rest)
    return jnp.where(counts, jax.nn.softplus(-logit), 0)
