"""What a row says of a step's time and of what it achieved, on a clock that the test moves."""

import re
import types
from pathlib import Path

import jax
import pytest

from jaxdpo.data.pipeline import microbatches
from jaxdpo.sharding import make_mesh
from jaxdpo.train.flops import Peak
from jaxdpo.train.memory import memory_in_use
from jaxdpo.train.profile import Profile
from jaxdpo.train.stopwatch import Compilations, Stopwatch
from jaxdpo.train.watch import DIGITS, Watch
from tests import tiny

DATA = tiny.dataset(groups=6)
BATCHES = microbatches(DATA, [0, 1], tiny.layout(DATA))
LONGER = microbatches(DATA, [0, 1], tiny.layout(DATA, row_lengths=[128]))
TOKENS = int(DATA.tokens[:2].sum())
FLOPS, PEAK, DEVICES = 600.0, 50.0, 4
ROUNDED = 0.5 * 10**-DIGITS


class Followed:
    """A watch whose clock and compiler are moved by hand."""

    def __init__(self, tmp_path, monkeypatch, **options):
        self.now, self.made = 0.0, Compilations()
        monkeypatch.setattr("jaxdpo.train.stopwatch.time.perf_counter", lambda: self.now)
        mesh = make_mesh(jax.devices()[:DEVICES])
        profile = Profile(tmp_path / "profile", range(0))
        self.stopwatch = Stopwatch(self.made)
        self.after(start=5.0)
        self.watch = Watch(
            self.stopwatch, lambda batch: FLOPS / len(BATCHES), Peak(PEAK, "made up"), mesh, profile, **options
        )

    def after(self, **phases):
        for phase, seconds in phases.items():
            self.now += seconds
            self.stopwatch.lap(phase)

    def step(self, number, *, waited=1.0, seconds=2.0, compiled=0.0, batches=BATCHES):
        """One step; its row if it were the last thing in it."""
        self.now += waited
        with self.watch.step(number, batches):
            self.watch.ready()
            self.now += seconds + compiled
            if compiled:
                self.made.seconds += compiled
                self.made.programs += 1

    def row(self, number):
        return self.watch.row(number, 2)


@pytest.fixture
def followed(tmp_path, monkeypatch):
    return lambda **options: Followed(tmp_path, monkeypatch, **options)


def test_a_row_names_what_is_documented(followed):
    here = followed()
    here.step(1, compiled=3.0)
    row = here.row(1)
    names = [name for name in tiny.MEASURED if not name.endswith("cached") and not name.startswith("device_memory")]
    assert list(row) == ["tokens", *names]


def test_seconds_are_all_that_passed_since_the_row_before(followed):
    here = followed()
    here.step(1, waited=1 / 3, seconds=2 / 3, compiled=3.0)
    first, ended = here.row(1), here.now
    assert sum(first[name] for name in first if name.startswith("seconds/")) == pytest.approx(4, abs=6 * ROUNDED)
    assert first["seconds/compilation"] == 3 and first["compilations"] == 1
    # What comes behind a row stands in the next one: it was written, and its state saved.
    here.after(logging=1 / 7, checkpoint=1 / 9)
    here.step(2, waited=1 / 11, seconds=1 / 13)
    here.after(evaluation=1 / 17)
    second = here.row(2)
    passed = {"logging": 1 / 7, "checkpoint": 1 / 9, "data_wait": 1 / 11, "step": 1 / 13, "evaluation": 1 / 17}
    got = {name.split("/")[1]: seconds for name, seconds in second.items() if name.startswith("seconds/")}
    assert got == pytest.approx(passed, abs=ROUNDED)
    assert sum(got.values()) == pytest.approx(here.now - ended, abs=5 * ROUNDED)
    assert "compilations" not in second


def test_rates_are_over_waiting_and_stepping(followed):
    """Saving, logging and evaluation are not in it; what compiles is."""
    here = followed()
    here.after(checkpoint=50.0)
    here.step(1, waited=1.0, seconds=2.0, compiled=3.0)
    here.after(step=10.0, evaluation=50.0)  # the reference moves: counted as a step's, but not as its rate
    row = here.row(1)
    assert row["tokens"] == TOKENS and row["seconds/step"] == 12
    assert row["pairs_per_second"] == 2 / 6
    assert row["tokens_per_second_per_device"] == TOKENS / (6 * DEVICES)
    assert row["mfu"] == pytest.approx(FLOPS / (6 * DEVICES * PEAK))


def test_steps_that_compile_are_left_out_of_the_average(followed):
    here = followed()
    for number, compiled in ((1, 7.0), (2, 0.0), (3, 5.0), (4, 0.0)):
        here.step(number, compiled=compiled, batches=LONGER if number > 2 else BATCHES)
        here.row(number)
    usage = here.watch.usage()
    assert usage.timing == (10.0, 2, 6.0, 2.0, 2 * TOKENS, 2 * FLOPS)
    assert usage.tokens_per_second_per_device == TOKENS / (3 * DEVICES)
    assert usage.mfu == pytest.approx(FLOPS / (3 * DEVICES * PEAK))
    assert (usage.programs, usage.cached) == (2, 0)


def test_goodput_is_the_share_of_steps_that_count(followed):
    """Two steps were taken before, and lost: they are done again, and count for nothing."""
    here = followed(redone=2)
    goodput = []
    for number in (1, 2, 3, 4):
        here.step(number)
        goodput.append(here.row(number)["goodput"])
    assert goodput == [0, 0, 2 / (5 + 3 * 3), 4 / (5 + 4 * 3)]
    usage = here.watch.usage()
    assert usage.spent["redone"] == 4 and usage.goodput == goodput[-1]
    assert sum(usage.spent.values()) == here.now


def test_a_program_for_a_shape_that_was_done_before_is_told_of_once(followed, capfd):
    here = followed()
    for number in (1, 2):
        here.step(number, compiled=1.0, batches=(BATCHES, LONGER)[number - 1])
    several = [*BATCHES, *LONGER]
    here.step(3, compiled=1.0, batches=several)
    assert capfd.readouterr().err == ""
    for number in (4, 5):
        here.step(number, compiled=1.0, batches=several)
    (told,) = capfd.readouterr().err.strip().splitlines()
    shapes = ", ".join(sorted(str(list(batch.tokens.shape)) for batch in several))
    assert told.startswith("warning    step 4 compiled a program, though one with as many microbatches of the shape")
    assert shapes in told


def test_nothing_done_is_nothing_used(followed):
    assert followed().watch.usage() is None


class Device:
    """A device that says what it holds."""

    def __init__(self, **stats):
        self.memory_stats = lambda: stats or None


def test_memory_is_that_of_the_fullest_device_here():
    gib = 2**30
    full, half = Device(bytes_in_use=3 * gib, peak_bytes_in_use=4 * gib), Device(bytes_in_use=gib, peak_bytes_in_use=9)
    found = memory_in_use(types.SimpleNamespace(local_devices=[half, full]))
    assert (found["device_memory"], found["device_memory_peak"]) == (3, 4)
    assert 0.01 < found["host_memory_peak"] < 1000
    assert set(memory_in_use(types.SimpleNamespace(local_devices=[Device()]))) == {"host_memory_peak"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own figure: Linux")
def test_the_peak_of_the_host_is_that_of_the_kernel():
    told = memory_in_use(make_mesh(jax.devices()[:1]))["host_memory_peak"]
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert told == pytest.approx(int(kib) / 2**20, abs=0.01)
