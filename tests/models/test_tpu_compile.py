"""Splash attention and whole DPO steps compile for TPUs, which takes libtpu and no TPU: nothing of it is run."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdpo.logprobs import token_logps
from jaxdpo.losses import LOSSES
from jaxdpo.models import abstract_params, make_decoder
from jaxdpo.models.splash import splash_attention, splash_mask
from jaxdpo.plan.shapes import known_config
from jaxdpo.plan.topology import slice_devices
from jaxdpo.sharding import BATCH_AXES, make_mesh, placed_shapes
from jaxdpo.train.objective import Counts, preference_task
from jaxdpo.train.state import abstract_state
from jaxdpo.train.step import Microbatch, make_programs
from jaxdpo.types import Batch, InputError
from tests import tiny

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"),
]

SMOLLM2_135M = known_config("smollm2-135m")
TINY = dataclasses.replace(tiny.LLAMA, vocab_size=64)
LENGTH = 1024


@functools.cache
def mesh_of(topology: str, slices: int = 1, **sizes: int) -> jax.sharding.Mesh:
    return make_mesh(slice_devices(topology, slices), **sizes)


def on_rows(mesh, shape, dtype="int32"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(BATCH_AXES)))


def check_splash(program: str) -> None:
    """The kernel is there, forward and backward, and no device holds a score or a mask for each pair of tokens."""
    assert program.count('custom_call_target="tpu_custom_call"') >= 3
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert kernel in program, kernel
    pairs = re.findall(rf"\w+\[[\d,]*\b{LENGTH},(?:{LENGTH}|{2 * LENGTH})\]", program)
    assert not pairs, set(pairs)


@pytest.mark.parametrize(
    ("topology", "sizes", "dtype", "heads", "kv_heads", "head_dim"),
    [
        ("v5e:2x2", {}, "bfloat16", 9, 3, 64),
        ("v5e:2x2", {"tensor": 4}, "bfloat16", 8, 2, 128),
        ("v5e:2x2", {"context": 4}, "bfloat16", 9, 3, 64),
        ("v5e:2x2", {}, "float32", 4, 2, 6),
        ("v5p:2x2x1", {}, "bfloat16", 9, 3, 64),
        ("v6e:2x2", {"tensor": 2}, "bfloat16", 8, 2, 128),
    ],
    ids=["v5e", "v5e-heads-split", "v5e-length-split", "v5e-float32", "v5p", "v6e"],
)
@pytest.mark.usefixtures("least_effort")
def test_attention(topology, sizes, dtype, heads, kv_heads, head_dim):
    mesh = mesh_of(topology, **sizes)
    q = on_rows(mesh, (8, LENGTH, heads, head_dim), dtype)
    k = on_rows(mesh, (8, LENGTH, kv_heads, head_dim), dtype)
    field = on_rows(mesh, (8, LENGTH))

    def total(q, k, v, *fields):
        return splash_attention(q, k, v, splash_mask(*fields)).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        check_splash(gradient.lower(q, k, k, field, field, field).compile().as_text())


def test_a_mesh_over_two_slices_has_one_for_each_copy_of_the_parameters():
    mesh = mesh_of("v5e:2x4", slices=2, tensor=2)
    assert mesh.devices.shape == (2, 4, 2, 1)
    assert [{device.slice_index for device in half.flat} for half in mesh.devices] == [{0}, {1}]
    with pytest.raises(InputError, match="data=1 on 2 slices; allowed: multiples of 2"):
        mesh_of("v5e:2x4", slices=2, fsdp=16)


def abstract_microbatch(mesh, *, rows: int, slots: int, groups: int) -> Microbatch:
    shapes = dict.fromkeys(("tokens", "positions", "group", "candidate"), (rows, LENGTH))
    shapes |= dict.fromkeys(("slot_source", "slot_target", "slot_owner"), (rows, slots))
    shapes |= dict.fromkeys(("candidate_last", "rank", "candidate_mask"), (rows, groups, 2))
    shapes["example_id"] = (rows, groups)
    fields = {name: np.zeros(shape, bool if name == "candidate_mask" else np.int32) for name, shape in shapes.items()}
    batch = Batch(**fields, label=None, margin=None)
    return placed_shapes(Microbatch(batch, np.zeros((rows, slots), np.float32)), mesh)


@pytest.mark.parametrize(
    ("config", "topology"),
    [(TINY, "v5e:2x2"), (TINY, "v5p:2x2x1"), (TINY, "v6e:2x2")],
    ids=["tiny-v5e", "tiny-v5p", "tiny-v6e"],
)
@pytest.mark.usefixtures("least_effort")
def test_a_whole_dpo_step(config, topology):
    mesh = mesh_of(topology)
    decoder = make_decoder(config, compute_dtype="bfloat16", attention="splash")
    optimizer = optax.rmsprop(1e-6, decay=0.99, eps_in_sqrt=False)
    state = abstract_state(abstract_params(decoder, mesh), optimizer, mesh)
    task = preference_task(decoder, LOSSES["sigmoid"])
    programs = make_programs(task, optimizer, jax.tree.map(lambda leaf: leaf.sharding, state))
    microbatch = abstract_microbatch(mesh, rows=8, slots=256, groups=8)
    scalars = {"beta": 0.1, "label_smoothing": 0.0}
    with jax.set_mesh(mesh):
        compiled = programs.step.lower(state, microbatch, Counts(32.0, 100.0), scalars).compile()
    check_splash(compiled.as_text())


def test_the_head_is_gathered_in_bfloat16_and_its_gradient_reduced_in_float32():
    mesh, config = mesh_of("v5e:2x2"), dataclasses.replace(SMOLLM2_135M, num_layers=1)
    decoder = make_decoder(config, compute_dtype="bfloat16", attention="splash")
    batch = abstract_microbatch(mesh, rows=8, slots=256, groups=8).batch
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda params, batch: token_logps(decoder, params, batch).sum()))
        program = gradient.lower(abstract_params(decoder, mesh), batch).compile().as_text()
    head = re.escape(f"[{config.vocab_size},{config.embed_dim}]")
    for dtype, collective in (("bf16", "all-gather"), ("f32", "all-reduce")):
        moved = " ".join(re.findall(rf"= (.*) {collective}\(", program))
        assert set(re.findall(rf"(\w+){head}", moved)) == {dtype}
