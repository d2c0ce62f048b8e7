"""The estimate of Best-of-N is the mean over all sets of N, by which it is chosen and by which it is judged."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdpo.evaluate.best_of_n import best_of_n, best_of_n_kl
from jaxdpo.types import InputError

POOLS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-9, 9)), min_size=1, max_size=7)
"""Few rewards to choose by, so that many tie."""


@given(POOLS, st.data())
def test_it_is_the_mean_over_all_sets(pool, data):
    n = data.draw(st.integers(1, len(pool)))
    means = []
    for drawn in itertools.combinations(pool, n):
        best = max(chosen for chosen, _ in drawn)
        judged = [reward for chosen, reward in drawn if chosen == best]
        means.append(sum(judged) / len(judged))  # each of equal ones is as likely
    chosen, rewards = np.array(pool, float).T
    assert best_of_n([chosen], [rewards], n=n) == pytest.approx([sum(means) / len(means)], abs=1e-9)


def test_each_prompt_has_its_own():
    np.testing.assert_allclose(best_of_n([[1.0, 2.0], [5.0, 5.0]], n=2), [2.0, 5.0])
    np.testing.assert_allclose(best_of_n([[1.0, 2.0], [5.0, 5.0]], n=1), [1.5, 5.0])


def test_a_large_pool_does_not_overflow():
    rewards = np.arange(1, 1025)[None].astype(float)
    # The largest of n numbers of 1 to M, drawn without replacement, is n (M + 1) / (n + 1) on average.
    assert best_of_n(rewards, n=128) == pytest.approx([128 * 1025 / 129])


def test_the_divergence():
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 3 / 4)


@pytest.mark.parametrize(
    ("selected_by", "rewards", "n", "message"),
    [
        ([1.0], None, 1, r"selected_by is \(1,\)"),
        ([[1.0, 2.0]], [[1.0]], 1, r"rewards \(1, 1\); allowed: the same"),
        ([[1.0, np.nan]], None, 1, "not finite"),
        ([[1.0, 2.0]], [[1.0, np.inf]], 1, "not finite"),
        ([[1.0, 2.0]], None, 3, "n is 3; allowed: 1 to 2"),
        ([[1.0, 2.0]], None, 0, "n is 0; allowed: 1 to 2"),
    ],
)
def test_what_cannot_be_estimated_is_refused(selected_by, rewards, n, message):
    with pytest.raises(InputError, match=message):
        best_of_n(selected_by, rewards, n=n)


def test_no_divergence_of_none():
    with pytest.raises(InputError, match="n is 0; allowed: at least 1"):
        best_of_n_kl(0)
