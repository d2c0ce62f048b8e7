"""Rewards of tokens: where the score stands, what the KL penalty sums up to, whitening, and the controller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import next_kl_coef, token_rewards, whiten
from jaxdpo.types import InputError

RNG = np.random.default_rng(0)
LOGPS, REFERENCE = RNG.standard_normal((2, 3, 5)).astype(np.float32)
SCORES = np.array([2.0, -1.0, 4.0], np.float32)
LENGTHS = np.array([5, 3, 1])
REAL = np.arange(5) < LENGTHS[:, None]


def test_the_score_stands_at_the_last_real_token():
    rewards = token_rewards(SCORES, LOGPS, LOGPS, where=REAL)
    expected = np.zeros((3, 5))
    expected[[0, 1, 2], LENGTHS - 1] = SCORES
    np.testing.assert_array_equal(rewards, expected)


def test_rewards_sum_up_to_the_score_less_the_penalty():
    rewards = token_rewards(SCORES, LOGPS, REFERENCE, kl_coef=0.3, where=REAL)
    expected = SCORES - 0.3 * np.where(REAL, LOGPS - REFERENCE, 0).sum(axis=1)
    np.testing.assert_allclose(rewards.sum(axis=1), expected, rtol=1e-5)


def test_padding_is_silent():
    padded = [np.where(REAL, x, np.nan) for x in (LOGPS, REFERENCE)]
    np.testing.assert_array_equal(
        token_rewards(SCORES, *padded, where=REAL), token_rewards(SCORES, LOGPS, REFERENCE, where=REAL)
    )
    np.testing.assert_array_equal(whiten(padded[0], where=REAL), whiten(LOGPS, where=REAL))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_over_all_real_tokens(shift_mean):
    white = np.asarray(whiten(LOGPS, shift_mean=shift_mean, where=REAL))
    assert (white[~REAL] == 0).all()
    np.testing.assert_allclose(white[REAL].std(), 1, rtol=1e-5)
    np.testing.assert_allclose(white[REAL].mean(), 0 if shift_mean else LOGPS[REAL].mean(), atol=1e-6)


def test_equal_numbers_are_not_blown_up():
    np.testing.assert_allclose(whiten(jnp.full(4, 3.0)), 0, atol=1e-6)
    assert not np.asarray(whiten(LOGPS, where=np.zeros_like(REAL))).any()


@pytest.mark.parametrize(("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2)])
def test_the_coefficient_follows_the_clipped_error(kl, error):
    following = next_kl_coef(0.05, kl, target=6.0, horizon=1000, completions=64)
    np.testing.assert_allclose(following, 0.05 * (1 + error * 64 / 1000), rtol=1e-5)


def test_a_controlled_divergence_settles_at_its_target():
    """For a policy that is always at its optimum, whose divergence falls as the penalty grows."""

    def step(kl_coef, _):
        kl = 1 / kl_coef
        return next_kl_coef(kl_coef, kl, target=4.0, horizon=300, completions=50), kl

    _, divergences = jax.lax.scan(step, jnp.float32(2.0), None, length=400)
    np.testing.assert_allclose(divergences[-1], 4.0, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_rewards(SCORES[:2], LOGPS, REFERENCE), r"scores have shape \(2,\).*allowed: \(3,\)"),
        (lambda: token_rewards(SCORES, LOGPS, REFERENCE[:, :4]), r"ref_logps has shape \(3, 4\)"),
        (lambda: token_rewards(SCORES, LOGPS, REFERENCE, kl_coef=-0.1), "kl_coef=-0.1 is out of range"),
        (lambda: next_kl_coef(0.1, 1.0, target=0.0, completions=4), "target=0.0 is out of range"),
        (lambda: next_kl_coef(0.1, 1.0, target=1.0, horizon=0, completions=4), "horizon=0 is out of range"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
