"""One tiny model, its data, and one whole run of the command line that several files look at."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxdpo import cli
from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory) -> Iterator[Path]:
    """Programs that many runs have in common are compiled once a session; runs in processes of their own share them."""
    directory = tmp_path_factory.mktemp("compiled")
    options = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class Inputs(NamedTuple):
    """What a tiny run reads."""

    model: Path
    data: Path
    """24 pairs."""
    held_out: Path
    """8 others."""

    def command(self, output_dir: Path, flags: str) -> list[str]:
        """`dpo` on these inputs with these flags besides."""
        needed = ["--model", str(self.model), "--data", str(self.data), "--output-dir", str(output_dir)]
        return ["dpo", *needed, "--max-length", "64", *flags.split()]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    return Inputs(
        tiny.write_model(folder / "model"),
        tiny.write_pairs(folder / "pairs.jsonl", range(24)),
        tiny.write_pairs(folder / "held_out.jsonl", range(100, 108)),
    )


class Run(NamedTuple):
    """A run that is complete."""

    root: Path
    flags: str
    printed: str


@pytest.fixture(scope="session")
def full(inputs, tmp_path_factory) -> Run:
    """Two epochs of five steps, the last of each smaller, saved at every step and evaluated at every second."""
    root = tmp_path_factory.mktemp("full") / "run"
    flags = (
        f"--eval-data {inputs.held_out} --batch-size 5 --epochs 2 --learning-rate 1e-3 --warmup-steps 3 --eval-every 2"
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(inputs.command(root, flags)) == 0
    return Run(root, flags, printed.getvalue())
