"""Texts in, logits and rewards out: the tokenizer's own ids, few programs, nothing that depends on the batch."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from jaxdpo import classifier as module
from jaxdpo.classifier import LABEL_SCORES, load_classifier
from jaxdpo.hf import load_hf
from jaxdpo.sharding import make_mesh
from jaxdpo.types import InputError
from tests.families.cases import CASES, ENCODERS, write_checkpoint

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "Ġth", "the"]
CONFIG = ENCODERS["roberta"] | {"vocab_size": len(VOCABULARY), "max_position_embeddings": 42}
TEXTS = ["the best of them", "", "I left", "a film that I should like to forget", "é ☃", "good"]
"""Of 2 to 37 tokens."""


def write_tokenizer(directory, **more):
    """A byte-level BPE as RoBERTa's repositories hold it: `vocab.json` and `merges.txt`."""
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (directory / "merges.txt").write_text("#version: 0.2\nt h\nĠ th\nth e\n")
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 40} | more))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    written = write_checkpoint(tmp_path_factory.mktemp("models") / "roberta", CONFIG)
    write_tokenizer(written)
    return written


@pytest.fixture(scope="module")
def classifier(directory):
    return load_classifier(directory)


def changed(directory, tmp_path, **config):
    """The same model with another `config.json` and weights for it."""
    copy = shutil.copytree(directory, tmp_path / "model")
    return write_checkpoint(copy, CONFIG | config)


def test_texts_are_read_as_their_tokenizer_reads_them(classifier):
    assert classifier.labels == ("NEGATIVE", "POSITIVE")
    ids = classifier._encode(["the th", ""])
    assert [[VOCABULARY[i] for i in row] for row in ids] == [["<s>", "the", "Ġth", "</s>"], ["<s>", "</s>"]]


