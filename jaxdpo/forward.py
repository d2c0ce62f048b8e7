"""A forward-only program over the batches of a dataset: what the passes for log-probs and for rewards share."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import tqdm

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
      each host batch, and the program's outputs for it, on the host.
    Raises:
      ValueError: if a group stands in two places.
    """
    seen: set[int] = set()
    with tqdm.tqdm(total=total, desc=label, unit="group", leave=False, disable=None) as bar:
        for batch in batches:
            for example in batch.example_id[batch.group_mask].tolist():
                if example in seen:
                    raise ValueError(f"example {example} stands in two places of the batches; allowed: one")
                seen.add(example)
            yield batch, jax.device_get(program(params, place_batch(batch, mesh)))
            bar.update(int(batch.group_mask.sum()))
