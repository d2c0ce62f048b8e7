"""Tokenizers small enough to check by eye: one token per byte, but `th` is merged."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = 0, 1


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
