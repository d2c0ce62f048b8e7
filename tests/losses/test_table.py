"""What holds for every row of LOSSES, and for losses made from rows: a new row is tested by being there."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import LOSSES
from tests.losses.table_rows import (
    CANDIDATES,
    DEVICES,
    GROUPS,
    LABEL,
    OPTIONS,
    ROWS,
    Inputs,
    base,
    compiled,
    draw,
    evaluate,
    loss,
    options_of,
    over,
)

BETA, SMOOTHING = OPTIONS["beta"][0], OPTIONS["label_smoothing"][0]
AT_REFERENCE = {
    "sigmoid": np.log(2),
    "hinge": 1,
    "ipo": 1 / (4 * BETA**2),
    "exo_pair": -np.log(CANDIDATES)  # sum_k 1/K (log 1/K - log q_k)
    - (np.log(1 - SMOOTHING) + (CANDIDATES - 1) * np.log(SMOOTHING / (CANDIDATES - 1))) / CANDIDATES,
    "nca_pair": 2 * np.log(2),
    "robust": np.log(2),
    "bco_pair": 2 * np.log(2),
    "sppo_hard": 2 * (1 / (2 * BETA)) ** 2,
    "aot": np.log(2),
    "aot_unpaired": np.log(2),
    "apo_zero": 2 / 2,
    "apo_down": 2 / 2,
    "discopop": (np.log(2) + 1) / 2,
    "sigmoid_norm": np.log(2),
    "plackett_luce": np.log(np.arange(1, CANDIDATES + 1)).sum(),  # log K!
    "kto": np.where(LABEL, OPTIONS["desirable_weight"][0], OPTIONS["undesirable_weight"][0]) / 2,
    "bco": np.log(2),
    "sigmoid+exo_pair+aot": np.log(2)
    + 0.8 * -np.log(4 * SMOOTHING * (1 - SMOOTHING)) / 2  # `exo_pair` of two candidates
    + 0.3 * np.log(2),
}
"""The loss where policy and reference agree, known on paper for every row that has a reference."""
INVARIANT = {
    "sigmoid": True,
    "hinge": True,
    "ipo": False,  # a constant counts less per token of a longer completion
    "exo_pair": True,
    "nca_pair": False,
    "robust": True,
    "bco_pair": False,
    "sppo_hard": False,
    "aot": True,
    "aot_unpaired": False,  # chosen and rejected of different prompts stand side by side
    "apo_zero": False,
    "apo_down": False,
    "discopop": True,
    "sigmoid_norm": False,  # as ipo
    "plackett_luce": True,
    "sft": False,
    "unlikelihood": False,
    "simpo": False,  # as ipo
    "alphapo": False,
    "cpo": False,  # fine-tunes
    "orpo": False,
    "kto": False,  # holds one completion against those of other prompts
    "bco": False,
}
"""Whether a reward that depends on the prompt alone changes nothing."""
COUNTS_ALONE = {"sft", "kto", "bco"}
"""Rows in which a lone completion has a loss: it is not compared with another one of its prompt."""
ADVISED_BETA = {
    "nca_pair": 0.01,
    "bco_pair": 0.01,
    "aot": 0.01,
    "aot_unpaired": 0.01,
    "bco": 0.01,
    "sppo_hard": 0.001,
    "simpo": 2.0,
    "alphapo": 2.0,
    "discopop": 0.05,
    "hinge": 0.05,
}


def groups_alone(name, x, **options):
    """Which groups exist, and their losses in float64 without the other groups and candidates, not compiled."""
    exists = x.where.any(axis=-1)  # [DEVICES, GROUPS]
    if ROWS[name].candidates is None:
        place = np.argsort(~x.where, axis=-1, stable=True)[..., :3]  # [DEVICES, GROUPS, 3], those that exist first
    else:
        place = np.broadcast_to(np.arange(x.where.shape[-1]), x.where.shape)  # pairs have their places

    def shorten(array):
        short = array[exists] if array.ndim == 2 else np.take_along_axis(array, place, axis=-1)[exists]
        return short.astype(np.float64) if short.dtype == np.float32 else short

    with jax.enable_x64(True):
        expected = loss(name, jax.tree.map(shorten, x), options_of(name, **options))
    assert expected.dtype == jnp.float64
    return exists, expected


@over(name for name in ROWS if all(LOSSES[part].needs_reference for part in base(name)))
def test_value_at_the_reference(name):
    x = draw(name, ragged=False)
    if "log_sum_sq_probs" in x.data:
        x = x._replace(data=x.data | {"log_sum_sq_probs": x.policy})  # what a policy writes itself has weight 1
    losses, _ = evaluate(name, x._replace(ref=x.policy))
    expected = AT_REFERENCE[name.split("/")[0]]
    np.testing.assert_allclose(losses, np.broadcast_to(expected, losses.shape), rtol=2e-6)


@over(ROWS)
def test_rewards_of_the_prompt_alone_change_nothing_or_are_said_to(name):
    invariant = all(INVARIANT[part] for part in base(name)) and (
        name.endswith(("/pairs", "/reverse_kl")) or "/" not in name
    )
    x = draw(name)
    shift = np.arange(DEVICES * GROUPS, dtype=np.float32).reshape(DEVICES, GROUPS, 1) - 8
    (losses, gradient), (shifted, shifted_gradient) = (
        evaluate(name, x),
        evaluate(name, x._replace(policy=x.policy + shift)),
    )
    if invariant:
        np.testing.assert_allclose(shifted, losses, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(shifted_gradient, gradient, rtol=1e-5, atol=1e-7)
    else:
        assert np.abs(shifted - losses).max() > 1e-3


@over(ROWS)
def test_masked_is_as_good_as_not_there(name):
    x = draw(name)
    losses, gradient = evaluate(name, x)
    np.testing.assert_array_equal(gradient[~x.where], 0)

    def silence(array, nothing):
        return None if array is None else np.where(x.where, array, nothing)

    nothing = {"lengths": 0, "ranks": -3, "log_sum_sq_probs": np.nan}
    data = {key: silence(value, nothing[key]) if key in nothing else value for key, value in x.data.items()}
    silent = evaluate(name, x._replace(policy=silence(x.policy, np.nan), ref=silence(x.ref, np.nan), data=data))
    for ours, theirs in zip(silent, (losses, gradient), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    exists, expected = groups_alone(name, x)
    np.testing.assert_array_equal(losses[~exists], 0)
    np.testing.assert_allclose(losses[exists], expected, rtol=5e-6, atol=1e-6)


@over(ROWS)
def test_order_of_groups_does_not_matter(name):
    x = draw(name)
    order = np.random.default_rng(1).permutation(DEVICES * GROUPS)

    def permute(array):
        return array.reshape(DEVICES * GROUPS, *array.shape[2:])[order].reshape(array.shape)

    for array, permuted in zip(evaluate(name, x), evaluate(name, jax.tree.map(permute, x)), strict=True):
        np.testing.assert_allclose(permuted, permute(array), rtol=2e-6, atol=1e-7)


@over(ROWS)
def test_extreme_log_probabilities_are_finite(name):
    x = draw(name)
    candidates, models = x.policy.shape[-1], 1 if x.ref is None else 2
    signs = np.array(list(itertools.product([1, -1], repeat=candidates * models)), np.float32)  # all patterns
    signs = signs[np.arange(-(-len(signs) // (DEVICES * GROUPS)) * DEVICES * GROUPS) % len(signs)]
    for some in 1e4 * signs.reshape(-1, DEVICES, GROUPS, models, candidates):
        policy, ref = some[..., 0, :], some[..., -1, :]
        data = x.data | {key: -policy for key in x.data if key == "log_sum_sq_probs"}
        losses, gradient = evaluate(
            name, Inputs(policy, None if x.ref is None else ref, np.ones(policy.shape, bool), data)
        )
        assert np.isfinite(losses).all(), some
        assert np.isfinite(gradient).all(), some


@over(ROWS)
def test_groups_without_enough_candidates_are_zero_without_gradient(name):
    x = draw(name, ragged=False)
    candidates = x.policy.shape[-1]
    counts_alone = bool(COUNTS_ALONE & set(base(name)))
    for where in (np.zeros(candidates, bool), *np.eye(candidates, dtype=bool)):
        losses, gradient = evaluate(name, x._replace(where=np.broadcast_to(where, x.where.shape)))
        assert np.isfinite(losses).all()
        np.testing.assert_array_equal(gradient[..., ~where], 0)
        if not (where.any() and counts_alone):
            np.testing.assert_array_equal(losses, 0)
            np.testing.assert_array_equal(gradient, 0)
        elif where[0]:
            assert (losses != 0).all()


@over(ROWS)
def test_options_are_swept_without_compiling_and_none_is_ignored(name):
    x = draw(name)
    losses, _ = evaluate(name, x)
    for key in ROWS[name].options:
        assert np.abs(evaluate(name, x, **{key: OPTIONS[key][1]})[0] - losses).max() > 1e-4, key
    assert compiled(name)._cache_size() == 1


def exact_logps(shape, alike):
    """Policy and reference log-probs from -2000 to 0 with all digits of float32; if alike, margins of up to 2."""
    rng = np.random.default_rng(0)
    if not alike:
        return -2000 * rng.random((2, *shape), np.float32)
    ref = rng.uniform(-300, -30, shape)  # less than half of the policy's, or else a difference would not round
    change = rng.uniform(-1600, -1000, (*shape[:-1], 1)) + rng.uniform(-1, 1, shape)
    return np.stack([ref + change, ref]).astype(np.float32)


@pytest.mark.parametrize("alike", [False, True])
@over(ROWS)
def test_float32_is_as_exact_as_its_inputs(name, alike):
    x = draw(name)
    policy, ref = exact_logps(x.policy.shape, alike)
    x = x._replace(policy=policy, ref=None if x.ref is None else ref)
    advised = {ADVISED_BETA[part] for part in base(name) if part in ADVISED_BETA}
    for beta in {0.1} | advised:
        losses, _ = evaluate(name, x, beta=beta)
        exists, expected = groups_alone(name, x, beta=beta)
        np.testing.assert_allclose(losses[exists], expected, rtol=1e-5, atol=1e-5, err_msg=f"{beta=}")
