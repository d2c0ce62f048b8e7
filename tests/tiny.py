"""Small models, random preference trees and small runs that the tests share; nothing comes from the network."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxdpo.data.layout import choose_capacity
from jaxdpo.data.packing import Layout
from jaxdpo.data.tokenize import TokenizedDataset, TokenizedGroup
from jaxdpo.hf import save_hf
from jaxdpo.models import Decoder, TransformerConfig, abstract_params, make_decoder
from jaxdpo.types import UNRANKED, Origin

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
WITH_TOKENIZER = dataclasses.replace(LLAMA, vocab_size=264, num_layers=1, bos_token_id=0, eos_token_id=1)
"""For the byte-level tokenizer of `write_model`, whose largest id is 258."""


MEASURED = (
    "pairs_per_second",
    "tokens_per_second_per_device",
    "mfu",
    "goodput",
    "seconds/compilation",
    "seconds/data_wait",
    "seconds/step",
    "seconds/evaluation",
    "seconds/checkpoint",
    "seconds/logging",
    "compilations",
    "compilations_cached",
    "device_memory",
    "device_memory_peak",
    "host_memory_peak",
)
"""What a row of metrics says of time and machine, in order."""
AT_TIMES = {"seconds/compilation", "compilations", "compilations_cached", "device_memory", "device_memory_peak"}
"""Those that a row may lack: where nothing was compiled, or on a CPU."""


def decoder(config: TransformerConfig = LLAMA, compute_dtype: str = "float32") -> Decoder:
    return make_decoder(config, compute_dtype=compute_dtype)


def params(decoder: Decoder, mesh: jax.sharding.Mesh | None = None, *, seed: int = 0, dtype: str = "float32") -> dict:
    """Random parameters, the same numbers in any dtype, by NumPy: `init_params` compiles for seconds."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.normal(scale=decoder.config.init_std, size=leaf.shape).astype(np.float32)
        return jax.device_put(values.astype(dtype), leaf.sharding)

    return jax.tree.map(draw, abstract_params(decoder, mesh))


def dataset(
    *,
    groups: int,
    candidates: tuple[int, int] = (2, 2),
    longest: int = 12,
    seed: int = 0,
    ranked: bool = False,
    labelled: bool = False,
) -> TokenizedDataset:
    """Random trees: prompts of 1 to `longest` tokens, completions of 1 to `longest`, K between the two `candidates`.

    Args:
      groups: how many.
      candidates: fewest and most of a group.
      longest: tokens.
      seed: of all that is random; ranks and labels do not change the trees.
      ranked: the groups of two completions or more have ties and a rest below the observed top k.
      labelled: completions are judged one by one: the first candidate has a label, the second one is its partner.
    """
    rng, judge = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    made = []
    for row in range(1, groups + 1):
        count = int(rng.integers(candidates[0], candidates[1], endpoint=True))
        sizes = rng.integers(1, longest, endpoint=True, size=count + 1)
        if row == 1:
            sizes[1:] = 1  # one-token completions: their only predictor is the prompt's last token
        prompt, *completions = (rng.integers(0, LLAMA.vocab_size, size).astype(np.int32) for size in sizes)
        ranks = random_ranks(judge, count) if ranked and count > 1 else None
        label = bool(judge.integers(2)) if labelled else None
        made.append(
            TokenizedGroup(prompt, tuple(completions), False, (False,) * count, Origin("random", row), ranks, label)
        )
    return of_groups(made)


def random_ranks(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    """Ranks of `count` candidates with ties and, half of the time, a rest that is not ranked; never all alike."""
    steps = rng.integers(2, size=count - 1)
    steps[rng.integers(count - 1)] = 1
    ranks = np.concatenate([[0], np.cumsum(steps)])
    top = int(rng.integers(1, ranks[-1], endpoint=True)) if rng.integers(2) else count  # ranks below are observed
    return tuple(int(rank) if rank < top else UNRANKED for rank in ranks)


def tokenized(prompt: int, *completions: int, label: bool | None = None) -> TokenizedGroup:
    """A group with a prompt and completions of so many tokens."""
    ids = [np.arange(1, 1 + size, dtype=np.int32) for size in (prompt, *completions)]
    cut = (False,) * len(completions)
    ranks = None if label is None else (0, *(UNRANKED,) * (len(completions) - 1))
    return TokenizedGroup(ids[0], tuple(ids[1:]), False, cut, Origin("sizes", 1), ranks, label)


def of_groups(groups: list[TokenizedGroup]) -> TokenizedDataset:
    """A dataset of these groups in this order."""
    return TokenizedDataset.of(groups)


def layout(
    data: TokenizedDataset, *, tokens: int = 256, row_multiple: int = 1, row_lengths: Sequence[int] | None = None
) -> Layout:
    return choose_capacity(
        [data],
        [np.arange(len(data))],
        max_microbatch_tokens=tokens,
        row_multiple=row_multiple,
        row_lengths=row_lengths,
    )


def timeless(rows: Iterable[dict]) -> list[dict]:
    """Rows of metrics without what no two runs have in common."""
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def as_dtype(params: dict, dtype: str) -> dict:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def write_model(
    directory: Path,
    config: TransformerConfig = WITH_TOKENIZER,
    *,
    seed: int = 0,
    edit: Callable[[dict], dict] = lambda params: params,
) -> Path:
    """A Hugging Face directory with random weights, perhaps edited, and a byte-level tokenizer."""
    from tests.data.toy_tokenizers import toy_tokenizer  # 1 s to import, and few tests need it

    model = make_decoder(config)
    return save_hf(directory, model, edit(params(model, seed=seed)), tokenizer=toy_tokenizer())


def write_pairs(path: Path, numbers: range) -> Path:
    """A `pairs` file of one short pair for each number, of different lengths, that even a tiny model can learn."""
    records = (
        {"prompt": f"Is {n} fine?", "chosen": " yes" * (1 + n % 3), "rejected": " no" * (1 + n % 4)} for n in numbers
    )
    return write_records(path, records)


def write_ranked(path: Path, numbers: range, *, ties: bool = False) -> Path:
    """A `ranked` file of one ranking of two to four short completions for each number; `ties`: most are not strict."""
    words = (" yes", " maybe", " hardly", " no")

    def record(n: int) -> dict:
        count = 2 + n % 3
        made = {"prompt": f"Is {n} fine?", "completions": [word * (1 + n % 2) for word in words[:count]]}
        ranks = {2: [0, None], 3: [0, 0, 1], 4: [0, 1, 1, None]}[count]  # a top 1 of two is the whole order
        return {**made, "ranks": ranks} if ties else made

    return write_records(path, map(record, numbers))


def write_unpaired(path: Path, numbers: range) -> Path:
    """An `unpaired` file of one short judged completion for each number, good ones and bad ones by turns."""
    records = (
        {"prompt": f"Is {n} fine?", "completion": (" no", " yes")[n % 2] * (1 + n % 3), "label": n % 2 == 1}
        for n in numbers
    )
    return write_records(path, records)


def write_records(path: Path, records: Iterable[dict]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
