"""Log-probs of a dataset in one forward-only pass: the reference's before training, the policy's at evaluation.

At the start of a run the policy is its own reference, so the pass needs no second copy of the weights, and no step pays
for a reference forward. Log-probs are kept per token in float32, from the same function, kernel and compute dtype
as the policy's.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxdpo.forward import forward_batches
from jaxdpo.logprobs import sequence_logps, token_statistics
from jaxdpo.models import Decoder
from jaxdpo.types import Batch


class DatasetLogps(NamedTuple):
    """Log-probs of groups of a dataset under one set of parameters, by `Batch.example_id`."""

    tokens: dict[int, np.ndarray]
    """Of each example, at least float32 `[scored tokens]`: its candidates' tokens one after another, nats."""
    sequences: np.ndarray
    """`[examples, candidates]` sums, nats, in the order of the example ids."""
    mask: np.ndarray
    """bool `[examples, candidates]` which candidates exist."""
    statistics: dict[str, np.ndarray]
    """`[examples, candidates]` sums of what the program was asked for besides."""


LogpProgram = Callable[[dict, Batch], tuple[jax.Array, dict[str, jax.Array]]]


def make_logp_program(
    decoder: Decoder, *, statistics: Sequence[str] = (), tail_weight: float | None = None
) -> LogpProgram:
    """The compiled forward pass `(params, batch) -> (tokens [rows, slots], sums)`.

    Args:
      decoder: the model.
      statistics: names in `jaxdpo.logprobs.STATISTICS`.
      tail_weight: as in `sequence_logps`.
    Returns:
      A function; its sums are `[rows, groups, candidates]` by name: `logps`, and the statistics.
    """

    @jax.jit
    def logps(params: dict, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        tokens, others = token_statistics(decoder, params, batch, statistics)  # [rows, slots]
        sums = {name: sequence_logps(value, batch) for name, value in others.items()}
        return tokens, {"logps": sequence_logps(tokens, batch, tail_weight=tail_weight), **sums}

    return logps


def dataset_logps(
    program: LogpProgram,
    params: dict,
    batches: Iterable[Batch],
    mesh: jax.sharding.Mesh,
    *,
    label: str,
    total: int | None = None,
) -> DatasetLogps:
    """Runs the program over batches of a dataset, a group of which stands in one of them at most.

    Args:
      program: from `make_logp_program`.
      params: of the policy or the reference.
      batches: host batches.
      mesh: where to run.
      label: what the progress bar says.
      total: number of groups in all, for the progress bar.
    Raises:
      ValueError: if a group stands in two places.
    """
    tokens: dict[int, np.ndarray] = {}
    sums: dict[int, dict[str, np.ndarray]] = {}
    mask: dict[int, np.ndarray] = {}
    for batch, (per_token, per_sequence) in forward_batches(program, params, batches, mesh, label=label, total=total):
        candidates = batch.candidate_mask.shape[-1]
        for row, group in np.argwhere(batch.group_mask):
            example = int(batch.example_id[row, group])
            tokens[example] = per_token[row, batch.slot_owner[row] // candidates == group]
            sums[example] = {name: of[row, group].astype(np.float64) for name, of in per_sequence.items()}
            mask[example] = batch.candidate_mask[row, group]
    ids = sorted(tokens)
    if not ids:
        return DatasetLogps(tokens, np.zeros((0, 0)), np.zeros((0, 0), bool), {})
    by_name = {name: np.stack([sums[i][name] for i in ids]) for name in sums[ids[0]]}
    return DatasetLogps(tokens, by_name.pop("logps"), np.stack([mask[i] for i in ids]), by_name)


def slot_logps(logps: DatasetLogps, batch: Batch) -> np.ndarray:
    """The stored log-probs of a batch's slots, `[rows, slots]` nats, 0 in empty slots.

    Raises:
      ValueError: if an example is not stored, or with another number of tokens: other data or truncation.
    """
    candidates = batch.candidate_mask.shape[2]
    out = np.zeros(batch.slot_owner.shape, next(iter(logps.tokens.values())).dtype)
    for row, group in np.argwhere(batch.group_mask):
        slots = np.flatnonzero(batch.slot_owner[row] // candidates == group)
        example = int(batch.example_id[row, group])
        stored = logps.tokens.get(example, np.zeros(0))
        if len(stored) != len(slots):
            raise ValueError(
                f"example {example} has {len(stored)} stored log-probs and {len(slots)} tokens to score; "
                "compute the reference of this dataset, with this tokenizer and max_length"
            )
        out[row, slots] = stored
    return out
