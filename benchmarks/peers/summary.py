"""From the measured rounds to the numbers that are reported. Plain Python: nothing here runs a model."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
"""One measured step: `round`, `setting`, and what the runner answered."""


class Setting(NamedTuple):
    """One way to run one library."""

    peer: str
    options: Mapping[str, Any]
    """Of the runner, `Spec.options`."""
    reference: str
    """When its log-probs are computed: "apart" (timed beside the step), "within" the step, or "before" (not timed)."""


class Case(NamedTuple):
    """A setting, with or without the time of the reference's log-probs."""

    setting: str
    with_reference: bool

    def __str__(self) -> str:
        return f"{self.setting}, reference {'included' if self.with_reference else 'excluded'}"


class Work(NamedTuple):
    """What every library has to do in a step, padding and repetition left out."""

    pairs: int
    tree_tokens: int
    """Tokens of prompts, once, and completions."""
    scored_tokens: int
    body_parameters: int
    """Of the matrices of all layers."""
    head_parameters: int

    def flops(self, *, with_reference: bool) -> float:
        """Of matrix products with parameters: 2 forward and 4 backward each, and 2 of the reference."""
        each = self.tree_tokens * self.body_parameters + self.scored_tokens * self.head_parameters
        return (8.0 if with_reference else 6.0) * each


class Comparison(NamedTuple):
    """What has to hold between two cases."""

    name: str
    against: str
    at_least: float
    aim: float


def cases(settings: Mapping[str, Setting]) -> list[Case]:
    """What can be told of the settings: with the reference's time, without it, or both."""
    of_reference = {"apart": (True, False), "within": (True,), "before": (False,)}
    return [Case(name, with_it) for name, setting in settings.items() for with_it in of_reference[setting.reference]]


