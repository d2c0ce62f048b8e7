"""A completion of another prompt beside each labelled one.

KTO measures how far a policy has moved from its reference on completions that answer some other prompt. A partner is
such a completion: a second candidate of the group, with neither rank nor label.

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
from collections.abc import Sequence

import numpy as np

from jaxdpo.data.tokenize import TokenizedDataset, TokenizedGroup
from jaxdpo.types import InputError


def with_partners(dataset: TokenizedDataset, max_length: int) -> TokenizedDataset:
    """Gives each labelled group a second candidate: the completion of the next group that answers something else.

    The next one in file order, the first following the last, whose prompt differs and whose completion differs. It is
    cut at its end where the path would be too long; that is not counted as truncated. The prompt is never cut for it.

    Args:
      dataset: of labelled groups. Partners that they have already are replaced.
      max_length: tokens of a prompt and its partner together, as in `tokenize_dataset`.
    Returns:
      The same groups in the same order, two candidates each. It depends on nothing but the arguments.
    Raises:
      InputError: if groups have no label, or one has no partner because no other has both another prompt and another
        completion.
    """
    if not dataset.labelled:
        raise InputError(
            "these groups compare completions; allowed: single completions with a label; load data in the format "
            "'unpaired'"
        )
    prompts = _Runs([group.prompt for group in dataset.groups])
    completions = _Runs([group.completions[0] for group in dataset.groups])
    groups = []
    for i, group in enumerate(dataset.groups):
        own, room = group.completions[0], max(1, max_length - len(group.prompt))
        away = 1
        while away < len(dataset):
            j = (i + away) % len(dataset)
            partner = dataset.groups[j].completions[0][:room]
            if prompts.keys[j] == prompts.keys[i]:
                away += prompts.left[j]
            elif np.array_equal(partner, own):
                away += completions.left[j]
            else:
                break
        else:
            raise _alone(group)
        groups.append(
            dataclasses.replace(
                group,
                completions=(own, partner),
                completions_truncated=(group.completions_truncated[0], False),
            )
        )
    return TokenizedDataset.of(groups, dataset.dropped)


class _Runs:
    """Runs of equal arrays in a cyclic list, so that a search passes many equal ones in one step."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        known: dict[bytes, int] = {}
        self.keys = [known.setdefault(array.tobytes(), len(known)) for array in arrays]
        """Equal for equal arrays."""
        self.left = [len(arrays)] * len(arrays)
        """How many places behind each array the next other one stands; their number where all are equal."""
        for i in reversed(range(2 * len(arrays))):  # twice around: the run of the last array may go on with the first
            here, after = i % len(arrays), (i + 1) % len(arrays)
            same = self.keys[here] == self.keys[after]
            self.left[here] = min(self.left[after] + 1, len(arrays)) if same else 1


def _alone(group: TokenizedGroup) -> InputError:
    return InputError(
        f"{group.origin}: no other record has both another prompt and another completion, which KTO "
        "compares this one with; allowed: at least two prompts with different completions; add records, or choose a "
        "loss that needs no partner, such as bco"
    )
