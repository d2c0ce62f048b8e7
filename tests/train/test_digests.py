"""A digest is the same on every mesh, and another one whenever anything of an array changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.sharding import make_mesh
from jaxdpo.train.digests import tree_digests

DTYPES = ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool"]
MESHES = [{"fsdp": 8}, {"data": 8, "fsdp": 1}, {"fsdp": 2, "tensor": 4}, {"fsdp": 2, "tensor": 2, "context": 2}]
SPECS = [jax.P(), jax.P("fsdp"), jax.P(None, "tensor"), jax.P("tensor", "fsdp"), jax.P(None, None, ("fsdp", "context"))]


def array(dtype: str) -> np.ndarray:
    return np.random.default_rng(0).integers(-100, 100, size=(8, 8, 24)).astype(dtype)


def digest(x) -> str:
    (only,) = tree_digests(x).values()
    return only


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_same_on_every_mesh(dtype):
    values = array(dtype)
    alone = digest(jax.device_put(values, jax.devices()[0]))
    for sizes in MESHES:
        mesh = make_mesh(**sizes)
        for spec in SPECS:
            assert digest(jax.device_put(values, jax.NamedSharding(mesh, spec))) == alone, (sizes, spec)


def test_it_is_what_it_says():
    """The sums, by NumPy."""
    words = array("float32").reshape(-1).view(np.uint32).astype(object)
    sums = []
    for place, first, second in ((0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35), (0x27D4EB2F, 0x2C1B3C6D, 0x297A2D39)):
        total = 0
        for i, word in enumerate(words):
            mixed = word ^ (i * place % 2**32)
            mixed = (mixed ^ mixed >> 16) * first % 2**32
            mixed = (mixed ^ mixed >> 13) * second % 2**32
            total += mixed ^ mixed >> 16
        sums.append(f"{total % 2**32:08x}")
    assert digest(array("float32")) == "".join(sums)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8"])
def test_every_flipped_bit_changes_both_sums(dtype):
    values = array(dtype)[0, :2, :3].copy()
    before = digest(values)
    for at in range(values.nbytes):
        for bit in range(8):
            flipped = values.copy()
            flipped.reshape(-1).view(np.uint8)[at] ^= 1 << bit
            after = digest(flipped)
            assert after[:8] != before[:8] and after[8:] != before[8:]


def test_places_count():
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    swapped = values.copy()
    swapped[0, 0], swapped[0, 1] = values[0, 1], values[0, 0]
    others = [values, swapped, values.T, values[::-1], np.roll(values, 1, axis=1), np.where(values < 32, values, 0)]
    assert len({digest(np.ascontiguousarray(x)) for x in others}) == len(others)


def test_zeros_of_either_sign_and_nans_are_told_apart():
    values = [
        np.float32(0.0),
        np.float32(-0.0),
        np.uint32(0x7FC00000).view(np.float32),
        np.uint32(0x7FC00001).view("f"),
    ]
    assert len({digest(x) for x in values}) == 4


def test_float64_is_two_words():
    with jax.enable_x64(True):
        values = np.random.default_rng(0).normal(size=(8, 8))
        before = digest(jnp.asarray(values))
        for spec in SPECS[:4]:
            assert digest(jax.device_put(values, jax.NamedSharding(make_mesh(fsdp=4, tensor=2), spec))) == before
        for at in (0, 3, 4, 7, 511):
            flipped = values.copy()
            flipped.reshape(-1).view(np.uint8)[at] ^= 1
            assert digest(jnp.asarray(flipped)) != before


def test_arrays_are_named_by_path_dtype_and_shape():
    tree = {"a": {"b": np.zeros((0, 3), np.float32)}, "c": np.int32(1)}
    assert tree_digests(tree) == {"['a']['b'] float32[0, 3]": "0" * 16, "['c'] int32[]": digest(np.int32(1))}
    assert digest(np.int32(1)) != digest(np.int32(0))
