"""A fixed sample of what `benchmarks/fuzz_readers.py` does for as long as one likes."""

import importlib.util
import signal
from collections import Counter
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "fuzz_readers", Path(__file__).parents[2] / "benchmarks" / "fuzz_readers.py"
)
fuzz_readers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz_readers)


@pytest.fixture(autouse=True)
def alarm():
    before = signal.signal(signal.SIGALRM, fuzz_readers.too_long)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def directories(tmp_path):
    paths = tmp_path / "valid", tmp_path / "damaged"
    for path in paths:
        path.mkdir()
    return paths


def test_damaged_data_is_refused_or_read(directories):
    outcomes = Counter(outcome for _, outcome in fuzz_readers.fuzz(range(400), *directories))
    assert {"read", "refused"} <= set(outcomes) <= {"read", "refused", "no preference"}, "\n".join(outcomes)


def test_valid_data_is_read(directories, monkeypatch):
    """The sample begins with data that is whole, of every kind."""
    monkeypatch.chdir(directories[0])
    names = fuzz_readers.valid_sources(directories[0])
    assert {name: fuzz_readers.read(name) for name in names} == dict.fromkeys(names, "read")


@pytest.mark.parametrize("error", [KeyError("prompt"), RecursionError(), fuzz_readers.Hang()])
def test_an_error_of_another_kind_is_found(directories, monkeypatch, error):
    def broken(record):
        raise error

    monkeypatch.setitem(fuzz_readers.FORMATS, "broken", broken)
    monkeypatch.setattr(fuzz_readers, "damage", lambda *_: None)
    ((_, outcome),) = fuzz_readers.fuzz([0], *directories)
    assert type(error).__name__ in outcome.splitlines()[-1]
