"""The losses that training offers by name."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxdpo.losses.length_normalized import ipo_loss, sigmoid_norm_loss
from jaxdpo.losses.likelihood import sft_loss, unlikelihood_loss
from jaxdpo.losses.listwise import exo_loss
from jaxdpo.losses.pointwise import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_loss, sppo_hard_loss
from jaxdpo.losses.preference import discopop_loss, dpo_loss, hinge_loss, robust_dpo_loss
from jaxdpo.losses.ranking import plackett_luce_dpo_loss, plackett_luce_loss
from jaxdpo.losses.reference_free import alphapo_loss, cpo_loss, orpo_loss, simpo_loss
from jaxdpo.losses.reward import bradley_terry_loss
from jaxdpo.losses.spec import LossSpec
from jaxdpo.losses.transport import aot_loss, aot_unpaired_loss
from jaxdpo.losses.unpaired import bco_loss, bco_running, kto_loss


def _without_reference(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The signature of the table for a loss that takes the policy, or the rewards, alone."""

    @functools.wraps(fn)
    def adapted(values: Any, ref_logps: Any, **keywords: Any) -> jax.Array:
        del ref_logps
        return fn(values, **keywords)

    return adapted


def _pairs(
    fn: Callable[..., jax.Array], *options: str, data: tuple[str, ...] = (), divergence: bool = True
) -> LossSpec:
    """A row of the DPO family: a chosen and a rejected completion against a reference, groups independent."""
    return LossSpec(fn, True, 2, "none", ("beta", *options), data, divergence)


LOSSES: dict[str, LossSpec] = {
    "sigmoid": _pairs(dpo_loss, "label_smoothing"),
    "hinge": _pairs(hinge_loss),
    "ipo": _pairs(ipo_loss, data=("lengths",)),
    "exo_pair": _pairs(exo_loss, "label_smoothing")._replace(candidates=None),
    "nca_pair": _pairs(nca_loss, divergence=False)._replace(candidates=None),
    "robust": _pairs(robust_dpo_loss, "label_smoothing"),
    "bco_pair": _pairs(bco_pair_loss, divergence=False),
    "sppo_hard": _pairs(sppo_hard_loss, divergence=False),
    "aot": _pairs(aot_loss, "label_smoothing", divergence=False)._replace(coupling="sort"),
    "aot_unpaired": _pairs(aot_unpaired_loss, "label_smoothing", divergence=False)._replace(coupling="sort"),
    "apo_zero": _pairs(apo_zero_loss, divergence=False),
    "apo_down": _pairs(apo_down_loss, divergence=False),
    "discopop": _pairs(discopop_loss, "discopop_tau"),
    "sigmoid_norm": _pairs(sigmoid_norm_loss, data=("lengths",)),
    "plackett_luce": LossSpec(plackett_luce_dpo_loss, True, None, "none", ("beta",), ("ranks",), divergence=True),
    "sft": LossSpec(_without_reference(sft_loss), False, None, "denominator", (), ("lengths",)),
    "unlikelihood": LossSpec(_without_reference(unlikelihood_loss), False, 2, "none", ("unlikelihood_alpha",)),
    "simpo": LossSpec(
        _without_reference(simpo_loss), False, 2, "none", ("beta", "simpo_gamma", "label_smoothing"), ("lengths",)
    ),
    "alphapo": LossSpec(
        _without_reference(alphapo_loss),
        False,
        2,
        "none",
        ("beta", "simpo_gamma", "alphapo_alpha", "label_smoothing"),
        ("lengths",),
    ),
    "cpo": LossSpec(
        _without_reference(cpo_loss), False, 2, "denominator", ("beta", "cpo_alpha", "label_smoothing"), ("lengths",)
    ),
    "orpo": LossSpec(_without_reference(orpo_loss), False, 2, "denominator", ("beta",), ("lengths",)),
    "kto": LossSpec(kto_loss, True, 2, "statistic", ("beta", "desirable_weight", "undesirable_weight"), ("label",)),
    "bco": LossSpec(bco_loss, True, 1, "statistic", ("beta",), ("label",), running=bco_running),
}
"""The losses that training offers, by the name of TRL's `loss_type` where TRL has them."""

REWARD_LOSSES: dict[str, LossSpec] = {
    "bradley_terry": LossSpec(
        _without_reference(bradley_terry_loss), False, 2, "none", ("center_rewards_coefficient",), ("margin",)
    ),
    "plackett_luce": LossSpec(_without_reference(plackett_luce_loss), False, None, "none", (), ("ranks",)),
}
"""The losses of reward models, which take rewards `[..., candidates]` in place of log-probabilities."""
