"""The DPO family against TRL's numbers: value, value per pair and gradient of every case of one of its losses."""

import functools

import numpy as np
import pytest

from jaxdpo.losses.divergences import DIVERGENCES
from jaxdpo.losses.length_normalized import ipo_loss, sigmoid_norm_loss
from jaxdpo.losses.listwise import exo_loss
from jaxdpo.losses.pointwise import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_loss, sppo_hard_loss
from jaxdpo.losses.preference import discopop_loss, dpo_loss, hinge_loss, robust_dpo_loss
from jaxdpo.losses.transport import aot_loss, aot_unpaired_loss
from tests.losses.golden_cases import GOLDEN, LENGTHS, assert_golden, logps, params

FAMILY = {
    "sigmoid": dpo_loss,
    "hinge": hinge_loss,
    "ipo": functools.partial(ipo_loss, lengths=LENGTHS),
    "exo_pair": exo_loss,
    "nca_pair": nca_loss,
    "robust": robust_dpo_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "sigmoid_norm": functools.partial(sigmoid_norm_loss, lengths=LENGTHS),
}
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}
"""The losses to which TRL's label smoothing makes a difference."""
ELSEWHERE = ("ld_alpha", "use_weighting")


def is_plain(case):
    return str(case["loss_type"]) in FAMILY and not any(name in case for name in ELSEWHERE)


def our_options(case):
    """A case's options as keywords of the loss."""
    options = {name: case[name] for name in ("beta", "discopop_tau") if name in case}
    if case["loss_type"] in SMOOTHED:
        options["label_smoothing"] = case["label_smoothing"]
    if "f_divergence_type" in case:
        options["divergence"] = DIVERGENCES[case["f_divergence_type"]]
    if "f_alpha_divergence_coef" in case:
        options["divergence"] = functools.partial(options["divergence"], alpha=case["f_alpha_divergence_coef"])
    return options


@pytest.mark.parametrize("case", params(filter(is_plain, GOLDEN["dpo"])))
def test_equals_trl(case):
    loss = functools.partial(FAMILY[case["loss_type"]], **our_options(case))
    assert_golden(case, loss, logps("ref"))


def test_every_loss_and_divergence_has_a_case():
    cases = list(filter(is_plain, GOLDEN["dpo"]))
    assert len(cases) == 56
    assert {case["loss_type"] for case in cases} == set(FAMILY)
    assert {case.get("f_divergence_type", "reverse_kl") for case in cases} == set(DIVERGENCES)


@pytest.mark.parametrize("case", params(case for case in GOLDEN["cpo"] if case["loss_type"] == "sigmoid"))
def test_conservative_dpo_without_reference_equals_trls_cpo(case):
    """TRL's DPO ignores label smoothing, so its numbers for smoothing are those of its CPO without SFT term."""
    assert_golden(case, lambda policy: dpo_loss(policy, None, beta=0.1, label_smoothing=case["label_smoothing"]))


def test_trls_dpo_ignores_label_smoothing_and_ours_does_not():
    plain, smoothed = (
        next(case for case in GOLDEN["dpo"] if case["loss_type"] == "sigmoid" and case["label_smoothing"] == epsilon)
        for epsilon in (0.0, 0.1)
    )
    assert plain["loss"] == smoothed["loss"]
    ours = dpo_loss(logps("policy"), logps("ref"), beta=0.1, label_smoothing=0.1)
    margin = 0.1 * (logps("policy") - logps("ref")) @ np.array([1, -1])
    np.testing.assert_allclose(ours, 0.9 * np.log1p(np.exp(-margin)) + 0.1 * np.log1p(np.exp(margin)), rtol=1e-5)
