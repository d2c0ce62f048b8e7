"""From what a user calls the data to a tokenised dataset: read once, kept on disk, memory-mapped from then on.

The pass holds one chunk of records and counts of what it drops; its memory does not depend on how many records there
are. A second start with the same data, tokenizer and options reads nothing but the entry that the first one wrote.
"""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jaxdpo.data.cache import data_cache, digest_of, entry_key, making, source_digest, writing_data
from jaxdpo.data.chat import Renderer
from jaxdpo.data.content import Unusable
from jaxdpo.data.dataset import Dropped, TokenizedDataset
from jaxdpo.data.findings import of_format
from jaxdpo.data.formats import FORMATS
from jaxdpo.data.groups import SourceName, TokenizedGroup
from jaxdpo.data.plan import check_weights
from jaxdpo.data.reading import Reading
from jaxdpo.data.sources import open_sources
from jaxdpo.data.store import GroupWriter, open_groups
from jaxdpo.data.tokenize import PreferenceTokenizer, Use, chunks, one_kind
from jaxdpo.types import InputError, Origin, Preference


class Audit(Protocol):
    """Looks at every record on its way, and says in the end what it found."""

    def see(self, preference: Preference, group: TokenizedGroup | None, also: Iterable[str] = ()) -> None:
        """A preference, its ids, and what was found of it; no ids where they are of no use, as `drop` is told next."""

    def ignore(self, source: str, fields: Mapping[str, int]) -> None:
        """Fields of a source that are not read, and of how many records."""

    def drop(self, origin: Origin, reason: str) -> None:
        """A record that is left out."""

    def result(self) -> dict[str, Any]:
        """What was found, as JSON can hold it; it is stored beside the dataset."""


class Loaded(NamedTuple):
    """A dataset, and what was read for it."""

    dataset: TokenizedDataset
    formats: tuple[str, ...]
    """Of each source: the name in `FORMATS` it was read with."""
    records: tuple[int, ...]
    """Of each source: how many it has."""
    weights: tuple[float, ...] | None
    """Of each source, for `StepPlan`."""
    content: str
    """Digest of what the sources hold."""
    digest: str
    """Of what the sources hold and of the groups made of it: a run goes on with the same one only."""
    audit: dict[str, Any] | None
    """What the audit found, in this pass or in the one that made the entry."""
    directory: pathlib.Path
    """The entry of the cache; `dropped.jsonl` there names every record that was left out."""

    def summary(self) -> str:
        """One line: how many preferences or completions are used of each source, and how often an epoch shows them."""
        dataset = self.dataset
        what = "completions" if dataset.labelled or dataset.candidates == 1 else "preferences"
        weights = self.weights or (1,) * len(dataset.sources)
        return "; ".join(
            f"{name.source}: {size:,} {what} ({format}){'' if weight == 1 else f', {weight:g} times an epoch'}"
            for name, size, format, weight in zip(dataset.sources, dataset.sizes, self.formats, weights, strict=True)
        )


