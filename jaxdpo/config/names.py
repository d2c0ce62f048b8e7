"""The names that plug-in tables offer, again, because `jaxdpo --help` imports no jax; a test keeps them equal."""

from typing import Literal

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
Format = Literal["auto", "pairs", "implicit", "hh", "ranked", "unpaired", "completion", "text", "messages"]
Optimizer = Literal["rmsprop", "adamw"]
DType = Literal["float32", "bfloat16"]
Attention = Literal["dense", "blockwise", "splash"]
Remat = Literal["none", "projections", "attention", "full"]
Resume = Literal["auto", "never", "must"]
Logger = Literal["tensorboard", "wandb", "trackio"]
