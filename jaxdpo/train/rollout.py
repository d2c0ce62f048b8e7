"""Completions that a policy wrote, as what PPO learns from: their log-probs, values, rewards and advantages.

Completions are groups of one candidate, and packed like any data. What belongs to their tokens lies in arrays
`[completions, tokens]`, left-aligned; `of_slots` and `to_slots` go between those and the slots of a batch.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxdpo.config import PPOOptions
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.groups import TokenizedGroup
from jaxdpo.data.packing import Capacity, Layout, Shape
from jaxdpo.data.pipeline import all_batches
from jaxdpo.forward import forward_batches
from jaxdpo.losses import generalized_advantages, token_rewards, whiten
from jaxdpo.reference import scored_slots
from jaxdpo.train.ppo_programs import PPOPrograms
from jaxdpo.train.state import PPOState
from jaxdpo.types import Array, Batch, InputError, Origin

if TYPE_CHECKING:
    from jaxdpo.generate.sampler import Completion

ROW_MULTIPLE = 64
WIDTH_MULTIPLE = 64
"""Arrays of tokens are so many wide, or twice as many and so on: few shapes are compiled."""
SMALLEST_GROUP = 8
"""A row takes as many completions as it would hold of this many tokens, prompt included."""


class Experience(NamedTuple):
    """Completions before the policy moves; float32 `[completions, tokens]` each, unless said otherwise."""

    where: np.ndarray
    """bool: which tokens are real, true up to the last of a completion."""
    logps: np.ndarray
    """Under the policy that sampled, nats."""
    ref_logps: np.ndarray
    """Under the reference, nats."""
    values: np.ndarray
    """Predicted returns."""
    scores: np.ndarray
    """`[completions]`: of the reward, less what a missing EOS costs."""
    advantages: np.ndarray
    returns: np.ndarray

    @property
    def kl(self) -> np.ndarray:
        """`[completions]`: the log-ratio of policy and reference, whose mean estimates their divergence, nats."""
        return (self.logps - self.ref_logps).sum(axis=1)


def rollout_groups(
    prompts: Sequence[Sequence[int] | np.ndarray], completions: Sequence[Sequence["Completion"]]
) -> TokenizedDataset:
    """Completions as groups of one candidate, those of the first prompt first.

    Args:
      prompts: token ids of each.
      completions: of each prompt, as a `Sampler` gives them: a token that ended one is its last.
    Raises:
      InputError: for a prompt or completion without tokens.
    """
    groups = []
    for number, (prompt, of_prompt) in enumerate(zip(prompts, completions, strict=True)):
        for sample, completion in enumerate(of_prompt):
            if not len(prompt) or not len(completion.ids):
                raise InputError(
                    f"prompt {number}, completion {sample}: {len(prompt)} and {len(completion.ids)} tokens; allowed: "
                    "at least 1 each; a completion that ends at once has its EOS"
                )
            ids = (np.asarray(completion.ids, np.int32),)
            cut = (completion.finish_reason == "length",)
            groups.append(
                TokenizedGroup(np.asarray(prompt, np.int32), ids, False, cut, Origin("prompts", number, "row"))
            )
    return TokenizedDataset.of(groups)


def rollout_layout(
    longest_prompt: int, max_new_tokens: int, *, microbatch_tokens: int, row_multiple: int = 1
) -> Layout:
    """The one shape of microbatches that holds whatever is drawn, so that nothing compiles anew from step to step.

    Args:
      longest_prompt: tokens of the longest prompt of all.
      max_new_tokens: of a completion at most.
      microbatch_tokens: bound on rows x length; `row_multiple` rows of the longest path are always allowed.
      row_multiple: rows are a multiple of it, `batch_size_multiple` of the mesh.
    """
    length = -(-(longest_prompt + max_new_tokens) // ROW_MULTIPLE) * ROW_MULTIPLE
    rows = max(1, microbatch_tokens // (length * row_multiple)) * row_multiple
    return Layout((Shape(Capacity(length, length, length // SMALLEST_GROUP, 1), rows),))


def check_scores(scores: Any, data: TokenizedDataset) -> np.ndarray:
    """float32 `[completions]`; InputError unless there is a finite score for each completion."""
    scores = np.asarray(scores, np.float32)
    if scores.shape != (len(data),):
        raise InputError(
            f"scores have shape {scores.shape} for {len(data)} completions; allowed: ({len(data)},), one for each"
        )
    for number in np.flatnonzero(~np.isfinite(scores))[:1].tolist():
        group = data.groups[number]
        raise InputError(
            f"{group.origin}: the score is {scores[number]}; allowed: a finite number; the completion has tokens "
            f"{group.completions[0][:20].tolist()}"
        )
    return scores


def check_reference(ref_params: dict, params: dict) -> None:
    """InputError unless the reference has parameters of the policy's shapes, and its own."""
    of_policy, of_reference = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, ref_params)
    )
    for name, leaf in of_policy.items():
        if name not in of_reference or of_reference[name].shape != leaf.shape:
            got = "nothing" if name not in of_reference else of_reference[name].shape
            raise InputError(
                f"the reference has {got} at {name}, the policy {leaf.shape}; allowed: a model of the same "
                "architecture and tokenizer; load the one that the policy starts from"
            )
        if of_reference[name] is leaf:
            raise InputError(
                f"policy and reference have the same array at {name}, which the first update gives away; allowed: "
                "parameters of its own; load the reference once more, or copy it"
            )


