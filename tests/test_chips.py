"""The table of accelerators: every device kind leads to one chip, and figures are of the right size."""

from collections import Counter

import pytest

from jaxdpo.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H200", "h200")],
)
def test_chips_by_device_kind(device_kind, name):
    assert chip_of(device_kind) is CHIPS[name]


def test_an_unknown_device_has_no_chip():
    assert chip_of("cpu") is None


def test_a_device_kind_is_of_one_chip():
    kinds = Counter(kind for chip in CHIPS.values() for kind in chip.device_kinds)
    assert max(kinds.values()) == 1 and all(kind == kind.lower() for kind in kinds)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_each_level_is_slower_than_the_one_below(chip):
    """Products outrun memory, memory the links, links the network; units that were mixed up break the order."""
    assert chip.flops / chip.memory_bandwidth > 100  # FLOPs for each byte, of any chip since 2020
    assert 1 < chip.memory_bandwidth / chip.link_bandwidth < 20
    assert 2 < chip.link_bandwidth / chip.network_bandwidth < 100
    assert 16e9 <= chip.memory_bytes < 300e9
