"""The reward-KL frontier: how much reward a method gets for how far it goes from the reference.

Every policy that a method trains, at any of its settings and steps, is a point: its KL divergence from the reference
and its mean reward. A policy that throws a die before each completion, and takes one of them by it, has the mean of
their rewards and at most the mean of their divergences (KL is convex). So what a method attains at a divergence is the
upper concave hull of its points, which begins at the reference itself:

>>> hull = frontier_hull([2.0, 4.0, 4.0], [0.6, 0.8, 0.3], reference_reward=0.2)
>>> print(hull.kl, hull.reward)
[0. 2. 4.] [0.2 0.6 0.8]
>>> print(hull.at([1.0, 3.0, 9.0]))  # beyond the last corner it stays what it is
[0.4 0.7 0.8]

Two methods are compared by the mean height of one hull above the other, over the divergences that both went to. The
hull forgives a method its bad points, over-optimised ones among them: look at these in the picture.

References:
  Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Fig. 2 (left): the frontier; it gives no statistic.
  Gao et al. 2022, https://arxiv.org/abs/2210.10760: over-optimisation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from jaxdpo.types import InputError

RESAMPLES = 9999
LEVEL = 0.95


class Hull(NamedTuple):
    """What a method attains: a concave function of the divergence that never falls."""

    kl: np.ndarray
    """float64 `[corners]` nats, increasing from 0."""
    reward: np.ndarray
    """float64 `[corners]`, increasing."""

    def at(self, kl: ArrayLike) -> np.ndarray:
        """The best mean reward at no more than these divergences, `[...]` nats -> `[...]`."""
        return np.interp(np.asarray(kl, np.float64), self.kl, self.reward)


class Gap(NamedTuple):
    """By how much one method's reward is above another's at the same divergence, on average."""

    mean: float
    """Over seeds."""
    low: float
    high: float
    """Ends of the bootstrap interval of `LEVEL`."""
    seeds: tuple[float, ...]
    """Of each seed."""
    kl: tuple[float, ...]
    """Of each seed the divergence up to which the methods were compared, nats."""


def frontier_hull(kl: ArrayLike, reward: ArrayLike, *, reference_reward: float) -> Hull:
    """The upper concave hull of a method's policies and the reference.

    Args:
      kl: `[policies]` sequence-level KL divergence from the reference, nats; estimates below 0 count as 0.
      reward: `[policies]` mean reward.
      reference_reward: of the reference, where the hull begins.
    Raises:
      InputError: if there is no policy, the shapes differ, or a value is not finite.
    """
    kl, reward = np.asarray(kl, np.float64), np.asarray(reward, np.float64)
    if kl.ndim != 1 or kl.shape != reward.shape or not kl.size:
        raise InputError(f"kl is {kl.shape} and reward {reward.shape}; allowed: the same [policies], at least one")
    if not np.isfinite([*kl, *reward, reference_reward]).all():
        raise InputError("kl, reward or reference_reward is not finite; allowed: finite numbers; leave the run out")
    points = sorted({(0.0, float(reference_reward)), *zip(np.maximum(kl, 0).tolist(), reward.tolist(), strict=True)})
    corners: list[tuple[float, float]] = []
    for point in points:
        if corners and point[0] == corners[-1][0]:
            corners.pop()  # sorted by reward too: the later one is better
        elif corners and point[1] <= corners[-1][1]:
            continue  # further away for no more reward
        while len(corners) > 1 and _slope(corners[-2], point) >= _slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(point)
    return Hull(*np.array(corners).T)


def mean_gap(ours: Hull, theirs: Hull, *, up_to: float) -> float:
    """The area between two hulls over divergences from 0 to `up_to` nats, divided by `up_to`: in units of reward."""
    kl = np.union1d([*ours.kl, *theirs.kl], [up_to])
    kl = kl[kl <= up_to]  # between these both hulls are straight
    return float(np.trapezoid(ours.at(kl) - theirs.at(kl), kl) / up_to)


def compare_frontiers(
    ours: Sequence[tuple[ArrayLike, ArrayLike]],
    theirs: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    reference_rewards: Sequence[float],
    seed: int = 0,
) -> Gap:
    """How far one method's frontier is above another's, seed by seed.

    In each seed both methods start from the same reference and are compared up to the divergence that the one went to
    which went less far. The interval is the percentile bootstrap over the differences of the seeds: of three seeds it
    spans their least and largest difference.

    Args:
      ours: of each seed the `[policies]` divergences (nats) and the mean rewards of one method.
      theirs: of the same seeds, of the other method.
      reference_rewards: of each seed.
      seed: of the bootstrap.
    Raises:
      InputError: for other numbers of seeds, fewer than two, or a method that did not leave the reference.
    """
    if not len(ours) == len(theirs) == len(reference_rewards) or len(ours) < 2:
        raise InputError(
            f"there are {len(ours)}, {len(theirs)} and {len(reference_rewards)} seeds; allowed: the same seeds of both "
            "methods, at least two, each with its reference"
        )
    gaps, ranges = [], []
    for mine, other, reference in zip(ours, theirs, reference_rewards, strict=True):
        up_to = float(min(np.max(mine[0]), np.max(other[0])))
        if up_to <= 0:
            raise InputError(f"the largest KL divergence of a method is {up_to}; allowed: above 0; train for longer")
        hulls = [frontier_hull(*points, reference_reward=reference) for points in (mine, other)]
        gaps.append(mean_gap(*hulls, up_to=up_to))
        ranges.append(up_to)
    low = high = gaps[0]
    if len(set(gaps)) > 1:  # SciPy warns of data without spread
        interval = stats.bootstrap(
            (gaps,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=seed
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Gap(float(np.mean(gaps)), low, high, tuple(gaps), tuple(ranges))


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
