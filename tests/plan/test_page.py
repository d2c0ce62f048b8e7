"""What the page about plans shows is what the code has: rates, known shapes, keys, the table of slices."""

import json
import re
from pathlib import Path

import pytest

from jaxdpo.chips import CHIPS
from jaxdpo.plan.report import report
from jaxdpo.plan.shapes import SHAPES
from jaxdpo.plan.topology import SLICES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
PLANS = json.loads((ROOT / "benchmarks/results/which_slice.json").read_text(encoding="utf-8"))


def test_rates_are_those_of_the_table_of_chips():
    rows = [
        f"| {name} | {chip.flops / 1e12:g} | {chip.memory_bytes / 2**30:g} GiB | {chip.memory_bandwidth / 1e9:g} "
        f"| {chip.link_bandwidth / 1e9:g} | {chip.network_bandwidth / 1e9:g} |"
        for name, chip in CHIPS.items()
        if name in SLICES
    ]
    assert "\n".join(rows) in PAGE


def test_every_known_shape_is_named():
    assert all(f"`{name}`" in PAGE for name in SHAPES)


def test_the_table_of_slices_is_that_of_the_script():
    assert (ROOT / "benchmarks/results/which_slice.md").read_text(encoding="utf-8") in PAGE


def test_the_example_is_what_the_command_prints():
    command = re.search(r"jaxdpo plan --model (\S+) --topology (\S+) --quick\n", PAGE)
    plan = PLANS[f"{command[1]} on {command[2]}"]
    assert plan["quick"] and report(plan) in PAGE


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_of_the_table_fits_and_its_flops_are_those_of_arithmetic(name):
    plan = PLANS[name]
    assert plan["fits"] and plan["hbm_gib_per_chip"] <= plan["hbm_limit_gib"]
    assert plan["flops_per_step"] == pytest.approx(plan["flops_per_step_by_arithmetic"], rel=0.05)


def test_every_key_is_explained():
    table = PAGE.split("| key | is |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(next(iter(PLANS.values())))
