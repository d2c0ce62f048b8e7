"""Every picture of jaxdpo, in one style."""

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxdpo.data.summaries import EDGES

POLICY, OTHER, HELD_OUT, NEUTRAL = "#1f5fa8", "#c2542d", "#2b8a3e", "#333333"
"""Colours: the quantity or its preferred side, the other side, held-out points, what is on neither side."""
STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
}
"""What `matplotlib.rc_context` is given for every picture."""

Row = dict[str, float]


def _on_both(name: str) -> tuple[tuple[str, str, str], ...]:
    return ((name, POLICY, "train"), (f"eval_{name}", HELD_OUT, "held out"))


PANELS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "loss (nats)": _on_both("loss"),
    "rewards/margins (nats)": _on_both("rewards/margins"),
    "rewards/accuracies": _on_both("rewards/accuracies"),
    "rewards (nats)": (("rewards/chosen", POLICY, "chosen"), ("rewards/rejected", OTHER, "rejected")),
    "logps (nats)": (("logps/chosen", POLICY, "chosen"), ("logps/rejected", OTHER, "rejected")),
    "margin": _on_both("margin"),
    "accuracy": _on_both("accuracy"),
    "reward": (("max_reward", POLICY, "largest"), ("mean_reward", NEUTRAL, "mean"), ("min_reward", OTHER, "least")),
    "mean_token_accuracy": _on_both("mean_token_accuracy"),
    "entropy (nats)": _on_both("entropy"),
    "learning rate": (("learning_rate", POLICY, "learning rate"),),
}
"""Panel -> metric, colour and label of its lines. A run has the panels whose metrics it logs."""
_SHARES = ("rewards/accuracies", "accuracy", "mean_token_accuracy")


