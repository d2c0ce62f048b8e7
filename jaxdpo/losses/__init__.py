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

A new loss is a function in this package and a row in `LOSSES`; the tests run over the rows.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax

from jaxdpo.losses.metrics import preference_metrics
from jaxdpo.losses.preference import dpo_loss, implicit_rewards
from jaxdpo.losses.ranking import plackett_luce_dpo_loss, plackett_luce_loss
from jaxdpo.losses.reward import bradley_terry_loss


class LossSpec(NamedTuple):
    """A loss that can be trained by name, and the facts that a training step has to know about it."""

    fn: Callable[..., jax.Array]
    """`fn(policy_logps, ref_logps, *, where, **options) -> [...]`, from `[..., candidates]` summed log-probs."""
    needs_reference: bool
    """Whether a reference policy has to be evaluated; without one `ref_logps` is None."""
    candidates: int | None
    """Candidates that a group must have; None: any number."""
    coupling: Literal["none", "denominator", "statistic", "sort"]
    """How groups of a step depend on each other. `none`: not at all, so gradients accumulate by microbatch.
    `denominator`: a count known from the batch. `statistic`: a constant of the whole step's log-probs, from a forward
    pass before. `sort`: all of the step's log-probs at once."""
    options: tuple[str, ...]
    """Names of the configuration values that are passed to `fn` as keywords."""


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(
        fn=dpo_loss, needs_reference=True, candidates=2, coupling="none", options=("beta", "label_smoothing")
    ),
}
"""The losses that training offers, by the name of TRL's `loss_type`."""

__all__ = [
    "LOSSES",
    "LossSpec",
    "bradley_terry_loss",
    "dpo_loss",
    "implicit_rewards",
    "plackett_luce_dpo_loss",
    "plackett_luce_loss",
    "preference_metrics",
]
