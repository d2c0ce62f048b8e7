"""The rate of a large matrix product by every library of an environment: what the machine can do at most.

    python benchmarks/peers/matmul.py

Prints a line of JSON: GFLOP/s by dtype and library. Of each the best of `REPEATS` products of two square matrices.
"""

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

SIZE, REPEATS = 2048, 10


def main() -> None:
    rates: dict[str, dict[str, float]] = {"float32": {}, "bfloat16": {}}
    for library, products in LIBRARIES.items():
        if importlib.util.find_spec(library):
            for dtype, multiply in products():
                rates[dtype][library] = round(2 * SIZE**3 / best_seconds(multiply) / 1e9, 1)
    print(json.dumps(rates))


def best_seconds(multiply: Callable[[], Any]) -> float:
    """Least time of a call, after two that are not timed."""
    times = []
    for _ in range(REPEATS + 2):
        began = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - began)
    return min(times[2:])


def _numpy() -> Iterator[tuple[str, Callable[[], Any]]]:
    import numpy as np

    a = np.ones((SIZE, SIZE), np.float32)
    yield "float32", lambda: a @ a


def _torch() -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch

    for dtype in ("float32", "bfloat16"):
        a = torch.ones(SIZE, SIZE, dtype=getattr(torch, dtype))
        yield dtype, lambda a=a: a @ a


def _jax() -> Iterator[tuple[str, Callable[[], Any]]]:
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    for dtype in ("float32", "bfloat16"):
        a = jnp.ones((SIZE, SIZE), dtype)
        yield dtype, lambda a=a: multiply(a).block_until_ready()


LIBRARIES = {"numpy": _numpy, "torch": _torch, "jax": _jax}

if __name__ == "__main__":
    main()
