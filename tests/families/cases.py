"""Small checkpoints of every family: a `config.json` each, and weights that follow from the tensor's name alone."""

import json
import pathlib
import zlib

import numpy as np
from safetensors.numpy import save_file

from jaxdpo import families

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 52,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 101,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 3,
    "n_positions": 32,
    "bos_token_id": 100,
    "eos_token_id": 100,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES = {
    "llama-grouped-tied": _LLAMA | {"tie_word_embeddings": True},
    "llama-biases": _LLAMA | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama-wide-heads": _LLAMA | {"head_dim": 10, "num_key_value_heads": 1, "eos_token_id": [2, 5]},
    "llama-rope-llama3": _LLAMA | {"head_dim": 16, "rope_theta": 500.0, "rope_scaling": _LLAMA3},
    "llama-rope-linear": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-rope-parameters": _LLAMA | {"rope_theta": None, "rope_parameters": _LLAMA3 | {"rope_theta": 700.0}},
    "mistral-window": _LLAMA | {"model_type": "mistral", "sliding_window": 5, "head_dim": 8},
    "mistral-no-window": _LLAMA | {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True},
    "gpt2-tied": _GPT2,
    "gpt2-untied": _GPT2 | {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"},
}
_CLASSIFIER = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": 0}
CLASSIFIERS = {
    name: CASES[name] | _CLASSIFIER | {"architectures": [f"{kind}ForSequenceClassification"]}
    for name, kind in {
        "llama-grouped-tied": "Llama",
        "llama-biases": "Llama",
        "mistral-window": "Mistral",
        "gpt2-tied": "GPT2",
        "gpt2-untied": "GPT2",
    }.items()
}
"""Reward models of the same sizes."""
_ROBERTA = {
    "architectures": ["RobertaForSequenceClassification"],
    "model_type": "roberta",
    "vocab_size": 101,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 52,
    "max_position_embeddings": 32,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
ENCODERS = {
    "roberta": _ROBERTA | {"id2label": {"0": "NEGATIVE", "1": "POSITIVE"}},
    "roberta-one-label": _ROBERTA | {"id2label": {"0": "reward"}, "problem_type": "regression", "pad_token_id": 3},
    "roberta-three-labels": _ROBERTA
    | {"id2label": {"0": "bad", "1": "so", "2": "good"}, "type_vocab_size": 2, "hidden_act": "gelu_new"},
}
"""Classifiers of texts; with one, two and three labels."""
TOKENS = np.random.RandomState(0).randint(0, 101, (2, 19)).astype(np.int32)  # longer than the window of 5
TEXT_TOKENS = np.random.RandomState(1).randint(4, 101, (4, 28)).astype(np.int32)
TEXT_LENGTHS = np.array([28, 1, 9, 17], np.int32)
"""Tokens of padded texts, none of them a padding id, and how many belong to each."""


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random float32 values; scales of norms are near 1."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    scale = name.endswith(("norm.weight", "LayerNorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
    return (0.2 * normal + scale).astype(np.float32)


def tensors(config: dict) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint with this `config.json`."""
    family = (families.FAMILIES | families.CLASSIFIERS)[config["model_type"]]
    shapes = families.table_shapes(family, family.from_hf(config))
    return {name: tensor(name, shape) for name, shape in shapes.items()}


def write_checkpoint(
    directory: pathlib.Path, config: dict, weights: dict[str, np.ndarray] | None = None
) -> pathlib.Path:
    """A Hugging Face directory with `config.json` and `model.safetensors`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors(config) if weights is None else weights, directory / "model.safetensors")
    return directory
