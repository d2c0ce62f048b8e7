"""Every test runs on 8 CPU devices, with warnings and implicit rank promotion as errors."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from jaxdpo.hub import cache_root

# XLA takes most of the tests' time: programs that run once are not worth optimizing. Processes that tests start inherit
# the flags; `XLA_FLAGS= pytest` compiles as users do.
QUICK = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")  # gone in 0.12, where an unknown flag ends the process
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))
# Tests compile for TPUs and use none: two processes that do so need not wait for each other.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Iterator[Path]:
    """What tests tokenise is kept for this session only; models that were downloaded before stay at hand."""
    kept, folder = cache_root(), tmp_path_factory.mktemp("cache")
    for path in kept.glob("*-*"):
        (folder / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXDPO_CACHE", str(folder))
        yield folder


@pytest.fixture
def least_effort() -> Iterator[None]:
    """Programs for TPUs are compiled in a quarter of the time; they have the same products and collectives."""
    from jaxdpo.plan.worker import set_effort

    set_effort(quick=True)
    yield
    set_effort(quick=False)
