"""Reading a Hugging Face `config.json`: what is required, what is refused, and the notation of rotary scaling."""

from collections.abc import Mapping
from typing import Any

from jaxdpo.models import Rope
from jaxdpo.types import InputError

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Hugging Face name -> `TransformerConfig.activation`."""

_ROPE_KEYS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_positions",
    },
}
"""Scaling type -> its keys there -> fields of `Rope`."""


_FIXES = {"quantization_config": "; name the model whose weights are not quantized"}
"""What to do about a key that is not supported, where that is known."""


def required(hf: Mapping[str, Any], key: str) -> Any:
    """The value of a key; InputError where it is not there."""
    if hf.get(key) is None:
        raise InputError(f"config.json lacks {key!r}; a {hf.get('model_type')} model needs it")
    return hf[key]


def refuse(hf: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """InputError where a key that changes the mathematics is there with a value that is not supported."""
    for key, values in allowed.items():
        if key in hf and hf[key] not in values:
            words = ("no such key" if value is None else repr(value) for value in values)
            raise InputError(
                f"config.json has {key} = {hf[key]!r:.80}, which changes what the model computes and is not supported; "
                f"allowed: {' or '.join(words)}{_FIXES.get(key, '')}"
            )


def activation(name: str) -> str:
    """`TransformerConfig.activation` of a Hugging Face name; InputError for an unknown one."""
    if name not in ACTIVATIONS:
        raise InputError(f"config.json has activation {name!r}; allowed: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def head_dim(embed: int, heads: int) -> int:
    """Features of each head where the heads share the embedding; InputError where it does not divide."""
    if heads < 1 or embed % heads:
        raise InputError(f"config.json has {heads} heads for {embed} features; allowed: a divisor of {embed}")
    return embed // heads


def head(hf: Mapping[str, Any]) -> str:
    """`TransformerConfig.head` by the class in `architectures`; InputError for a classifier of several labels."""
    names = hf.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return "lm"
    found = labels(hf)
    if len(found) != 1:
        raise InputError(
            f"config.json has {names[0]} with {len(found)} labels; allowed: 1, whose score is the reward; "
            f"train one with num_labels=1"
        )
    return "score"


def labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a classifier's labels, in order; `LABEL_0` and so on where there are none, as in transformers."""
    if not hf.get("id2label"):
        # transformers saves no labels where there are two, its default.
        return tuple(f"LABEL_{index}" for index in range(hf.get("num_labels") or 2))
    stated = {int(index): str(name) for index, name in hf["id2label"].items()}
    if sorted(stated) != list(range(len(stated))):
        raise InputError(f"config.json has id2label for {sorted(stated)}; allowed: for 0 to {len(stated) - 1}")
    return tuple(stated[index] for index in range(len(stated)))


def hf_labels(head: str) -> dict[str, Any]:
    """How `config.json` states the one label of a score head; "regression": pipelines then apply no sigmoid to it."""
    if head == "lm":
        return {}
    return {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "problem_type": "regression"}


def token_ids(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The special token ids as fields of `TransformerConfig`."""
    eos = hf.get("eos_token_id")
    return {
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        "pad_token_id": hf.get("pad_token_id"),
    }


def hf_token_ids(config: Any) -> dict[str, Any]:
    """The special token ids that are known, as `config.json` and `generation_config.json` state them."""
    eos = config.eos_token_id
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
    }
    return {key: value for key, value in ids.items() if value is not None}


def read_rope(hf: Mapping[str, Any]) -> Rope:
    """Rotary embedding from `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    stated = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise InputError(f"config.json has rope scaling {kind!r}; allowed: {', '.join(_ROPE_KEYS)}")
    keys = _ROPE_KEYS[kind]
    known = {*keys, "rope_type", "type", "rope_theta"}
    refuse(stated, {"partial_rotary_factor": (1.0, None)} | dict.fromkeys(set(stated) - known, (None,)))
    fields = {field: required(stated, key) for key, field in keys.items()}
    return Rope(theta=stated.get("rope_theta", hf.get("rope_theta")) or 10000.0, kind=kind, **fields)


def write_rope(rope: Rope | None) -> dict[str, Any]:
    """`rope_theta` with `rope_scaling`, which every release of transformers and vLLM reads, and `rope_parameters`."""
    if rope is None:
        return {}
    scaling = {"rope_type": rope.kind} | {key: getattr(rope, field) for key, field in _ROPE_KEYS[rope.kind].items()}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": scaling | {"rope_theta": rope.theta},
    }
