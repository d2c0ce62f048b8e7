"""From work to seconds."""

import pytest

from jaxdpo.chips import CHIPS
from jaxdpo.plan.collectives import Collective
from jaxdpo.plan.costs import Costs
from jaxdpo.plan.roofline import Rates, roofline, tpu_rates

WORK = Costs(600.0, 60.0, (Collective("all-gather", "ici", 30.0, 2.0), Collective("all-reduce", "dcn", 3.0, 1.0)))


@pytest.mark.parametrize(
    ("rates", "bound", "step"),
    [
        (Rates(100.0, 60.0, 30.0, 3.0), "compute", 6.0),
        (Rates(600.0, 12.0, 30.0, 3.0), "memory", 5.0),
        (Rates(600.0, 60.0, 10.0, 3.0), "ici", 3.0),
        (Rates(600.0, 60.0, 30.0, 1.5), "dcn", 2.0),
    ],
)
def test_the_slowest_of_four_is_the_bound(rates, bound, step):
    found = roofline(WORK, rates)
    assert (found.bound, found.step) == (bound, step)
    assert set(found.seconds) == {"compute", "memory", "ici", "dcn"}


def test_what_is_not_known_is_left_out():
    assert roofline(WORK, Rates(600.0, None, None, None)).seconds == {"compute": 1.0}


def test_rates_of_one_of_a_chips_devices():
    chip = CHIPS["tpu7x"]
    whole, half = tpu_rates(chip, 1, "bfloat16"), tpu_rates(chip, 2, "bfloat16")
    assert whole == (chip.flops, chip.memory_bandwidth, chip.link_bandwidth, chip.network_bandwidth)
    assert [a / b for a, b in zip(whole, half, strict=True)] == [2.0] * 4


def test_float32_takes_six_products_of_bfloat16():
    chip = CHIPS["v5e"]
    assert tpu_rates(chip, 1, "float32").flops == chip.flops / 6
    assert tpu_rates(chip, 1, "float32").memory == chip.memory_bandwidth
