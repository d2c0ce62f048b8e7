"""Direct Preference Optimization for JAX.

Public names are resolved when they are first used, so that `import jaxdpo.losses` pulls in jax and chex alone and the
command line starts without jax.
"""

import importlib
from typing import Any

_MODULES: dict[str, tuple[str, ...]] = {
    "jaxdpo.types": ("Batch", "InputError", "Origin", "Preference", "check_batch"),
    "jaxdpo.config": (
        "AuditConfig",
        "ConvertConfig",
        "DPOConfig",
        "ExportConfig",
        "GenerateConfig",
        "PPOOptions",
        "QuickstartConfig",
        "RewardConfig",
        "SFTConfig",
        "SamplingConfig",
        "ScoreConfig",
    ),
    "jaxdpo.losses": (
        "LossSpec",
        "RunningMean",
        "alpha_divergence",
        "alphapo_loss",
        "aot_loss",
        "aot_unpaired_loss",
        "apo_down_loss",
        "apo_zero_loss",
        "bco_loss",
        "bco_pair_loss",
        "bco_running",
        "bradley_terry_loss",
        "combine",
        "cpo_loss",
        "discopop_loss",
        "dpo_loss",
        "entropy",
        "exo_loss",
        "forward_kl",
        "generalized_advantages",
        "hinge_loss",
        "implicit_rewards",
        "ipo_loss",
        "js_divergence",
        "kl_k1",
        "kl_k2",
        "kl_k3",
        "kto_loss",
        "length_desensitized_logps",
        "mean_metrics",
        "nca_loss",
        "next_kl_coef",
        "orpo_loss",
        "over_all_pairs",
        "plackett_luce_dpo_loss",
        "plackett_luce_loss",
        "ppo_policy_loss",
        "ppo_value_loss",
        "preference_metrics",
        "reverse_kl",
        "reward_metrics",
        "robust_dpo_loss",
        "sft_loss",
        "sigmoid_norm_loss",
        "simpo_loss",
        "sppo_hard_loss",
        "token_rewards",
        "unlikelihood_loss",
        "unpaired_metrics",
        "update_running_mean",
        "weighted_by_policy",
        "whiten",
        "with_divergence",
        "wpo_weights",
    ),
    "jaxdpo.losses.divergences": ("DIVERGENCES",),
    "jaxdpo.losses.policy_gradient": ("KL_ESTIMATORS",),
    "jaxdpo.losses.table": ("LOSSES", "REWARD_LOSSES"),
    "jaxdpo.theory": (
        "dpo_gradient",
        "dpo_gradient_weight",
        "equivalent_rewards",
        "kl_constrained_objective",
        "log_partition_function",
        "optimal_policy",
        "project_reward",
        "reward_of_policy",
        "von_neumann_winner",
    ),
    "jaxdpo.sharding": ("batch_size_multiple", "make_mesh", "place_batch"),
    "jaxdpo.models": ("Decoder", "TransformerConfig", "abstract_params", "init_params", "make_decoder"),
    "jaxdpo.families": ("CLASSIFIERS", "FAMILIES"),
    "jaxdpo.hub": ("HubUnreachable", "resolve_model"),
    "jaxdpo.hf": ("load_hf", "load_reward_model", "load_tokenizer", "save_hf"),
    "jaxdpo.data.load": ("Loaded", "load_dataset"),
    "jaxdpo.data.reading": ("read_preferences",),
    "jaxdpo.data.prompts": ("Prompt", "read_prompts"),
    "jaxdpo.data.sources": ("open_sources",),
    "jaxdpo.data.records": ("Source",),
    "jaxdpo.data.tfds": ("build_tfds",),
    "jaxdpo.data.chat": ("Renderer",),
    "jaxdpo.data.audit": ("Audit",),
    "jaxdpo.data.tokenize": ("tokenize_dataset",),
    "jaxdpo.data.partners": ("with_partners",),
    "jaxdpo.data.layout": ("choose_capacity",),
    "jaxdpo.data.plan": ("StepPlan",),
    "jaxdpo.data.pipeline": ("all_batches", "first_epoch", "microbatches", "prefetched"),
    "jaxdpo.logprobs": ("sequence_logps", "token_logps"),
    "jaxdpo.rewards": ("candidate_rewards", "center_rewards", "dataset_rewards", "make_reward_program"),
    "jaxdpo.classifier": ("LABEL_SCORES", "Classifier", "load_classifier"),
    "jaxdpo.reference": ("TokenLogps", "dataset_logps", "make_logp_program", "slot_logps"),
    "jaxdpo.train.optimizer": ("make_optimizer", "rmsprop", "warmup_schedule"),
    "jaxdpo.train.state": ("PPOState", "TrainState", "init_state", "move_reference"),
    "jaxdpo.train.objective": ("imitation_task", "preference_task", "reward_task", "step_counts"),
    "jaxdpo.train.step": ("Microbatch", "make_programs", "run_step"),
    "jaxdpo.train.ppo": ("ppo_step",),
    "jaxdpo.train.ppo_programs": ("PPOPrograms", "init_ppo_state", "make_ppo_programs"),
    "jaxdpo.train.rollout": ("Experience", "gather_experience", "rollout_groups", "rollout_layout"),
    "jaxdpo.evaluate.best_of_n": ("best_of_n", "best_of_n_kl"),
    "jaxdpo.evaluate.frontier": ("Gap", "Hull", "compare_frontiers", "frontier_hull", "mean_gap"),
    "jaxdpo.evaluate.reward_function": ("load_reward_function", "rewards_of"),
    "jaxdpo.train.dpo": ("run_dpo",),
    "jaxdpo.train.sft": ("run_sft",),
    "jaxdpo.train.reward": ("run_reward",),
    "jaxdpo.train.score": ("score",),
    "jaxdpo.generate.sampler": ("Completion", "Sampler", "make_sampler", "sample"),
    "jaxdpo.generate.stops": ("Stops",),
    "jaxdpo.generate.run": ("run_generate",),
    "jaxdpo.audit": ("run_audit",),
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
