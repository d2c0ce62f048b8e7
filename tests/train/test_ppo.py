"""PPO and DPO reach optima that are known: of a two-armed choice, and of a model whose texts can be written down."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdpo.config import PPOOptions, SamplingConfig
from jaxdpo.generate.sampler import sample
from jaxdpo.generate.stops import Stops
from jaxdpo.losses import dpo_loss
from jaxdpo.sharding import make_mesh
from jaxdpo.theory import optimal_policy
from jaxdpo.train.ppo import ppo_step
from jaxdpo.train.ppo_programs import init_ppo_state, make_ppo_programs
from jaxdpo.train.rollout import cut_off, gather_experience, rollout_groups, rollout_layout
from tests import tiny
from tests.enumerable import EOS, Problem, divergence

ARMS = Problem(vocab=2, longest=1, rewards=(0.0, 1.0))
TEXTS = Problem(vocab=4, longest=2, rewards=(0.0, 1.2, -0.6, 0.9, 0.3, -1.3, -0.4, 1.3, 0.1, -0.3, 0.6, 0.5, 0.4))
BETA = 0.5


class Trained(NamedTuple):
    """What became of a policy."""

    logps: np.ndarray
    """`[steps + 1, completions]`: of all texts, before the first step and after each."""
    metrics: list[dict]
    """Of each step."""
    optimum: np.ndarray
    """`[completions]` log-probs of the policy that is sought."""


@functools.cache
def setup(problem: Problem, updates: int):
    """Optimizer, whose rate falls to 0, and programs of a problem."""
    decoder, mesh = problem.decoder, make_mesh(jax.devices()[:1])
    optimizer = optax.adam(optax.linear_schedule(1e-2, 0, updates))
    state = init_ppo_state(decoder, tiny.params(decoder, mesh), optimizer, mesh, 0.0)
    return mesh, optimizer, make_ppo_programs(decoder, optimizer, jax.tree.map(lambda x: x.sharding, state))


def train(problem: Problem, options: PPOOptions, *, steps: int, count: int) -> Trained:
    """So many steps, each on so many completions that are drawn from the policy exactly."""
    mesh, optimizer, programs = setup(problem, steps * options.num_ppo_epochs)
    policy, reference = (tiny.params(problem.decoder, mesh) for _ in range(2))
    state = init_ppo_state(problem.decoder, policy, optimizer, mesh, options.kl_coef)
    layout = rollout_layout(1, problem.longest, microbatch_tokens=512)
    rng, all_logps = np.random.default_rng(0), jax.jit(problem.logps)
    logps, metrics = [np.asarray(all_logps(reference))], []
    for step in range(steps):
        numbers = problem.drawn(logps[-1], count, rng)
        data = rollout_groups([problem.prompt], [problem.written(numbers)])
        scores = np.array(problem.rewards)[numbers]
        state, of_step = ppo_step(programs, state, reference, data, scores, layout, options, seed=step)
        metrics.append(of_step)
        logps.append(np.asarray(all_logps(state.params["policy"])))
    optimum = optimal_policy(logps[0], np.array(problem.rewards), beta=BETA)
    return Trained(np.stack(logps), metrics, np.asarray(optimum))


def test_a_samplers_log_probs_are_those_that_are_learnt_from():
    mesh, _, programs = setup(TEXTS, 200)
    prompts, options = [[0], [2, 3, 1, 0]], PPOOptions()
    policy, reference = (tiny.params(TEXTS.decoder, mesh) for _ in range(2))
    config = SamplingConfig(num_samples=8, max_new_tokens=5)
    drawn = sample(TEXTS.decoder, policy, prompts, config, Stops(eos=(EOS,)), mesh=mesh)
    data = rollout_groups(prompts, drawn)
    assert set(cut_off(data).tolist()) == {False, True}
    state = init_ppo_state(TEXTS.decoder, policy, optax.adam(1.0), mesh, 0.0)
    layout = rollout_layout(4, 5, microbatch_tokens=512)
    with jax.set_mesh(mesh):
        found = gather_experience(programs, state, reference, data, np.zeros(16), layout, options)
    for row, completion in enumerate([*drawn[0], *drawn[1]]):
        assert found.where[row].sum() == len(completion.ids)
        np.testing.assert_allclose(found.logps[row, : len(completion.ids)], completion.logps, rtol=1e-4, atol=1e-5)
        assert (completion.ids[-1] == EOS) != cut_off(data)[row]


def test_the_better_of_two_arms_is_taken():
    found = train(ARMS, PPOOptions(kl_coef=0.0, num_ppo_epochs=2), steps=40, count=64)
    better = np.exp(found.logps[:, 1])
    assert better[0] < 0.7 and better[-1] > 0.98


def test_a_penalty_keeps_the_better_arm_at_its_optimum():
    found = train(ARMS, PPOOptions(kl_coef=BETA, num_ppo_epochs=2), steps=40, count=64)
    better, optimum = np.exp(found.logps[:, 1]), np.exp(found.optimum[1])
    assert abs(better[0] - optimum) > 0.2  # the optimum is neither the reference's probability nor 1
    assert abs(better[-1] - optimum) < 0.02
    assert found.metrics[-1]["objective/kl"] > 0.1


def test_a_language_model_approaches_its_optimum():
    options = PPOOptions(kl_coef=BETA)
    found = train(TEXTS, options, steps=50, count=128)
    apart = [float(divergence(logps, found.optimum)) for logps in found.logps]
    assert apart[0] > 0.3
    assert apart[-1] < 0.01 and apart[-1] < apart[10] < apart[0]


def dpo_divergences(weights: np.ndarray) -> np.ndarray:
    """KL(policy || optimum) after DPO on pairs of completions, each counted by its weight.

    Args:
      weights: `[data sets, completions, completions]`; the first of a pair is the preferred one.
    Returns:
      `[data sets]` nats.
    """
    reference = tiny.params(TEXTS.decoder)
    ref_logps, optimizer = TEXTS.logps(reference), optax.adam(optax.linear_schedule(1e-2, 0, 300))

    def all_pairs(logps: jax.Array) -> jax.Array:
        return jnp.stack(jnp.broadcast_arrays(logps[:, None], logps[None]), axis=-1)

    def loss(params: dict, weight: jax.Array) -> jax.Array:
        losses = dpo_loss(all_pairs(TEXTS.logps(params)), all_pairs(ref_logps), beta=BETA)
        return (weight * losses).sum() / weight.sum()

    def step(carry: tuple, _: None) -> tuple:
        params, opt_state, weight = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(params, weight), opt_state)
        return (optax.apply_updates(params, updates), opt_state, weight), None

    def fit(weight: jax.Array) -> jax.Array:
        (params, _, _), _ = jax.lax.scan(step, (reference, optimizer.init(reference), weight), None, length=300)
        return divergence(TEXTS.logps(params), optimal_policy(ref_logps, np.array(TEXTS.rewards), beta=BETA))

    return np.asarray(jax.jit(lambda weights: jax.lax.map(fit, weights))(jnp.asarray(weights, jnp.float32)))


def test_dpo_approaches_the_same_optimum_as_its_data_grow():
    """Pairs are drawn from the reference and labelled by Bradley-Terry; at last their probabilities are the data."""
    rewards = np.array(TEXTS.rewards)
    drawn = np.exp(np.asarray(TEXTS.logps(tiny.params(TEXTS.decoder)), np.float64))
    wins = 1 / (1 + np.exp(rewards - rewards[:, None]))  # [completions, completions] how often the first is preferred
    exact = drawn[:, None] * drawn * wins * ~np.eye(len(drawn), dtype=bool)
    exact /= exact.sum()
    rng = np.random.default_rng(0)
    samples = [rng.multinomial(pairs, exact.ravel()) for pairs in (100, 1000, 10000) for _ in range(4)]
    found = dpo_divergences(np.stack([*samples, exact.ravel()]).reshape(-1, *exact.shape))
    few, more, many = found[:-1].reshape(3, 4).mean(axis=1)
    assert few / 2 > more > 2 * many  # theory: as 1 / pairs
    assert abs(found[-1]) < 1e-3
