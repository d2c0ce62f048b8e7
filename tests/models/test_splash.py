"""Splash attention, interpreted, is dense attention: values, gradients, on a mesh, in a whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.models import make_decoder, tree_mask
from jaxdpo.models.forms import ATTENTION
from jaxdpo.models.splash import splash_attention, splash_mask
from jaxdpo.types import Batch, InputError
from tests import tiny
from tests.models.rows import LONG, SHORT, assert_equals_dense, assert_split_over_devices, fields_of

FORM = ATTENTION["splash"]


@pytest.mark.parametrize(
    ("rows", "length", "sizes", "dtype", "tolerance"),
    [
        (SHORT, 300, {"heads": 6, "kv_heads": 2, "head_dim": 16}, "float32", 1e-5),
        (SHORT, 384, {"heads": 2, "kv_heads": 1, "head_dim": 6}, "bfloat16", 4e-2),
        (LONG, 1537, {"heads": 2, "kv_heads": 2, "head_dim": 8}, "float32", 1e-5),
    ],
    ids=["one-block", "bfloat16", "four-blocks"],
)
def test_equals_dense(rows, length, sizes, dtype, tolerance):
    assert_equals_dense(FORM, rows, length, dtype=dtype, tolerance=tolerance, **sizes)


@pytest.mark.parametrize(("tensor", "context", "kv_heads"), [(1, 1, 2), (2, 1, 2), (4, 1, 2), (1, 2, 2), (2, 4, 1)])
def test_each_device_computes_its_queries_and_heads(tensor, context, kv_heads):
    assert_split_over_devices(FORM, tensor=tensor, context=context, kv_heads=kv_heads)


def test_a_model_computes_the_same():
    positions, group, candidate = fields_of([[(9, 5, 4), (3, 7)], [(1, 1, 1, 20)]], 40)
    tokens = np.random.default_rng(0).integers(0, tiny.LLAMA.vocab_size, group.shape)
    batch = Batch(tokens, positions, group, candidate, *[None] * (len(Batch._fields) - 4))
    real = (group != 0)[..., None]

    def value_and_gradient(form):
        decoder = make_decoder(tiny.LLAMA, attention=form)

        def square(params):
            return jnp.square(decoder.hidden(params, batch) * real).sum()

        return jax.jit(jax.value_and_grad(square))(tiny.params(decoder))

    expected, got = value_and_gradient("dense"), value_and_gradient("splash")
    for mine, dense in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, dense, rtol=0, atol=1e-5 * max(1, np.abs(dense).max()))


@pytest.mark.parametrize("rows", [SHORT, LONG], ids=["short", "long"])
def test_every_block_that_is_seen_is_visited_and_few_others(rows):
    fields, block = fields_of(rows, 1536), 512
    mask = splash_mask(*fields)
    blocks = mask.forward.block_mask[:, 0, 0] != 0  # [rows, query block, key block]
    np.testing.assert_array_equal(blocks, mask.keys.block_mask[:, 0, 0] != 0)
    by_half = np.stack([fields[2] == 0, fields[2] != 0])[:, :, None]  # [half, rows, 1, key]
    seen = np.asarray(tree_mask(*fields)) & by_half & (fields[1] != 0)[None, :, None]
    seen = seen.reshape(2, len(rows), 3, block, 3, block).any(axis=(3, 5))  # [half, rows, query block, key block]
    prompt, own = blocks[..., :3], blocks[..., 3:]
    np.testing.assert_array_equal(prompt, seen[0])
    assert not (seen[1] & ~own).any()
    # Beyond what is seen: padding, which sees itself, and blocks between a prompt's first token and its last.
    assert own.sum() <= seen[1].sum() + 3 * len(rows)
    assert blocks.sum() < 0.6 * len(rows) * 2 * 3 * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_float32_are_full_precision_both_ways(dtype):
    fields = fields_of(SHORT, 384)
    q = jnp.ones((2, 384, 2, 8), dtype)

    def total(q, k, v):
        return splash_attention(q, k, v, splash_mask(*fields)).astype("float32").sum()

    text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(q, q, q))
    assert text.count("dot_general[") > 0
    full = text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
    assert full == (text.count("dot_general[") if dtype == "float32" else 0)


def test_refuses_what_it_cannot_do():
    positions, group, candidate = fields_of(SHORT, 300)
    with pytest.raises(InputError, match=r"sliding window of 299 in rows of 300; allowed: none.*'dense'"):
        splash_mask(positions, group, candidate, window=299)
    splash_mask(positions, group, candidate, window=300)  # as long as the row: hides nothing
    wide = jax.ShapeDtypeStruct((1, 32769), "int32")
    with pytest.raises(InputError, match="rows of 32769; allowed: up to 32768"):
        jax.eval_shape(splash_mask, wide, wide, wide)


def test_a_model_with_a_window_says_which_forms_take_it():
    config = dataclasses.replace(tiny.LLAMA, sliding_window=4)
    decoder = make_decoder(config, attention="splash")
    fields = [np.zeros((1, 8), np.int32)] * 4
    batch = Batch(*fields, *[None] * (len(Batch._fields) - 4))
    with pytest.raises(InputError, match="use 'dense' or 'blockwise'"):
        jax.eval_shape(decoder.hidden, tiny.params(decoder), batch)