def by_setting(rows: Iterable[Row]) -> dict[str, dict[int, Row]]:
    """The rounds of each setting, in order. A visit that was begun again replaces what it had measured."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row["setting"], {})[row["round"]] = row
    return {name: dict(sorted(rounds.items())) for name, rounds in found.items()}


def seconds(row: Row, *, with_reference: bool) -> float:
    """Time of a step; `with_reference` adds the pass that was timed beside it, where one was."""
    return row["seconds"] + ((row["reference_seconds"] or 0.0) if with_reference else 0.0)


def loss_drift(rows: Mapping[int, Row], others: Mapping[int, Row]) -> float:
    """Largest difference of the losses of two settings, over the rounds that both did."""
    return max((abs(row["loss"] - others[n]["loss"]) for n, row in rows.items() if n in others), default=math.nan)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(
    rows: Mapping[str, Mapping[int, Row]],
    settings: Mapping[str, Setting],
    work: Mapping[int, Work],
    peaks: Mapping[str, float],
) -> list[dict[str, Any]]:
    """What is reported of every case.

    Args:
      rows: measured steps, as `by_setting` gives them.
      settings: those that were measured.
      work: of each round.
      peaks: FLOP/s of the largest matrix product by dtype.
    Returns:
      An entry for each of `cases(settings)`; rates as `spread` over the rounds. `loss_drift` is against float32: TRL's,
      where it was run, and a library's own.
    """
    report = []
    for case in cases(settings):
        name, with_reference = case
        times = {number: seconds(row, with_reference=with_reference) for number, row in rows[name].items()}
        flops = [work[n].flops(with_reference=with_reference) / t for n, t in times.items()]
        baselines = {"TRL's": "trl float32", "its own": f"{settings[name].peer} float32"}
        report.append(
            {
                "case": str(case),
                "setting": name,
                "with_reference": with_reference,
                "seconds": times,
                "pairs_per_second": spread([work[n].pairs / t for n, t in times.items()]),
                "useful_tokens_per_second": spread([work[n].tree_tokens / t for n, t in times.items()]),
                "peak_rss_bytes": max(row["peak_rss_bytes"] for row in rows[name].values()),
                "share_of_peak": {dtype: spread([rate / peak for rate in flops]) for dtype, peak in peaks.items()},
                "loss_drift": {
                    whose: loss_drift(rows[name], rows[base]) for whose, base in baselines.items() if base in settings
                },
            }
        )
    return report


def ratios(faster: Mapping[str, Any], slower: Mapping[str, Any]) -> dict[str, float]:
    """By what factor one case is faster than another, round by round."""
    own, other = faster["seconds"], slower["seconds"]
    return spread([other[number] / own[number] for number in own if number in other])


def compare(report: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What has to hold, for the cases that were measured: value, bound, aim.

    `holds` says whether the median keeps the bound. Times are compared round by round.
    """
    by_case = {Case(entry["setting"], entry["with_reference"]): entry for entry in report}
    ours, trl = by_case.get(Case("jaxdpo float32", True)), by_case.get(Case("trl float32", True))
    fastest, tunix = by_case.get(Case("trl fastest", False)), by_case.get(Case("tunix float32", True))
    found: list[dict[str, Any]] = []

    def bound(what: str, value: dict[str, float], limit: float, aim: float, *, at_most: bool = False) -> None:
        holds = value["median"] <= limit if at_most else value["median"] >= limit
        found.append({"what": what, **value, "at_most" if at_most else "at_least": limit, "aim": aim, "holds": holds})

    if ours and trl:
        bound("pairs/s, float32, reference included, against TRL float32", ratios(ours, trl), 2.0, 4.0)
        memory = ours["peak_rss_bytes"] / trl["peak_rss_bytes"]
        bound("peak RSS against TRL float32", spread([memory]), 0.55, 0.4, at_most=True)
        bound("largest loss difference from TRL float32", spread([ours["loss_drift"]["TRL's"]]), 2e-4, 0, at_most=True)
    if fastest and trl:
        allowed = fastest["loss_drift"]["its own"]
        ready = [
            entry
            for case, entry in by_case.items()
            if case.setting.startswith("jaxdpo") and not case.with_reference
            if entry["loss_drift"]["its own"] <= allowed
        ]
        if ready:
            best = max(ready, key=lambda entry: entry["pairs_per_second"]["median"])
            what = f"pairs/s, {best['setting']} (drift {best['loss_drift']['its own']:.1e} of {allowed:.1e} allowed), "
            bound(f"{what}reference excluded, against TRL's fastest", ratios(best, fastest), 1.3, 3.0)
    if ours and tunix:
        bound("pairs/s, float32, against Tunix, nothing cut", ratios(ours, tunix), 12.0, 20.0)
    alone = by_case.get(Case("jaxdpo float32", False))
    if alone:
        bound("useful FLOPs of the measured float32 peak", alone["share_of_peak"]["float32"], 0.45, 0.62)
    return found


def markdown(report: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Both as tables: median (least to most)."""

    def shown(value: Mapping[str, float], form: str) -> str:
        median, low, high = (format(value[key], form) for key in ("median", "min", "max"))
        return median if low == high else f"{median} ({low} to {high})"

    lines = [
        "| | pairs/s | useful tokens/s | peak RSS, GiB | share of float32 peak | of bfloat16 peak | loss drift |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in report:
        drift = ", ".join(f"{value:.1e} from {whose} float32" for whose, value in entry["loss_drift"].items() if value)
        cells = (
            entry["case"],
            shown(entry["pairs_per_second"], ".3g"),
            shown(entry["useful_tokens_per_second"], ".3g"),
            f"{entry['peak_rss_bytes'] / 2**30:.1f}",
            *(shown(share, ".2f") for share in entry["share_of_peak"].values()),
            drift or "0",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| what | measured | bound | aim | holds |", "|---|---|---|---|---|"]
    for row in comparisons:
        limit = f"≤ {row['at_most']:g}" if "at_most" in row else f"≥ {row['at_least']:g}"
        holds = "yes" if row["holds"] else "no"
        lines.append(f"| {row['what']} | {shown(row, '.3g')} | {limit} | {row['aim']:g} | {holds} |")
    return "\n".join(lines) + "\n"
