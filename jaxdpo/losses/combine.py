"""Losses made from losses: weighted sums, all pairs of a ranking, WPO's weights, another divergence.

Each function takes rows of `LOSSES`, or your own `LossSpec`, and gives back a `LossSpec` with the facts that follow:
its data, its options, how its groups depend on each other. A sum passes to every loss what that one names:

>>> import jax.numpy as jnp
>>> from jaxdpo.losses import LOSSES, combine, over_all_pairs
>>> policy_logps, ref_logps = jnp.array([[-12.0, -15.0]]), jnp.array([[-13.0, -14.0]])
>>> rpo = combine([LOSSES["sigmoid"], LOSSES["sft"]])
>>> print(rpo.options, rpo.data, rpo.coupling)
('beta', 'label_smoothing', 'loss_weights') ('lengths',) denominator
>>> loss = rpo.fn(policy_logps, ref_logps, lengths=jnp.array([[6, 5]]), beta=0.1, loss_weights=(1.0, 0.5))
>>> print(loss.round(4))  # -log sigmoid(0.1 * 2) + 0.5 * 12 / 6
[1.5981]

A loss of two candidates trains on a ranking of any number through its pairs:

>>> ranking = over_all_pairs(LOSSES["hinge"])
>>> print(ranking.fn(jnp.array([[-2.0, -1.0, -3.0]]), None, beta=1.0).round(4))  # the mean of 2, 0 and 0
[0.6667]

They nest in one order: `combine([over_all_pairs(weighted_by_policy(with_divergence(loss, name))), ...])`. WPO weighs a
loss by how likely the policy itself would have written the completions that it compares, so on a ranking each pair has
a weight of its own; a weight around `over_all_pairs` would be that of all completions together.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxdpo.losses._core import explain
from jaxdpo.losses.divergences import DIVERGENCES, alpha_divergence
from jaxdpo.losses.ranking import all_pairs
from jaxdpo.losses.spec import LossSpec
from jaxdpo.losses.weighting import wpo_weights
from jaxdpo.types import InputError

_AXIS = ("axis_name",)
_SHARED = {"none": (), "denominator": ("mean_length", *_AXIS), "statistic": _AXIS, "sort": _AXIS}
"""Couplings, weakest first, and the keywords that they come with."""


def combine(specs: Sequence[LossSpec]) -> LossSpec:
    """The weighted sum of losses on the same log-probabilities.

    An option that several of them take, such as `beta`, is the same for all. A loss that needs no reference gets none.

    Args:
      specs: one or more, for data of one kind.
    Returns:
      A spec whose `fn` also takes `loss_weights`, one number per loss in order, as a tuple or an array that may be
      traced; by default all are 1, as in TRL. Its coupling is the strongest among them. A single spec stays as it is.
    Raises:
      InputError: (a ValueError) if no data fits all of them, two carry state, or one of them is a sum itself.
    References:
      Pang et al. 2024 (DPO and likelihood), https://arxiv.org/abs/2404.19733; Wang et al. 2024 (sigmoid, bco_pair and
      sft), https://arxiv.org/abs/2411.10442.
    Example:
      >>> from jaxdpo.losses import LOSSES
      >>> logps = jnp.array([-12.0, -15.0])
      >>> both = combine([LOSSES["sigmoid"], LOSSES["hinge"]])
      >>> print(f"{both.fn(logps, logps, loss_weights=(1.0, 2.0)):.4f}")  # log 2 + 2 * 1
      2.6931
    """
    if len(specs) == 1:
        return specs[0]
    _check_together(specs)
    names = ", ".join(map(_name, specs))

    def sum_of_losses(policy_logps: Any, ref_logps: Any, *, loss_weights: Any = None, **keywords: Any) -> jax.Array:
        unknown = sorted(set(keywords).difference(*map(_keywords, specs)))
        if unknown:
            raise TypeError(f"none of {names} takes the keyword {', '.join(unknown)}")
        losses = [_call(spec.fn, spec, policy_logps, ref_logps, keywords) for spec in specs]  # [...] each
        weights = jnp.asarray([1.0] * len(specs) if loss_weights is None else loss_weights, losses[0].dtype)
        with explain(
            f"loss_weights has shape {weights.shape}; allowed: ({len(specs)},); pass one weight for each of {names}"
        ):
            chex.assert_shape(weights, (len(specs),))
        return functools.reduce(jnp.add, (weights[k] * loss for k, loss in enumerate(losses)))

    def running(state: Any, policy_logps: Any, ref_logps: Any, **keywords: Any) -> Any:
        ((spec, update),) = carriers
        return _call(functools.partial(update, state), spec, policy_logps, ref_logps, keywords)

    carriers = [(spec, spec.running) for spec in specs if spec.running is not None]
    return LossSpec(
        fn=sum_of_losses,
        needs_reference=any(spec.needs_reference for spec in specs),
        candidates=next((spec.candidates for spec in specs if spec.candidates is not None), None),
        coupling=max((spec.coupling for spec in specs), key=list(_SHARED).index),
        options=(*_union(spec.options for spec in specs), "loss_weights"),
        data=_union(spec.data for spec in specs),
        divergence=any(spec.divergence for spec in specs),
        running=running if carriers else None,
    )


def over_all_pairs(spec: LossSpec) -> LossSpec:
    """A loss of two candidates, applied to all ordered pairs of a ranking: the mean over the pairs of each group.

    Candidates that tie, or are both `UNRANKED`, are no pair; an `UNRANKED` one is worse than every ranked one. Pairs of
    one ranking are not independent: `dpo_loss` over them is no likelihood of it, `plackett_luce_dpo_loss` is.

    Args:
      spec: of exactly two candidates that are compared.
    Returns:
      A spec for any number of candidates whose `fn` also takes `ranks`, see `plackett_luce_loss`; by default candidates
      stand best first. For two of them it is the loss itself. Groups without a pair return 0 and get zero gradient.
      The chosen completions of a loss with `mean_length` are now those of all pairs: it takes none, and its coupling
      is `statistic`.
    Raises:
      InputError: (a ValueError) if the loss takes other data.
    References:
      Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, Eq. 1, for the mean over the pairs of each ranking.
    Example:
      >>> from jaxdpo.losses import LOSSES
      >>> ranking, ranks = over_all_pairs(LOSSES["hinge"]), jnp.array([0, 1, 1])
      >>> print(ranking.fn(jnp.array([-2.0, -1.0, -3.0]), None, beta=1.0, ranks=ranks))  # the mean of 2 and 0
      1.0
    """
    if spec.candidates != 2 or "label" in spec.data or spec.running is not None:
        raise InputError(
            f"{_name(spec)} takes {_needs(spec)}; allowed: a loss of two completions that are compared, such as "
            "dpo_loss; one that takes any number needs no pairs"
        )

    def mean_over_pairs(
        policy_logps: Any, ref_logps: Any, *, ranks: Any = None, where: Any = None, **keywords: Any
    ) -> jax.Array:
        arrays = {name: keywords.pop(name) for name in spec.data if keywords.get(name) is not None}
        if ref_logps is not None:
            arrays["ref_logps"] = ref_logps
        pairs, exists = all_pairs(ranks, where, policy_logps=policy_logps, **arrays)
        policy_pairs, ref_pairs = pairs.pop("policy_logps"), pairs.pop("ref_logps", None)  # [..., pairs, 2]
        both = jnp.stack([exists, exists], axis=-1)  # [..., pairs, 2]
        losses = spec.fn(policy_pairs, ref_pairs, where=both, **pairs, **keywords)  # [..., pairs], 0 where none exists
        return losses.sum(axis=-1) / jnp.maximum(exists.sum(axis=-1), 1).astype(losses.dtype)  # [...]

    coupling = "statistic" if spec.coupling == "denominator" else spec.coupling
    return spec._replace(fn=mean_over_pairs, candidates=None, coupling=coupling, data=_union([spec.data, ["ranks"]]))


def weighted_by_policy(spec: LossSpec) -> LossSpec:
    """WPO: a loss times `wpo_weights`, so that data the policy would not have written counts less.

    Args:
      spec: of completions that are compared.
    Returns:
      A spec whose `fn` also takes `lengths` and `log_sum_sq_probs`, see `wpo_weights`.
    Raises:
      InputError: (a ValueError) if the loss takes labels, or is weighted already.
    References:
      Zhou et al. 2024, https://arxiv.org/abs/2406.11827.
    Example:
      >>> from jaxdpo.losses import LOSSES
      >>> logps, statistics = jnp.array([-12.0, -15.0]), jnp.array([-9.0, -10.0])
      >>> wpo = weighted_by_policy(LOSSES["hinge"])
      >>> loss = wpo.fn(logps, logps, log_sum_sq_probs=statistics, lengths=jnp.array([6, 5]))
      >>> print(f"{loss:.4f}")  # 1 * exp(-3 / 6 - 5 / 5)
      0.2231
    """
    if "label" in spec.data or "log_sum_sq_probs" in spec.data:
        raise InputError(
            f"{_name(spec)} takes {_needs(spec)}{', weighted' if 'log_sum_sq_probs' in spec.data else ''}; allowed: a "
            "loss of completions that are compared, not weighted yet, such as dpo_loss; leave this one as it is"
        )

    def weighted_loss(
        policy_logps: Any, ref_logps: Any, *, lengths: Any, log_sum_sq_probs: Any, where: Any = None, **keywords: Any
    ) -> jax.Array:
        if "lengths" in spec.data:
            keywords["lengths"] = lengths
        losses = spec.fn(policy_logps, ref_logps, where=where, **keywords)  # [...]
        weights = wpo_weights(policy_logps, log_sum_sq_probs=log_sum_sq_probs, lengths=lengths, where=where)  # [...]
        return weights.astype(losses.dtype) * losses

    return spec._replace(fn=weighted_loss, data=_union([spec.data, ["lengths", "log_sum_sq_probs"]]))


def with_divergence(spec: LossSpec, name: str) -> LossSpec:
    """A loss under the penalty of another f-divergence.

    Args:
      spec: whose `fn` takes `divergence`.
      name: a key of `DIVERGENCES`.
    Returns:
      A spec with the divergence chosen. With `alpha_divergence`, `fn` also takes `f_alpha_divergence_coef`, its alpha.
    Raises:
      InputError: (a ValueError) if there is no such divergence, or the loss has none to choose.
    References:
      Wang et al. 2023, https://arxiv.org/abs/2309.16240.
    Example:
      >>> from jaxdpo.losses import LOSSES
      >>> forward = with_divergence(LOSSES["hinge"], "forward_kl")
      >>> print(f"{forward.fn(jnp.array([0.0, -1.0]), jnp.zeros(2), beta=0.1):.4f}")  # 1 - 0.1 * (e - 1)
      0.8282
    """
    if name not in DIVERGENCES:
        raise InputError(f"divergence {name!r} does not exist; allowed: {', '.join(DIVERGENCES)}; choose one of them")
    if not spec.divergence:
        raise InputError(
            f"{_name(spec)} takes no divergence; allowed: a loss that does, such as dpo_loss; leave it out"
        )
    if DIVERGENCES[name] is not alpha_divergence:
        return spec._replace(fn=functools.partial(spec.fn, divergence=DIVERGENCES[name]), divergence=False)

    def alpha_loss(policy_logps: Any, ref_logps: Any, *, f_alpha_divergence_coef: Any = 0.5, **rest: Any) -> jax.Array:
        score = functools.partial(alpha_divergence, alpha=f_alpha_divergence_coef)
        return spec.fn(policy_logps, ref_logps, divergence=score, **rest)

    return spec._replace(fn=alpha_loss, options=(*spec.options, "f_alpha_divergence_coef"), divergence=False)


def _check_together(specs: Sequence[LossSpec]) -> None:
    """InputError for losses that have no sum."""
    if not specs:
        raise InputError("combine got no loss; allowed: one or more specs, such as rows of LOSSES")
    takes = "; ".join(f"{_name(spec)} takes {_needs(spec)}" for spec in specs)
    if len({spec.candidates for spec in specs} - {None}) > 1 or len({"label" in spec.data for spec in specs}) > 1:
        raise InputError(f"no data fits all of these: {takes}; combine losses that take the same")
    if sum(spec.running is not None for spec in specs) > 1:
        raise InputError(f"more than one of these carries a running mean: {takes}; combine one of them with others")
    if any("loss_weights" in spec.options for spec in specs):
        raise InputError("one of the losses is a sum with weights of its own; pass all losses to one call of combine")


def _keywords(spec: LossSpec) -> set[str]:
    """What a loss takes beside log-probabilities."""
    divergence = ["divergence"] if spec.divergence else []
    baseline = ["baseline"] if spec.running is not None else []
    return {"where", *spec.options, *spec.data, *_SHARED[spec.coupling], *divergence, *baseline}


def _call(
    fn: Callable[..., Any], spec: LossSpec, policy_logps: Any, ref_logps: Any, keywords: Mapping[str, Any]
) -> Any:
    """Calls a function of one loss with what that loss takes of a sum's reference and keywords."""
    taken = {name: value for name, value in keywords.items() if name in _keywords(spec)}
    return fn(policy_logps, ref_logps if spec.needs_reference else None, **taken)


def _union(names: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All names once, in the order in which they first come."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(names)))


def _name(spec: LossSpec) -> str:
    return getattr(getattr(spec.fn, "func", spec.fn), "__name__", "this loss")  # a partial has a func


def _needs(spec: LossSpec) -> str:
    number = "any number of completions" if spec.candidates is None else f"groups of {spec.candidates}"
    return f"{number}, {'judged by a label' if 'label' in spec.data else 'compared with each other'}"
