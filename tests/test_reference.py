"""Log-probs of a dataset in one pass: the same on any mesh and packing, each example once, by its id."""

import functools

import jax
import numpy as np
import pytest

from jaxdpo.data.pipeline import all_batches, microbatches
from jaxdpo.logprobs import token_logps
from jaxdpo.reference import dataset_logps, make_logp_program, slot_logps
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
    assert set(one.tokens) == set(eight.tokens) == set(range(len(DATA)))
    for example, stored in one.tokens.items():
        np.testing.assert_allclose(stored, eight.tokens[example], rtol=1e-6, atol=1e-5)


def test_tokens_are_float32_and_sum_to_the_sequences():
    logps = logps_on(1)
    for example, group in enumerate(DATA.groups):
        assert logps.tokens[example].dtype == np.float32
        ends = np.cumsum([len(completion) for completion in group.completions])
        sums = [part.sum() for part in np.split(logps.tokens[example], ends[:-1])]
        np.testing.assert_allclose(sums, logps.sequences[example, : len(sums)], rtol=1e-6, atol=1e-5)


def test_stored_log_probs_fit_any_packing():
    """They are found by example, whichever row and slots a step gives it; empty slots hold 0."""
    order = np.random.default_rng(0).permutation(len(DATA))
    params = tiny.params(DECODER)
    layout = tiny.layout(DATA, row_length=64, tokens=128)
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
    assert {example: len(stored) for example, stored in logps.tokens.items()} == {i: DATA.slots[i] for i in (2, 5, 7)}
    assert logps.mask.sum(axis=1).tolist() == [len(DATA.groups[i].completions) for i in (2, 5, 7)]
    (batch,) = microbatches(DATA, [2, 3], layout)
    with pytest.raises(ValueError, match=rf"example 3 has 0 stored log-probs and {DATA.slots[3]} tokens to score"):
        slot_logps(logps, batch)


def test_log_probs_of_other_data_are_refused():
    logps = logps_on(1)
    other = logps._replace(tokens={**logps.tokens, 4: logps.tokens[4][:-1]})
    (batch,) = microbatches(DATA, [4], tiny.layout(DATA))
    slots = DATA.slots[4]
    with pytest.raises(
        ValueError, match=rf"example 4 has {slots - 1} stored log-probs and {slots} tokens to score; comp"
    ):
        slot_logps(other, batch)
