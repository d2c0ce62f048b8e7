import dataclasses
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.data import pipeline
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.layout import choose_capacity
from jaxdpo.data.pipeline import all_batches, first_epoch, microbatches, prefetched
from jaxdpo.data.plan import StepPlan
from jaxdpo.types import InputError, Origin, check_batch
from tests.data.trees import DATASETS, dataset, expected_paths, group, read_paths


def layout_of(data, *lengths):
    """Of one length, unless several are given besides that of the longest rows."""
    given = [256 + max(lengths, default=0), *lengths] if lengths else None
    return choose_capacity([data], [np.arange(len(data))], max_microbatch_tokens=512, row_lengths=given)


LENGTHS = pytest.mark.parametrize("lengths", [(), (64,), (128, 64)], ids=str)


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert (batch.label is None) == (other.label is None)
        for name in [field for field in batch._fields if getattr(batch, field) is not None]:
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))


@LENGTHS
@settings(deadline=None, max_examples=20)
@given(DATASETS, st.data())
def test_microbatches_hold_exactly_the_groups_of_a_step(lengths, data, draw):
    indices = draw.draw(st.lists(st.sampled_from(range(len(data))), unique=True, min_size=1))
    layout = layout_of(data, *lengths)
    batches = microbatches(data, indices, layout)
    paths = {}
    for batch in batches:
        check_batch(batch)
        assert batch.tokens.shape in [(shape.rows, shape.capacity.length) for shape in layout.shapes]
        assert batch.group_mask.any()
        paths |= read_paths(batch)
    assert paths == expected_paths(data, indices)
    for shape in layout.shapes:
        used = [int(b.group_mask.any(axis=1).sum()) for b in batches if b.tokens.shape[1] == shape.capacity.length]
        assert used[:-1] == [shape.rows] * (len(used) - 1)  # only the last one of a shape has empty rows


@LENGTHS
@settings(deadline=None, max_examples=20)
@given(DATASETS, st.integers(1, 12))
def test_all_batches_cover_each_group_once(lengths, data, together):
    layout = layout_of(data, *lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "PACKED_TOGETHER", together)
        batches = list(all_batches(data, layout))
    ids = np.concatenate([batch.example_id[batch.group_mask] for batch in batches])
    assert sorted(ids.tolist()) == list(range(len(data)))
    for batch in batches:
        check_batch(batch)
        assert batch.tokens.shape in [(shape.rows, shape.capacity.length) for shape in layout.shapes]


@pytest.mark.parametrize(
    ("weights", "steps", "seen"),
    [
        (None, 100, range(10)),
        (None, 1, range(4)),
        ((1, 0.5), 3, range(8)),
        ((1, 0.5), 100, range(10)),
        ((2, 1), 100, range(10)),
    ],
)
def test_the_reference_pass_meets_each_group_once(weights, steps, seen):
    data = of_two_sources(6, 4)
    plan = StepPlan(data.sizes, batch_size=4, shuffle=False, weights=weights)
    batches = list(first_epoch(data, plan, layout_of(data), steps))
    ids = np.concatenate([batch.example_id[batch.group_mask] for batch in batches])
    assert sorted(ids.tolist()) == list(seen)


def of_two_sources(*sizes):
    groups = [
        dataclasses.replace(group(3, 1, 2, row=row), origin=Origin(str(source), row))
        for source, size in enumerate(sizes)
        for row in range(size)
    ]
    return TokenizedDataset.of(groups)


def test_prefetched_steps_are_the_steps_in_order():
    data = dataset([(3 + n % 5, 1 + n % 3, 2) for n in range(23)])
    plan, layout = StepPlan(data.sizes, batch_size=6, seed=3), layout_of(data)
    steps = list(prefetched(data, plan, layout, 2, 11))
    assert [step for step, _ in steps] == list(range(2, 11))
    for step, batches in steps:
        assert_same(batches, microbatches(data, plan.groups_of_step(step), layout))


def test_prefetched_without_steps_is_empty():
    data = dataset([(3, 1, 2)] * 4)
    assert list(prefetched(data, StepPlan((4,), 2), layout_of(data), 5, 5)) == []


def test_steps_are_built_by_another_thread_ahead_of_their_use_and_the_thread_ends(monkeypatch):
    built = []
    build = pipeline.microbatches

    def watched(*args):
        built.append(threading.current_thread())
        return build(*args)

    monkeypatch.setattr(pipeline, "microbatches", watched)
    data = dataset([(3, 1, 2)] * 8)
    steps = prefetched(data, StepPlan(data.sizes, 2), layout_of(data), 0, 1000)
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
        list(prefetched(too_long, StepPlan((4,), 2), layout, 0, 1))
