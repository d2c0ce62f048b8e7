"""Log-probs of a dataset in one forward-only pass: the reference's before training, or a policy's afterwards.

At the start of a run the policy is its own reference, so the pass needs no second copy of the weights, and no step pays
for a reference forward. Log-probs are kept per token, from the same function, kernel and compute dtype as the policy's.
They lie in one flat array, in memory or memory-mapped (`jaxdpo.reference_cache`), and steps find them by example.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxdpo.forward import forward_batches
from jaxdpo.logprobs import sequence_logps, token_statistics
from jaxdpo.models import Decoder
from jaxdpo.sharding import place_batch
from jaxdpo.types import Array, Batch


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLogps:
    """Log-probs of the scored tokens of groups, found by `Batch.example_id`; 12 bytes an example besides them.

    Attributes:
      values: at least float32 `[tokens]` nats: those of an example stand together, candidate after candidate.
      start: int64 `[examples]` index in `values` of an example's first one.
      size: int32 `[examples]` how many; 0 where none are stored.
    """

    values: np.ndarray
    start: np.ndarray
    size: np.ndarray

    def of(self, example: int) -> np.ndarray:
        """Those of one example, `[scored tokens]`."""
        return self.values[self.start[example] : self.start[example] + self.size[example]]

    def sums(self, lengths: np.ndarray, *, tail_weight: float | None = None) -> np.ndarray:
        """Log-prob of every completion of a dataset, all of whose groups are stored.

        Args:
          lengths: int `[examples, candidates]` scored tokens of each, `TokenizedDataset.completion_lengths()`.
          tail_weight: as in `sequence_logps`.
        Returns:
          float64 `[examples, candidates]` nats; 0 for an absent candidate.
        Raises:
          ValueError: if other numbers of tokens are stored.
        """
        _check_sizes(np.arange(len(lengths)), self.size, lengths.sum(axis=1))
        first = self.start[:, None] + np.cumsum(lengths, axis=1) - lengths  # [examples, candidates]
        exists = lengths > 0
        size = lengths[exists].astype(np.int64)
        values = self.values[_spans(first[exists], size)].astype(np.float64)
        if tail_weight is not None:
            shortest = np.where(exists, lengths, np.iinfo(lengths.dtype).max).min(axis=1, keepdims=True)
            shared = np.broadcast_to(shortest, lengths.shape)[exists]
            values *= np.where(_spans(np.zeros_like(size), size) < np.repeat(shared, size), 1.0, tail_weight)
        sums = np.zeros(lengths.shape)
        if len(size):
            sums[exists] = np.add.reduceat(values, np.cumsum(size) - size)
        return sums


@dataclasses.dataclass(frozen=True, eq=False)
class DatasetLogps(TokenLogps):
    """Log-probs of groups of a dataset under one set of parameters: per token, and per completion.

    Attributes:
      sequences: float64 `[groups, candidates]` sums, nats, in the order of the example ids.
      mask: bool `[groups, candidates]` which candidates exist.
      statistics: `[groups, candidates]` sums of what the program was asked for besides, by name.
    """

    sequences: np.ndarray
    mask: np.ndarray
    statistics: dict[str, np.ndarray]


LogpProgram = Callable[[dict, Batch], tuple[jax.Array, dict[str, jax.Array]]]


class FrozenReference(NamedTuple):
    """A reference that stays what it is and is evaluated at every step: a second copy of the weights."""

    program: LogpProgram
    params: dict
    """Its own: those of the train state are donated by the first step."""


class ScoredSlots(NamedTuple):
    """The scored slots of a batch, group after group."""

    row: np.ndarray
    """int64 `[tokens]`."""
    slot: np.ndarray
    """int64 `[tokens]` index in the row."""
    example: np.ndarray
    """int32 `[groups]` `Batch.example_id`."""
    size: np.ndarray
    """int64 `[groups]` how many slots are each one's."""


