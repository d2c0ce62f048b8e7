import fractions
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.data.plan import StepPlan
from jaxdpo.types import InputError

WEIGHTS = st.sampled_from([0.1, 0.25, 0.29, 0.5, 0.75, 1, 1.5, 2, 3.2])


@st.composite
def _plans(draw, weights=WEIGHTS):
    sizes = tuple(draw(st.lists(st.integers(1, 25), min_size=1, max_size=3)))
    stated = draw(st.none() | st.lists(weights, min_size=len(sizes), max_size=len(sizes)).map(tuple))
    seed, shuffle = draw(st.integers(0, 2**32)), draw(st.booleans())
    return StepPlan(sizes, draw(st.integers(1, 12)), seed, shuffle, stated)


PLANS = _plans()
each_plan = settings(deadline=None, max_examples=15)  # Grain takes 40 ms for a permutation of few numbers


def weights_of(plan):
    return plan.weights or (1,) * len(plan.sizes)


def epoch_of(plan, epoch):
    steps = range(epoch * plan.num_steps_per_epoch, (epoch + 1) * plan.num_steps_per_epoch)
    return [plan.groups_of_step(step).tolist() for step in steps]


def order_of(plan, epoch):
    return [group for step in epoch_of(plan, epoch) for group in step]


def counts_of(plan, order):
    """How often each group of each source stands in an order."""
    counts = np.bincount(np.array(order, int), minlength=sum(plan.sizes))
    return np.split(counts, np.cumsum(plan.sizes)[:-1])


@each_plan
@given(PLANS, st.integers(0, 3))
def test_an_epoch_shows_each_group_as_often_as_its_source_weighs(plan, epoch):
    steps = epoch_of(plan, epoch)
    for weight, size, counts in zip(weights_of(plan), plan.sizes, counts_of(plan, order_of(plan, epoch)), strict=True):
        assert counts.sum() == math.ceil(fractions.Fraction(str(weight)) * size)
        assert set(counts) <= {math.floor(weight), math.ceil(weight)}
    full, rest = divmod(plan.groups_per_epoch, plan.batch_size)
    assert list(map(len, steps)) == [plan.batch_size] * full + [rest] * (rest > 0)


@each_plan
@given(_plans(st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.75, 1.5])), st.integers(0, 3))
def test_parts_of_a_source_are_shown_in_turn(plan, first):
    """After some epochs no group was seen more than once more often than another one."""
    seen = np.zeros(sum(plan.sizes), int)
    for epoch in range(4):
        order = order_of(plan, epoch)
        seen += np.concatenate(counts_of(plan, order))
        for of_source in np.split(seen, np.cumsum(plan.sizes)[:-1]):
            assert of_source.max() - of_source.min() <= 1


@pytest.mark.parametrize("shuffle", [True, False])
def test_halves_are_all_seen_after_two_epochs(shuffle):
    plan = StepPlan((9,), 2, shuffle=shuffle, weights=(0.5,))
    assert plan.groups_per_epoch == 5
    assert set(order_of(plan, 0)) | set(order_of(plan, 1)) == set(range(9))


@each_plan
@given(PLANS, st.integers(0, 50))
def test_no_group_stands_twice_in_a_step_that_its_source_can_fill(plan, step):
    groups = plan.groups_of_step(step)
    source = np.searchsorted(np.cumsum(plan.sizes), groups, side="right")
    for number, size in enumerate(plan.sizes):
        own = groups[source == number]
        assert len(set(own.tolist())) == min(len(own), size)


@each_plan
@given(PLANS, st.integers(0, 3))
def test_every_step_holds_its_share_of_every_source(plan, epoch):
    plan = StepPlan(plan.sizes, plan.batch_size, plan.seed, True, plan.weights)
    quotas = np.array([counts.sum() for counts in counts_of(plan, order_of(plan, epoch))])
    for groups in epoch_of(plan, epoch):
        got = np.array([counts.sum() for counts in counts_of(plan, groups)])
        share = len(groups) * quotas / quotas.sum()
        assert (np.abs(got - share) <= len(quotas)).all()


