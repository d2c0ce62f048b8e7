"""What a run prints when it is done: what it changed, where everything lies, what to try next."""

import shlex
import sys
from pathlib import Path

from jaxdpo.train.dpo import RunResult
from jaxdpo.train.forecast import duration
from jaxdpo.train.run_dir import RunDir


def print_report(result: RunResult, run: RunDir) -> None:
    """Prints held-out accuracy and margin before and after (where there is held-out data), files and a next command."""
    print(f"\ndone       step {result.steps}, {duration(result.seconds)}")
    if result.before is not None and result.after is not None:
        number = "" if result.after.margins is None else f"{len(result.after.margins)} examples, "
        print(f"held out   {number}before -> after")
        for label, key in (("accuracy", "accuracies"), ("margin", "margins")):
            if f"eval_rewards/{key}" not in result.after.metrics:
                continue  # single completions have no accuracy
            before, after = (of.metrics[f"eval_rewards/{key}"] for of in (result.before, result.after))
            known = label == "margin" and result.after.margins is not None
            error = f" (standard error {result.after.margin_standard_error:.3f})" if known else ""
            print(f"  {label:9}{before:.3f} -> {after:.3f}{error}")
    print(f"files      {run.root}: metrics.jsonl, curves.png, config.yaml, checkpoints/")
    print(f"export     {run.export}: load it with transformers or vLLM")
    again = ["dpo", "--config", str(run.config), "--beta", "0.3", "--output-dir", f"{run.root}-beta-0.3"]
    print(f"try next   {shlex.join([_command(), *again])}")


def _command() -> str:
    """What the user typed to get here, so that the next command works without activating an environment."""
    return sys.argv[0] if Path(sys.argv[0]).name == "jaxdpo" else "jaxdpo"
