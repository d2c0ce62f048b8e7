"""Preference losses as pure functions: arrays in, one loss per group out, nothing but jax underneath.

One algebra carries them all. The implicit reward is `r = beta * (policy_logps - ref_logps)`; DPO is Bradley-Terry on
`r`; Plackett-Luce DPO is Plackett-Luce on `r`; Bradley-Terry is Plackett-Luce with two candidates.

One convention too: data is positional with a trailing axis of candidates, best first, `[..., candidates]`; options are
keyword-only, and those that are scalars may be traced; `where` says which candidates exist; the loss is `[...]`, not
reduced, at least float32 (float64 stays). Take one function into any JAX code base, or look one up by name:

>>> import jax.numpy as jnp
>>> from jaxdpo.losses import LOSSES
>>> logps = jnp.array([[-12.0, -15.0]])
>>> print(LOSSES["sigmoid"].fn(logps, logps, beta=0.1).round(4))
[0.6931]

Where a loss needs more of the data than that, it takes it as a keyword: `lengths` and `ranks` of the completions, a
`label` for completions that are judged one by one. Losses that do not look at a reference take `policy_logps` alone;
in `LOSSES` they have the common form. A new loss is a function in this package and a row in `LOSSES`; the tests run
over the rows.
"""

from jaxdpo.losses.combine import combine, over_all_pairs, weighted_by_policy, with_divergence
from jaxdpo.losses.divergences import DIVERGENCES, alpha_divergence, forward_kl, js_divergence, reverse_kl
from jaxdpo.losses.length_normalized import ipo_loss, sigmoid_norm_loss
from jaxdpo.losses.likelihood import sft_loss, unlikelihood_loss
from jaxdpo.losses.listwise import exo_loss
from jaxdpo.losses.metrics import mean_metrics, preference_metrics, unpaired_metrics
from jaxdpo.losses.pointwise import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_loss, sppo_hard_loss
from jaxdpo.losses.policy_gradient import (
    KL_ESTIMATORS,
    entropy,
    generalized_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    ppo_policy_loss,
    ppo_value_loss,
)
from jaxdpo.losses.preference import discopop_loss, dpo_loss, hinge_loss, implicit_rewards, robust_dpo_loss
from jaxdpo.losses.ranking import plackett_luce_dpo_loss, plackett_luce_loss
from jaxdpo.losses.reference_free import alphapo_loss, cpo_loss, orpo_loss, simpo_loss
from jaxdpo.losses.reward import bradley_terry_loss
from jaxdpo.losses.reward_metrics import reward_metrics
from jaxdpo.losses.spec import LossSpec, RunningMean
from jaxdpo.losses.table import LOSSES, REWARD_LOSSES
from jaxdpo.losses.token_rewards import next_kl_coef, token_rewards, whiten
from jaxdpo.losses.transport import aot_loss, aot_unpaired_loss
from jaxdpo.losses.unpaired import bco_loss, bco_running, kto_loss, update_running_mean
from jaxdpo.losses.weighting import length_desensitized_logps, wpo_weights

__all__ = [
    "DIVERGENCES",
    "KL_ESTIMATORS",
    "LOSSES",
    "REWARD_LOSSES",
    "LossSpec",
    "RunningMean",
    "alpha_divergence",
    "alphapo_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bco_pair_loss",
    "bco_running",
    "bradley_terry_loss",
    "combine",
    "cpo_loss",
    "discopop_loss",
    "dpo_loss",
    "entropy",
    "exo_loss",
    "forward_kl",
    "generalized_advantages",
    "hinge_loss",
    "implicit_rewards",
    "ipo_loss",
    "js_divergence",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kto_loss",
    "length_desensitized_logps",
    "mean_metrics",
    "nca_loss",
    "next_kl_coef",
    "orpo_loss",
    "over_all_pairs",
    "plackett_luce_dpo_loss",
    "plackett_luce_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "preference_metrics",
    "reverse_kl",
    "reward_metrics",
    "robust_dpo_loss",
    "sft_loss",
    "sigmoid_norm_loss",
    "simpo_loss",
    "sppo_hard_loss",
    "token_rewards",
    "unlikelihood_loss",
    "unpaired_metrics",
    "update_running_mean",
    "weighted_by_policy",
    "whiten",
    "with_divergence",
    "wpo_weights",
]
