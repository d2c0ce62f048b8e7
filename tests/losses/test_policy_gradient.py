"""Pieces of PPO: formulas, what is clipped and what is constant, advantages against their definition, estimators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxdpo.losses import KL_ESTIMATORS, entropy, generalized_advantages, kl_k1, kl_k3, ppo_policy_loss, ppo_value_loss
from jaxdpo.losses.policy_gradient import MAX_LOG_RATIO
from jaxdpo.types import InputError

A, B, C = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32)
REAL = np.arange(5) < np.array([[5], [3]])
PIECES = [ppo_policy_loss, ppo_value_loss]


def test_policy_loss_is_the_pessimistic_of_two():
    ratio = np.exp(A - B)
    expected = np.maximum(-ratio * C, -np.clip(ratio, 0.8, 1.2) * C)
    np.testing.assert_allclose(ppo_policy_loss(A, B, C), expected, rtol=1e-5)


def test_policy_gradient_ends_where_following_the_advantage_has_gone_far_enough():
    ratios, gains = np.array([0.5, 0.5, 1.1, 1.5, 1.5]), np.array([1.0, -1.0, 1.0, 1.0, -1.0])
    slope = jax.grad(lambda logps: ppo_policy_loss(logps, jnp.zeros(5), gains, clip_range=0.2).sum())(jnp.log(ratios))
    expected = -ratios * gains * np.array([1, 0, 1, 0, 1])
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_value_loss_is_the_pessimistic_of_two():
    expected = np.maximum((A - C) ** 2, (B + np.clip(A - B, -0.3, 0.3) - C) ** 2) / 2
    np.testing.assert_allclose(ppo_value_loss(A, B, C, clip_range=0.3), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", PIECES)
def test_only_the_new_numbers_have_a_gradient(loss):
    by_new, *by_constants = jax.grad(lambda *arrays: loss(*arrays).sum(), argnums=(0, 1, 2))(A, B, C)
    assert (by_new != 0).any()
    for gradient in by_constants:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("loss", PIECES)
def test_padding_is_silent(loss):
    padded = [np.where(REAL, x, np.nan) for x in (A, B, C)]
    np.testing.assert_array_equal(loss(*padded, where=REAL), np.where(REAL, loss(A, B, C), 0))
    gradient = jax.grad(lambda new: loss(new, *padded[1:], where=REAL).sum())(padded[0])
    np.testing.assert_array_equal(gradient, np.where(REAL, jax.grad(lambda new: loss(new, B, C).sum())(A), 0))


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_advantages_sum_decayed_surprises(discount, gae_lambda):
    advantages, returns = generalized_advantages(
        np.where(REAL, A, np.nan), np.where(REAL, B, np.nan), discount=discount, gae_lambda=gae_lambda, where=REAL
    )
    expected = np.zeros_like(A)
    for row, length in enumerate(REAL.sum(axis=-1)):
        rewards, values = A[row, :length], np.append(B[row, :length], 0)
        surprises = rewards + discount * values[1:] - values[:-1]
        for t in range(length):
            expected[row, t] = ((discount * gae_lambda) ** np.arange(length - t) * surprises[t:]).sum()
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, expected + np.where(REAL, B, 0), rtol=1e-5, atol=1e-6)


def test_trusting_rewards_alone_returns_are_what_was_earned():
    _, returns = generalized_advantages(A, B, discount=0.9, gae_lambda=1.0)
    earned = [sum(0.9**k * A[:, t + k] for k in range(5 - t)) for t in range(5)]
    np.testing.assert_allclose(returns, np.stack(earned, axis=-1), rtol=1e-5, atol=1e-6)


def test_advantages_on_devices():
    rewards, values = np.random.default_rng(1).standard_normal((2, 8, 2, 5)).astype(np.float32)
    whole = generalized_advantages(rewards, values)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("rows")
    mapped = jax.shard_map(generalized_advantages, mesh=mesh, in_specs=spec, out_specs=spec)
    for fn in (jax.jit(mapped), jax.pmap(generalized_advantages)):
        for ours, expected in zip(fn(rewards, values), whole, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_estimators_of_the_divergence_by_their_formulas():
    ratio = np.exp(B - A)
    expected = {"k1": A - B, "k2": (A - B) ** 2 / 2, "k3": ratio - 1 - np.log(ratio)}
    assert list(KL_ESTIMATORS) == list(expected)
    for name, estimator in KL_ESTIMATORS.items():
        np.testing.assert_allclose(estimator(A, B), expected[name], rtol=1e-5, atol=1e-6)
        masked = estimator(np.where(REAL, A, np.nan), np.where(REAL, B, np.inf), where=REAL)
        np.testing.assert_array_equal(masked, np.where(REAL, estimator(A, B), 0))


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_unbiased_estimators_average_to_the_divergence(estimator):
    policy, reference = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.3, 0.1])
    of_tokens = estimator(np.log(policy), np.log(reference))
    np.testing.assert_allclose((policy * of_tokens).sum(), (policy * np.log(policy / reference)).sum(), rtol=1e-6)


def test_gradient_of_k2_averages_to_that_of_the_divergence():
    logits, reference = jnp.array([0.3, -1.0, 0.5]), jnp.log(jnp.array([0.6, 0.3, 0.1]))

    def divergence(logits):
        logps = jax.nn.log_softmax(logits)
        return (jnp.exp(logps) * (logps - reference)).sum()

    def estimate(logits):
        logps = jax.nn.log_softmax(logits)
        return (jax.lax.stop_gradient(jnp.exp(logps)) * KL_ESTIMATORS["k2"](logps, reference)).sum()

    np.testing.assert_allclose(jax.grad(estimate)(logits), jax.grad(divergence)(logits), rtol=1e-5)


@pytest.mark.parametrize("vocab", [1, 2, 7])
def test_entropy_of_equally_likely_tokens(vocab):
    np.testing.assert_allclose(entropy(jnp.full((2, vocab), 3.0)), np.full(2, np.log(vocab)), rtol=1e-6, atol=1e-7)


def test_entropy_is_that_of_the_softmax():
    p = np.exp(A) / np.exp(A).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(entropy(A), -(p * np.log(p)).sum(axis=-1), rtol=1e-5)


def test_barred_tokens_have_no_part_in_the_entropy():
    barred = jnp.array([0.3, -jnp.inf, 1.0])
    value, gradient = jax.value_and_grad(entropy)(barred)
    expected, slope = jax.value_and_grad(entropy)(barred[np.array([0, 2])])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, [slope[0], 0, slope[1]], rtol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_are_finite(sign):
    far, near = sign * jnp.array([1e4, -1e4]), jnp.zeros(2)
    advantages = jnp.array([1.0, 1.0])
    functions = [*KL_ESTIMATORS.values()]
    functions += [functools.partial(ppo_policy_loss, advantages=s * advantages) for s in (1, -1)]
    functions += [functools.partial(ppo_value_loss, returns=advantages)]
    for fn in functions:
        value, gradient = jax.value_and_grad(lambda x, fn=fn: fn(x, near).sum())(far)
        assert jnp.isfinite(value)
        assert jnp.isfinite(gradient).all()
    value, gradient = jax.value_and_grad(entropy)(far)
    np.testing.assert_array_equal([value, *gradient], 0)
    np.testing.assert_allclose(kl_k3(near, near + 1e4), np.expm1(MAX_LOG_RATIO) - 1e4, rtol=1e-6)


def test_dtypes():
    half = [x.astype(jnp.bfloat16) for x in (A, B, C)]
    assert ppo_policy_loss(*half).dtype == entropy(half[0]).dtype == jnp.float32
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert generalized_advantages(A.astype(np.float64), B)[0].dtype == jnp.float64
        assert entropy(A.astype(np.float64)).dtype == jnp.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ppo_policy_loss(A, B[0], C), r"old_logps has shape \(5,\), logps has \(2, 5\); allowed: equal shapes"),
        (lambda: kl_k1(A, B, where=REAL[0]), r"where is bool of shape \(5,\); allowed: bool of the shape of logps"),
        (lambda: kl_k1(A, B, where=REAL.astype(int)), r"where is int32 of shape \(2, 5\); allowed: bool"),
        (lambda: ppo_policy_loss(A, B, C, clip_range=0), r"clip_range=0 is out of range; allowed: above 0"),
        (lambda: generalized_advantages(A, B, discount=1.1), r"discount=1.1 is out of range; allowed: 0 to 1"),
        (lambda: generalized_advantages(A, B, gae_lambda=-1), r"gae_lambda=-1 is out of range; allowed: 0 to 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
