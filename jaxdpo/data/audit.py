"""What a data set holds, and what is wrong with it, summed up while its records pass by once.

Memory: 52 bytes a record, and 4 more for each finding that names it; about twice that while `result` sums up. Texts are
not kept: equal ones are told by 64-bit hashes, which in ten million records confuse two once in 400,000 times.

>>> audit = Audit()
>>> audit.see(Preference("2+2=", (" 4", " 5"), Origin("sums.jsonl", 1)), None)
>>> audit.see(Preference("2+2=", (" 5", " 4"), Origin("sums.jsonl", 2)), None)
>>> for finding in audit.result()["findings"]:
...     print(finding["kind"], finding["records"])
contradiction ['sums.jsonl, line 2: see sums.jsonl, line 1']
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdpo.data.findings import KINDS, RULES, SEVERITIES, TextChecks, gives_away, surface
from jaxdpo.data.groups import TokenizedGroup
from jaxdpo.data.summaries import Origins, among, distribution, earlier
from jaxdpo.types import Origin, Preference

RECORDS_PER_FINDING = 10
"""Records that a finding names, unless more are asked for."""
MESSAGES = 1000
"""Broken records whose message is kept; all are counted and named."""
REASONS = 50
"""Different reasons for dropping a record that are told apart."""
_NONE = -1
"""Length of a completion that a record lacks."""


class Audit:
    """Sums up one data set. Feed it every record: `see`, `drop` or `refuse`; then ask for the `result`.

    Args:
      tokenizer: the one that made the groups that `see` is given. None: there are no groups, and lengths are words.
    """

    def __init__(self, tokenizer: Any = None):
        self._tokenized = tokenizer is not None
        self._checks = TextChecks(tokenizer)
        self._origins = Origins()  # of each record
        self._used = array("i")  # the record of each preference
        self._prompt_hash, self._content_hash, self._statement_hash = array("q"), array("q"), array("q")
        self._lengths = {"prompt": array("i"), "chosen": array("i"), "rejected": array("i")}
        self._wins = [[0] * (len(RULES) - 1) for _ in range(2)]  # of chosen and rejected, by rule of their surface
        self._kinds = {"pairs": 0, "rankings": 0, "good": 0, "bad": 0, "single": 0}
        self._found: dict[str, array] = {}
        self._reasons: dict[str, array] = {}
        self._broken, self._messages = array("i"), list[str]()
        self._about_sources: dict[str, list[str]] = {}

    def see(self, preference: Preference, group: TokenizedGroup | None, also: Iterable[str] = ()) -> None:
        """Takes in a preference and what became of it.

        Args:
          preference: what the record says, as it is trained on.
          group: its tokens. None where tokenisation dropped it, which `drop` is told too, and without a tokenizer.
          also: names of `KINDS` that were found elsewhere.
        """
        if self._tokenized and group is None:
            return
        record = self._origins.add(preference.origin)
        self._used.append(record)
        self._hash(preference)
        self._measure(preference, group)
        self._kinds[_kind(preference if group is None else group)] += 1
        found = self._checks(preference).union(also)
        if group is not None and any(group.completions_truncated):
            found.add("truncated_completion")
        if group is not None and group.prompt_truncated:
            found.add("truncated_prompt")
        for kind in found:
            self._found.setdefault(kind, array("i")).append(record)

    def drop(self, origin: Origin, reason: str) -> None:
        """Takes in a well-formed record that no preference was made of."""
        if reason not in self._reasons and len(self._reasons) >= REASONS:
            reason = "other reasons"
        self._reasons.setdefault(reason, array("i")).append(self._origins.add(origin))

    def refuse(self, origin: Origin, message: str) -> None:
        """Takes in a record that breaks its format; the message names it."""
        self._broken.append(self._origins.add(origin))
        if len(self._messages) < MESSAGES:
            self._messages.append(message)

    def stop(self, message: str) -> None:
        """Takes in that a source cannot be read on; the message names it."""
        self._about_sources.setdefault("unreadable", []).append(message)

    def ignore(self, source: str, fields: Mapping[str, int]) -> None:
        """Takes in the fields of a source that its format does not read, with the number of records that fill each."""
        names = ", ".join(f"{field!r:.40} in {count:,}" for field, count in fields.items())
        self._about_sources.setdefault("unread_field", []).append(f"{source}: {names}")

    def result(self, named: int | None = RECORDS_PER_FINDING, training: "Audit | None" = None) -> dict[str, Any]:
        """Everything that was found, in values that JSON has.

        Args:
          named: how many records a finding names, at most; None: all of them.
          training: the audit of the training data, if this is one of held-out data: to find what is in both.
        """
        lengths = {name: np.array(values, np.int32) for name, values in self._lengths.items()}
        values = {name: of[of != _NONE] for name, of in lengths.items()}
        paired = (lengths["chosen"] != _NONE) & (lengths["rejected"] != _NONE)
        values["chosen - rejected"] = (lengths["chosen"] - lengths["rejected"])[paired]
        rules = self._rules(values["chosen - rejected"])
        return {
            "records": len(self._origins),
            "used": len(self._used),
            "kinds": dict(self._kinds),
            "unit": "tokens" if self._tokenized else "words",
            "lengths": {name: distribution(of) for name, of in values.items() if len(of)},
            "rules": rules,
            "findings": self._findings(rules, named, training),
        }

    def _hash(self, preference: Preference) -> None:
        """What a preference is about, and what it states: those of equal content may contradict each other."""
        completions, ranks = preference.completions, preference.ranks
        order = completions if ranks is None else frozenset(zip(completions, ranks, strict=True))
        self._prompt_hash.append(hash(preference.prompt))
        self._content_hash.append(hash((preference.prompt, frozenset(completions))))
        self._statement_hash.append(hash((preference.prompt, order, preference.label)))

    def _measure(self, preference: Preference, group: TokenizedGroup | None) -> None:
        texts = preference.completions
        if group is None:
            prompt, *sizes = (len(text.split()) for text in (preference.prompt, *texts))
        else:
            prompt, *sizes = map(len, (group.prompt, *group.completions))
        chosen, rejected = sizes[0], sizes[-1]
        if len(sizes) == 1:
            chosen, rejected = (_NONE, rejected) if preference.label is False else (chosen, _NONE)
        else:
            for i, (best, worst) in enumerate(zip(surface(texts[0]), surface(texts[-1]), strict=True)):
                self._wins[0][i] += best > worst
                self._wins[1][i] += best < worst
        for name, length in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            self._lengths[name].append(length)

    def _rules(self, difference: np.ndarray) -> dict[str, dict[str, float]]:
        """Of each rule how often it holds of one side alone, and how often it is right if ties count one half."""
        pairs = len(difference)
        chosen_wins = [int(np.sum(difference > 0)), *self._wins[0]]
        rejected_wins = [int(np.sum(difference < 0)), *self._wins[1]]
        return {
            name: {
                "chosen": chosen,
                "rejected": rejected,
                "pairs": pairs,
                "accuracy": 0.5 + (chosen - rejected) / (2 * pairs),
            }
            for name, chosen, rejected in zip(RULES, chosen_wins, rejected_wins, strict=True)
            if pairs
        }

    def _findings(
        self, rules: dict[str, dict[str, float]], named: int | None, training: "Audit | None"
    ) -> list[dict[str, Any]]:
        found = [
            self._finding(kind, len(records), self._origins.names(np.array(records, int), named))
            for kind, records in self._found.items()
        ]
        found += (
            self._finding(
                "dropped", len(records), self._origins.names(np.array(records, int), named), f"dropped: {reason}"
            )
            for reason, records in self._reasons.items()
        )
        found += (
            self._giveaway(name, rule)
            for name, rule in rules.items()
            if gives_away(name, rule["chosen"], rule["rejected"], rule["pairs"])
        )
        found += self._repeats(named)
        found += self._shared(training, named) if training else []
        found += self._about_all()
        if self._broken:
            names = [*self._messages, *self._origins.names(np.array(self._broken[len(self._messages) :], int), named)]
            found.append(self._finding("broken", len(self._broken), names[:named]))
        places = {kind: place for place, kind in enumerate(KINDS)}
        return sorted(found, key=lambda item: (SEVERITIES.index(item["severity"]), places[item["kind"]]))

    def _about_all(self) -> list[dict[str, Any]]:
        """Findings that name no record."""
        good, bad = self._kinds["good"], self._kinds["bad"]
        found = [self._finding(kind, len(about), about) for kind, about in self._about_sources.items()]
        if not self._used:
            found.append(self._finding("unusable", 0, []))
        if 0 < good + bad < len(self._used):
            found.append(self._finding("mixed", good + bad, []))
        if (good == 0) != (bad == 0):
            found.append(self._finding("one_label", good + bad, []))
        return found

    def _repeats(self, named: int | None) -> list[dict[str, Any]]:
        used, statement = np.array(self._used, int), np.array(self._statement_hash)
        copies, copied = earlier(statement)
        again, first = earlier(np.array(self._content_hash))
        against = statement[again] != statement[first]
        return [
            *self._twins("duplicate", used[copies], used[copied], named, self),
            *self._twins("contradiction", used[again[against]], used[first[against]], named, self),
        ]

    def _shared(self, training: "Audit", named: int | None) -> list[dict[str, Any]]:
        """Findings about what the training data has too."""
        used, there = np.array(self._used, int), np.array(training._used, int)
        prompt_hash = np.array(self._prompt_hash)
        same, same_there = among(np.array(self._content_hash), np.array(training._content_hash))
        rest = np.setdiff1d(np.flatnonzero(prompt_hash != hash("")), same)
        prompts, prompts_there = among(prompt_hash[rest], np.array(training._prompt_hash))
        return [
            *self._twins("held_out_record", used[same], there[same_there], named, training),
            *self._twins("held_out_prompt", used[rest[prompts]], there[prompts_there], named, training),
        ]

    def _giveaway(self, name: str, rule: dict[str, float]) -> dict[str, Any]:
        accuracy = rule["accuracy"]
        which, often = ("chosen", accuracy) if accuracy > 0.5 else ("rejected", 1 - accuracy)
        what = f"pairs, of which {often:.1%} are told by this alone: the {which} one {name} (ties count one half)"
        return self._finding("giveaway", int(rule["pairs"]), [], what)

    def _finding(self, kind: str, count: int, records: Sequence[str], what: str | None = None) -> dict[str, Any]:
        entry = KINDS[kind]
        share = count / max(1, len(self._origins))
        return {
            "kind": kind,
            "severity": entry.severity if share >= entry.share else "note",
            "what": what or entry.what,
            "fix": entry.fix,
            "count": int(count),
            "share": share,
            "records": list(records),
        }

    def _twins(
        self, kind: str, records: np.ndarray, others: np.ndarray, named: int | None, there: "Audit"
    ) -> list[dict[str, Any]]:
        """The finding, if there is one, about records that have something to do with others in an audit `there`."""
        names = zip(self._origins.names(records, named), there._origins.names(others, named), strict=True)
        twins = [f"{name}: see {other}" for name, other in names]
        return [self._finding(kind, len(records), twins)] if len(records) else []


def _kind(item: Preference | TokenizedGroup) -> str:
    if item.label is not None:
        return "good" if item.label else "bad"
    count = len(item.completions)
    return "single" if count == 1 else "pairs" if count == 2 else "rankings"
