"""What a Transformer is, decoder or encoder: every fact that changes its mathematics, in one frozen dataclass."""

import dataclasses
from typing import ClassVar

from jaxdpo.types import InputError

NORMS = ("rmsnorm", "layernorm")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ROPE_KINDS = ("default", "linear", "llama3")
HEADS = ("lm", "score")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding, and how its frequencies are stretched for a longer context.

    Attributes:
      theta: base of the wavelengths, in positions.
      kind: "default" (no scaling), "linear" (all wavelengths times `factor`) or "llama3" (long ones only).
      factor: how many times longer the wavelengths become.
      low_freq_factor, high_freq_factor: llama3; wavelengths above `original_positions / low_freq_factor` are stretched,
        those below `original_positions / high_freq_factor` are kept, the ones between are blended.
      original_positions: llama3; context length of the pretraining that came before the stretch.
    References:
      Su et al. 2021, https://arxiv.org/abs/2104.09864; Chen et al. 2023, https://arxiv.org/abs/2306.15595 (linear);
      Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783 (llama3).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        _one_of("rope kind", self.kind, ROPE_KINDS)
        _at_least("original_positions", self.original_positions, 1)
        for name in ("theta", "factor", "low_freq_factor"):
            if not getattr(self, name) > 0:
                raise InputError(f"rope {name} is {getattr(self, name)!r}; allowed: a number above 0")
        if not self.high_freq_factor > self.low_freq_factor:
            raise InputError(
                f"rope high_freq_factor is {self.high_freq_factor!r}; allowed: above low_freq_factor, "
                f"{self.low_freq_factor!r}"
            )


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A pre-norm decoder-only Transformer. Sizes are counts; the defaults are Llama's.

    Attributes:
      model_type: the Hugging Face `model_type` that it is read from and written as; a key of `families.FAMILIES`.
      max_positions: longest path (prompt plus one completion) in tokens.
      norm: "rmsnorm" or "layernorm".
      activation: "silu", "relu", "gelu" or "gelu_tanh"; "gelu_tanh" is the tanh approximation, "gelu" the exact one.
      gated_mlp: `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
      attention_bias: q, k, v and output projections have biases.
      rope: rotary embedding; None for a learned embedding of each position.
      sliding_window: a token sees this many positions, itself included; None for all before it.
      head: "lm" for logits of the next token, "score" for one number of a text: a reward model.
      tie_embeddings: the LM head is the token embedding; with a score head it says nothing.
      init_std: standard deviation of freshly initialised matrices.
      bos_token_id, eos_token_id: carried from import to export; not used by the model.
      pad_token_id: the same; but a score head passes it over at the end of a text, as Hugging Face's does.
    Raises:
      InputError: for a value out of range, or sizes that do not fit together.
    """

    model_type: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    activation: str = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: Rope | None = dataclasses.field(default_factory=Rope)
    sliding_window: int | None = None
    head: str = "lm"
    tie_embeddings: bool = False
    init_std: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, size in self.axis_sizes.items():
            _at_least(name, size, 1)
        _one_of("norm", self.norm, NORMS)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("head", self.head, HEADS)
        if not self.norm_eps > 0:
            raise InputError(f"norm_eps is {self.norm_eps!r}; allowed: a number above 0")
        if self.sliding_window is not None:
            _at_least("sliding_window", self.sliding_window, 1)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads is {self.num_heads} with num_kv_heads {self.num_kv_heads}; "
                f"allowed: a multiple of it, as each key/value head serves equally many query heads"
            )
        if self.rope is not None and self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim} with rope; allowed: even, as rope turns pairs of features")

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of every logical axis that a parameter can have."""
        return {
            "vocab": self.vocab_size,
            "embed": self.embed_dim,
            "layers": self.num_layers,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "mlp": self.mlp_dim,
            "positions": self.max_positions,
        }


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A post-norm encoder with a classifier's head, as BERT and RoBERTa are. Sizes are counts.

    Attributes:
      model_type: the Hugging Face `model_type` that it is read from; a key of `families.CLASSIFIERS`.
      max_positions: longest text in tokens.
      position_offset: rows of the position embedding before the first token's.
      token_types: rows of the token type embedding; every token is of type 0.
      activation: as in `TransformerConfig`.
      labels: names of the classes, in the order of the logits.
    Raises:
      InputError: for a value out of range.
    """

    model_type: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int
    position_offset: int
    token_types: int
    labels: tuple[str, ...]
    norm_eps: float
    activation: str

    # What `models.layers` asks of a configuration and an encoder has no choice of.
    norm: ClassVar[str] = "layernorm"
    gated_mlp: ClassVar[bool] = False
    attention_bias: ClassVar[bool] = True
    mlp_bias: ClassVar[bool] = True
    init_std: ClassVar[float] = 0.02

    def __post_init__(self) -> None:
        _at_least("position_offset", self.position_offset, 0)
        _at_least("max_positions", self.max_positions, 1)
        for name, size in self.axis_sizes.items():
            _at_least(name, size, 1)
        _one_of("activation", self.activation, ACTIVATIONS)
        if not self.norm_eps > 0:
            raise InputError(f"norm_eps is {self.norm_eps!r}; allowed: a number above 0")
        if len(set(self.labels)) < len(self.labels):
            raise InputError(f"labels are {self.labels}; allowed: a name of its own for each")

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of every logical axis that a parameter can have."""
        return {
            "words": self.vocab_size,
            "embed": self.embed_dim,
            "layers": self.num_layers,
            "heads": self.num_heads,
            "kv_heads": self.num_heads,
            "head_dim": self.head_dim,
            "mlp": self.mlp_dim,
            "positions": self.position_offset + self.max_positions,
            "token_types": self.token_types,
            "pooled": self.embed_dim,
            "labels": len(self.labels),
        }


ModelConfig = TransformerConfig | EncoderConfig


def _at_least(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InputError(f"{name} is {value!r}; allowed: a whole number of at least {low}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
