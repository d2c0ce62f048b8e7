"""Token by token is what the whole text gives at once, in every family; samples share their prompt."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.models import Decoder
from jaxdpo.models.decoding import decode_step, decoding_params, empty_cache, prefill
from tests import tiny

MODELS = {
    "llama": tiny.LLAMA,
    "gpt2": tiny.GPT2,
    "window": dataclasses.replace(tiny.LLAMA, sliding_window=4, num_kv_heads=1),
    "untied": dataclasses.replace(tiny.LLAMA, tie_embeddings=False, attention_bias=True, mlp_bias=True),
}
LENGTHS = np.array([6, 1, 3], np.int32)
SAMPLES, STEPS = 2, 7
LOGITS = jax.jit(Decoder.logits, static_argnums=0)


def decoded(decoder, params, texts):
    """Logits `[prompts, samples, 1 + STEPS, vocab]` behind the prompts in `texts` `[prompts, samples, length]`."""
    laid = jax.jit(functools.partial(decoding_params, decoder))(params)
    prompts = np.full((len(texts), 8), 60, np.int32)  # other tokens behind the prompts
    for i, length in enumerate(LENGTHS):
        prompts[i, :length] = texts[i, 0, :length]
    logits, cache = jax.jit(functools.partial(prefill, decoder))(laid, prompts, LENGTHS)
    found = [jnp.repeat(logits[:, None], SAMPLES, axis=1)]
    own = empty_cache(decoder, len(texts) * SAMPLES, 8)
    step = jax.jit(functools.partial(decode_step, decoder))
    for i in range(STEPS):
        tokens = np.stack([text[:, length + i] for text, length in zip(texts, LENGTHS, strict=True)])
        logits, own = step(laid, cache, own, tokens, i)
        found.append(logits)
    return np.stack(found, axis=2)


@pytest.mark.parametrize("form", ["dense", "blockwise"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_whole_text(name, form):
    decoder = dataclasses.replace(tiny.decoder(MODELS[name]), attention=form)
    params = tiny.params(decoder)
    texts = np.random.default_rng(0).integers(0, 61, (3, SAMPLES, 6 + STEPS)).astype(np.int32)
    for text, length in zip(texts, LENGTHS, strict=True):
        text[:, :length] = text[0, :length]
    found = decoded(decoder, params, texts)
    whole = np.asarray(LOGITS(decoder, params, texts.reshape(-1, texts.shape[-1]))).reshape(*texts.shape, -1)
    for i, length in enumerate(LENGTHS):
        np.testing.assert_allclose(found[i], whole[i, :, length - 1 : length + STEPS], rtol=0, atol=1e-5)


def test_kernels_are_in_the_dtype_of_products():
    decoder = dataclasses.replace(tiny.decoder(), product_dtype="bfloat16")
    laid = jax.eval_shape(functools.partial(decoding_params, decoder), tiny.params(decoder))
    assert laid.layers[1]["mlp"]["up"]["kernel"].shape == (24, 16)
    assert laid.layers[1]["attention"]["o"]["kernel"].shape == (16, 4, 6)
    assert laid.layers[0]["attention"]["q"]["kernel"].dtype == laid.head.dtype == jnp.bfloat16
    assert laid.layers[0]["mlp_norm"]["scale"].dtype == laid.others["tokens"].dtype == jnp.float32
