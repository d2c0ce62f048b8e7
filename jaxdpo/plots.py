"""Every picture of jaxdpo, in one style."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

POLICY, OTHER, HELD_OUT = "#1f5fa8", "#c2542d", "#2b8a3e"
"""Colours: the quantity or its preferred side, the other side, held-out points."""
_STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
}

Row = dict[str, float]


def save_curves(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draws a run's metrics: loss, margins, accuracy, rewards, chosen and rejected log-probs, learning rate.

    Args:
      rows: of `metrics.jsonl`, as `jaxdpo.train.writer.read_metrics` gives them.
      path: the PNG to write.
      title: above the panels.
    """
    panels = (
        ("loss (nats)", (("loss", POLICY, "train"), ("eval_loss", HELD_OUT, "held out"))),
        (
            "rewards/margins (nats)",
            (("rewards/margins", POLICY, "train"), ("eval_rewards/margins", HELD_OUT, "held out")),
        ),
        (
            "rewards/accuracies",
            (("rewards/accuracies", POLICY, "train"), ("eval_rewards/accuracies", HELD_OUT, "held out")),
        ),
        ("rewards (nats)", (("rewards/chosen", POLICY, "chosen"), ("rewards/rejected", OTHER, "rejected"))),
        ("logps (nats)", (("logps/chosen", POLICY, "chosen"), ("logps/rejected", OTHER, "rejected"))),
        ("learning rate", (("learning_rate", POLICY, "learning rate"),)),
    )
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(11, 6), layout="constrained")
        figure.suptitle(title, parse_math=False)  # a file name may hold a $
        for axes, (name, series) in zip(figure.subplots(2, 3).flat, panels, strict=True):
            for key, color, label in series:
                points = [(row["step"], row[key]) for row in rows if key in row]
                if points:
                    marker = "o" if len(points) < 12 or key.startswith("eval_") else None
                    axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker, markersize=3.5)
            axes.set_title(name)
            axes.set_xlabel("step")
            if len(axes.lines) > 1:
                axes.legend()
            if name == "rewards/accuracies":
                axes.set_ylim(-0.03, 1.03)
            if name == "learning rate":
                axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
                axes.set_ylim(bottom=0)
        figure.savefig(path, dpi=130)
