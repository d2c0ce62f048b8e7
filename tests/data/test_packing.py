import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.data.batch import build_batch
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.packing import MICROBATCH_WORK, Capacity, Costs, Layout, Shape, best_fit, pack
from jaxdpo.types import UNRANKED, InputError, check_batch
from tests.data.trees import DATASETS, dataset, expected_paths, group, read_paths


def pack_dataset(data, capacity):
    return pack(data.tokens, data.slots, capacity)


def batch_of(data, rows, shape):
    return build_batch(data, rows, shape)


@settings(deadline=None)
@given(DATASETS, st.integers(0, 40), st.integers(0, 20), st.integers(1, 6))
def test_every_group_is_packed_once_and_no_row_overflows(data, spare_length, spare_slots, groups):
    capacity = Capacity(int(data.tokens.max()) + spare_length, int(data.slots.max()) + spare_slots, groups, 5)
    rows = pack_dataset(data, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(data)))
    for row in rows:
        assert 0 < len(row) <= groups
        assert data.tokens[row].sum() <= capacity.length
        assert data.slots[row].sum() <= capacity.slots
    assert pack_dataset(data, capacity) == rows


@pytest.mark.parametrize(
    ("tokens", "slots", "capacity", "rows"),
    [
        ([60, 50, 40, 10], [9] * 4, Capacity(100, 99, 9, 2), [[0, 2], [1, 3]]),
        ([60, 50, 40, 30], [9] * 4, Capacity(100, 20, 9, 2), [[0, 2], [1, 3]]),
        ([10, 10, 10, 10], [9] * 4, Capacity(100, 20, 9, 2), [[0, 1], [2, 3]]),
        ([10, 10, 10, 10], [9] * 4, Capacity(100, 99, 3, 2), [[0, 1, 2], [3]]),
        ([10, 90], [9, 9], Capacity(100, 99, 9, 2), [[1, 0]]),
        ([50, 20, 20], [1, 30, 10], Capacity(100, 30, 9, 2), [[1], [0, 2]]),
        ([], [], Capacity(100, 99, 9, 2), []),
    ],
    ids=["length closes", "best fit", "slots close", "groups close", "largest first", "slots count as size", "nothing"],
)
def test_pack_by_hand(tokens, slots, capacity, rows):
    assert pack(tokens, slots, capacity) == rows


@pytest.mark.parametrize(("tokens", "slots"), [([5, 101], [1, 1]), ([5, 60], [1, 31])])
def test_a_group_that_exceeds_the_capacity_is_an_error(tokens, slots):
    message = f"group 1 needs {tokens[1]} tokens, {slots[1]} of them scored; allowed: 100 and 30 a row"
    with pytest.raises(InputError, match=message):
        pack(tokens, slots, Capacity(100, 30, 4, 2))


def test_batch_by_hand():
    data = dataset([(2, 1, 3), (1, 2)])
    (prompt, chosen, rejected), (single, only) = (
        [ids.tolist() for ids in (g.prompt, *g.completions)] for g in data.groups
    )
    batch = batch_of(data, [[0, 1]], Shape(Capacity(length=10, slots=8, groups=3, candidates=2), rows=2))
    check_batch(batch)
    assert batch.tokens.tolist() == [[*prompt, *chosen, *rejected, *single, *only, 0], [0] * 10]
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3, 4, 0, 1, 2, 0], [0] * 10]
    assert batch.group.tolist() == [[1, 1, 1, 1, 1, 1, 2, 2, 2, 0], [0] * 10]
    assert batch.candidate.tolist() == [[0, 0, 1, 2, 2, 2, 0, 1, 1, 0], [0] * 10]
    assert batch.slot_source.tolist() == [[1, 1, 3, 4, 6, 7, 0, 0], [0] * 8]
    assert batch.slot_target.tolist() == [[*chosen, *rejected, *only, 0, 0], [0] * 8]
    assert batch.slot_owner.tolist() == [[0, 1, 1, 1, 2, 2, 6, 6], [6] * 8]
    assert batch.candidate_last.tolist() == [[[2, 5], [8, 0], [0, 0]], [[0, 0]] * 3]
    assert batch.candidate_mask.tolist() == [[[True, True], [True, False], [False, False]], [[False, False]] * 3]
    assert batch.rank.tolist() == [[[0, 1], [0, UNRANKED], [UNRANKED] * 2], [[UNRANKED] * 2] * 3]
    assert batch.example_id.tolist() == [[0, 1, -1], [-1, -1, -1]]
    assert batch.label is None and batch.margin is None
    assert {name: field.dtype for name, field in batch._asdict().items() if field is not None} == {
        name: bool if name == "candidate_mask" else np.int32 for name in batch._fields[:-2]
    }


