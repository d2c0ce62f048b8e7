"""From what a user calls the data to preferences as text, one after another."""

from collections.abc import Callable, Iterator

from jaxdpo.data.content import Render, Unusable
from jaxdpo.data.fields import Record
from jaxdpo.data.formats import FORMATS, READS, detect_format, preference_of
from jaxdpo.data.records import Source
from jaxdpo.data.sources import open_sources
from jaxdpo.types import InputError, Origin, Preference

UNREAD = 20
"""Fields of a source that are told apart though its format does not read them."""
Tell = Callable[[Origin, str], None]
"""Told of a record that is no preference: where it stands, and why."""


def read_preferences(
    data: str,
    *,
    format: str = "auto",
    render: Render | None = None,
    drop: Tell | None = None,
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


def _stop(origin: Origin, message: str) -> None:
    raise InputError(message) from None


class Reading:
    """One source while it is read.

    Args:
      source: where the records are.
      format: a name in `FORMATS`, or `auto`.
      render: writes messages as text.
      compared: see `preference_of`.
    """

    def __init__(self, source: Source, format: str, render: Render | None, *, compared: bool = True) -> None:
        self.source = source
        self.format = format
        """`auto` until the first record is read."""
        self.records = 0
        """How many were read, those that are no preference among them."""
        self.unread: dict[str, int] = {}
        """Fields that the format does not read -> how many records fill them; behind the first `UNREAD`, as `…`."""
        self._render, self._compared = render, compared

    def preferences(self, drop: Tell, refuse: Tell = _stop) -> Iterator[Preference]:
        """The preferences of all records.

        Args:
          drop: called with the reason for each record that is well formed and holds no preference.
          refuse: called with the message for each record that breaks the format, and each line or row that holds none.
        Raises:
          InputError: if the source cannot be read on; unless `refuse` is given, also of what it is called for.
        """

        def on_error(number: int, error: InputError) -> None:
            self.records += 1
            refuse(self._origin(number), str(error))

        for number, record in self.source.records(on_error):
            self.records += 1
            origin = self._origin(number)
            try:
                self._look_at_fields(record, origin)
                preference = preference_of(record, FORMATS[self.format], origin, self._render, compared=self._compared)
            except Unusable as reason:
                drop(origin, str(reason))
            except InputError as error:
                refuse(origin, str(error))
            else:
                yield preference

    def _origin(self, number: int) -> Origin:
        return Origin(self.source.name, number, self.source.unit)

    def _look_at_fields(self, record: Record, origin: Origin) -> None:
        """Tells the format, if it is not known yet, and counts the fields that it does not read."""
        if self.format == "auto":
            try:
                self.format = detect_format(record)
            except InputError as error:
                raise InputError(f"{origin}: {error}") from None
        for field in record:
            if field in READS[self.format] or record[field] is None:
                continue
            name = field if field in self.unread or len(self.unread) < UNREAD else "…"
            self.unread[name] = self.unread.get(name, 0) + 1
