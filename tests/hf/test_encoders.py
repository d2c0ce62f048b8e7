"""Classifiers of texts from directories: single or in shards, in any stored dtype, and clear about what is wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdpo.hf import load_encoder
from jaxdpo.types import InputError
from tests.families.cases import ENCODERS, TEXT_LENGTHS, TEXT_TOKENS, tensors, write_checkpoint
from tests.families.make_golden import CLASSIFIERS_GOLDEN

CONFIG = ENCODERS["roberta"]


def write_shards(directory):
    """The checkpoint in two files with an index."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    weights, names = tensors(CONFIG), [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {tensor: names[i % 2] for i, tensor in enumerate(weights)}
    for name in names:
        save_file({tensor: weights[tensor] for tensor in weights if where[tensor] == name}, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return directory


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


def test_one_file_and_shards(tmp_path):
    encoder, params = load_encoder(write_checkpoint(tmp_path / "one", CONFIG))
    logits = encoder.logits(params, TEXT_TOKENS, TEXT_LENGTHS)
    np.testing.assert_allclose(logits, np.load(CLASSIFIERS_GOLDEN)["roberta"], rtol=0, atol=1e-5)
    again, same = load_encoder(write_shards(tmp_path / "shards"))
    assert again == encoder and encoder.compute_dtype == "float32" and equal(params, same)


def test_narrow_weights_load_exactly(tmp_path):
    narrow = {name: value.astype(jnp.bfloat16) for name, value in tensors(CONFIG).items()}
    encoder, params = load_encoder(write_checkpoint(tmp_path / "narrow", CONFIG, narrow), compute_dtype="bfloat16")
    widened = {name: value.astype(np.float32) for name, value in narrow.items()}
    assert equal(params, load_encoder(write_checkpoint(tmp_path / "wide", CONFIG, widened))[1])
    assert encoder.compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"is_decoder": True}, "config.json of .*model: config.json has is_decoder = True"),
        ({"num_hidden_layers": "3"}, "config.json of .*model: layers is '3'; allowed: a whole number"),
        ({"id2label": ["bad", "good"]}, r"config.json of .*model: a value is of the wrong type \('list' object"),
        ({"model_type": "bert"}, r"config.json of .*model: model_type 'bert' .* is not supported; allowed: roberta"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path, change, message):
    model = write_checkpoint(tmp_path / "model", CONFIG)
    (model / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(InputError, match=message):
        load_encoder(model)


def test_pickled_weights_are_never_read(tmp_path):
    model = write_checkpoint(tmp_path / "model", CONFIG)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickled weights .* convert them to safetensors"):
        load_encoder(model)
