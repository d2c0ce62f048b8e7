"""Draws every loss of `LOSSES`, and the weights of its gradient, against the reward margin: the pictures of losses.md.

    python docs/loss_curves.py

writes `docs/images/losses_with_reference.png` and `docs/images/losses_without_reference.png` in half a minute. A new
row of `LOSSES` is drawn by being there.

What is held fixed: `beta` is 1 and completions have one token, so a reward is a log-ratio (without a reference, a
log-probability), summed or per token. The other options have their defaults. The chosen reward is half the margin above
a midpoint, the rejected one half below it; the midpoint is 0, and -2.5 nats where there is no reference, since a
log-probability is negative. A loss of rankings has a third completion, between them, at the midpoint. A loss that sorts
its step gets two more pairs, with margins of -2 and 2 under policy and reference, and what is drawn is the sum over the
step. A completion that is judged alone has a baseline of 0.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxdpo.losses import LOSSES, LossSpec
from jaxdpo.plots import LossCurve, save_loss_curves

IMAGES = Path(__file__).parent / "images"
MIDPOINT = -2.5
"""Log-probability, nats, between chosen and rejected where there is no reference."""
FIXED_MARGIN = 2.0
"""Of the other pairs of a step that is sorted."""
MARGINS = jnp.linspace(-4, 4, 801)


def curve(spec: LossSpec) -> LossCurve:
    """A loss and the weights of its gradient over `MARGINS`."""
    return _judged(spec) if "label" in spec.data else _compared(spec)


def _compared(spec: LossSpec) -> LossCurve:
    """Of chosen against rejected."""
    midpoint = 0.0 if spec.needs_reference else MIDPOINT
    between = jnp.full("ranks" in spec.data, midpoint)  # [1] or [0], a third completion
    others = jnp.array([[-FIXED_MARGIN / 2, FIXED_MARGIN / 2], [FIXED_MARGIN / 2, -FIXED_MARGIN / 2]])

    def step_loss(pair: jax.Array) -> jax.Array:
        """The sum of the losses of a step that holds this pair, `[2]` chosen and rejected."""
        group = jnp.concatenate([pair[:1], between, pair[1:]])[None]  # [1, candidates]
        rest = others if spec.coupling == "sort" else jnp.zeros((0, group.shape[1]))
        reference = jnp.concatenate([jnp.zeros_like(group), rest])
        return _call(spec, jnp.concatenate([group, rest]), reference).sum()

    pairs = midpoint + jnp.stack([MARGINS, -MARGINS], axis=-1) / 2  # [margins, 2]
    losses, slopes = jax.jit(jax.vmap(jax.value_and_grad(step_loss)))(pairs)
    weights = {"chosen": (-slopes[:, 0]).tolist(), "rejected": slopes[:, 1].tolist()}
    return LossCurve("reward margin (nats)", MARGINS.tolist(), {"": losses.tolist()}, weights)


def _judged(spec: LossSpec) -> LossCurve:
    """Of one completion, labelled good or bad."""
    losses, weights = {}, {}
    for side, label, sign in (("chosen", True, -1), ("rejected", False, 1)):

        def loss(reward: jax.Array, label: bool = label) -> jax.Array:
            group = jnp.zeros((1, spec.candidates)).at[0, 0].set(reward)
            baseline = {} if spec.running is None else {"baseline": 0.0}
            return _call(spec, group, jnp.zeros_like(group), label=jnp.array([label]), **baseline).sum()

        values, slopes = jax.jit(jax.vmap(jax.value_and_grad(loss)))(MARGINS)
        losses[side], weights[side] = values.tolist(), (sign * slopes).tolist()
    return LossCurve("reward above baseline (nats)", MARGINS.tolist(), losses, weights)


def _call(spec: LossSpec, policy_logps: jax.Array, ref_logps: jax.Array, **keywords: object) -> jax.Array:
    lengths = {"lengths": jnp.ones_like(policy_logps)} if "lengths" in spec.data else {}
    beta = {"beta": 1.0} if "beta" in spec.options else {}
    return spec.fn(policy_logps, ref_logps if spec.needs_reference else None, **lengths, **beta, **keywords)


def draw(curves: Mapping[str, LossCurve], directory: Path) -> None:
    """Writes the two pictures, of all rows of `LOSSES`."""
    directory.mkdir(exist_ok=True)
    apart = [name for name, spec in LOSSES.items() if "label" in spec.data or not spec.needs_reference]
    save_loss_curves(
        {name: curves[name] for name in LOSSES if name not in apart},
        directory / "losses_with_reference.png",
        title="Pairs with a reference: loss, and weight of its gradient (β = 1)",
        columns=5,
    )
    save_loss_curves(
        {name: curves[name] for name in apart},
        directory / "losses_without_reference.png",
        title="Without a reference, or judged one by one: loss, and weight of its gradient (β = 1)",
        columns=4,
    )


if __name__ == "__main__":
    draw({name: curve(spec) for name, spec in LOSSES.items()}, IMAGES)
