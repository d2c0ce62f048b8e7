r"""What to watch while preferences train a policy, under the names of TRL's logs.

A falling loss alone does not say whether the policy learns the preference (margins rise) or merely drifts from its
reference (both log-probabilities fall); these numbers do.

>>> import jax.numpy as jnp
>>> from jaxdpo.losses import preference_metrics
>>> ref_logps = jnp.array([[-40.0, -42.0], [-31.0, -20.0]])
>>> metrics = preference_metrics(ref_logps + jnp.array([[10.0, -10.0], [0.0, 0.0]]), ref_logps, beta=0.1)
>>> print(metrics["rewards/margins"], metrics["rewards/accuracies"])  # the second pair is a tie
[2. 0.] [1.  0.5]

They come per group and add up: over groups, microbatches and devices, in any order. `mean_metrics` turns the sums into
means. Some hold for a part of the groups only, such as the accuracy where the chosen answer is the longer one; their
sums are divided by how many groups, or shares of groups, they hold for (`CONDITIONAL`):

>>> from jaxdpo.losses import mean_metrics
>>> lengths = jnp.array([[9, 5], [4, 8]])
>>> metrics = preference_metrics(ref_logps + jnp.array([[10.0, -10.0], [0.0, 0.0]]), ref_logps, lengths=lengths)
>>> means = mean_metrics({name: value.sum() for name, value in metrics.items()}, groups=2)
>>> print(means["rewards/accuracies"], means["rewards/accuracies_longer"], means["rewards/accuracies_shorter"])
0.75 1.0 0.5
>>> print(means["chosen_longer"])  # for this share of the pairs the accuracy of 1.0 was found
0.5
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import best_candidate, candidate_arrays
from jaxdpo.losses.preference import implicit_rewards
from jaxdpo.losses.unpaired import judged

SATURATED = 0.01
"""A pair whose gradient weight is below this has little left to say."""
CONDITIONAL: dict[str, str] = {
    "rewards/accuracies_longer": "chosen_longer",
    "rewards/accuracies_shorter": "chosen_shorter",
    "rewards/chosen": "desirable",
    "logps/chosen": "desirable",
    "rewards/rejected": "undesirable",
    "logps/rejected": "undesirable",
    "kl": "mismatched",
}
"""Metrics that hold for a part of the groups, and the metric that says for how many. Where that one is missing, as
`desirable` is among the metrics of pairs, they hold for all."""


class _Sides(NamedTuple):
    """The best candidate of each group against the mean of its others."""

    best: jax.Array
    others: jax.Array

    def chosen(self, x: jax.Array) -> jax.Array:
        """Of the best candidate, `[..., candidates]` to `[...]`."""
        return jnp.where(self.best, x, 0).sum(axis=-1)

    def rejected(self, x: jax.Array) -> jax.Array:
        """Mean over all others, `[..., candidates]` to `[...]`."""
        number = jnp.maximum(self.others.sum(axis=-1), 1).astype(x.dtype)
        return jnp.where(self.others, x, 0).sum(axis=-1) / number


def preference_metrics(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    lengths: ArrayLike | None = None,
    ranks: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> dict[str, jax.Array]:
    """Implicit rewards, accuracy, margin, log-probabilities and drift of every group, not reduced.

    Chosen is a group's best candidate that exists, rejected the mean over all others that are worse; with two
    candidates this is TRL's definition. Accuracy is the fraction of the others that the chosen one beats, where equal
    rewards count one half, as in held-out accuracy. TRL counts them as a loss, so where the policy is its reference it
    reports 0 and this 0.5.

    Args:
      policy_logps: `[..., candidates]` float, summed log-probability of each completion, best first, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced.
      lengths: same shape, number of tokens of each completion; None: without the metrics that need them.
      ranks: same shape, int, not falling; those that tie with the best are neither chosen nor rejected. None: no ties.
      where: `[..., candidates]` bool, which candidates exist. Groups of fewer than two are 0 everywhere.
    Returns:
      `[...]` arrays, at least float32; `mean_metrics` takes their sums. TRL's: `rewards/chosen`, `rewards/rejected`,
      `rewards/accuracies`, `rewards/margins`, `logps/chosen` and `logps/rejected` (both of the policy).

      `rewards/gradient_weight`: how wrong DPO finds the order, `sigmoid(other - chosen)` of the rewards, by which it
      scales its gradient; mean over the others. `rewards/saturated`: share of the others with a weight below 0.01.

      With a reference, `kl`: mean of reference minus policy log-probability, nats. It estimates KL(reference || policy)
      without bias as far as the completions are samples of the reference. `logps/chosen_drift`: policy minus reference
      log-probability of the chosen one; where it falls, training makes even good answers less likely.

      With lengths, `logps_per_token/chosen` and `logps_per_token/rejected`; `chosen_longer` and `chosen_shorter`: share
      of the others than which the chosen one is longer, shorter; `rewards/accuracies_longer` and
      `rewards/accuracies_shorter`: accuracy times that share, of which `mean_metrics` makes the accuracy among them.
    Raises:
      InputError: (a ValueError) if shapes differ or `beta` is out of range; the message states the value.
    References:
      TRL's DPOTrainer, https://huggingface.co/docs/trl/dpo_trainer, for the names; Rafailov et al. 2023,
      https://arxiv.org/abs/2305.18290, Sec. 4, for the gradient weight.
    Example:
      >>> ranking = preference_metrics(jnp.array([-3.0, -5.0, -3.0]), jnp.array([-4.0, -4.0, -4.0]), beta=1.0)
      >>> names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen_drift")
      >>> print(*(ranking[name] for name in names))
      1.0 0.0 0.75 1.0 1.0
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta=beta, where=where)
    drift = implicit_rewards(policy_logps, ref_logps, beta=1.0, where=where)
    (rewards, logps, drift), exists = candidate_arrays(
        where, 2, rewards=rewards, policy_logps=policy_logps, drift=drift
    )
    best = best_candidate(exists)  # [..., candidates]
    others = exists & ~best
    if ranks is not None:
        of_best = jnp.where(best, ranks, 0).sum(axis=-1, keepdims=True)  # [..., 1]
        others &= jnp.asarray(ranks) > of_best
    sides = _Sides(best, others)
    ahead = sides.chosen(rewards)[..., None] - rewards  # [..., candidates]
    wins = (1 + jnp.sign(ahead)) / 2  # [..., candidates], a tie is one half
    weight = jax.nn.sigmoid(-ahead)  # [..., candidates]
    metrics = {
        "rewards/chosen": sides.chosen(rewards),
        "rewards/rejected": sides.rejected(rewards),
        "rewards/accuracies": sides.rejected(wins),
        "rewards/margins": sides.chosen(rewards) - sides.rejected(rewards),
        "logps/chosen": sides.chosen(logps),
        "logps/rejected": sides.rejected(logps),
        "rewards/gradient_weight": sides.rejected(weight),
        "rewards/saturated": sides.rejected((weight < SATURATED).astype(weight.dtype)),
    }
    if ref_logps is not None:
        number = jnp.maximum(exists.sum(axis=-1), 1).astype(drift.dtype)  # [...]
        metrics |= {"kl": -drift.sum(axis=-1) / number, "logps/chosen_drift": sides.chosen(drift)}
    if lengths is not None:
        (logps, tokens), _ = candidate_arrays(where, 2, policy_logps=logps, lengths=lengths)
        metrics |= _by_length(sides, logps, tokens, wins)
    return metrics


