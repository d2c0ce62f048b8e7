"""Log-probs of a dataset in one pass: the same on any mesh and packing, each example once, by its id."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxdpo.data.pipeline import all_batches, microbatches
from jaxdpo.logprobs import token_logps
from jaxdpo.reference import FrozenReference, dataset_logps, make_logp_program, slot_logps
from jaxdpo.sharding import batch_size_multiple, make_mesh
from tests import tiny
from tests.test_logprobs import unpacked

DATA = tiny.dataset(groups=11, candidates=(1, 4), seed=3)
DECODER = tiny.decoder()


def batches_for(mesh, **options):
    return list(all_batches(DATA, tiny.layout(DATA, row_multiple=batch_size_multiple(mesh), **options)))


@functools.cache
def logps_on(devices):
    mesh = make_mesh(jax.devices()[:devices])
    params = tiny.params(DECODER, mesh)
    with jax.set_mesh(mesh):
        return dataset_logps(make_logp_program(DECODER), params, batches_for(mesh), mesh, label="test")


def test_sums_are_those_of_separate_passes():
    logps = logps_on(1)
    expected = unpacked(DECODER, tiny.params(DECODER), DATA)
    np.testing.assert_allclose(logps.sequences, expected, rtol=1e-6, atol=1e-5)
    assert logps.mask.tolist() == [[c < len(g.completions) for c in range(DATA.candidates)] for g in DATA.groups]


def test_one_device_and_eight_agree():
    one, eight = logps_on(1), logps_on(8)
    np.testing.assert_allclose(one.sequences, eight.sequences, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(one.mask, eight.mask)
    for example in range(len(DATA)):
        assert len(one.of(example)) == DATA.slots[example]
        np.testing.assert_allclose(one.of(example), eight.of(example), rtol=1e-6, atol=1e-5)


def test_tokens_are_float32_and_sum_to_the_sequences():
    logps = logps_on(1)
    assert logps.values.dtype == np.float32
    for example, group in enumerate(DATA.groups):
        ends = np.cumsum([len(completion) for completion in group.completions])
        sums = [part.sum() for part in np.split(logps.of(example), ends[:-1])]
        np.testing.assert_allclose(sums, logps.sequences[example, : len(sums)], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
def test_sums_of_stored_tokens_are_those_of_the_program(weight):
    """With a weight for the tokens behind the length of the group's shortest completion."""
    mesh, params = make_mesh(jax.devices()[:1]), tiny.params(DECODER)
    program = make_logp_program(DECODER, tail_weight=weight)
    expected = dataset_logps(program, params, batches_for(mesh), mesh, label="test").sequences
    sums = logps_on(1).sums(DATA.completion_lengths(), tail_weight=weight)
    assert sums.dtype == np.float64
    np.testing.assert_allclose(sums, expected, rtol=1e-6, atol=1e-5)


def test_sums_of_other_data_are_refused():
    lengths = DATA.completion_lengths()
    with pytest.raises(ValueError, match="log-probs of 11 examples are stored; allowed: the 10 of this dataset"):
        logps_on(1).sums(lengths[:-1])
    lengths[3, 0] += 1
    with pytest.raises(ValueError, match=rf"example 3 has {DATA.slots[3]} stored log-probs and {DATA.slots[3] + 1} to"):
        logps_on(1).sums(lengths)


def test_stored_log_probs_fit_any_packing():
    """They are found by example, whichever row and slots a step gives it; empty slots hold 0."""
    order = np.random.default_rng(0).permutation(len(DATA))
    params = tiny.params(DECODER)
    layout = tiny.layout(DATA, row_lengths=[64], tokens=128)
    made = microbatches(DATA, order, layout)
    assert len(made) > 1
    program = jax.jit(token_logps, static_argnums=0)
    for batch in made:
        stored = slot_logps(logps_on(1), batch)
        np.testing.assert_allclose(stored, program(DECODER, params, batch), rtol=1e-5, atol=1e-5)
        assert (stored[batch.slot_owner == batch.candidate_mask[0].size] == 0).all()


@pytest.fixture
def program():
    """Stands in for the model: every token's log-prob is -1."""
    return lambda params, batch: (
        -np.ones(batch.slot_owner.shape, np.float32),
        {"logps": -np.ones(batch.candidate_mask.shape, np.float32)},
    )


def test_an_example_in_two_places_is_refused(program):
    mesh = make_mesh(jax.devices()[:1])
    batches = batches_for(mesh)
    with pytest.raises(ValueError, match=r"example \d+ stands in two places of the batches; allowed: one"):
        dataset_logps(program, {}, [*batches, batches[0]], mesh, label="test")


def test_part_of_a_dataset_is_stored_by_its_ids(program):
    """A run that stops within the first epoch computes no reference of what it never sees."""
    mesh = make_mesh(jax.devices()[:1])
    layout = tiny.layout(DATA)
    logps = dataset_logps(program, {}, microbatches(DATA, [7, 2, 5], layout), mesh, label="test")
    assert logps.size.tolist() == [DATA.slots[i] if i in (2, 5, 7) else 0 for i in range(8)]
    assert logps.mask.sum(axis=1).tolist() == [len(DATA.groups[i].completions) for i in (2, 5, 7)]
    for absent in (3, 9):  # within what is stored, and behind it
        (batch,) = microbatches(DATA, [2, absent], layout)
        message = rf"example {absent} has 0 stored log-probs and {DATA.slots[absent]} tokens to score"
        with pytest.raises(ValueError, match=message):
            slot_logps(logps, batch)


def test_nothing_is_stored_of_no_batches(program):
    logps = dataset_logps(program, {}, [], make_mesh(jax.devices()[:1]), label="test")
    assert [array.size for array in (logps.values, logps.start, logps.size, logps.sequences, logps.mask)] == [0] * 5
    (batch,) = microbatches(DATA, [0], tiny.layout(DATA))
    with pytest.raises(ValueError, match="example 0 has 0 stored log-probs"):
        slot_logps(logps, batch)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_frozen_reference_is_evaluated_on_the_batch(devices):
    mesh = make_mesh(jax.devices()[:devices])
    frozen = FrozenReference(make_logp_program(DECODER), tiny.params(DECODER, mesh))
    with jax.set_mesh(mesh):
        for batch in batches_for(mesh):
            np.testing.assert_allclose(slot_logps(frozen, batch), slot_logps(logps_on(1), batch), rtol=1e-6, atol=1e-5)


def test_log_probs_of_other_data_are_refused():
    logps = logps_on(1)
    other = dataclasses.replace(logps, size=logps.size - (np.arange(len(DATA)) == 4).astype(np.int32))
    (batch,) = microbatches(DATA, [4], tiny.layout(DATA))
    slots = DATA.slots[4]
    with pytest.raises(
        ValueError, match=rf"example 4 has {slots - 1} stored log-probs and {slots} tokens to score; comp"
    ):
        slot_logps(other, batch)
