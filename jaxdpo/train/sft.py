"""`jaxdpo sft`: a policy imitates completions; on preference data the best ones, which is the paper's Preferred-FT."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxdpo.config import SFTConfig
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.losses import LOSSES, LossSpec
from jaxdpo.train.export import export_policy
from jaxdpo.train.objective import imitation_task
from jaxdpo.train.prepare import Recipe, load_policy
from jaxdpo.train.run import RunResult, run_training


def run_sft(config: SFTConfig, *, devices: Sequence[jax.Device] | None = None) -> RunResult:
    """Fine-tunes a policy on completions, or continues to, and exports it; see `run_training`."""
    return run_training(config, SFT, devices=devices)


def _selection(config: SFTConfig) -> dict[str, Any]:
    return {"use": "imitate", "score_prompt": not config.completion_only_loss}


def _choose_loss(config: SFTConfig, datasets: Sequence[TokenizedDataset]) -> LossSpec:
    del config, datasets  # every data set has best completions
    return LOSSES["sft"]


SFT = Recipe(
    selection=_selection,
    choose_loss=_choose_loss,
    scalars=lambda config: {},
    load=load_policy,
    task=imitation_task,
    export=export_policy,
)
