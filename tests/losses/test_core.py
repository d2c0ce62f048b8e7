"""Bad input to any loss: the message says what, got, allowed and fix. And what the import costs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import (
    bradley_terry_loss,
    dpo_loss,
    implicit_rewards,
    plackett_luce_dpo_loss,
    plackett_luce_loss,
    preference_metrics,
)
from jaxdpo.types import InputError

PAIR = np.array([[-3.0, -5.0]], np.float32)
TRIPLE = np.array([[-3.0, -5.0, -4.0]], np.float32)
ON_LOGPS = [implicit_rewards, dpo_loss, plackett_luce_dpo_loss, preference_metrics]


@pytest.mark.parametrize("fn", ON_LOGPS)
def test_log_probabilities_of_different_shape(fn):
    with pytest.raises(InputError, match=r"ref_logps has shape \(1, 3\), policy_logps has \(1, 2\); allowed: equal"):
        fn(PAIR, TRIPLE)


@pytest.mark.parametrize("fn", ON_LOGPS)
def test_the_reference_cannot_be_forgotten(fn):
    with pytest.raises(TypeError, match="ref_logps"):
        fn(PAIR)


@pytest.mark.parametrize("fn", ON_LOGPS)
@pytest.mark.parametrize("beta", [0, -0.1, float("nan"), float("inf"), np.float32(-1)])
def test_beta_out_of_range(fn, beta):
    with pytest.raises(InputError, match=r"beta=\S+ is out of range; allowed: above 0"):
        fn(PAIR, PAIR, beta=beta)


def test_beta_that_is_not_a_scalar():
    with pytest.raises(InputError, match=r"beta has shape \(2,\); allowed: a scalar; use jax.vmap"):
        dpo_loss(PAIR, PAIR, beta=jnp.array([0.1, 0.2]))


@pytest.mark.parametrize("fn", [dpo_loss, lambda *logps, **options: bradley_terry_loss(logps[0], **options)])
@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, float("nan")])
def test_label_smoothing_out_of_range(fn, label_smoothing):
    with pytest.raises(InputError, match=r"label_smoothing=\S+ is out of range; allowed: 0 to below 0.5"):
        fn(PAIR, PAIR, label_smoothing=label_smoothing)


def test_center_rewards_coefficient_out_of_range():
    with pytest.raises(InputError, match=r"center_rewards_coefficient=-1 is out of range; allowed: 0 or more"):
        bradley_terry_loss(PAIR, center_rewards_coefficient=-1)


def test_pair_loss_on_a_ranking_points_to_plackett_luce():
    with pytest.raises(InputError, match=r"3 candidates .* shape \(1, 3\); allowed: 2, .* Plackett-Luce"):
        dpo_loss(TRIPLE, TRIPLE)
    with pytest.raises(InputError, match=r"3 candidates .* shape \(1, 3\); allowed: 2, .* Plackett-Luce"):
        bradley_terry_loss(TRIPLE)


@pytest.mark.parametrize("rewards", [1.0, np.zeros((3, 0), np.float32)])
def test_no_candidates_axis(rewards):
    with pytest.raises(InputError, match=r"rewards has shape \(.*\); allowed: \[..., candidates\] with one candidate"):
        plackett_luce_loss(rewards)


@pytest.mark.parametrize(
    "where", [np.ones((1, 2), np.int32), np.ones(2, bool), np.ones((1, 3), bool), np.ones((2, 2), bool)]
)
def test_mask_of_wrong_shape_or_dtype(where):
    with pytest.raises(InputError, match=r"where is \w+ of shape .*; allowed: bool of the shape of rewards, \(1, 2\)"):
        plackett_luce_loss(PAIR, where=where)


def test_margin_of_wrong_shape():
    with pytest.raises(InputError, match=r"margin has shape \(1, 2\), rewards \(1, 2\); allowed: \(1,\)"):
        bradley_terry_loss(PAIR, margin=PAIR)


def test_messages_are_the_same_under_jit():
    with pytest.raises(InputError, match=r"ref_logps has shape \(1, 3\)"):
        jax.jit(dpo_loss)(PAIR, TRIPLE)


def test_lists_and_integers_are_arrays_too():
    np.testing.assert_allclose(bradley_terry_loss([3, 1]), np.log1p(np.exp(-2)), rtol=1e-6)


def test_importing_the_losses_needs_jax_and_chex_alone():
    script = (
        "import sys, jax, jax.numpy, chex\n"
        "before = set(sys.modules)\n"
        "import jaxdpo.losses\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    added = [m for m in run.stdout.split() if m.split(".")[0] not in sys.stdlib_module_names]
    allowed = ("jaxdpo.losses", "jaxdpo.types")
    assert "jaxdpo.losses" in added
    assert [m for m in added if m != "jaxdpo" and not m.startswith((*allowed, "jax.", "chex."))] == []
