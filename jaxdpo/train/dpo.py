"""`jaxdpo dpo`: a policy learns from preferences, against a reference or without one."""

from collections.abc import Sequence

import jax

from jaxdpo.config import DPOConfig
from jaxdpo.train.choose import check_objective, choose_loss, scalars_of, with_needed_partners
from jaxdpo.train.export import export_policy
from jaxdpo.train.objective import preference_task
from jaxdpo.train.prepare import Recipe, load_policy
from jaxdpo.train.run import RunResult, run_training

DPO = Recipe(
    check=check_objective,
    adapt=with_needed_partners,
    choose_loss=choose_loss,
    scalars=scalars_of,
    load=load_policy,
    task=preference_task,
    export=export_policy,
)


def run_dpo(config: DPOConfig, *, devices: Sequence[jax.Device] | None = None) -> RunResult:
    """Trains a policy on preferences, or continues to, and exports it; see `run_training`."""
    return run_training(config, DPO, devices=devices)
