"""Scores of f-divergences: formulas, the limit of alpha, clamps, and their place in a loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses.divergences import DIVERGENCES, alpha_divergence, forward_kl, js_divergence, reverse_kl
from jaxdpo.losses.preference import dpo_loss
from jaxdpo.types import InputError

LOG_RATIOS = np.concatenate([np.linspace(-30, 30, 61), [1e-3, -1e-5]])
ALPHAS = (-1.0, 0.0, 0.3, 0.5, 0.9, 0.999, 1.001, 1.5, 2.0)
SCORES = {**DIVERGENCES, **{f"alpha={a}": functools.partial(alpha_divergence, alpha=a) for a in (0.0, 1.0, 2.0)}}
every_score = pytest.mark.parametrize("score", [pytest.param(score, id=name) for name, score in SCORES.items()])


def in_float64(score, log_ratios, **options):
    with jax.enable_x64(True):
        values = score(np.asarray(log_ratios, np.float64), **options)
        assert values.dtype == jnp.float64
        return np.asarray(values)


def test_formulas():
    ratio = np.exp(LOG_RATIOS)
    np.testing.assert_array_equal(in_float64(reverse_kl, LOG_RATIOS), LOG_RATIOS)
    np.testing.assert_allclose(in_float64(forward_kl, LOG_RATIOS), 1 - 1 / ratio, rtol=1e-10)
    np.testing.assert_allclose(in_float64(js_divergence, LOG_RATIOS), np.log(2 * ratio / (1 + ratio)), rtol=1e-10)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_formula(alpha):
    expected = (np.exp((alpha - 1) * LOG_RATIOS) - 1) / (alpha - 1)
    np.testing.assert_allclose(in_float64(alpha_divergence, LOG_RATIOS, alpha=alpha), expected, rtol=1e-7, atol=1e-12)
    moderate = LOG_RATIOS[np.abs(LOG_RATIOS) <= 10].astype(np.float32)
    expected = in_float64(alpha_divergence, moderate, alpha=alpha)
    np.testing.assert_allclose(alpha_divergence(moderate, alpha=alpha), expected, rtol=3e-6)


@pytest.mark.parametrize("alpha", [0.999, 1 - 1e-5, 1 + 1e-6])
def test_alpha_near_1_keeps_its_digits_in_float32(alpha):
    log_ratios = np.linspace(-2000, 2000, 41)
    expected = np.expm1((alpha - 1) * log_ratios) / (alpha - 1)
    np.testing.assert_allclose(alpha_divergence(log_ratios.astype(np.float32), alpha=alpha), expected, rtol=1e-6)


def test_alpha_0_is_forward_kl():
    np.testing.assert_allclose(alpha_divergence(LOG_RATIOS, alpha=0.0), forward_kl(LOG_RATIOS), rtol=1e-6)


def test_alpha_1_is_reverse_kl_traced_or_not():
    log_ratios = jnp.asarray(LOG_RATIOS, jnp.float32)
    np.testing.assert_array_equal(alpha_divergence(log_ratios, alpha=1), log_ratios)
    np.testing.assert_array_equal(jax.jit(alpha_divergence)(log_ratios, alpha=1.0), log_ratios)
    slopes = jax.jit(jax.grad(lambda x, alpha: alpha_divergence(x, alpha=alpha).sum()))(log_ratios, 1.0)
    np.testing.assert_array_equal(slopes, np.ones_like(LOG_RATIOS))


@pytest.mark.parametrize("exponent", [-16, -12, -8, -6, -4, -2])
@pytest.mark.parametrize("sign", [-1, 1])
def test_alpha_near_1_goes_to_reverse_kl_without_noise(exponent, sign):
    gap = sign * 10.0**exponent
    expected = LOG_RATIOS + gap * LOG_RATIOS**2 / 2 + gap**2 * LOG_RATIOS**3 / 6  # of (e^(gap l) - 1) / gap
    error = 2 * gap**3 * LOG_RATIOS**4 / 24
    with jax.enable_x64(True):
        for alpha in (1 + gap, jnp.asarray(1 + gap)):
            rounding = 2.0**-52 * LOG_RATIOS**2  # of 1 + gap
            actual = alpha_divergence(LOG_RATIOS, alpha=alpha)
            assert (np.abs(actual - expected) <= np.abs(error) + rounding + 1e-14 * np.abs(LOG_RATIOS)).all()
    single = alpha_divergence(LOG_RATIOS.astype(np.float32), alpha=1 + gap)
    assert (np.abs(single - expected) <= np.abs(error) + 1e-6 * np.abs(LOG_RATIOS)).all()


@every_score
def test_the_score_of_the_reference_is_zero_and_scores_rise(score):
    assert score(0.0) == 0
    assert (np.diff(in_float64(score, np.linspace(-20, 20, 41))) > 0).all()


@every_score
def test_extreme_log_ratios_are_finite(score):
    extreme = jnp.array([1e4, -1e4, 2e4, -2e4, 81.0, -81.0])
    assert np.isfinite(score(extreme)).all()
    assert np.isfinite(jax.grad(lambda x: score(x).sum())(extreme)).all()


@pytest.mark.parametrize(
    ("score", "edge", "size"),
    [
        (forward_kl, -80, np.exp(80)),
        (SCORES["alpha=2.0"], 80, np.exp(80)),
        (functools.partial(alpha_divergence, alpha=0.5), -160, np.exp(80) / 0.5),
    ],
)
def test_exponents_are_clamped_at_80(score, edge, size):
    before, at_edge, beyond = (abs(in_float64(score, factor * edge)) for factor in (0.99, 1, 1.5))
    assert before < at_edge == beyond
    np.testing.assert_allclose(at_edge, size)
    assert jax.grad(score)(1.5 * edge) == 0


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_scores_at_the_clamp_are_equal_to_the_last_digit(transform):
    """A product of float32 that is contracted with a subtraction is off by 1e26 here."""
    divergence = functools.partial(alpha_divergence, alpha=0.3)
    policy = jnp.array([[-127.9, -691.1], [-500.0, -300.0]])
    loss = transform(lambda policy: dpo_loss(policy, jnp.zeros_like(policy), divergence=divergence))
    np.testing.assert_array_equal(loss(policy), jax.nn.softplus(jnp.zeros(2)))


@every_score
def test_scores_are_at_least_float32(score):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.int32):
        assert score(jnp.ones(3, dtype)).dtype == jnp.float32


def test_a_sweep_of_alpha_compiles_once():
    traces = []
    policy, ref = jnp.array([-12.0, -15.0]), jnp.array([-13.0, -14.0])

    @jax.jit
    def loss(alpha):
        traces.append(1)
        return dpo_loss(policy, ref, divergence=functools.partial(alpha_divergence, alpha=alpha))

    for alpha in (0.0, 0.5, 1.0):
        margin = 0.1 * np.subtract(*in_float64(alpha_divergence, policy - ref, alpha=alpha))
        np.testing.assert_allclose(loss(alpha), np.log1p(np.exp(-margin)), rtol=1e-6)
    assert len(traces) == 1


def test_a_score_of_ones_own():
    policy, ref = jnp.array([-12.0, -15.0]), jnp.array([-13.0, -14.0])
    np.testing.assert_allclose(
        dpo_loss(policy, ref, beta=0.1, divergence=lambda log_ratio: log_ratio**3 + log_ratio),
        np.log1p(np.exp(-0.1 * (2 + 2))),
        rtol=1e-6,
    )


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(InputError, match=r"alpha=\w+ is out of range; allowed: a finite number"):
        alpha_divergence(0.0, alpha=alpha)
