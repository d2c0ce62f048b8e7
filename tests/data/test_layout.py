import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.data.batch import build_batch
from jaxdpo.data.layout import COMPILATION, LENGTH_MULTIPLE, choose_capacity, fill_of, largest_row
from jaxdpo.data.packing import Capacity, Costs, Layout, Shape
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
@given(DATASETS, st.integers(1, 8), st.integers(1, 4), st.sampled_from([1, 256]), st.integers(1, 2000))
def test_layout_holds_every_group_and_keeps_to_its_bounds(data, batch_size, row_multiple, length_multiple, limit):
    plan = StepPlan(data.sizes, batch_size)
    multiples = {"row_multiple": row_multiple, "length_multiple": length_multiple}
    layout = choose_capacity([data], plan.sampled_steps(), max_microbatch_tokens=limit, **multiples)
    length, slots, groups, candidates = layout.shapes[0].capacity
    assert length >= data.tokens.max() and slots >= data.slots.max() and groups >= 1 and candidates == data.candidates
    assert list(layout.row_lengths) == sorted(set(layout.row_lengths), reverse=True)
    multiple = max(LENGTH_MULTIPLE, length_multiple)
    smallest = row_multiple * multiple * -(-int(data.tokens.max()) // multiple)
    for shape in layout.shapes:
        assert shape.capacity.length % multiple == 0 and shape.capacity.slots <= shape.capacity.length
        assert shape.rows % row_multiple == 0 and shape.tokens <= max(limit, smallest)


@pytest.mark.parametrize("row_multiple", [1, 3])
def test_rows_are_not_longer_than_memory_allows(row_multiple):
    data = log_normal_pairs(640)
    steps = StepPlan(data.sizes, 64).sampled_steps()
    shortest = LENGTH_MULTIPLE * -(-int(data.tokens.max()) // LENGTH_MULTIPLE)
    generous = choose_capacity([data], steps, max_microbatch_tokens=100 * shortest, row_multiple=row_multiple)
    for limit in (1, row_multiple * shortest):
        tight = choose_capacity([data], steps, max_microbatch_tokens=limit, row_multiple=row_multiple)
        assert tight.row_lengths[0] == shortest and {shape.rows for shape in tight.shapes} == {row_multiple}
        assert tight.shapes[0].tokens < generous.shapes[0].tokens


def test_groups_of_other_datasets_fit():
    train, other = dataset([(4, 2, 2)] * 10), dataset([(90, 40, 60, 70)])
    layout = choose_capacity([train, other], [np.arange(10)], max_microbatch_tokens=1024)
    assert microbatches(other, [0], layout)[0].candidate_mask.sum() == 3


def fill(data, plan, layout, steps=10):
    return fill_of(batch for step in range(steps) for batch in microbatches(data, plan.groups_of_step(step), layout))


@pytest.mark.parametrize("limit", [2048, 8192])
@pytest.mark.parametrize("row_multiple", [1, 4])
def test_rows_are_well_filled(limit, row_multiple):
    data = log_normal_pairs(640)
    plan = StepPlan(data.sizes, 64)
    layout = choose_capacity(
        [data], plan.sampled_steps(), max_microbatch_tokens=limit * row_multiple, row_multiple=row_multiple
    )
    assert fill(data, plan, layout).length > 0.9


@pytest.mark.parametrize("batch_size", [4, 16])
def test_several_lengths_fill_the_rows_of_small_batches(batch_size):
    data = log_normal_pairs(2000)
    plan = StepPlan(data.sizes, batch_size)
    several = choose_capacity([data], plan.sampled_steps(), max_microbatch_tokens=2048)
    one = choose_capacity([data], plan.sampled_steps(), max_microbatch_tokens=2048, row_lengths=several.row_lengths[:1])
    assert len(several.shapes) > len(one.shapes) == 1
    assert fill(data, plan, several, 40).length > fill(data, plan, one, 40).length + 0.08


def test_a_further_length_has_to_be_worth_its_compilation():
    """The same lengths, and so the same steps: an epoch of many of them saves what one of a few does not."""
    few = log_normal_pairs(32)
    many = dataset([tuple(map(len, (g.prompt, *g.completions))) for g in few.groups] * (COMPILATION // 32))
    steps = [np.arange(start, start + 4) for start in range(0, 32, 4)]
    lengths = [len(choose_capacity([data], steps, max_microbatch_tokens=2048).shapes) for data in (few, many)]
    assert lengths[0] == 1 < lengths[1]


@pytest.mark.parametrize("limit", [1024, 4096, 16384])
def test_less_is_spent_than_with_the_shortest_rows_and_the_largest_microbatch(limit):
    data = log_normal_pairs(640)
    steps = StepPlan(data.sizes, 64).sampled_steps()
    chosen = choose_capacity([data], steps, max_microbatch_tokens=limit)
    shortest = LENGTH_MULTIPLE * -(-int(data.tokens.max()) // LENGTH_MULTIPLE)
    plain = Layout((Shape(Capacity(shortest, shortest, shortest, 2), limit // shortest),))

    def spent(layout):
        divided = [layout.divide(data.tokens[step], data.slots[step]) for step in steps]
        return sum(layout.work(shape) for step in divided for shape, _ in step)

    assert spent(chosen) < spent(plain)


def test_rows_are_shorter_where_attention_computes_all_of_them():
    data = log_normal_pairs(640)
    steps = StepPlan(data.sizes, 64).sampled_steps()
    skipping, whole = (
        choose_capacity([data], steps, max_microbatch_tokens=8192, costs=Costs(key=key)) for key in (0.0, 1e-3)
    )
    assert whole.row_lengths[0] < skipping.row_lengths[0]


def test_slots_are_scarcer_where_they_cost_more():
    data = log_normal_pairs(640)
    steps = StepPlan(data.sizes, 64).sampled_steps()
    free, dear = (
        choose_capacity([data], steps, max_microbatch_tokens=8192, row_lengths=[2048], costs=Costs(slot=slot))
        for slot in (0.0, 4.0)
    )
    assert dear.shapes[0].capacity.slots < free.shapes[0].capacity.slots


@pytest.mark.parametrize("lengths", [(1000,), (500, 1000), (1000, 700, 128)])
def test_row_lengths_can_be_said(lengths):
    data = log_normal_pairs(200)
    steps = StepPlan(data.sizes, 64).sampled_steps()
    layout = choose_capacity([data], steps, max_microbatch_tokens=8192, row_lengths=lengths)
    assert layout.row_lengths == tuple(sorted(lengths, reverse=True))


@pytest.mark.parametrize(("batch_size", "limit"), [(4, 2048), (16, 4096)])
def test_what_was_chosen_is_chosen_again_by_its_lengths(batch_size, limit):
    """A resumed run knows the lengths only."""
    data = log_normal_pairs(640)
    steps = StepPlan(data.sizes, batch_size).sampled_steps()
    chosen = choose_capacity([data], steps, max_microbatch_tokens=limit)
    again = choose_capacity([data], steps, max_microbatch_tokens=limit, row_lengths=chosen.row_lengths)
    assert again == chosen


@pytest.mark.parametrize("lengths", [(), (64, 64), (64, 128, 192, 256)])
def test_row_lengths_are_one_to_three_and_differ(lengths):
    with pytest.raises(InputError, match=r"row_lengths=.*; allowed: one to 3, each once"):
        choose_capacity([dataset([(4, 2, 2)])], [np.arange(1)], max_microbatch_tokens=512, row_lengths=lengths)


def test_row_lengths_shorter_than_a_group_are_an_error_that_names_its_row():
    data = dataset([(4, 2, 2), (9, 5, 5), (4, 2, 2)])
    with pytest.raises(InputError, match=r"trees\.jsonl, line 2: .* need 19 tokens; allowed: 18, the longest of row_l"):
        choose_capacity([data], [np.arange(3)], max_microbatch_tokens=1024, row_lengths=[18, 9])


def test_the_largest_row_names_the_group_that_needs_it():
    few, more = dataset([(4, 2, 2)]), dataset([(4, 2, 2), (90, 5, 5)])
    assert largest_row([few, more]) == (128, "the largest group needs (100 tokens; trees.jsonl, line 2)")
    assert largest_row([few, more], [256, 128]) == (256, "--row-lengths asks for")


def test_fill_counts_tokens_slots_and_empty_rows():
    data = dataset([(3, 1, 2), (2, 1, 1)])
    shape = Shape(Capacity(length=10, slots=8, groups=2, candidates=2), rows=2)
    full = build_batch(data, [[0], [1]], shape)
    half = build_batch(data, [[0, 1]], shape)
    found = fill_of([full, half])
    assert found == ((10 + 10) / 40, (5 + 5) / 32, 4, 1)
    assert found.summary() == "fill 50.0% of length, 31.2% of slots; 1 of 4 rows empty"
