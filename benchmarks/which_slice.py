"""Which TPU slice for which model: plans of a list of pairs, as a table.

  python benchmarks/which_slice.py --output benchmarks/results

Command: the one above, in an environment with libtpu (`pip install -e '.[tpu]'`). Hardware: any Linux machine, no TPU;
quick plans compile one after another, on two cores in a minute or two each. A plan that `which_slice.json` already has
is not made again; remove the file to make all of them. Expected: every one of the plans fits.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jaxdpo.config import PlanConfig
from jaxdpo.disk import writing
from jaxdpo.plan.command import plan_in_process
from jaxdpo.plan.report import short

ENTRIES: tuple[dict[str, Any], ...] = (
    {"model": "smollm2-135m", "topology": "v5e:2x4"},
    {"model": "llama-3.1-70b", "topology": "v5p:4x4x4"},
    {"model": "llama-3.1-8b", "topology": "v5p:2x2x2"},
    {"model": "smollm2-135m", "topology": "v5e:2x4", "slices": 2},
    {"model": "llama-3.1-8b", "topology": "v5e:4x4"},
)
"""Options of the plans."""


def key(options: dict[str, Any]) -> str:
    """How a plan is called in the results."""
    slices = options.get("slices", 1)
    return f"{options['model']} on {f'{slices} x ' if slices > 1 else ''}{options['topology']}"


def table(plans: dict[str, dict[str, Any]]) -> str:
    """A row for each plan, in Markdown."""
    rows = [
        "| model | slice | mesh | remat | GiB a chip | of | step at least | bound by | pairs/s at most | MFU at most |",
        "|---|---|---|---|--:|--:|--:|---|--:|--:|",
    ]
    for plan in plans.values():
        slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
        cells = (
            plan["model"],
            f"{slices}{plan['topology']}",
            f"`{plan['mesh']}`",
            plan["remat"],
            f"{plan['hbm_gib_per_chip']:.1f}" + ("" if plan["fits"] else ", does not fit"),
            f"{plan['hbm_limit_gib']:.1f}",
            f"{short(plan['step_seconds_bound'])} s" if "bound" in plan else "",
            plan.get("bound", ""),
            f"{short(plan['pairs_per_second_bound'])}" if "bound" in plan else "",
            f"{plan['mfu_bound']:.0%}" if "bound" in plan else "",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Makes the plans that are missing, and writes all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="directory of the results")
    output = parser.parse_args().output
    path = output / "which_slice.json"
    made = json.loads(path.read_text()) if path.exists() else {}
    for options in ENTRIES:
        if key(options) not in made:
            made[key(options)] = plan_in_process(
                PlanConfig(quick=True, **options), lambda text: print(text, file=sys.stderr)
            )
        plans = {key(entry): made[key(entry)] for entry in ENTRIES if key(entry) in made}
        with writing(path):
            path.write_text(json.dumps(plans, indent=1) + "\n")
            path.with_suffix(".md").write_text(table(plans))
        print(key(options), flush=True)


if __name__ == "__main__":
    main()
