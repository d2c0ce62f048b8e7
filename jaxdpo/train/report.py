"""What a run prints when it is done: what it changed, where everything lies, what to try next."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxdpo import processes
from jaxdpo.config import DPOConfig, RewardConfig, RunConfig, SFTConfig
from jaxdpo.train.forecast import duration
from jaxdpo.train.run import RunResult
from jaxdpo.train.run_dir import RunDir
from jaxdpo.train.stopwatch import PHASES
from jaxdpo.train.watch import Timing, Usage

SHOWN: dict[type, dict[str, str]] = {
    DPOConfig: {"accuracy": "rewards/accuracies", "margin": "rewards/margins"},  # single completions have no accuracy
    SFTConfig: {"loss": "loss", "tokens right": "mean_token_accuracy"},
    RewardConfig: {"accuracy": "accuracy", "margin": "margin"},
}
"""What is shown of an evaluation: label -> metric."""


def print_report(result: RunResult, config: RunConfig) -> None:
    """Prints held-out metrics before and after (where there is held-out data), files and a next command.

    Of several processes the first prints.
    """
    with processes.only_main_prints():
        _print(result, config)


def _print(result: RunResult, config: RunConfig) -> None:
    run = RunDir(Path(config.output_dir))
    print(f"\ndone       step {result.steps}, {duration(result.seconds)}")
    if result.usage is not None:
        print(f"time       {_steps(result.usage.timing)}")
        if result.usage.timing.steps:
            print(f"speed      {_speed(result.usage)}")
        print(f"goodput    {_goodput(result.usage)}")
    if result.before is not None and result.after is not None:
        print(f"held out   {result.after.examples} examples, before -> after")
        for label, name in SHOWN[type(config)].items():
            if f"eval_{name}" in result.after.metrics:
                before, after = (of.metrics[f"eval_{name}"] for of in (result.before, result.after))
                known = label == "margin" and result.after.margins is not None
                error = f" (standard error {result.after.margin_standard_error:.3f})" if known else ""
                print(f"  {label:13}{before:.3f} -> {after:.3f}{error}")
    print(f"files      {run.root}: metrics.jsonl, curves.png, config.yaml, checkpoints/")
    print(f"export     {run.export}: load it with transformers{'' if isinstance(config, RewardConfig) else ' or vLLM'}")
    print(f"try next   {shlex.join([_command(), *NEXT[type(config)](config, run)])}")


def _steps(timing: Timing) -> str:
    """Where the time of the steps went, for people."""
    first = f"first step {duration(timing.first)} (compiles)"
    if not timing.steps:
        return first
    waiting = timing.waited / timing.seconds
    return f"{first}, then {timing.seconds / timing.steps:.3g} s a step, {waiting:.1%} of it waiting for data"


def _speed(usage: Usage) -> str:
    """What these steps, those that compile left out, made of the devices, for people."""
    return (
        f"{usage.tokens_per_second_per_device:,.0f} tokens/s a device, MFU {usage.mfu:.1%} of "
        f"{usage.peak.flops / 1e12:.3g} TFLOP/s ({usage.peak.source})"
    )


def _goodput(usage: Usage) -> str:
    """Which share of the time until the end of training was of use, and where the rest went, for people."""
    total = sum(usage.spent.values())
    cached = f", {usage.cached} from the cache" if usage.cached else ""
    notes = {"compilation": f" ({usage.programs} programs{cached})"}
    others = [
        f"{name} {usage.spent[phase] / total:.1%}{notes.get(phase, '')}"
        for phase, name in PHASES.items()
        if phase != "step" and usage.spent[phase]
    ]
    return f"{usage.goodput:.1%} of {duration(total)} in steps that count\n{' ' * 11}{', '.join(others)}"


def _with_another_beta(config: Any, run: RunDir) -> list[str]:
    return ["dpo", "--config", str(run.config), "--beta", "0.3", "--output-dir", f"{run.root}-beta-0.3"]


def _preferences(config: Any, run: RunDir) -> list[str]:
    return ["dpo", "--model", str(run.export), "--data", "PREFERENCES", "--output-dir", f"{run.root}-dpo"]


def _score(config: Any, run: RunDir) -> list[str]:
    data = config.eval_data or config.data
    return ["score", "--model", str(run.export), "--data", data, "--output", f"{run.root}/scores.jsonl"]


NEXT: dict[type, Callable[[Any, RunDir], list[str]]] = {
    DPOConfig: _with_another_beta,
    SFTConfig: _preferences,
    RewardConfig: _score,
}
"""Words of a command that makes sense after a run."""


def _command() -> str:
    """What the user typed to get here, so that the next command works without activating an environment."""
    return sys.argv[0] if Path(sys.argv[0]).name == "jaxdpo" else "jaxdpo"
