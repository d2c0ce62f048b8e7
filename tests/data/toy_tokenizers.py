"""Tokenizers small enough to check by eye: one token per byte, but `th` is merged."""

import json
import pathlib
import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = 0, 1
GOLDEN = pathlib.Path(__file__).parent / "golden"


def toy_tokenizer(
    *, bos: str | None = "<bos>", eos: str | None = "<eos>", template: str = "$A"
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose own encoding of a text `$A` is the template, for example `<bos> $A <eos>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate(["<bos>", "<eos>", *alphabet, "th"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [("<bos>", BOS), ("<eos>", EOS)]
    backend.add_special_tokens([text for text, _ in special])
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


SMOLLM_LIKE = toy_tokenizer()  # has BOS, adds none
LLAMA_LIKE = toy_tokenizer(template="<bos> $A")
GPT2_LIKE = toy_tokenizer(bos="<eos>")  # BOS is EOS, adds none
T5_LIKE = toy_tokenizer(bos=None, template="$A <eos>")
BERT_LIKE = toy_tokenizer(template="<bos> $A <eos>")
NO_EOS = toy_tokenizer(eos=None)


def smollm2() -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer and chat template, with the words that the golden records need and every byte."""
    facts = json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))
    backend = Tokenizer.from_str(json.dumps(facts.pop("tokenizer")))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **facts)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 2's rules: a text begins with a space of its own, unknown characters are bytes, BOS is added."""
    special = [("<bos>", BOS), ("<eos>", EOS)]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", *string.ascii_letters, *string.digits, "th", "▁th", "▁▁"]
    vocab = {text: i for i, text in enumerate(["<bos>", "<eos>", "<unk>", *bytes_, *words])}
    merges = [("t", "h"), ("▁", "th"), ("▁", "▁")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([text for text, _ in special])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
