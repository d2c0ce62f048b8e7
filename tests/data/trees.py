"""Random groups, and what a batch says about them, read back without the code that wrote it."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from jaxdpo.data.tokenize import TokenizedDataset, TokenizedGroup
from jaxdpo.types import Batch


class Path(NamedTuple):
    """One candidate as a batch holds it."""

    tokens: list[int]
    """Prompt and completion."""
    scored: list[tuple[list[int], int]]
    """Per slot: the tokens of the path up to the one that predicts, and the token to predict."""
    last: int
    """Index in the path of `candidate_last`."""
    rank: int


def group(prompt: int, *completions: int, row: int = 1, seed: int = 0) -> TokenizedGroup:
    """A group of the given sizes with random ids."""
    rng = np.random.default_rng([seed, row])
    prompt_ids, *ids = (rng.integers(2, 1000, size).astype(np.int32) for size in (prompt, *completions))
    return TokenizedGroup(prompt_ids, tuple(ids), False, (False,) * len(ids), "trees.jsonl", row)


def dataset(sizes: list[tuple[int, ...]]) -> TokenizedDataset:
    """A dataset of groups, each given as the sizes of its prompt and completions."""
    groups = [group(*size, row=row) for row, size in enumerate(sizes, start=1)]
    tokens = np.array([sum(size) for size in sizes], np.int32)
    slots = np.array([sum(size[1:]) for size in sizes], np.int32)
    return TokenizedDataset(groups, tokens, slots, ())


GROUP_SIZES = st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=5)).map(
    lambda size: (size[0], *size[1])
)
"""Prompt of 1 to 9 tokens, 1 to 5 completions of 1 to 7."""
DATASETS = st.lists(GROUP_SIZES, min_size=1, max_size=25).map(dataset)


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
        paths[key] = Path(tokens, scored, last, int(batch.rank[row, number, which]))
    return paths


def expected_paths(data: TokenizedDataset, example_ids: list[int]) -> dict[tuple[int, int], Path]:
    """What `read_paths` must return: every completion token predicted once, from the path before it."""
    paths = {}
    for example in example_ids:
        prompt = data.groups[example].prompt.tolist()
        for which, completion in enumerate(data.groups[example].completions):
            path = prompt + completion.tolist()
            scored = [(path[:i], path[i]) for i in range(len(prompt), len(path))]
            paths[example, which] = Path(path, scored, len(path) - 1, which)
    return paths
