"""Models by name whose shape is known, so that planning for them needs no weights and no network.

Each is the part of its published `config.json` that says what is computed, and is read as such a file is: one whose
family is not supported is refused by that.
"""

from typing import Any, NamedTuple

from jaxdpo.families import FAMILIES
from jaxdpo.models import TransformerConfig
from jaxdpo.types import InputError


class KnownShape(NamedTuple):
    """A published configuration."""

    source: str
    """The hub id whose `config.json` it is."""
    config: dict[str, Any]
    """Its contents."""


def _llama(hidden: int, layers: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": mlp,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


def _pythia(hidden: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 2048,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    }


def _qwen3(hidden: int, layers: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": mlp,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    }


SHAPES: dict[str, KnownShape] = {
    "smollm2-135m": KnownShape(
        "HuggingFaceTB/SmolLM2-135M",
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
        },
    ),
    "pythia-2.8b": KnownShape("EleutherAI/pythia-2.8b", _pythia(2560, 32, 32, 50304)),
    "pythia-6.9b": KnownShape("EleutherAI/pythia-6.9b", _pythia(4096, 32, 32, 50432)),
    "gpt-j-6b": KnownShape(
        "EleutherAI/gpt-j-6b",
        {
            "model_type": "gptj",
            "vocab_size": 50400,
            "n_embd": 4096,
            "n_layer": 28,
            "n_head": 16,
            "n_positions": 2048,
            "rotary_dim": 64,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
    "llama-3.1-8b": KnownShape("meta-llama/Llama-3.1-8B", _llama(4096, 32, 32, 14336)),
    "llama-3.1-70b": KnownShape("meta-llama/Llama-3.1-70B", _llama(8192, 80, 64, 28672)),
    "qwen3-8b": KnownShape("Qwen/Qwen3-8B", _qwen3(4096, 36, 32, 12288)),
    "qwen3-32b": KnownShape("Qwen/Qwen3-32B", _qwen3(5120, 64, 64, 25600)),
}
"""By the name that `--model` takes."""


def known_config(name: str) -> TransformerConfig:
    """What a known model computes.

    Raises:
      InputError: if its family is not supported; names the known models whose family is.
    """
    config = SHAPES[name].config
    family = FAMILIES.get(config["model_type"])
    if family is None:
        supported = [other for other, shape in SHAPES.items() if shape.config["model_type"] in FAMILIES]
        raise InputError(
            f"--model {name} is of the family {config['model_type']}, which is not supported yet; allowed: "
            f"{', '.join(supported)}; or any model of the families {', '.join(FAMILIES)}"
        )
    return family.from_hf(config)
