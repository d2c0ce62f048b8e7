"""Names of topologies: those that exist, what is said of others, and of a machine without the compiler."""

import importlib.util

import pytest

from jaxdpo.chips import CHIPS
from jaxdpo.config import PlanConfig
from jaxdpo.plan.topology import SLICES, USABLE_GIB, check_compiler, check_topology, chips_of
from jaxdpo.types import InputError


@pytest.mark.parametrize("name", ["local", *(f"{chip}:{shapes[-1]}" for chip, shapes in SLICES.items())])
def test_names_that_exist(name):
    check_topology(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "v5x:4x4",
            r"'v5x:4x4' names no TPU; did you mean v5\w\? allowed: local, or CHIP:SHAPE with one of v4",
        ),
        ("somewhere", "'somewhere' names no TPU; allowed: local"),
        ("v5e", "v5e has no slice ''; allowed: 1x1, 2x2, 2x4, 4x4"),
        ("v5e:3x3", "v5e has no slice '3x3'; allowed: 1x1, 2x2, 2x4, 4x4"),
        ("v5p:4x4", "v5p has no slice '4x4'; allowed: 2x2x1, 2x2x2"),
    ],
)
def test_names_that_do_not(name, said):
    with pytest.raises(InputError, match=said):
        check_topology(name)


def test_every_chip_of_the_table_has_rates_and_a_limit():
    assert set(SLICES) == set(USABLE_GIB) < set(CHIPS)
    for name, chip in ((name, CHIPS[name]) for name in SLICES):
        devices = 2 if name == "v4" else chip.devices  # libtpu describes a v4 chip as two devices
        assert 0.95 < USABLE_GIB[name] * devices * 2**30 / chip.memory_bytes < 1.01, name


@pytest.mark.parametrize("option", [{"slices": 2}, {"quick": True}])
def test_options_that_only_tpus_have(option):
    with pytest.raises(InputError, match=r"--(slices 2|quick) has no effect on local devices; name a TPU's --topology"):
        PlanConfig(model="m", **option)
    PlanConfig(model="m", topology="v5e:2x4", **option)


def test_chips_of_a_slice():
    assert chips_of("v5e:4x8") == (CHIPS["v5e"], 32)
    assert chips_of("v5p:4x4x8") == (CHIPS["v5p"], 128)


def test_without_libtpu_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"v5e:2x2 needs libtpu.* install it: pip install 'jaxdpo\[tpu\]'"):
        check_compiler("v5e:2x2")
    check_compiler("local")
