"""Rows of LOSSES and losses made from them, and for each the inputs that its facts ask for."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import (
    DIVERGENCES,
    LOSSES,
    LossSpec,
    RunningMean,
    combine,
    over_all_pairs,
    weighted_by_policy,
    with_divergence,
)

PAIRWISE = [name for name, spec in LOSSES.items() if spec.candidates == 2 and "label" not in spec.data]
ROWS: dict[str, LossSpec] = {
    **LOSSES,
    **{f"{name}/pairs": over_all_pairs(LOSSES[name]) for name in PAIRWISE},
    **{f"sigmoid/{name}": with_divergence(LOSSES["sigmoid"], name) for name in DIVERGENCES},
    **{f"{name}/forward_kl": with_divergence(LOSSES[name], "forward_kl") for name in LOSSES if LOSSES[name].divergence},
    **{f"{name}/wpo": weighted_by_policy(LOSSES[name]) for name in ("sigmoid", "cpo", "aot")},
    "ipo/wpo/pairs": over_all_pairs(weighted_by_policy(LOSSES["ipo"])),
    "sigmoid+exo_pair+aot": combine([LOSSES["sigmoid"], LOSSES["exo_pair"], LOSSES["aot"]]),
    "sigmoid+bco_pair+sft": combine([LOSSES["sigmoid"], LOSSES["bco_pair"], LOSSES["sft"]]),
}  # fmt: skip
"""By name: a row of LOSSES, `+` between the rows of a sum, and behind `/` what has been done to it."""
OPTIONS: dict[str, tuple[Any, Any]] = {
    "beta": (0.1, 0.2),
    "label_smoothing": (0.1, 0.3),
    "discopop_tau": (0.05, 2.0),
    "unlikelihood_alpha": (0.3, 1.0),
    "simpo_gamma": (0.5, 0.0),
    "alphapo_alpha": (0.25, 0.0),
    "cpo_alpha": (1.0, 0.5),
    "desirable_weight": (1.5, 1.0),
    "undesirable_weight": (0.8, 0.0),
    "f_alpha_divergence_coef": (0.5, 1.0),
    "loss_weights": (np.array([1, 0.8, 0.3], np.float32), np.array([1, 0.8, 0.1], np.float32)),
}
"""Two values of every option; tests take the first, and a sweep the second too."""
DEVICES, GROUPS, CANDIDATES = 8, 2, 4
UNOPTIMIZED = {"xla_backend_optimization_level": 0}
"""Half the time to compile, for losses that another test compiles as usual."""
LABEL = np.random.default_rng(0).random((DEVICES, GROUPS)) < 0.5


class Inputs(NamedTuple):
    """What a loss gets, `[DEVICES, GROUPS, candidates]`."""

    policy: Any
    ref: Any
    where: Any
    data: dict[str, Any]


def base(name: str) -> list[str]:
    """Names of the rows of LOSSES that a row is made from."""
    return name.split("/")[0].split("+")


def over(names: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrises a test by rows."""
    return pytest.mark.parametrize("name", list(names))


def draw(name: str, ragged: bool = True, seed: int = 0) -> Inputs:
    """float32 log-probs from -60 to 0, and ordinary values of what else is taken; if ragged, gaps and ties."""
    spec, rng = ROWS[name], np.random.default_rng(seed)
    shape = (DEVICES, GROUPS, spec.candidates or CANDIDATES)
    # Multiples of 1/64, so that whole nats are added and taken away without rounding.
    policy, ref = (np.round(-60 * 64 * rng.random((2, *shape))) / 64).astype(np.float32)
    where = rng.random(shape) < (0.7 if ragged else 2)
    if ragged:
        where[[0, 3], 1], where[[1, 4], 0] = False, True  # no candidate, every one
        where[..., 2:3] = False  # of four candidates at most three exist
    data = {
        "lengths": rng.integers(1, 40, shape),
        "ranks": rng.integers(0, 3, shape) if ragged else rng.permuted(np.indices(shape)[-1], axis=-1),
        "label": LABEL,
        "log_sum_sq_probs": (policy * rng.uniform(0.6, 1, shape)).astype(np.float32),
    }
    return Inputs(policy, ref if spec.needs_reference else None, where, {key: data[key] for key in spec.data})


def options_of(name: str, **changed: Any) -> dict[str, Any]:
    """A value of each option that the row names."""
    return {key: changed.get(key, OPTIONS[key][0]) for key in ROWS[name].options}


def loss(name: str, x: Inputs, options: dict[str, Any], axis_name: str | None = None) -> jax.Array:
    """Losses `[DEVICES, GROUPS]` of one step, with the baseline of a run that begins with it where there is one."""
    spec, shared = ROWS[name], {}
    if spec.coupling != "none":
        shared["axis_name"] = axis_name
    if spec.running is not None:
        zero = jnp.zeros((), jnp.float64 if x.policy.dtype == jnp.float64 else jnp.float32)
        state = spec.running(RunningMean(zero, zero), x.policy, x.ref, where=x.where, axis_name=axis_name, **options)
        shared["baseline"] = state.mean
    return spec.fn(x.policy, x.ref, where=x.where, **x.data, **options, **shared)


def loss_and_gradient(
    name: str, x: Inputs, options: dict[str, Any], axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Losses `[DEVICES, GROUPS]`, and the gradient of their sum `[DEVICES, GROUPS, candidates]`."""

    def total(policy: Any) -> tuple[jax.Array, jax.Array]:
        losses = loss(name, x._replace(policy=policy), options, axis_name)
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(x.policy)
    return losses, gradient


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """`loss_and_gradient` of a row, which all tests share: inputs of one shape, options traced."""
    options = UNOPTIMIZED if name.endswith("/pairs") else None
    return jax.jit(functools.partial(loss_and_gradient, name), compiler_options=options)


def evaluate(name: str, x: Inputs, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradient, compiled."""
    losses, gradient = compiled(name)(x, options_of(name, **options))
    return np.asarray(losses), np.asarray(gradient)
