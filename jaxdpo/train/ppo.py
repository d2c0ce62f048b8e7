"""PPO: a policy learns from the scores of its own completions, and stays near a reference.

A step is: completions are drawn and scored, by whatever means; `ppo_step` measures them under the policy and the
reference, and updates the policy on them several times. Draw at temperature 1 without filters: then the policy that is
improved is the one that wrote. Here the reward is the number of tokens; any Python function will do.

  state = init_ppo_state(decoder, params, optimizer, mesh, options.kl_coef)
  programs = make_ppo_programs(decoder, optimizer, jax.tree.map(lambda x: x.sharding, state))
  for step in range(steps):
      sampler = make_sampler(decoder, state.params["policy"], SamplingConfig(seed=step), stops, mesh=mesh)
      data = rollout_groups(prompts, sampler(prompts))
      state, metrics = ppo_step(programs, state, ref_params, data, data.slots, layout, options, seed=step)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdpo.config.ppo import KL_HORIZON, PPOOptions
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.packing import Layout
from jaxdpo.data.pipeline import microbatches
from jaxdpo.losses import next_kl_coef
from jaxdpo.sharding import place, place_batch, replicated
from jaxdpo.train.ppo_programs import PPOMicrobatch, PPOPrograms
from jaxdpo.train.rollout import Experience, cut_off, gather_experience, to_slots
from jaxdpo.train.state import KLPenalty, PPOState
from jaxdpo.types import InputError


def ppo_step(
    programs: PPOPrograms,
    state: PPOState,
    ref_params: dict,
    data: TokenizedDataset,
    scores: Any,
    layout: Layout,
    options: PPOOptions,
    *,
    seed: int,
) -> tuple[PPOState, dict[str, float]]:
    """Learns from completions: `num_ppo_epochs` times `num_mini_batches` optimizer updates.

    An update is on the mean over the tokens of its completions, so it does not depend on how they are packed.

    Args:
      programs: from `make_ppo_programs`.
      state: of the policy that wrote the completions; donated.
      ref_params: of the reference, a dict of its own.
      data: the completions, from `rollout_groups`.
      scores: `[completions]` finite numbers, the reward of each.
      layout: of microbatches that hold any of them, as from `rollout_layout`.
      options: of the run.
      seed: of the order in which completions are learnt from; another one for each step.
    Returns:
      The new state, and metrics under TRL's names.
    Raises:
      InputError: for fewer completions than mini-batches, another number of scores, one that is not finite, or a
        reference of another architecture.
      FloatingPointError: for a loss or gradient that is not finite.
    """
    if len(data) < options.num_mini_batches:
        raise InputError(
            f"{len(data)} completions for --num-mini-batches {options.num_mini_batches}; allowed: at most as many "
            "mini-batches; draw more, or lower it"
        )
    mesh = state.mesh
    with jax.set_mesh(mesh):
        experience = gather_experience(programs, state, ref_params, data, scores, layout, options)
        metrics = _of_rollout(experience, data, float(state.penalty.coef))
        updates, order = [], np.random.default_rng(seed)
        for _ in range(options.num_ppo_epochs):
            for chosen in np.array_split(order.permutation(len(data)), options.num_mini_batches):
                state, report = _update(programs, state, data, np.sort(chosen), experience, layout, options)
                updates.append(report)
        if options.kl_target is not None:
            adapted = next_kl_coef(
                state.penalty.coef,
                experience.kl.mean(),
                target=options.kl_target,
                horizon=options.kl_horizon or KL_HORIZON,
                completions=len(data),
            )
            state = state._replace(penalty=KLPenalty(place(adapted, replicated(mesh))))
    of_updates = {name: float(np.mean([report[name] for report in updates])) for name in updates[0]}
    ratio_var = float(np.var([report["val/ratio"] for report in updates]))
    return state, metrics | of_updates | {"val/ratio_var": ratio_var}


def _update(
    programs: PPOPrograms,
    state: PPOState,
    data: TokenizedDataset,
    chosen: np.ndarray,
    experience: Experience,
    layout: Layout,
    options: PPOOptions,
) -> tuple[PPOState, dict[str, float]]:
    """One optimizer update on some of the completions; means over their tokens."""
    tokens = np.float32(data.slots[chosen].sum())
    scalars = {name: getattr(options, name) for name in ("cliprange", "cliprange_value", "vf_coef")}
    grads, sums = programs.init(state.params), []
    for batch in microbatches(data, chosen, layout):
        arrays = (experience.logps, experience.values, experience.advantages, experience.returns)
        microbatch = place_batch(PPOMicrobatch(batch, *(to_slots(x, batch) for x in arrays)), state.mesh)
        grads, of_microbatch = programs.accumulate(state.params, grads, microbatch, tokens, scalars)
        sums.append(of_microbatch)
    state, norm = programs.apply(state, grads)
    means = _means(jax.device_get(sums), float(tokens)) | {"grad_norm": float(norm)}
    if not np.isfinite(list(means.values())).all():
        raise FloatingPointError(
            f"update {int(state.step)}: {', '.join(f'{name} {value}' for name, value in means.items())}; not finite; "
            "fix: lower the learning rate, or look at the scores"
        )
    return state, means


def _means(sums: Sequence[Mapping[str, Any]], tokens: float) -> dict[str, float]:
    return {name: float(sum(of_microbatch[name] for of_microbatch in sums)) / tokens for name in sums[0]}


def _of_rollout(experience: Experience, data: TokenizedDataset, kl_coef: float) -> dict[str, float]:
    """Means over the completions, as they were drawn."""
    kl, scores = float(experience.kl.mean()), float(experience.scores.mean())
    return {
        "objective/kl": kl,
        "objective/entropy": -float(experience.logps.sum(axis=1).mean()),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": scores - kl_coef * kl,
        "objective/scores": scores,
        "objective/kl_coef": kl_coef,
        "val/num_eos_tokens": float((~cut_off(data)).sum()),
        "val/length": float(data.slots.mean()),
    }
