"""What to watch while a reward model learns preferences, under the names of TRL's logs.

>>> import jax.numpy as jnp
>>> from jaxdpo.losses import reward_metrics
>>> metrics = reward_metrics(jnp.array([[2.0, -1.0], [0.5, 0.5]]))  # right, undecided
>>> print(metrics["accuracy"], metrics["margin"], metrics["mean_reward"])
[1.  0.5] [3. 0.] [0.5 0.5]
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import candidate_arrays
from jaxdpo.losses.metrics import preference_metrics


def reward_metrics(
    rewards: ArrayLike, *, ranks: ArrayLike | None = None, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """Accuracy, margin and range of the rewards of every group, not reduced.

    Args:
      rewards: `[..., candidates]` float, best first.
      ranks: same shape, int, not falling; as in `preference_metrics`. None: no ties.
      where: `[..., candidates]` bool, which candidates exist. Groups of fewer than two are 0 everywhere.
    Returns:
      `[...]` arrays, at least float32. `accuracy` and `margin`, of the best candidate against the others as in
      `preference_metrics`: equal rewards count one half. `mean_reward`, `min_reward` and `max_reward` of the group's
      candidates; over many groups, take the mean, the least and the largest of them.
    Raises:
      InputError: (a ValueError) if shapes differ.
    References:
      TRL's RewardTrainer, https://huggingface.co/docs/trl/reward_trainer, for the names.
    """
    order = preference_metrics(rewards, None, beta=1.0, ranks=ranks, where=where)
    (rewards,), exists = candidate_arrays(where, 2, rewards=rewards)  # absent ones are 0
    number = exists.sum(axis=-1)  # [...]
    counts = number > 0
    return {
        "accuracy": order["rewards/accuracies"],
        "margin": order["rewards/margins"],
        "mean_reward": rewards.sum(axis=-1) / jnp.maximum(number, 1).astype(rewards.dtype),
        "min_reward": jnp.where(counts, jnp.where(exists, rewards, jnp.inf).min(axis=-1), 0),
        "max_reward": jnp.where(counts, jnp.where(exists, rewards, -jnp.inf).max(axis=-1), 0),
    }
