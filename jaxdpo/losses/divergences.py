r"""f-divergences: what keeps the policy near its reference, and so what reward a log-ratio stands for.

DPO penalises the reverse KL divergence from the reference, and its reward is `beta` times the log-ratio `l = log policy
- log reference`. Under the penalty of another f-divergence the reward is `beta * f'(e^l)`, again up to a constant of
the prompt: a policy becomes a reward through a *score* `f'(e^l)` of its log-ratio. Each function here is one score, and
losses that compare two candidates take any of them, or your own, as `divergence`:

>>> import functools, jax.numpy as jnp
>>> from jaxdpo.losses import dpo_loss
>>> from jaxdpo.losses.divergences import alpha_divergence, forward_kl
>>> logps, ref_logps = jnp.array([-12.0, -15.0]), jnp.array([-13.0, -14.0])
>>> print(f"{dpo_loss(logps, ref_logps, divergence=forward_kl):.4f}")
0.5825
>>> print(f"{dpo_loss(logps, ref_logps, divergence=functools.partial(alpha_divergence, alpha=0.5)):.4f}")
0.5943

All scores are 0 at `l = 0` with slope 1 (one half for Jensen-Shannon), so near the reference the penalties agree; away
from it forward KL and small alpha punish a policy that drops what its reference does. Exponents are clamped at 80: e^80
is 5.5e34, and e^89 is no longer a float32. There score and gradient no longer change. It applies in float64 too.
"""

import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import option

MAX_EXPONENT = 80.0
"""Exponents of scores are clamped here."""


def _floating(log_ratio: ArrayLike) -> jax.Array:
    log_ratio = jnp.asarray(log_ratio)
    return log_ratio.astype(jnp.float64 if log_ratio.dtype == jnp.float64 else jnp.float32)


def reverse_kl(log_ratio: ArrayLike) -> jax.Array:
    """The log-ratio itself: `KL(policy || reference)`, the penalty of DPO. It seeks modes of the reference.

    Args:
      log_ratio: `[...]` float, log policy - log reference, nats.
    Returns:
      `[...]` scores, at least float32.
    References:
      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Eq. 5.
    Example:
      >>> print(reverse_kl(jnp.array([-1.0, 0.0, 1.0])))
      [-1.  0.  1.]
    """
    return _floating(log_ratio)


def forward_kl(log_ratio: ArrayLike) -> jax.Array:
    """`1 - e^-l`: `KL(reference || policy)`, which covers the reference. Below `l = -80` it is clamped.

    Args:
      log_ratio: `[...]` float, log policy - log reference, nats.
    Returns:
      `[...]` scores, at least float32.
    References:
      Wang et al. 2023, https://arxiv.org/abs/2309.16240.
    Example:
      >>> print(forward_kl(jnp.array([-1.0, 0.0, 1.0])).round(3))
      [-1.718  0.     0.632]
    """
    return -jnp.expm1(jnp.minimum(-_floating(log_ratio), MAX_EXPONENT))


def js_divergence(log_ratio: ArrayLike) -> jax.Array:
    """`log(2 / (1 + e^-l))`: Jensen-Shannon, between the two KL divergences. It gives no credit above log 2.

    Args:
      log_ratio: `[...]` float, log policy - log reference, nats.
    Returns:
      `[...]` scores, at least float32.
    References:
      Wang et al. 2023, https://arxiv.org/abs/2309.16240.
    Example:
      >>> print(js_divergence(jnp.array([-1.0, 0.0, 9.0])).round(2))
      [-0.62  0.    0.69]
    """
    return math.log(2) - jax.nn.softplus(-_floating(log_ratio))


def alpha_divergence(log_ratio: ArrayLike, *, alpha: ArrayLike = 0.5) -> jax.Array:
    """`(e^((alpha - 1) l) - 1) / (alpha - 1)`: from forward KL at alpha 0 to reverse KL at 1, without a jump.

    The exponent is clamped at 80 from above.

    Args:
      log_ratio: `[...]` float, log policy - log reference, nats.
      alpha: finite; may be traced, and may be 1.
    Returns:
      `[...]` scores, at least float32.
    Raises:
      InputError: (a ValueError) if alpha is not a finite scalar; the message states the value.
    References:
      Wang et al. 2023, https://arxiv.org/abs/2309.16240, whose alpha is one minus this one, TRL's.
    Example:
      >>> print(alpha_divergence(jnp.log(jnp.array([0.25, 1.0, 4.0])), alpha=0.5))  # 2 (1 - e^(-l / 2))
      [-2.  0.  1.]
      >>> print(alpha_divergence(jnp.array([-1.0, 0.0, 1.0]), alpha=1.0))
      [-1.  0.  1.]
    """
    log_ratio = _floating(log_ratio)
    slope = option("alpha", alpha, "a finite number, such as 0.5", math.isfinite, log_ratio.dtype) - 1
    if isinstance(alpha, numbers.Real):
        slope = jnp.asarray(float(alpha) - 1, log_ratio.dtype)  # 0.999 - 1 has few digits left in float32
    # Hidden from XLA, which would turn division by a constant into a product and contract that with the subtraction of
    # another score: two scores that are equal at the clamp would differ by the rounding of one, 1e26.
    slope = jax.lax.optimization_barrier(slope)
    at_limit = slope == 0
    # expm1 keeps the digits of a small exponent, so only the limit itself needs a branch. Double where: no 0 / 0.
    exponent = jnp.minimum(slope * log_ratio, MAX_EXPONENT)
    return jnp.where(at_limit, log_ratio, jnp.expm1(exponent) / jnp.where(at_limit, 1, slope))


DIVERGENCES: dict[str, Callable[..., jax.Array]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
"""The scores that training offers, by the name of TRL's `f_divergence_type`."""
