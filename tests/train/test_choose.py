"""From options and data to one loss: what would have no effect, or cannot be used, is refused and says what would."""

import dataclasses

import numpy as np
import pytest

from jaxdpo.config import DPOConfig
from jaxdpo.losses import LOSSES
from jaxdpo.train.choose import check_objective, choose_loss, scalars_of, with_needed_partners
from jaxdpo.types import UNRANKED, InputError
from tests import tiny

PAIRS = tiny.dataset(groups=4)
RANKINGS = tiny.dataset(groups=4, candidates=(3, 3))
SINGLE = tiny.of_groups(
    [dataclasses.replace(group, label=True) for group in tiny.dataset(groups=4, candidates=(1, 1)).groups]
)


def with_ranks(*ranks):
    groups = tiny.dataset(groups=2, candidates=(3, 3)).groups
    return tiny.of_groups([dataclasses.replace(group, ranks=ranks) for group in groups])


def config(**options):
    return DPOConfig(model="m", data="d.jsonl", output_dir="run", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discopop_tau": 0.1}, r"--discopop-tau 0\.1 has no effect with --loss sigmoid; allowed with: discopop;"),
        ({"loss": "hinge", "label_smoothing": 0.1}, r"--label-smoothing 0\.1 has no effect with --loss hinge;"),
        ({"loss": "ipo,sft", "simpo_gamma": 1.0}, r"--simpo-gamma 1\.0 has no effect with --loss ipo,sft; .*simpo"),
        ({"loss": "simpo", "reference_free": True}, "--reference-free has no effect with --loss simpo"),
        ({"loss": "kto", "reference_free": True}, "--reference-free has no effect with --loss kto"),
        ({"loss": "aot", "f_divergence_type": "forward_kl"}, "--f-divergence-type forward_kl has no effect with"),
        ({"loss": "sft", "f_divergence_type": "forward_kl"}, "--f-divergence-type forward_kl has no effect with"),
        ({"loss": "sigmoid,aot", "f_divergence_type": "forward_kl"}, "--f-divergence-type forward_kl has no effect"),
        ({"reference_free": True, "f_divergence_type": "forward_kl"}, "--reference-free leaves none; give one of them"),
        ({"f_alpha_divergence_coef": 0.3}, "needs --f-divergence-type alpha_divergence; add it or drop the flag"),
        (
            {"loss": "kto", "use_weighting": True},
            "--use-weighting has no effect with --loss kto; allowed with: sigmoid",
        ),
        ({"loss": "sft", "ld_alpha": 0.5}, r"--ld-alpha 0\.5 has no effect with --loss sft; allowed with: sigmoid"),
        ({"loss": "bco", "ld_alpha": 0.5}, r"--ld-alpha 0\.5 has no effect with --loss bco; allowed with: sigmoid"),
        ({"loss": "simpo", "ref_model_sync_steps": 2}, "--ref-model-sync-steps 2 has no effect with --loss simpo"),
        (
            {"reference_free": True, "ref_model_sync_steps": 2},
            "--ref-model-sync-steps 2 has no effect with --loss sigmoid --reference-free",
        ),
        ({"ref_model_mixup_alpha": 0.5}, "--ref-model-mixup-alpha needs --ref-model-sync-steps; add it or drop"),
        (
            {"loss": "simpo", "precompute_ref_log_probs": False},
            "--no-precompute-ref-log-probs has no effect with --loss simpo; allowed with: sigmoid",
        ),
        (
            {"reference_free": True, "precompute_ref_log_probs": False},
            "--no-precompute-ref-log-probs has no effect with --loss sigmoid --reference-free",
        ),
        (
            {"ref_model_sync_steps": 2, "precompute_ref_log_probs": False},
            "--no-precompute-ref-log-probs has no effect with --ref-model-sync-steps: .* drop one of them",
        ),
        ({"loss": "exo_pair", "label_smoothing": 0.0}, r"label_smoothing=0\.0 is out of range"),
        ({"loss": "nca_pair", "f_divergence_type": "forward_kl"}, "--f-divergence-type forward_kl has no effect with"),
        ({"use_weighting": True, "ld_alpha": 0.5}, "--use-weighting weighs by .* and --ld-alpha counts a part"),
        ({"loss": "kto,bco"}, "kto|bco"),
    ],
)
def test_what_would_be_without_effect_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        check_objective(config(**options))


