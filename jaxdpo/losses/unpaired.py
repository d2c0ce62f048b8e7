r"""Losses for answers that were judged one by one, good or bad, without a comparison.

The implicit reward of an answer is held against a baseline that all answers of a step share: a good one should be
above it, a bad one below. KTO takes the KL divergence between policy and reference, BCO the mean of all rewards that
the run has seen. The baseline is a constant: no gradient goes through it.

For KTO a group is `[..., 2]`: a completion, and one that belongs to another prompt, by which the divergence is
estimated. For BCO it is `[..., 1]`. `label` says `[...]` which completions are good:

>>> import jax.numpy as jnp
>>> from jaxdpo.losses import bco_loss, bco_running, kto_loss
>>> policy_logps = jnp.array([[-10.0, -31.0], [-10.0, -29.0]])
>>> ref_logps = jnp.array([[-30.0, -30.0], [-30.0, -30.0]])  # both completions have gained 20 nats, their partners 0
>>> print(kto_loss(policy_logps, ref_logps, label=jnp.array([True, False]), beta=0.1).round(2))
[0.12 0.88]

A mean over a run is carried from step to step as a `RunningMean`:

>>> from jaxdpo.losses import RunningMean
>>> before = RunningMean(jnp.float32(0), jnp.float32(0))
>>> after = bco_running(before, policy_logps[:, :1], ref_logps[:, :1], beta=0.1)
>>> print(after.mean, after.weight)
2.0 2.0
>>> label = jnp.array([True, False])
>>> print(bco_loss(policy_logps[:, :1], ref_logps[:, :1], label=label, beta=0.1, baseline=after.mean).round(4))
[0.6931 0.6931]
"""

import math

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import beta_option, candidate_arrays, explain, option
from jaxdpo.losses.likelihood import mean_over_groups
from jaxdpo.losses.preference import implicit_rewards
from jaxdpo.losses.spec import RunningMean


