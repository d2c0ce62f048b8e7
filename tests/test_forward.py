"""A pass sees every batch once, in order, with its outputs on the host."""

import jax
import numpy as np
import pytest

from jaxdpo.data.pipeline import all_batches
from jaxdpo.forward import forward_batches
from jaxdpo.sharding import make_mesh
from tests import tiny

DATA = tiny.dataset(groups=11, candidates=(1, 4), seed=3)
MESH = make_mesh(jax.devices()[:2])


def batches():
    return list(all_batches(DATA, tiny.layout(DATA, row_lengths=[64], tokens=128, row_multiple=2)))


def lengths(params, batch):
    return {"lengths": params["scale"] * (batch.group > 0).sum(axis=1)}


def test_outputs_belong_to_their_batch_and_are_on_the_host():
    given = batches()
    assert len(given) > 1
    found = list(forward_batches(jax.jit(lengths), {"scale": 2}, iter(given), MESH, label="test"))
    for batch, (same, outputs) in zip(given, found, strict=True):
        assert same is batch
        assert type(outputs["lengths"]) is np.ndarray
        np.testing.assert_array_equal(outputs["lengths"], 2 * (batch.group > 0).sum(axis=1))


def test_an_example_in_two_places_is_refused():
    twice = [*batches(), batches()[0]]
    with pytest.raises(ValueError, match=r"example \d+ stands in two places of the batches; allowed: one"):
        list(forward_batches(jax.jit(lengths), {"scale": 1}, twice, MESH, label="test"))
