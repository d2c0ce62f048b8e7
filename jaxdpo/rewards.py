"""Rewards of completions by a model with a score head: the one path of training, evaluation and scoring.

The reward of a completion is the product of the score head with one state: that of the last token of its path, prompt
and completion. With a prompt that candidates share, each has a last token of its own.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.forward import forward_batches
from jaxdpo.models import Decoder
from jaxdpo.processes import fetch
from jaxdpo.sharding import constrain, place
from jaxdpo.types import Batch

RewardProgram = Callable[[dict, Batch], jax.Array]


class DatasetRewards(NamedTuple):
    """Rewards of a dataset, in the order of the example ids."""

    rewards: np.ndarray
    """`[examples, candidates]`, at least float32; 0 where absent."""
    mask: np.ndarray
    """bool `[examples, candidates]` which candidates exist."""


class Centering(NamedTuple):
    """What `center_rewards` found and did."""

    mean_before: float
    """Mean reward of the completions before; it is 0 after."""
    reward_std: float
    """Standard deviation of their rewards after."""
    shift_std: float
    """Standard deviation of what the completions' rewards were moved by; 0 if all were moved alike."""


def candidate_rewards(decoder: Decoder, params: dict, batch: Batch) -> jax.Array:
    """Reward of every completion.

    Args:
      decoder: with a score head; static under jit.
      params: its parameters.
      batch: preference trees.
    Returns:
      `[rows, groups, candidates]`, at least float32; 0 for an absent candidate.
    """
    score = constrain(decoder.score(params), None)  # [embed], gathered over fsdp
    # A sum of products rather than a matrix product: accelerators would round that to bfloat16 or TF32.
    rewards = (last_states(decoder, params, batch) * score[None, None, None]).sum(axis=-1)
    return jnp.where(batch.candidate_mask, rewards, 0.0)


def last_states(decoder: Decoder, params: dict, batch: Batch) -> jax.Array:
    """The state that the reward of every completion is read from.

    Args:
      decoder: the model; static under jit.
      params: its parameters.
      batch: preference trees.
    Returns:
      `[rows, groups, candidates, embed]`, at least float32; arbitrary finite numbers for an absent candidate.
    """
    states = constrain(decoder.hidden(params, batch), "batch", None, None)  # [rows, length, embed]
    index = _read_at(batch, decoder.config.pad_token_id)  # [rows, groups, candidates]
    shape = index.shape
    states = jnp.take_along_axis(states, index.reshape(shape[0], -1, 1), axis=1)  # [rows, groups * candidates, embed]
    states = constrain(states.reshape(*shape, -1), "batch", None, None, None)
    return states.astype(jnp.promote_types(states.dtype, jnp.float32))


def _read_at(batch: Batch, pad: int | None) -> jax.Array:
    """Row index of each candidate's last token, int `[rows, groups, candidates]`; `pad` does not count as one.

    transformers finds the end of a text by its padding. A classifier that was trained with EOS as padding, as TRL does
    where a tokenizer has none, is read before EOS, here as there.
    """
    if pad is None:
        return jnp.asarray(batch.candidate_last)
    groups, candidates = batch.candidate_mask.shape[1:]
    tokens, group, candidate = (
        jnp.asarray(x)[:, None, None] for x in (batch.tokens, batch.group, batch.candidate)
    )  # [rows, 1, 1, length]
    in_group = group == jnp.arange(1, groups + 1)[None, :, None, None]  # [rows, groups, 1, length]
    own = candidate == jnp.arange(1, candidates + 1)[None, None, :, None]
    readable = in_group & ((candidate == 0) | own) & (tokens != pad)  # [rows, groups, candidates, length]
    first = in_group.argmax(axis=-1, keepdims=True)  # of a text of nothing but padding, as in transformers
    return jnp.where(readable, jnp.arange(tokens.shape[-1])[None, None, None], first).max(axis=-1)


def make_reward_program(decoder: Decoder) -> RewardProgram:
    """The compiled forward pass `(params, batch) -> rewards [rows, groups, candidates]`."""
    return jax.jit(functools.partial(candidate_rewards, decoder))


