"""Rewards are those of separate texts, on any mesh and packing; centring moves them alike and keeps their order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.data.pipeline import all_batches
from jaxdpo.data.tokenize import TokenizedGroup
from jaxdpo.models import Decoder
from jaxdpo.rewards import candidate_rewards, center_rewards, dataset_rewards, make_reward_program
from jaxdpo.sharding import batch_size_multiple, make_mesh
from jaxdpo.types import Batch, Origin
from tests import tiny

LLAMA = dataclasses.replace(tiny.LLAMA, head="score")
MODELS = {
    "llama": LLAMA,
    "gpt2": dataclasses.replace(tiny.GPT2, head="score"),
    "window": dataclasses.replace(LLAMA, sliding_window=5, tie_embeddings=False),
}
DATA = tiny.dataset(groups=11, candidates=(1, 4), seed=3)
LONGEST_PATH = 28
HIDDEN = jax.jit(Decoder.hidden, static_argnums=0)
one_device = functools.partial(make_mesh, jax.devices()[:1])


def path(tokens):
    """One text by itself."""
    zeros = np.zeros((1, len(tokens)), np.int32)
    return Batch(tokens[None], np.arange(len(tokens))[None], zeros + 1, zeros, *([None] * (len(Batch._fields) - 4)))


def of_paths(decoder, params, data, read=lambda tokens: len(tokens) - 1):
    """`[groups, candidates]` rewards of ordinary forward passes, one for each path; `read` says at which token."""
    rewards = np.zeros((len(data), data.candidates), jax.tree.leaves(params)[0].dtype)
    for example, group in enumerate(data.groups):
        for which, completion in enumerate(group.completions):
            tokens = np.concatenate([group.prompt, completion])
            padded = np.zeros(LONGEST_PATH, np.int32)  # one shape, one program; no token sees those behind it
            padded[: len(tokens)] = tokens
            state = HIDDEN(decoder, params, path(padded))[0, read(tokens)]
            rewards[example, which] = (np.asarray(state, rewards.dtype) * np.asarray(params["score"])).sum()
    return rewards


def rewards_of(decoder, params, data, mesh=None, **layout):
    mesh = mesh or one_device()
    batches = all_batches(data, tiny.layout(data, row_multiple=batch_size_multiple(mesh), **layout))
    with jax.set_mesh(mesh):
        return dataset_rewards(make_reward_program(decoder), params, batches, mesh, label="test")


@pytest.mark.parametrize("name", MODELS)
def test_rewards_are_those_of_separate_texts(name):
    with jax.enable_x64(True):
        decoder = tiny.decoder(MODELS[name], "float64")
        params = tiny.params(decoder, dtype="float64")
        found = rewards_of(decoder, params, DATA)
        assert found.rewards.dtype == np.float64
        np.testing.assert_allclose(found.rewards, of_paths(decoder, params, DATA), rtol=1e-10, atol=1e-12)
    assert found.mask.tolist() == [[c < len(g.completions) for c in range(DATA.candidates)] for g in DATA.groups]
    assert (found.rewards[~found.mask] == 0).all() and (found.rewards[found.mask] != 0).all()


def test_one_device_and_eight_agree():
    decoder = tiny.decoder(dataclasses.replace(LLAMA, vocab_size=64))
    whole = rewards_of(decoder, tiny.params(decoder), DATA)
    for mesh in (make_mesh(), make_mesh(fsdp=2, tensor=2)):
        split = rewards_of(decoder, tiny.params(decoder, mesh), DATA, mesh)
        np.testing.assert_allclose(split.rewards, whole.rewards, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(split.mask, whole.mask)


def test_order_is_that_of_the_examples_in_any_packing():
    decoder = tiny.decoder(LLAMA)
    params = tiny.params(decoder)
    batches = list(all_batches(DATA, tiny.layout(DATA, row_lengths=[64], tokens=128)))
    assert len(batches) > 1
    program = make_reward_program(decoder)
    backwards = dataset_rewards(program, params, batches[::-1], one_device(), label="test")
    np.testing.assert_allclose(backwards.rewards, rewards_of(decoder, params, DATA).rewards, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"example \d+ stands in two places of the batches; allowed: one"):
        dataset_rewards(program, params, [*batches, batches[0]], one_device(), label="test")
    assert dataset_rewards(program, params, [], one_device(), label="test").rewards.shape == (0, 0)


def test_one_token_completions_of_one_prompt_have_different_rewards():
    """Each is read at its own token, though the prompt's last token predicts them all."""
    tokens = [np.array([token], np.int32) for token in (5, 6, 7)]
    group = TokenizedGroup(np.arange(4, dtype=np.int32), tuple(tokens), False, (False,) * 3, Origin("x.jsonl", 1))
    decoder = tiny.decoder(LLAMA)
    (rewards,) = rewards_of(decoder, tiny.params(decoder), tiny.of_groups([group])).rewards
    assert np.abs(np.subtract.outer(rewards, rewards))[~np.eye(3, dtype=bool)].min() > 1e-2


