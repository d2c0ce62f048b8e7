"""Small models and random preference trees that the tests share; nothing here comes from a file or the network."""

import jax
import numpy as np

from jaxdpo.data.layout import choose_capacity
from jaxdpo.data.packing import Layout
from jaxdpo.data.tokenize import TokenizedDataset, TokenizedGroup
from jaxdpo.models import Decoder, TransformerConfig, make_decoder

LLAMA = TransformerConfig(
    model_type="llama",
    vocab_size=61,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=24,
    max_positions=64,
    init_std=0.3,
    tie_embeddings=True,
)
GPT2 = TransformerConfig(
    model_type="gpt2",
    vocab_size=61,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    mlp_dim=64,
    max_positions=64,
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    attention_bias=True,
    mlp_bias=True,
    rope=None,
    init_std=0.3,
    tie_embeddings=True,
)


def decoder(config: TransformerConfig = LLAMA, compute_dtype: str = "float32") -> Decoder:
    return make_decoder(config, compute_dtype=compute_dtype)


def dataset(*, groups: int, candidates: tuple[int, int] = (2, 2), longest: int = 12, seed: int = 0) -> TokenizedDataset:
    """Random trees: prompts of 1 to `longest` tokens, completions of 1 to `longest`, K between the two `candidates`."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(1, groups + 1):
        count = int(rng.integers(candidates[0], candidates[1], endpoint=True))
        sizes = rng.integers(1, longest, endpoint=True, size=count + 1)
        if row == 1:
            sizes[1:] = 1  # one-token completions: their only predictor is the prompt's last token
        prompt, *completions = (rng.integers(0, LLAMA.vocab_size, size).astype(np.int32) for size in sizes)
        made.append(TokenizedGroup(prompt, tuple(completions), False, (False,) * count, "random", row))
    tokens = np.array([group.tokens for group in made], np.int32)
    slots = np.array([group.slots for group in made], np.int32)
    return TokenizedDataset(made, tokens, slots, ())


def layout(
    data: TokenizedDataset, *, tokens: int = 256, row_multiple: int = 1, row_length: int | None = None
) -> Layout:
    return choose_capacity(
        [data],
        [np.arange(len(data))],
        max_microbatch_tokens=tokens,
        row_multiple=row_multiple,
        row_length=row_length,
    )


def as_dtype(params: dict, dtype: str) -> dict:
    return jax.tree.map(lambda x: x.astype(dtype), params)