def save_curves(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draws a run's metrics, those of `PANELS` that it has.

    Args:
      rows: of `metrics.jsonl`, as `jaxdpo.train.writer.read_metrics` gives them.
      path: the PNG to write.
      title: above the panels.
    """
    logged = set().union(*rows)
    panels = [(name, lines) for name, lines in PANELS.items() if any(key in logged for key, _, _ in lines)]
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(11, 3 * -(-len(panels) // 3)), layout="constrained")
        figure.suptitle(title, parse_math=False)  # a file name may hold a $
        grid = figure.subplots(-(-len(panels) // 3), 3, squeeze=False).flat
        for (name, lines), axes in zip(panels, grid, strict=False):
            for key, color, label in lines:
                points = [(row["step"], row[key]) for row in rows if key in row]
                if points:
                    marker = "o" if len(points) < 12 or key.startswith("eval_") else None
                    axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker, markersize=3.5)
            axes.set_title(name)
            axes.set_xlabel("step")
            if len(axes.lines) > 1:
                axes.legend()
            if name in _SHARES:
                axes.set_ylim(-0.03, 1.03)
            if name == "learning rate":
                axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
                axes.set_ylim(bottom=0)
        for axes in grid:  # those that are left
            axes.set_visible(False)
        figure.savefig(path, dpi=130)


def save_lengths(data: Mapping[str, Mapping[str, Any]], path: Path, *, unit: str) -> None:
    """Draws how long prompts and completions are: a row of histograms for each data set, on bins that grow with length.

    Args:
      data: its name -> `lengths` of the result of a `jaxdpo.data.audit.Audit`.
      path: the PNG to write.
      unit: what lengths are counted in.
    """
    panels = (
        (f"prompt ({unit})", (("prompt", "#333333"),)),
        (f"completion ({unit})", (("chosen", POLICY), ("rejected", OTHER))),
        (f"chosen - rejected ({unit})", (("chosen - rejected", POLICY),)),
    )
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(11, 3.2 * len(data)), layout="constrained")
        for part, (name, lengths) in zip(
            figure.subfigures(len(data), 1, squeeze=False).flat, data.items(), strict=True
        ):
            part.suptitle(name, parse_math=False)  # a file name may hold a $
            for axes, (title, series) in zip(part.subplots(1, 3), panels, strict=True):
                _draw_lengths(axes, {key: (lengths[key], color) for key, color in series if key in lengths})
                axes.set_title(title)
        figure.savefig(path, dpi=130, format="png")


def _draw_lengths(axes: Any, series: Mapping[str, tuple[Mapping[str, Any], str]]) -> None:
    """Histograms on one axis, on which every bin is as wide as the others, whatever it holds."""
    if not series:
        return
    drawn = [edge for of, _ in series.values() for edge in of["histogram"]["edges"]]
    edges = [edge for edge in EDGES.tolist() if min(drawn) <= edge <= max(drawn)]
    for key, (of, color) in series.items():
        counts, first = of["histogram"]["counts"], edges.index(of["histogram"]["edges"][0])
        axes.stairs(counts, range(first, first + len(counts) + 1), color=color, fill=True, alpha=0.25)
        median = of["quantiles"]["50"]
        axes.stairs(counts, range(first, first + len(counts) + 1), color=color, label=f"{key}, median {median:,}")
        axes.axvline(bisect.bisect_right(edges, median) - 0.5, color=color, linestyle=":")
    # To the right of its edge a bin above 0 begins with a power of two, and to the left of it one below 0 does.
    ticks = {edge if edge >= 0 else edge - 1: i for i, edge in enumerate(edges)}
    powers = {label: i for label, i in ticks.items() if abs(label) & (abs(label) - 1) == 0 and abs(label) != 1}
    axes.set_xticks(list(powers.values()), [f"{label:,}" for label in powers], rotation=90)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper left")


class LossCurve(NamedTuple):
    """How one loss depends on a reward."""

    axis: str
    """What the reward is, for the axis."""
    reward: Sequence[float]
    """`[points]` rewards, or differences of two."""
    losses: Mapping[str, Sequence[float]]
    """Completion -> `[points]` loss; one of `SIDES`, or "" for both of them together."""
    weights: Mapping[str, Sequence[float]]
    """Completion -> `[points]` gradient weight: by how much the loss falls as the reward of a chosen completion rises,
    or that of a rejected one falls."""


SIDES: dict[str, dict[str, Any]] = {
    "": {"color": "#333333"},
    "chosen": {"color": POLICY},
    "rejected": {"color": OTHER, "linestyle": (0, (4, 2))},
}
"""Completions, and how their lines look; dashes show a line on which they lie."""


def save_loss_curves(curves: Mapping[str, LossCurve], path: Path, *, title: str, columns: int) -> None:
    """Draws losses, each above the weights of its gradient, all on the same axes.

    Args:
      curves: by the name of the loss.
      path: the PNG to write.
      title: above the panels.
      columns: how many losses stand side by side.
    """
    rows = -(-len(curves) // columns)
    style = STYLE | {"font.size": 8, "axes.titlesize": 10, "axes.labelsize": 8}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(2.35 * columns, 2.75 * rows + 0.8), layout="constrained")
        figure.suptitle(title, fontsize=11)
        panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1.5, 1] * rows)
        for place, (name, curve) in enumerate(curves.items()):
            row, column = divmod(place, columns)
            above, below = panels[2 * row : 2 * row + 2, column]
            _draw_loss(above, curve, name)
            _draw_weights(below, curve)
            if column == 0:
                above.set_ylabel("loss")
                below.set_ylabel("weight")
        for axes in panels.flat:
            axes.set_visible(bool(axes.lines))  # the last row may not be full
        labels = {"": "both", "chosen": "chosen, or labelled good", "rejected": "rejected, or labelled bad"}
        handles = [Line2D([], [], **SIDES[side], label=label) for side, label in labels.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        figure.savefig(path, dpi=110)


def _draw_loss(axes: Any, curve: LossCurve, name: str) -> None:
    for side, values in curve.losses.items():
        axes.plot(curve.reward, values, **SIDES[side])
    axes.set_title(name, fontweight="bold")
    axes.set_xlim(curve.reward[0], curve.reward[-1])
    axes.set_ylim(-1, 4.5)
    axes.tick_params(labelbottom=False)


def _draw_weights(axes: Any, curve: LossCurve) -> None:
    axes.axhline(0, color="#888888", linewidth=0.8)
    for side, values in curve.weights.items():
        axes.plot(curve.reward, values, **SIDES[side])
    axes.set_xlabel(curve.axis)
    axes.set_xlim(curve.reward[0], curve.reward[-1])
    axes.set_ylim(-1.2, 2.3)
    axes.set_yticks([-1, 0, 1, 2])
