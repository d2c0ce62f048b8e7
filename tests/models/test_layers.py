"""Norms, rotary positions and the feed-forward layer against their formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdpo.models import Rope
from jaxdpo.models.layers import ACTIVATIONS, MLP, Norm, rope_angles, rope_frequencies, rotate
from tests import tiny

X = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)


def build(module, config):
    with nnx.use_eager_sharding(False):
        return module(config, rngs=nnx.Rngs(0))


def test_rmsnorm():
    norm = build(Norm, tiny.LLAMA)
    norm.scale[...] = jnp.arange(1.0, 17.0)
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-5) * np.arange(1, 17)
    np.testing.assert_allclose(norm(X), expected, rtol=1e-5)


def test_layernorm():
    norm = build(Norm, tiny.GPT2)
    norm.scale[...], norm.bias[...] = jnp.arange(1.0, 17.0), jnp.full(16, 0.5)
    centred = X - X.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * np.arange(1, 17) + 0.5
    np.testing.assert_allclose(norm(X), expected, rtol=1e-4, atol=1e-5)


def test_norm_of_bfloat16_is_computed_in_float32():
    norm = build(Norm, tiny.LLAMA)
    big = jnp.asarray(X, jnp.bfloat16) * 300
    out = norm(big)
    assert out.dtype == jnp.bfloat16
    expected = norm(big.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(out.astype(jnp.float32), expected.astype(jnp.float32))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("relu", lambda x: max(x, 0.0)),
        ("gelu", lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ],
)
def test_activations(name, formula):
    points = np.linspace(-4, 4, 17).astype(np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](points), [formula(float(x)) for x in points], atol=1e-6)


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2], ids=["gated", "plain"])
def test_mlp(config):
    mlp = build(MLP, config)
    act = ACTIVATIONS[config.activation]
    up, down = np.asarray(mlp.up.kernel[...]), np.asarray(mlp.down.kernel[...])
    wide = act(X @ np.asarray(mlp.gate.kernel[...])) * (X @ up) if config.gated_mlp else act(X @ up)
    np.testing.assert_allclose(mlp(X, "float32"), wide @ down, rtol=1e-4, atol=1e-5)


def test_rope_frequencies_by_kind():
    base = 100.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(rope_frequencies(Rope(theta=100.0), 8), base)
    np.testing.assert_allclose(rope_frequencies(Rope(theta=100.0, kind="linear", factor=4.0), 8), base / 4)
    rope = Rope(theta=100.0, kind="llama3", factor=8.0, original_positions=32)
    stretched = rope_frequencies(rope, 8)
    wavelengths = 2 * np.pi / base  # 6.3, 19.9, 62.8, 198.7: kept below 32/4, divided above 32/1, blended between
    smooth = (32 / wavelengths[1] - 1.0) / (4.0 - 1.0)
    expected = [base[0], (1 - smooth) * base[1] / 8 + smooth * base[1], base[2] / 8, base[3] / 8]
    np.testing.assert_allclose(stretched, expected)


def test_rotation_depends_on_distance_only():
    rope = Rope(theta=50.0)
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in range(2))

    def score(query_at, key_at):
        at = [rope_angles(rope, 8, jnp.array([[p]]), jnp.float32) for p in (query_at, key_at)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum()

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_angles_of_bfloat16_are_float32():
    angles = rope_angles(Rope(), 8, jnp.array([[257]]), jnp.bfloat16)
    assert angles.dtype == jnp.float32
    assert angles[0, 0, 0] == 257.0  # bfloat16 would say 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta": 0.0}, "rope theta is 0.0; allowed: a number above 0"),
        ({"kind": "yarn"}, "rope kind is 'yarn'; allowed: default, linear, llama3"),
        ({"factor": -1.0}, "rope factor is -1.0"),
        ({"high_freq_factor": 1.0}, "allowed: above low_freq_factor"),
        ({"original_positions": 0}, "original_positions is 0"),
    ],
)
def test_invalid_rope(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Rope(), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab is 0; allowed: a whole number of at least 1"),
        ({"embed_dim": 2.0}, "embed is 2.0"),
        ({"num_kv_heads": 3}, "num_heads is 4 with num_kv_heads 3"),
        ({"head_dim": 3}, "head_dim is 3 with rope"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'; allowed: rmsnorm, layernorm"),
        ({"activation": "tanh"}, "activation is 'tanh'; allowed: silu"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_invalid_config(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.LLAMA, **change)
