"""TRL's numbers for losses without a reference or without pairs, for weights and tails, and for what it logs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import (
    alphapo_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    cpo_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    length_desensitized_logps,
    mean_metrics,
    nca_loss,
    orpo_loss,
    preference_metrics,
    robust_dpo_loss,
    sft_loss,
    sigmoid_norm_loss,
    simpo_loss,
    sppo_hard_loss,
    unpaired_metrics,
    wpo_weights,
)
from tests.losses.golden_cases import BATCH, GOLDEN, LENGTHS, TOLERANCE, assert_golden, logps, params, per_token

PER_TOKEN = {"ipo": ipo_loss, "sigmoid_norm": sigmoid_norm_loss}
LOSSES = {
    "sigmoid": dpo_loss,
    "hinge": hinge_loss,
    "exo_pair": exo_loss,
    "nca_pair": nca_loss,
    "robust": robust_dpo_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    **PER_TOKEN,
}


def keywords(case):
    """What a case's loss takes besides log-probabilities."""
    smoothed = case["loss_type"] in ("exo_pair", "robust")
    options = {"beta": case["beta"]} | ({"label_smoothing": case["label_smoothing"]} if smoothed else {})
    return options | ({"lengths": LENGTHS} if case["loss_type"] in PER_TOKEN else {})


@pytest.mark.parametrize("case", params(case for case in GOLDEN["dpo"] if case["loss_type"] == "sft"))
def test_fine_tuning_is_a_mean_over_tokens(case):
    assert_golden(case, lambda policy: sft_loss(policy, lengths=LENGTHS))


COMBINED = [case for case in GOLDEN["dpo"] if isinstance(case["loss_type"], list)]


@pytest.mark.parametrize("case", params(COMBINED))
def test_fine_tuning_beside_preference_losses(case):
    weights = dict(zip(case["loss_type"], case.get("loss_weights", [1.0] * len(case["loss_type"])), strict=True))

    def loss(policy, ref):
        preference = sum(w * LOSSES[name](policy, ref, beta=0.1) for name, w in weights.items() if name != "sft")
        return preference + weights["sft"] * sft_loss(policy, lengths=LENGTHS)

    assert_golden(case, loss, logps("ref"))


@pytest.mark.parametrize("case", params(case for case in GOLDEN["dpo"] if case.get("use_weighting")))
def test_losses_weighted_by_the_policy(case):
    log_sum_sq_probs = per_token("log_sum_sq_probs").sum(axis=-1)

    def loss(policy, ref, log_sum_sq_probs):
        weights = wpo_weights(policy, log_sum_sq_probs=log_sum_sq_probs, lengths=LENGTHS)
        return weights * LOSSES[case["loss_type"]](policy, ref, **keywords(case))

    assert_golden(case, loss, logps("ref"), log_sum_sq_probs)


@pytest.mark.parametrize("case", params(case for case in GOLDEN["dpo"] if "ld_alpha" in case))
def test_tails_that_count_less(case):
    def loss(policy_tokens, ref_tokens):
        both = policy_tokens, ref_tokens
        sums = [length_desensitized_logps(x, lengths=LENGTHS, ld_alpha=case["ld_alpha"]) for x in both]
        return LOSSES[case["loss_type"]](*sums, **keywords(case))

    tolerance = TOLERANCE["float64"]
    with jax.enable_x64(True):
        tokens = per_token("policy_token_logps"), per_token("ref_token_logps")
        np.testing.assert_allclose(loss(*tokens), case["per_pair"], **tolerance)
        gradient = jax.grad(lambda policy, ref: loss(policy, ref).mean())(*tokens)  # [16, 2, tokens]
    last = np.take_along_axis(gradient, LENGTHS[..., None] - 1, axis=-1)[..., 0]
    for column, side in enumerate(("chosen", "rejected")):
        np.testing.assert_allclose(gradient[:, column, 0], case[f"grad_{side}"], **tolerance)
        np.testing.assert_allclose(last[:, column], case[f"grad_tail_{side}"], **tolerance)


