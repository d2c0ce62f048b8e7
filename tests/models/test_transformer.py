"""The decoder: trees equal separate passes, every parameter has its axes, and dtypes are what they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.models import Decoder, abstract_params, init_params, logical_axes, make_decoder
from jaxdpo.sharding import AXIS_RULES, make_mesh
from jaxdpo.types import Batch, InputError
from tests import tiny

CONFIGS = {
    "llama": dataclasses.replace(tiny.LLAMA, tie_embeddings=False),
    "tied": tiny.LLAMA,
    "window": dataclasses.replace(tiny.LLAMA, sliding_window=4),
    "learned-positions": tiny.GPT2,
}
two_configs = pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2], ids=["tied", "learned-positions"])
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
HIDDEN = jax.jit(Decoder.hidden, static_argnums=0)
LOGITS = jax.jit(Decoder.logits, static_argnums=0)


@functools.cache
def params_of(config):
    return init_params(tiny.decoder(config), jax.random.key(0))


def pack(rows, length):
    """A `Batch` of only what `Decoder.hidden` reads, and where each path went.

    A row is a list of groups, a group a prompt and its candidates.
    """
    fields = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "positions", "group", "candidate")}
    spans = []
    for row, groups in enumerate(rows):
        at = 0
        for group, (prompt, *candidates) in enumerate(groups, start=1):
            prompt_at = slice(at, at + len(prompt))
            for number, part in enumerate((prompt, *candidates)):
                here = slice(at, at + len(part))
                first = len(prompt) if number else 0
                fields["tokens"][row, here] = part
                fields["positions"][row, here] = np.arange(first, first + len(part))
                fields["group"][row, here] = group
                fields["candidate"][row, here] = number
                if number:
                    spans.append((row, prompt, prompt_at, part, here))
                at += len(part)
    return Batch(**fields, **dict.fromkeys(Batch._fields[4:])), spans


def random_rows(seed, shape):
    """`shape`: per row, per group, the lengths of the prompt and of each candidate."""
    rng = np.random.default_rng(seed)
    return [[[rng.integers(0, 61, n) for n in group] for group in row] for row in shape]


# Paths of 6 or 8 tokens, so that the separate passes compile twice only; completions of one token; an empty row.
TREES = random_rows(0, [[(5, 3, 1), (1, 5)], [(5, 1, 3, 1, 3, 1)], []])


def plain(tokens):
    """One text by itself."""
    zeros = np.zeros((1, len(tokens)), np.int32)
    fields = (tokens[None], np.arange(len(tokens))[None], zeros + 1, zeros)
    return Batch(*fields, *([None] * (len(Batch._fields) - 4)))


@every_config
def test_packed_trees_equal_separate_passes(config):
    with jax.enable_x64(True):
        decoder = tiny.decoder(config, "float64")
        params = tiny.as_dtype(params_of(config), "float64")
        batch, spans = pack(TREES, 24)
        states = HIDDEN(decoder, params, batch)
        assert states.dtype == jnp.float64
        assert np.isfinite(states).all()
        for row, prompt, prompt_at, candidate, candidate_at in spans:
            alone = HIDDEN(decoder, params, plain(np.concatenate([prompt, candidate])))[0]
            packed = np.concatenate([states[row, prompt_at], states[row, candidate_at]])
            np.testing.assert_allclose(packed, alone, rtol=1e-10, atol=1e-10)


@every_config
def test_a_sibling_and_another_group_change_nothing(config):
    decoder = tiny.decoder(config)
    params = params_of(decoder.config)
    batch, spans = pack(TREES, 24)
    row, *_, here = spans[1]  # second candidate of the first group
    tokens = batch.tokens.copy()
    tokens[row, here] = (tokens[row, here] + 7) % 61
    before, after = HIDDEN(decoder, params, batch), HIDDEN(decoder, params, batch._replace(tokens=tokens))
    untouched = np.ones(batch.tokens.shape, bool)
    untouched[row, here] = False
    np.testing.assert_array_equal(before[untouched], after[untouched])
    assert (before[row, here] != after[row, here]).any()


@every_config
def test_window_and_causality_of_logits(config):
    decoder = tiny.decoder(config)
    params = params_of(decoder.config)
    tokens = np.random.default_rng(0).integers(0, 61, (1, 16))
    changed = tokens.copy()
    changed[0, 6] = (changed[0, 6] + 1) % 61
    before, after = (np.asarray(LOGITS(decoder, params, x))[0] for x in (tokens, changed))
    reached = np.flatnonzero((before != after).any(-1))
    # Each layer reaches `window` - 1 positions further.
    last = 15 if config.sliding_window is None else 6 + config.num_layers * (config.sliding_window - 1)
    np.testing.assert_array_equal(reached, np.arange(6, last + 1))


SCORE = dataclasses.replace(CONFIGS["llama"], head="score")


@pytest.mark.parametrize("config", [*CONFIGS.values(), SCORE], ids=[*CONFIGS, "score"])
def test_every_parameter_names_its_axes(config):
    decoder = tiny.decoder(config)
    axes, shapes = logical_axes(decoder), abstract_params(decoder)
    flat = jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    for names, leaf in zip(flat, jax.tree.leaves(shapes), strict=True):
        assert len(names) == leaf.ndim
        assert leaf.shape == tuple(config.axis_sizes[name] for name in names)
        assert leaf.dtype == jnp.float32
        assert set(names) <= set(AXIS_RULES)


@two_configs
def test_parameters_are_born_where_they_live(config):
    config = dataclasses.replace(config, vocab_size=64)
    decoder, mesh = tiny.decoder(config), make_mesh(fsdp=4, tensor=2)
    abstract = abstract_params(decoder, mesh)
    sharded, whole = init_params(decoder, jax.random.key(3), mesh), init_params(decoder, jax.random.key(3))
    assert type(sharded) is dict
    for leaf, born, alone in zip(*map(jax.tree.leaves, (abstract, sharded, whole)), strict=True):
        assert born.sharding == leaf.sharding
        assert (born.shape, born.dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_allclose(born, alone, rtol=0, atol=1e-6)
    assert sharded["tokens"].addressable_shards[0].data.shape == (64 // 2, 16 // 4)
    assert sharded["blocks"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape[2] == config.mlp_dim // 2


def test_mesh_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="vocab=61 is not divisible by the 'tensor' axis of 2 devices"):
        abstract_params(tiny.decoder(), make_mesh(fsdp=4, tensor=2))


def test_sharded_forward_and_gradient_equal_one_device():
    decoder, mesh = tiny.decoder(dataclasses.replace(tiny.LLAMA, vocab_size=64)), make_mesh(fsdp=2, tensor=2)
    params = params_of(decoder.config)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 12))

    def loss(params):
        return jnp.square(decoder.logits(params, tokens)).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(decoder, mesh))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, shardings)
        sharded_value, sharded_gradient = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))(sharded)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(sharded_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@two_configs
def test_compute_dtypes(config):
    params = params_of(config)
    batch, _ = pack(TREES, 24)
    exact = HIDDEN(tiny.decoder(config), params, batch)
    rounded = HIDDEN(tiny.decoder(config, "bfloat16"), params, batch)
    assert (exact.dtype, rounded.dtype) == (jnp.float32, jnp.bfloat16)
    difference = np.abs(np.asarray(rounded, np.float32) - exact)[batch.group > 0]
    assert 1e-6 < difference.mean() < 3e-2 * np.abs(exact[batch.group > 0]).mean()
    tokens = np.arange(8)[None]
    assert LOGITS(tiny.decoder(config, "bfloat16"), params, tokens).dtype == jnp.float32
    assert tiny.decoder(config, "bfloat16").head(params).dtype == jnp.float32


@every_config
def test_logits_are_the_head_of_the_states(config):
    decoder = tiny.decoder(config)
    params = params_of(decoder.config)
    tokens = np.random.default_rng(1).integers(0, 61, 9)
    expected = HIDDEN(decoder, params, plain(tokens)) @ decoder.head(params).T
    np.testing.assert_allclose(LOGITS(decoder, params, tokens[None]), expected, rtol=1e-5, atol=1e-5)
    head = params["tokens"] if config.tie_embeddings else params["head"]
    np.testing.assert_array_equal(decoder.head(params), head)


def test_a_score_head_takes_the_place_of_the_lm_head():
    params, language = params_of(SCORE), params_of(CONFIGS["llama"])
    assert params.keys() == language.keys() - {"head"} | {"score"}
    decoder = tiny.decoder(SCORE)
    np.testing.assert_array_equal(decoder.score(params), params["score"])
    assert 0.3 < params["score"].std() / SCORE.init_std < 2
    with pytest.raises(ValueError, match="the model has a score head; allowed: an LM head"):
        decoder.logits(params, np.arange(8)[None])
    with pytest.raises(ValueError, match="the model has an lm head; allowed: a score head"):
        tiny.decoder(CONFIGS["llama"]).score(language)


def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        decoder = tiny.decoder(CONFIGS["window"], "float64")
        params = tiny.as_dtype(params_of(decoder.config), "float64")
        batch, _ = pack(TREES, 24)
        weight = (batch.group > 0)[..., None]

        @jax.jit
        def loss(params):
            return (jnp.sin(decoder.hidden(params, batch)) * weight).sum()

        direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), params)
        slope = sum(map(jnp.vdot, jax.tree.leaves(jax.jit(jax.grad(loss))(params)), jax.tree.leaves(direction)))
        moved = [loss(jax.tree.map(lambda p, d, e=e: p + e * d, params, direction)) for e in (1e-6, -1e-6)]
        np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2e-6, rtol=1e-6)


def test_decoders_are_values():
    assert tiny.decoder() == tiny.decoder()
    assert hash(tiny.decoder()) == hash(tiny.decoder())
    assert tiny.decoder() != tiny.decoder(tiny.GPT2)


def test_refusals():
    with pytest.raises(InputError, match="compute_dtype is 'float16'; allowed: float32, bfloat16, float64"):
        make_decoder(tiny.LLAMA, compute_dtype="float16")
    with pytest.raises(InputError, match="set jax_enable_x64"):
        make_decoder(tiny.LLAMA, compute_dtype="float64")
    with pytest.raises(InputError, match="head is 'value'; allowed: lm, score"):
        dataclasses.replace(tiny.LLAMA, head="value")
    decoder = tiny.decoder()
    with pytest.raises(InputError, match="length 65; allowed: up to the model's 64 positions"):
        decoder.logits(params_of(tiny.LLAMA), np.zeros((1, 65), np.int32))


def test_parameters_can_be_made_inside_a_mesh():
    """With a configuration that no other test has, so that nothing is cached."""
    config = dataclasses.replace(tiny.LLAMA, vocab_size=72)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        params = init_params(make_decoder(config), jax.random.key(0), mesh)
    assert params["tokens"].shape == (72, config.embed_dim)
    assert params["tokens"].sharding.mesh == mesh
