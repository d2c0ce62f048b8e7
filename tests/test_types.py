"""The batch contract: what packing builds holds it, and every way to break it is named with its row."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from jaxdpo.data.packing import Layout
from jaxdpo.data.pipeline import microbatches
from jaxdpo.types import PADDING, UNRANKED, Batch, InputError, Origin, Preference, check_batch
from tests import tiny

ROWS = 6


def packed(data) -> Batch:
    """Nine groups, several in the first row; the last row is empty."""
    (shape,) = tiny.layout(data, row_lengths=[64]).shapes
    layout = Layout((dataclasses.replace(shape, rows=ROWS),))
    (made,) = microbatches(data, range(9), layout)
    assert made.group_mask.sum(axis=1).tolist()[0] > 1 and not made.group_mask[-1].any()
    return made


@pytest.fixture(scope="module")
def batch():
    """Ragged groups, best first."""
    return packed(tiny.dataset(groups=9, candidates=(1, 3)))


@pytest.fixture(scope="module")
def labelled():
    """Single completions with a label, some with a partner."""
    return packed(tiny.dataset(groups=9, candidates=(1, 2), labelled=True))


def broken(batch: Batch, field: str, where, value) -> Batch:
    """The batch with `field[where] = value`."""
    array = getattr(batch, field).copy()
    array[where] = value
    return batch._replace(**{field: array})


def test_a_packed_batch_holds_the_contract(batch):
    check_batch(batch)


def test_group_mask_says_which_groups_exist(batch):
    assert batch.group_mask.tolist() == (batch.example_id >= 0).tolist()
    assert jax.tree.map(jax.numpy.asarray, batch).group_mask.tolist() == batch.group_mask.tolist()


def first_padding(batch):
    return 0, int(np.flatnonzero(batch.group[0] == PADDING)[0])


def slot_of(batch, group, candidate):
    """First slot in row 0 of a candidate (both 0-based)."""
    return int(np.flatnonzero(batch.slot_owner[0] == group * batch.candidate_mask.shape[2] + candidate)[0])


def token_of(batch, group, candidate):
    """First token in row 0 of a 1-based group and candidate."""
    return int(np.flatnonzero((batch.group[0] == group) & (batch.candidate[0] == candidate))[0])


def ragged(batch):
    """A group of row 0 with two candidates or more (0-based)."""
    return int(np.flatnonzero(batch.candidate_mask[0].sum(axis=-1) > 1)[0])


BREAKS = {
    "a group that the row does not have": (
        lambda b: broken(b, "group", (0, 0), b.candidate_mask.shape[1] + 1),
        "row 0: group outside 0..",
    ),
    "a negative group": (lambda b: broken(b, "group", (0, 0), -1), "row 0: group outside 0.."),
    "a token in the padding": (
        lambda b: broken(b, "tokens", first_padding(b), 7),
        "row 0: padding holds a token other than 0",
    ),
    "a candidate in the padding": (
        lambda b: broken(b, "candidate", first_padding(b), 1),
        "row 0: padding belongs to a candidate",
    ),
    "a negative owner": (lambda b: broken(b, "slot_owner", (0, 0), -1), "row 0: slot_owner outside 0.."),
    "an owner past the empty one": (
        lambda b: broken(b, "slot_owner", (0, 0), b.candidate_mask[0].size + 1),
        "row 0: slot_owner outside 0..",
    ),
    "a source in another group": (
        lambda b: broken(b, "slot_source", (0, slot_of(b, 0, 0)), token_of(b, 2, 0)),
        "row 0: a slot is predicted from another group's token",
    ),
    "a source in a sibling": (
        lambda b: broken(b, "slot_source", (0, slot_of(b, ragged(b), 0)), token_of(b, ragged(b) + 1, 2)),
        "row 0: a slot is predicted from a sibling candidate's token",
    ),
    "a last token in another group": (
        lambda b: broken(b, "candidate_last", (0, 0, 0), token_of(b, 2, 0)),
        "row 0: candidate_last points outside its group",
    ),
    "an id without a group": (
        lambda b: broken(b, "example_id", (0, -1), 5),
        "row 0: example_id and candidate_mask disagree",
    ),
    "a group without an id": (
        lambda b: broken(b, "example_id", (0, 0), -1),
        "row 0: example_id and candidate_mask disagree",
    ),
    "a rank without a candidate": (
        lambda b: broken(b, "rank", (0, -1, -1), 0),
        "row 0: an absent candidate has a rank",
    ),
    "ranks that fall": (
        lambda b: broken(b, "rank", (0, ragged(b), 0), 2),
        "row 0: candidates do not stand best first",
    ),
}
LABEL_BREAKS = {
    "half a label": (lambda b: broken(b, "label", (0, 0, 0), 0.5), "row 0: a label is neither 0 nor 1"),
    "no number": (lambda b: broken(b, "label", (0, 0, 0), np.nan), "row 0: a label is neither 0 nor 1"),
    "a partner with a label": (
        lambda b: broken(b, "label", (0, ragged(b), 1), 1),
        "row 0: a label is not that of a group's first candidate",
    ),
    "a label without a candidate": (
        lambda b: broken(b, "label", (-1, 0, 0), 1),
        f"row {ROWS - 1}: an absent candidate has a label",
    ),
    "a partner with a rank": (
        lambda b: broken(b, "rank", (0, ragged(b), 1), 1),
        "row 0: the partner of a labelled completion has a rank",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_batch_is_named(batch, what):
    damage, message = BREAKS[what]
    with pytest.raises(ValueError, match=message):
        check_batch(damage(batch))


def test_batches_with_ties_and_with_labels_hold_the_contract(labelled):
    ranked = packed(tiny.dataset(groups=9, candidates=(1, 3), ranked=True))
    check_batch(ranked)
    check_batch(labelled)
    assert labelled.label.max() == 1 and labelled.candidate_mask[..., 1].any()
    present = np.where(ranked.candidate_mask, ranked.rank, -1)  # two alike, of ties or of a rest, in some group
    assert ((present[..., 1:] == present[..., :-1]) & (present[..., 1:] >= 0)).any() and (present == UNRANKED).any()


@pytest.mark.parametrize("what", LABEL_BREAKS)
def test_a_broken_label_is_named(labelled, what):
    damage, message = LABEL_BREAKS[what]
    with pytest.raises(ValueError, match=message):
        check_batch(damage(labelled))


@pytest.mark.parametrize(
    "change", [lambda label: label[..., 0], lambda label: label.astype(bool), lambda label: label[:1]]
)
def test_labels_of_another_shape_or_type_are_named(labelled, change):
    label = change(labelled.label)
    message = f"Batch.label is {label.dtype} of shape {label.shape}; allowed: float32 {labelled.candidate_mask.shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_batch(labelled._replace(label=label))


def test_the_row_that_is_broken_is_the_one_named(batch):
    with pytest.raises(ValueError, match="row 1: padding holds a token"):
        check_batch(broken(batch, "tokens", (1, -1), 7))


@pytest.mark.parametrize("field", ["positions", "group", "candidate"])
def test_arrays_of_another_shape_are_named(batch, field):
    rows, length = batch.tokens.shape
    cut = batch._replace(**{field: getattr(batch, field)[:, :-1]})
    with pytest.raises(ValueError, match=rf"Batch.{field} has shape \({rows}, {length - 1}\); allowed: \({rows}, "):
        check_batch(cut)


def test_absent_candidates_are_below_every_rank(batch):
    assert (batch.rank[~batch.candidate_mask] == UNRANKED).all()
    assert (batch.rank[batch.candidate_mask] < batch.candidate_mask.shape[2]).all()


def test_a_preference_is_a_value():
    preference = Preference("2+2=", (" 4", " 5"), Origin("sums.jsonl", 7))
    assert preference == Preference("2+2=", (" 4", " 5"), Origin("sums.jsonl", 7))
    with pytest.raises(dataclasses.FrozenInstanceError):
        preference.prompt = ""


@pytest.mark.parametrize("ranks", [(0,), (0, 1, 2), (1, 0), (UNRANKED, 0)])
def test_ranks_of_a_preference_are_one_each_and_do_not_fall(ranks):
    with pytest.raises(InputError, match=r"^sums\.jsonl, line 7: ranks=\(.*\) of 2 completions; allowed: one for each"):
        Preference("2+2=", (" 4", " 5"), Origin("sums.jsonl", 7), ranks=ranks)


def test_a_label_belongs_to_a_single_completion():
    with pytest.raises(InputError, match=r"^sums\.jsonl, line 7: label=True of 2 completions; allowed: a label for a"):
        Preference("2+2=", (" 4", " 5"), Origin("sums.jsonl", 7), label=True)


def test_bad_input_is_a_value_error():
    assert issubclass(InputError, ValueError)
