"""Blockwise attention is dense attention (values, gradients, windows, on a mesh), and skips what nobody sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.models import make_decoder, tree_mask
from jaxdpo.models.blockwise import BLOCK, blockwise_attention, find_blocks
from jaxdpo.models.forms import ATTENTION
from jaxdpo.types import Batch
from tests import tiny
from tests.models.rows import LONG, SHORT, assert_equals_dense, assert_split_over_devices, fields_of

FORM = ATTENTION["blockwise"]


@pytest.mark.parametrize(
    ("rows", "length", "sizes", "dtype", "window", "tolerance"),
    [
        (SHORT, 300, {"heads": 6, "kv_heads": 2, "head_dim": 16}, "float32", None, 1e-5),
        (SHORT, 300, {"heads": 6, "kv_heads": 2, "head_dim": 16}, "float32", 17, 1e-5),
        (SHORT, 384, {"heads": 2, "kv_heads": 1, "head_dim": 6}, "bfloat16", None, 4e-2),
        (LONG, 1537, {"heads": 2, "kv_heads": 2, "head_dim": 8}, "float32", None, 1e-5),
        (LONG, 1537, {"heads": 2, "kv_heads": 2, "head_dim": 8}, "float32", 100, 1e-5),
    ],
    ids=["short", "short-window", "bfloat16", "long", "long-window"],
)
def test_equals_dense(rows, length, sizes, dtype, window, tolerance):
    assert_equals_dense(FORM, rows, length, dtype=dtype, tolerance=tolerance, window=window, **sizes)


@pytest.mark.parametrize(("tensor", "context", "kv_heads"), [(1, 1, 2), (2, 1, 2), (4, 1, 2), (1, 2, 2), (2, 4, 1)])
def test_each_device_computes_its_queries_and_heads(tensor, context, kv_heads):
    assert_split_over_devices(FORM, tensor=tensor, context=context, kv_heads=kv_heads)


def seen_blocks(fields, *, window=None):
    """bool `[rows, query block, key block]`: whether a query sees a key, and whether the blocks list it."""
    blocks = find_blocks(*fields, window=window)
    length = blocks.group.shape[1]
    fields = np.pad(fields, ((0, 0), (0, 0), (0, length - fields.shape[2])))
    count = length // BLOCK
    seen = np.asarray(tree_mask(*fields, window=window)).reshape(-1, count, BLOCK, count, BLOCK).any(axis=(2, 4))
    listed = np.zeros_like(seen)
    for row, query in np.ndindex(seen.shape[:2]):
        listed[row, query, blocks.keys[row, query, : blocks.num_keys[row, query]]] = True
        assert listed[row, query].sum() == blocks.num_keys[row, query]
    return seen, listed


@pytest.mark.parametrize("rows", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("window", [None, 17, 200])
def test_every_block_that_is_seen_is_listed_and_few_others(rows, window):
    seen, listed = seen_blocks(fields_of(rows, 1537), window=window)
    assert not (seen & ~listed).any()
    if window is None:  # a block that holds the end of one candidate and the prompt's end counts as both
        assert listed.sum() <= 1.1 * seen.sum()
        assert listed.sum() < 0.6 * seen.shape[0] * np.tri(seen.shape[1]).sum()


def test_siblings_are_skipped():
    """Eight long completions of one short prompt: none of them reads another's blocks."""
    seen, listed = seen_blocks(fields_of([[(BLOCK,) + (4 * BLOCK,) * 8]], 33 * BLOCK))
    np.testing.assert_array_equal(listed, seen)
    assert listed.sum() == 1 + 8 * (4 + 4 * 5 / 2)


def test_memory_is_linear_in_the_length():
    """Of a row that is one group, with its gradient; dense attention's scores alone grow with the square."""
    config = {"heads": 2, "kv_heads": 1, "head_dim": 16}

    def temporaries(length):
        fields = jnp.asarray(fields_of([[(length // 2, length // 4, length // 4)]], length))
        q = jnp.zeros((1, length, config["heads"], config["head_dim"]))
        k = jnp.zeros((1, length, config["kv_heads"], config["head_dim"]))

        def total(q, k, v, fields):
            return blockwise_attention(q, k, v, find_blocks(*fields)).sum()

        gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        return gradient.lower(q, k, k, fields).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 4.4 * temporaries(1024)


def test_a_model_computes_the_same_in_every_form_of_recomputation():
    positions, group, candidate = fields_of([[(9, 5, 4), (3, 7)], [(1, 1, 1, 20)]], 40)
    tokens = np.random.default_rng(0).integers(0, tiny.LLAMA.vocab_size, group.shape)
    batch = Batch(tokens, positions, group, candidate, *[None] * (len(Batch._fields) - 4))
    real = (group != 0)[..., None]

    def value_and_gradient(form, remat):
        decoder = make_decoder(tiny.LLAMA, attention=form, remat=remat)

        def square(params):
            return jnp.square(decoder.hidden(params, batch) * real).sum()

        return jax.jit(jax.value_and_grad(square))(tiny.params(decoder))

    expected = value_and_gradient("dense", "full")
    for form, remat in (("dense", "none"), ("blockwise", "full"), ("blockwise", "projections"), ("dense", "attention")):
        got = value_and_gradient(form, remat)
        for mine, dense in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, dense, rtol=0, atol=1e-5 * max(1, np.abs(dense).max()))