@each_plan
@given(PLANS, st.integers(0, 50))
def test_a_step_follows_from_its_number_alone(plan, step):
    after_others = [plan.groups_of_step(other) for other in (7, step + 1, step)][-1]
    again = StepPlan(plan.sizes, plan.batch_size, plan.seed, plan.shuffle, plan.weights).groups_of_step(step)
    np.testing.assert_array_equal(after_others, again)


@pytest.mark.parametrize("weights", [None, (1, 0.5)])
def test_every_epoch_is_shuffled_anew_and_by_the_seed(weights):
    plan = StepPlan((100, 40), 30, seed=1, weights=weights)
    orders = [order_of(plan, epoch) for epoch in range(4)]
    orders.append(order_of(StepPlan((100, 40), 30, seed=2, weights=weights), 0))
    assert len(set(map(tuple, orders))) == 5
    assert all(order != sorted(order) for order in orders)


def test_sources_of_equal_size_have_different_orders():
    plan = StepPlan((50, 50), 10)
    first, second = ([group % 50 for group in order_of(plan, 0) if group // 50 == source] for source in range(2))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second


def test_without_shuffling_every_epoch_is_in_file_order():
    plan = StepPlan((3, 2), batch_size=2, shuffle=False)
    assert epoch_of(plan, 0) == epoch_of(plan, 1) == [[0, 1], [2, 3], [4]]
    twice = StepPlan((3, 2), batch_size=4, shuffle=False, weights=(2, 1))
    assert epoch_of(twice, 0) == epoch_of(twice, 5) == [[0, 1, 2, 0], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("sizes", "batch_size", "sampled"),
    [((640,), 64, 8), ((800, 200), 64, 8), ((130,), 64, 2), ((3,), 64, 1), ((100_000,), 2048, 2)],
)
def test_sampled_steps_are_whole_steps_of_the_first_epoch(sizes, batch_size, sampled):
    plan = StepPlan(sizes, batch_size)
    steps = plan.sampled_steps()
    assert [len(step) for step in steps] == [min(batch_size, sum(sizes))] * sampled
    assert len(set(np.concatenate(steps).tolist())) == sum(map(len, steps))


def test_a_step_of_a_million_groups_is_found_without_going_over_them():
    plan = StepPlan((10**9, 10**7), batch_size=64, weights=(0.3, 2))
    assert len(set(plan.groups_of_step(3_000_000).tolist())) == 64


@pytest.mark.parametrize("weights", [None, (0.5, 1), (2, 1), (0.5, 0.25)])
@pytest.mark.parametrize("start, stop", [(0, 0), (0, 1), (1, 3), (0, 50), (3, 40), (49, 50)])
def test_groups_of_steps_are_all_that_the_steps_hold(weights, start, stop):
    order = StepPlan((7, 12), 4, weights=weights)
    expected = {int(group) for step in range(start, stop) for group in order.groups_of_step(step)}
    assert order.groups_of_steps(start, stop).tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size=0; allowed: 1 or more"),
        ({"seed": -1}, "seed=-1; allowed: 0 or more"),
        ({"sizes": (5, 0)}, r"sizes=\(5, 0\); allowed: at least one source, each of 1 group or more"),
        ({"sizes": ()}, r"sizes=\(\); allowed: at least one source"),
        ({"weights": (1.0,)}, "1 data weights for 2 sources; allowed: one for each; add or drop some"),
        ({"weights": (1.0, 0.0)}, "data weight 0.0; allowed: a number above 0, at most 1000; leave out the source"),
        ({"weights": (1.0, math.nan)}, "data weight nan; allowed: a number above 0"),
        ({"weights": (math.inf, 1.0)}, "data weight inf; allowed: a number above 0, at most 1000"),
    ],
)
def test_plan_refuses_what_it_cannot_do(wrong, message):
    with pytest.raises(InputError, match=message):
        StepPlan(**{"sizes": (5, 3), "batch_size": 2, **wrong})
