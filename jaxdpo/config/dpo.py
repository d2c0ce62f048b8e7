"""`jaxdpo dpo`."""

import dataclasses
import math
import typing

from jaxdpo.config.names import Divergence, Loss
from jaxdpo.config.run import RunConfig, numbers, split
from jaxdpo.options import nearest, option
from jaxdpo.types import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(RunConfig):
    """One DPO run: `jaxdpo dpo`. The defaults are the paper's (Rafailov et al. 2023, appendix B)."""

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
    precompute_ref_log_probs: bool = option(
        "the reference's log-probs once, before training, on disk for all runs; otherwise a second copy of the weights "
        "computes them at every step",
        "compute",
        True,
    )

    @property
    def objective(self) -> str:
        """What the run minimises, for people."""
        return f"{self.loss}, beta {self.beta:g}"

    @property
    def reference_at_every_step(self) -> bool:
        """Whether a reference's weights are held and evaluated at every step: it moves, or nothing is precomputed."""
        return self.ref_model_sync_steps is not None or not self.precompute_ref_log_probs

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of the objectives that `loss` lists."""
        return split(self.loss)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The numbers that `loss_weights` lists."""
        return None if self.loss_weights is None else numbers("loss_weights", self.loss_weights)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_losses(self)


def _check_losses(config: DPOConfig) -> None:
    """InputError for objectives and weights that are not what they should be."""
    names = typing.get_args(Loss)
    for name in config.losses:
        if name not in names:
            raise InputError(
                f"--loss {name!r} is unknown; did you mean {nearest(name, names)!r}? Allowed: {', '.join(names)}"
            )
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
