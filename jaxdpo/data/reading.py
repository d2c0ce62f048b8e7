"""From what a user calls the data to preferences as text, one after another."""

from collections.abc import Callable, Iterator

from jaxdpo.data.content import Render, Unusable
from jaxdpo.data.formats import FORMATS, detect_format, preference_of
from jaxdpo.data.records import Source
from jaxdpo.data.sources import open_sources
from jaxdpo.types import InputError, Origin, Preference


def read_preferences(
    data: str,
    *,
    format: str = "auto",
    render: Render | None = None,
    drop: Callable[[Origin, str], None] | None = None,
) -> Iterator[Preference]:
    """The preferences of data of any size as text, one after another, without a tokenizer.

    Args:
      data: one source, or several separated by commas, as `open_sources` takes them.
      format: a name in `FORMATS`, or `auto` to tell it from each source's first record.
      render: `Renderer(tokenizer)`, which writes messages as text; None: messages are an error.
      drop: called with origin and reason of each record that holds no preference; None: such a record is an error.
    Raises:
      InputError: if a source cannot be read or a record breaks its format; with source and line or row.
    """
    for source in open_sources(data):
        yield from Reading(source, format, render).preferences(drop or _refuse)


def _refuse(origin: Origin, reason: str) -> None:
    raise InputError(f"{origin}: {reason}; allowed: usable records; delete it, or say what becomes of such records")


class Reading:
    """One source while it is read.

    Args:
      source: where the records are.
      format: a name in `FORMATS`, or `auto`.
      render: writes messages as text.
    """

    def __init__(self, source: Source, format: str, render: Render | None) -> None:
        self.source = source
        self.format = format
        """`auto` until the first record is read."""
        self.records = 0
        """How many were read."""
        self._render = render

    def preferences(self, drop: Callable[[Origin, str], None]) -> Iterator[Preference]:
        """The preferences of all records; `drop` is called with origin and reason of each that holds none.

        Raises:
          InputError: if the source cannot be read or a record breaks the format.
        """
        for number, record in self.source.records():
            origin = Origin(self.source.name, number, self.source.unit)
            self.records += 1
            if self.format == "auto":
                try:
                    self.format = detect_format(record)
                except InputError as error:
                    raise InputError(f"{origin}: {error}") from None
            try:
                yield preference_of(record, FORMATS[self.format], origin, self._render)
            except Unusable as reason:
                drop(origin, str(reason))
