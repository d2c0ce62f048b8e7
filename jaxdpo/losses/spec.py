"""What training has to know about a loss."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax


class LossSpec(NamedTuple):
    """A loss that can be trained by name, and the facts that a training step has to know about it."""

    fn: Callable[..., jax.Array]
    """`fn(policy_logps, ref_logps, *, where, **data, **options) -> [...]`, from `[..., candidates]` log-probs."""
    needs_reference: bool
    """Whether a reference policy has to be evaluated; without one `ref_logps` is None."""
    candidates: int | None
    """Candidates that a group must have; None: any number, best first."""
    coupling: Literal["none", "denominator", "statistic", "sort"]
    """How groups of a step depend on each other. `none`: not at all, so gradients accumulate by microbatch.
    `denominator`: through `mean_length`, a count known from the batch. `statistic`: through a constant of the whole
    step. `sort`: through all of the step's log-probs at once. The coupled take `axis_name`."""
    options: tuple[str, ...]
    """Names of the configuration values that are passed to `fn` as keywords; left out, the function's default holds."""
    data: tuple[str, ...] = ()
    """Arrays of the batch that are passed to `fn` as keywords: `lengths`, `ranks` and `log_sum_sq_probs`
    `[..., candidates]`, `label` and `margin` `[...]`."""
    divergence: bool = False
    """Whether `fn` takes `divergence`, a value of `DIVERGENCES`."""
    running: Callable[..., "RunningMean"] | None = None
    """For a loss that carries state from step to step: `(state, policy_logps, ref_logps, *, where, beta) -> state`; the
    mean of the new state is passed to `fn` as `baseline`."""


class RunningMean(NamedTuple):
    """Mean of all values seen so far in a run."""

    mean: jax.Array
    """float32 scalar; 0 before the first."""
    weight: jax.Array
    """float32 scalar: how many values."""
