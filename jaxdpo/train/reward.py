"""`jaxdpo reward`: a reward model learns preferences; its most accurate checkpoint is exported, with mean reward 0."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxdpo.config import RewardConfig
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.pipeline import first_epoch
from jaxdpo.hf import load_reward_model
from jaxdpo.losses import REWARD_LOSSES, LossSpec
from jaxdpo.rewards import Centering, center_rewards
from jaxdpo.train.export import write_export
from jaxdpo.train.objective import reward_task
from jaxdpo.train.prepare import Prepared, Recipe
from jaxdpo.train.run import RunResult, run_training
from jaxdpo.train.run_dir import RunDir
from jaxdpo.types import InputError

CENTERED_GROUPS = 8192
"""Training groups whose rewards are given the mean 0, of those that a run has seen: enough for a standard error of 1 %
of the rewards' deviation."""
UNEVEN = 0.1
"""Deviation of the shift over that of the rewards from which the shift may change what a model has learnt."""


def run_reward(config: RewardConfig, *, devices: Sequence[jax.Device] | None = None) -> RunResult:
    """Trains a reward model, or continues to, and exports it as a sequence classifier; see `run_training`."""
    return run_training(config, REWARD, devices=devices)


def _choose_loss(config: RewardConfig, datasets: Sequence[TokenizedDataset]) -> LossSpec:
    """Bradley-Terry for pairs, Plackett-Luce for rankings; InputError for data in which nothing is compared."""
    for name, dataset in zip((config.data, config.eval_data), datasets, strict=False):
        if dataset.labelled or len(dataset.singles):
            first = 0 if dataset.labelled else dataset.singles[0]
            raise InputError(
                f"{dataset.groups[first].origin}: there is one completion, and a reward model learns from several that "
                f"are compared; allowed: pairs or rankings; give other data than {name}"
            )
    ranked = any(dataset.has_ranks for dataset in datasets)
    if not ranked and all(dataset.candidates == 2 for dataset in datasets):
        loss = REWARD_LOSSES["bradley_terry"]
        margins = any(dataset.has_margins for dataset in datasets)
        return loss if margins else loss._replace(data=())
    for option, given in (
        ("--center-rewards-coefficient", config.center_rewards_coefficient is not None),
        ("the stated margin of a pair", any(dataset.has_margins for dataset in datasets)),
    ):
        if given:
            raise InputError(
                f"{option} has no effect on rankings (Plackett-Luce); allowed with pairs only; drop it, or train on "
                "pairs alone"
            )
    loss = REWARD_LOSSES["plackett_luce"]
    return loss if ranked else loss._replace(data=())


def _scalars(config: RewardConfig) -> dict[str, Any]:
    coefficient = config.center_rewards_coefficient
    return {} if coefficient is None else {"center_rewards_coefficient": coefficient}


def _load(config: RewardConfig, source: Path, **placement: Any) -> tuple[Any, dict]:
    return load_reward_model(source, seed=config.seed, **placement)


def _start(ready: Prepared) -> dict:
    """Rewards begin around 0, so that little is left to be moved when they are trained."""
    return _centered(ready, ready.params, steps=1)[0]


def _centered(ready: Prepared, params: dict, steps: int) -> tuple[dict, Centering]:
    """Parameters with mean reward 0 over the completions of the first steps."""
    dataset = ready.data[0].dataset
    total = min(len(dataset), steps * ready.config.batch_size)
    batches = first_epoch(dataset, ready.order, ready.layout, steps)
    return center_rewards(ready.model, params, batches, ready.mesh, label="mean reward", total=total)


def _export(run: RunDir, ready: Prepared, params: dict) -> None:
    steps = min(ready.schedule.total, math.ceil(CENTERED_GROUPS / ready.config.batch_size))
    params, found = _centered(ready, params, steps)
    print(
        f"rewards    mean {found.mean_before:+.4f} -> 0, deviation {found.reward_std:.4f}; all moved alike to within "
        f"{found.shift_std:.1e}"
    )
    if found.shift_std > UNEVEN * found.reward_std:
        print("           that is uneven enough to change the order of near completions: train on more data, or longer")
    write_export(run.export, ready.model, params, run, overwrite=True)


REWARD = Recipe(
    head="score",
    choose_loss=_choose_loss,
    scalars=_scalars,
    load=_load,
    task=reward_task,
    export=_export,
    start=_start,
    keep_best="eval_accuracy",
)
