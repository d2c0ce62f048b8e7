"""Arrays of an audit, and sums over them: where records are, distributions of lengths, keys that come back."""

from array import array
from typing import Any, Literal

import numpy as np

from jaxdpo.types import Origin

QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)
"""Per cent."""
_STEPS = np.array([step << power for power in range(30) for step in (2, 3)])
EDGES = np.concatenate([1 - _STEPS[::-1], [0, 1], _STEPS])
"""Of the bins of a histogram: powers of two and half way between them, on both sides of 0 alike."""


class Origins:
    """Origins in 12 bytes each.

    Example:
      >>> origins = Origins()
      >>> [origins.add(Origin("sums.jsonl", line)) for line in (7, 9)]
      [0, 1]
      >>> origins.names(np.array([1, 0]), limit=1)
      ['sums.jsonl, line 9']
    """

    def __init__(self) -> None:
        self._sources: dict[tuple[str, Literal["line", "row"]], int] = {}
        self._source, self._number = array("i"), array("q")

    def __len__(self) -> int:
        return len(self._number)

    def add(self, origin: Origin) -> int:
        """Its index."""
        source = (origin.source, origin.unit)
        self._source.append(self._sources.setdefault(source, len(self._sources)))
        self._number.append(origin.number)
        return len(self._number) - 1

    def names(self, indices: np.ndarray, limit: int | None = None) -> list[str]:
        """The origins at some indices as text; of the first `limit` of them."""
        sources = list(self._sources)
        origins = ((sources[self._source[i]], self._number[i]) for i in indices[:limit].tolist())
        return [str(Origin(source, number, unit)) for (source, unit), number in origins]


def distribution(values: np.ndarray) -> dict[str, Any]:
    """Count, mean, quantiles and histogram of whole numbers, at least one, in values that JSON has.

    A quantile is one of the values. A bin holds its left edge and not its right one.

    Example:
      >>> distribution(np.array([1, 2, 2, 5]))  # doctest: +NORMALIZE_WHITESPACE
      {'count': 4, 'mean': 2.5,
       'quantiles': {'0': 1, '5': 1, '25': 1, '50': 2, '75': 2, '95': 5, '99': 5, '100': 5},
       'histogram': {'edges': [1, 2, 3, 4, 6], 'counts': [1, 2, 0, 1]}}
    """
    quantiles = np.percentile(values, QUANTILES, method="inverted_cdf")
    first = np.searchsorted(EDGES, values.min(), side="right") - 1
    last = np.searchsorted(EDGES, values.max(), side="right")
    edges = EDGES[first : last + 1]
    return {
        "count": len(values),
        "mean": float(values.mean()),
        "quantiles": {str(q): int(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        "histogram": {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()},
    }


def earlier(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of keys that stand earlier too, and of the first one equal to each.

    Example:
      >>> earlier(np.array([7, 8, 7, 9, 7]))
      (array([2, 4]), array([0, 0]))
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    firsts = first[inverse]
    again = np.flatnonzero(firsts != np.arange(len(keys)))
    return again, firsts[again]


def among(keys: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of keys that are among others, and of the first one there that is equal to each.

    Example:
      >>> among(np.array([1, 2, 3]), np.array([3, 4, 1, 3]))
      (array([0, 2]), array([2, 0]))
    """
    unique, first = np.unique(others, return_index=True)
    place = np.searchsorted(unique, keys)
    hits = np.flatnonzero(np.isin(keys, unique))
    return hits, first[place[hits]]
