"""Fine-tuning as a mean over tokens, alone and as a term, and the Unlikelihood baseline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxdpo.losses import cpo_loss, orpo_loss, sft_loss, unlikelihood_loss
from jaxdpo.types import InputError

LOGPS = np.array([[-6.0, -9.0], [-30.0, -8.0], [-5.0, -7.0]], np.float32)
LENGTHS = np.array([[2, 3], [10, 4], [3, 7]])
COUPLED = [sft_loss, cpo_loss, orpo_loss]


def test_mean_over_groups_is_the_mean_over_tokens_of_the_chosen():
    np.testing.assert_allclose(sft_loss(LOGPS, lengths=LENGTHS).mean(), (6 + 30 + 5) / (2 + 10 + 3), rtol=1e-6)


def test_any_number_of_candidates_of_which_the_best_that_exists_counts():
    np.testing.assert_array_equal(sft_loss(LOGPS[:, :1], lengths=LENGTHS[:, :1]), sft_loss(LOGPS, lengths=LENGTHS))
    where = np.array([[False, True], [True, False], [False, False]])
    logps, lengths = np.where(where, LOGPS, np.nan), np.where(where, LENGTHS, 1000)
    expected = np.array([9.0, 30.0, 0.0]) / ((3 + 10) / 2)
    np.testing.assert_allclose(sft_loss(logps, lengths=lengths, where=where), expected, rtol=1e-6)
    gradient = jax.grad(lambda logps: sft_loss(logps, lengths=lengths, where=where).sum())(logps)
    np.testing.assert_allclose(gradient, -np.array([[0, 1], [1, 0], [0, 0]]) / ((3 + 10) / 2), rtol=1e-6)


@pytest.mark.parametrize("loss", COUPLED)
def test_a_part_of_a_step_takes_the_mean_length_of_the_whole(loss):
    whole = loss(LOGPS, lengths=LENGTHS)
    mean_length = LENGTHS[:, 0].mean()
    parts = [loss(LOGPS[rows], lengths=LENGTHS[rows], mean_length=mean_length) for rows in (slice(0, 1), slice(1, 3))]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-6)


@pytest.mark.parametrize("loss", COUPLED)
def test_devices_share_the_mean_length(loss):
    logps = -100 * np.random.default_rng(0).random((8, 3, 2), np.float32)
    lengths = np.random.default_rng(1).integers(1, 60, logps.shape)
    where = np.random.default_rng(2).random(logps.shape) < 0.8

    def split(logps, lengths, where):
        return loss(logps, lengths=lengths, where=where, axis_name="groups")

    whole = loss(logps, lengths=lengths, where=where)
    spec = PartitionSpec("groups")
    mesh = jax.make_mesh((8,), ("groups",), axis_types=(jax.sharding.AxisType.Auto,))
    for mapped in (
        jax.pmap(split, axis_name="groups"),
        jax.jit(jax.shard_map(split, mesh=mesh, in_specs=spec, out_specs=spec)),
    ):
        np.testing.assert_allclose(mapped(logps, lengths, where), whole, rtol=1e-6)


def test_unlikelihood_weighs_the_rejected():
    np.testing.assert_allclose(unlikelihood_loss(LOGPS, unlikelihood_alpha=0.5), 0.5 * LOGPS[:, 1] - LOGPS[:, 0])
    gradient = jax.grad(lambda logps: unlikelihood_loss(logps, unlikelihood_alpha=0.5).sum())(LOGPS)
    np.testing.assert_array_equal(gradient, [[-1.0, 0.5]] * 3)


def test_unlikelihood_without_weight_is_fine_tuning_in_sums():
    expected = sft_loss(LOGPS, lengths=LENGTHS, mean_length=1.0)
    np.testing.assert_array_equal(unlikelihood_loss(LOGPS, unlikelihood_alpha=0.0), expected)


def test_unlikelihood_needs_both():
    where = np.array([[True, True], [True, False], [False, False]])
    logps = np.where(where, LOGPS, np.nan)
    np.testing.assert_allclose(unlikelihood_loss(logps, unlikelihood_alpha=1.0, where=where), [6 - 9, 0, 0])
    gradient = jax.grad(lambda logps: unlikelihood_loss(logps, where=where).sum())(logps)
    np.testing.assert_array_equal(gradient[1:], 0)


def test_no_groups_at_all():
    loss = sft_loss(jnp.full((2, 1), jnp.nan), lengths=jnp.zeros((2, 1)), where=jnp.zeros((2, 1), bool))
    np.testing.assert_array_equal(loss, [0, 0])


@pytest.mark.parametrize("mean_length", [-1, float("inf"), float("nan")])
def test_mean_length_out_of_range(mean_length):
    with pytest.raises(InputError, match=r"mean_length=\S+ is out of range; allowed: 0 or more"):
        sft_loss(LOGPS, lengths=LENGTHS, mean_length=mean_length)


@pytest.mark.parametrize("unlikelihood_alpha", [-0.1, 1.1, float("nan")])
def test_unlikelihood_alpha_out_of_range(unlikelihood_alpha):
    with pytest.raises(InputError, match=r"unlikelihood_alpha=\S+ is out of range; allowed: 0 to 1"):
        unlikelihood_loss(LOGPS, unlikelihood_alpha=unlikelihood_alpha)


def test_lengths_of_another_shape():
    with pytest.raises(InputError, match=r"lengths has shape \(3,\), policy_logps has \(3, 2\); allowed: equal shapes"):
        sft_loss(LOGPS, lengths=LENGTHS[:, 0])
