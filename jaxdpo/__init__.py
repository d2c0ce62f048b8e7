"""Direct Preference Optimization for JAX.

Public names are resolved when they are first used, so that `import jaxdpo.losses` pulls in jax and chex alone and the
command line starts without jax.
"""

import importlib
from typing import Any

_MODULES: dict[str, tuple[str, ...]] = {
    "jaxdpo.types": ("Batch", "InputError", "Preference", "check_batch"),
    "jaxdpo.config": ("DPOConfig", "ExportConfig", "QuickstartConfig"),
    "jaxdpo.losses": (
        "LOSSES",
        "LossSpec",
        "bradley_terry_loss",
        "dpo_loss",
        "implicit_rewards",
        "plackett_luce_dpo_loss",
        "plackett_luce_loss",
        "preference_metrics",
    ),
    "jaxdpo.sharding": ("batch_size_multiple", "make_mesh", "place_batch"),
    "jaxdpo.models": ("Decoder", "TransformerConfig", "abstract_params", "init_params", "make_decoder"),
    "jaxdpo.families": ("FAMILIES",),
    "jaxdpo.hub": ("HubUnreachable", "resolve_model"),
    "jaxdpo.hf": ("load_hf", "load_tokenizer", "save_hf"),
    "jaxdpo.data.sources": ("load_preferences",),
    "jaxdpo.data.tokenize": ("tokenize_dataset",),
    "jaxdpo.data.layout": ("choose_capacity",),
    "jaxdpo.data.pipeline": ("StepPlan", "all_batches", "first_epoch", "microbatches", "prefetched"),
    "jaxdpo.logprobs": ("sequence_logps", "token_logps"),
    "jaxdpo.reference": ("dataset_logps", "make_logp_program", "slot_logps"),
    "jaxdpo.train.optimizer": ("make_optimizer", "rmsprop", "warmup_schedule"),
    "jaxdpo.train.state": ("TrainState", "init_state"),
    "jaxdpo.train.step": ("Microbatch", "make_programs", "run_step"),
    "jaxdpo.train.dpo": ("run_dpo",),
    "jaxdpo.train.export": ("export_checkpoint",),
    "jaxdpo.train.quickstart": ("run_quickstart",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jaxdpo")  # 40 ms that most imports do not need
    if name not in _HOME:
        raise AttributeError(f"module 'jaxdpo' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
