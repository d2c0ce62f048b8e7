"""How a policy learns from scores of its own completions, under TRL's names where TRL has one."""

import dataclasses

from jaxdpo.config.ranges import PATHS, RANGES
from jaxdpo.options import check_fields, option
from jaxdpo.types import InputError

KL_HORIZON = 10000
"""`kl_horizon`, unless it says otherwise: that of Ziegler et al. 2019."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOOptions:
    """What PPO is made of, besides model, reward and data."""

    kl_coef: float = option("strength of the KL penalty; the first one, if it follows a target", "ppo", 0.05)
    kl_target: float | None = option(
        "the KL penalty is adapted to this divergence of a completion, nats; by default it stays", "ppo", None
    )
    kl_horizon: int | None = option("completions over which the KL penalty is adapted; by default 10000", "ppo", None)
    num_ppo_epochs: int = option("times that the completions of a step are learnt from", "ppo", 4)
    num_mini_batches: int = option("optimizer updates of each such time", "ppo", 1)
    cliprange: float = option("how far from 1 a ratio of probabilities is followed", "ppo", 0.2)
    vf_coef: float = option("what the loss of the values counts", "ppo", 0.1)
    cliprange_value: float = option("how far from what it was a value is followed", "ppo", 0.2)
    gamma: float = option("discount of a later token's reward", "ppo", 1.0)
    lam: float = option("lambda of generalized advantages: 0 trusts the values, 1 the rewards", "ppo", 0.95)
    whiten_rewards: bool = option("scale the rewards of a step's tokens to variance 1", "ppo", False)
    whiten_advantages: bool = option("shift and scale the advantages of a step to mean 0 and variance 1", "ppo", True)
    missing_eos_penalty: float | None = option(
        "taken off the score of a completion that its length ended; by default nothing is", "ppo", None
    )

    def __post_init__(self) -> None:
        check_fields(self, RANGES, PATHS)
        if self.kl_horizon is not None and self.kl_target is None:
            raise InputError(
                f"--kl-horizon {self.kl_horizon} has no effect without --kl-target, as the penalty stays; allowed: "
                "both; give a target, or drop it"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise InputError(
                "--kl-target with --kl-coef 0, which no factor changes; allowed: a penalty above 0 to begin with, "
                "such as 0.05"
            )
