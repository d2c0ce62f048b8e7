"""From a decoder and its parameters to a directory that transformers, vLLM and `load_hf` read."""

import copy
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxdpo import families
from jaxdpo.families.fields import hf_token_ids
from jaxdpo.hf.files import move_into_place, write_json, write_weights
from jaxdpo.models import Decoder, TransformerConfig
from jaxdpo.processes import fetch, is_main
from jaxdpo.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXPORT_DTYPES = ("float32", "bfloat16", "float16")
NEW_PAD_TOKEN = "<|pad|>"
"""Padding of a reward model whose tokenizer has no token to spare."""


def save_hf(
    directory: str | os.PathLike[str],
    decoder: Decoder,
    params: dict[str, Any],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    generation_config: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes a model as a Hugging Face directory: `...ForCausalLM`, or `...ForSequenceClassification` of one label.

    Everything is written to a sibling directory that is renamed at the end: an export that was killed leaves no
    directory that looks whole. A reward model is written with the padding that makes transformers read the score
    where `jaxdpo.rewards` does: see `padded`.

    Args:
      directory: where; must not exist or be empty unless `overwrite`.
      decoder: the model.
      params: its parameters.
      tokenizer: saved beside it with its chat template; supplies token ids that the model's configuration lacks.
      generation_config: contents of `generation_config.json`; by default the special token ids. A reward model
        generates nothing and has none.
      dtype: of the stored weights: "float32", "bfloat16" or "float16".
      max_shard_bytes: larger checkpoints are split into files of at most this size, with an index.
      overwrite: replace an existing directory.
    Returns:
      the directory; where several processes hold the parameters all of them have to call this, and process 0 writes.
    Raises:
      InputError: if the directory is in use, for another dtype, or for a reward model without padding or tokenizer.
    """
    directory = pathlib.Path(directory).absolute()
    if dtype not in EXPORT_DTYPES:
        raise InputError(f"dtype of the export is {dtype!r}; allowed: {', '.join(EXPORT_DTYPES)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
        raise InputError(f"{directory} exists and is not empty; name another directory, or pass overwrite=True")
    if decoder.config.head == "score":
        decoder, params, tokenizer = padded(decoder, params, tokenizer)
    dtypes = {"dtype": dtype, "torch_dtype": dtype}  # the second is its name before transformers 5
    config = _tokenizer_ids(tokenizer) | families.export_config(decoder.config) | dtypes
    if generation_config is None:
        generation_config = _tokenizer_ids(tokenizer) | hf_token_ids(decoder.config)

    if not is_main():
        write_weights(None, decoder, params, jnp.dtype(dtype), max_shard_bytes)
        return directory
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(partial / "config.json", config)
    if decoder.config.head == "lm":
        write_json(partial / "generation_config.json", dict(generation_config))
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    write_weights(partial, decoder, params, jnp.dtype(dtype), max_shard_bytes)
    move_into_place(partial, directory)
    return directory


def padded(
    decoder: Decoder, params: dict[str, Any], tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[Decoder, dict[str, Any], "PreTrainedTokenizerBase | None"]:
    """A reward model and its tokenizer with a padding token under which transformers reads the same score.

    transformers reads the score at the last token that is not padding. Where padding is EOS, as so many tokenizers
    have it, that would be the token before EOS, which was not trained. So padding is a token that ends no text: the
    tokenizer's own, else its unknown, BOS or another special token, but none that is EOS or stands in the chat
    template. Where there is none, `<|pad|>` is added, with a row of zeros in the embedding if that has none to spare.
    A model that was loaded with a padding token was read with it all along, and keeps it.

    Args:
      decoder: with a score head.
      params: its parameters.
      tokenizer: is left as it is; a copy is returned.
    Raises:
      InputError: if neither the model nor a tokenizer says what padding is.
    """
    config = decoder.config
    if tokenizer is None:
        if config.pad_token_id is None:
            raise InputError(
                "a reward model is exported without a tokenizer; allowed: with one, as transformers finds the end of "
                "a text by the padding token; pass tokenizer="
            )
        return decoder, params, None
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"  # left padding would shift learned positions
    if config.pad_token_id is None:
        config = dataclasses.replace(config, pad_token_id=_spare_token(tokenizer, config))
    if config.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": NEW_PAD_TOKEN})
        vocabulary = max(config.vocab_size, tokenizer.pad_token_id + 1)
        new_rows = ((0, vocabulary - config.vocab_size), (0, 0))
        params = {**params, "tokens": np.pad(fetch(params["tokens"]), new_rows)}
        config = dataclasses.replace(config, vocab_size=vocabulary, pad_token_id=tokenizer.pad_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    return dataclasses.replace(decoder, config=config), params, tokenizer


def _spare_token(tokenizer: "PreTrainedTokenizerBase", config: TransformerConfig) -> int | None:
    """A special token that ends no text and that the embedding has; None where there is none."""
    eos = config.eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, tuple) else [eos])}
    template = str(tokenizer.chat_template or "")
    named = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    others = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    for token_id in (*named, *others):
        if token_id is None or token_id in ends or token_id >= config.vocab_size:
            continue
        if tokenizer.convert_ids_to_tokens(token_id) not in template:
            return token_id
    return None


def _tokenizer_ids(tokenizer: Any) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: value for name in names if (value := getattr(tokenizer, name, None)) is not None}
