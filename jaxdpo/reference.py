"""Log-probs of a whole dataset in one forward-only pass: the reference's before training, the policy's at evaluation.

At the start of a run the policy is its own reference, so the pass needs no second copy of the weights, and no step pays
for a reference forward. Log-probs are kept per token in float32, from the same function, kernel and compute dtype
as the policy's.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from jaxdpo.logprobs import sequence_logps, token_logps
from jaxdpo.models import Decoder
from jaxdpo.sharding import place_batch
from jaxdpo.types import Batch


class DatasetLogps(NamedTuple):
    """Log-probs of every group of a dataset under one set of parameters."""

    tokens: list[np.ndarray]
    """Per example, at least float32 `[scored tokens]`: its candidates' tokens one after another, nats."""
    sequences: np.ndarray
    """`[examples, candidates]` sums, nats."""
    mask: np.ndarray
    """bool `[examples, candidates]` which candidates exist."""


LogpProgram = Callable[[dict, Batch], tuple[jax.Array, jax.Array]]


def make_logp_program(decoder: Decoder) -> LogpProgram:
    """The compiled forward pass `(params, batch) -> (tokens [rows, slots], sequences [rows, groups, candidates])`."""

    @jax.jit
    def logps(params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        tokens = token_logps(decoder, params, batch)  # [rows, slots]
        return tokens, sequence_logps(tokens, batch)

    return logps


def dataset_logps(
    program: LogpProgram, params: dict, batches: Sequence[Batch], mesh: jax.sharding.Mesh, *, label: str
) -> DatasetLogps:
    """Runs the program over batches that hold every example of a dataset once.

    Args:
      program: from `make_logp_program`.
      params: of the policy or the reference.
      batches: host batches whose `example_id`s are 0 to the number of examples - 1, each once.
      mesh: where to run.
      label: what the progress bar says.
    Raises:
      ValueError: if an example is missing or stands in two places.
    """
    examples = sum(int(batch.group_mask.sum()) for batch in batches)
    tokens: dict[int, np.ndarray] = {}
    candidates = batches[0].candidate_mask.shape[-1]
    sequences = np.zeros((examples, candidates), np.float64)
    mask = np.zeros((examples, candidates), bool)
    with tqdm.tqdm(total=examples, desc=label, unit="pair", leave=False, disable=None) as bar:
        for batch in batches:
            per_token, per_sequence = jax.device_get(program(params, place_batch(batch, mesh)))
            for row, group in np.argwhere(batch.group_mask):
                example = int(batch.example_id[row, group])
                owned = batch.slot_owner[row] // candidates == group
                if example in tokens:
                    raise ValueError(f"example {example} stands in two places of the dataset's batches; allowed: one")
                tokens[example] = per_token[row, owned]
                sequences[example] = per_sequence[row, group]
                mask[example] = batch.candidate_mask[row, group]
            bar.update(int(batch.group_mask.sum()))
    if sorted(tokens) != list(range(examples)):
        raise ValueError(f"the batches hold {len(tokens)} examples whose ids are not 0 to {examples - 1}")
    return DatasetLogps([tokens[example] for example in range(examples)], sequences, mask)


def slot_logps(logps: DatasetLogps, batch: Batch) -> np.ndarray:
    """The stored log-probs of a batch's slots, `[rows, slots]` nats, 0 in empty slots.

    Raises:
      ValueError: if the stored number of tokens differs from the batch's, e.g. other data or truncation.
    """
    candidates = batch.candidate_mask.shape[2]
    out = np.zeros(batch.slot_owner.shape, np.result_type(*{x.dtype for x in logps.tokens}))
    for row, group in np.argwhere(batch.group_mask):
        slots = np.flatnonzero(batch.slot_owner[row] // candidates == group)
        stored = logps.tokens[batch.example_id[row, group]]
        if len(stored) != len(slots):
            raise ValueError(
                f"example {batch.example_id[row, group]} has {len(stored)} stored log-probs and {len(slots)} tokens to "
                "score; compute the reference again with this data, tokenizer and max_length"
            )
        out[row, slots] = stored
    return out
