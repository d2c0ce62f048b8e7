"""RoBERTa as a sequence classifier: BERT's post-norm encoder, whose positions begin after the padding id.

References:
  Liu et al. 2019, https://arxiv.org/abs/1907.11692; Devlin et al. 2018, https://arxiv.org/abs/1810.04805 (BERT).
"""

from collections.abc import Mapping
from typing import Any

from jaxdpo.families import fields
from jaxdpo.families.table import EncoderFamily, Weight
from jaxdpo.models import EncoderConfig
from jaxdpo.types import InputError

_EMBEDDINGS = "roberta.embeddings."
_ATTENTION = "roberta.encoder.layer.{layer}.attention."
_LAYER = "roberta.encoder.layer.{layer}."

_FIXED = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "problem_type": ("single_label_classification", "regression", None),
    "quantization_config": (None,),
}


def from_hf(hf: Mapping[str, Any]) -> EncoderConfig:
    """`EncoderConfig` of a `config.json` with `model_type` roberta; InputError for what is not supported."""
    fields.refuse(hf, _FIXED)
    names = hf.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise InputError(
            f"config.json has architectures {names or None}; allowed: a RobertaForSequenceClassification; "
            f"a model without a classifier's head has nothing to say about a text"
        )
    labels = fields.labels(hf)
    if hf.get("problem_type") == "regression" and len(labels) > 1:
        raise InputError(f"config.json has a regression of {len(labels)} labels; allowed: of 1")
    heads, embed = fields.required(hf, "num_attention_heads"), fields.required(hf, "hidden_size")
    first = hf.get("pad_token_id", 1) + 1
    return EncoderConfig(
        model_type="roberta",
        vocab_size=fields.required(hf, "vocab_size"),
        embed_dim=embed,
        num_layers=fields.required(hf, "num_hidden_layers"),
        num_heads=heads,
        head_dim=fields.head_dim(embed, heads),
        mlp_dim=fields.required(hf, "intermediate_size"),
        max_positions=fields.required(hf, "max_position_embeddings") - first,
        position_offset=first,
        token_types=hf.get("type_vocab_size", 2),
        labels=labels,
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        activation=fields.activation(hf.get("hidden_act", "gelu")),
    )


def weights(config: EncoderConfig) -> tuple[Weight, ...]:
    """The table; PyTorch's linear layers are stored `[out, in]`."""
    return (
        Weight(_EMBEDDINGS + "word_embeddings.weight", "tokens", "words embed"),
        Weight(_EMBEDDINGS + "position_embeddings.weight", "positions", "positions embed"),
        Weight(_EMBEDDINGS + "token_type_embeddings.weight", "token_types", "token_types embed"),
        Weight(_EMBEDDINGS + "LayerNorm.weight", "embedding_norm/scale", "embed"),
        Weight(_EMBEDDINGS + "LayerNorm.bias", "embedding_norm/bias", "embed"),
        *_projection("query", "q", "heads"),
        *_projection("key", "k", "kv_heads"),
        *_projection("value", "v", "kv_heads"),
        Weight(
            _ATTENTION + "output.dense.weight",
            "blocks/attention/o/kernel",
            "embed (heads head_dim) -> heads head_dim embed",
        ),
        Weight(_ATTENTION + "output.dense.bias", "blocks/attention/o/bias", "embed"),
        Weight(_ATTENTION + "output.LayerNorm.weight", "blocks/attention_norm/scale", "embed"),
        Weight(_ATTENTION + "output.LayerNorm.bias", "blocks/attention_norm/bias", "embed"),
        Weight(_LAYER + "intermediate.dense.weight", "blocks/mlp/up/kernel", "mlp embed -> embed mlp"),
        Weight(_LAYER + "intermediate.dense.bias", "blocks/mlp/up/bias", "mlp"),
        Weight(_LAYER + "output.dense.weight", "blocks/mlp/down/kernel", "embed mlp -> mlp embed"),
        Weight(_LAYER + "output.dense.bias", "blocks/mlp/down/bias", "embed"),
        Weight(_LAYER + "output.LayerNorm.weight", "blocks/mlp_norm/scale", "embed"),
        Weight(_LAYER + "output.LayerNorm.bias", "blocks/mlp_norm/bias", "embed"),
        Weight("classifier.dense.weight", "pooler/kernel", "pooled embed -> embed pooled"),
        Weight("classifier.dense.bias", "pooler/bias", "pooled"),
        Weight("classifier.out_proj.weight", "labels/kernel", "labels pooled -> pooled labels"),
        Weight("classifier.out_proj.bias", "labels/bias", "labels"),
    )


def _projection(name: str, ours: str, heads: str) -> tuple[Weight, Weight]:
    return (
        Weight(
            _ATTENTION + f"self.{name}.weight",
            f"blocks/attention/{ours}/kernel",
            f"({heads} head_dim) embed -> embed {heads} head_dim",
        ),
        Weight(
            _ATTENTION + f"self.{name}.bias",
            f"blocks/attention/{ours}/bias",
            f"({heads} head_dim) -> {heads} head_dim",
        ),
    )


ROBERTA = EncoderFamily(
    from_hf,
    weights,
    prefix="roberta.",
    ignored=(r"(roberta\.)?embeddings\.position_ids", r"(roberta\.)?pooler\.dense\.(weight|bias)"),  # a count; BERT's
)
