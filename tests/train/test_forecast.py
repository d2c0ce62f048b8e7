"""The estimate before a run counts the work that the run does."""

import dataclasses

import jax
import pytest

from jaxdpo.train.forecast import duration, forward_flops, measured_peak
from tests import tiny


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_forward_pass(tied):
    """Two for each weight of a matrix and token, two for each score and each weighted value of attention."""
    config = dataclasses.replace(tiny.LLAMA, tie_embeddings=tied)
    params = tiny.params(tiny.decoder(config))
    rows, length, slots = 3, 128, 64
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim > 2)  # stacked: layers first
    attention = 2 * 2 * length**2 * config.num_heads * config.head_dim * config.num_layers
    head = 2 * slots * config.vocab_size * config.embed_dim
    want = rows * (2 * matrices * length + attention + head)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert forward_flops(config, size, rows=rows, length=length, slots=slots) == pytest.approx(want, rel=0.02)


def test_a_rate_is_measured():
    assert 1e6 < measured_peak("float32", size=64, seconds=0.01) < 1e15


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "0 s"), (40, "40 s"), (89, "89 s"), (300, "5 min"), (5399, "90 min"), (11520, "3.2 h")]
)
def test_durations_to_read(seconds, text):
    assert duration(seconds) == text
