"""Losses made from losses: values as sums over their parts, what goes to which part, and what is refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import (
    DIVERGENCES,
    LOSSES,
    LossSpec,
    RunningMean,
    alpha_divergence,
    bco_loss,
    bco_running,
    combine,
    dpo_loss,
    over_all_pairs,
    sft_loss,
    simpo_loss,
    weighted_by_policy,
    with_divergence,
    wpo_weights,
)
from jaxdpo.types import UNRANKED, InputError

RTOL = 1e-6
SIGMOID, HINGE, SFT, AOT = (LOSSES[name] for name in ("sigmoid", "hinge", "sft", "aot"))
RANKS = np.array([[0, 1, 2, 3], [2, 0, 3, 1], [0, 0, 1, 1], [1, 0, UNRANKED, UNRANKED], [4, 4, 4, 4]])
"""Five rankings of four."""


def make_logps(groups=5, candidates=2, seed=0):
    """Policy and reference `[groups, candidates]`."""
    return -60 * np.random.default_rng(seed).random((2, groups, candidates), np.float32)


def make_lengths(groups=5, candidates=2):
    return np.random.default_rng(1).integers(1, 9, (groups, candidates))


def better_and_worse(ranks):
    """Index pairs of a ranking, better first."""
    return [pair for pair in itertools.permutations(range(len(ranks)), 2) if ranks[pair[0]] < ranks[pair[1]]]


def test_sum_of_losses_is_weighted():
    policy, ref = make_logps()
    both, parts = combine([SIGMOID, HINGE]), (SIGMOID.fn(policy, ref, beta=0.2), HINGE.fn(policy, ref, beta=0.2))
    np.testing.assert_allclose(both.fn(policy, ref, beta=0.2), parts[0] + parts[1], rtol=RTOL)
    expected = 0.8 * parts[0] + 2 * parts[1]
    np.testing.assert_allclose(both.fn(policy, ref, beta=0.2, loss_weights=(0.8, 2)), expected, rtol=RTOL)
    traced = jax.jit(both.fn)(policy, ref, beta=0.2, loss_weights=jnp.array([0.8, 2]))
    np.testing.assert_allclose(traced, expected, rtol=5 * RTOL)


def test_a_single_loss_stays_as_it_is():
    assert combine([SIGMOID]) is SIGMOID


@pytest.mark.parametrize(
    ("names", "coupling", "candidates", "data"),
    [
        (("sigmoid", "hinge"), "none", 2, ()),
        (("sigmoid", "sft"), "denominator", 2, ("lengths",)),
        (("sft", "plackett_luce"), "denominator", None, ("lengths", "ranks")),
        (("aot", "sft", "ipo"), "sort", 2, ("lengths",)),
    ],
)
def test_facts_of_a_sum(names, coupling, candidates, data):
    spec = combine([LOSSES[name] for name in names])
    assert (spec.coupling, spec.candidates, spec.data) == (coupling, candidates, data)
    assert spec.needs_reference and spec.running is None
    assert spec.options[0] == "beta" and spec.options[-1] == "loss_weights"
    assert len(set(spec.options)) == len(spec.options)


def test_a_loss_that_needs_no_reference_gets_none():
    policy, ref = make_logps()
    free = SIGMOID._replace(needs_reference=False)
    assert not combine([free, SFT]).needs_reference
    actual = combine([SIGMOID, free]).fn(policy, ref)
    np.testing.assert_allclose(actual, dpo_loss(policy, ref) + dpo_loss(policy, None), rtol=RTOL)


def test_every_loss_gets_what_it_names():
    policy, ref = make_logps()
    lengths, where = make_lengths(), np.array([True, True, False, True, True])[:, None].repeat(2, axis=1)
    spec = combine([SIGMOID, SFT])
    common = {"lengths": lengths, "where": where}
    actual = spec.fn(policy, ref, beta=0.3, label_smoothing=0.1, mean_length=7.0, **common)
    preference = dpo_loss(policy, ref, beta=0.3, label_smoothing=0.1, where=where)
    np.testing.assert_allclose(actual, preference + sft_loss(policy, mean_length=7.0, **common), rtol=RTOL)
    np.testing.assert_allclose(
        combine([HINGE, LOSSES["apo_zero"]]).fn(policy, ref, divergence=DIVERGENCES["js_divergence"]),
        HINGE.fn(policy, ref, divergence=DIVERGENCES["js_divergence"]) + LOSSES["apo_zero"].fn(policy, ref),
        rtol=RTOL,
    )


def test_coupled_losses_of_a_sum_see_all_devices():
    policy, ref = make_logps(groups=16)
    lengths, spec = make_lengths(groups=16), combine([SIGMOID, SFT, AOT])
    split = [x.reshape(8, 2, 2) for x in (policy, ref, lengths)]
    loss = jax.pmap(lambda p, r, n: spec.fn(p, r, lengths=n, axis_name="devices"), axis_name="devices")
    np.testing.assert_allclose(loss(*split).ravel(), spec.fn(policy, ref, lengths=lengths), rtol=5e-6)


def test_the_loss_with_a_running_mean_keeps_it_in_a_sum():
    policy, ref = make_logps(candidates=1)
    label = np.array([1.0, 0, 1, 1, 0])

    def good_only(policy_logps, ref_logps, *, label, share, where=None):
        return -share * jnp.asarray(label * policy_logps[..., 0])

    spec = combine([LossSpec(good_only, False, 1, "none", ("share",), ("label",)), LOSSES["bco"]])
    state = RunningMean(jnp.float32(0.5), jnp.float32(3))
    state = spec.running(state, policy, ref, where=np.ones((5, 1), bool), beta=0.1, share=0.2)
    expected = bco_running(RunningMean(jnp.float32(0.5), jnp.float32(3)), policy, ref, beta=0.1)
    np.testing.assert_array_equal(state, expected)
    actual = spec.fn(policy, ref, label=label, beta=0.1, share=0.2, baseline=state.mean)
    bco = bco_loss(policy, ref, label=label, beta=0.1, baseline=state.mean)
    np.testing.assert_allclose(actual, bco - 0.2 * label * policy[:, 0], rtol=RTOL)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], r"combine got no loss; allowed: one or more"),
        ([SIGMOID, LOSSES["kto"]], r"dpo_loss takes groups of 2, compared .*; kto_loss takes groups of 2, judged by a"),
        ([LOSSES["kto"], LOSSES["bco"]], r"kto_loss takes groups of 2, .*; bco_loss takes groups of 1, .* the same"),
        ([LOSSES["bco"], LOSSES["bco"]], r"more than one of these carries a running mean: bco_loss"),
        ([combine([SIGMOID, HINGE]), SFT], r"a sum with weights of its own; pass all losses to one call of combine"),
    ],
)
def test_losses_that_have_no_sum(specs, message):
    with pytest.raises(InputError, match=message):
        combine(specs)


def test_a_sum_refuses_what_none_of_its_losses_takes():
    policy, ref = make_logps()
    with pytest.raises(TypeError, match="none of dpo_loss, hinge_loss takes the keyword simpo_gamma"):
        combine([SIGMOID, HINGE]).fn(policy, ref, simpo_gamma=0.5)
    with pytest.raises(InputError, match=r"loss_weights has shape \(3,\); allowed: \(2,\); .* dpo_loss, hinge_loss"):
        combine([SIGMOID, HINGE]).fn(policy, ref, loss_weights=(1, 2, 3))


@pytest.mark.parametrize("ranks", [None, RANKS])
def test_all_pairs_are_the_mean_over_the_pairs_of_each_group(ranks):
    policy, ref = make_logps(candidates=4)
    spec = over_all_pairs(SIGMOID)
    assert spec.candidates is None and spec.data == ("ranks",)
    actual = jax.jit(spec.fn)(policy, ref, beta=0.1, ranks=ranks)
    for group, order in enumerate(np.tile(np.arange(4), (5, 1)) if ranks is None else ranks):
        pairs = np.array(better_and_worse(order)).reshape(-1, 2)
        losses = dpo_loss(policy[group, pairs], ref[group, pairs], beta=0.1) if pairs.size else np.zeros(1)
        np.testing.assert_allclose(actual[group], losses.mean(), rtol=5e-6)


def test_all_pairs_of_two_candidates_are_the_loss_and_of_one_are_nothing():
    policy, ref = make_logps()
    spec = over_all_pairs(SIGMOID)
    np.testing.assert_array_equal(spec.fn(policy, ref), dpo_loss(policy, ref))
    np.testing.assert_array_equal(spec.fn(policy, None), dpo_loss(policy, None))
    for name, row in LOSSES.items():
        if row.candidates == 2 and "label" not in row.data:
            data = {"lengths": np.ones((5, 1), int)} if "lengths" in row.data else {}
            lone = over_all_pairs(row).fn(policy[:, :1], ref[:, :1], **data)
            np.testing.assert_array_equal(lone, np.zeros(5), err_msg=name)


def test_absent_candidates_are_in_no_pair():
    policy, ref = make_logps(groups=16, candidates=4)
    masks = np.array(list(itertools.product([False, True], repeat=4)))  # [16, 4]
    ranks = np.tile([1, 0, 1, UNRANKED], (16, 1))
    spec = over_all_pairs(HINGE)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def loss(policy):
        losses = spec.fn(policy, ref, ranks=np.where(masks, ranks, -3), where=masks)
        return losses.sum(), losses

    gradient, losses = loss(np.where(masks, policy, np.nan))
    np.testing.assert_array_equal(gradient[~masks], 0)
    for group, mask in enumerate(masks):
        there = np.flatnonzero(mask)
        pairs = np.array(better_and_worse(ranks[group, there])).reshape(-1, 2)
        expected = HINGE.fn(policy[group, there[pairs]], ref[group, there[pairs]]).mean() if pairs.size else 0
        np.testing.assert_allclose(losses[group], expected, rtol=RTOL)


def test_pairs_take_the_data_of_their_candidates():
    (policy, _), lengths = make_logps(candidates=4), make_lengths(candidates=4)
    actual = over_all_pairs(LOSSES["simpo"]).fn(policy, None, lengths=lengths, ranks=RANKS, beta=2.0)
    for group in range(4):
        pairs = np.array(better_and_worse(RANKS[group]))
        expected = simpo_loss(policy[group, pairs], lengths=lengths[group, pairs], beta=2.0).mean()
        np.testing.assert_allclose(actual[group], expected, rtol=RTOL)


def test_coupled_losses_see_all_pairs_of_all_groups():
    policy, ref = make_logps(candidates=3)
    lengths, pairs = make_lengths(candidates=3), np.array([[0, 1], [0, 2], [1, 2]])
    flat = [x[:, pairs].reshape(-1, 2) for x in (policy, ref, lengths)]
    expected = AOT.fn(*flat[:2]).reshape(5, 3).mean(axis=1)
    np.testing.assert_allclose(over_all_pairs(AOT).fn(policy, ref), expected, rtol=RTOL)
    cpo = over_all_pairs(LOSSES["cpo"])
    assert (cpo.coupling, over_all_pairs(AOT).coupling, over_all_pairs(HINGE).coupling) == ("statistic", "sort", "none")
    expected = LOSSES["cpo"].fn(flat[0], None, lengths=flat[2]).reshape(5, 3).mean(axis=1)
    np.testing.assert_allclose(cpo.fn(policy, None, lengths=lengths), expected, rtol=RTOL)


@pytest.mark.parametrize("name", ["kto", "bco", "plackett_luce", "sft"])
def test_pairs_of_a_loss_that_compares_no_pairs(name):
    with pytest.raises(InputError, match=r"takes .*; allowed: a loss of two completions that are compared"):
        over_all_pairs(LOSSES[name])


def test_bad_shapes_of_pairs_are_found_before_they_are_gathered():
    policy, ref = make_logps(candidates=3)
    with pytest.raises(InputError, match=r"ref_logps has shape \(5, 2\), policy_logps has \(5, 3\)"):
        over_all_pairs(SIGMOID).fn(policy, ref[:, :2])
    with pytest.raises(InputError, match=r"ranks is \w+ of shape \(5, 2\); allowed: integers of .*\(5, 3\)"):
        over_all_pairs(SIGMOID).fn(policy, ref, ranks=np.zeros((5, 2), int))


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_weighting_multiplies_by_a_constant(name):
    policy, ref = make_logps()
    statistics = {"lengths": make_lengths(), "log_sum_sq_probs": 0.5 * policy - 1}
    spec, row = weighted_by_policy(LOSSES[name]), LOSSES[name]
    assert spec.data == ("lengths", "log_sum_sq_probs")
    data = {"lengths": statistics["lengths"]} if "lengths" in row.data else {}
    values, pullback = jax.vjp(lambda p: spec.fn(p, ref, beta=0.2, **statistics), policy)
    expected, slopes = jax.vjp(lambda p: row.fn(p, ref, beta=0.2, **data), policy)
    weights = wpo_weights(policy, **statistics)
    np.testing.assert_allclose(values, weights * expected, rtol=RTOL)
    np.testing.assert_allclose(pullback(jnp.ones(5))[0], slopes(weights)[0], rtol=RTOL)


def test_every_pair_of_a_ranking_has_a_weight_of_its_own():
    policy, ref = make_logps(groups=1, candidates=3)
    lengths, own, pairs = make_lengths(1, 3), 0.9 * policy, np.array([[0, 1], [0, 2], [1, 2]])
    weights = wpo_weights(policy[0, pairs], lengths=lengths[0, pairs], log_sum_sq_probs=own[0, pairs])
    expected = (weights * dpo_loss(policy[0, pairs], ref[0, pairs])).mean()
    actual = over_all_pairs(weighted_by_policy(SIGMOID)).fn(policy, ref, lengths=lengths, log_sum_sq_probs=own)
    np.testing.assert_allclose(actual, [expected], rtol=RTOL)


@pytest.mark.parametrize("spec", [LOSSES["kto"], weighted_by_policy(SIGMOID)])
def test_a_loss_that_cannot_be_weighted(spec):
    with pytest.raises(
        InputError, match=r"takes .*; allowed: a loss of completions that are compared, not weighted yet"
    ):
        weighted_by_policy(spec)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_by_its_name(name):
    policy, ref = make_logps()
    spec = with_divergence(SIGMOID, name)
    assert not spec.divergence
    expected = dpo_loss(policy, ref, beta=0.2, divergence=DIVERGENCES[name])
    np.testing.assert_array_equal(spec.fn(policy, ref, beta=0.2), expected)


def test_alpha_is_an_option_of_its_divergence_alone():
    policy, ref = make_logps()
    spec = with_divergence(SIGMOID, "alpha_divergence")
    assert spec.options == (*SIGMOID.options, "f_alpha_divergence_coef")
    expected = dpo_loss(policy, ref, divergence=functools.partial(alpha_divergence, alpha=0.8))
    actual = jax.jit(lambda alpha: spec.fn(policy, ref, f_alpha_divergence_coef=alpha))(0.8)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert with_divergence(SIGMOID, "forward_kl").options == SIGMOID.options


def test_a_divergence_that_does_not_exist_or_has_no_effect():
    with pytest.raises(InputError, match=r"divergence 'kl' does not exist; allowed: reverse_kl, forward_kl"):
        with_divergence(SIGMOID, "kl")
    with pytest.raises(InputError, match="takes no divergence; allowed: a loss that does"):
        with_divergence(LOSSES["simpo"], "forward_kl")
    with pytest.raises(InputError, match="dpo_loss takes no divergence"):
        with_divergence(with_divergence(SIGMOID, "forward_kl"), "js_divergence")


def test_all_of_it_at_once():
    policy, ref = make_logps(groups=1, candidates=3)
    lengths, own, pairs = make_lengths(1, 3), 0.9 * policy, np.array([[1, 0], [1, 2]])
    paired = over_all_pairs(weighted_by_policy(with_divergence(SIGMOID, "js_divergence")))
    spec = combine([paired, SFT])
    assert (spec.candidates, spec.coupling) == (None, "denominator")
    assert spec.data == ("lengths", "log_sum_sq_probs", "ranks")
    common = {"lengths": lengths, "log_sum_sq_probs": own, "ranks": np.array([[1, 0, 1]])}
    actual = spec.fn(policy, ref, mean_length=4.0, loss_weights=(1.0, 0.1), **common)
    weights = wpo_weights(policy[0, pairs], lengths=lengths[0, pairs], log_sum_sq_probs=own[0, pairs])
    losses = dpo_loss(policy[0, pairs], ref[0, pairs], divergence=DIVERGENCES["js_divergence"])
    np.testing.assert_allclose(actual, [(weights * losses).mean() - 0.1 * policy[0, 0] / 4], rtol=RTOL)
