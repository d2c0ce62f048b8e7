"""Classifiers of texts: the logits of transformers, whatever the padding and the mesh; a wrong checkpoint is named."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.families import CLASSIFIERS, fill_params
from jaxdpo.models.abstract import abstract_module
from jaxdpo.models.encoder import Encoder, EncoderClassifier, make_encoder
from jaxdpo.types import InputError
from tests.families.cases import ENCODERS, TEXT_LENGTHS, TEXT_TOKENS, tensors
from tests.families.make_golden import CLASSIFIERS_GOLDEN, torch_classifier, torch_label_logits
from tests.families.test_families import WITHOUT_TORCH, InMemory, assert_equal_trees

LOGITS = jax.jit(Encoder.logits, static_argnums=0)
every_case = pytest.mark.parametrize("case", ENCODERS)


@functools.cache
def encoder_of(case):
    return make_encoder(CLASSIFIERS[ENCODERS[case]["model_type"]].from_hf(ENCODERS[case]))


def load(case, values=None, mesh=None):
    encoder, source = encoder_of(case), InMemory(tensors(ENCODERS[case]) if values is None else values)
    return fill_params(CLASSIFIERS["roberta"], encoder.config, encoder.abstract_params(mesh), source)


def golden(case):
    return np.load(CLASSIFIERS_GOLDEN)[case]


def test_every_family_has_a_case():
    assert {config["model_type"] for config in ENCODERS.values()} == set(CLASSIFIERS)


@every_case
def test_golden_logits(case):
    logits = LOGITS(encoder_of(case), load(case), TEXT_TOKENS, TEXT_LENGTHS)
    assert logits.dtype == jnp.float32 and logits.shape == (4, len(ENCODERS[case]["id2label"]))
    np.testing.assert_allclose(logits, golden(case), rtol=0, atol=1e-5)


@pytest.mark.parity
@every_case
def test_logits_of_transformers(case):
    pytest.importorskip("torch", reason=WITHOUT_TORCH)
    expected = torch_label_logits(torch_classifier(ENCODERS[case]))
    logits = LOGITS(encoder_of(case), load(case), TEXT_TOKENS, TEXT_LENGTHS)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [{"activation": "gelu_tanh"}, {"norm_eps": 1e-3}, {"position_offset": 0}])
def test_what_the_cases_cover_changes_their_logits(change):
    encoder, params = encoder_of("roberta"), load("roberta")
    other = dataclasses.replace(encoder, config=dataclasses.replace(encoder.config, **change))
    assert np.abs(LOGITS(other, params, TEXT_TOKENS, TEXT_LENGTHS) - golden("roberta")).max() > 3e-5


@every_case
def test_patterns_name_the_logical_axes_of_the_module(case):
    config = encoder_of(case).config
    _, axes, _ = abstract_module(EncoderClassifier, config)
    covered = []
    for weight in CLASSIFIERS["roberta"].weights(config):
        leaf = functools.reduce(lambda tree, key: tree[key], weight.path.split("/"), axes)
        assert leaf == (("layers",) if weight.stacked else ()) + weight.axes, weight.path
        covered.append(weight.path)
    assert len(covered) == len(set(covered)) == len(jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)))


def test_a_pooler_that_is_not_used_and_buffers_are_passed_over():
    values, square = tensors(ENCODERS["roberta"]), np.ones((36, 36), np.float32)
    more = {"roberta.pooler.dense.weight": square, "roberta.embeddings.position_ids": np.arange(32)[None]}
    assert_equal_trees(load("roberta", values | more), load("roberta"))


NAME = "roberta.encoder.layer.1.output.LayerNorm.bias"
FAULTS = {
    "unknown": (lambda v: v | {"lm_head.bias": v[NAME]}, "unknown tensor 'lm_head.bias'; a roberta model with"),
    "missing": (lambda v: {k: x for k, x in v.items() if k != NAME}, f"missing tensor '{NAME}'"),
    "twice": (lambda v: v | {NAME[8:]: v[NAME]}, f"tensor '{NAME}' is there twice, also as '{NAME[8:]}'"),
    "shape": (lambda v: v | {NAME: v[NAME][:-1]}, rf"tensor '{NAME}' has shape \(35,\); allowed: \(36,\)"),
    "no head": (
        lambda v: {k: x for k, x in v.items() if "classifier" not in k},
        r"missing tensor 'classifier.dense.weight' \(4 of 57 are missing\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_loud_failures_name_the_tensor(fault):
    change, message = FAULTS[fault]
    with pytest.raises(InputError, match="checkpoint: " + message):
        load("roberta", change(tensors(ENCODERS["roberta"])))


REFUSED = [
    ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
    ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu'; allowed: silu, gelu"),
    ({"is_decoder": True}, "is_decoder = True"),
    ({"add_cross_attention": True}, "add_cross_attention = True"),
    ({"problem_type": "multi_label_classification"}, "problem_type = 'multi_label_classification'"),
    ({"problem_type": "regression"}, "a regression of 2 labels; allowed: of 1"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"architectures": ["RobertaForMaskedLM"]}, "architectures ['RobertaForMaskedLM']; allowed: a RobertaForSeq"),
    ({"architectures": None}, "architectures None; allowed: a RobertaForSequenceClassification"),
    ({"id2label": {"0": "good", "2": "bad"}}, "id2label for [0, 2]; allowed: for 0 to 1"),
    ({"id2label": {"0": "good", "1": "good"}}, "labels are ('good', 'good'); allowed: a name of its own for each"),
    ({"max_position_embeddings": 2}, "max_positions is 0"),
    ({"hidden_size": None}, "lacks 'hidden_size'"),
    ({"num_attention_heads": 5}, "5 heads for 36 features"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_would_change_the_mathematics_is_refused(change, message):
    with pytest.raises(InputError) as error:
        CLASSIFIERS["roberta"].from_hf(ENCODERS["roberta"] | change)
    assert message in str(error.value)


def test_defaults_of_transformers():
    left_out = {"type_vocab_size", "layer_norm_eps", "pad_token_id", "id2label"}
    config = CLASSIFIERS["roberta"].from_hf({k: v for k, v in ENCODERS["roberta"].items() if k not in left_out})
    assert (config.token_types, config.norm_eps, config.position_offset) == (2, 1e-12, 2)
    assert config.labels == ("LABEL_0", "LABEL_1")
    assert config.max_positions == 32 - 2  # of 514 rows RoBERTa reads 512
