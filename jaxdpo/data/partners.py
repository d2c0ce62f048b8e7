"""A completion of another prompt beside each labelled one.

KTO measures how far a policy has moved from its reference on completions that answer some other prompt. A partner is
such a completion: a second candidate of the group, with neither rank nor label. It shares the ids of the completion
that it is.

>>> from jaxdpo.data.groups import TokenizedGroup
>>> from jaxdpo.types import Origin
>>> def group(prompt, completion):
...     prompt, completion = (np.array(part, np.int32) for part in (prompt, completion))
...     return TokenizedGroup(prompt, (completion,), False, (False,), Origin("sums.jsonl", 1), label=True)
>>> data = TokenizedDataset.of([group([5, 6], [7, 1]), group([5, 6], [8, 1]), group([9, 9, 9], [4, 4, 1])])
>>> for tokenized in with_partners(data, max_length=5).groups:  # the third one's own follows the prompt 5 6 in full
...     print(tokenized.prompt, *tokenized.completions)
[5 6] [7 1] [4 4 1]
[5 6] [8 1] [4 4 1]
[9 9 9] [4 4 1] [7 1]
"""

import dataclasses
import hashlib

import numpy as np

from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.groups import DTYPES, GroupArrays
from jaxdpo.types import UNRANKED, InputError


def with_partners(dataset: TokenizedDataset, max_length: int) -> TokenizedDataset:
    """Gives each labelled group a second candidate: the completion of the next group that answers something else.

    The next one in file order, the first following the last, whose prompt differs and whose completion differs. It is
    cut at its end where the path would be too long; that is not counted as truncated. The prompt is never cut for it.

    Args:
      dataset: of labelled groups. Partners that they have already are replaced.
      max_length: tokens of a prompt and its partner together, as in `tokenize_dataset`.
    Returns:
      The same groups in the same order, two candidates each, with the same ids. It depends on nothing but the
      arguments.
    Raises:
      InputError: if groups have no label, or one has no partner because no other has both another prompt and another
        completion.
    """
    if not dataset.labelled:
        raise InputError(
            "these groups compare completions; allowed: single completions with a label; load data in the format "
            "'unpaired'"
        )
    arrays = dataset.arrays
    prompts, own = arrays.first, arrays.first + 1  # segments, [groups]
    room = np.maximum(1, max_length - arrays.size[prompts])
    partner = _partners(dataset, room)
    # Prompt, completion, partner of each group; the arrays of the ids stay where they are.
    segments = np.stack([prompts, own, own[partner]], axis=1)  # [groups, 3]
    size = arrays.size[segments]
    size[:, 2] = np.minimum(size[:, 2], room)
    truncated, rank = arrays.truncated[segments], arrays.rank[segments]
    truncated[:, 2], rank[:, 2] = False, UNRANKED
    made = arrays._replace(
        start=arrays.start[segments].reshape(-1),
        size=size.reshape(-1),
        truncated=truncated.reshape(-1),
        rank=rank.reshape(-1),
        largest=arrays.largest[segments].reshape(-1),
        first=np.arange(0, segments.size, 3),
        completions=np.full(len(dataset), 2, DTYPES["completions"]),
    )
    return dataclasses.replace(dataset, arrays=made)


def _partners(dataset: TokenizedDataset, room: np.ndarray) -> np.ndarray:
    """int64 `[groups]`: the group whose completion, cut to `room` tokens, is each one's partner."""
    arrays = dataset.arrays
    count = len(dataset)
    prompt_keys, completion_keys = _keys(arrays, arrays.first), _keys(arrays, arrays.first + 1)
    prompts_left, completions_left = _left(prompt_keys), _left(completion_keys)
    away = np.ones(count, np.int64)
    searching = np.arange(count)
    while len(searching := searching[away[searching] < count]):
        other = (searching + away[searching]) % count
        same_prompt = prompt_keys[searching] == prompt_keys[other]
        same_completion = completion_keys[searching] == completion_keys[other]
        same_completion |= _same_when_cut(arrays, searching, other, room)
        step = np.where(same_prompt, prompts_left[other], np.where(same_completion, completions_left[other], 0))
        away[searching] += step
        searching = searching[step > 0]
    for alone in np.flatnonzero(away >= count):
        raise _alone(dataset, int(alone))
    return (np.arange(count) + away) % count


def _same_when_cut(arrays: GroupArrays, own: np.ndarray, other: np.ndarray, room: np.ndarray) -> np.ndarray:
    """bool: whether a group's completion equals another one's that is cut to `room`; False where it is not cut."""
    own_size, other_size = arrays.size[arrays.first[own] + 1], arrays.size[arrays.first[other] + 1]
    same = (other_size > room[own]) & (own_size == room[own])
    for i in np.flatnonzero(same):
        size = own_size[i]
        mine, theirs = (int(arrays.start[arrays.first[group[i]] + 1]) for group in (own, other))
        same[i] = np.array_equal(arrays.ids[mine : mine + size], arrays.ids[theirs : theirs + size])
    return same


def _keys(arrays: GroupArrays, segments: np.ndarray) -> np.ndarray:
    """uint64 `[segments]`: equal for segments of equal ids. For others by a chance of 2**-64: a partner is passed."""
    data = arrays.ids.data.cast("B")
    ends = arrays.start[segments] + arrays.size[segments]
    spans = zip((4 * arrays.start[segments]).tolist(), (4 * ends).tolist(), strict=True)
    return np.array([int.from_bytes(hashlib.blake2b(data[a:b], digest_size=8).digest()) for a, b in spans], np.uint64)


def _left(keys: np.ndarray) -> np.ndarray:
    """How many places behind each key of a cyclic list the next other one stands; their number where all are equal.

    A search passes many equal ones in one step by it.
    """
    count = len(keys)
    ends = np.flatnonzero(keys != np.roll(keys, -1))  # the last of each run
    if not len(ends):
        return np.full(count, count)
    ends = np.append(ends, ends[0] + count)
    places = np.arange(count)
    return ends[np.searchsorted(ends, places)] - places + 1


def _alone(dataset: TokenizedDataset, index: int) -> InputError:
    return InputError(
        f"{dataset.groups.origin(index)}: no other record has both another prompt and another completion, which KTO "
        "compares this one with; allowed: at least two prompts with different completions; add records, or choose a "
        "loss that needs no partner, such as bco"
    )
