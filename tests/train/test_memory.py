"""The estimate of a step's memory, held against what XLA's compiler plans, and what is chosen by it."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from jaxdpo.config import DPOConfig
from jaxdpo.data.pipeline import microbatches
from jaxdpo.logprobs import token_logps
from jaxdpo.models import abstract_params, make_decoder
from jaxdpo.models.remat import REMAT
from jaxdpo.sharding import make_mesh, placed_shapes
from jaxdpo.train import memory
from jaxdpo.types import RunStopped
from tests import tiny

MESH = make_mesh(jax.devices()[:1])
WIDE = dataclasses.replace(
    tiny.LLAMA,
    vocab_size=4096,
    embed_dim=128,
    num_layers=8,
    num_heads=4,
    head_dim=32,
    mlp_dim=384,
    max_positions=2048,
)


@pytest.mark.parametrize(("attention", "remat"), [("blockwise", remat) for remat in REMAT] + [("dense", "full")])
def test_activations_are_what_the_compiler_plans(attention, remat):
    decoder = make_decoder(WIDE, attention=attention, remat=remat)
    data = tiny.dataset(groups=16, longest=100)
    layout = tiny.layout(data, tokens=1024, row_lengths=(512,))
    (batch, *_) = microbatches(data, np.arange(len(data)), layout)
    params = abstract_params(decoder)
    gradient = jax.jit(jax.grad(lambda params, batch: token_logps(decoder, params, batch).sum()))
    planned = gradient.lower(params, batch).compile().memory_analysis().temp_size_in_bytes
    assert planned == pytest.approx(memory.layout_bytes(decoder, layout, MESH), rel=0.3)


def test_the_sum_of_the_heads_gradient_is_counted_where_devices_share_tokens():
    """Of a large vocabulary on eight devices, whose parts of it are small."""
    mesh, config = make_mesh(), dataclasses.replace(WIDE, vocab_size=16384, num_layers=2)
    decoder = make_decoder(config, attention="blockwise", remat="full")
    data = tiny.dataset(groups=16, longest=100)
    layout = tiny.layout(data, tokens=1024, row_lengths=(256,), row_multiple=8)
    (batch, *_) = microbatches(data, np.arange(len(data)), layout)
    params = abstract_params(decoder, mesh)
    with jax.set_mesh(mesh):
        gradient = jax.jit(
            jax.grad(lambda params, batch: token_logps(decoder, params, batch).sum()),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, params),
        )
        program = gradient.lower(params, placed_shapes(batch, mesh)).compile()
    planned = program.memory_analysis().temp_size_in_bytes
    assert memory.head_bytes(decoder, mesh) == 2 * 4 * config.vocab_size * config.embed_dim
    assert planned == pytest.approx(memory.layout_bytes(decoder, layout, mesh), rel=0.3)
    assert memory.head_bytes(decoder, MESH) == 0


def test_the_state_is_parameters_moments_and_gradients():
    params = tiny.params(tiny.decoder())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    one_moment = optax.rmsprop(1e-3)
    placed = jax.device_put(params, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    for accumulates, copies, want in ((False, 0, 3), (True, 0, 4), (True, 1, 5)):
        got = memory.state_bytes(placed, one_moment, accumulates=accumulates, copies=copies)
        assert got == pytest.approx(want * size, rel=0.01)


@pytest.mark.parametrize(("share", "chosen"), [(1.1, "projections"), (0.9, "attention"), (1e-3, "full")])
def test_the_fastest_policy_that_fits_is_chosen(monkeypatch, share, chosen):
    decoder = make_decoder(WIDE, attention="blockwise")
    layout = tiny.layout(tiny.dataset(groups=16, longest=100), tokens=1024, row_lengths=(512,))
    state = 1 << 20
    needed = state + memory.layout_bytes(dataclasses.replace(decoder, remat="projections"), layout, MESH)
    monkeypatch.setattr(memory, "USABLE", {"cpu": 1.0})
    monkeypatch.setattr(memory, "device_memory", lambda device: int(share * needed))
    assert memory.choose_remat(decoder, layout, state, MESH).remat == chosen


def test_memory_of_a_host():
    assert 2**28 < memory.device_memory(jax.devices()[0]) < 2**50


def test_too_little_memory_says_what_to_change(tmp_path):
    config = DPOConfig(model="m", data="d", output_dir=str(tmp_path), microbatch_tokens=4096, remat="attention")
    full = dataclasses.replace(config, remat="full")
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes\nmore")
    said = r"allocating 5 bytes\); fix: --remat full, or --microbatch-tokens below 4096 in another"
    with pytest.raises(RunStopped, match=said), memory.memory_advice(config):
        raise error
    with pytest.raises(RunStopped, match=r"fix: --microbatch-tokens below 4096"), memory.memory_advice(full):
        raise error
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.memory_advice(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: other")
