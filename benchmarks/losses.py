"""Time and memory of every loss of `LOSSES` on a million groups, value and gradient, against memory bandwidth.

    python benchmarks/losses.py --output benchmarks/results/losses.json

The floor of a loss is the time in which the machine moves the bytes that have to be moved: every input read once and
the gradient by `policy_logps` written once, at the bandwidth that a sum of two large arrays reaches. Sum and loss are
timed in turns, so that other load on the machine slows both. What fits the cache may be faster than its floor.
A loss is its mean over all groups, jitted, with a mask `where` as in training; times are medians. Below the rows are
rankings of four, with and without ties, and combinations. Takes three minutes and 5 GB on two cores.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from machine import processor

from jaxdpo.losses import LOSSES, LossSpec, combine, over_all_pairs, weighted_by_policy, with_divergence

UNRANKED_DATA = LOSSES["plackett_luce"]._replace(data=())  # candidates as they stand, best first
CASES: dict[str, tuple[LossSpec, int, float]] = {
    **{name: (spec, spec.candidates or 2, 1) for name, spec in LOSSES.items()},
    "plackett_luce": (UNRANKED_DATA, 2, 1),
    "plackett_luce, 4 candidates": (UNRANKED_DATA, 4, 1),
    "plackett_luce, 4 with ties": (LOSSES["plackett_luce"], 4, 0.1),
    "sigmoid over all pairs of 4": (over_all_pairs(LOSSES["sigmoid"]), 4, 1),
    "sigmoid,sft": (combine([LOSSES["sigmoid"], LOSSES["sft"]]), 2, 1),
    "sigmoid, alpha_divergence": (with_divergence(LOSSES["sigmoid"], "alpha_divergence"), 2, 1),
    "sigmoid, WPO": (weighted_by_policy(LOSSES["sigmoid"]), 2, 1),
}
"""Loss, candidates of a group, and the share of the groups that it is measured on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000, help="groups")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", help="one case")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    header = ("loss", "groups", "ms", "floor ms", "time / floor", "moved MB", "GB/s", "temporaries MB")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    rows = []
    for name, (spec, candidates, share) in CASES.items():
        if args.only in (None, name):
            shape = (round(share * args.pairs), candidates)
            rows.append(measure(name, spec, shape, args.repeats))
            print("| " + " | ".join(str(rows[-1][key]) for key in header) + " |", flush=True)
    if args.output:
        args.output.write_text(json.dumps({"pairs": args.pairs, "machine": facts, "rows": rows}, indent=1) + "\n")


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def measure(name: str, spec: LossSpec, shape: tuple[int, int], repeats: int) -> dict[str, object]:
    """One row of the table."""
    arrays = inputs(spec, shape)
    options = {option: 0.1 for option in spec.options if option == "beta"}

    def loss(policy_logps: jax.Array, ref_logps: jax.Array | None, data: dict[str, jax.Array]) -> jax.Array:
        return spec.fn(policy_logps, ref_logps, **data, **options).mean()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arrays).compile()
    large = jnp.ones(2**25), jnp.ones(2**25)  # 128 MiB each
    add = jax.jit(lambda a, b: a + 0.5 * b).lower(*large).compile()
    seconds, adding = median_seconds([functools.partial(compiled, *arrays), functools.partial(add, *large)], repeats)
    bandwidth = 3 * large[0].nbytes / adding
    moved = sum(array.nbytes for array in jax.tree.leaves(arrays)) + arrays[0].nbytes
    floor = moved / bandwidth
    return {
        "loss": name,
        "groups": shape[0],
        "ms": round(1e3 * seconds, 2),
        "floor ms": round(1e3 * floor, 2),
        "time / floor": round(seconds / floor, 1),
        "moved MB": round(moved / 1e6, 1),
        "GB/s": round(bandwidth / 1e9, 1),
        "temporaries MB": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
    }


def inputs(spec: LossSpec, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
    """Log-probabilities of policy and reference, and what else the loss reads; completions of 20 to 400 tokens."""
    keys = jax.random.split(jax.random.key(0), 5)
    lengths = jax.random.randint(keys[0], shape, 20, 400).astype(jnp.float32)
    policy_logps = -1.5 * lengths
    available: dict[str, Callable[[], jax.Array]] = {
        "lengths": lambda: lengths,
        "ranks": lambda: jnp.sort(jax.random.randint(keys[1], shape, 0, shape[1])),
        "label": lambda: jax.random.bernoulli(keys[2], 0.5, shape[:1]),
        "log_sum_sq_probs": lambda: policy_logps + jax.random.normal(keys[3], shape),
    }
    ref_logps = policy_logps + 10 * jax.random.normal(keys[4], shape) if spec.needs_reference else None
    data = {"where": jnp.ones(shape, bool), **{name: available[name]() for name in spec.data}}
    return policy_logps, ref_logps, data


def median_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median time of each call, all of them in turns."""
    for call in calls:
        jax.block_until_ready(call())
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, of_call in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            of_call.append(time.perf_counter() - start)
    return [statistics.median(of_call) for of_call in times]


if __name__ == "__main__":
    main()
