"""The preference tree is exact: packed, prefix-shared log-probs equal those of separate passes over each path."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo import lm_head
from jaxdpo.data.pipeline import all_batches
from jaxdpo.lm_head import STATISTICS
from jaxdpo.logprobs import candidate_lengths, sequence_logps, token_logps, token_statistics
from jaxdpo.models import Decoder
from tests import tiny

WINDOWED = dataclasses.replace(tiny.LLAMA, sliding_window=5, tie_embeddings=False)
LOGITS = jax.jit(Decoder.logits, static_argnums=0)
SEQUENCES = jax.jit(lambda d, p, b: sequence_logps(token_logps(d, p, b), b), static_argnums=0)
LONGEST = 12
MODELS = {"llama": tiny.LLAMA, "gpt2": tiny.GPT2, "window": WINDOWED}


def unpacked(decoder, params, data):
    """`[groups, candidates]` log-probs of ordinary forward passes: a row for each path, nothing packed or shared."""
    length = 2 * LONGEST
    paths = [(g, k, group, c) for g, group in enumerate(data.groups) for k, c in enumerate(group.completions)]
    tokens = np.zeros((len(paths), length), np.int32)  # zeros behind a path: no earlier token sees them
    scored = np.zeros((len(paths), length), bool)
    for row, (_, _, group, completion) in enumerate(paths):
        start, stop = len(group.prompt), len(group.prompt) + len(completion)
        tokens[row, :stop] = np.concatenate([group.prompt, completion])
        scored[row, start:stop] = True
    logps = jax.nn.log_softmax(LOGITS(decoder, params, tokens)[:, :-1], axis=-1)
    logps = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
    sums = jnp.where(scored[:, 1:], logps, 0.0).sum(axis=-1)
    where = tuple(np.array([(g, k) for g, k, _, _ in paths]).T)
    return jnp.zeros((len(data), data.candidates), sums.dtype).at[where].set(sums)


def packed(decoder, params, data, layout):
    """The same from packed trees, through the path that every loss takes."""
    values = jnp.zeros((len(data), data.candidates), jax.tree.leaves(params)[0].dtype)
    for batch in all_batches(data, layout):
        logps = SEQUENCES(decoder, params, batch)
        at = np.nonzero(batch.group_mask)
        values = values.at[batch.example_id[at]].set(logps[at])
    return values


def weights(data):
    """Fixed random weights, so that a gradient mixes all candidates."""
    return np.random.default_rng(5).normal(size=(len(data), data.candidates))


def relative(tree, other):
    flat, expected = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (tree, other))
    return float(jnp.linalg.norm(flat - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(2))
def test_tree_equals_separate_passes_float64(name, seed):
    with jax.enable_x64(True):
        decoder = tiny.decoder(MODELS[name], "float64")
        params = tiny.params(decoder, seed=seed, dtype="float64")
        data = tiny.dataset(groups=7, candidates=(1, 5), longest=LONGEST, seed=seed)
        layout = tiny.layout(data)
        assert layout.shapes[0].capacity.groups > 1
        expected, got = unpacked(decoder, params, data), packed(decoder, params, data, layout)
        np.testing.assert_allclose(got, expected, rtol=1e-10)
        w = weights(data)
        grads = jax.jit(jax.grad(lambda p: (w * packed(decoder, p, data, layout)).sum()))(params)
        assert relative(grads, jax.jit(jax.grad(lambda p: (w * unpacked(decoder, p, data)).sum()))(params)) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_tree_equals_separate_passes_float32(name):
    decoder = tiny.decoder(MODELS[name])
    params = tiny.params(decoder, seed=1)
    data = tiny.dataset(groups=7, candidates=(1, 5), longest=LONGEST, seed=1)
    layout = tiny.layout(data)
    expected, got = unpacked(decoder, params, data), packed(decoder, params, data, layout)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)
    w = weights(data).astype(np.float32)
    grads = jax.jit(jax.grad(lambda p: (w * packed(decoder, p, data, layout)).sum()))(params)
    assert relative(grads, jax.jit(jax.grad(lambda p: (w * unpacked(decoder, p, data)).sum()))(params)) < 5e-6


@pytest.mark.parametrize("row_length", [64, 128, 192])
def test_row_length_does_not_matter(row_length):
    with jax.enable_x64(True):
        decoder = tiny.decoder(compute_dtype="float64")
        params = tiny.params(decoder, seed=0, dtype="float64")
        data = tiny.dataset(groups=9, candidates=(2, 4), seed=2)
        expected = packed(decoder, params, data, tiny.layout(data))
        got = packed(decoder, params, data, tiny.layout(data, row_lengths=[row_length], tokens=row_length * 2))
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_slots_and_vocabulary_pass_the_head_in_pieces(monkeypatch):
    """More of both than one piece, and not a multiple: the same numbers and gradients, and no logits of all of it."""
    data = tiny.dataset(groups=40, longest=12, seed=3)
    layout = tiny.layout(data, row_lengths=[512], tokens=512)
    decoder = tiny.decoder()
    params = tiny.params(decoder, seed=0)
    batch = next(all_batches(data, layout))

    def of_batch(params):
        logps, statistics = token_statistics(decoder, params, batch, tuple(STATISTICS))
        return logps.sum(), (logps, statistics)

    want = jax.jit(jax.grad(of_batch, has_aux=True))(params)
    monkeypatch.setattr(lm_head, "SLOT_CHUNK", 100)
    monkeypatch.setattr(lm_head, "VOCAB_BLOCK", 25)
    slots, vocab = layout.shapes[0].capacity.slots, decoder.config.vocab_size
    assert slots > 300 and slots % 100 and vocab > 50 and vocab % 25
    program = jax.jit(jax.grad(lambda params: of_batch(params), has_aux=True)).lower(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), program.compile()(params), want)
    text = program.as_text()
    assert f"x{vocab}xf32" not in text and "x25xf32" in text


def test_empty_slots_and_absent_candidates_are_zero():
    data = tiny.dataset(groups=3, candidates=(1, 3), seed=4)
    decoder = tiny.decoder()
    batch = next(all_batches(data, tiny.layout(data)))
    logps = token_logps(decoder, tiny.params(decoder, seed=0), batch)
    empty = batch.candidate_mask.shape[1] * batch.candidate_mask.shape[2]
    assert (np.asarray(logps)[batch.slot_owner == empty] == 0).all()
    assert (np.asarray(logps)[batch.slot_owner < empty] < 0).all()
    assert (np.asarray(sequence_logps(logps, batch))[~batch.candidate_mask] == 0).all()


def test_bfloat16_log_probs_are_summed_in_float32():
    data = tiny.dataset(groups=3, seed=4)
    decoder = tiny.decoder(compute_dtype="bfloat16")
    batch = next(all_batches(data, tiny.layout(data)))
    logps = token_logps(decoder, tiny.params(decoder, seed=0), batch)
    assert logps.dtype == sequence_logps(logps, batch).dtype == jnp.float32


def _log_sum_of_squares(probs, target):
    return jnp.log((probs**2).sum())


def _entropy(probs, target):
    return -(probs * jnp.log(probs)).sum()


def _correct(probs, target):
    return float((probs <= probs[target]).all())


STATISTICS_OF_PROBS = {"log_sum_sq_probs": _log_sum_of_squares, "entropy": _entropy, "correct": _correct}


def test_every_statistic_has_a_definition():
    assert STATISTICS_OF_PROBS.keys() == STATISTICS.keys()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("float64", 1e-10)])
def test_statistics_of_the_prediction(dtype, tolerance):
    """Against the softmax of ordinary logits; 0 in empty slots, and the log-probs are those without them."""
    data = tiny.dataset(groups=5, candidates=(2, 3), seed=4)
    with jax.enable_x64(dtype == "float64"):
        decoder = tiny.decoder(compute_dtype=dtype)
        params = tiny.params(decoder, dtype=dtype)
        data = _with_a_right_guess(decoder, params, data)
        (batch,) = all_batches(data, tiny.layout(data, tokens=1024))
        logps, statistics = token_statistics(decoder, params, batch, tuple(STATISTICS))
        np.testing.assert_array_equal(logps, token_logps(decoder, params, batch))
        seen = []
        for row, slot in np.argwhere(batch.slot_owner < batch.candidate_mask[0].size):
            group = data.groups[batch.example_id[row, batch.slot_owner[row, slot] // data.candidates]]
            completion = group.completions[batch.slot_owner[row, slot] % data.candidates]
            index = int((batch.slot_owner[row, :slot] == batch.slot_owner[row, slot]).sum())
            if index == 1:  # one token of each completion will do: a forward pass for each
                probs = jax.nn.softmax(_next_logits(decoder, params, group.prompt, completion[:index]))
                for name, defined in STATISTICS_OF_PROBS.items():
                    expected = defined(probs, completion[index])
                    np.testing.assert_allclose(statistics[name][row, slot], expected, rtol=tolerance)
                seen.append(float(statistics["correct"][row, slot]))
        assert len(seen) > 3 and set(seen) == {0.0, 1.0}
        for values in statistics.values():
            assert values.dtype == logps.dtype
            assert (values[batch.slot_owner == batch.candidate_mask[0].size] == 0).all()
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(GRADIENT(params, decoder, batch)))


def _with_a_right_guess(decoder, params, data):
    """The dataset with a completion whose second token is the likeliest one."""
    *others, group = data.groups
    first = group.completions[0][:1]
    guess = np.append(first, np.int32(_next_logits(decoder, params, group.prompt, first).argmax()))
    return tiny.of_groups([*others, dataclasses.replace(group, completions=(guess, *group.completions[1:]))])


def _next_logits(decoder, params, *parts):
    """`[vocab]` of the token after the parts, padded to one shape: no token sees what follows it."""
    path = np.concatenate(parts)
    return LOGITS(decoder, params, np.pad(path, (0, 2 * LONGEST - len(path)))[None])[0, len(path) - 1]


def _sum_of_statistics(params, decoder, batch):
    return sum(value.sum() for value in token_statistics(decoder, params, batch, tuple(STATISTICS))[1].values())


GRADIENT = jax.jit(jax.grad(_sum_of_statistics), static_argnums=1)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_tokens_behind_the_shortest_completion_count_as_much_as_stated(alpha):
    """However the groups are packed: a row for each would give the same."""
    data = tiny.dataset(groups=7, candidates=(1, 4), seed=6)
    rng = np.random.default_rng(0)
    for batch in all_batches(data, tiny.layout(data)):
        logps = -rng.random(batch.slot_owner.shape).astype(np.float32)
        got = np.asarray(sequence_logps(logps, batch, tail_weight=alpha))
        lengths = np.asarray(candidate_lengths(batch))
        for row, group in np.argwhere(batch.group_mask):
            completions = data.groups[batch.example_id[row, group]].completions
            shortest = min(map(len, completions))
            for candidate, completion in enumerate(completions):
                own = logps[row, batch.slot_owner[row] == group * data.candidates + candidate]
                assert lengths[row, group, candidate] == len(completion) == len(own)
                expected = own[:shortest].sum() + alpha * own[shortest:].sum()
                np.testing.assert_allclose(got[row, group, candidate], expected, rtol=1e-5)
        np.testing.assert_array_equal(got[~batch.candidate_mask], 0)


def test_gradients_of_the_head_are_not_rounded_to_the_compute_dtype():
    data = tiny.dataset(groups=8, longest=LONGEST)
    batch, params = next(iter(all_batches(data, tiny.layout(data)))), tiny.params(tiny.decoder(WINDOWED))
    decoder = tiny.decoder(WINDOWED, "bfloat16")
    gradient = jax.jit(jax.grad(lambda params: token_logps(decoder, params, batch).sum()))(params)["head"]
    assert gradient.dtype == jnp.float32 and (gradient != gradient.astype(jnp.bfloat16)).mean() > 0.5
