"""`jaxdpo audit`: what a data set holds and what is wrong with it, without training on it.

A run stops at the first record that breaks its format; an audit goes on and names all of them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tqdm

from jaxdpo.config import AuditConfig, RunConfig
from jaxdpo.data.audit import RECORDS_PER_FINDING, Audit
from jaxdpo.data.audit_text import report
from jaxdpo.data.boundary import differs_jointly
from jaxdpo.data.chat import Renderer, plain
from jaxdpo.data.content import Unusable
from jaxdpo.data.findings import of_format
from jaxdpo.data.reading import Reading
from jaxdpo.data.sources import open_sources
from jaxdpo.data.tokenize import PreferenceTokenizer, chunks
from jaxdpo.disk import writing
from jaxdpo.hf import load_tokenizer
from jaxdpo.hub import resolve_model
from jaxdpo.plots import save_lengths
from jaxdpo.types import InputError, Preference


def run_audit(config: AuditConfig) -> int:
    """Audits training and held-out data, prints what it finds and writes it where the configuration says.

    Returns:
      The exit status: 2 for errors, 1 for warnings if `strict`, else 0.
    Raises:
      InputError: if a source or the model cannot be opened, or a file to write has no directory.
      RunStopped: if a file cannot be written.
    """
    _check_outputs(config)
    to_groups = None
    if config.model is not None:
        tokenizer = load_tokenizer(resolve_model(config.model))
        to_groups = PreferenceTokenizer(tokenizer, config.max_length or RunConfig.max_length)
    named = RECORDS_PER_FINDING if config.json is None else None
    audit, formats = audit_data(config.data, config.format, to_groups)
    results = {"data": {"source": config.data, "formats": formats, **audit.result(named)}}
    if config.eval_data is not None:
        held_out, formats = audit_data(config.eval_data, config.format, to_groups)
        held_out_result = held_out.result(named, training=audit)
        results["eval_data"] = {"source": config.eval_data, "formats": formats, **held_out_result}
    for result in results.values():
        _print(result)
    _write(config, results)
    found = {finding["severity"] for result in results.values() for finding in result["findings"]}
    return 2 if "error" in found else int(config.strict and "warning" in found)


def audit_data(
    data: str, format: str = "auto", to_groups: PreferenceTokenizer | None = None
) -> tuple[Audit, dict[str, str]]:
    """Audits every record of some sources, broken ones too.

    Args:
      data: as `open_sources` takes it.
      format: a name in `FORMATS`, or `auto` to tell it from each source's first record that fits one.
      to_groups: makes tokens of text; without it lengths are words, and messages are plain lines of text.
    Returns:
      The audit, and of each source the format it was read with; `auto` where no record fits one.
    Raises:
      InputError: if a source cannot be opened.
    """
    audit = Audit(None if to_groups is None else to_groups.tokenizer)
    render = plain if to_groups is None else Renderer(to_groups.tokenizer)
    formats: dict[str, str] = {}
    for source in open_sources(data):
        reading = Reading(source, format, render)
        with tqdm.tqdm(
            total=source.num_records(), desc=f"audit {source.name}", unit="record", leave=False, disable=None
        ) as bar:
            for chunk in chunks(_preferences(reading, audit)):
                _see(audit, chunk, to_groups, reading.format)
                bar.update(reading.records - bar.n)
        formats[source.name] = reading.format
        if reading.unread:
            audit.ignore(source.name, reading.unread)
    return audit, formats


def _preferences(reading: Reading, audit: Audit) -> Iterator[Preference]:
    """The preferences of a source; the audit is told of all its other records."""
    try:
        yield from reading.preferences(audit.drop, audit.refuse)
    except InputError as error:  # from the source itself, which ends with it
        audit.stop(str(error))


def _see(audit: Audit, chunk: list[Preference], to_groups: PreferenceTokenizer | None, format: str) -> None:
    if to_groups is None:
        for preference in chunk:
            audit.see(preference, None, also=of_format(format, preference))
        return
    kept = []
    for preference, group in zip(chunk, to_groups(chunk), strict=True):
        if isinstance(group, Unusable):
            audit.drop(preference.origin, str(group))
        else:
            kept.append((preference, group))
    joint = differs_jointly(kept, to_groups.tokenizer)
    for (preference, group), differs in zip(kept, joint, strict=True):
        audit.see(preference, group, also=[*of_format(format, preference), *["boundary"] * differs])


def _print(result: dict[str, Any]) -> None:
    formats = ", ".join(f"{name} ({format})" for name, format in result["formats"].items())
    print(f"data       {formats}")
    print(*report(result), sep="\n")


def _check_outputs(config: AuditConfig) -> None:
    """InputError now, rather than when everything has been read."""
    outputs = {
        flag: Path(name) for flag, name in (("--json", config.json), ("--plot", config.plot)) if name is not None
    }
    for flag, path in outputs.items():
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise InputError(f"{flag} {path} is no file in a directory; allowed: a file to write; make its directory")
    taken = {file.resolve() for data in (config.data, config.eval_data or config.data) for file in _files(data)}
    for flag, path in outputs.items():
        if path.resolve() in taken:
            raise InputError(f"{flag} {path} is read or written already; allowed: a file of its own; name another")
        taken.add(path.resolve())


def _files(data: str) -> Iterator[Path]:
    for source in open_sources(data):
        yield from source.files


def _write(config: AuditConfig, results: dict[str, dict[str, Any]]) -> None:
    if config.json is not None:
        with writing(Path(config.json)):
            text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
            Path(config.json).write_text(text + "\n", encoding="utf-8")
        print(f"json       {config.json}: every record named")
    if config.plot is not None:
        with writing(Path(config.plot)):
            lengths = {result["source"]: result["lengths"] for result in results.values()}
            save_lengths(lengths, Path(config.plot), unit=results["data"]["unit"])
        print(f"plot       {config.plot}")
