"""Known models have the parameters that their names say, or say which family is missing."""

import re

import jax
import pytest

from jaxdpo.families import FAMILIES
from jaxdpo.models import abstract_params, make_decoder
from jaxdpo.plan.shapes import SHAPES, known_config
from jaxdpo.types import InputError

SUPPORTED = [name for name, shape in SHAPES.items() if shape.config["model_type"] in FAMILIES]
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
}
"""Numbers of parameters of the checkpoints on the hub."""


def parameters(name: str) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(make_decoder(known_config(name)))))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    assert parameters(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_model_is_as_large_as_its_name_says(name):
    number, unit = re.search(r"([\d.]+)([bm])$", name).groups()
    assert parameters(name) == pytest.approx(float(number) * {"b": 1e9, "m": 1e6}[unit], rel=0.1)


def test_a_shape_without_its_family_names_the_family():
    missing = [name for name in SHAPES if name not in SUPPORTED]
    for name in missing:
        family = SHAPES[name].config["model_type"]
        with pytest.raises(InputError, match=rf"--model {name} is of the family {family}.* allowed: smollm2-135m"):
            known_config(name)


def test_an_unsupported_family_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama", None)
    with pytest.raises(InputError, match=r"--model llama-3\.1-8b is of the family llama, which is not supported yet"):
        known_config("llama-3.1-8b")
