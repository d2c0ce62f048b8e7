"""A forward-only program over the batches of a dataset: what the passes for log-probs and for rewards share."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm

from jaxdpo.processes import fetch, is_main
from jaxdpo.sharding import place_batch
from jaxdpo.types import Batch


def forward_batches(
    program: Callable[[dict, Batch], Any],
    params: dict,
    batches: Iterable[Batch],
    mesh: jax.sharding.Mesh,
    *,
    label: str,
    total: int | None = None,
) -> Iterator[tuple[Batch, Any]]:
    """Runs a program over batches of a dataset, a group of which stands in one of them at most.

    Args:
      program: compiled `(params, batch) -> outputs`.
      params: of the model.
      batches: host batches.
      mesh: where to run.
      label: what the progress bar says.
      total: number of groups in all, for the progress bar.
    Yields:
      each host batch, and the program's outputs for it, on the host; the same on every process.
    Raises:
      ValueError: if a group stands in two places.
    """
    seen = np.zeros(0, bool)
    with tqdm.tqdm(total=total, desc=label, unit="group", leave=False, disable=None if is_main() else True) as bar:
        for batch in batches:
            examples, counts = np.unique(batch.example_id[batch.group_mask], return_counts=True)
            seen = np.pad(seen, (0, max(0, examples.max(initial=-1) + 1 - len(seen))))
            for example in examples[seen[examples] | (counts > 1)].tolist():
                raise ValueError(f"example {example} stands in two places of the batches; allowed: one")
            seen[examples] = True
            yield batch, fetch(program(params, place_batch(batch, mesh)))
            bar.update(int(batch.group_mask.sum()))
