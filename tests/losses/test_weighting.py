"""WPO's weights and length-desensitised sums: formulas, masks, clamps, constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import dpo_loss, length_desensitized_logps, wpo_weights
from jaxdpo.losses.weighting import MAX_LOG_WEIGHT
from jaxdpo.types import InputError

LENGTHS = np.array([[4, 2, 3], [1, 4, 2]])
TOKENS = -np.random.default_rng(0).random((2, 3, 5)).astype(np.float32)
WHERE = np.array([[True, False, True], [True, True, False]])


def test_weight_is_the_product_of_geometric_means():
    logps, own = np.log([[0.5, 0.2], [0.1, 0.4]]), np.log([[0.25, 0.4], [0.2, 0.1]])
    actual = wpo_weights(logps, log_sum_sq_probs=own, lengths=np.array([[1, 1], [2, 3]]))
    expected = [(0.5 / 0.25) * (0.2 / 0.4), (0.1 / 0.2) ** (1 / 2) * (0.4 / 0.1) ** (1 / 3)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_weight_of_a_uniform_policy_is_one():
    logps = LENGTHS * np.log(1 / 7)  # and 7 * (1 / 7)**2 = 1 / 7
    np.testing.assert_allclose(wpo_weights(logps, log_sum_sq_probs=logps, lengths=LENGTHS), [1, 1])


def test_weight_leaves_out_candidates_that_do_not_exist():
    logps, own = -np.random.default_rng(1).random((2, 2, 3))
    masked = wpo_weights(
        np.where(WHERE, logps, np.nan), log_sum_sq_probs=np.where(WHERE, own, np.nan), lengths=LENGTHS, where=WHERE
    )
    expected = np.exp(((logps - own) / LENGTHS * WHERE).sum(axis=-1))
    np.testing.assert_allclose(masked, expected, rtol=1e-6)
    empty = wpo_weights(logps, log_sum_sq_probs=own, lengths=LENGTHS, where=np.zeros_like(WHERE))
    np.testing.assert_array_equal(empty, [1, 1])


def test_weight_is_a_constant():
    logps, own, lengths = jnp.array([-3.0, -5.0]), jnp.array([-2.0, -3.0]), jnp.array([2, 3])

    def weighted(logps):
        return wpo_weights(logps, log_sum_sq_probs=own, lengths=lengths) * dpo_loss(logps, None)

    weight = np.exp(-1 / 2 - 2 / 3)
    np.testing.assert_allclose(jax.grad(weighted)(logps), weight * jax.grad(dpo_loss)(logps, None), rtol=1e-6)


def test_weight_is_clamped_far_from_what_a_model_gives():
    logps = jnp.array([[1e4, 1e4], [-1e4, -1e4]])
    weights = wpo_weights(logps, log_sum_sq_probs=-logps, lengths=jnp.ones((2, 2)))
    np.testing.assert_allclose(weights, np.exp([MAX_LOG_WEIGHT, -MAX_LOG_WEIGHT]), rtol=1e-5)
    assert np.isfinite(weights**2).all()


@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
def test_tail_begins_behind_the_shortest(ld_alpha):
    actual = length_desensitized_logps(TOKENS, lengths=LENGTHS, ld_alpha=ld_alpha)
    shared = np.array([2, 1])
    expected = [
        [TOKENS[g, c, : shared[g]].sum() + ld_alpha * TOKENS[g, c, shared[g] : LENGTHS[g, c]].sum() for c in range(3)]
        for g in range(2)
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_absent_candidates_and_padding_are_silent():
    real = WHERE[..., None] & (np.arange(5) < LENGTHS[..., None])
    tokens = np.where(real, TOKENS, np.nan)

    def total(tokens):
        return length_desensitized_logps(tokens, lengths=LENGTHS, ld_alpha=0.5, where=WHERE).sum()

    value, gradient = jax.value_and_grad(total)(tokens)
    weights = np.where(np.arange(5) < np.array([3, 1])[:, None, None], 1, 0.5)  # the shortest that exist: 3 and 1
    np.testing.assert_allclose(value, np.where(real, weights * TOKENS, 0).sum(), rtol=1e-6)
    np.testing.assert_array_equal(gradient, np.where(real, weights, 0))


def test_a_lone_completion_has_no_tail():
    actual = length_desensitized_logps(TOKENS[0, :1], lengths=LENGTHS[0, :1], ld_alpha=0.0)
    np.testing.assert_allclose(actual, [TOKENS[0, 0, :4].sum()], rtol=1e-6)


def test_dtypes():
    assert length_desensitized_logps(TOKENS.astype(np.float16), lengths=LENGTHS).dtype == jnp.float32
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert length_desensitized_logps(TOKENS.astype(np.float64), lengths=LENGTHS).dtype == jnp.float64
        assert length_desensitized_logps(TOKENS, lengths=LENGTHS.astype(np.int64)).dtype == jnp.float32
        logps = TOKENS.sum(axis=-1).astype(np.float64)
        assert wpo_weights(logps, log_sum_sq_probs=logps, lengths=LENGTHS).dtype == jnp.float64


def test_bad_input():
    with pytest.raises(InputError, match=r"ld_alpha=1.5 is out of range; allowed: 0 to 1"):
        length_desensitized_logps(TOKENS, lengths=LENGTHS, ld_alpha=1.5)
    for tokens in (TOKENS[:, :2], TOKENS[..., 0], TOKENS[None]):
        with pytest.raises(InputError, match=r"token_logps has shape \(.*\), lengths \(2, 3\); allowed: \[..., cand"):
            length_desensitized_logps(tokens, lengths=LENGTHS)
    with pytest.raises(InputError, match=r"lengths has shape \(2,\), policy_logps has \(2, 3\)"):
        wpo_weights(TOKENS[..., 0], log_sum_sq_probs=TOKENS[..., 0], lengths=LENGTHS[:, 0])