def make_logp_program(
    decoder: Decoder, *, statistics: Sequence[str] = (), tail_weight: float | None = None
) -> LogpProgram:
    """The compiled forward pass `(params, batch) -> (tokens [rows, slots], sums)`.

    Args:
      decoder: the model.
      statistics: names in `jaxdpo.lm_head.STATISTICS`.
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
    """Runs the program over batches of a dataset, a group of which stands in one of them at most; all in memory.

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
    slots: list[ScoredSlots] = []
    values: list[np.ndarray] = []
    mask: list[np.ndarray] = []
    sums: dict[str, list[np.ndarray]] = {}
    for batch, (per_token, per_sequence) in forward_batches(program, params, batches, mesh, label=label, total=total):
        exists, scored = batch.group_mask, scored_slots(batch)
        slots.append(scored)
        values.append(per_token[scored.row, scored.slot])
        mask.append(batch.candidate_mask[exists])
        for name, of_batch in per_sequence.items():
            sums.setdefault(name, []).append(of_batch[exists].astype(np.float64))
    if not slots:
        start, size = np.zeros(0, np.int64), np.zeros(0, np.int32)
        return DatasetLogps(np.zeros(0, np.float32), start, size, np.zeros((0, 0)), np.zeros((0, 0), bool), {})
    example = np.concatenate([scored.example for scored in slots])
    size = np.concatenate([scored.size for scored in slots])
    tokens = located(np.concatenate(values), example, size, int(example.max()) + 1)
    order = np.argsort(example)
    by_name = {name: np.concatenate(parts)[order] for name, parts in sums.items()}
    logps = by_name.pop("logps")
    return DatasetLogps(tokens.values, tokens.start, tokens.size, logps, np.concatenate(mask)[order], by_name)


def located(values: np.ndarray, example: np.ndarray, size: np.ndarray, examples: int) -> TokenLogps:
    """Log-probs of groups that stand one after another, to be found by example.

    Args:
      values: `[tokens]`.
      example: int `[groups]` whose they are, each once, in this order.
      size: int `[groups]` how many are each one's.
      examples: how many there are in the dataset.
    """
    start, sizes = np.zeros(examples, np.int64), np.zeros(examples, np.int32)
    start[example] = np.cumsum(size, dtype=np.int64) - size
    sizes[example] = size
    return TokenLogps(values, start, sizes)


def slot_logps(reference: TokenLogps | FrozenReference, batch: Batch) -> Array:
    """The reference's log-probs of a batch's slots, `[rows, slots]` nats, 0 in empty slots; what is stored, as NumPy.

    Raises:
      ValueError: if an example is not stored, or with another number of tokens: other data or truncation.
    """
    if isinstance(reference, FrozenReference):
        mesh = jax.tree.leaves(reference.params)[0].sharding.mesh
        return reference.program(reference.params, place_batch(batch, mesh))[0]
    slots = scored_slots(batch)
    stored = np.zeros_like(slots.size)
    inside = slots.example < len(reference.size)
    stored[inside] = reference.size[slots.example[inside]]
    _check_sizes(slots.example, stored, slots.size)
    out = np.zeros(batch.slot_owner.shape, reference.values.dtype)
    out[slots.row, slots.slot] = reference.values[_spans(reference.start[slots.example], slots.size)]
    return out


def scored_slots(batch: Batch) -> ScoredSlots:
    """Where in a host batch the tokens of each group are scored."""
    groups, candidates = batch.candidate_mask.shape[1:]
    row, slot = np.nonzero(batch.slot_owner < groups * candidates)
    group = row * groups + batch.slot_owner[row, slot] // candidates  # [tokens] of the batch
    order = np.argsort(group, kind="stable")
    exists = batch.group_mask.reshape(-1)
    size = np.bincount(group, minlength=len(exists))
    return ScoredSlots(row[order], slot[order], batch.example_id.reshape(-1)[exists], size[exists])


def _spans(start: np.ndarray, size: np.ndarray) -> np.ndarray:
    """int64: `start, start + 1, …` of each span, `size` of them, one span after another."""
    return np.arange(size.sum()) + np.repeat(start - (np.cumsum(size) - size), size)


def _check_sizes(example: np.ndarray, stored: np.ndarray, size: np.ndarray) -> None:
    """ValueError, naming an example, where other numbers of log-probs are stored than there are tokens to score."""
    if len(stored) != len(size):
        raise ValueError(f"log-probs of {len(stored)} examples are stored; allowed: the {len(size)} of this dataset")
    for wrong in np.flatnonzero(stored != size):
        raise ValueError(
            f"example {example[wrong]} has {stored[wrong]} stored log-probs and {size[wrong]} tokens to score; "
            "compute the reference of this dataset, with this tokenizer and max_length"
        )