def test_ranks_stand_in_the_batch_with_ties_and_a_rest_below_the_top():
    groups = [
        group(2, 1, 2, 3, ranks=(0, 0, 1)),
        group(1, 2, 1),
        group(1, 1, 1, 1, 1, ranks=(0, 1, UNRANKED, UNRANKED)),
    ]
    batch = batch_of(TokenizedDataset.of(groups), [[0, 1], [2]], Shape(Capacity(12, 9, groups=2, candidates=4), rows=2))
    check_batch(batch)
    assert batch.rank.tolist() == [
        [[0, 0, 1, UNRANKED], [0, 1, UNRANKED, UNRANKED]],
        [[0, 1, UNRANKED, UNRANKED], [UNRANKED] * 4],
    ]
    assert batch.candidate_mask.sum(axis=-1).tolist() == [[3, 2], [4, 0]]
    assert batch.label is None


def test_labels_stand_in_the_batch_and_partners_have_neither_label_nor_rank():
    groups = [group(2, 1, 2, label=True), group(1, 2, label=True), group(1, 1, 3, label=False)]
    batch = batch_of(TokenizedDataset.of(groups), [[0, 1], [2]], Shape(Capacity(12, 9, groups=2, candidates=2), rows=3))
    check_batch(batch)
    assert batch.label.tolist() == [[[1, 0], [1, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    assert batch.label.dtype == np.float32
    assert batch.rank[..., 0].tolist() == [[0, 0], [0, UNRANKED], [UNRANKED] * 2]
    assert (batch.rank[..., 1] == UNRANKED).all()
    assert batch.candidate_mask[0].tolist() == [[True, True], [True, False]]


@settings(deadline=None)
@given(DATASETS, st.integers(0, 60), st.integers(0, 9))
def test_paths_read_back_from_a_batch_are_prompt_and_completion(data, spare, empty_rows):
    capacity = Capacity(int(data.tokens.max()) + spare, int(data.slots.max()) + spare, groups=7, candidates=5)
    rows = pack_dataset(data, capacity)
    batch = batch_of(data, rows, Shape(capacity, len(rows) + empty_rows))
    check_batch(batch)
    assert read_paths(batch) == expected_paths(data, list(range(len(data))))
    scored = batch.slot_owner < capacity.groups * capacity.candidates
    assert scored.sum() == data.slots.sum()
    assert (batch.group > 0).sum() == data.tokens.sum()
    assert not batch.group_mask[len(rows) :].any()


def test_margins_stand_in_every_batch_of_a_dataset_that_states_one():
    data = TokenizedDataset.of([group(1, 1, 1), group(1, 2, 1, row=2, margin=1.5), group(1, 1, 1, row=3, margin=-2)])
    shape = Shape(Capacity(8, 6, groups=2, candidates=2), rows=2)
    batch, without = batch_of(data, [[2, 0], [1]], shape), batch_of(data, [[0]], shape)
    for made in (batch, without):
        check_batch(made)
    assert batch.margin.dtype == np.float32
    assert batch.margin.tolist() == [[-2, 0], [1.5, 0]] and not without.margin.any()
    assert batch_of(TokenizedDataset.of(data.groups[:1]), [[0]], shape).margin is None


def test_batch_of_nothing_is_empty():
    batch = batch_of(TokenizedDataset.of([]), [], Shape(Capacity(4, 3, 2, 2), rows=2))
    check_batch(batch)
    assert not batch.group_mask.any()


@pytest.mark.parametrize(
    ("rows", "capacity"),
    [
        ([[0], [1], [0]], Capacity(20, 20, 4, 2)),
        ([[0, 1]], Capacity(9, 20, 4, 2)),
        ([[0, 1]], Capacity(20, 5, 4, 2)),
        ([[0, 1]], Capacity(20, 20, 1, 2)),
        ([[0, 1]], Capacity(20, 20, 4, 1)),
    ],
    ids=["rows", "length", "slots", "groups", "candidates"],
)
def test_rows_that_do_not_fit_the_shape_are_refused(rows, capacity):
    groups = [group(2, 1, 2), group(2, 1, 2)]
    shape = Shape(capacity, rows=2)
    with pytest.raises(ValueError, match=r"the rows need Shape.*; allowed: Shape"):
        build_batch(TokenizedDataset.of(groups), rows, shape)


def test_layout_sums_itself_up():
    shapes = [
        Shape(Capacity(length, length // 2, length // 64, 2), rows) for rows, length in ((4, 512), (2, 256), (1, 64))
    ]
    assert shapes[0].tokens == 4 * 512
    assert Layout((shapes[0],)).summary() == (
        "microbatches of 4 rows x 512 tokens; a row takes up to 256 scored tokens and 8 groups of up to 2 completions"
    )
    assert Layout(tuple(shapes)).summary() == (
        "microbatches of 4 rows x 512, 2 rows x 256 or 1 rows x 64 tokens; a row takes up to 256, 128 or 32 scored "
        "tokens and 8, 4 or 1 groups of up to 2 completions"
    )


def test_groups_go_into_the_fullest_of_given_rows_that_takes_them():
    needs = np.array([[60, 50, 50, 40, 5], [9] * 5])
    rows = np.array([[100, 100, 50], [20, 20, 9]])
    assert best_fit(needs, rows, np.array([8, 8, 8])) == [[0, 3], [2, 4], [1]]
    wider = np.array([[100, 100, 60], [20, 30, 9]])
    assert best_fit(needs, wider, np.array([1, 8, 8])) == [[1], [2, 3, 4], [0]]
    assert best_fit(needs, rows, np.array([1, 2, 1])) is None


def test_a_group_that_exceeds_the_longest_rows_is_an_error():
    with pytest.raises(InputError, match="group 2 needs 101 tokens, 1 of them scored; allowed: 100 and 100 a row"):
        layout((1, 100), (4, 20)).divide([10, 90, 101, 102], [1, 1, 1, 1])


def layout(*shapes, **costs):
    return Layout(tuple(Shape(Capacity(length, length, 8, 5), rows) for rows, length in shapes), Costs(**costs))


def test_work_counts_tokens_slots_keys_and_the_microbatch():
    of_two = layout((2, 100), slot=0.5, key=0.01)
    assert of_two.work(of_two.shapes[0]) == 2 * (100 * (1 + 100 * 0.01) + 0.5 * 100) + MICROBATCH_WORK


@pytest.mark.parametrize(
    ("tokens", "shapes"),
    [
        ([900] * 4, [1000] * 4),
        ([900] * 4 + [300], [1000] * 4 + [400]),
        ([900] * 4 + [300, 90, 90], [1000] * 4 + [400]),
        ([300, 90], [400]),
        ([500], [1000]),
        ([], []),
    ],
    ids=["all long", "a short rest", "small ones fill gaps", "short alone", "one that only long rows hold", "nothing"],
)
def test_what_is_left_of_a_step_goes_where_it_takes_least(tokens, shapes):
    divided = layout((1, 1000), (1, 400)).divide(tokens, [1] * len(tokens))
    assert [shape.capacity.length for shape, _ in divided] == shapes
    assert sorted(group for _, rows in divided for row in rows for group in row) == list(range(len(tokens)))


@settings(deadline=None)
@given(DATASETS, st.lists(st.tuples(st.integers(1, 3), st.integers(8, 400)), max_size=2), st.integers(1, 3))
def test_a_layout_holds_every_group_once(data, others, rows):
    longest = int(data.tokens.max()) + 16
    shapes = sorted({(rows, longest), *((n, length) for n, length in others if length < longest)}, key=lambda x: -x[1])
    several = layout(*shapes)
    divided = several.divide(data.tokens, data.slots)
    assert several.divide(data.tokens, data.slots) == divided
    groups = [group for _, packed in divided for row in packed for group in row]
    assert sorted(groups) == list(range(len(data)))
    for shape, packed in divided:
        assert 0 < len(packed) <= shape.rows
        build_batch(data, packed, shape)
