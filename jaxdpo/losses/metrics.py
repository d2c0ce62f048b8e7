"""What to watch while preferences train a policy, under the names of TRL's logs.

A falling loss alone does not say whether the policy learns the preference (margins rise) or merely drifts from its
reference (both log-probabilities fall); these numbers do.

>>> import jax.numpy as jnp
>>> from jaxdpo.losses import preference_metrics
>>> ref_logps = jnp.array([[-40.0, -42.0], [-31.0, -20.0]])
>>> metrics = preference_metrics(ref_logps + jnp.array([[10.0, -10.0], [0.0, 0.0]]), ref_logps, beta=0.1)
>>> print(metrics["rewards/margins"], metrics["rewards/accuracies"])  # the second pair is a tie
[2. 0.] [1.  0.5]
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import candidate_arrays
from jaxdpo.losses.preference import implicit_rewards


def preference_metrics(
    policy_logps: ArrayLike, ref_logps: ArrayLike | None, *, beta: ArrayLike = 0.1, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """Implicit rewards, accuracy, margin and log-probabilities of every group, not reduced.

    Chosen is a group's best candidate that exists, rejected the mean over all its others; with two candidates this is
    TRL's definition. Accuracy is the fraction of the others that the chosen one beats, where a tie counts one half, as
    in held-out accuracy. TRL counts a tie as a loss, so where the policy is its reference it reports 0 and this 0.5.

    Args:
      policy_logps: `[..., candidates]` float, summed log-probability of each completion, best first, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced.
      where: `[..., candidates]` bool, which candidates exist. Groups of fewer than two are 0 everywhere.
    Returns:
      `[...]` arrays, at least float32: `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`, `rewards/margins`,
      `logps/chosen` and `logps/rejected` (both of the policy).
    Raises:
      InputError: (a ValueError) if shapes differ or `beta` is out of range; the message states the value.
    References:
      TRL's DPOTrainer, https://huggingface.co/docs/trl/dpo_trainer, for the names.
    Example:
      >>> ranking = preference_metrics(jnp.array([-3.0, -5.0, -3.0]), jnp.array([-4.0, -4.0, -4.0]), beta=1.0)
      >>> print({name: value.item() for name, value in ranking.items() if name.startswith("rewards/")})
      {'rewards/chosen': 1.0, 'rewards/rejected': 0.0, 'rewards/accuracies': 0.75, 'rewards/margins': 1.0}
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta=beta, where=where)
    (rewards, logps), exists = candidate_arrays(where, 2, rewards=rewards, policy_logps=policy_logps)
    best = exists & (jnp.cumsum(exists, axis=-1) == 1)  # [..., candidates], one per group that counts
    others = exists & ~best
    number = jnp.maximum(others.sum(axis=-1), 1).astype(rewards.dtype)  # [...]

    def chosen(x: jax.Array) -> jax.Array:
        return jnp.where(best, x, 0).sum(axis=-1)  # [...]

    def rejected(x: jax.Array) -> jax.Array:
        return jnp.where(others, x, 0).sum(axis=-1) / number  # [...]

    wins = (1 + jnp.sign(chosen(rewards)[..., None] - rewards)) / 2  # [..., candidates], a tie is one half
    return {
        "rewards/chosen": chosen(rewards),
        "rewards/rejected": rejected(rewards),
        "rewards/accuracies": rejected(wins),
        "rewards/margins": chosen(rewards) - rejected(rewards),
        "logps/chosen": chosen(logps),
        "logps/rejected": rejected(logps),
    }
