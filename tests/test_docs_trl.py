"""The page for users of TRL names flags, commands and defaults that there are."""

import dataclasses
import re
from pathlib import Path

import pytest

from jaxdpo.cli import CONFIG_VERBS, VERBS, parse
from jaxdpo.config import DPOConfig, RewardConfig, SFTConfig
from jaxdpo.data.formats import FORMATS
from jaxdpo.losses import LOSSES
from jaxdpo.options import flag
from jaxdpo.train.choose import check_objective

PAGE = (Path(__file__).parent.parent / "docs" / "trl.md").read_text(encoding="utf-8")
TRL_LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
"""`loss_type` of TRL 1.16's DPOConfig."""


def flags(config: type) -> dict[str, dataclasses.Field]:
    return {flag(field.name): field for field in dataclasses.fields(config)}


def rows_of(section: str, level: str = "##") -> list[list[str]]:
    """Cells of the rows of a section's first table, without the head."""
    table = re.search(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE.split(f"\n{level} {section}\n")[1], re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[1].splitlines()]


def test_every_flag_is_one_of_a_command():
    there = {name for config, _ in VERBS.values() for name in flags(config)}
    there |= {"--no-" + name.removeprefix("--") for name in there}
    ours = "\n".join(line for line in PAGE.splitlines() if not line.startswith("trl "))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", ours))
    assert len(named) > 40
    assert named - there == set()


@pytest.mark.parametrize("section", ["Model and data", "Objective", "Training"])
def test_the_left_column_is_trls_and_the_right_one_ours(section):
    for theirs, ours in rows_of(section, "###"):
        assert "--" not in theirs, theirs
        assert ours, theirs


@pytest.mark.parametrize("config", [DPOConfig, SFTConfig, RewardConfig])
def test_every_option_of_training_has_its_place(config):
    """Those that TRL has no like of are the ones named here."""
    only_here = {"--unlikelihood-alpha"}
    assert {name for name in flags(config) if name not in PAGE} - only_here == set()


def test_commands_name_verbs_and_losses_that_there_are():
    verbs = set(re.findall(r"`?jaxdpo ([a-z]+)\b", PAGE))
    assert {"audit", "dpo", "sft", "reward"} <= verbs <= set(VERBS)
    losses = {name for text in re.findall(r"--loss ([a-z_,]+)", PAGE) for name in text.split(",")}
    assert {"kto", "bco", "cpo", "orpo"} <= losses <= set(LOSSES)


@pytest.mark.parametrize("options", re.findall(r"`(--loss [^`]+)`", PAGE))
def test_objectives_go_together(options):
    _, config = parse(["dpo", "--model", "m", "--data", "d", "--output-dir", "o", *options.split()])
    check_objective(config)


def test_all_losses_of_trl_are_there():
    assert set(TRL_LOSSES) <= set(LOSSES)
    assert f"all {len(TRL_LOSSES)} of `DPOConfig`" in PAGE


def test_every_format_is_named():
    assert [name for name in FORMATS if f"[`{name}`](formats/{name}.md)" not in PAGE] == []


def test_defaults_are_those_of_the_commands():
    configs = [VERBS[verb][0] for verb in ("dpo", "sft", "reward")]
    assert set(configs) == {VERBS[verb][0] for verb in CONFIG_VERBS}
    for cell, _, *defaults in rows_of("Defaults"):
        name = cell.strip("`")
        for config, text in zip(configs, defaults, strict=True):
            default = flags(config)[name].default
            assert type(default)(text) == default, f"{name} of {config.__name__}"
