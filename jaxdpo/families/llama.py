"""Llama 2 and 3, and everything of that shape (SmolLM2, TinyLlama); Mistral with its sliding window.

References:
  Touvron et al. 2023, https://arxiv.org/abs/2307.09288; Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783;
  Jiang et al. 2023, https://arxiv.org/abs/2310.06825 (Mistral).
"""

from collections.abc import Mapping
from typing import Any

from jaxdpo.families import fields
from jaxdpo.families.table import Family, Weight, head_weights
from jaxdpo.models import TransformerConfig

_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."

_ATTENTION_BIASES = (
    Weight(_ATTENTION + "q_proj.bias", "blocks/attention/q/bias", "(heads head_dim) -> heads head_dim"),
    Weight(_ATTENTION + "k_proj.bias", "blocks/attention/k/bias", "(kv_heads head_dim) -> kv_heads head_dim"),
    Weight(_ATTENTION + "v_proj.bias", "blocks/attention/v/bias", "(kv_heads head_dim) -> kv_heads head_dim"),
    Weight(_ATTENTION + "o_proj.bias", "blocks/attention/o/bias", "embed"),
)
_MLP_BIASES = (
    Weight(_MLP + "gate_proj.bias", "blocks/mlp/gate/bias", "mlp"),
    Weight(_MLP + "up_proj.bias", "blocks/mlp/up/bias", "mlp"),
    Weight(_MLP + "down_proj.bias", "blocks/mlp/down/bias", "embed"),
)

# What transformers assumes where a key is missing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
}
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"pretraining_tp": (1, None), "sliding_window": (None,)},
    "mistral": {"attention_bias": (False, None), "mlp_bias": (False, None)},
}


def from_hf(hf: Mapping[str, Any]) -> TransformerConfig:
    """`TransformerConfig` of a llama or mistral `config.json`; InputError for what is not supported."""
    model_type = hf["model_type"]
    refuse = {**_FIXED[model_type], "quantization_config": (None,), "partial_rotary_factor": (1.0, None)}
    fields.refuse(hf, refuse)
    hf = _DEFAULTS[model_type] | dict(hf)
    heads, embed = fields.required(hf, "num_attention_heads"), fields.required(hf, "hidden_size")
    return TransformerConfig(
        model_type=model_type,
        vocab_size=fields.required(hf, "vocab_size"),
        embed_dim=embed,
        num_layers=fields.required(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or fields.head_dim(embed, heads),
        mlp_dim=fields.required(hf, "intermediate_size"),
        max_positions=hf["max_position_embeddings"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=fields.activation(hf.get("hidden_act", "silu")),
        attention_bias=bool(hf.get("attention_bias", False)),
        mlp_bias=bool(hf.get("mlp_bias", False)),
        rope=fields.read_rope(hf),
        sliding_window=hf["sliding_window"],
        head=fields.head(hf),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        init_std=hf.get("initializer_range", 0.02),
        **fields.token_ids(hf),
    )


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """`config.json` of a configuration; the inverse of `from_hf`."""
    names = {"gelu_tanh": "gelu_pytorch_tanh"}
    hf = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": names.get(config.activation, config.activation),
        **fields.write_rope(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        **fields.hf_token_ids(config),
    }
    if config.model_type == "mistral":
        return hf | {"sliding_window": config.sliding_window}
    return hf | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def weights(config: TransformerConfig) -> tuple[Weight, ...]:
    """The table; PyTorch's linear layers are stored `[out, in]`."""
    return (
        Weight("model.embed_tokens.weight", "tokens", "vocab embed"),
        Weight("model.layers.{layer}.input_layernorm.weight", "blocks/attention_norm/scale", "embed"),
        Weight(
            _ATTENTION + "q_proj.weight", "blocks/attention/q/kernel", "(heads head_dim) embed -> embed heads head_dim"
        ),
        Weight(
            _ATTENTION + "k_proj.weight",
            "blocks/attention/k/kernel",
            "(kv_heads head_dim) embed -> embed kv_heads head_dim",
        ),
        Weight(
            _ATTENTION + "v_proj.weight",
            "blocks/attention/v/kernel",
            "(kv_heads head_dim) embed -> embed kv_heads head_dim",
        ),
        Weight(
            _ATTENTION + "o_proj.weight", "blocks/attention/o/kernel", "embed (heads head_dim) -> heads head_dim embed"
        ),
        *(_ATTENTION_BIASES if config.attention_bias else ()),
        Weight("model.layers.{layer}.post_attention_layernorm.weight", "blocks/mlp_norm/scale", "embed"),
        Weight(_MLP + "gate_proj.weight", "blocks/mlp/gate/kernel", "mlp embed -> embed mlp"),
        Weight(_MLP + "up_proj.weight", "blocks/mlp/up/kernel", "mlp embed -> embed mlp"),
        Weight(_MLP + "down_proj.weight", "blocks/mlp/down/kernel", "embed mlp -> mlp embed"),
        *(_MLP_BIASES if config.mlp_bias else ()),
        Weight("model.norm.weight", "final_norm/scale", "embed"),
        *head_weights(config),
    )


_IGNORED = (r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight")


def _family(name: str) -> Family:
    architectures = {"lm": f"{name}ForCausalLM", "score": f"{name}ForSequenceClassification"}
    return Family(architectures, from_hf, to_hf, weights, prefix="model.", ignored=_IGNORED)


LLAMA, MISTRAL = _family("Llama"), _family("Mistral")
