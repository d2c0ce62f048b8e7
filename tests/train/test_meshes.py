"""Three steps on every mesh are those of one device: losses, gradients and updates."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest

from jaxdpo.data.pipeline import all_batches, microbatches
from jaxdpo.logprobs import token_logps
from jaxdpo.losses import LOSSES, REWARD_LOSSES
from jaxdpo.models import abstract_params, make_decoder
from jaxdpo.reference import dataset_logps, make_logp_program, slot_logps
from jaxdpo.sharding import batch_size_multiple, make_mesh, place_batch
from jaxdpo.train.objective import preference_task, reward_task, step_counts
from jaxdpo.train.state import init_state
from jaxdpo.train.step import Microbatch, make_programs, run_step
from tests import tiny

MODELS = {
    "llama": dataclasses.replace(tiny.LLAMA, vocab_size=64, max_positions=512),
    "one key/value head": dataclasses.replace(tiny.LLAMA, vocab_size=64, max_positions=512, num_kv_heads=1),
    "gpt2": dataclasses.replace(tiny.GPT2, vocab_size=64, max_positions=512),
}
MESHES = {
    "data 8": {"data": 8, "fsdp": 1},
    "fsdp 8": {"fsdp": 8},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 2, tensor 4": {"fsdp": 2, "tensor": 4},
    "fsdp 2, context 4": {"fsdp": 2, "context": 4},
    "fsdp 2, tensor 2, context 2": {"fsdp": 2, "tensor": 2, "context": 2},
}
PAIRS = tiny.dataset(groups=24, longest=24)
RANKINGS = tiny.dataset(groups=24, candidates=(2, 4), longest=16, seed=1, ranked=True)
TASKS = {
    "dpo": (PAIRS, LOSSES["sigmoid"], preference_task),
    "rankings": (RANKINGS, LOSSES["plackett_luce"]._replace(data=()), preference_task),
    "reward model": (PAIRS, REWARD_LOSSES["bradley_terry"]._replace(data=()), reward_task),
}
SCALARS = {"beta": 0.1, "label_smoothing": 0.0}
OPTIMIZER = optax.chain(optax.trace(decay=0.0), optax.rmsprop(1e-3, decay=0.99, eps_in_sqrt=False))
"""Keeps the gradient as its first state."""
LENGTH = 512
"""Long enough for four devices of 128 tokens each."""


@functools.cache
def three_steps(task, model, attention, dtype, mesh):
    """Of each step the losses by example, the gradient, and the change of the parameters."""
    data, loss, make_task = TASKS[task]
    config = dataclasses.replace(MODELS[model], head="score" if make_task is reward_task else "lm")
    decoder = make_decoder(config, compute_dtype=dtype, attention=attention)
    on = make_mesh(jax.devices()[:1]) if mesh is None else make_mesh(**MESHES[mesh])
    layout = tiny.layout(data, tokens=LENGTH * 8, row_multiple=batch_size_multiple(on), row_lengths=(LENGTH,))
    taken = []
    with jax.set_mesh(on):
        state = init_state(tiny.params(decoder, on, dtype=dtype), OPTIMIZER, on, loss=loss)
        programs = make_programs(make_task(decoder, loss), OPTIMIZER, jax.tree.map(lambda x: x.sharding, state))
        reference = None
        if loss.needs_reference:
            first = tiny.params(decoder, on, seed=1, dtype=dtype)
            batches = all_batches(data, layout)
            reference = dataset_logps(make_logp_program(decoder), first, batches, on, label="reference")
        for step in np.split(np.arange(len(data)), 3):
            host = microbatches(data, step, layout)
            made = [Microbatch(b, None if reference is None else slot_logps(reference, b)) for b in host]
            before = jax.device_get(state.params)
            state, _, losses = run_step(programs, state, place_batch(made, on), step_counts(host), SCALARS)
            by_example = {
                int(example): float(loss[row, group])
                for batch, loss in zip(host, losses, strict=True)
                for row, group in np.argwhere(batch.group_mask)
                for example in [batch.example_id[row, group]]
            }
            change = jax.tree.map(np.subtract, jax.device_get(state.params), before)
            taken.append((by_example, jax.device_get(state.opt_state[0].trace), change))
    return taken


def distance(tree, other) -> float:
    """The norm of the difference, relative to that of the second, of all tensors together."""
    return float(optax.tree.norm(jax.tree.map(np.subtract, tree, other)) / optax.tree.norm(other))


def largest_distance(tree, other) -> float:
    """`distance` of the tensor where it is largest."""
    return max(map(distance, jax.tree.leaves(tree), jax.tree.leaves(other)))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("task", "model", "attention"),
    [
        ("dpo", "llama", "blockwise"),
        ("dpo", "one key/value head", "dense"),
        ("rankings", "gpt2", "blockwise"),
        ("reward model", "llama", "dense"),
    ],
)
def test_float64(task, model, attention, mesh):
    with jax.enable_x64(True):
        alone = three_steps(task, model, attention, "float64", None)
        for got, want in zip(three_steps(task, model, attention, "float64", mesh), alone, strict=True):
            assert got[0] == pytest.approx(want[0], rel=1e-9)
            assert distance(got[1], want[1]) < 1e-9
            assert distance(got[2], want[2]) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_float32(mesh):
    alone = three_steps("dpo", "llama", "blockwise", "float32", None)
    for got, want in zip(three_steps("dpo", "llama", "blockwise", "float32", mesh), alone, strict=True):
        assert got[0] == pytest.approx(want[0], rel=1e-5)
        assert largest_distance(got[1], want[1]) < 1e-5
        assert distance(got[2], want[2]) < 1e-2


@pytest.mark.parametrize("mesh", MESHES)
def test_no_collective_carries_logits(mesh):
    """Nothing larger than the LM head goes between devices, and logits of one chunk are several times that."""
    config = dataclasses.replace(MODELS["llama"], vocab_size=4096)
    decoder, on = make_decoder(config, attention="blockwise"), make_mesh(**MESHES[mesh])
    data = tiny.dataset(groups=64, longest=60)
    layout = tiny.layout(data, tokens=LENGTH * 8, row_multiple=batch_size_multiple(on), row_lengths=(LENGTH,))
    batch = place_batch(microbatches(data, np.arange(len(data)), layout)[0], on)
    with jax.set_mesh(on):
        gradient = jax.jit(jax.grad(lambda params, batch: token_logps(decoder, params, batch).sum()))
        program = gradient.lower(abstract_params(decoder, on), batch).compile().as_text()
    moved = r"(.*) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    shapes = [shape for outputs in re.findall(moved, program) for shape in re.findall(r"\w\[([\d,]+)\]", outputs)]
    sizes = [np.prod([int(size) for size in shape.split(",")]) for shape in shapes]
    assert sizes and max(sizes) <= config.vocab_size * config.embed_dim
