"""GPT-2: learned positions, LayerNorm, biases everywhere, and linear layers stored `[in, out]` ("Conv1D").

References:
  Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
"""

from collections.abc import Mapping
from typing import Any

from jaxdpo.families import fields
from jaxdpo.families.table import Family, Weight, head_weights
from jaxdpo.models import TransformerConfig

_BLOCK = "transformer.h.{layer}."
_QKV = ("q", "k", "v")

_FIXED = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),  # reorders float operations under mixed precision
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}


def from_hf(hf: Mapping[str, Any]) -> TransformerConfig:
    """`TransformerConfig` of a `config.json` with `model_type` gpt2; InputError for what is not supported."""
    fields.refuse(hf, _FIXED)
    heads, embed = fields.required(hf, "n_head"), fields.required(hf, "n_embd")
    return TransformerConfig(
        model_type="gpt2",
        vocab_size=fields.required(hf, "vocab_size"),
        embed_dim=embed,
        num_layers=fields.required(hf, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.head_dim(embed, heads),
        mlp_dim=hf.get("n_inner") or 4 * embed,
        max_positions=fields.required(hf, "n_positions"),
        norm="layernorm",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        activation=fields.activation(hf.get("activation_function", "gelu_new")),
        gated_mlp=False,
        attention_bias=True,
        mlp_bias=True,
        rope=None,
        head=fields.head(hf),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        init_std=hf.get("initializer_range", 0.02),
        **fields.token_ids(hf),
    )


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """`config.json` of a configuration; the inverse of `from_hf`."""
    names = {"gelu_tanh": "gelu_new"}
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": names.get(config.activation, config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        **fields.hf_token_ids(config),
    }


def weights(config: TransformerConfig) -> tuple[Weight, ...]:
    """The table; `c_attn` holds q, k and v side by side."""
    return (
        Weight("transformer.wte.weight", "tokens", "vocab embed"),
        Weight("transformer.wpe.weight", "positions", "positions embed"),
        Weight(_BLOCK + "ln_1.weight", "blocks/attention_norm/scale", "embed"),
        Weight(_BLOCK + "ln_1.bias", "blocks/attention_norm/bias", "embed"),
        Weight(
            _BLOCK + "attn.c_attn.weight",
            "blocks/attention/{part}/kernel",
            "embed (part heads head_dim) -> embed heads head_dim",
            _QKV,
        ),
        Weight(
            _BLOCK + "attn.c_attn.bias",
            "blocks/attention/{part}/bias",
            "(part heads head_dim) -> heads head_dim",
            _QKV,
        ),
        Weight(
            _BLOCK + "attn.c_proj.weight", "blocks/attention/o/kernel", "(heads head_dim) embed -> heads head_dim embed"
        ),
        Weight(_BLOCK + "attn.c_proj.bias", "blocks/attention/o/bias", "embed"),
        Weight(_BLOCK + "ln_2.weight", "blocks/mlp_norm/scale", "embed"),
        Weight(_BLOCK + "ln_2.bias", "blocks/mlp_norm/bias", "embed"),
        Weight(_BLOCK + "mlp.c_fc.weight", "blocks/mlp/up/kernel", "embed mlp"),
        Weight(_BLOCK + "mlp.c_fc.bias", "blocks/mlp/up/bias", "mlp"),
        Weight(_BLOCK + "mlp.c_proj.weight", "blocks/mlp/down/kernel", "mlp embed"),
        Weight(_BLOCK + "mlp.c_proj.bias", "blocks/mlp/down/bias", "embed"),
        Weight("transformer.ln_f.weight", "final_norm/scale", "embed"),
        Weight("transformer.ln_f.bias", "final_norm/bias", "embed"),
        *head_weights(config),
    )


GPT2 = Family(
    {"lm": "GPT2LMHeadModel", "score": "GPT2ForSequenceClassification"},
    from_hf,
    to_hf,
    weights,
    prefix="transformer.",
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),  # causal masks; an LM head
)