def load_dataset(
    data: str,
    tokenizer: Any,
    max_length: int,
    *,
    format: str = "auto",
    weights: Sequence[float] | None = None,
    use: Use = "compare",
    score_prompt: bool = False,
    audit: Audit | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Loaded:
    """Reads and tokenises data of any size, or finds it in the cache.

    Args:
      data: one source, or several separated by commas, as `open_sources` takes them.
      tokenizer: a Hugging Face tokenizer; its chat template writes messages.
      max_length: tokens that a prompt and any one completion may have together, see `PreferenceTokenizer`.
      format: a name in `FORMATS`, or `auto` to tell it from each source's first record.
      weights: of each source, see `StepPlan`.
      use: see `PreferenceTokenizer`.
      score_prompt: see `PreferenceTokenizer`.
      audit: sees every record; not asked where the cache has the result of one of its kind on this data.
      progress: called with the number of preferences tokenised since its last call, as `tqdm.update` wants it.
    Returns:
      The dataset, source after source, its arrays memory-mapped from an entry of the cache. An entry that is damaged is
      made again.
    Raises:
      InputError: if a source cannot be read, a record breaks its format, no record of a source is usable, or some
        records have a label and others none; with source and line or row.
      RunStopped: if the cache cannot be written.
    """
    if format != "auto" and format not in FORMATS:
        raise InputError(f"format={format!r} is unknown; allowed: 'auto', {', '.join(map(repr, FORMATS))}")
    to_groups = PreferenceTokenizer(tokenizer, max_length, use, score_prompt)
    sources = open_sources(data)
    weights = None if weights is None else tuple(weights)
    check_weights(weights, len(sources))
    names = tuple(SourceName(source.name, source.unit) for source in sources)
    digests = [source_digest(source) for source in sources]
    key = entry_key(
        tokenizer,
        {
            "sources": [names, digests],
            "format": format,
            "options": [max_length, use, score_prompt],
            "audit": None if audit is None else type(audit).__qualname__,
        },
    )
    directory = data_cache() / key
    exists = directory.exists()  # asked first: it may be made by another process from here on
    entry = _open_entry(directory, names)
    if entry is None:
        if exists:
            shutil.rmtree(directory, ignore_errors=True)  # damaged
        readings = [Reading(source, format, Renderer(tokenizer), compared=use == "compare") for source in sources]
        with making(directory) as partial:
            _write_entry(partial, readings, to_groups, audit, progress)
        entry = _open_entry(directory, names)
    if entry is None:
        raise InputError(f"{directory} does not hold what was just written to it; check that disk, or set JAXDPO_CACHE")
    dataset, facts = entry
    formats, records = tuple(facts["formats"]), tuple(facts["records"])
    content, digest = digest_of(digests), digest_of([digests, facts["files"]])
    return Loaded(dataset, formats, records, weights, content, digest, facts["audit"], directory)


def _write_entry(
    directory: pathlib.Path,
    readings: Sequence[Reading],
    to_groups: PreferenceTokenizer,
    audit: Audit | None,
    progress: Callable[[int], Any] | None,
) -> None:
    """The one pass over the data: everything that `_open_entry` reads."""
    check = one_kind(to_groups.use)
    dropped = Dropped()
    with writing_data():
        directory.mkdir()
        writer = GroupWriter(directory)
        dropped_file = open(directory / "dropped.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def drop(origin: Origin, reason: str) -> None:
        dropped.add(origin, reason)
        here.add(origin, reason)
        if audit is not None:
            audit.drop(origin, reason)
        with writing_data():
            dropped_file.write(json.dumps([*origin, reason], ensure_ascii=False) + "\n")

    try:
        for number, reading in enumerate(readings):
            here = Dropped()
            for chunk in chunks(reading.preferences(drop)):
                groups = []
                for preference, group in zip(chunk, to_groups(chunk), strict=True):
                    check(preference)
                    usable = None if isinstance(group, Unusable) else group
                    if audit is not None:
                        audit.see(preference, usable, of_format(reading.format, preference))
                    if usable is None:
                        drop(preference.origin, str(group))
                    else:
                        groups.append(usable)
                with writing_data():
                    writer.append(groups, number)
                if progress is not None:
                    progress(len(chunk))
            if audit is not None and reading.unread:
                audit.ignore(reading.source.name, reading.unread)
            if here.total == reading.records:
                raise InputError(_none_usable(reading, here))
        facts = {
            "formats": [reading.format for reading in readings],
            "records": [reading.records for reading in readings],
            "dropped": {"counts": dropped.counts, "first": dropped.first},
            "audit": None if audit is None else audit.result(),
        }
        with writing_data():
            facts["files"] = writer.finish()
            dropped_file.close()
            (directory / "entry.json").write_text(json.dumps(facts), encoding="utf-8")
    finally:
        writer.close()
        dropped_file.buffer.raw.close()  # type: ignore[attr-defined]  # what the disk did not take is given up


def _open_entry(
    directory: pathlib.Path, sources: tuple[SourceName, ...]
) -> tuple[TokenizedDataset, dict[str, Any]] | None:
    """The dataset of an entry and what is known of it; None if there is none, or not as it was written."""
    try:
        facts = json.loads((directory / "entry.json").read_text(encoding="utf-8"))
        arrays = open_groups(directory, facts["files"])
        dropped = Dropped((Origin(*origin), reason) for origin, reason in facts["dropped"]["first"])
        dropped.counts = facts["dropped"]["counts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TokenizedDataset(arrays, sources, dropped), facts


def _none_usable(reading: Reading, dropped: Dropped) -> str:
    return (
        f"{reading.source.name}: none of its {dropped.total} records is usable, {dropped.summary()}; "
        "allowed: at least one prompt with two different completions, or with one to imitate or with a label; "
        "correct the data, or raise the maximal length"
    )
