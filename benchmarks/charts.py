"""Pictures of the benchmarks, in the style of `jaxdpo.plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from jaxdpo.plots import HELD_OUT, NEUTRAL, OTHER, POLICY, STYLE

COLORS = {"jaxdpo": POLICY, "trl": OTHER, "tunix": NEUTRAL}
"""By the first word of a setting. Bars are told by their labels as well."""
MARKERS = ("o", "s", "^", "D")


class Series(NamedTuple):
    """One line of a panel: what was measured against a size."""

    label: str
    sizes: Sequence[float]
    values: Sequence[float]
    slope: float | None
    """Exponent that was fitted, for the label; None: not fitted."""


def save_peers(summary: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws speed, memory and utilisation of every case as bars; the lines on them go from the least to the most.

    Args:
      summary: from `peers.summary.summarise`.
      path: the PNG to write.
    """
    names = [entry["case"].replace(", ", "\n") for entry in summary]
    colors = [COLORS[entry["setting"].split()[0]] for entry in summary]
    peak = [entry["peak_rss_bytes"] / 2**30 for entry in summary]
    panels = {
        "pairs/s (more is better)": [entry["pairs_per_second"] for entry in summary],
        "peak RSS, GiB (less is better)": [{"median": value, "min": value, "max": value} for value in peak],
        "useful FLOPs, share of the float32 peak": [entry["share_of_peak"]["float32"] for entry in summary],
    }
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(11, 1.2 + 0.55 * len(names)), layout="constrained")
        for axes, (title, values) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
            medians = [value["median"] for value in values]
            below = [value["median"] - value["min"] for value in values]
            above = [value["max"] - value["median"] for value in values]
            bars = axes.barh(names, medians, color=colors, height=0.65, xerr=[below, above], ecolor="#888888")
            axes.bar_label(bars, [f" {value:.3g}" for value in medians], padding=3)
            axes.set_xlim(0, 1.3 * max(value["max"] for value in values))
            axes.grid(visible=False, axis="y")
            axes.set_title(title)
        axes.invert_yaxis()  # shared: the first case on top
        figure.savefig(path, dpi=130, format="png")


def save_scaling(panels: Mapping[str, tuple[str, str, Sequence[Series]]], path: Path, *, title: str) -> None:
    """Draws measured quantities against sizes, both on logarithmic axes.

    Args:
      panels: title -> label of the x axis, label of the y axis, lines.
      path: the PNG to write.
      title: above the panels.
    """
    columns = 3
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(11, 3.1 * rows), layout="constrained")
        figure.suptitle(title, parse_math=False)
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for (name, (x_label, y_label, lines)), axes in zip(panels.items(), grid, strict=False):
            colors = (POLICY, OTHER, HELD_OUT, NEUTRAL)
            for line, color, marker in zip(lines, colors, MARKERS, strict=False):
                label = line.label if line.slope is None else f"{line.label}, slope {line.slope:.2f}".lstrip(", ")
                axes.plot(line.sizes, line.values, color=color, marker=marker, markersize=4, label=label)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            sizes = sorted({size for line in lines for size in line.sizes})
            if sizes[-1] > 1:  # shares stand as far apart as they are
                axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [f"{size:g}" for size in sizes], rotation=45 if len(sizes) > 6 else 0)
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.set_title(name)
            axes.margins(y=0.25)  # room for the legend
            axes.legend(loc="upper left", fontsize=8)
        for axes in grid:  # those that are left
            axes.set_visible(False)
        figure.savefig(path, dpi=130, format="png")
