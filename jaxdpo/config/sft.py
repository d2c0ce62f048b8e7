"""`jaxdpo sft` and `jaxdpo reward`."""

import dataclasses

from jaxdpo.config.names import Optimizer
from jaxdpo.config.run import RunConfig
from jaxdpo.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Supervised fine-tuning; on preference data it imitates the best completions, the paper's Preferred-FT."""

    completion_only_loss: bool = option("learn completions only; otherwise their prompts too", "objective", True)
    optimizer: Optimizer = option("adamw, or rmsprop (torch's semantics)", "optimization", "adamw")
    learning_rate: float = option("after the warm-up, constant", "optimization", 2e-5)
    warmup_steps: int = option("linear warm-up: lr * min(1, (n + 1) / (W + 1))", "optimization", 20)
    max_grad_norm: float = option("clip the global gradient norm (0: off)", "optimization", 1.0)

    @property
    def objective(self) -> str:
        """What the run minimises, for people."""
        return "sft"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(RunConfig):
    """A reward model: Bradley-Terry on pairs, Plackett-Luce on rankings; the most accurate checkpoint is kept."""

    center_rewards_coefficient: float | None = option(
        "pulls the two rewards of a pair towards sum 0, such as 0.01; by default 0", "objective", None
    )
    optimizer: Optimizer = option("adamw, or rmsprop (torch's semantics)", "optimization", "adamw")
    learning_rate: float = option("after the warm-up, constant", "optimization", 1e-5)
    warmup_steps: int = option("linear warm-up: lr * min(1, (n + 1) / (W + 1))", "optimization", 20)
    max_grad_norm: float = option("clip the global gradient norm (0: off)", "optimization", 1.0)
    eval_every: int | None = option(
        "steps between evaluations; by default as often as checkpoints are saved", "run", None
    )

    @property
    def objective(self) -> str:
        """What the run minimises, for people."""
        return "reward model"
