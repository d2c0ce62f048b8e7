"""What a layer keeps for the backward pass, and what it computes again."""

import functools
from collections.abc import Callable
from typing import Any

import jax

REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "projections": jax.checkpoint_policies.save_only_these_names("projection", "attention"),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""Name -> policy of `jax.checkpoint`, the most memory first.

`none` keeps every intermediate result; `projections` keeps the outputs of matrix products and of attention, and
computes norms, rotary positions and activations again, which costs next to nothing; `attention` keeps the output of
attention, and computes all else again; `full` keeps the residual stream alone, for one forward pass more.
"""


def with_remat(layer: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """The body of a scan over layers under one of the policies of `REMAT`."""
    policy = REMAT[remat]
    if policy is None:
        return layer
    return functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)(layer)
