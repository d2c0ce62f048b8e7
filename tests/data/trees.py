"""Random groups, and what a batch says about them, read back without the code that wrote it."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.groups import TokenizedGroup
from jaxdpo.types import UNRANKED, Batch, Origin


class Path(NamedTuple):
    """One candidate as a batch holds it."""

    tokens: list[int]
    """Prompt and completion."""
    scored: list[tuple[list[int], int]]
    """Per slot: the tokens of the path up to the one that predicts, and the token to predict."""
    last: int
    """Index in the path of `candidate_last`."""
    rank: int
    label: float | None
    """None where the batch has no labels."""


def group(
    prompt: int,
    *completions: int,
    row: int = 1,
    seed: int = 0,
    ranks: tuple[int, ...] | None = None,
    label: bool | None = None,
    margin: float | None = None,
) -> TokenizedGroup:
    """A group of the given sizes with random ids."""
    rng = np.random.default_rng([seed, row])
    prompt_ids, *ids = (rng.integers(2, 1000, size).astype(np.int32) for size in (prompt, *completions))
    uncut = (False,) * len(ids)
    return TokenizedGroup(prompt_ids, tuple(ids), False, uncut, Origin("trees.jsonl", row), ranks, label, margin)


def dataset(sizes: list[tuple[int, ...]]) -> TokenizedDataset:
    """A dataset of groups, each given as the sizes of its prompt and completions."""
    return TokenizedDataset.of([group(*size, row=row) for row, size in enumerate(sizes, start=1)])


PROMPT, COMPLETION = st.integers(1, 9), st.integers(1, 7)
GROUP_SIZES = st.tuples(PROMPT, st.lists(COMPLETION, min_size=1, max_size=5)).map(lambda size: (size[0], *size[1]))
"""Prompt of 1 to 9 tokens, 1 to 5 completions of 1 to 7."""
COMPARED = st.lists(GROUP_SIZES, min_size=1, max_size=25).map(dataset)
"""Groups whose completions stand best first."""


@st.composite
def _ranked(draw: st.DrawFn) -> TokenizedDataset:
    groups = []
    for row, size in enumerate(draw(st.lists(GROUP_SIZES, min_size=1, max_size=9)), start=1):
        ranks = st.lists(st.sampled_from([0, 1, 2, UNRANKED]), min_size=len(size) - 1, max_size=len(size) - 1)
        groups.append(group(*size, row=row, ranks=draw(st.none() | ranks.map(sorted).map(tuple))))
    return TokenizedDataset.of(groups)


@st.composite
def _labelled(draw: st.DrawFn) -> TokenizedDataset:
    sizes = draw(st.lists(st.tuples(PROMPT, COMPLETION), min_size=1, max_size=25))
    return TokenizedDataset.of([group(*size, row=i, label=draw(st.booleans())) for i, size in enumerate(sizes, 1)])


RANKED = _ranked()
"""Groups some of which have ties and a rest that is not ranked."""
LABELLED = _labelled()
"""Single completions with a label."""
DATASETS = COMPARED | RANKED | LABELLED


def read_paths(batch: Batch) -> dict[tuple[int, int], Path]:
    """`(example_id, candidate) -> Path`, by the definition of a preference tree; positions are checked on the way."""
    paths = {}
    candidates = batch.candidate_mask.shape[2]
    for row, number, which in np.argwhere(batch.candidate_mask):
        seen = (batch.group[row] == number + 1) & np.isin(batch.candidate[row], [0, which + 1])
        index = np.flatnonzero(seen)  # row indices of the path
        tokens = batch.tokens[row, index].tolist()
        assert batch.positions[row, index].tolist() == list(range(len(index)))
        slots = np.flatnonzero(batch.slot_owner[row] == number * candidates + which)
        scored = []
        for source, target in zip(batch.slot_source[row, slots], batch.slot_target[row, slots], strict=True):
            scored.append((tokens[: index.tolist().index(source) + 1], int(target)))
        last = index.tolist().index(batch.candidate_last[row, number, which])
        key = int(batch.example_id[row, number]), int(which)
        assert key not in paths, f"{key} stands in the batch twice"
        label = None if batch.label is None else float(batch.label[row, number, which])
        paths[key] = Path(tokens, scored, last, int(batch.rank[row, number, which]), label)
    return paths


def expected_paths(data: TokenizedDataset, example_ids: list[int]) -> dict[tuple[int, int], Path]:
    """What `read_paths` must return: every completion token predicted once, from the path before it."""
    paths = {}
    for example in example_ids:
        made = data.groups[example]
        prompt = made.prompt.tolist()
        for which, completion in enumerate(made.completions):
            path = prompt + completion.tolist()
            scored = [(path[:i], path[i]) for i in range(len(prompt), len(path))]
            rank, label = which if made.ranks is None else made.ranks[which], None
            if made.label is not None:
                rank, label = (0, float(made.label)) if which == 0 else (UNRANKED, 0.0)
            paths[example, which] = Path(path, scored, len(path) - 1, rank, label)
    return paths
