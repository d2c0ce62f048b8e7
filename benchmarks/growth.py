"""What the points of `scaling.py` say: exponents, what a shared prompt saves, tables and panels."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from charts import Series, save_scaling

Row = dict[str, Any]
"""A measured point: `sweep`, `size`, `tokens`, and what `scaling.measure` returns."""


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of the power law that fits best: 1 is linear, 2 quadratic."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


MEASURES: dict[str, Callable[[Row], float]] = {
    "seconds": lambda row: row["seconds"],
    "temporaries, MiB": lambda row: row["temp_bytes"] / 2**20,
    "grown by, MiB": lambda row: row["peak_bytes"] / 2**20,
}


def slopes(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Sweep -> measure -> exponent, by the size that changes; for prompt shares, by tokens."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["sweep"] for row in rows):
        own = [row for row in rows if row["sweep"] == name]
        sizes = [row["tokens" if name == "prompt share" else "size"] for row in own]
        if len(own) > 1:
            found[name] = {what: slope(sizes, [max(of(row), 1e-3) for row in own]) for what, of in MEASURES.items()}
    return found


def shared_prompt(rows: Sequence[Row]) -> list[dict[str, float]]:
    """What K completions over one prompt cost, as a share of what the same completions cost in pairs."""
    in_pairs = {row["size"]: row for row in rows if row["sweep"] == "completions, in pairs"}
    return [
        {
            "completions": row["size"],
            "time": row["seconds"] / in_pairs[row["size"]]["seconds"],
            "ideal": row["tokens"] / in_pairs[row["size"]]["tokens"],
        }
        for row in rows
        if row["sweep"] == "completions, one prompt" and row["size"] in in_pairs
    ]


def write(rows: Sequence[Row], output: Path, *, attention: str, machine: str) -> str:
    """Writes JSON, tables and a picture; the tables.

    Args:
      rows: the points.
      output: the directory.
      attention: the form that they were measured with; the files are named by it.
      machine: what they were measured on.
    """
    output.mkdir(parents=True, exist_ok=True)
    fitted, sharing = slopes(rows), shared_prompt(rows)
    facts = {"attention": attention, "machine": machine, "slopes": fitted, "shared_prompt": sharing, "rows": rows}
    (output / f"scaling_{attention}.json").write_text(json.dumps(facts, indent=1) + "\n")
    command = f"python benchmarks/scaling.py --attention {attention}"
    text = f"# How a step grows\n\n`{command}`. {machine}.\n\n{markdown(rows, fitted, sharing)}"
    (output / f"scaling_{attention}.md").write_text(text)
    save_scaling(panels(rows, fitted), output / f"scaling_{attention}.png", title=f"attention: {attention}")
    return text


def markdown(rows: Sequence[Row], fitted: dict[str, dict[str, float]], sharing: Sequence[dict[str, float]]) -> str:
    """The points, the exponents, and what sharing a prompt saves."""
    lines = [f"| sweep | size | tokens | {' | '.join(MEASURES)} |", f"|{'---|' * (3 + len(MEASURES))}"]
    for row in rows:
        measured = " | ".join(f"{of(row):.4g}" for of in MEASURES.values())
        lines.append(f"| {row['sweep']} | {row['size']:g} | {row['tokens']} | {measured} |")
    lines += ["", f"| exponent of | {' | '.join(MEASURES)} |", f"|{'---|' * (1 + len(MEASURES))}"]
    lines += [f"| {name} | {' | '.join(f'{value:.2f}' for value in of.values())} |" for name, of in fitted.items()]
    if sharing:
        lines += [
            "",
            "| completions of one prompt | time, of that in pairs | tokens, of those in pairs |",
            "|---|---|---|",
        ]
        lines += [f"| {row['completions']} | {row['time']:.2f} | {row['ideal']:.2f} |" for row in sharing]
    return "\n".join(lines) + "\n"


PANELS = {
    "time by row length": (
        "tokens of the row",
        "seconds",
        ("row length, groups of 128 tokens", "row length, one group"),
    ),
    "memory by row length": (
        "tokens of the row",
        "temporaries, MiB",
        ("row length, groups of 128 tokens", "row length, one group"),
    ),
    "time by batch": ("pairs", "seconds", ("pairs",)),
    "time by completions": ("completions", "seconds", ("completions, one prompt", "completions, in pairs")),
    "time by prompt share": ("share of the path", "seconds", ("prompt share",)),
    "memory by vocabulary": ("tokens of the vocabulary", "temporaries, MiB", ("vocabulary",)),
}
"""Title -> x axis, measure, sweeps."""


def panels(rows: Sequence[Row], fitted: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What `charts.save_scaling` draws: the panels whose sweeps were measured."""
    drawn = {}
    for title, (x_label, measure_name, names) in PANELS.items():
        lines = []
        for name in names:
            own = [row for row in rows if row["sweep"] == name]
            exponent = None if name == "prompt share" else fitted.get(name, {}).get(measure_name)
            values = [MEASURES[measure_name](row) for row in own]
            if own:
                lines.append(Series(name.rpartition(", ")[2], [row["size"] for row in own], values, exponent))
        if lines:
            drawn[title] = (x_label, measure_name, lines)
    return drawn
