"""Optimal transport: quantiles against quantiles, over all axes and devices, ties, masks, extremes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxdpo.losses.preference import dpo_loss
from jaxdpo.losses.transport import aot_loss, aot_unpaired_loss
from jaxdpo.types import InputError

every_loss = pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
DEVICES = 8


def sorted_sides(loss, policy, ref):
    """What the loss sorts, `[groups]` each: margins of policy and reference, or log-ratios of chosen and rejected."""
    return (policy @ [1, -1], ref @ [1, -1]) if loss is aot_loss else (policy - ref).T


@functools.partial(jax.jit, static_argnames=("loss", "axis_name"))
def loss_and_gradient(loss, policy, ref, **options):
    """Losses, and the gradient of their sum in both log-probabilities."""
    losses, pullback = jax.vjp(functools.partial(loss, **options), policy, ref)
    return losses, pullback(jnp.ones_like(losses))


def assert_close(actual, expected, rows=slice(None), rtol=1e-6):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one[rows], other, rtol=rtol, atol=1e-9)


@every_loss
@pytest.mark.parametrize(("beta", "label_smoothing"), [(0.01, 0.0), (0.5, 0.3)])
def test_equals_the_formula_on_sorted_values(loss, beta, label_smoothing):
    policy, ref = -60 * np.random.default_rng(0).random((2, 50, 2))
    better, worse = sorted_sides(loss, policy, ref)
    m = beta * (np.sort(better) - np.sort(worse))
    expected = (1 - label_smoothing) * np.logaddexp(0, -m) + label_smoothing * np.logaddexp(0, m)
    with jax.enable_x64(True):
        actual = np.asarray(loss(policy, ref, beta=beta, label_smoothing=label_smoothing))
    np.testing.assert_allclose(actual[np.argsort(better)], expected, rtol=1e-10)


@every_loss
def test_leading_axes_are_sorted_together(loss):
    policy, ref = -60 * np.random.default_rng(1).random((2, 3, 4, 2), np.float32)
    flat = loss(policy.reshape(12, 2), ref.reshape(12, 2))
    np.testing.assert_array_equal(loss(policy, ref), flat.reshape(3, 4))
    apart = jnp.stack([loss(p, r) for p, r in zip(policy, ref, strict=True)])
    assert np.abs(apart - flat.reshape(3, 4)).max() > 0.01


@every_loss
def test_one_group_is_dpo(loss):
    policy, ref = jnp.array([[-12.0, -15.0]]), jnp.array([[-20.0, -10.0]])
    assert_close(loss_and_gradient(loss, policy, ref), loss_and_gradient(dpo_loss, policy, ref))


@every_loss
def test_the_order_of_groups_moves_losses_with_their_groups(loss):
    policy, ref = -60 * np.random.default_rng(2).random((2, 20, 2), np.float32)
    order = np.random.default_rng(3).permutation(20)
    there, here = loss_and_gradient(loss, policy[order], ref[order]), loss_and_gradient(loss, policy, ref)
    assert_close(here, there, rows=order)


def test_which_rejected_completion_belongs_to_which_chosen_one_does_not_matter_unpaired():
    policy, ref = -60 * np.random.default_rng(4).random((2, 20, 2), np.float32)
    other = [np.stack([x[:, 0], np.roll(x[:, 1], 7)], axis=-1) for x in (policy, ref)]
    np.testing.assert_array_equal(aot_unpaired_loss(*other), aot_unpaired_loss(policy, ref))


@every_loss
def test_equal_values_are_told_apart_by_the_order_of_groups(loss):
    policy, ref = jnp.zeros((3, 2)), jnp.array([[0.0, 9.0], [0.0, -9.0], [0.0, 0.0]])
    # Reference margins of -9, 9 and 0 for the paired loss; rejected log-ratios of -9, 9 and 0 for the other.
    np.testing.assert_allclose(loss(policy, ref, beta=1.0), np.logaddexp(0, [-9, 0, 9]), rtol=1e-6)


def test_values_that_float32_cannot_tell_apart_are_sorted_by_what_rounding_lost():
    tiny = 2.0**-20
    policy = jnp.array([[-1500.0, -tiny], [-1500.0, -0.0], [-1500.0, -2 * tiny]])  # margins of -1500 and a bit
    ref = jnp.array([[0.0, 1400.0], [0.0, 1500.0], [0.0, 1600.0]])
    np.testing.assert_allclose(aot_loss(policy, ref, beta=0.1), np.logaddexp(0, [0, -10, 10]), rtol=1e-5)


@every_loss
def test_reference_free_is_a_reference_that_is_zero(loss):
    policy = -60 * np.random.default_rng(5).random((6, 2), np.float32)
    np.testing.assert_array_equal(loss(policy, None), loss(policy, np.zeros_like(policy)))


@every_loss
def test_masked_pairs_take_no_part(loss):
    policy, ref = -60 * np.random.default_rng(6).random((2, 9, 2), np.float32)
    policy[:, 1] -= 60  # what is sorted is above 0 on one side and below on the other: a masked 0 would show
    ref[:, 0] -= 60
    exists = np.ones((9, 2), bool)
    exists[[0, 3, 4, 8]] = [[False, True], [True, False], [False, False], [False, False]]
    kept = exists.all(axis=-1)
    padded = np.where(exists, policy, np.nan), np.where(exists, ref, np.inf)
    masked = loss_and_gradient(loss, *padded, where=exists)
    assert_close(masked, loss_and_gradient(loss, policy[kept], ref[kept]), rows=kept)
    nothing = loss_and_gradient(loss, *(np.full_like(policy, np.nan),) * 2, where=np.zeros((9, 2), bool))
    for value in [x[~kept] for x in jax.tree.leaves(masked)] + jax.tree.leaves(nothing):
        np.testing.assert_array_equal(value, np.zeros_like(value))


@every_loss
def test_extreme_log_probabilities_are_finite(loss):
    signs = jnp.array(list(itertools.product([-1.0, 1.0], repeat=4)))  # [16, 4]
    for value in jax.tree.leaves(loss_and_gradient(loss, *(1e4 * signs).reshape(2, 16, 2))):
        assert np.isfinite(value).all()


def on_devices_pmap(run, axis):
    return jax.pmap(run, axis_name=axis)


def on_devices_shard_map(run, axis):
    mesh, spec = Mesh(np.array(jax.devices()[:DEVICES]), (axis,)), PartitionSpec(axis)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))


@every_loss
@pytest.mark.parametrize("on_devices", [on_devices_pmap, on_devices_shard_map])
@pytest.mark.parametrize("masked", [False, True])
def test_devices_see_the_whole_batch(loss, on_devices, masked):
    policy, ref = -60 * np.random.default_rng(7).random((2, DEVICES, 3, 2), np.float32)
    policy[0, 0], ref[0, 0] = policy[5, 1], ref[5, 1]  # a tie between devices
    exists = np.random.default_rng(8).random((DEVICES, 3, 2)) < 0.9

    def run(policy, ref, exists):
        options = {"where": exists} if masked else {}
        return loss_and_gradient(loss, policy, ref, axis_name="pairs", label_smoothing=0.1, **options)

    sharded = on_devices(run, "pairs")(policy, ref, exists)
    whole = loss_and_gradient(loss, policy, ref, label_smoothing=0.1, **({"where": exists} if masked else {}))
    assert_close(sharded, whole, rtol=1e-5)


@every_loss
def test_gradient_from_outside_a_shard_map_is_that_of_the_whole_batch(loss):
    policy, ref = -60 * np.random.default_rng(9).random((2, 16, 2), np.float32)
    mesh, spec = Mesh(np.array(jax.devices()[:DEVICES]), ("pairs",)), PartitionSpec("pairs")
    sharded = jax.shard_map(functools.partial(loss, axis_name="pairs"), mesh=mesh, in_specs=spec, out_specs=spec)
    gradients = [jax.jit(jax.grad(lambda p, f=f: f(p, ref).mean()))(policy) for f in (sharded, loss)]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-9)


@every_loss
def test_three_candidates_are_refused(loss):
    with pytest.raises(InputError, match=r"3 candidates .* allowed: 2, chosen then rejected"):
        loss(jnp.zeros((4, 3)), None)


@every_loss
def test_options_out_of_range(loss):
    with pytest.raises(InputError, match=r"label_smoothing=0.5 is out of range; allowed: 0 to below 0.5"):
        loss(jnp.zeros((4, 2)), None, label_smoothing=0.5)
    with pytest.raises(InputError, match=r"beta=0 is out of range; allowed: above 0"):
        loss(jnp.zeros((4, 2)), None, beta=0)
