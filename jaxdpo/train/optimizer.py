"""The paper's optimizer: RMSprop with torch's semantics and a linear warm-up whose first step already moves."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from jaxdpo.config import RunConfig

Schedule = Callable[[Any], Any]


def warmup_schedule(learning_rate: float, warmup_steps: int) -> Schedule:
    """Learning rate of update `n` (0-based): `learning_rate * min(1, (n + 1) / (warmup_steps + 1))`.

    `optax.linear_schedule` starts at 0 and so wastes its first update; this is the schedule of the paper's code
    (https://github.com/eric-mitchell/direct-preference-optimization).

    Example:
      >>> schedule = warmup_schedule(1e-6, 150)
      >>> print(f"{schedule(0):.2e} {schedule(149):.2e} {schedule(150):.2e} {schedule(9999):.2e}")
      6.62e-09 9.93e-07 1.00e-06 1.00e-06
    """
    return lambda n: learning_rate * jnp.minimum(1.0, (n + 1) / (warmup_steps + 1))


def rmsprop(schedule: Schedule) -> optax.GradientTransformation:
    """`torch.optim.RMSprop(alpha=0.99, eps=1e-8)`: epsilon outside the root, no bias correction."""
    return optax.rmsprop(schedule, decay=0.99, eps=1e-8, eps_in_sqrt=False)


def adamw(schedule: Schedule) -> optax.GradientTransformation:
    """AdamW as TRL's trainers set it: betas (0.9, 0.999), epsilon 1e-8, no weight decay."""
    return optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)


OPTIMIZERS: dict[str, Callable[[Schedule], optax.GradientTransformation]] = {"rmsprop": rmsprop, "adamw": adamw}


def make_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """The configured optimizer: clipping by global norm first (unless `max_grad_norm` is 0), then the update rule."""
    update = OPTIMIZERS[config.optimizer](warmup_schedule(config.learning_rate, config.warmup_steps))
    if config.max_grad_norm == 0:
        return update
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), update)
