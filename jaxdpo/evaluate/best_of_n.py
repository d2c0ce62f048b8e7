r"""Best-of-N: of N samples the one with the highest reward, estimated for every N from one pool of samples.

Of `M` samples, every set of `N` is as likely as any other to be the one that is drawn. In ascending order of reward the
i-th is the best of its set if the other `N - 1` come from those before it:

.. math:: E[\max] = \sum_{i=N}^{M} \binom{i-1}{N-1} \Big/ \binom{M}{N} \; r_{(i)}

>>> print(best_of_n([[3.0, 1.0, 2.0]], n=2).round(4))  # sets {1, 2}, {1, 3}, {2, 3}: (2 + 3 + 3) / 3
[2.6667]

That is unbiased, and uses all samples for each N, where cutting the pool into sets of N would waste most of them. The
sample is chosen by one reward and may be judged by another, as with a learned reward model and the true reward.

References:
  Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Sec. 6: Best-of-N as a baseline.
  Nakano et al. 2021, https://arxiv.org/abs/2112.09332, App. I: the estimator.
  Beirami et al. 2024, https://arxiv.org/abs/2401.01879: the divergence is at most `log N - (N - 1) / N`.
"""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln

from jaxdpo.types import InputError


def best_of_n(selected_by: ArrayLike, rewards: ArrayLike | None = None, *, n: int) -> np.ndarray:
    """The expected reward of the best of `n` samples, of each prompt.

    Args:
      selected_by: `[prompts, samples]` finite rewards by which the best is chosen; of equal ones each is as likely.
      rewards: the same shape, finite rewards by which the chosen one is judged; by default `selected_by`.
      n: from 1 to the number of samples.
    Returns:
      float64 `[prompts]`.
    Raises:
      InputError: for other shapes, rewards that are not finite, or an `n` out of range.
    """
    chosen = np.asarray(selected_by, np.float64)
    judged = chosen if rewards is None else np.asarray(rewards, np.float64)
    if chosen.ndim != 2 or chosen.shape != judged.shape:
        raise InputError(
            f"selected_by is {chosen.shape} and rewards {judged.shape}; allowed: the same [prompts, samples]"
        )
    if not (np.isfinite(chosen).all() and np.isfinite(judged).all()):
        raise InputError("a reward is not finite; allowed: finite numbers; fix: find the sample that has no reward")
    samples = chosen.shape[1]
    if not 1 <= n <= samples:
        raise InputError(f"n is {n}; allowed: 1 to {samples}, the samples of a prompt; draw more of them, or lower n")
    order = np.argsort(chosen, axis=1, kind="stable")
    ascending = np.take_along_axis(chosen, order, axis=1)  # [prompts, samples]
    weights = np.broadcast_to(_weights(samples, n), chosen.shape)
    weights = np.stack([_shared(*of_prompt) for of_prompt in zip(ascending, weights, strict=True)])
    return (weights * np.take_along_axis(judged, order, axis=1)).sum(axis=1)


def best_of_n_kl(n: int) -> float:
    """How far Best-of-N is at most from the policy that it samples: `log n - (n - 1) / n` nats; so far without ties."""
    if n < 1:
        raise InputError(f"n is {n}; allowed: at least 1")
    return math.log(n) - (n - 1) / n


def _weights(samples: int, n: int) -> np.ndarray:
    """`[samples]` how likely each is the best of `n`, in ascending order of reward."""
    place = np.arange(n, samples + 1)  # 1-based; the ones before have too few below them
    log_sets = gammaln(place) - gammaln(place - n + 1) - gammaln(n)  # the others of its set
    log_all = gammaln(samples + 1) - gammaln(samples - n + 1) - gammaln(n + 1)
    return np.concatenate([np.zeros(n - 1), np.exp(log_sets - log_all)])


def _shared(ascending: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weights of one prompt, equal among samples with equal rewards."""
    _, group, counts = np.unique(ascending, return_inverse=True, return_counts=True)
    return (np.bincount(group, weights) / counts)[group]
