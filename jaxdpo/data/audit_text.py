"""The result of an audit as lines of text: all of it for eyes, or a summary to go before a run."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from jaxdpo.data.findings import SEVERITIES

SHOWN = 3
"""Records that a finding shows."""
PLACE = " " * 19
"""Before the records, so that they stand below what was found."""
SUMMARY_LINES = 8
_COLUMNS = {"5%": "5", "25%": "25", "median": "50", "75%": "75", "95%": "95", "99%": "99", "longest": "100"}
"""Column of the table of lengths -> quantile, in per cent."""
_KINDS = {
    "pairs": "pairs",
    "rankings": "rankings",
    "good": "good completions",
    "bad": "bad completions",
    "single": "completions to imitate",
}

Result = Mapping[str, Any]
"""What `Audit.result` returns."""


def report(result: Result) -> list[str]:
    """Everything that was found; of each finding the first records.

    Example:
      >>> from jaxdpo.data.audit import Audit
      >>> from jaxdpo.types import Origin, Preference
      >>> audit = Audit()
      >>> audit.see(Preference("What is 2+2? ", ("It is 4.", "5"), Origin("sums.jsonl", 1)), None)
      >>> audit.drop(Origin("sums.jsonl", 2), "two completions are equal")
      >>> print(*report(audit.result()), sep="\\n")
      records    2, of which 1 used: 1 pairs
      words                       mean       5%      25%   median      75%      95%      99%  longest
        prompt                     3.0        3        3        3        3        3        3        3
        chosen                     3.0        3        3        3        3        3        3        3
        rejected                   1.0        1        1        1        1        1        1        1
        chosen - rejected          2.0        2        2        2        2        2        2        2
      longer     chosen in 100.0% of the pairs, rejected in 0.0%; accuracy of that rule alone 1.000
      warning         1  dropped: two completions are equal; correct or delete them
                         sums.jsonl, line 2
      warning         1  records with a prompt that ends in a space; put it at the start of the completions
                         sums.jsonl, line 1
      found      2 warnings
    """
    lines = [_counts(result), *_table(result), *_longer(result)]
    for finding in result["findings"]:
        lines.append(f"{_line(finding)}; {finding['fix']}")
        lines += (f"{PLACE}{name}" for name in finding["records"][:SHOWN])
        if (more := finding["count"] - SHOWN) > 0 and finding["records"]:
            lines.append(f"{PLACE}and {more:,} more")
    return [*lines, f"found      {_verdict(result)}"]


def summary(result: Result) -> list[str]:
    """At most `SUMMARY_LINES` lines: lengths, how far length alone tells the chosen, and the gravest findings.

    Example:
      >>> from jaxdpo.data.audit import Audit
      >>> from jaxdpo.types import Origin, Preference
      >>> audit = Audit()
      >>> audit.see(Preference("What is 2+2? ", ("It is 4.", "5"), Origin("sums.jsonl", 1)), None)
      >>> print(*summary(audit.result()), sep="\\n")
      audit      median (longest) words: prompt 3 (3), chosen 3 (3), rejected 1 (1)
      longer     chosen in 100.0% of the pairs, rejected in 0.0%; accuracy of that rule alone 1.000
      warning         1  records with a prompt that ends in a space
    """
    sizes = (
        f"{name} {of['quantiles']['50']:,} ({of['quantiles']['100']:,})"
        for name, of in result["lengths"].items()
        if name != "chosen - rejected"
    )
    head = [f"audit      median (longest) {result['unit']}: {', '.join(sizes)}", *_longer(result)]
    findings = [_line(finding) for finding in result["findings"]]
    room = SUMMARY_LINES - len(head)
    if len(findings) > room:
        left = len(findings) - room + 1
        findings[room - 1 :] = [f"{PLACE}and {left} findings more; jaxdpo audit shows them, with their records"]
    return head + findings


def _counts(result: Result) -> str:
    kinds = ", ".join(f"{result['kinds'][kind]:,} {words}" for kind, words in _KINDS.items() if result["kinds"][kind])
    return f"records    {result['records']:,}, of which {result['used']:,} used{': ' if kinds else ''}{kinds}"


def _table(result: Result) -> list[str]:
    if not result["lengths"]:
        return []
    rows = [f"{result['unit']:23}{'mean':>9}" + "".join(f"{column:>9}" for column in _COLUMNS)]
    for name, of in result["lengths"].items():
        quantiles = "".join(f"{of['quantiles'][quantile]:>9,}" for quantile in _COLUMNS.values())
        rows.append(f"  {name:21}{of['mean']:>9,.1f}{quantiles}")
    return rows


def _longer(result: Result) -> list[str]:
    if not (rule := result["rules"].get("is longer")):
        return []
    chosen, rejected = (rule[side] / rule["pairs"] for side in ("chosen", "rejected"))
    shares = f"chosen in {chosen:.1%} of the pairs, rejected in {rejected:.1%}"
    return [f"longer     {shares}; accuracy of that rule alone {rule['accuracy']:.3f}"]


def _line(finding: Mapping[str, Any]) -> str:
    count = f"{finding['count']:,}" if finding["count"] else ""
    return f"{finding['severity']:10}{count:>7}  {finding['what']}"


def _verdict(result: Result) -> str:
    counts = Counter(finding["severity"] for finding in result["findings"])
    found = (f"{counts[severity]} {severity}{'s' * (counts[severity] > 1)}" for severity in SEVERITIES)
    return ", ".join(text for text in found if not text.startswith("0 ")) or "nothing to complain about"
