import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.data.layout import LENGTH_MULTIPLE, SLOT_COST, choose_capacity, fill_of
from jaxdpo.data.packing import Capacity, Layout, build_batch
from jaxdpo.data.pipeline import microbatches
from jaxdpo.data.plan import StepPlan
from jaxdpo.types import InputError
from tests.data.trees import DATASETS, dataset


def log_normal_pairs(n, seed=0):
    """Pairs whose lengths are spread like those of real conversations: a few are many times the median."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal([4.4, 3.6, 3.6], 0.8, size=(n, 3))).astype(int).clip(1, 256)
    return dataset([tuple(map(int, size)) for size in sizes])


@settings(deadline=None, max_examples=30)
@given(DATASETS, st.integers(1, 8), st.integers(1, 4), st.integers(1, 2000))
def test_layout_holds_every_group_and_keeps_to_its_bounds(data, batch_size, row_multiple, limit):
    plan = StepPlan(data.sizes, batch_size)
    layout = choose_capacity([data], plan.sampled_steps(), max_microbatch_tokens=limit, row_multiple=row_multiple)
    length, slots, groups, candidates = layout.capacity
    assert length >= data.tokens.max() and slots >= data.slots.max() and groups >= 1 and candidates == data.candidates
    assert length % LENGTH_MULTIPLE == 0 and slots <= length
    assert layout.rows % row_multiple == 0
    smallest = row_multiple * LENGTH_MULTIPLE * -(-int(data.tokens.max()) // LENGTH_MULTIPLE)
    assert layout.tokens <= max(limit, smallest)


@pytest.mark.parametrize("row_multiple", [1, 3])
def test_rows_are_not_longer_than_memory_allows(row_multiple):
    data = log_normal_pairs(640)
    steps = StepPlan(data.sizes, 64).sampled_steps()
    shortest = LENGTH_MULTIPLE * -(-int(data.tokens.max()) // LENGTH_MULTIPLE)
    generous = choose_capacity([data], steps, max_microbatch_tokens=100 * shortest, row_multiple=row_multiple)
    for limit in (1, row_multiple * shortest):
        tight = choose_capacity([data], steps, max_microbatch_tokens=limit, row_multiple=row_multiple)
        assert (tight.capacity.length, tight.rows) == (shortest, row_multiple)
        assert tight.tokens < generous.tokens


def test_groups_of_other_datasets_fit():
    train, other = dataset([(4, 2, 2)] * 10), dataset([(90, 40, 60, 70)])
    layout = choose_capacity([train, other], [np.arange(10)], max_microbatch_tokens=1024)
    assert microbatches(other, [0], layout)[0].candidate_mask.sum() == 3


@pytest.mark.parametrize("limit", [2048, 8192, 32768])
@pytest.mark.parametrize("row_multiple", [1, 4])
def test_rows_are_well_filled(limit, row_multiple):
    data = log_normal_pairs(640)
    plan = StepPlan(data.sizes, 64)
    layout = choose_capacity([data], plan.sampled_steps(), max_microbatch_tokens=limit, row_multiple=row_multiple)
    fill = fill_of(batch for step in range(10) for batch in microbatches(data, plan.groups_of_step(step), layout))
    assert fill.length > 0.8


@pytest.mark.parametrize("limit", [1024, 4096, 16384])
def test_less_is_spent_than_with_the_shortest_rows_and_the_largest_microbatch(limit):
    data = log_normal_pairs(640)
    steps = StepPlan(data.sizes, 64).sampled_steps()
    chosen = choose_capacity([data], steps, max_microbatch_tokens=limit)
    shortest = LENGTH_MULTIPLE * -(-int(data.tokens.max()) // LENGTH_MULTIPLE)
    plain = Layout(Capacity(shortest, shortest, shortest, 2), limit // shortest)

    def spent(layout):
        row = layout.capacity.length + SLOT_COST * layout.capacity.slots
        return sum(layout.rows * row * len(microbatches(data, step, layout)) for step in steps)

    assert spent(chosen) < spent(plain)


def test_row_length_can_be_said():
    data = log_normal_pairs(200)
    steps = StepPlan(data.sizes, 64).sampled_steps()
    assert choose_capacity([data], steps, max_microbatch_tokens=8192, row_length=1000).capacity.length == 1000


def test_row_length_shorter_than_a_group_is_an_error_that_names_its_row():
    data = dataset([(4, 2, 2), (9, 5, 5), (4, 2, 2)])
    with pytest.raises(InputError, match=r"trees\.jsonl, line 2: .* need 19 tokens; allowed: row_length=18"):
        choose_capacity([data], [np.arange(3)], max_microbatch_tokens=1024, row_length=18)


def test_fill_counts_tokens_slots_and_empty_rows():
    data = dataset([(3, 1, 2), (2, 1, 1)])
    layout = Layout(Capacity(length=10, slots=8, groups=2, candidates=2), rows=2)
    full = build_batch(data, [[0], [1]], layout)
    half = build_batch(data, [[0, 1]], layout)
    fill = fill_of([full, half])
    assert fill == ((10 + 10) / 40, (5 + 5) / 32, 4, 1)
    assert fill.summary() == "fill 50.0% of length, 31.2% of slots; 1 of 4 rows empty"
