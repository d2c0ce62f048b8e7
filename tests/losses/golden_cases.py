"""Numbers that TRL computed, as test parameters, and their batch as the arrays that losses take.

`golden/trl_losses.json` says under `about` what its numbers are.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
import pytest

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl_losses.json").read_text())
"""Lists of cases under `dpo`, `kto`, `cpo`, `orpo` and `reward`."""
BATCH = GOLDEN["batch"]
SIDES = ("chosen", "rejected")
LENGTHS = np.stack([BATCH[f"{side}_lens"] for side in SIDES], axis=-1)  # [16, 2]
TOLERANCE = {"float64": {"rtol": 1e-6, "atol": 1e-9}, "float32": {"rtol": 1e-5, "atol": 1e-6}}
"""Between TRL's numbers and ours, by the case's `dtype`."""


def logps(model: str) -> np.ndarray:
    """`[16, 2]` float64 summed log-probabilities under `policy` or `ref`."""
    return np.stack([BATCH[f"{model}_{side}_logps"] for side in SIDES], axis=-1)


def per_token(name: str) -> np.ndarray:
    """`[16, 2, tokens]` float64 of `policy_token_logps`, `ref_token_logps` or `log_sum_sq_probs`, 0 after the last."""
    out = np.zeros((*LENGTHS.shape, LENGTHS.max()))
    for column, side in enumerate(SIDES):
        for row, values in enumerate(BATCH[name][side]):
            out[row, column, : len(values)] = values
    return out


def params(cases: Iterable[dict]) -> list:
    """One pytest parameter per case, named by what tells it from the others."""
    shown = ("loss_type", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "ld_alpha")
    return [pytest.param(case, id="-".join(str(case[key]) for key in shown if key in case)) for case in cases]


def assert_golden(case: dict, loss: Callable[[jax.Array], jax.Array], *inputs: np.ndarray) -> None:
    """Compares value, per-pair values and gradient of `loss(policy_logps, *inputs) -> [16]` with those of a case.

    The policy's log-probabilities and the inputs reach `loss` in the dtype of the case.
    """

    def mean_and_each(policy: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = loss(policy, *inputs)
        return losses.mean(), losses

    dtype = case.get("dtype", "float64")
    with jax.enable_x64(dtype == "float64"):
        policy, *inputs = (np.asarray(array, dtype) for array in (logps("policy"), *inputs))
        (mean, losses), gradient = jax.value_and_grad(mean_and_each, has_aux=True)(policy, *inputs)
        assert losses.dtype == gradient.dtype == dtype
        np.testing.assert_allclose(mean, case["loss"], **TOLERANCE[dtype])
        if case.get("per_pair") is not None:
            np.testing.assert_allclose(losses, case["per_pair"], **TOLERANCE[dtype])
        for column, side in enumerate(SIDES):
            if case.get(f"grad_{side}") is not None:
                np.testing.assert_allclose(gradient[:, column], case[f"grad_{side}"], **TOLERANCE[dtype])
