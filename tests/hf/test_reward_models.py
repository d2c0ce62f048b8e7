"""Reward models are Hugging Face classifiers: in and out, with the scores that transformers computes."""

import dataclasses

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file, save_file

from jaxdpo import hf
from jaxdpo.data.pipeline import all_batches
from jaxdpo.hf.save import NEW_PAD_TOKEN
from jaxdpo.models import abstract_params, make_decoder
from jaxdpo.rewards import dataset_rewards, make_reward_program
from jaxdpo.sharding import make_mesh
from jaxdpo.types import InputError
from tests import tiny
from tests.data.trees import group
from tests.families.cases import CASES, CLASSIFIERS, tensor, write_checkpoint

LLAMA, CLASSIFIER = CASES["llama-biases"], CLASSIFIERS["llama-biases"]
SPECIALS = ("<eos>", "<bos>", "<unk>", "<pad>", "<turn>")
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def letters_tokenizer(*specials, template=None, **named):
    """A token of each letter, after the special tokens; EOS is `<eos>`."""
    vocab = {text: i for i, text in enumerate([*specials, *LETTERS])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(list(specials))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", chat_template=template, padding_side="left", **named
    )


def leaves(params):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_a_new_head_on_a_language_model(tmp_path, case):
    """The backbone is the language model's, whose head is passed over; the score head is small, random and seeded."""
    model = write_checkpoint(tmp_path, CASES[case])
    _, language = hf.load_hf(model)
    decoder, params = hf.load_reward_model(model, seed=0)
    assert leaves(params).keys() == leaves(language).keys() - {"['head']"} | {"['score']"}
    assert leaves(params).keys() == leaves(abstract_params(decoder)).keys()
    for name, leaf in leaves(params).items():
        if name != "['score']":
            np.testing.assert_array_equal(leaf, leaves(language)[name])
    assert 0.5 < np.std(params["score"]) / decoder.config.init_std < 1.5
    np.testing.assert_array_equal(params["score"], hf.load_reward_model(model, seed=0)[1]["score"])
    assert (params["score"] != hf.load_reward_model(model, seed=1)[1]["score"]).all()
    assert decoder.config == hf.load_config(model, head="score")


def test_loaded_onto_a_mesh(tmp_path):
    wide = {"vocab_size": 104}
    for name, config in {"new": LLAMA | wide, "classifier": CLASSIFIER | wide}.items():
        model, mesh = write_checkpoint(tmp_path / name, config), make_mesh(fsdp=4, tensor=2)
        decoder, params = hf.load_reward_model(model, seed=3, mesh=mesh)
        _, whole = hf.load_reward_model(model, seed=3)
        for leaf, place in zip(*map(jax.tree.leaves, (params, abstract_params(decoder, mesh))), strict=True):
            assert leaf.sharding == place.sharding
        np.testing.assert_array_equal(params["score"], whole["score"])
        assert params["score"].addressable_shards[0].data.shape == (36 // 4,)


def test_the_padding_of_a_language_model_is_not_that_of_a_reward_model(tmp_path):
    model = write_checkpoint(tmp_path, LLAMA | {"pad_token_id": LLAMA["eos_token_id"]})
    assert hf.load_config(model).pad_token_id == LLAMA["eos_token_id"]
    assert hf.load_config(model, head="score").pad_token_id is None


REFUSED = {
    "a classifier as a language model": (
        lambda d: hf.load_hf(write_checkpoint(d, CLASSIFIER)),
        r"config.json of .*model: LlamaForSequenceClassification is a reward model without an LM head; "
        "allowed: a language model, such as LlamaForCausalLM",
    ),
    "a language model as a reward model": (
        lambda d: hf.load_reward_model(write_checkpoint(d, LLAMA | {"architectures": ["LlamaForCausalLM"]})),
        r"LlamaForCausalLM is a language model without a score head; .* train one, jaxdpo reward --model .*model",
    ),
    "a language model that names no class": (
        lambda d: hf.load_reward_model(write_checkpoint(d, LLAMA)),
        "model: llama is a language model without a score head",
    ),
    "several labels": (
        lambda d: hf.load_reward_model(write_checkpoint(d, CLASSIFIER | {"id2label": {"0": "bad", "1": "good"}}, {})),
        "config.json of .*model: config.json has LlamaForSequenceClassification with 2 labels; allowed: 1",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refusals(tmp_path, fault):
    act, message = REFUSED[fault]
    with pytest.raises(InputError, match=message):
        act(tmp_path / "model")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t | {"score.bias": np.ones(1, np.float32)}, "tensor 'score.bias'; allowed: a head without bias"),
        (lambda t: t | {"score.weight": np.ones((2, 36), np.float32)}, r"shape \(2, 36\); allowed: \(1, 36\)"),
        (lambda t: {n: v for n, v in t.items() if n != "score.weight"}, "missing tensor 'score.weight'"),
    ],
)
def test_heads_that_do_not_fit(tmp_path, change, message):
    weights = write_checkpoint(tmp_path, CLASSIFIER) / "model.safetensors"
    save_file(change(load_file(weights)), weights)
    with pytest.raises(InputError, match=message):
        hf.load_reward_model(tmp_path)