@pytest.mark.parametrize("case", [pytest.param(case, id=str(n)) for n, case in enumerate(GOLDEN["cpo"])])
def test_losses_of_the_cpo_trainer(case):
    options = {"beta": case["beta"]}
    smoothed = options | {"label_smoothing": case["label_smoothing"]}
    normalized = smoothed | {"lengths": LENGTHS, "simpo_gamma": case["simpo_gamma"]}
    loss = {
        "sigmoid": lambda policy: cpo_loss(policy, lengths=LENGTHS, cpo_alpha=0.0, **smoothed),
        "hinge": lambda policy: hinge_loss(policy, None, **options),
        "ipo": lambda policy: ipo_loss(policy, None, lengths=LENGTHS, **options),
        "simpo": lambda policy: alphapo_loss(policy, alphapo_alpha=case["alpha"], **normalized),
    }
    assert_golden(case, loss[case["loss_type"]])
    if case["loss_type"] == "simpo" and not case["alpha"]:
        assert_golden(case, lambda policy: simpo_loss(policy, **normalized))


@pytest.mark.parametrize("case", params(GOLDEN["orpo"]))
def test_odds_ratio(case):
    policy = logps("policy").astype(np.float32)
    ours = orpo_loss(policy, lengths=LENGTHS, beta=case["beta"]) - sft_loss(policy, lengths=LENGTHS)
    np.testing.assert_allclose(-ours, case["losses"], **TOLERANCE[case["dtype"]])


def judged_batch():
    """The batch as 32 judged completions, good ones first, 16 of which have a partner of another prompt."""
    partners = [np.array(BATCH[f"kto_{model}_kl_logps"]) for model in ("policy", "ref")]
    groups = [
        np.stack([logps(model).T.reshape(-1), np.append(partner, np.full(16, np.nan))], axis=-1)
        for model, partner in zip(("policy", "ref"), partners, strict=True)
    ]  # [32, 2] each
    return groups, np.repeat([True, False], 16), ~np.isnan(groups[0])


@pytest.mark.parametrize("case", [pytest.param(case, id=str(n)) for n, case in enumerate(GOLDEN["kto"])])
def test_judged_completions(case):
    groups, label, where = judged_batch()
    options = {name: case[name] for name in ("beta", "desirable_weight", "undesirable_weight")}
    with jax.enable_x64(True):

        def loss(policy):
            return kto_loss(policy, groups[1], label=label, where=where, **options).mean()

        value, gradient = jax.value_and_grad(loss)(groups[0])
        sums = unpaired_metrics(*groups, label=label, beta=case["beta"], where=where)
        kl = mean_metrics({name: x.sum() for name, x in sums.items()}, groups=32)["kl"]
    np.testing.assert_allclose(value, case["loss"], **TOLERANCE["float64"])
    np.testing.assert_allclose(kl, case["kl"], **TOLERANCE["float64"])
    expected = np.append(case["grad_desirable"], case["grad_undesirable"])
    np.testing.assert_allclose(gradient[:, 0], expected, **TOLERANCE["float64"])
    np.testing.assert_array_equal(gradient[:, 1], 0)


@pytest.mark.parametrize("case", params(case for case in GOLDEN["dpo"] if "metrics" in case))
def test_logged_means(case):
    tokens = per_token("policy_token_logps"), per_token("ref_token_logps")
    with jax.enable_x64(True):
        sums = [length_desensitized_logps(x, lengths=LENGTHS, ld_alpha=case.get("ld_alpha", 1.0)) for x in tokens]
        metrics = preference_metrics(*sums, beta=case["beta"], lengths=LENGTHS)
        means = mean_metrics({name: x.sum() for name, x in metrics.items()}, groups=16)
    assert len(case["metrics"]) == 6
    for name, expected in case["metrics"].items():  # no pair of the batch is a tie, which TRL would count as lost
        np.testing.assert_allclose(means[name], expected, **TOLERANCE["float64"])


def test_losses_that_trl_cannot_differentiate():
    log_sum_sq_probs = per_token("log_sum_sq_probs").sum(axis=-1).astype(np.float32)
    policy, ref = logps("policy").astype(np.float32), logps("ref").astype(np.float32)

    def weights(policy):
        return wpo_weights(policy, log_sum_sq_probs=log_sum_sq_probs, lengths=LENGTHS)

    for loss in (
        lambda policy: hinge_loss(policy, ref),
        lambda policy: sft_loss(policy, lengths=LENGTHS),
    ):
        plain = jax.grad(lambda policy, loss=loss: loss(policy).mean())(policy)
        weighted = jax.grad(lambda policy, loss=loss: (weights(policy) * loss(policy)).mean())(policy)
        np.testing.assert_allclose(weighted, weights(policy)[:, None] * plain, rtol=1e-6)
        assert jnp.abs(weighted).max() > 0