def gather_experience(
    programs: PPOPrograms,
    state: PPOState,
    ref_params: dict,
    data: TokenizedDataset,
    scores: Any,
    layout: Layout,
    options: PPOOptions,
) -> Experience:
    """What a step learns from, measured before the policy moves.

    Args:
      programs: from `make_ppo_programs`.
      state: of the policy that wrote the completions.
      ref_params: of the reference, a dict of its own.
      data: the completions, from `rollout_groups`.
      scores: `[completions]` finite numbers, the reward of each.
      layout: of microbatches that hold any of them, as from `rollout_layout`.
      options: of the run.
    Raises:
      InputError: for another number of scores, one that is not finite, or a reference of another architecture.
    """
    check_reference(ref_params, state.params["policy"])
    scores = check_scores(scores, data)
    if options.missing_eos_penalty is not None:
        scores = scores - np.float32(options.missing_eos_penalty) * cut_off(data)
    where = np.arange(-(-int(data.slots.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE) < data.slots[:, None]
    logps, ref_logps, values = (np.zeros(where.shape, np.float32) for _ in range(3))
    mesh = state.mesh
    passes = functools.partial(forward_batches, mesh=mesh, total=len(data))
    for batch, outputs in passes(programs.measure, state.params, all_batches(data, layout), label="policy"):
        of_slots(outputs.logps, batch, logps)
        of_slots(outputs.values, batch, values)
    for batch, (tokens, _) in passes(programs.reference, ref_params, all_batches(data, layout), label="reference"):
        of_slots(tokens, batch, ref_logps)
    scalars = {"kl_coef": state.penalty.coef, "gamma": options.gamma, "lam": options.lam}
    advantages, returns = _advantages(
        scores,
        logps,
        ref_logps,
        values,
        where,
        scalars,
        whiten_rewards=options.whiten_rewards,
        whiten_advantages=options.whiten_advantages,
    )
    return Experience(where, logps, ref_logps, values, scores, *jax.device_get((advantages, returns)))


@functools.partial(jax.jit, static_argnames=("whiten_rewards", "whiten_advantages"))
def _advantages(
    scores: Array,
    logps: Array,
    ref_logps: Array,
    values: Array,
    where: Array,
    scalars: dict[str, Any],
    *,
    whiten_rewards: bool,
    whiten_advantages: bool,
) -> tuple[jax.Array, jax.Array]:
    """Advantages and returns of tokens, `[completions, tokens]`."""
    rewards = token_rewards(scores, logps, ref_logps, kl_coef=scalars["kl_coef"], where=where)
    if whiten_rewards:
        rewards = whiten(rewards, shift_mean=False, where=where)
    advantages, returns = generalized_advantages(
        rewards, values, discount=scalars["gamma"], gae_lambda=scalars["lam"], where=where
    )
    return whiten(advantages, where=where) if whiten_advantages else advantages, returns


def cut_off(data: TokenizedDataset) -> np.ndarray:
    """bool `[completions]`: which have no end of their own, as their length ended them."""
    return data.arrays.truncated[data.arrays.first + 1]


def of_slots(values: np.ndarray, batch: Batch, out: np.ndarray) -> None:
    """Writes what `[rows, slots]` of a host batch hold into the completions' `[completions, tokens]`."""
    row, slot, example, place = _places(batch)
    out[example, place] = values[row, slot]


def to_slots(values: np.ndarray, batch: Batch) -> np.ndarray:
    """The inverse of `of_slots`: `[rows, slots]` of a host batch, 0 in empty slots."""
    row, slot, example, place = _places(batch)
    out = np.zeros(batch.slot_owner.shape, values.dtype)
    out[row, slot] = values[example, place]
    return out


def _places(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of every scored token its row, slot, example, and place in its completion; int `[tokens]` each."""
    slots = scored_slots(batch)
    first = np.cumsum(slots.size) - slots.size
    place = np.arange(slots.size.sum()) - np.repeat(first, slots.size)
    return slots.row, slots.slot, np.repeat(slots.example, slots.size), place
