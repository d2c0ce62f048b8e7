"""Bradley-Terry: values as formulas, identities of the model, extremes, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import bradley_terry_loss


def test_equals_negative_log_sigmoid_of_the_difference():
    actual = bradley_terry_loss(jnp.array([[2.0, 0.0], [0.0, 2.0], [7.0, 7.0]]))
    np.testing.assert_allclose(actual, [np.log(1 + np.exp(-2)), np.log(1 + np.exp(2)), np.log(2)], rtol=1e-6)


def test_margin_is_subtracted_from_the_difference():
    actual = bradley_terry_loss(jnp.array([[2.0, 0.0], [0.5, 1.0]]), margin=jnp.array([1.5, 0.0]))
    np.testing.assert_allclose(actual, np.log1p(np.exp([-0.5, 0.5])), rtol=1e-6)


def test_centering_adds_the_squared_sum():
    rewards = jnp.array([[2.0, 0.5], [-3.0, 3.0]])
    actual = bradley_terry_loss(rewards, center_rewards_coefficient=0.01) - bradley_terry_loss(rewards)
    np.testing.assert_allclose(actual, [0.01 * 2.5**2, 0], rtol=1e-5)


def test_label_smoothing_is_the_expectation_over_the_flipped_label():
    rewards = jnp.array([[2.0, 0.5], [-3.0, 3.0], [1e4, -1e4], [-1e4, 1e4]])
    actual = bradley_terry_loss(rewards, label_smoothing=0.2)
    expected = 0.8 * bradley_terry_loss(rewards) + 0.2 * bradley_terry_loss(rewards[:, ::-1])
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_smoothed_loss_is_least_where_the_model_believes_the_smoothing():
    logit = jnp.log(0.8 / 0.2)  # sigmoid(logit) = 1 - label_smoothing
    slope = jax.grad(lambda m: bradley_terry_loss(jnp.array([1.0, 0.0]) * m, label_smoothing=0.2))(logit)
    np.testing.assert_allclose(slope, 0, atol=1e-7)


def test_invariant_to_a_constant_added_to_both_rewards():
    rewards = jnp.array([[2.0, 0.5], [-3.0, 3.0]])
    np.testing.assert_allclose(bradley_terry_loss(rewards + 8), bradley_terry_loss(rewards), rtol=1e-6)


def test_probabilities_of_both_orders_sum_to_one():
    rewards = jnp.array([[2.0, 0.5], [-3.0, 3.0], [40.0, -40.0]])
    both = jnp.exp(-bradley_terry_loss(rewards)) + jnp.exp(-bradley_terry_loss(rewards[:, ::-1]))
    np.testing.assert_allclose(both, 1, rtol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_extreme_rewards_have_finite_exact_loss_and_gradient(label_smoothing, centering):
    def loss(rewards):
        return bradley_terry_loss(rewards, label_smoothing=label_smoothing, center_rewards_coefficient=centering)

    rewards = jnp.array([[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4]])
    squares = centering * np.array([0, 0, 2e4]) ** 2
    likelihood = np.array([label_smoothing * 2e4, (1 - label_smoothing) * 2e4, np.log(2)])
    np.testing.assert_allclose(loss(rewards), squares + likelihood, rtol=1e-6)
    slope = np.array([label_smoothing, label_smoothing - 1, label_smoothing - 0.5])  # of the loss in the difference
    pull = 2 * centering * np.array([0, 0, 2e4])
    gradient = jax.grad(lambda r: loss(r).sum())(rewards)
    np.testing.assert_allclose(gradient, np.stack([pull + slope, pull - slope], axis=-1), rtol=1e-6)


@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, -jnp.inf])
def test_incomplete_pairs_are_silent_whatever_they_hold(garbage):
    rewards = jnp.array([[2.0, 0.0], [1.0, garbage], [garbage, garbage], [garbage, 1.0]])
    exists = jnp.array([[True, True], [True, False], [False, False], [False, True]])
    margin = jnp.array([0.5, garbage, garbage, garbage])

    def loss(rewards, margin, options):
        return bradley_terry_loss(rewards, margin=margin, where=exists, **options)

    options = {"center_rewards_coefficient": 0.01, "label_smoothing": 0.1}
    np.testing.assert_array_equal(loss(rewards, margin, options)[1:], 0)
    complete = bradley_terry_loss(rewards[0], margin=margin[0], **options)
    np.testing.assert_array_equal(loss(rewards, margin, options)[0], complete)
    gradients = jax.grad(lambda *args: loss(*args).sum(), argnums=(0, 1, 2))(rewards, margin, options)
    np.testing.assert_array_equal(gradients[0][1:], 0)
    np.testing.assert_array_equal(gradients[1][1:], 0)
    assert all(np.isfinite(gradient) for gradient in gradients[2].values())