PAD = 3


@pytest.mark.parametrize("seed", range(2))
def test_padding_at_the_end_of_a_text_is_passed_over(seed):
    """As transformers reads a classifier whose padding is EOS: at the last token that is another one."""
    rng = np.random.default_rng(seed)

    def ending(tokens, count):
        return np.append(tokens[tokens != PAD], np.full(count, PAD)).astype(np.int32)

    data = tiny.dataset(groups=9, candidates=(1, 4), seed=seed)
    made = [
        dataclasses.replace(
            group,
            prompt=ending(group.prompt, 1),
            completions=tuple(ending(tokens, rng.integers(1, 3)) for tokens in group.completions),
        )
        for group in data.groups
    ]
    only_padding = dataclasses.replace(made[0], prompt=np.full(2, PAD), completions=(np.full(1, PAD),))
    data = tiny.of_groups([*made, only_padding])
    with jax.enable_x64(True):
        decoder = tiny.decoder(dataclasses.replace(LLAMA, pad_token_id=PAD), "float64")
        params = tiny.params(decoder, dtype="float64")
        expected = of_paths(
            decoder, params, data, lambda tokens: np.flatnonzero(np.append(True, tokens[1:] != PAD))[-1]
        )
        found = rewards_of(decoder, params, data).rewards
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        plain = tiny.decoder(LLAMA, "float64")
        assert not np.allclose(rewards_of(plain, params, data).rewards, found)


def test_gradient_is_that_of_finite_differences_and_reaches_the_head():
    with jax.enable_x64(True):
        decoder = tiny.decoder(LLAMA, "float64")
        params = tiny.params(decoder, dtype="float64")
        batch = next(all_batches(DATA, tiny.layout(DATA)))
        weights = np.random.default_rng(0).normal(size=batch.candidate_mask.shape)

        @jax.jit
        def total(params):
            return (weights * jnp.sin(candidate_rewards(decoder, params, batch))).sum()

        gradient = jax.jit(jax.grad(total))(params)
        direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), params)
        slope = sum(map(jnp.vdot, jax.tree.leaves(gradient), jax.tree.leaves(direction)))
        up, down = (total(jax.tree.map(lambda p, d, e=e: p + e * d, params, direction)) for e in (1e-6, -1e-6))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-5)
        assert (gradient["score"] != 0).all()


def test_bfloat16_states_are_scored_in_float32():
    decoder = tiny.decoder(LLAMA, "bfloat16")
    params = tiny.params(decoder)
    params["score"] = params["score"] + 1e-4  # bfloat16 would round it away
    found = rewards_of(decoder, params, DATA)
    assert found.rewards.dtype == np.float32
    state = HIDDEN(decoder, params, path(np.concatenate([DATA.groups[0].prompt, DATA.groups[0].completions[0]])))[0, -1]
    expected = np.asarray(state, np.float64) @ np.asarray(params["score"], np.float64)
    np.testing.assert_allclose(found.rewards[0, 0], expected, rtol=0, atol=2e-2)
    assert tiny.decoder(LLAMA, "bfloat16").score(params).dtype == jnp.float32


