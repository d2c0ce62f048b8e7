"""Encoders: what a text's logits depend on, and what they do not; in any dtype and on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.families import CLASSIFIERS, fill_params
from jaxdpo.models.encoder import make_encoder
from jaxdpo.sharding import make_mesh, place_batch
from jaxdpo.types import InputError
from tests.families.cases import ENCODERS, TEXT_LENGTHS, TEXT_TOKENS, tensors
from tests.families.test_families import InMemory, assert_equal_trees
from tests.families.test_roberta import LOGITS, encoder_of, golden, load


def test_neither_padding_nor_the_other_texts_matter():
    encoder, params = encoder_of("roberta"), load("roberta")
    for row, length in enumerate(TEXT_LENGTHS):
        for padded in {int(length), 30}:
            tokens = np.full((3, padded), 1 + row, np.int32)  # the padding id, and others
            tokens[1, :length] = TEXT_TOKENS[row, :length]
            logits = LOGITS(encoder, params, tokens, np.array([0, length, padded], np.int32))
            assert np.isfinite(logits).all()
            np.testing.assert_allclose(logits[1], golden("roberta")[row], rtol=0, atol=1e-5)


def test_bfloat16_is_near():
    encoder = dataclasses.replace(encoder_of("roberta"), compute_dtype="bfloat16")
    logits = LOGITS(encoder, load("roberta"), TEXT_TOKENS, TEXT_LENGTHS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden("roberta"), rtol=0, atol=0.05)


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 2, "tensor": 2, "data": 2}, {"fsdp": 2, "context": 2}])
def test_on_a_mesh(axes):
    case = {"num_attention_heads": 4, "max_position_embeddings": 34}
    config = CLASSIFIERS["roberta"].from_hf(ENCODERS["roberta"] | case)
    encoder, source = make_encoder(config), InMemory(tensors(ENCODERS["roberta"] | case))
    mesh = make_mesh(**axes)
    whole, sharded = (
        fill_params(CLASSIFIERS["roberta"], config, encoder.abstract_params(where), source) for where in (None, mesh)
    )
    assert_equal_trees(jax.device_get(sharded), jax.device_get(whole))
    assert sharded["tokens"].sharding == encoder.abstract_params(mesh)["tokens"].sharding
    batch = np.repeat(TEXT_TOKENS, 2, axis=0), np.repeat(TEXT_LENGTHS, 2)
    with jax.set_mesh(mesh):
        logits = LOGITS(encoder, sharded, *place_batch(batch, mesh))
    np.testing.assert_allclose(logits, LOGITS(encoder, whole, *batch), rtol=0, atol=1e-5)


def test_a_dtype_that_is_none_is_refused():
    with pytest.raises(InputError, match="compute_dtype is 'int8'; allowed: float32, bfloat16, float64"):
        make_encoder(encoder_of("roberta").config, compute_dtype="int8")
