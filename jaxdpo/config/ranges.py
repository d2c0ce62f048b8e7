"""What every option allows, in words and as a test: one table, so that an option means the same in every command."""

import math
import re

from jaxdpo.options import Ranges

PATHS = ("model", "data", "eval_data", "output_dir", "checkpoint", "output", "json", "plot", "prompts")
"""Options in which `~` is the home directory."""
_ADDRESS = re.compile(r"(\[[\da-fA-F:.]+\]|[\w.-]+):(\d{1,5})", re.ASCII)


def is_address(text: str) -> bool:
    """Whether it is a host, or an IPv6 address in brackets, and a port."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and 0 < int(found[2]) < 65536


_POSITIVE = ("a whole number of at least 1", lambda v: v >= 1)
RANGES: Ranges = {
    "model": ("a directory, a hub id or pypi:NAME==VERSION", bool),
    "data": ("a file, directory, hf:NAME or tfds:NAME; several separated by commas", bool),
    "eval_data": ("as --data", bool),
    "output_dir": ("a directory", bool),
    "output": ("a file", bool),
    "json": ("a file", bool),
    "plot": ("a file", bool),
    "batch_size": _POSITIVE,
    "epochs": _POSITIVE,
    "max_steps": _POSITIVE,
    "save_every": _POSITIVE,
    "eval_every": _POSITIVE,
    "microbatch_tokens": _POSITIVE,
    "slices": _POSITIVE,
    "length": ("a whole number of at least 2: a prompt token and a completion token", lambda v: v >= 2),
    "prompt_tokens": _POSITIVE,
    "completion_tokens": _POSITIVE,
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
    "center_rewards_coefficient": ("a finite number of at least 0", lambda v: 0 <= v < math.inf),
    "kl_coef": ("a finite number of at least 0", lambda v: 0 <= v < math.inf),
    "kl_target": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "kl_horizon": _POSITIVE,
    "num_ppo_epochs": _POSITIVE,
    "num_mini_batches": _POSITIVE,
    "cliprange": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "vf_coef": ("a finite number of at least 0", lambda v: 0 <= v < math.inf),
    "cliprange_value": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "gamma": ("a number in [0, 1]", lambda v: 0 <= v <= 1),
    "lam": ("a number in [0, 1]", lambda v: 0 <= v <= 1),
    "missing_eos_penalty": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "coordinator": ("HOST:PORT with a port from 1 to 65535", lambda v: is_address(v)),
    "num_processes": _POSITIVE,
    "process_id": ("a whole number of at least 0", lambda v: v >= 0),
    "learning_rate": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "prompts": ("as --data", bool),
    "num_samples": _POSITIVE,
    "max_new_tokens": _POSITIVE,
    "temperature": ("a finite number of at least 0", lambda v: 0 <= v < math.inf),
    "top_k": _POSITIVE,
    "top_p": ("a number in (0, 1)", lambda v: 0 < v < 1),
    "min_p": ("a number in (0, 1]", lambda v: 0 < v <= 1),
    "max_grad_norm": ("a finite number of at least 0 (0: no clipping)", lambda v: 0 <= v < math.inf),
}
"""Option -> what it allows."""