def test_logits_do_not_depend_on_the_batch(classifier):
    logits = classifier.logits(TEXTS)
    assert logits.shape == (6, 2) and logits.dtype == np.float32
    assert np.ptp(logits, axis=0).min() > 0.1  # they are different texts
    alone = np.concatenate([classifier.logits([text]) for text in TEXTS])
    np.testing.assert_allclose(logits, alone, rtol=0, atol=1e-5)
    np.testing.assert_allclose(classifier.logits(TEXTS[::-1])[::-1], logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(classifier.logits(TEXTS * 9), np.tile(logits, (9, 1)), rtol=0, atol=1e-5)
    assert classifier.logits([]).shape == (0, 2)


def test_small_microbatches_and_many_devices_give_the_same(directory, classifier):
    logits = classifier.logits(TEXTS)
    small = load_classifier(directory, microbatch_tokens=1)
    shapes = [(rows, length) for _, rows, length in small._microbatches(np.array([2, 3, 40, 17]))]
    assert shapes == [(1, 16), (1, 16), (1, 32), (1, 40)]
    np.testing.assert_allclose(small.logits(TEXTS), logits, rtol=0, atol=1e-5)
    spread = load_classifier(directory, mesh=make_mesh(data=8))
    assert [rows for _, rows, _ in spread._microbatches(np.full(17, 5))] == [32]
    with jax.set_mesh(make_mesh(fsdp=2)):  # a caller's own
        np.testing.assert_allclose(spread.logits(TEXTS), logits, rtol=0, atol=1e-5)
        np.testing.assert_allclose(classifier.logits(TEXTS), logits, rtol=0, atol=1e-5)


def test_programs_are_few_whatever_the_texts(classifier):
    rng = np.random.default_rng(0)
    shapes = {
        (rows, length)
        for count in (1, 3, 100, 1000, 5000)
        for _, rows, length in classifier._microbatches(rng.integers(2, 41, count))
    }
    assert {length for _, length in shapes} == {16, 32, 40}
    assert all(rows * length <= classifier.microbatch_tokens for rows, length in shapes)
    assert all(math.log2(rows).is_integer() or rows == 8192 // length for rows, length in shapes)


def test_every_text_has_a_place(classifier):
    lengths = np.random.default_rng(1).integers(2, 41, 3000)
    places = [(m, rows, length) for m, rows, length in classifier._microbatches(lengths)]
    assert sorted(np.concatenate([members for members, _, _ in places])) == list(range(3000))
    assert all(len(members) <= rows and lengths[members].max() <= length for members, rows, length in places)


def test_texts_that_are_too_long_are_cut_and_counted(classifier):
    texts = ["x" * 38, "x" * 39, "x" * 60, "y"]
    with pytest.warns(UserWarning, match="2 of 4 texts are longer than the classifier's 40 tokens and were cut"):
        logits = classifier.logits(texts)
    np.testing.assert_allclose(logits[1:3], logits[[0, 0]], rtol=0, atol=1e-6)  # <s>, 38 of them, </s>
    assert np.abs(logits[3] - logits[0]).max() > 1e-3


def test_scores_of_a_label():
    logits = np.array([[1.0, 3.0], [2.0, 2.0]], np.float32)
    odds = np.array([math.exp(2.0), 1.0])
    for kind, expected in {
        "probability": odds / (1 + odds),
        "log_probability": np.log(odds / (1 + odds)),
        "log_odds": np.log(odds),
        "logit": [3.0, 2.0],
    }.items():
        np.testing.assert_allclose(LABEL_SCORES[kind](logits, 1), expected, rtol=1e-6, err_msg=kind)
    three = np.log(np.array([0.2, 0.5, 0.3]))
    assert LABEL_SCORES["probability"](three, 2) == pytest.approx(0.3)
    assert LABEL_SCORES["log_odds"](three, 2) == pytest.approx(math.log(0.3 / 0.7))


@pytest.mark.parametrize("kind", LABEL_SCORES)
def test_scores_of_sure_classifiers_are_finite(kind):
    scores = LABEL_SCORES[kind](np.array([[-1e4, 1e4], [1e4, -1e4]], np.float32), 1)
    assert np.isfinite(scores).all() and scores[0] > scores[1]


def test_a_reward_takes_texts(classifier):
    positive, negative = classifier.reward("POSITIVE"), classifier.reward("NEGATIVE")
    rewards = positive(TEXTS)
    assert rewards.shape == (6,) and rewards.dtype == np.float32 and ((rewards > 0) & (rewards < 1)).all()
    np.testing.assert_allclose(rewards + negative(TEXTS), 1, rtol=1e-6)
    logits = classifier.logits(TEXTS)
    odds = classifier.reward("POSITIVE", "log_odds")(TEXTS)
    np.testing.assert_allclose(odds, logits[:, 1] - logits[:, 0], rtol=0, atol=1e-6)
    assert TEXTS[odds.argmax()] == TEXTS[rewards.argmax()]  # the best of N


def test_one_label_is_a_logit(directory, tmp_path):
    model = changed(directory, tmp_path, id2label={"0": "reward"}, problem_type="regression")
    classifier = load_classifier(model)
    np.testing.assert_array_equal(classifier.reward("reward", "logit")(TEXTS), classifier.logits(TEXTS)[:, 0])
    with pytest.raises(InputError, match="kind is 'probability', which compares labels, and the model has one"):
        classifier.reward("reward")


CALLS = {
    "one string": (lambda c: c.logits("the"), "texts are 'the'; allowed: a sequence of strings; one text is a list"),
    "no string": (lambda c: c.logits(["a", 3]), r"texts are \['a', 3\]; allowed: a sequence of strings"),
    "label": (lambda c: c.reward("positive"), "label is 'positive'; allowed: NEGATIVE, POSITIVE"),
    "kind": (lambda c: c.reward("POSITIVE", "odds"), "kind is 'odds'; allowed: probability, log_probability, log_odds"),
}


@pytest.mark.parametrize("fault", CALLS)
def test_wrong_calls(classifier, fault):
    act, message = CALLS[fault]
    with pytest.raises(InputError, match=message):
        act(classifier)


def test_models_that_do_not_fit(directory, tmp_path):
    small = changed(directory, tmp_path, vocab_size=100)
    with pytest.raises(InputError, match="model: the tokenizer has ids up to 263, the model embeddings for 100"):
        load_classifier(small)
    with pytest.raises(InputError, match="microbatch_tokens is 0; allowed: at least 1"):
        load_classifier(directory, microbatch_tokens=0)
    with pytest.raises(InputError, match=r"of .*: model_type 'llama' .* is not supported; allowed: roberta"):
        load_classifier(write_checkpoint(tmp_path / "llama", CASES["llama-biases"]))
    with pytest.raises(InputError, match=r"model_type 'roberta' .* is not supported; allowed: llama"):
        load_hf(directory)


def test_a_tokenizer_that_begins_no_text_is_refused(directory, tmp_path, monkeypatch):
    class Bare:
        def get_vocab(self):
            return {"a": 0}

        def __call__(self, text):
            return {"input_ids": []}

    monkeypatch.setattr(module, "load_tokenizer", lambda directory: Bare())
    with pytest.raises(InputError, match="the tokenizer puts no token before a text, where the classifier reads"):
        load_classifier(directory)


@pytest.mark.parity
def test_logits_and_probabilities_of_transformers(directory, classifier):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    import transformers

    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        logits = model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    np.testing.assert_allclose(classifier.logits(TEXTS), logits.numpy(), rtol=0, atol=1e-5)
    # The settings that the paper's authors gave for the reward of their sentiment experiment.
    pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    scored = pipeline(TEXTS, top_k=None, batch_size=16, truncation=True, max_length=40)
    theirs = [{score["label"]: score["score"] for score in scores}["POSITIVE"] for scores in scored]
    np.testing.assert_allclose(classifier.reward("POSITIVE")(TEXTS), theirs, rtol=0, atol=1e-5)
