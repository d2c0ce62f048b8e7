"""From the options of a run and the shape of its data to one loss; whatever would be without effect is refused."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdpo.config import DPOConfig
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.partners import with_partners
from jaxdpo.losses import LOSSES, LossSpec, combine, over_all_pairs, weighted_by_policy, with_divergence
from jaxdpo.options import flag
from jaxdpo.types import InputError

LOSS_OPTIONS = (
    "label_smoothing",
    "discopop_tau",
    "simpo_gamma",
    "alphapo_alpha",
    "cpo_alpha",
    "unlikelihood_alpha",
    "desirable_weight",
    "undesirable_weight",
)
"""Options that only some losses take."""


def check_objective(config: DPOConfig) -> None:
    """InputError for an option that these objectives would ignore, or a value that one of them refuses."""
    rows = {name: LOSSES[name] for name in config.losses}
    for option in LOSS_OPTIONS:
        if getattr(config, option) is not None and not any(option in row.options for row in rows.values()):
            _ignored(config, option, [name for name, row in LOSSES.items() if option in row.options])
    _check_reference(config, rows)
    if config.use_weighting and any("label" in row.data for row in rows.values()):
        _ignored(config, "use_weighting", [name for name, row in LOSSES.items() if "label" not in row.data])
    means = [name for name, row in LOSSES.items() if row.coupling == "denominator" or "label" in row.data]
    if config.ld_alpha is not None and not set(means).isdisjoint(rows):
        _ignored(config, "ld_alpha", [name for name in LOSSES if name not in means])
    if config.use_weighting and config.ld_alpha is not None:
        raise InputError(
            "--use-weighting weighs by the probability of whole completions and --ld-alpha counts a part of them; "
            "give one"
        )
    chosen = _combined(config)
    zeros = jnp.zeros((1, chosen.candidates or 2))
    data = {
        name: None if name == "ranks" else jnp.ones((1,) if name == "label" else zeros.shape) for name in chosen.data
    }
    options = scalars_of(config)
    # Plain numbers here, so that the loss checks their range: in training they are traced.
    chosen.fn(zeros, zeros, **data, **{name: options[name] for name in chosen.options if name in options})


def _check_reference(config: DPOConfig, rows: dict[str, LossSpec]) -> None:
    """InputError for options of a reference that these objectives do not have, or not in this form."""
    compared = [name for name, row in LOSSES.items() if row.needs_reference and "label" not in row.data]
    if config.reference_free and set(compared).isdisjoint(rows):
        _ignored(config, "reference_free", compared)
    diverging = [name for name, row in LOSSES.items() if row.divergence]
    if config.f_divergence_type is not None:
        if config.reference_free:
            raise InputError(
                f"--f-divergence-type {config.f_divergence_type} measures a distance to the reference, and "
                "--reference-free leaves none; give one of them"
            )
        referring = {name for name, row in rows.items() if row.needs_reference}
        if not referring or not referring <= set(diverging):
            _ignored(config, "f_divergence_type", diverging)
    if config.f_alpha_divergence_coef is not None and config.f_divergence_type != "alpha_divergence":
        raise InputError(
            "--f-alpha-divergence-coef needs --f-divergence-type alpha_divergence; add it or drop the flag"
        )
    having = [name for name, row in LOSSES.items() if row.needs_reference]
    without = config.reference_free or set(having).isdisjoint(rows)
    if config.ref_model_sync_steps is not None:
        if without:
            _ignored(config, "ref_model_sync_steps", having)
    elif config.ref_model_mixup_alpha is not None:
        raise InputError("--ref-model-mixup-alpha needs --ref-model-sync-steps; add it or drop the flag")
    if not config.precompute_ref_log_probs:
        if config.ref_model_sync_steps is not None:
            raise InputError(
                "--no-precompute-ref-log-probs has no effect with --ref-model-sync-steps: a reference that moves is "
                "evaluated at every step; drop one of them"
            )
        if without:
            _ignored(config, "precompute_ref_log_probs", having)


def _ignored(config: DPOConfig, option: str, allowed: list[str]) -> None:
    value = getattr(config, option)
    given = flag(option if value else f"no_{option}") if isinstance(value, bool) else f"{flag(option)} {value}"
    raise InputError(
        f"{given} has no effect with --loss {config.loss}{' --reference-free' if config.reference_free else ''}; "
        f"allowed with: {', '.join(allowed)}; drop it or choose another loss"
    )


def choose_loss(config: DPOConfig, datasets: Sequence[TokenizedDataset]) -> LossSpec:
    """The loss that a run minimises on this data, the held-out data included.

    On rankings, a loss of two candidates is applied to all ordered pairs of each.

    Raises:
      InputError: if one of the objectives cannot use the data; the message names those that can.
    """
    for path, dataset in zip((config.data, config.eval_data), datasets, strict=False):
        for name in config.losses:
            _check_data(name, str(path), dataset)
    if any(dataset.has_margins for dataset in datasets):
        print("margins    stated in the data; only `jaxdpo reward` uses them")
    rankings = any(not dataset.labelled and dataset.candidates > 2 for dataset in datasets)
    return _combined(config, rankings=rankings, ranked=any(dataset.has_ranks for dataset in datasets))


def with_needed_partners(config: DPOConfig, dataset: TokenizedDataset) -> TokenizedDataset:
    """The data, each completion accompanied by one of another prompt where an objective compares with such."""
    rows = [LOSSES[name] for name in config.losses]
    if dataset.labelled and any("label" in row.data and row.candidates == 2 for row in rows):
        return with_partners(dataset, config.max_length)
    return dataset


def _check_data(name: str, path: str, dataset: TokenizedDataset) -> None:
    """InputError if an objective cannot use a dataset."""
    row = LOSSES[name]
    if not dataset.labelled and name != "sft" and len(dataset.singles):
        raise InputError(
            f"{dataset.groups[dataset.singles[0]].origin}: there is one completion, without a label; allowed "
            f"with --loss {name}: {_NEEDS['label' in row.data]}; imitate it with `jaxdpo sft`, or give other data"
        )
    if ("label" in row.data) != dataset.labelled:
        fitting = ", ".join(other for other, spec in LOSSES.items() if ("label" in spec.data) == dataset.labelled)
        raise InputError(
            f"--loss {name} needs {_NEEDS['label' in row.data]}, and {path} holds {_NEEDS[dataset.labelled]}; "
            f"allowed with this data: {fitting}; choose one of them, or other data"
        )
    if row.candidates is None and "ranks" not in row.data:
        tied = np.flatnonzero((dataset.ranks() == 0).sum(axis=1) > 1)
        if len(tied):
            raise InputError(
                f"{dataset.groups[tied[0]].origin}: completions tie for the first rank, and --loss {name} needs one "
                "best; allowed: plackett_luce or a loss of pairs; choose one of them, or break the tie"
            )


def scalars_of(config: DPOConfig) -> dict[str, Any]:
    """The options that a loss is called with, by name; `beta` always, others where they are given."""
    names = ("beta", *LOSS_OPTIONS, "f_alpha_divergence_coef", "ld_alpha")
    scalars = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return scalars if config.weights is None else {**scalars, "loss_weights": config.weights}


def _combined(config: DPOConfig, *, rankings: bool = False, ranked: bool = False) -> LossSpec:
    """The objectives as one loss; `rankings`: of more than two candidates, `ranked`: with ties or an unranked rest."""
    specs = []
    for name in config.losses:
        spec = LOSSES[name]
        if config.f_divergence_type is not None and spec.divergence:
            spec = with_divergence(spec, config.f_divergence_type)
        if config.use_weighting:
            spec = weighted_by_policy(spec)
        if rankings and spec.candidates == 2:
            spec = over_all_pairs(spec)
        if not ranked:
            spec = spec._replace(data=tuple(array for array in spec.data if array != "ranks"))
        specs.append(spec._replace(needs_reference=spec.needs_reference and not config.reference_free))
    return combine(specs)


_NEEDS = {True: "single completions with a label (format unpaired)", False: "completions that are compared"}
