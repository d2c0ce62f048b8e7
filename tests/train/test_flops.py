"""FLOPs are those that formulas written by hand have, and the rate they are held against is the device's."""

import dataclasses

import jax
import pytest

from jaxdpo.chips import CHIPS
from jaxdpo.data.pipeline import microbatches
from jaxdpo.train.flops import forward_flops, measured_peak, peak_of, useful_flops
from tests import tiny

CONFIG = tiny.LLAMA


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
    assert forward_flops(config, rows=rows, length=length, slots=slots, keys=length) == pytest.approx(want, rel=1e-6)


def batch_of(*groups, length=64):
    data = tiny.of_groups(list(groups))
    (batch,) = microbatches(data, range(len(data)), tiny.layout(data, row_lengths=[length]))
    return batch


WEIGHTS = 2 * (16 * (4 + 2 + 2) * 6 + 4 * 6 * 16 + 3 * 16 * 24)
"""Of the two layers: queries, keys and values, outputs, and the gated MLP."""
HEAD = 61 * 16
KEY = 2 * 4 * 2 * 6
"""Multiply-adds of a query with a key: layers, heads, score and weighted value, width."""


def forward(tokens, slots, keys):
    return 2 * (tokens * WEIGHTS + slots * HEAD + keys * KEY)


def test_a_pair_by_hand():
    """A prompt of 3 tokens, completions of 2 and 4: a token meets the prompt up to it, or all of it and its own."""
    keys = (1 + 2 + 3) + (4 + 5) + (4 + 5 + 6 + 7)
    want = forward(3 + 2 + 4, 2 + 4, keys)
    batch = batch_of(tiny.tokenized(3, 2, 4))
    assert useful_flops(CONFIG, batch, reference=False) == 3 * want
    assert useful_flops(CONFIG, batch, reference=True) == 4 * want


def test_padding_and_other_groups_of_a_row_cost_nothing():
    pair, other = tiny.tokenized(3, 2, 4), tiny.tokenized(5, 1, 1)
    together = useful_flops(CONFIG, batch_of(pair, other, length=128), reference=False)
    apart = sum(useful_flops(CONFIG, batch_of(one), reference=False) for one in (pair, other))
    assert together == apart


def test_a_window_bounds_the_keys():
    config = dataclasses.replace(CONFIG, sliding_window=3)
    want = forward(3 + 2 + 4, 2 + 4, (1 + 2 + 3) + (3 + 3) + 4 * 3)
    assert useful_flops(config, batch_of(tiny.tokenized(3, 2, 4)), reference=False) == 3 * want


def test_a_partner_has_no_gradient():
    """Of a labelled group the second completion is KTO's partner."""
    both, learnt = forward(9, 6, 6 + 9 + 22), forward(5, 2, 6 + 9)
    assert useful_flops(CONFIG, batch_of(tiny.tokenized(3, 2, 4, label=True)), reference=False) == both + 2 * learnt


def test_a_reward_model_has_no_vocabulary():
    config = dataclasses.replace(CONFIG, head="score")
    assert useful_flops(config, batch_of(tiny.tokenized(3, 2, 4)), reference=False) == 3 * forward(9, 0, 6 + 9 + 22)


def test_a_rate_is_measured():
    assert 1e6 < measured_peak("float32", size=64, seconds=0.01) < 1e15
    assert measured_peak("float32", size=64, seconds=0.01) == measured_peak("float32", size=64, seconds=0.01)


class Device:
    """All that is read of a device."""

    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize("kind, name, devices", [("NVIDIA H200", "h200", 1), ("TPU7x", "tpu7x", 2)])
def test_a_known_device_has_its_share_of_the_published_rate(kind, name, devices):
    peak = peak_of(Device(kind), "float32")
    assert (peak.flops, peak.source) == (CHIPS[name].flops / devices, f"published for {name} in bfloat16")


def test_an_unknown_device_has_the_measured_rate():
    peak = peak_of(jax.devices()[0], "float32")
    assert (peak.flops, peak.source) == (measured_peak("float32"), "measured in float32")
