import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.groups import DTYPES
from jaxdpo.data.store import GroupWriter, open_groups
from jaxdpo.types import UNRANKED, Origin
from tests.data.trees import DATASETS, dataset, group


def fields(made):
    """All of a group, comparable."""
    stated = {name: value for name, value in vars(made).items() if name not in ("prompt", "completions")}
    return stated | {"ids": [part.tolist() for part in (made.prompt, *made.completions)]}


MIXED = [
    group(2, 1, 3, ranks=(0, UNRANKED)),
    dataclasses.replace(group(1, 1, row=2, label=True), prompt_truncated=True, completions_truncated=(False,)),
    dataclasses.replace(group(3, 2, 2, 1, row=3), completions_truncated=(False, True, True)),
    dataclasses.replace(group(1, 1, 1, row=4, margin=0.1), origin=Origin("other.csv", 0, "row")),
    group(1, 4, row=5, label=False),
]


def test_groups_come_back_as_they_were():
    data = TokenizedDataset.of(MIXED)
    assert [fields(made) for made in data.groups] == [fields(made) for made in MIXED]
    assert {array.dtype for made in data.groups for array in (made.prompt, *made.completions)} == {np.dtype("int32")}


def test_groups_are_a_sequence():
    groups = dataset([(n, 1, 1) for n in range(1, 6)]).groups
    assert len(groups) == 5
    assert [len(groups[i].prompt) for i in (0, -1, np.int64(2))] == [1, 5, 3]
    assert [len(made.prompt) for made in groups[1:4:2]] == [2, 4]
    for outside in (5, -6):
        with pytest.raises(IndexError, match=f"group {outside} of 5"):
            groups[outside]


@settings(deadline=None, max_examples=30)
@given(DATASETS)
def test_written_in_chunks_they_are_the_same_arrays(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("store")
    writer = GroupWriter(directory)
    for start in range(0, len(data), 3):
        writer.append(data.groups[start : start + 3], source=0)
    stored = open_groups(directory, writer.finish())
    for name, array in stored._asdict().items():
        np.testing.assert_array_equal(array, getattr(data.arrays, name))
        assert array.dtype == DTYPES[name] and type(array) is np.ndarray


@settings(deadline=None)
@given(DATASETS)
def test_what_is_known_of_all_groups_is_what_each_says(data):
    groups = list(data.groups)
    assert data.tokens.tolist() == [made.tokens for made in groups]
    assert data.slots.tolist() == [made.slots for made in groups]
    assert data.longest_path.tolist() == [made.longest_path for made in groups]
    assert data.largest_id.tolist() == [
        max(int(part.max()) for part in (made.prompt, *made.completions)) for made in groups
    ]
    assert data.candidates == max(len(made.completions) for made in groups)
    assert data.has_ranks == any(made.ranks is not None for made in groups)

    def table(values, absent):
        return [[*row, *[absent] * (data.candidates - len(row))] for row in values]

    assert data.completion_lengths().tolist() == table([[*map(len, made.completions)] for made in groups], 0)
    assert data.ranks().tolist() == table([made.candidate_ranks for made in groups], UNRANKED)
    labels = data.labels()
    assert (labels is None) == (groups[0].label is None)
    if labels is not None:
        assert labels.dtype == np.float32
        assert labels.tolist() == table([[float(made.label)] for made in groups], 0)


def test_margins_and_cuts_are_counted():
    data = TokenizedDataset.of([MIXED[2], MIXED[3], dataclasses.replace(MIXED[0], prompt_truncated=True)])
    assert data.has_margins and data.margins().tolist() == [0, np.float32(0.1), 0]
    assert (data.truncated_prompts, data.truncated_completions) == (1, 2)
    without = TokenizedDataset.of(MIXED[:1])
    assert not without.has_margins and without.margins() is None
    assert TokenizedDataset.of([MIXED[1]]).truncated_prompts == 1


def test_sizes_are_those_of_the_sources():
    origins = ["a", "a", "b", "c", "c", "c"]
    data = TokenizedDataset.of([dataclasses.replace(MIXED[0], origin=Origin(name, 1)) for name in origins])
    assert data.sizes == (2, 1, 3)
    assert data.groups.origin(2) == Origin("b", 1)


def test_a_dataset_without_groups():
    data = TokenizedDataset.of([])
    assert (len(data), data.candidates, data.labelled, data.has_ranks, len(data.tokens)) == (0, 0, False, False, 0)
