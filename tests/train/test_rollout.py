"""What PPO learns from: rewards and advantages at their tokens, however completions are packed; updates that are exact.

The numbers that packed rows give are compared with separate forward passes over unpadded texts.
"""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdpo.config import PPOOptions
from jaxdpo.data.pipeline import all_batches
from jaxdpo.sharding import batch_size_multiple, make_mesh
from jaxdpo.train.checkpoint import Checkpoints
from jaxdpo.train.ppo import ppo_step
from jaxdpo.train.ppo_programs import init_ppo_state, make_ppo_programs
from jaxdpo.train.rollout import gather_experience, of_slots, rollout_groups, rollout_layout, to_slots
from jaxdpo.types import InputError
from tests import tiny
from tests.test_docs import page, rows_under
from tests.test_logprobs import relative
from tests.test_sharding import DIVISIBLE

LENGTHS = (3, 1, 5, 2, 4, 5)
REAL = np.arange(5) < np.array(LENGTHS)[:, None]
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 61, size).astype(np.int32) for size in (4, 2, 6)]
IDS = [RNG.integers(0, 61, size).astype(np.int32) for size in LENGTHS]
SCORES = RNG.normal(size=len(LENGTHS)).astype(np.float32)
SGD = optax.chain(optax.trace(decay=0.0), optax.sgd(1.0))
"""Subtracts the gradient, and keeps it as its state."""
EXACT = PPOOptions(kl_coef=0.3, num_ppo_epochs=1, gamma=0.9, lam=0.8, whiten_advantages=False)
MESHES = {"one device": lambda: make_mesh(jax.devices()[:1]), "eight devices": lambda: make_mesh(fsdp=2, tensor=2)}


def written(ids, reason="eos"):
    return types.SimpleNamespace(ids=ids, finish_reason=reason)


def rollouts():
    """Two completions of each prompt; the second of each ended by its length."""
    pairs = [[written(IDS[2 * i]), written(IDS[2 * i + 1], "length")] for i in range(len(PROMPTS))]
    return rollout_groups(PROMPTS, pairs)


