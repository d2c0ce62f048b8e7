r"""Alignment by optimal transport: the distribution of rewards must be better, not each pair.

First-order stochastic dominance: one distribution beats another if every quantile of it does. So these losses sort one
quantity over all groups, sort another beside it, and apply the DPO loss to what stands in the same place. Sorted values
are paired quantile by quantile, which is optimal transport on the line.

The loss couples all groups: it is no mean of losses of parts of a batch. It sorts every group that it is given, over
all leading axes, and with `axis_name` those of all devices of a `jax.pmap` or `jax.shard_map`, so that value and
gradient are those of the whole batch. TRL sorts each micro-batch of each device alone, and so its loss depends on their
size.

>>> import jax.numpy as jnp
>>> from jaxdpo.losses.transport import aot_loss
>>> ref_logps = jnp.zeros((2, 2))
>>> policy_logps = jnp.array([[-20.0, -40.0], [-30.0, -10.0]])  # log-prob margins of 20 and -20 nats
>>> print(aot_loss(policy_logps, ref_logps, beta=0.1).round(4))  # a margin of 0 in both quantiles of the reference
[0.1269 2.1269]
>>> print(aot_loss(policy_logps, policy_logps[::-1], beta=0.1).round(4))  # the same margins, for other prompts
[0.6931 0.6931]

Each group gets the loss of the quantile that it holds, by the policy's margin of log-probabilities (`aot_loss`) or by
the log-ratio of its chosen completion (`aot_unpaired_loss`). Equal values are told apart by the order of groups.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import beta_option, candidate_arrays, check_pair, smoothing_option
from jaxdpo.losses._scores import Wide, candidate, candidate_scores, difference, subtract
from jaxdpo.losses.divergences import reverse_kl


def _order(values: Wide, counts: jax.Array) -> jax.Array:
    """`[groups]` indices that sort values `[groups]`, those that do not count last."""
    value, rest = jax.lax.stop_gradient(values)
    return jnp.lexsort((rest, jnp.where(counts, value, jnp.inf)))  # by value, where that is equal by the rest


def _same_quantile(better: Wide, worse: Wide, counts: jax.Array, axis_name: str | None) -> Wide:
    """Of every group the value in `worse` that stands where the group stands in `better`, all `[...]`."""
    shape, groups = counts.shape, counts.size
    better, worse, counts = jax.tree.map(jnp.ravel, (better, worse, counts))
    if axis_name is not None:
        better, worse, counts = jax.lax.all_gather((better, worse, counts), axis_name, tiled=True)  # of all devices
    place = jnp.argsort(_order(better, counts))  # [all groups], of each group in the order of `better`
    if axis_name is not None:
        place = jax.lax.dynamic_slice_in_dim(place, jax.lax.axis_index(axis_name) * groups, groups)
    partner = _order(worse, counts)[place]  # [groups]
    return jax.tree.map(lambda part: part[partner].reshape(shape), worse)


def _quantile_losses(
    better: Wide,
    worse: Wide,
    counts: jax.Array,
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike,
    axis_name: str | None,
) -> jax.Array:
    """DPO's loss on the difference of equal quantiles, `[...]`, at the group that holds the quantile of `better`."""
    difference = subtract(better, _same_quantile(better, worse, counts, axis_name))
    logit = beta_option(beta, difference.dtype) * difference
    loss = jax.nn.softplus(-logit) + smoothing_option(label_smoothing, logit.dtype) * logit
    return jnp.where(counts, loss, 0)


def aot_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Alignment via optimal transport, paired: the policy's margins must dominate the reference's.

    .. math:: -(1-ε) \log σ(m_i) - ε \log σ(-m_i), \quad m_i = β (u_{(i)} - v_{(i)})

    with `u_(i)` the i-th smallest `log policy(chosen) - log policy(rejected)` of the batch and `v_(i)` that of the
    reference. `log 2` where policy and reference agree.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, all its margins are 0.
      beta: strength of the KL penalty, above 0; may be traced. The paper uses 0.01.
      label_smoothing: probability in [0, 0.5) that a label is flipped, may be traced.
      axis_name: mapped axis of `jax.pmap` or `jax.shard_map` over whose devices groups are sorted too; None: none.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete take no part, return 0 and get zero
        gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Melnyk et al. 2024, https://arxiv.org/abs/2406.05882.
    Example:
      >>> logps = jnp.array([[-12.0, -15.0], [-11.0, -10.0]])
      >>> print(aot_loss(logps, logps).round(4))
      [0.6931 0.6931]
    """
    arrays = {"policy_logps": policy_logps} | ({} if ref_logps is None else {"ref_logps": ref_logps})
    logps, exists = candidate_arrays(where, 2, **arrays)  # [..., 2]
    check_pair(logps[0])
    policy, *reference = (difference(model[..., 0], model[..., 1]) for model in logps)  # [...]
    return _quantile_losses(
        policy,
        reference[0] if reference else jax.tree.map(jnp.zeros_like, policy),
        exists.all(axis=-1),
        beta=beta,
        label_smoothing=label_smoothing,
        axis_name=axis_name,
    )


def aot_unpaired_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Alignment via optimal transport, unpaired: log-ratios of the chosen must dominate those of the rejected.

    .. math:: -(1-ε) \log σ(m_i) - ε \log σ(-m_i), \quad m_i = β (u_{(i)} - v_{(i)})

    with `u_(i)` the i-th smallest `log policy - log reference` of all chosen completions of the batch and `v_(i)` that
    of all rejected ones. Which chosen completion belongs to which rejected one does not matter. `log 2` where policy
    and reference agree.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced. The paper uses 0.01.
      label_smoothing: probability in [0, 0.5) that a label is flipped, may be traced.
      axis_name: mapped axis of `jax.pmap` or `jax.shard_map` over whose devices groups are sorted too; None: none.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete take no part, return 0 and get zero
        gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced; each at the group of the chosen completion.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Melnyk et al. 2024, https://arxiv.org/abs/2406.05882.
    Example:
      >>> logps = jnp.array([[-10.0, -20.0], [-30.0, -5.0]])
      >>> print(aot_unpaired_loss(logps, None, beta=0.1).round(4))  # -10 against -5, and -30 against -20
      [0.9741 1.3133]
    """
    scores, exists = candidate_scores(policy_logps, ref_logps, reverse_kl, where)  # [..., 2]
    check_pair(scores.value)
    return _quantile_losses(
        candidate(scores, 0),
        candidate(scores, 1),
        exists.all(axis=-1),
        beta=beta,
        label_smoothing=label_smoothing,
        axis_name=axis_name,
    )
