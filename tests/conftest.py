"""Every test runs on 8 CPU devices, with warnings and implicit rank promotion as errors."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from jaxdpo.hub import cache_root

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
