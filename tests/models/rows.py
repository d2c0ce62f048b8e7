"""Packed rows, and how a form of attention is held against dense attention on them."""

import jax
import numpy as np

from jaxdpo.models import attention as dense_attention
from jaxdpo.models import tree_mask
from jaxdpo.sharding import make_mesh

# Rows of groups, a group the lengths of its prompt and of each candidate: K of 1 to 4, one-token parts, an empty row;
# parts that end at a block's edge, that span three blocks, and a block that lies within one completion.
SHORT = [[(60, 40, 30), (1, 50), (30, 20, 1, 5, 40)], []]
LONG = [[(512, 5, 3), (100, 600, 20, 7)], [(20, 1100), (30, 300, 40)], [(30, 4, 8)] * 35, []]


def fields_of(rows, length):
    """`positions`, `group` and `candidate`, each `[rows, length]`, as `build_batch` makes them."""
    fields = np.zeros((3, len(rows), length), np.int32)
    for row, groups in enumerate(rows):
        at = 0
        for group, (prompt, *candidates) in enumerate(groups, start=1):
            for candidate, size in enumerate((prompt, *candidates)):
                here = slice(at, at + size)
                fields[0, row, here] = np.arange(size) + (prompt if candidate else 0)
                fields[1, row, here], fields[2, row, here] = group, candidate
                at += size
    return fields


def value_and_gradients(attend, prepare, fields, *, heads, kv_heads, head_dim, dtype="float32", window=None):
    """The output of a form and the gradients of q, k and v for a random cotangent."""
    shape = (*fields.shape[1:], heads, head_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    q, cotangent = (jax.random.normal(key, shape, dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (*shape[:2], kv_heads, head_dim), dtype) for key in keys[2:])

    @jax.jit
    def run(q, k, v, cotangent, fields):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, prepare(*fields, window=window)), q, k, v)
        return out, *pull(cotangent)

    return run(q, k, v, cotangent, fields)


def assert_equals_dense(form, rows, length, *, dtype, tolerance, window=None, **sizes):
    """Output and gradients of a form are those of dense attention, and zero at padding."""
    fields = fields_of(rows, length)
    expected = value_and_gradients(dense_attention, tree_mask, fields, **sizes, dtype=dtype, window=window)
    got = value_and_gradients(form.attend, form.prepare, fields, **sizes, dtype=dtype, window=window)
    for mine, dense in zip(got, expected, strict=True):
        assert mine.dtype == dense.dtype
        mine, dense = np.asarray(mine, np.float32), np.asarray(dense, np.float32)
        np.testing.assert_allclose(mine, dense, rtol=0, atol=tolerance * max(1, np.abs(dense).max()))
        np.testing.assert_array_equal(mine[fields[1] == 0], 0)


def assert_split_over_devices(form, *, kv_heads, **axes):
    """On a mesh each device computes its own queries and heads: the numbers are those of dense attention."""
    fields = np.concatenate([fields_of(SHORT, 512)] * 4, axis=1)
    sizes = {"heads": 4, "kv_heads": kv_heads, "head_dim": 8}
    expected = value_and_gradients(dense_attention, tree_mask, fields, **sizes)
    with jax.set_mesh(make_mesh(**axes)):
        got = value_and_gradients(form.attend, form.prepare, fields, **sizes)
    for mine, dense in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, dense, rtol=0, atol=1e-5)
