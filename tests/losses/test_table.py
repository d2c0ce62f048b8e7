"""What holds for every row of LOSSES: a new row is tested by being there."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import LOSSES

pytestmark = pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in LOSSES.items()])

GROUPS = 3
RTOL = 5e-6
"""Rewards of 0.1 * 60 round by 2.4e-7 in float32, so logits by up to 1e-6; fusion may move both."""
AT_REFERENCE = {"sigmoid": np.log(2)}
"""The loss where policy and reference agree, known on paper for every row."""


def make_logps(spec, *leading, dtype=np.float32, scale=60):
    """Policy log-probs and, where the loss needs them, reference log-probs `[*leading, GROUPS, candidates]`."""
    shape = (*leading, GROUPS, spec.candidates or 4)
    policy, ref = -scale * np.random.default_rng(0).random((2, *shape))
    return policy.astype(dtype), ref.astype(dtype) if spec.needs_reference else None


def gradient(spec, policy, ref, **options):
    return jax.grad(lambda policy: spec.fn(policy, ref, **options).sum())(policy)


def test_value_at_the_reference(spec):
    expected = {spec.fn: AT_REFERENCE[name] for name, spec in LOSSES.items()}[spec.fn]
    policy, _ = make_logps(spec)
    np.testing.assert_allclose(spec.fn(policy, policy), np.full(GROUPS, expected), rtol=1e-6)


def test_options_are_all_keywords_but_the_mask(spec):
    parameters = inspect.signature(spec.fn).parameters.values()
    keywords = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert set(keywords) == {*spec.options, "where"}
    assert keywords["where"].default is None
    positional = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    assert positional == ["policy_logps", "ref_logps"]


def test_eager_jit_vmap_and_pmap_agree(spec):
    devices = jax.local_device_count()
    policy, ref = make_logps(spec, devices)
    eager = spec.fn(policy, ref)
    assert eager.shape == (devices, GROUPS)
    np.testing.assert_allclose(jax.jit(spec.fn)(policy, ref), eager, rtol=RTOL)
    in_axes = (0, 0 if spec.needs_reference else None)
    np.testing.assert_allclose(jax.vmap(spec.fn, in_axes)(policy, ref), eager, rtol=RTOL)
    np.testing.assert_allclose(jax.pmap(spec.fn, in_axes=in_axes)(policy, ref), eager, rtol=RTOL)


def test_extreme_log_probabilities_are_finite(spec):
    policy, ref = make_logps(spec)
    policy = np.where(policy < np.median(policy), -1e4, 1e4).astype(np.float32)
    for sign in (1, -1):
        assert np.isfinite(spec.fn(sign * policy, ref)).all()
        assert np.isfinite(gradient(spec, sign * policy, ref)).all()


def test_all_masked_is_zero_without_gradient(spec):
    policy, _ = make_logps(spec)
    where, nothing = np.zeros(policy.shape, bool), np.full_like(policy, np.nan)
    for absent in (policy, nothing):
        absent_ref = absent if spec.needs_reference else None
        np.testing.assert_array_equal(spec.fn(absent, absent_ref, where=where), np.zeros(GROUPS))
        np.testing.assert_array_equal(gradient(spec, absent, absent_ref, where=where), np.zeros(policy.shape))


def test_masked_groups_are_as_good_as_not_there(spec):
    policy, ref = make_logps(spec)
    where = np.ones(policy.shape, bool)
    where[1] = False
    policy[1] = np.nan
    kept = np.array([0, 2])
    short = policy[kept], ref[kept] if spec.needs_reference else None
    np.testing.assert_allclose(spec.fn(policy, ref, where=where)[kept], spec.fn(*short), rtol=1e-6)
    gradients = gradient(spec, policy, ref, where=where)
    np.testing.assert_allclose(gradients[kept], gradient(spec, *short), rtol=1e-6)
    np.testing.assert_array_equal(gradients[1], 0)


def test_uncoupled_groups_do_not_see_each_other(spec):
    if spec.coupling != "none":
        pytest.skip("coupled by design")
    policy, ref = make_logps(spec)
    jacobian = jax.jacobian(spec.fn)(policy, ref)  # [GROUPS, GROUPS, candidates]
    for row in range(GROUPS):
        assert np.abs(jacobian[row, row]).max() > 0
        np.testing.assert_array_equal(np.delete(jacobian[row], row, axis=0), 0)


def test_bfloat16_is_computed_in_float32(spec):
    policy, ref = (None if x is None else jnp.asarray(x, jnp.bfloat16) for x in make_logps(spec))
    loss = spec.fn(policy, ref)
    assert loss.dtype == jnp.float32
    widened = [None if x is None else x.astype(jnp.float32) for x in (policy, ref)]
    np.testing.assert_array_equal(loss, spec.fn(*widened))


def test_float64_stays_float64(spec):
    policy, ref = make_logps(spec, dtype=np.float64)
    with jax.enable_x64(True):
        loss = spec.fn(policy, ref)
        assert loss.dtype == jnp.float64
        assert gradient(spec, policy, ref).dtype == jnp.float64
        wide = np.asarray(loss)
        narrow = spec.fn(policy.astype(np.float32), None if ref is None else ref.astype(np.float32))
        scalars = {name: jnp.float64(0.1) for name in spec.options}
        assert narrow.dtype == spec.fn(*make_logps(spec), **scalars).dtype == jnp.float32  # the data decides
    assert 0 < np.abs(wide - narrow).max() < 1e-4


def test_strict_dtype_promotion(spec):
    policy, ref = make_logps(spec)
    expected = spec.fn(policy, ref)
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(spec.fn(policy, ref), expected)
        mixed = spec.fn(jnp.asarray(policy, jnp.bfloat16), ref, where=np.ones(policy.shape, bool))
    assert mixed.dtype == jnp.float32


def test_number_of_candidates_is_as_stated(spec):
    for candidates in (1, 2, 3, 5):
        logps = np.zeros((GROUPS, candidates), np.float32)
        if spec.candidates in (None, candidates):
            assert spec.fn(logps, logps).shape == (GROUPS,)
        else:
            with pytest.raises(ValueError, match=f"{candidates} candidates"):
                spec.fn(logps, logps)