@functools.cache
def setup(on="one device"):
    """Decoder, mesh, programs, parameters of policy and reference; the value head is not 0."""
    decoder, mesh = tiny.decoder(DIVISIBLE), MESHES[on]()
    state = fresh(decoder, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return decoder, mesh, make_ppo_programs(decoder, SGD, shardings), tiny.params(decoder, mesh, seed=1)


def fresh(decoder, mesh, kl_coef=0.3):
    state = init_ppo_state(decoder, tiny.params(decoder, mesh), SGD, mesh, kl_coef)
    head = state.params["value"]
    kernel = np.random.default_rng(4).normal(size=head["kernel"].shape).astype(np.float32)
    head["kernel"] = jax.device_put(kernel, head["kernel"].sharding)
    return state


def layout_on(mesh, tokens):
    return rollout_layout(6, 5, microbatch_tokens=tokens, row_multiple=batch_size_multiple(mesh))


def experience(on="one device", options=EXACT, tokens=64):
    decoder, mesh, programs, reference = setup(on)
    with jax.set_mesh(mesh):
        return gather_experience(
            programs, fresh(decoder, mesh), reference, rollouts(), SCORES, layout_on(mesh, tokens), options
        )


@jax.jit
def text_logps(params):
    """Log-probs of the completions' tokens, from each text alone, `[completions, tokens]`; 0 behind a completion."""
    texts, sources, targets = np.zeros((6, 16), np.int32), np.zeros((6, 5), int), np.zeros((6, 5), int)
    for i, ids in enumerate(IDS):
        prompt = PROMPTS[i // 2]
        texts[i, : len(prompt) + len(ids)] = np.concatenate([prompt, ids])
        sources[i, : len(ids)], targets[i, : len(ids)] = np.arange(len(ids)) + len(prompt) - 1, ids
    logps = jax.nn.log_softmax(tiny.decoder(DIVISIBLE).logits(params, texts), axis=-1)
    return jnp.where(REAL, logps[np.arange(6)[:, None], sources, targets], 0)


def test_slots_and_completions_are_inverse():
    data = tiny.dataset(groups=20, candidates=(1, 1), seed=5)
    values = np.random.default_rng(6).normal(size=(20, 12)) * (np.arange(12) < data.slots[:, None])
    found = np.zeros_like(values)
    for batch in all_batches(data, tiny.layout(data)):
        slots = to_slots(values, batch)
        assert (slots != 0).sum() == (batch.slot_owner < batch.candidate_mask[0].size).sum()
        of_slots(slots, batch, found)
    np.testing.assert_array_equal(found, values)


def test_log_probs_and_advantages_are_those_of_separate_texts():
    decoder, _, _, reference = setup()
    found = experience()
    np.testing.assert_array_equal(found.where[:, :5], REAL)
    logps, ref_logps = (np.asarray(text_logps(params)) for params in (tiny.params(decoder), reference))
    np.testing.assert_allclose(found.logps[:, :5], logps, rtol=2e-5)
    np.testing.assert_allclose(found.ref_logps[:, :5], ref_logps, rtol=2e-5)
    for i, length in enumerate(LENGTHS):
        rewards = -0.3 * (logps - ref_logps)[i, :length]
        rewards[-1] += SCORES[i]
        values, advantage = np.append(found.values[i, :length], 0), 0.0
        assert (values[:-1] != 0).all()
        for t in reversed(range(length)):
            advantage = rewards[t] + 0.9 * values[t + 1] - values[t] + 0.9 * 0.8 * advantage
            np.testing.assert_allclose(found.advantages[i, t], advantage, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.returns[i, t], advantage + values[t], rtol=1e-4, atol=1e-5)
    assert not np.stack([x[~found.where] for x in (found.logps, found.values, found.advantages, found.returns)]).any()


def test_a_value_is_read_from_the_prefix_alone():
    """The value of a token does not depend on that token: it is the same for all first tokens of a prompt."""
    values = experience().values
    np.testing.assert_allclose(values[::2, 0], values[1::2, 0], rtol=1e-5)
    assert len(set(values[::2, 0].round(3).tolist())) == len(PROMPTS)


@pytest.mark.parametrize(("on", "tokens"), [("one device", 256), ("eight devices", 64)])
def test_packing_and_mesh_change_nothing(on, tokens):
    for name, found, expected in zip(experience()._fields, experience(on, tokens=tokens), experience(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_whitening_is_over_the_real_tokens():
    found = experience(options=dataclasses.replace(EXACT, whiten_advantages=True))
    plain = experience()
    real = plain.advantages[plain.where]
    np.testing.assert_allclose(found.advantages[plain.where], (real - real.mean()) / real.std(), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.returns, plain.returns)


def test_whitened_rewards_keep_their_mean():
    options = dataclasses.replace(EXACT, gamma=1.0, lam=1.0)

    def rewards(options):
        """What returns differ by from token to token."""
        returns = experience(options=options).returns
        return (returns - np.pad(returns[:, 1:], ((0, 0), (0, 1))))[:, :5][REAL]

    plain, white = rewards(options), rewards(dataclasses.replace(options, whiten_rewards=True))
    assert abs(plain.std() - 1) > 0.1
    np.testing.assert_allclose(white, (plain - plain.mean()) / plain.std() + plain.mean(), rtol=1e-3, atol=1e-4)


def test_a_missing_eos_costs_the_penalty():
    found = experience(options=dataclasses.replace(EXACT, missing_eos_penalty=2.0))
    np.testing.assert_allclose(found.scores, SCORES - np.array([0, 2] * 3), rtol=1e-6)


def step(on="one device", options=EXACT, tokens=64, scores=SCORES):
    decoder, mesh, programs, reference = setup(on)
    return ppo_step(
        programs, fresh(decoder, mesh), reference, rollouts(), scores, layout_on(mesh, tokens), options, seed=0
    )


def test_the_gradient_is_that_of_the_surrogate_over_separate_texts():
    options = dataclasses.replace(EXACT, vf_coef=0.0)
    decoder, _, _, _ = setup()
    found = experience(options=options)
    state, metrics = step(options=options)

    def surrogate(params):
        ratio = jnp.exp(text_logps(params) - found.logps[:, :5])
        return -(ratio * found.advantages[:, :5]).sum() / sum(LENGTHS)

    loss, expected = jax.jit(jax.value_and_grad(surrogate))(tiny.params(decoder))
    trace = state.opt_state[0].trace
    assert relative(trace["policy"], expected) < 1e-4
    assert not np.asarray(trace["value"]["kernel"]).any()
    np.testing.assert_allclose(metrics["loss/policy_avg"], loss, rtol=1e-4)


@pytest.mark.parametrize(("on", "tokens"), [("one device", 256), ("eight devices", 64)])
def test_the_update_does_not_depend_on_packing_or_mesh(on, tokens):
    (state, metrics), (expected, expected_metrics) = step(on, tokens=tokens), step()
    assert relative(jax.device_get(state.params), jax.device_get(expected.params)) < 1e-4
    assert metrics == pytest.approx(expected_metrics, rel=1e-3, abs=1e-5)


def test_the_first_ratios_are_one_and_metrics_mean_what_they_say():
    _, metrics = step()
    found = experience()
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["policy/approxkl_avg"] < 1e-10 and metrics["policy/clipfrac_avg"] == 0
    assert metrics["objective/kl"] == pytest.approx((found.logps - found.ref_logps).sum(axis=1).mean(), rel=1e-5)
    assert metrics["objective/rlhf_reward"] == pytest.approx(SCORES.mean() - 0.3 * metrics["objective/kl"], rel=1e-5)
    assert metrics["val/num_eos_tokens"] == 3 and metrics["val/length"] == pytest.approx(np.mean(LENGTHS))


def test_updates_of_a_step_are_epochs_times_mini_batches():
    options = dataclasses.replace(EXACT, num_ppo_epochs=2, num_mini_batches=3)
    state, metrics = step(options=options)
    assert int(state.step) == 6
    assert metrics["policy/approxkl_avg"] > 0 and metrics["val/ratio_var"] > 0


def test_the_penalty_follows_its_target():
    options = dataclasses.replace(EXACT, kl_target=1e-3, kl_horizon=60)
    state, metrics = step(options=options)
    assert metrics["objective/kl"] > 1.2e-3  # so the error is clipped
    assert float(state.penalty.coef) == pytest.approx(0.3 * (1 + 0.2 * 6 / 60))
    assert float(step()[0].penalty.coef) == pytest.approx(0.3)


def test_a_restored_state_goes_on_as_the_saved_one_would(tmp_path):
    options = dataclasses.replace(EXACT, kl_target=1e-3, kl_horizon=60)
    decoder, mesh, programs, reference = setup()

    def go_on(state):
        arguments = (rollouts(), SCORES, layout_on(mesh, 64), options)
        return ppo_step(programs, state, reference, *arguments, seed=1)

    state, _ = step(options=options)
    with contextlib.closing(Checkpoints(tmp_path, {})) as checkpoints:
        checkpoints.save(state)
        expected, expected_metrics = go_on(state)
        restored = checkpoints.restore(fresh(decoder, mesh))
    found, metrics = go_on(restored)
    assert metrics == expected_metrics and metrics["objective/kl_coef"] > 0.3
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_bad_scores_are_refused():
    with pytest.raises(InputError, match=r"scores have shape \(5,\) for 6 completions"):
        step(scores=SCORES[:5])
    with pytest.raises(InputError, match=r"prompts, row 1: the score is nan; allowed: a finite number; .* has tokens"):
        step(scores=np.array([0, 0, np.nan, 0, 0, 0]))
    with pytest.raises(FloatingPointError, match=r"update 1: .*not finite"):
        step(scores=np.full(6, 1e30))


def test_completions_that_cannot_be_learnt_from_are_refused():
    with pytest.raises(InputError, match="prompt 0, completion 1: 4 and 0 tokens; allowed: at least 1 each"):
        rollout_groups(PROMPTS[:1], [[written(IDS[0]), written(IDS[0][:0])]])
    with pytest.raises(InputError, match="6 completions for --num-mini-batches 7"):
        step(options=dataclasses.replace(EXACT, num_mini_batches=7))


def test_a_reference_that_is_no_copy_of_the_policy_is_refused():
    decoder, mesh, programs, _ = setup()
    state = fresh(decoder, mesh)
    policy = state.params["policy"]
    other = tiny.params(tiny.decoder(dataclasses.replace(DIVISIBLE, vocab_size=66)), mesh)
    for reference, message in (
        (other, r"the reference has \(66, 16\) at \['tokens'\], the policy \(64, 16\); allowed: .* tokenizer"),
        (policy, "policy and reference have the same array at .*; allowed: parameters of its own"),
        ({}, "the reference has nothing at"),
    ):
        with pytest.raises(InputError, match=message):
            ppo_step(programs, state, reference, rollouts(), SCORES, layout_on(mesh, 64), EXACT, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_horizon": 5}, "--kl-horizon 5 has no effect without --kl-target"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "--kl-target with --kl-coef 0"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        PPOOptions(**options)


def test_the_page_names_every_option_and_metric():
    text = page("ppo.md")
    assert rows_under("## Options", text) == [field.name for field in dataclasses.fields(PPOOptions)]
    assert sorted(rows_under("## Metrics", text)) == sorted(step()[1])
