import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.data import pipeline
from jaxdpo.data.layout import choose_capacity
from jaxdpo.data.pipeline import StepPlan, all_batches, microbatches, prefetched
from jaxdpo.types import InputError, check_batch
from tests.data.trees import DATASETS, dataset, expected_paths, read_paths

PLANS = st.builds(StepPlan, st.integers(1, 40), st.integers(1, 12), seed=st.integers(0, 2**32), shuffle=st.booleans())


def epoch_of(plan, epoch):
    steps = range(epoch * plan.num_steps_per_epoch, (epoch + 1) * plan.num_steps_per_epoch)
    return [plan.groups_of_step(step).tolist() for step in steps]


def order_of(plan, epoch):
    return [group for step in epoch_of(plan, epoch) for group in step]


def layout_of(data, rows=256):
    return choose_capacity([data], [np.arange(len(data))], max_microbatch_tokens=rows)


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert (batch.label is None) == (other.label is None)
        for name in [field for field in batch._fields if getattr(batch, field) is not None]:
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))


@settings(deadline=None)
@given(PLANS, st.integers(0, 3))
def test_an_epoch_holds_every_group_once(plan, epoch):
    steps = epoch_of(plan, epoch)
    assert sorted(order_of(plan, epoch)) == list(range(plan.groups))
    full, rest = divmod(plan.groups, plan.batch_size)
    assert list(map(len, steps)) == [plan.batch_size] * full + [rest] * (rest > 0)


@settings(deadline=None)
@given(PLANS, st.integers(0, 50))
def test_a_step_follows_from_its_number_alone(plan, step):
    after_others = [plan.groups_of_step(other) for other in (7, step + 1, step)][-1]
    again = StepPlan(plan.groups, plan.batch_size, plan.seed, plan.shuffle).groups_of_step(step)
    np.testing.assert_array_equal(after_others, again)


def test_every_epoch_is_shuffled_anew_and_by_the_seed():
    plan = StepPlan(groups=100, batch_size=30, seed=1)
    orders = [order_of(plan, epoch) for epoch in range(3)] + [order_of(StepPlan(100, 30, seed=2), 0)]
    assert len(set(map(tuple, orders))) == 4
    assert list(range(100)) not in orders


def test_without_shuffling_every_epoch_is_in_file_order():
    plan = StepPlan(groups=5, batch_size=2, shuffle=False)
    assert epoch_of(plan, 0) == epoch_of(plan, 1) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("groups", "batch_size", "sampled"), [(640, 64, 8), (1000, 64, 8), (130, 64, 2), (3, 64, 1), (100_000, 2048, 2)]
)
def test_sampled_steps_are_whole_steps_of_the_first_epoch(groups, batch_size, sampled):
    plan = StepPlan(groups, batch_size)
    steps = plan.sampled_steps()
    assert [len(step) for step in steps] == [min(batch_size, groups)] * sampled
    assert len(set(np.concatenate(steps).tolist())) == sum(map(len, steps))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"seed": -1}, {"groups": 0}])
def test_plan_refuses_what_it_cannot_do(wrong):
    with pytest.raises(InputError, match=r"{}={}; allowed: \d or more".format(*next(iter(wrong.items())))):
        StepPlan(**{"groups": 5, "batch_size": 2, **wrong})


@settings(deadline=None, max_examples=40)
@given(DATASETS, st.data())
def test_microbatches_hold_exactly_the_groups_of_a_step(data, draw):
    indices = draw.draw(st.lists(st.sampled_from(range(len(data))), unique=True, min_size=1))
    layout = layout_of(data)
    batches = microbatches(data, indices, layout)
    paths = {}
    for batch in batches:
        check_batch(batch)
        assert batch.tokens.shape == (layout.rows, layout.capacity.length)
        assert batch.group_mask.any()
        paths |= read_paths(batch)
    assert paths == expected_paths(data, indices)
    used = [int(batch.group_mask.any(axis=1).sum()) for batch in batches]
    assert used[:-1] == [layout.rows] * (len(used) - 1)  # only the last one has empty rows


@settings(deadline=None, max_examples=40)
@given(DATASETS, st.integers(1, 12))
def test_all_batches_cover_each_group_once(data, together):
    layout = layout_of(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "PACKED_TOGETHER", together)
        batches = list(all_batches(data, layout))
    ids = np.concatenate([batch.example_id[batch.group_mask] for batch in batches])
    assert sorted(ids.tolist()) == list(range(len(data)))
    for batch in batches:
        check_batch(batch)
        assert batch.tokens.shape == (layout.rows, layout.capacity.length)
    assert all(batch.group_mask.any(axis=1).all() for batch in batches[:-1])


def test_prefetched_steps_are_the_steps_in_order():
    data = dataset([(3 + n % 5, 1 + n % 3, 2) for n in range(23)])
    plan, layout = StepPlan(len(data), batch_size=6, seed=3), layout_of(data)
    steps = list(prefetched(data, plan, layout, 2, 11))
    assert [step for step, _ in steps] == list(range(2, 11))
    for step, batches in steps:
        assert_same(batches, microbatches(data, plan.groups_of_step(step), layout))


def test_prefetched_without_steps_is_empty():
    data = dataset([(3, 1, 2)] * 4)
    assert list(prefetched(data, StepPlan(4, 2), layout_of(data), 5, 5)) == []


def test_steps_are_built_by_another_thread_ahead_of_their_use_and_the_thread_ends(monkeypatch):
    built = []
    build = pipeline.microbatches

    def watched(*args):
        built.append(threading.current_thread())
        return build(*args)

    monkeypatch.setattr(pipeline, "microbatches", watched)
    data = dataset([(3, 1, 2)] * 8)
    steps = prefetched(data, StepPlan(len(data), 2), layout_of(data), 0, 1000)
    next(steps)
    deadline = time.monotonic() + 30
    while len(built) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(built) >= 2
    assert threading.main_thread() not in built
    steps.close()
    for thread in set(built):
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_an_error_while_building_reaches_the_loop():
    data = dataset([(3, 1, 2)] * 4)
    layout = layout_of(data)
    too_long = dataset([(300, 1, 2)] * 4)
    with pytest.raises(InputError, match="group 0 needs 303 tokens"):
        list(prefetched(too_long, StepPlan(4, 2), layout, 0, 1))
