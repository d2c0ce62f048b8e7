"""The hull of points, the area between two, and the interval over seeds."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdpo.evaluate.frontier import Hull, compare_frontiers, frontier_hull, mean_gap
from jaxdpo.types import InputError

NUMBERS = st.floats(-8, 8).map(lambda x: round(x, 3))


def test_a_hull_keeps_the_corners():
    hull = frontier_hull([1.0, 2.0, 3.0, 4.0], [1.0, 1.2, 2.5, 2.5], reference_reward=0.0)
    np.testing.assert_array_equal(hull.kl, [0.0, 1.0, 3.0])  # (2, 1.2) is below the line, (4, 2.5) gains nothing
    np.testing.assert_array_equal(hull.reward, [0.0, 1.0, 2.5])
    np.testing.assert_allclose(hull.at([0.5, 2.0, 10.0]), [0.5, (1.0 + 2.5) / 2, 2.5])


def test_policies_worse_than_the_reference_leave_the_reference():
    hull = frontier_hull([1.0, 2.0], [-1.0, -0.5], reference_reward=0.25)
    assert (hull.kl.tolist(), hull.reward.tolist()) == ([0.0], [0.25])
    assert hull.at(5.0) == 0.25


def test_of_equal_divergences_the_best_counts_and_estimates_below_zero_are_zero():
    hull = frontier_hull([-0.1, 1.0, 1.0], [0.5, 0.7, 0.9], reference_reward=0.0)
    np.testing.assert_array_equal(hull, [[0.0, 1.0], [0.5, 0.9]])


@given(st.lists(st.tuples(NUMBERS.map(abs), NUMBERS), min_size=1, max_size=12), NUMBERS)
def test_a_hull_is_the_best_mixture_of_two_policies(points, reference):
    """The definition, by brute force: what any two of the points, mixed, attain without going further."""
    kl, reward = np.array(points).T
    hull = frontier_hull(kl, reward, reference_reward=reference)
    everything = [(0.0, reference), *points]
    for at in (0.0, 0.7, 3.1, 9.0):
        within = [r for k, r in everything if k <= at]
        mixed = [
            r + (s - r) * (at - k) / (m - k) for (k, r), (m, s) in itertools.permutations(everything, 2) if k < at < m
        ]
        assert hull.at(at) == pytest.approx(max(within + mixed), abs=1e-9)


def test_the_gap_is_the_area_over_the_range():
    ours, theirs = (Hull(np.array([0.0, kl]), np.array([0.0, 1.0])) for kl in (1.0, 2.0))
    # Triangles: ours is above by k / 2 up to 1, then by 1 - k / 2 up to 2.
    assert mean_gap(ours, theirs, up_to=2.0) == pytest.approx((0.25 + 0.25) / 2)
    assert mean_gap(ours, theirs, up_to=1.0) == pytest.approx(0.25)
    assert mean_gap(theirs, ours, up_to=1.0) == pytest.approx(-0.25)


def seeds(*heights):
    """Of each seed one policy at 2 nats."""
    return [([2.0], [height]) for height in heights]


def test_seeds_are_compared_in_pairs():
    gap = compare_frontiers(seeds(1.0, 11.0, 6.0), seeds(0.0, 10.0, 4.0), reference_rewards=[0.0, 10.0, 4.0])
    # Heights differ by 1, 1 and 2 at the end of the range and by 0 at its begin, whatever the seed's own level.
    assert gap.seeds == pytest.approx((0.5, 0.5, 1.0))
    assert gap.mean == pytest.approx(2 / 3)
    assert gap.kl == (2.0, 2.0, 2.0)
    assert gap.low == pytest.approx(0.5) and gap.high == pytest.approx(1.0)  # means of 0.5, 0.5, 1 with replacement


def test_equal_methods_have_no_gap():
    gap = compare_frontiers(seeds(1.0, 2.0), seeds(1.0, 2.0), reference_rewards=[0.0, 0.0])
    assert (gap.mean, gap.low, gap.high) == (0.0, 0.0, 0.0)


def test_the_range_is_that_of_the_one_that_went_less_far():
    far = [([1.0, 8.0], [1.0, 1.0])] * 2
    near = [([2.0], [1.0])] * 2
    assert compare_frontiers(far, near, reference_rewards=[0.0, 0.0]).kl == (2.0, 2.0)


@pytest.mark.parametrize(
    ("kl", "reward", "message"),
    [([], [], "at least one"), ([1.0], [1.0, 2.0], r"kl is \(1,\) and reward \(2,\)"), ([np.nan], [1.0], "not finite")],
)
def test_points_that_are_none_are_refused(kl, reward, message):
    with pytest.raises(InputError, match=message):
        frontier_hull(kl, reward, reference_reward=0.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (seeds(1.0), seeds(1.0), "there are 1, 1 and 1 seeds; allowed: .* at least two"),
        (seeds(1.0, 2.0), seeds(1.0), "there are 2, 1 and 2 seeds"),
        ([([0.0], [1.0])] * 2, seeds(1.0, 2.0), r"largest KL divergence of a method is 0\.0; allowed: above 0"),
    ],
)
def test_seeds_that_cannot_be_compared_are_refused(ours, theirs, message):
    with pytest.raises(InputError, match=message):
        compare_frontiers(ours, theirs, reference_rewards=[0.0] * len(ours))