def judged(
    policy_logps: ArrayLike, ref_logps: ArrayLike | None, label: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-ratios, which candidates exist, `[..., candidates]` both, and bool `[...]` which groups are good."""
    log_ratio = implicit_rewards(policy_logps, ref_logps, beta=1.0, where=where)
    _, exists = candidate_arrays(where, 1, policy_logps=log_ratio)
    label = jnp.asarray(label)
    with explain(
        f"label has shape {label.shape}, policy_logps {log_ratio.shape}; allowed: {log_ratio.shape[:-1]}; "
        "pass one label per group"
    ):
        chex.assert_shape(label, log_ratio.shape[:-1])
    return log_ratio, exists, label.astype(bool)


def kto_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    label: ArrayLike,
    beta: ArrayLike = 0.1,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
    kl: ArrayLike | None = None,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Kahneman-Tversky Optimization: the value of a gain and of a loss, measured from the divergence so far.

    .. math:: λ_D \big(1 - σ(β (l - z))\big) \text{ if good}, \quad λ_U \big(1 - σ(β (z - l))\big) \text{ if bad}

    with `l` the log-ratio `log policy - log reference`. `z` is the mean log-ratio of the second candidates, at least
    0: completions of other prompts, whose log-ratio says how far the policy has moved where it was not asked to. A
    completion may be its group's only candidate; its partner is then missing from the estimate, not from the loss.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of a completion and of one of another prompt, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      label: `[...]` bool or 0 and 1, whether the first candidate is a good answer.
      beta: strength of the KL penalty, above 0; may be traced.
      desirable_weight: weight of good completions, at least 0, may be traced. With `g` good and `b` bad
        ones in the data the paper advises that `desirable_weight * g` be 1 to 4/3 times `undesirable_weight * b`.
      undesirable_weight: weight of bad completions, at least 0, may be traced.
      kl: the estimate `z` in nats, may be traced; None: from the given groups.
      axis_name: axis of `jax.pmap` or `jax.shard_map` over which the groups are split, for `kl=None`.
      where: `[..., 2]` bool, which candidates exist. Groups without the first return 0 and get zero gradient, and no
        second candidate ever gets one.
    Returns:
      `[...]` loss in [0, weight], at least float32, not reduced. TRL reports its mean over good and bad together.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, Sec. 4.
    Example:
      >>> logps = jnp.array([[-12.0, -15.0]])
      >>> print(kto_loss(logps, logps, label=jnp.array([True])))  # 1 - sigmoid(0): the policy is its reference
      [0.5]
    """
    log_ratio, exists, good = judged(policy_logps, ref_logps, label, where)
    with explain(
        f"{log_ratio.shape[-1]} candidates on the last axis of shape {log_ratio.shape}; allowed: 2, a completion and "
        "one of another prompt; mark a missing one in where"
    ):
        chex.assert_axis_dimension(log_ratio, -1, 2)
    dtype, allowed = log_ratio.dtype, "0 or more, such as 1"
    gain = option("desirable_weight", desirable_weight, allowed, lambda w: 0 <= w < math.inf, dtype)
    loss = option("undesirable_weight", undesirable_weight, allowed, lambda w: 0 <= w < math.inf, dtype)
    if kl is None:
        kl = jnp.maximum(mean_over_groups(log_ratio[..., 1], exists[..., 1], axis_name), 0)
    else:
        kl = option("kl", kl, "0 or more, in nats", lambda z: 0 <= z < math.inf, dtype)
    above = beta_option(beta, dtype) * (log_ratio[..., 0] - jax.lax.stop_gradient(kl))  # [...]
    value = jnp.where(good, gain * jax.nn.sigmoid(-above), loss * jax.nn.sigmoid(above))
    return jnp.where(exists[..., 0], value, 0)


def bco_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    label: ArrayLike,
    beta: ArrayLike = 0.1,
    baseline: ArrayLike | None = None,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Binary Classifier Optimization: logistic regression of good against bad on the implicit reward.

    .. math:: -\log σ(r - δ) \text{ if good}, \quad -\log σ(δ - r) \text{ if bad}, \quad r = β (\log π - \log π^{ref})

    The baseline `δ` is the mean reward of everything seen so far in the run, this step's groups included, as in TRL:
    update a `RunningMean` by `bco_running` and pass its mean. TRL's weighting of bad completions by how likely their
    prompt is among the good ones (underlying distribution matching) is not done here: multiply the loss.

    Args:
      policy_logps: `[..., 1]` float, summed log-probability of the completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      label: `[...]` bool or 0 and 1, whether the completion is a good answer.
      beta: strength of the KL penalty, above 0, may be traced; advised: 0.01.
      baseline: a reward, may be traced; None: the mean over the given groups.
      axis_name: axis of `jax.pmap` or `jax.shard_map` over which the groups are split, for `baseline=None`.
      where: `[..., 1]` bool, which completions exist. The rest return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there is not one candidate, shapes differ, or an option is out of range.
    References:
      Jung et al. 2024, https://arxiv.org/abs/2404.04656.
    Example:
      >>> loss = bco_loss(jnp.array([[-12.0]]), jnp.array([[-14.0]]), label=jnp.array([True]), beta=1.0, baseline=2.0)
      >>> print(loss.round(4))  # log 2: the reward is the baseline
      [0.6931]
    """
    log_ratio, exists, good = judged(policy_logps, ref_logps, label, where)
    with explain(
        f"{log_ratio.shape[-1]} candidates on the last axis of shape {log_ratio.shape}; allowed: 1, a completion; "
        "for a chosen and a rejected one use bco_pair_loss"
    ):
        chex.assert_axis_dimension(log_ratio, -1, 1)
    beta = beta_option(beta, log_ratio.dtype)
    ratio, counts = log_ratio[..., 0], exists[..., 0]  # [...]
    if baseline is None:
        above = beta * (ratio - jax.lax.stop_gradient(mean_over_groups(ratio, counts, axis_name)))
    else:
        baseline = option("baseline", baseline, "any finite reward", math.isfinite, ratio.dtype)
        above = beta * ratio - jax.lax.stop_gradient(baseline)
    return jnp.where(counts, -jax.nn.log_sigmoid(jnp.where(good, above, -above)), 0)


def update_running_mean(
    state: RunningMean, values: jax.Array, *, where: jax.Array | None = None, axis_name: str | None = None
) -> RunningMean:
    """The mean of all values seen so far, these included; every value counts the same, whenever it was seen.

    Args:
      state: before. Its dtypes stay, so it may be carried through `jax.lax.scan`.
      values: `[...]` float.
      where: `[...]` bool, which values count; None: all.
      axis_name: axis of `jax.pmap` or `jax.shard_map` over which the values are split; every device gets the same mean.
    Returns:
      The state after; unchanged where no value counts.
    Example:
      >>> state = RunningMean(jnp.float32(0), jnp.float32(0))
      >>> for values in (jnp.array([1.0, 3.0]), jnp.array([8.0])):
      ...     state = update_running_mean(state, values)
      >>> print(state.mean, state.weight)  # (1 + 3 + 8) / 3
      4.0 3.0
    """
    counts = jnp.ones(values.shape, bool) if where is None else where
    values = jax.lax.stop_gradient(values)
    mean = mean_over_groups(values, counts, axis_name).astype(state.mean.dtype)
    number = counts.sum().astype(state.weight.dtype)
    if axis_name is not None:
        number = jax.lax.psum(number, axis_name)
    weight = state.weight + number
    return RunningMean(state.mean + (mean - state.mean) * (number / jnp.maximum(weight, 1)), weight)


def bco_running(
    state: RunningMean,
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
    axis_name: str | None = None,
) -> RunningMean:
    """BCO's baseline after a step: the running mean of implicit rewards, good and bad together.

    Args:
      state: before the step; `RunningMean(jnp.float32(0), jnp.float32(0))` at the start of a run.
      policy_logps: `[..., 1]` as in `bco_loss`, of all groups of the step.
      ref_logps: same shape, or None.
      beta: strength of the KL penalty, above 0; may be traced.
      where: `[..., 1]` bool, which completions exist.
      axis_name: axis of `jax.pmap` or `jax.shard_map` over which the groups are split.
    Returns:
      The state whose mean is the `baseline` of the same step's `bco_loss`.
    Raises:
      InputError: (a ValueError) if shapes differ or `beta` is out of range.
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta=beta, where=where)
    _, exists = candidate_arrays(where, 1, policy_logps=rewards)
    return update_running_mean(state, rewards, where=exists, axis_name=axis_name)