TURNS = "{% for m in messages %}<bos>{{ m['content'] }}<turn>{% endfor %}"
PADDING = {
    "its own": (letters_tokenizer(*SPECIALS, pad_token="<pad>", unk_token="<unk>"), "<pad>"),
    "unknown": (letters_tokenizer(*SPECIALS, pad_token="<eos>", unk_token="<unk>", bos_token="<bos>"), "<unk>"),
    "BOS": (letters_tokenizer(*SPECIALS, unk_token="<eos>", bos_token="<bos>"), "<bos>"),
    "another": (letters_tokenizer("<eos>", "<turn>", bos_token="<eos>", pad_token="<eos>"), "<turn>"),
    "not of the template": (letters_tokenizer(*SPECIALS, bos_token="<bos>", template=TURNS), "<unk>"),
    "new": (letters_tokenizer("<eos>", bos_token="<eos>", pad_token="<eos>"), NEW_PAD_TOKEN),
    "new, all others end texts": (letters_tokenizer("<eos>", "<turn>", template=TURNS), NEW_PAD_TOKEN),
}


def fitted(config, tokenizer, *, spare=0, **more):
    """The `config.json` for this tokenizer, with `spare` rows of the embedding that it does not use."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return config | {"vocab_size": len(tokenizer) + spare} | ids | more


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("kind", PADDING)
def test_padding_of_an_export_ends_no_text(tmp_path, kind, spare):
    tokenizer, expected = PADDING[kind]
    before = (tokenizer.pad_token, len(tokenizer), tokenizer.padding_side)
    model = write_checkpoint(tmp_path / "in", fitted(LLAMA, tokenizer, spare=spare))
    decoder, params = hf.load_reward_model(model, seed=0)
    hf.save_hf(tmp_path / "out", decoder, params, tokenizer=tokenizer)
    assert (tokenizer.pad_token, len(tokenizer), tokenizer.padding_side) == before
    written, config = hf.load_tokenizer(tmp_path / "out"), hf.hf_config(tmp_path / "out")
    assert (written.pad_token, written.padding_side, written.eos_token) == (expected, "right", "<eos>")
    assert config["pad_token_id"] == written.pad_token_id != written.eos_token_id
    grown = expected == NEW_PAD_TOKEN and not spare
    assert config["vocab_size"] == decoder.config.vocab_size + grown
    again, params_again = hf.load_reward_model(tmp_path / "out")
    vocabulary = decoder.config.vocab_size
    assert dataclasses.replace(again.config, vocab_size=vocabulary, pad_token_id=None) == decoder.config
    np.testing.assert_array_equal(params_again["tokens"][:vocabulary], params["tokens"])
    assert not np.any(params_again["tokens"][vocabulary:])
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_padding_that_the_model_was_read_with_is_kept(tmp_path):
    """Even EOS: the scores before EOS are what it was trained for."""
    tokenizer = letters_tokenizer(*SPECIALS, pad_token="<pad>")
    model = write_checkpoint(tmp_path / "in", fitted(CLASSIFIER, tokenizer, pad_token_id=0))
    hf.save_hf(tmp_path / "out", *hf.load_reward_model(model), tokenizer=tokenizer)
    assert hf.load_tokenizer(tmp_path / "out").pad_token == "<eos>"
    assert hf.hf_config(tmp_path / "out")["pad_token_id"] == 0


def test_an_export_that_could_not_be_batched_is_refused(tmp_path):
    decoder, params = hf.load_reward_model(write_checkpoint(tmp_path / "in", LLAMA), seed=0)
    with pytest.raises(InputError, match="a reward model is exported without a tokenizer; allowed: with one"):
        hf.save_hf(tmp_path / "out", decoder, params)
    assert not (tmp_path / "out").exists()


TEXTS = {
    "what is a tree": ("a tall plant", "x", "a graph without cycles and with one path between any two"),
    "hi": ("", "hello there"),
    "a much longer prompt that will make the others be padded": ("yes", "no"),
}
"""Prompt -> completions; one of them is its EOS alone."""


def our_rewards(directory, tokenizer):
    """`[texts]` rewards of prompt, completion and EOS, as packed trees."""
    groups = []
    for row, (prompt, completions) in enumerate(TEXTS.items(), start=1):
        made = group(1, *(1 for _ in completions), row=row)
        ids = [tokenizer(text, return_tensors="np").input_ids[0].astype(np.int32) for text in (prompt, *completions)]
        ends = tuple(np.append(completion, np.int32(tokenizer.eos_token_id)) for completion in ids[1:])
        groups.append(dataclasses.replace(made, prompt=ids[0], completions=ends))
    data = tiny.of_groups(groups)
    decoder, params = hf.load_reward_model(directory)
    mesh = make_mesh(jax.devices()[:1])
    batches = all_batches(data, tiny.layout(data, tokens=512))
    rewards = dataset_rewards(make_reward_program(decoder), params, batches, mesh, label="test")
    return rewards.rewards[rewards.mask]


def their_rewards(directory):
    """The same by transformers, of texts, in one padded batch."""
    import torch

    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = [f"{prompt}{end}<eos>" for prompt, completions in TEXTS.items() for end in completions]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    assert (inputs.attention_mask == 0).any()
    with torch.no_grad():
        logits = model.eval()(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
    return logits[:, 0].numpy()


def parity_config(case, tokenizer, **more):
    positions = "n_positions" if "gpt2" in case else "max_position_embeddings"
    return fitted(CASES[case], tokenizer, **{positions: 128}, **more)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["unknown", "new"])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_exported_rewards_are_those_of_transformers(tmp_path, case, kind):
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    tokenizer, _ = PADDING[kind]
    model = write_checkpoint(tmp_path / "in", parity_config(case, tokenizer))
    decoder, params = hf.load_reward_model(model, seed=0)
    score = tensor("score.weight", params["score"].shape)  # larger than a new head: errors show
    hf.save_hf(tmp_path / "out", decoder, {**params, "score": jax.device_put(score)}, tokenizer=tokenizer)
    ours, theirs = our_rewards(tmp_path / "out", tokenizer), their_rewards(tmp_path / "out")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert len(set(ours.round(3))) == len(ours)  # among them completions of one token and of none


@pytest.mark.parity
@pytest.mark.parametrize("pad", ["<unk>", "<eos>"])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classifiers_of_transformers_keep_their_scores(tmp_path, case, pad):
    """In and out again, also where padding is EOS and the score is read before it."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    tokenizer = letters_tokenizer(*SPECIALS, unk_token="<unk>", pad_token=pad)
    config = parity_config(case, tokenizer, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    stated = transformers.AutoConfig.for_model(**{key: value for key, value in config.items() if value is not None})
    classifier = transformers.AutoModelForSequenceClassification.from_config(stated)
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            parameter.copy_(torch.from_numpy(tensor(name, tuple(parameter.shape))))
    classifier.save_pretrained(tmp_path / "in")
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path / "in")

    theirs = their_rewards(tmp_path / "in")
    np.testing.assert_allclose(our_rewards(tmp_path / "in", tokenizer), theirs, rtol=0, atol=1e-4)
    decoder, params = hf.load_reward_model(tmp_path / "in")
    hf.save_hf(tmp_path / "out", decoder, params, tokenizer=hf.load_tokenizer(tmp_path / "in"))
    np.testing.assert_array_equal(their_rewards(tmp_path / "out"), theirs)
    assert make_decoder(hf.load_config(tmp_path / "out", head="score")) == decoder