def dataset_rewards(
    program: RewardProgram,
    params: dict,
    batches: Iterable[Batch],
    mesh: jax.sharding.Mesh,
    *,
    label: str,
    total: int | None = None,
) -> DatasetRewards:
    """Rewards of a dataset in one forward-only pass.

    Args:
      program: from `make_reward_program`.
      params: of the reward model.
      batches: host batches; a group stands in one of them at most.
      mesh: where to run.
      label: what the progress bar says.
      total: number of groups in all, for the progress bar.
    Raises:
      ValueError: if a group stands in two places.
    """
    ids, rewards, mask = [np.zeros(0, np.int32)], [], []
    for batch, values in forward_batches(program, params, batches, mesh, label=label, total=total):
        ids.append(batch.example_id[batch.group_mask])
        rewards.append(values[batch.group_mask])
        mask.append(batch.candidate_mask[batch.group_mask])
    if not rewards:
        return DatasetRewards(np.zeros((0, 0), np.float32), np.zeros((0, 0), bool))
    order = np.argsort(np.concatenate(ids))
    return DatasetRewards(np.concatenate(rewards)[order], np.concatenate(mask)[order])


def center_rewards(
    decoder: Decoder,
    params: dict,
    batches: Iterable[Batch],
    mesh: jax.sharding.Mesh,
    *,
    label: str,
    total: int | None = None,
) -> tuple[dict, Centering]:
    """Moves the rewards of all completions by nearly the same number, so that their mean is 0.

    Only differences of rewards are trained, so their level is arbitrary. The head has no bias that could take it up,
    as transformers' has none. But states have a part that they share: the head is moved along the direction in which
    they vary least for what they have in common, `Σ^-1 μ` with their mean `μ` and covariance `Σ`. That is the least
    squares solution of moving each by the same number. `Σ` is shrunk towards a multiple of the identity by as much as
    the number of completions makes it uncertain, so that completions which were not seen move alike too.

    Args:
      decoder: with a score head.
      params: its parameters.
      batches: host batches of the completions, such as those of training; memory does not grow with their number.
      mesh: where to run.
      label: what the progress bar says.
      total: number of groups in all, for the progress bar.
    Returns:
      The parameters with another `score`, and what was done.
    Raises:
      ValueError: if there are no completions.
    References:
      Chen et al. 2010, https://arxiv.org/abs/0907.4698, Eq. 23: the shrinkage (OAS).
    """
    count, embed = 0, decoder.config.embed_dim
    sums, products = np.zeros(embed), np.zeros((embed, embed))
    program = jax.jit(functools.partial(last_states, decoder))
    for batch, states in forward_batches(program, params, batches, mesh, label=label, total=total):
        kept = states[batch.candidate_mask].astype(np.float64)  # [completions, embed]
        count += len(kept)
        sums += kept.sum(axis=0)
        products += kept.T @ kept
    if not count:
        raise ValueError("there are no completions whose mean reward could be 0; allowed: at least one")
    mean = sums / count
    covariance = products / count - np.outer(mean, mean)
    score = fetch(params["score"]).astype(np.float64)
    shift = -(score @ mean) * _shared_direction(mean, covariance, count)
    moved = score + shift
    found = Centering(float(score @ mean), _std(moved, covariance), _std(shift, covariance))
    leaf = params["score"]
    return {**params, "score": place(moved.astype(leaf.dtype), leaf.sharding)}, found


def _shared_direction(mean: np.ndarray, covariance: np.ndarray, count: int) -> np.ndarray:
    """`[embed]` direction whose product with the states has mean 1 and varies least; see `center_rewards`."""
    size = len(mean)
    variance, square = covariance.trace() / size, np.square(covariance).sum()
    if not variance > 0:  # one completion, or all alike
        return mean / max(mean @ mean, np.finfo(float).tiny)
    trace_square = np.square(size * variance)
    spread = (count + 1 - 2 / size) * (square - trace_square / size)
    shrinkage = min(1.0, ((1 - 2 / size) * square + trace_square) / spread) if spread > 0 else 1.0
    shrunk = (1 - shrinkage) * covariance + shrinkage * variance * np.eye(size)
    direction = np.linalg.solve(shrunk, mean)
    return direction / max(mean @ direction, np.finfo(float).tiny)


def _std(direction: np.ndarray, covariance: np.ndarray) -> float:
    return float(np.sqrt(max(direction @ covariance @ direction, 0.0)))
