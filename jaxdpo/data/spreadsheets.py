"""The rows of a CSV file, one at a time, each as the record that its cells spell.

Memory holds one row, whatever the size of the file.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxdpo.data.fields import Record
from jaxdpo.data.files import open_content, text_lines
from jaxdpo.data.readers import no_record
from jaxdpo.data.records import Numbered, OnError, raise_error
from jaxdpo.types import InputError

CELL_LIMIT = 1 << 24
"""Characters that a cell may have: where a quote is never closed, the rest of the file would be one cell."""

_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


def csv_rows(name: str, path: Path, on_error: OnError = raise_error) -> Numbered:
    """The rows below the header of a CSV file, each with its number from 0; blank lines are no rows.

    Args:
      name: the file as the user wrote it.
      path: where it is. Text in UTF-8 with a header; cells stand between commas, and between quotes where they hold
        commas, quotes or line ends.
      on_error: called for each row with more or fewer cells, or with a cell that is no JSON where its field takes no
        text.
    Raises:
      InputError: if it is no such file, a name stands twice in the header, or there is no row.
    """
    row, where = 0, f"{name}, header"
    csv.field_size_limit(CELL_LIMIT)  # it is the process's; 131 072 unless said
    with open_content(name, path, lambda: f"before row {row}") as file:
        rows = csv.reader(_lines(file, name), strict=True)
        try:
            header = _checked_header(next(rows, []), where)
            where = f"{name}, row {row}"
            for cells in rows:
                if not cells:
                    continue
                try:
                    record = _record(header, cells, where)
                except InputError as error:
                    on_error(row, error)
                else:
                    yield row, record
                row += 1
                where = f"{name}, row {row}"
        except csv.Error as error:
            raise InputError(
                f'{where}: bad CSV at line {rows.line_num} ({error}); allowed: cells between commas, in " where they '
                f'hold commas, line ends or " (written ""), of at most {CELL_LIMIT} characters; correct the row'
            ) from None
    if not row:
        raise no_record(name)


def _number(cell: str) -> float | str:
    """A number if it is one; the format complains of anything else."""
    try:
        return float(cell)
    except ValueError:
        return cell


def _truth(cell: str) -> bool | str:
    """True and false in any case, as data frames and spreadsheets write them; 0 and 1 could as well be ranks."""
    return {"true": True, "false": False}.get(cell.strip().lower(), cell)


def _text_or_messages(cell: str) -> Any:
    """Messages if it begins as a list of them; anything else is text, even if it is JSON."""
    return json.loads(cell) if _MESSAGES.match(cell) else cell


CELLS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("completions", "ranks", "scores", "messages", "tools", "chat_template_kwargs"), json.loads),
    **dict.fromkeys(("prompt", "chosen", "rejected", "completion"), _text_or_messages),
    "label": _truth,
    "margin": _number,
}
"""Field -> what a cell of it holds; all other fields are text. An empty cell is null unless its field takes text."""


def _record(header: list[str], cells: list[str], where: str) -> Record:
    if len(cells) != len(header):
        raise InputError(
            f"{where}: {len(cells)} cells below {len(header)} names; allowed: one for each; quote cells that hold "
            "commas or line ends"
        )
    return {field: _value(field, cell, where) for field, cell in zip(header, cells, strict=True)}


def _value(field: str, cell: str, where: str) -> Any:
    convert = CELLS.get(field, str)
    if not cell:
        return "" if convert in (str, _text_or_messages) else None
    try:
        return convert(cell)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: cell {field!r} is no JSON ({error}); got {cell[:60]!r}; allowed: a JSON list or object; "
            "write the cell with json.dumps"
        ) from None


def _checked_header(header: list[str], where: str) -> list[str]:
    for character, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and character in header[0]:
            raise InputError(f"{where}: got names between {name}; allowed: commas; export the file with commas")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise InputError(f"{where}: {', '.join(map(repr, twice))} stands twice; allowed: each name once; rename one")
    return header


def _lines(file: IO[bytes], name: str) -> Iterator[str]:
    for number, line in text_lines(file, name):
        if "\0" in line:
            raise InputError(f"{name}, line {number}: a NUL character; allowed: text; convert the file to UTF-8")
        yield line
