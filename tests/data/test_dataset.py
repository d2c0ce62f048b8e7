import pytest

from jaxdpo.data.dataset import Dropped
from jaxdpo.types import Origin


@pytest.mark.parametrize(
    ("records", "summary"),
    [
        ([], "dropped 0"),
        ([("a.jsonl", 8, "line", "empty")], "dropped 1: row 7 (line 8): empty"),
        (
            [("a.csv", 0, "row", "empty"), ("b.jsonl", 8, "line", "equal")],
            "dropped 2: a.csv, row 0: empty; b.jsonl, line 8: equal",
        ),
    ],
)
def test_dropped_records_are_named(records, summary):
    dropped = Dropped((Origin(*origin), reason) for *origin, reason in records)
    assert dropped.summary() == summary
    assert dropped.total == len(records)


def test_of_many_dropped_records_the_first_are_named_and_all_counted():
    dropped = Dropped((Origin("a.csv", n, "row"), ("empty", "equal", "equal")[n % 3]) for n in range(3000))
    assert len(dropped.first) == 10
    assert dropped.summary().startswith("dropped 3000: row 0: empty; row 1: equal; row 2: equal; row 3: empty; ")
    assert dropped.summary().endswith("; row 9: empty; and 2,990 more, in all 2,000 equal, 1,000 empty")
