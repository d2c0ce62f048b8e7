"""Hugging Face directories: exact dtypes, whole exports or none, and a clear message for everything that is broken."""

import json
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file, save_file

from jaxdpo import families, hf
from jaxdpo.hf import files
from jaxdpo.types import InputError
from tests.families.cases import CASES, TOKENS, tensors, write_checkpoint

LLAMA = CASES["llama-grouped-tied"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "model", LLAMA)


@pytest.fixture
def sharded(checkpoint, tmp_path):
    hf.save_hf(tmp_path / "sharded", *hf.load_hf(checkpoint), max_shard_bytes=24_000)
    return tmp_path / "sharded"


def bytes_tokenizer():
    """One token per byte, `<s>` and `</s>`."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate(["<s>", "</s>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_load_exactly(tmp_path, dtype):
    narrow = {name: value.astype(jnp.dtype(dtype)) for name, value in tensors(LLAMA).items()}
    _, params = hf.load_hf(write_checkpoint(tmp_path / "narrow", LLAMA, narrow))
    widened = {name: value.astype(np.float32) for name, value in narrow.items()}
    _, expected = hf.load_hf(write_checkpoint(tmp_path / "wide", LLAMA, widened))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert same(params, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_in_a_narrow_dtype(checkpoint, tmp_path, dtype):
    hf.save_hf(tmp_path / "out", *hf.load_hf(checkpoint), dtype=dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in tensors(LLAMA).items():
        np.testing.assert_array_equal(written[name], value.astype(jnp.dtype(dtype)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_export_refuses_another_dtype(checkpoint, tmp_path):
    with pytest.raises(InputError, match="dtype of the export is 'int8'; allowed: float32, bfloat16, float16"):
        hf.save_hf(tmp_path / "out", *hf.load_hf(checkpoint), dtype="int8")


def test_compute_dtype_reaches_the_decoder(checkpoint):
    decoder, params = hf.load_hf(checkpoint, compute_dtype="bfloat16")
    assert decoder.compute_dtype == "bfloat16"
    assert params["tokens"].dtype == jnp.float32


def test_files_of_an_export(sharded):
    names = {path.name for path in sharded.iterdir()}
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert names == shards | {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(LLAMA).values())
    assert all((sharded / shard).stat().st_size < 24_000 + 2_000 for shard in shards)  # 2 kB of header
    config = json.loads((sharded / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert json.loads((sharded / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in sharded.iterdir()}
    assert len(modes) == 1  # weights are as readable as config.json


def test_generation_config_is_carried(checkpoint, tmp_path):
    stated = {"eos_token_id": [2, 7], "temperature": 0.6}
    hf.save_hf(tmp_path / "out", *hf.load_hf(checkpoint), generation_config=stated)
    assert hf.hf_generation_config(tmp_path / "out") == stated
    assert hf.hf_generation_config(checkpoint) is None


def test_tokenizer_and_chat_template_round_trip(tmp_path):
    config = {key: value for key, value in LLAMA.items() if key not in ("bos_token_id", "eos_token_id")}
    decoder, params = hf.load_hf(write_checkpoint(tmp_path / "in", config))
    tokenizer = bytes_tokenizer()
    hf.save_hf(tmp_path / "out", decoder, params, tokenizer=tokenizer)
    again = hf.load_tokenizer(tmp_path / "out")
    messages = [{"role": "user", "content": "Grüße\n\n 12"}, {"role": "assistant", "content": "</s> is EOS"}]
    assert again.chat_template == TEMPLATE
    texts = [t.apply_chat_template(messages, tokenize=False) for t in (tokenizer, again)]
    assert texts[0] == texts[1] == "<user>Grüße\n\n 12<assistant></s> is EOS"
    assert again(texts[0]).input_ids == tokenizer(texts[0]).input_ids
    exported = hf.hf_config(tmp_path / "out")
    assert (exported["bos_token_id"], exported["eos_token_id"]) == (0, 1)  # the model's configuration had none


def test_a_killed_export_leaves_nothing_that_looks_whole(checkpoint, tmp_path, monkeypatch):
    decoder, params = hf.load_hf(checkpoint)
    real, calls = files.save_file, []

    def dies_at_the_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(files, "save_file", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        hf.save_hf(tmp_path / "out", decoder, params, max_shard_bytes=20_000)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    hf.save_hf(tmp_path / "out", decoder, params)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}  # the leftovers are gone
    assert same(hf.load_hf(tmp_path / "out")[1], params)


def test_overwriting_is_asked_for(checkpoint, tmp_path):
    decoder, params = hf.load_hf(checkpoint)
    out = tmp_path / "out"
    out.mkdir()  # an empty directory is no obstacle
    hf.save_hf(out, decoder, params)
    with pytest.raises(InputError, match="out exists and is not empty; name another directory"):
        hf.save_hf(out, decoder, params)
    negated = jax.tree.map(jnp.negative, params)
    hf.save_hf(out, decoder, negated, overwrite=True)
    assert same(hf.load_hf(out)[1], negated)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_sharded_equals_single(checkpoint, sharded):
    assert same(hf.load_hf(checkpoint)[1], hf.load_hf(sharded)[1])


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(path, change):
    save_file(change(load_file(path)), path)


BROKEN = {
    "no config": (
        lambda d: (d / "config.json").unlink(),
        r"model has no config.json \(found: \['model.safetensors'\]\)",
    ),
    "bad JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    "not an object": (lambda d: (d / "config.json").write_text("[]"), "config.json holds list; allowed: a JSON object"),
    "architecture": (
        lambda d: edit_json(
            d / "config.json", lambda c: c.update(model_type="mamba", architectures=["MambaForCausalLM"])
        ),
        r"model_type 'mamba' \(architectures \['MambaForCausalLM'\]\) is not supported; allowed: llama, mistral, gpt2",
    ),
    "size": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(num_key_value_heads=4)),
        "num_heads is 6 with num_kv_heads 4",
    ),
    "shape": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(vocab_size=102)),
        r"tensor 'model.embed_tokens.weight' has shape \(101, 36\); allowed: \(102, 36\)",
    ),
    "truncated": (lambda d: shorten(d / "model.safetensors"), "model.safetensors is truncated or damaged"),
    "missing tensor": (
        lambda d: rewrite(d / "model.safetensors", lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}),
        r"missing tensor 'model.norm.weight' \(1 of 29 are missing\)",
    ),
    "unknown tensor": (
        lambda d: rewrite(d / "model.safetensors", lambda t: t | {"lora_A": np.ones(1, np.float32)}),
        "unknown tensor 'lora_A'",
    ),
    "integer weights": (
        lambda d: rewrite(
            d / "model.safetensors", lambda t: t | {"model.norm.weight": t["model.norm.weight"].astype(np.int8)}
        ),
        "tensor 'model.norm.weight' is stored as I8; allowed: F32, BF16, F16, F64",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights; allowed: model.safetensors"),
    "pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "only pickled weights .* never read; convert them to safetensors",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_directory(checkpoint, fault):
    damage, message = BROKEN[fault]
    damage(checkpoint)
    with pytest.raises(InputError, match=message):
        hf.load_hf(checkpoint)


BROKEN_SHARDS = {
    "shard not there": (
        lambda d: (d / "model-00002-of-00006.safetensors").unlink(),
        "index.json lists the shard 'model-00002-of-00006.safetensors', which is not there",
    ),
    "shard not in the index": (
        lambda d: shutil.copy(d / "model-00002-of-00006.safetensors", d / "model-00007-of-00007.safetensors"),
        "shard model-00007-of-00007.safetensors is missing from the index",
    ),
    "tensor not in its shard": (
        lambda d: edit_json(
            d / "model.safetensors.index.json",
            lambda index: index["weight_map"].update({"a": "model-00001-of-00006.safetensors"}),
        ),
        "lists the tensor 'a', which model-00001-of-00006.safetensors does not hold",
    ),
    "tensor in two shards": (
        lambda d: shutil.copy(d / "model-00002-of-00006.safetensors", d / "model-00003-of-00006.safetensors"),
        "is there twice, also in another shard",
    ),
    "truncated shard": (
        lambda d: shorten(d / "model-00004-of-00006.safetensors"),
        "model-00004-of-00006.safetensors is truncated or damaged",
    ),
    "path outside": (
        lambda d: edit_json(
            d / "model.safetensors.index.json",
            lambda index: index["weight_map"].update({"a": "../model/model.safetensors"}),
        ),
        "lists the shard '../model/model.safetensors', which is not there",
    ),
    "no weight map": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        "has no weight_map from tensors to files",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_SHARDS)
def test_broken_shards(sharded, fault):
    assert (sharded / "model-00006-of-00006.safetensors").exists()
    damage, message = BROKEN_SHARDS[fault]
    damage(sharded)
    with pytest.raises(InputError, match=message):
        hf.load_hf(sharded)


def test_no_directory(tmp_path):
    with pytest.raises(InputError, match=r"nowhere has no config.json \(found: no directory\)"):
        hf.load_hf(tmp_path / "nowhere")


def test_no_tokenizer(checkpoint):
    with pytest.raises(InputError, match="has no tokenizer that transformers can load"):
        hf.load_tokenizer(checkpoint)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(100, [["a", "b", "c", "d"]]), (8, [["a", "b"], ["c"], ["d"]]), (1, [["a"], ["b"], ["c"], ["d"]])],
)
def test_split_shards(limit, expected):
    assert families.split_shards({"a": 3, "b": 4, "c": 9, "d": 1}, limit) == expected


@pytest.mark.parity
def test_export_has_logits_and_chat_template_of_the_original(tmp_path):
    """The original is written by transformers, bfloat16 and in shards; the copy is ours."""
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    import torch

    from tests.families.make_golden import torch_logits, torch_model

    original = torch_model(LLAMA | {"vocab_size": 258, "pad_token_id": 0}).to(torch.bfloat16)
    original.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    bytes_tokenizer().save_pretrained(tmp_path / "in")
    assert len(list(tmp_path.glob("in/*.safetensors"))) > 1
    tokenizer = hf.load_tokenizer(tmp_path / "in")
    decoder, params = hf.load_hf(tmp_path / "in")
    stated = hf.hf_generation_config(tmp_path / "in")
    hf.save_hf(tmp_path / "out", decoder, params, tokenizer=tokenizer, generation_config=stated, dtype="bfloat16")

    ours, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("out", "in")
    )
    np.testing.assert_array_equal(torch_logits(ours, TOKENS), torch_logits(theirs, TOKENS))
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    templates = [transformers.AutoTokenizer.from_pretrained(tmp_path / name).chat_template for name in ("out", "in")]
    assert templates == [TEMPLATE, TEMPLATE]
    logits = jax.jit(decoder.logits)(params, TOKENS)
    np.testing.assert_allclose(logits, torch_logits(theirs, TOKENS), rtol=0, atol=1e-4)
