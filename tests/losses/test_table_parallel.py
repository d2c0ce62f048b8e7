"""What holds for every row of LOSSES about groups: on one device or on eight, and whether they see each other.

Eager and compiled are compared in `test_table.py`, by `test_masked_is_as_good_as_not_there`.
"""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxdpo.losses import LOSSES
from tests.losses.table_rows import (
    DEVICES,
    ROWS,
    UNOPTIMIZED,
    draw,
    evaluate,
    loss,
    loss_and_gradient,
    options_of,
    over,
)

RTOL, ATOL = 1e-5, 1e-6
"""Rewards of 0.1 * 60 round by 2.4e-7 in float32, so logits by up to 1e-6; other orders of operations move both."""
COUPLED = [name for name, spec in ROWS.items() if spec.coupling != "none"]


def assert_close(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=ATOL)


def one_device_or_all(name):
    """The loss of a device's groups, and the gradient of the loss of all by the log-probs of these groups."""
    return functools.partial(loss_and_gradient, name, axis_name="groups")


@over(LOSSES)
def test_pmap_is_one_device(name):
    x = draw(name)
    mapped = jax.pmap(one_device_or_all(name), axis_name="groups", in_axes=(0, None))
    assert_close(mapped(x, options_of(name)), evaluate(name, x))


@over([*LOSSES, *(name for name in COUPLED if name not in LOSSES)])
def test_shard_map_is_one_device(name):
    x = draw(name)
    mesh = jax.make_mesh((DEVICES,), ("groups",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("groups"), PartitionSpec()
    mapped = jax.shard_map(one_device_or_all(name), mesh=mesh, in_specs=(split, whole), out_specs=split)
    assert_close(jax.jit(mapped, compiler_options=UNOPTIMIZED)(x, options_of(name)), evaluate(name, x))


@over(ROWS)
def test_groups_see_each_other_only_where_the_row_says_so(name):
    x, other = draw(name), draw(name, seed=1)
    half = DEVICES // 2
    mixed = jax.tree.map(lambda array, new: np.concatenate([array[:half], new[half:]]), x, other)
    (losses, gradient), (mixed_losses, mixed_gradient) = evaluate(name, x), evaluate(name, mixed)
    assert (losses[half:] != mixed_losses[half:]).any()
    assert (gradient[:half] != 0).any()
    if ROWS[name].coupling == "none":
        np.testing.assert_array_equal(mixed_losses[:half], losses[:half])
        np.testing.assert_array_equal(mixed_gradient[:half], gradient[:half])
    else:
        assert (mixed_losses[:half] != losses[:half]).any()


@over(name for name in COUPLED if ROWS[name].coupling == "denominator")
def test_a_known_mean_length_is_all_that_couples_a_denominator(name):
    x = draw(name, ragged=False)
    whole, _ = evaluate(name, x)
    known = options_of(name) | {"mean_length": x.data["lengths"][..., 0].mean(dtype=np.float32)}
    for part in (slice(0, DEVICES // 2), slice(DEVICES // 2, None)):
        where = np.zeros(x.where.shape, bool)
        where[part] = True
        losses = loss(name, x._replace(where=where), known)
        np.testing.assert_allclose(losses[part], whole[part], rtol=RTOL, atol=ATOL)


def test_every_coupling_is_among_the_rows():
    assert {spec.coupling for spec in LOSSES.values()} == {"none", "denominator", "statistic", "sort"}
