"""IPO and length-normalized DPO: formulas, what lengths do, extremes, masks, messages."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses.divergences import DIVERGENCES
from jaxdpo.losses.length_normalized import ipo_loss, sigmoid_norm_loss
from jaxdpo.losses.preference import dpo_loss
from jaxdpo.types import InputError

FORMULAS = {
    ipo_loss: lambda margin, beta: (margin - 1 / (2 * beta)) ** 2,
    sigmoid_norm_loss: lambda margin, beta: np.logaddexp(0, -beta * margin),
}
"""Of the difference of scores per token."""
every_loss = pytest.mark.parametrize("loss", FORMULAS)


@every_loss
@pytest.mark.parametrize("name", DIVERGENCES)
def test_equals_the_formula_in_float64(loss, name):
    random = np.random.default_rng(0)
    policy, ref = -6 * random.random((2, 40, 2))
    lengths = random.integers(1, 30, (40, 2))
    with jax.enable_x64(True):
        margin = np.asarray(DIVERGENCES[name](policy - ref)) / lengths @ [1, -1]
        for beta in (0.01, 0.1, 5.0):
            actual = loss(policy, ref, lengths=lengths, beta=beta, divergence=DIVERGENCES[name])
            np.testing.assert_allclose(actual, FORMULAS[loss](margin, beta), rtol=1e-10)


def test_gradient_of_a_token_shrinks_with_the_length():
    lengths = jnp.array([4, 20])
    gradient = jax.grad(lambda p: sigmoid_norm_loss(p, None, lengths=lengths, beta=2.0))(jnp.array([-8.0, -40.0]))
    np.testing.assert_allclose(gradient, [-2 * 0.5 / 4, 2 * 0.5 / 20], rtol=1e-6)


def test_sigmoid_norm_of_one_token_each_is_dpo():
    policy, ref = -60 * np.random.default_rng(1).random((2, 9, 2), np.float32)
    ones = np.ones(policy.shape, np.int32)
    np.testing.assert_allclose(sigmoid_norm_loss(policy, ref, lengths=ones), dpo_loss(policy, ref), rtol=5e-6)


def test_ipo_is_least_at_a_finite_margin():
    lengths = jnp.array([10, 5])
    slope = jax.grad(lambda p: ipo_loss(p, None, lengths=lengths, beta=0.25))
    np.testing.assert_array_equal(slope(jnp.array([-10.0, -15.0])), 0)  # -1 less -3 per token is 1 / (2 * 0.25)


@every_loss
@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_log_probabilities_are_finite(loss, name):
    signs = jnp.array(list(itertools.product([-1.0, 1.0], repeat=4)))  # [16, 4]
    policy, ref = jnp.concatenate([150 * signs, 1e4 * signs]).reshape(2, 32, 2)
    lengths = jnp.tile(jnp.array([[1, 1], [1, 9], [9, 1], [9, 9]]), (8, 1))
    run = functools.partial(loss, lengths=lengths, divergence=DIVERGENCES[name])
    values, pullback = jax.vjp(run, policy, ref)
    assert np.isfinite(values).all()
    assert np.isfinite(pullback(jnp.ones(32))).all()


def test_ipo_clamps_the_deviation_that_it_squares():
    policy = jnp.array([-100.0, 0.0])
    loss = ipo_loss(policy, None, lengths=jnp.ones(2), divergence=DIVERGENCES["forward_kl"])
    np.testing.assert_allclose(loss, np.exp(80), rtol=1e-6)


@every_loss
def test_incomplete_pairs_are_silent_whatever_they_hold(loss):
    policy = jnp.array([[-3.0, -5.0], [-3.0, jnp.nan], [jnp.inf, -5.0], [jnp.nan, jnp.nan]])
    lengths = jnp.array([[2, 3], [2, 0], [0, 3], [0, 0]])
    exists = lengths > 0

    def total(policy, ref, beta):
        losses = loss(policy, ref, lengths=lengths, beta=beta, where=exists)
        return losses.sum(), losses

    grad = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, losses), gradients = grad(policy, policy + 1, 0.5)
    np.testing.assert_allclose(losses[0], loss(policy[0], policy[0] + 1, lengths=lengths[0], beta=0.5), rtol=1e-6)
    np.testing.assert_array_equal(losses[1:], 0)
    for gradient in gradients[:2]:
        np.testing.assert_array_equal(gradient[1:], 0)
    assert np.isfinite(gradients[2])


@every_loss
def test_lengths_do_not_widen_the_loss(loss):
    with jax.enable_x64(True):
        assert loss(np.zeros(2, np.float32), None, lengths=np.ones(2, np.float64)).dtype == jnp.float32
        assert loss(np.zeros(2), None, lengths=np.ones(2, np.int64)).dtype == jnp.float64


@every_loss
def test_lengths_are_one_per_candidate(loss):
    with pytest.raises(TypeError, match="lengths"):
        loss(jnp.zeros(2), None)
    with pytest.raises(InputError, match=r"lengths has shape \(1,\), policy_logps has \(2,\); allowed: equal"):
        loss(jnp.zeros(2), None, lengths=jnp.ones(1))


@every_loss
def test_three_candidates_are_refused(loss):
    with pytest.raises(InputError, match=r"3 candidates .* allowed: 2, chosen then rejected"):
        loss(jnp.zeros(3), None, lengths=jnp.ones(3))