WIDE = dataclasses.replace(LLAMA, embed_dim=64)
EOS = np.int32(1)


def finished(**options):
    """Random pairs whose completions end with EOS: what their last states share, as those of real texts."""
    data = tiny.dataset(**options)
    ended = (tuple(np.append(tokens, EOS) for tokens in group.completions) for group in data.groups)
    return tiny.of_groups(
        [dataclasses.replace(group, completions=ends) for group, ends in zip(data.groups, ended, strict=True)]
    )


def centred(decoder, params, data, mesh=None):
    mesh = mesh or one_device()
    batches = all_batches(data, tiny.layout(data, tokens=512, row_multiple=batch_size_multiple(mesh)))
    with jax.set_mesh(mesh):
        return center_rewards(decoder, params, batches, mesh, label="test")


@pytest.mark.parametrize("groups", [1, 10, 60])  # of at most 3 completions: fewer than the 64 features, or more
def test_centring_makes_the_mean_zero_and_says_what_it_did(groups):
    decoder = tiny.decoder(WIDE)
    params = tiny.params(decoder, seed=1)
    data = finished(groups=groups, candidates=(1, 3), seed=1)
    moved, found = centred(decoder, params, data)
    assert moved.keys() == params.keys()
    assert all(moved[name] is params[name] for name in params if name != "score")
    before, after = (rewards_of(decoder, p, data, tokens=512) for p in (params, moved))
    before, after = before.rewards[before.mask], after.rewards[after.mask]
    np.testing.assert_allclose(after.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(found.mean_before, before.mean(), rtol=1e-4)
    np.testing.assert_allclose(found.reward_std, after.std(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.shift_std, (after - before).std(), rtol=1e-2, atol=1e-5)
    assert found.shift_std < 0.2 * abs(found.mean_before)  # random states share little


@pytest.mark.parametrize("model, groups", [(WIDE, 10), (WIDE, 60), (MODELS["gpt2"], 60)])
def test_centring_hardly_changes_what_was_not_seen(model, groups):
    """Held-out completions move by about the same, so nearly all pairs keep their order."""
    decoder = tiny.decoder(model)
    params = tiny.params(decoder)
    moved, found = centred(decoder, params, finished(groups=groups, seed=1))
    held_out = finished(groups=150, seed=2)
    before, after = (rewards_of(decoder, p, held_out, tokens=512).rewards for p in (params, moved))
    shifts = after - before
    assert abs(shifts.mean() + found.mean_before) < 0.2 * abs(found.mean_before)
    assert shifts.std() < 0.3 * abs(found.mean_before)
    assert ((before[:, 0] > before[:, 1]) == (after[:, 0] > after[:, 1])).mean() > 0.94


def test_centring_twice_changes_nothing_more():
    decoder = tiny.decoder(WIDE)
    data = finished(groups=20)
    once, _ = centred(decoder, tiny.params(decoder), data)
    twice, found = centred(decoder, once, data)
    assert abs(found.mean_before) < 1e-6 and found.shift_std < 1e-6
    np.testing.assert_allclose(twice["score"], once["score"], rtol=1e-4, atol=1e-6)


def test_centring_is_the_same_on_a_mesh():
    decoder, mesh = tiny.decoder(LLAMA), make_mesh()
    data = finished(groups=20)
    whole, _ = centred(decoder, tiny.params(decoder), data)
    params = tiny.params(decoder, mesh)
    split, _ = centred(decoder, params, data, mesh)
    np.testing.assert_allclose(split["score"], whole["score"], rtol=1e-4, atol=1e-5)
    assert split["score"].sharding == params["score"].sharding


def test_centring_of_nothing_is_refused():
    decoder = tiny.decoder(LLAMA)
    with pytest.raises(ValueError, match="no completions whose mean reward could be 0; allowed: at least one"):
        center_rewards(decoder, tiny.params(decoder), [], one_device(), label="test")