def _by_length(sides: _Sides, logps: jax.Array, tokens: jax.Array, wins: jax.Array) -> dict[str, jax.Array]:
    """The metrics that need lengths, see `preference_metrics`."""
    per_token = logps / jnp.maximum(tokens, 1)  # [..., candidates]
    ahead = sides.chosen(tokens)[..., None] - tokens  # [..., candidates]
    longer, shorter = ((sign * ahead > 0).astype(wins.dtype) for sign in (1, -1))  # [..., candidates]
    return {
        "logps_per_token/chosen": sides.chosen(per_token),
        "logps_per_token/rejected": sides.rejected(per_token),
        "chosen_longer": sides.rejected(longer),
        "chosen_shorter": sides.rejected(shorter),
        "rewards/accuracies_longer": sides.rejected(longer * wins),
        "rewards/accuracies_shorter": sides.rejected(shorter * wins),
    }


def unpaired_metrics(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    label: ArrayLike,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
) -> dict[str, jax.Array]:
    """Implicit rewards and log-probabilities of completions that were judged one by one, not reduced.

    Args:
      policy_logps: `[..., 1]` or, for KTO, `[..., 2]` float: summed log-probability of a completion, and of one of
        another prompt, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      label: `[...]` bool or 0 and 1, whether the completion is a good answer.
      beta: strength of the KL penalty, above 0; may be traced.
      where: same shape, bool, which candidates exist.
    Returns:
      `[...]` arrays, at least float32; `mean_metrics` takes their sums. `desirable` and `undesirable`: 1 for a good, a
      bad completion. `rewards/chosen` and `logps/chosen` of good ones, `rewards/rejected` and `logps/rejected` of bad
      ones, else 0; `mean_metrics` divides them by the number of such completions and adds their difference,
      `rewards/margins`. With second candidates and a reference, `mismatched`: 1 where there is one, and `kl`: its
      policy minus reference log-probability, whose mean, at least 0, is KTO's estimate.
    Raises:
      InputError: (a ValueError) if shapes differ or `beta` is out of range; the message states the value.
    References:
      TRL's KTOTrainer, https://huggingface.co/docs/trl/kto_trainer, for the names.
    Example:
      >>> label, logps = jnp.array([True, False, True]), jnp.array([[-3.0], [-5.0], [-6.0]])
      >>> sums = {name: x.sum() for name, x in unpaired_metrics(logps, logps - 1, label=label, beta=0.5).items()}
      >>> print(mean_metrics(sums, groups=3)["logps/chosen"], mean_metrics(sums, groups=3)["rewards/margins"])
      -4.5 0.0
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta=beta, where=where)
    log_ratio, exists, good = judged(policy_logps, ref_logps, label, where)
    (logps,), _ = candidate_arrays(where, 1, policy_logps=policy_logps)
    sides = {"desirable": exists[..., 0] & good, "undesirable": exists[..., 0] & ~good}  # [...]
    metrics = {name: side.astype(rewards.dtype) for name, side in sides.items()}
    for name, values in (("rewards", rewards[..., 0]), ("logps", logps[..., 0])):
        metrics[f"{name}/chosen"] = jnp.where(sides["desirable"], values, 0)
        metrics[f"{name}/rejected"] = jnp.where(sides["undesirable"], values, 0)
    if ref_logps is not None and rewards.shape[-1] > 1:
        metrics |= {"mismatched": exists[..., 1].astype(rewards.dtype), "kl": log_ratio[..., 1]}
    return metrics


def mean_metrics(sums: Mapping[str, jax.Array], groups: ArrayLike) -> dict[str, jax.Array]:
    """Means of metrics over the groups they hold for, from their sums over all groups.

    Args:
      sums: scalars by name, such as those of `preference_metrics` or `unpaired_metrics`, summed over the groups of all
        microbatches and devices. Any other name, such as `loss`, is a sum over groups too.
      groups: how many groups there are.
    Returns:
      Scalars by name. A metric that holds for no group at all is 0, and so is then the share in `CONDITIONAL` that says
      so. `rewards/margins` of unpaired completions is the difference of the two means, 0 where there is but one.
    Example:
      >>> sums = {"chosen_longer": jnp.float32(2), "rewards/accuracies_longer": jnp.float32(1), "loss": jnp.float32(6)}
      >>> print({name: mean.item() for name, mean in mean_metrics(sums, groups=4).items()})
      {'chosen_longer': 0.5, 'rewards/accuracies_longer': 0.5, 'loss': 1.5}
    """

    def mean(name: str) -> jax.Array:
        total = jnp.asarray(sums[name])
        number = jnp.asarray(sums.get(CONDITIONAL.get(name, ""), groups), total.dtype)
        return jnp.where(number > 0, total / jnp.where(number > 0, number, 1), 0)

    means = {name: mean(name) for name in sums}
    if "mismatched" in sums:
        means["kl"] = jnp.maximum(means["kl"], 0)
    if "desirable" in sums:
        both = (sums["desirable"] > 0) & (sums["undesirable"] > 0)
        means["rewards/margins"] = jnp.where(both, means["rewards/chosen"] - means["rewards/rejected"], 0)
    return means
