"""Where arrays live: the mesh, the one table from logical to mesh axes, and what does not divide is refused."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest

from jaxdpo.models import abstract_params, logical_axes
from jaxdpo.sharding import (
    AXIS_RULES,
    MESH_AXES,
    batch_size_multiple,
    constrain,
    length_multiple,
    make_mesh,
    mesh_sizes,
    mesh_summary,
    named_sharding,
    partition_spec,
    place_batch,
    replicated,
    tokens_apart,
)
from jaxdpo.train.optimizer import OPTIMIZERS
from jaxdpo.train.state import init_state
from jaxdpo.types import InputError
from tests import tiny

DIVISIBLE = dataclasses.replace(tiny.LLAMA, vocab_size=64)
"""Sizes that a tensor axis of two divides."""


@pytest.mark.parametrize(
    "options, shape",
    [
        ({}, (1, 8, 1, 1)),
        ({"tensor": 2}, (1, 4, 2, 1)),
        ({"fsdp": 2}, (4, 2, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2, 1)),
        ({"fsdp": 1, "tensor": 8}, (1, 1, 8, 1)),
        ({"data": 2}, (2, 4, 1, 1)),
        ({"data": 2, "tensor": 2}, (2, 2, 2, 1)),
        ({"data": 4, "fsdp": 2}, (4, 2, 1, 1)),
        ({"context": 4}, (1, 2, 1, 4)),
        ({"data": 2, "tensor": 2, "context": 2}, (2, 1, 2, 2)),
    ],
)
def test_mesh_takes_all_devices(options, shape):
    mesh = make_mesh(**options)
    assert dict(mesh.shape) == dict(zip(MESH_AXES, shape, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())
    assert tokens_apart(mesh) == 8 // mesh.shape["tensor"]
    assert batch_size_multiple(mesh) == tokens_apart(mesh) // mesh.shape["context"]
    assert length_multiple(mesh) == {1: 1, 2: 256, 4: 512}[mesh.shape["context"]]


def test_a_mesh_that_leaves_devices_out_is_refused():
    with pytest.raises(InputError, match="data=2 x fsdp=2 takes 4 of 8 devices; allowed: all of them"):
        make_mesh(data=2, fsdp=2)


@pytest.mark.parametrize("text, sizes", [("fsdp=4", {"fsdp": 4}), (" data=2, tensor = 4", {"data": 2, "tensor": 4})])
def test_sizes_are_read(text, sizes):
    assert mesh_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp=", "fsdp=0", "fsdp=-1", "fsdp=2.0", "rows=2", "fsdp=2,fsdp=4", "4"])
def test_a_mesh_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="allowed: auto, or sizes of data, fsdp, tensor, context, each axis once"):
        mesh_sizes(text)


def test_a_mesh_is_told_by_its_wide_axes():
    assert mesh_summary(make_mesh(fsdp=2, tensor=2)) == "8 device(s), data=2,fsdp=2,tensor=2"
    assert mesh_summary(make_mesh(jax.devices()[:1])) == "1 device(s)"


def test_mesh_of_one_device():
    mesh = make_mesh(jax.devices()[3:4])
    assert mesh.devices.tolist() == [[[[jax.devices()[3]]]]]
    assert batch_size_multiple(mesh) == 1


@pytest.mark.parametrize(
    "options", [{"fsdp": 3}, {"tensor": 3}, {"fsdp": 16}, {"tensor": 16}, {"tensor": 0}, {"fsdp": 0}]
)
def test_mesh_that_does_not_divide_the_devices_is_refused(options):
    with pytest.raises(InputError, match=r"does not divide 8 devices; allowed: divisors of 8, \[1, 2, 4, 8\]"):
        make_mesh(**options)


def test_rules_name_axes_of_the_mesh_only():
    for axes in AXIS_RULES.values():
        assert {*(axes if isinstance(axes, tuple) else (axes,))} - {None} <= set(MESH_AXES)


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2])
def test_every_logical_axis_of_a_model_has_a_rule(config):
    axes = jax.tree.leaves(logical_axes(tiny.decoder(config)), is_leaf=lambda node: isinstance(node, tuple))
    assert axes and {name for names in axes for name in names} <= set(AXIS_RULES)


def test_partition_spec_follows_the_rules():
    mesh = make_mesh(tensor=4)
    kernel = partition_spec(("layers", "embed", "heads", "head_dim"), (2, 32, 8, 4), mesh)
    assert kernel == jax.P(None, ("fsdp", "context"), "tensor", None)
    assert partition_spec(("batch", None, "vocab"), (8, 3, 64), mesh) == jax.P(("data", "fsdp"), None, "tensor")
    with pytest.raises(KeyError, match="embd"):
        partition_spec(("embd",), (32,), mesh)


@pytest.mark.parametrize(("kv_heads", "split"), [(8, True), (4, True), (2, False), (6, False)])
def test_key_value_heads_are_split_where_the_tensor_axis_divides_them(kv_heads, split):
    spec = partition_spec(("embed", "kv_heads", "head_dim"), (32, kv_heads, 4), make_mesh(tensor=4))
    assert spec == jax.P(("fsdp", "context"), "tensor" if split else None, None)


@pytest.mark.parametrize(
    "axes, shape, message",
    [
        (
            ("vocab", "embed"),
            (64, 6),
            r"embed=6 is not divisible by the \('fsdp', 'context'\) axis of 4 devices; allowed: \[1, 2, 3, 6\]",
        ),
        (
            ("vocab", "embed"),
            (61, 8),
            r"vocab=61 is not divisible by the 'tensor' axis of 2 devices; allowed: \[1, 61\]",
        ),
        (
            ("batch", None),
            (6, 5),
            r"batch=6 is not divisible by the \('data', 'fsdp'\) axis of 4 devices; allowed: \[1,",
        ),
    ],
)
def test_a_size_that_does_not_divide_names_those_that_do(axes, shape, message):
    with pytest.raises(InputError, match=message):
        named_sharding(make_mesh(tensor=2), axes, shape)


def test_a_model_that_does_not_divide_is_refused():
    with pytest.raises(
        InputError,
        match=r"embed=18 is not divisible by the \('fsdp', 'context'\) axis of 8 devices; allowed: \[1, 2, 3",
    ):
        abstract_params(tiny.decoder(dataclasses.replace(tiny.LLAMA, embed_dim=18)), make_mesh())


def expected_bytes(leaf, names, mesh) -> int:
    """What one device holds of an array with these logical axes."""
    axes = jax.tree.leaves([*partition_spec(names, leaf.shape, mesh)])
    return leaf.nbytes // math.prod(mesh.shape[axis] for axis in axes)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}, {"fsdp": 2, "tensor": 4}, {"context": 4}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_a_device_holds_falls_with_their_number(optimizer, sizes):
    config = dataclasses.replace(DIVISIBLE, embed_dim=64, num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=256)
    mesh = make_mesh(**sizes)
    params = tiny.params(tiny.decoder(config), mesh)
    state = init_state(params, OPTIMIZERS[optimizer](optax.constant_schedule(1.0)), mesh)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    whole = sum(leaf.nbytes for leaf in leaves)
    for device in mesh.devices.flat:
        held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device)
        assert held == pytest.approx(whole / mesh.size, rel=0.1)


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"context": 4}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_and_optimizer_state_are_really_split(optimizer, sizes):
    mesh = make_mesh(**sizes)
    decoder = tiny.decoder(DIVISIBLE)
    state = init_state(tiny.params(decoder, mesh), OPTIMIZERS[optimizer](optax.constant_schedule(1.0)), mesh)
    axes = logical_axes(decoder)

    def check(leaf, names):
        assert leaf.sharding == named_sharding(mesh, names, leaf.shape)
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {expected_bytes(leaf, names, mesh)}

    jax.tree.map(check, state.params, axes)
    moments = [
        s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda n: isinstance(n, dict)) if isinstance(s, dict)
    ]
    assert len(moments) == {"rmsprop": 1, "adamw": 2}[optimizer]
    for moment in moments:
        jax.tree.map(check, moment, axes)
    largest = state.params["blocks"]["mlp"]["up"]["kernel"]  # [layers, embed, mlp], split 8 ways
    assert largest.addressable_shards[0].data.nbytes * 8 == largest.nbytes


def test_batches_are_split_by_rows():
    placed = place_batch({"tokens": np.arange(16).reshape(8, 2)}, make_mesh(tensor=2))["tokens"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(placed, np.arange(16).reshape(8, 2))


def test_replicated_arrays_are_whole_everywhere():
    placed = jax.device_put(np.arange(3), replicated(make_mesh()))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(3,)}


def test_constrain_does_nothing_without_a_mesh():
    x = np.ones((3, 5))
    assert constrain(x, "batch", "embed") is x


def test_constrain_keeps_the_batch_axis_on_the_mesh():
    with jax.set_mesh(make_mesh()):
        y = jax.jit(lambda x: constrain(x + 1, "batch", None))(np.ones((8, 5), np.float32))
    assert {shard.data.shape for shard in y.addressable_shards} == {(1, 5)}