@pytest.mark.parametrize("name", LOSSES)
def test_every_objective_is_valid_by_default_and_with_all_its_options(name):
    check_objective(config(loss=name))
    options = {option: 0.3 for option in LOSSES[name].options if option != "beta"}
    check_objective(config(loss=name, **options))
    assert scalars_of(config(loss=name, **options)) == {"beta": 0.1, **options}


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"loss": "kto"}, PAIRS, "--loss kto needs single completions with a label .* d.jsonl holds completions that"),
        ({}, SINGLE, "--loss sigmoid needs completions that are compared.* allowed with this data: kto, bco;"),
        ({"loss": "sigmoid,sft"}, SINGLE, "--loss sigmoid needs completions that are compared"),
        (
            {"loss": "exo_pair"},
            with_ranks(0, 0, 1),
            "random, line 1: completions tie for the first rank, and --loss exo",
        ),
    ],
)
def test_data_that_an_objective_cannot_use_is_refused(options, data, message):
    with pytest.raises(InputError, match=message):
        choose_loss(config(**options), [data])


def test_held_out_data_has_to_fit_too():
    with pytest.raises(InputError, match=r"e\.jsonl holds single completions with a label"):
        choose_loss(config(eval_data="e.jsonl"), [PAIRS, SINGLE])


def test_a_row_of_the_table_is_taken_as_it_is_on_pairs():
    assert choose_loss(config(), [PAIRS]) == LOSSES["sigmoid"]
    assert choose_loss(config(loss="plackett_luce"), [PAIRS]) == LOSSES["plackett_luce"]._replace(data=())


def test_on_rankings_a_loss_of_pairs_is_the_mean_over_all_of_them():
    logps = np.array([[-3.0, -7.0, -4.0]])
    loss = choose_loss(config(), [RANKINGS])
    got = loss.fn(logps, np.zeros_like(logps), where=np.ones_like(logps, bool), beta=0.5)
    margins = 0.5 * np.array([4.0, 1.0, -3.0])
    np.testing.assert_allclose(got, [np.log1p(np.exp(-margins)).mean()], rtol=1e-6)
    assert choose_loss(config(), [PAIRS, RANKINGS]).candidates is None  # held-out rankings count


def test_ranks_are_read_where_some_tie():
    assert "ranks" in choose_loss(config(loss="plackett_luce"), [with_ranks(0, 0, 1)]).data
    assert "ranks" in choose_loss(config(), [with_ranks(0, 0, 1)]).data
    assert "ranks" not in choose_loss(config(), [RANKINGS]).data
    choose_loss(config(loss="exo_pair"), [with_ranks(0, UNRANKED, UNRANKED)])  # one best


def test_a_reference_that_is_not_needed_is_not_evaluated():
    assert not choose_loss(config(reference_free=True), [PAIRS]).needs_reference
    assert choose_loss(config(loss="simpo,sigmoid"), [PAIRS]).needs_reference
    assert not choose_loss(config(loss="simpo,sft"), [PAIRS]).needs_reference


def test_only_kto_takes_partners():
    assert with_needed_partners(config(loss="kto"), SINGLE).candidates == 2
    assert with_needed_partners(config(loss="bco"), SINGLE) is SINGLE
    assert with_needed_partners(config(), PAIRS) is PAIRS


def test_weights_are_passed_on():
    assert scalars_of(config(loss="sigmoid,sft", loss_weights="1,0.005"))["loss_weights"] == (1.0, 0.005)
