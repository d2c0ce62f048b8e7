"""What the steps of a run achieve, and where their time goes: the measured part of a row of metrics."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from jaxdpo.train.flops import Peak
from jaxdpo.train.memory import memory_in_use
from jaxdpo.train.profile import Profile
from jaxdpo.train.stopwatch import Stopwatch
from jaxdpo.types import Batch

ALWAYS = ("data_wait", "step", "evaluation", "checkpoint", "logging")
"""Phases that a row has whether they took time or not; others only if they did."""
DIGITS = 6
"""Decimals of the seconds in a row."""


class Timing(NamedTuple):
    """Where the time of the steps went."""

    first: float
    """Seconds of the first step, which compiles."""
    steps: int = 0
    """How many others compiled nothing."""
    seconds: float = 0.0
    """Of those."""
    waited: float = 0.0
    """Seconds of them in which the data was waited for."""
    tokens: int = 0
    """Of those."""
    flops: float = 0.0
    """Of those: `useful_flops`."""


class Usage(NamedTuple):
    """What a run made of its time and its devices."""

    timing: Timing
    """Of its steps."""
    spent: Mapping[str, float]
    """Seconds of every phase in `PHASES`; together, all time from its start."""
    programs: int
    """Compiled."""
    cached: int
    """Programs that were read from the cache on disk instead."""
    peak: Peak
    """Of one device."""
    devices: int
    """How many there are."""

    @property
    def goodput(self) -> float:
        """Share of the time that went into optimizer steps that count."""
        return self.spent["step"] / sum(self.spent.values())

    @property
    def tokens_per_second_per_device(self) -> float:
        """Of the steps that compiled nothing."""
        return self.timing.tokens / (self.timing.seconds * self.devices)

    @property
    def mfu(self) -> float:
        """Of the same steps."""
        return self.timing.flops / (self.timing.seconds * self.devices * self.peak.flops)


class Watch:
    """Follows the steps of a run, in time with its loop."""

    timing: Timing | None = None
    """None before the first step is done."""

    def __init__(
        self,
        stopwatch: Stopwatch,
        flops: Callable[[Batch], float],
        peak: Peak,
        mesh: jax.sharding.Mesh,
        profile: Profile,
        *,
        redone: int = 0,
    ) -> None:
        """Begins with the first row.

        Args:
          stopwatch: of the whole run.
          flops: `useful_flops` of a host batch.
          peak: of one device.
          mesh: where the run is.
          profile: what is traced.
          redone: the last step that an earlier start of this run took; steps up to it are taken for the second time.
        """
        self._stopwatch, self._flops, self._peak, self._mesh = stopwatch, flops, peak, mesh
        self._profile, self._redone = profile, redone
        self._shapes: set[tuple] = set()
        self._warned = False
        self._begin_row()

    def _begin_row(self) -> None:
        made = self._stopwatch.compilations
        self._before = dict(self._stopwatch.seconds)
        self._programs, self._from_cache = made.programs, made.from_cache
        self._waited = self._stepped = 0.0

    def close(self) -> None:
        """Closes what is traced."""
        self._profile.close()

    def usage(self) -> Usage | None:
        """Of the run until now; None before the first step is done."""
        made = self._stopwatch.compilations
        compiled, spent = made.programs - made.from_cache, dict(self._stopwatch.seconds)
        if self.timing is None:
            return None
        return Usage(self.timing, spent, compiled, made.from_cache, self._peak, self._mesh.size)

    def lap(self, phase: str) -> None:
        """Ends a phase of the row."""
        self._stopwatch.lap(phase)

    def ready(self) -> None:
        """The data of a step lies on the devices: what it was waited for ends here."""
        self._waited += self._stopwatch.lap("data_wait")

    @contextlib.contextmanager
    def step(self, number: int, batches: Sequence[Batch]) -> Iterator[None]:
        """What happens within is an optimizer step, from 1; warns, once, of one that compiles without a new shape."""
        self._waited += self._stopwatch.lap("data_wait")
        self._profile.begin(number)
        self._stopwatch.lap("logging")
        programs = self._stopwatch.compilations.programs
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        self._stepped = self._waited + self._stopwatch.lap("step")
        compiled = self._stopwatch.compilations.programs > programs
        self._count(batches, compiled=compiled)
        if not self._new_shapes(batches) and compiled and not self._warned:
            self._warned = True
            shapes = ", ".join(sorted({str(list(batch.tokens.shape)) for batch in batches}))
            print(
                f"\nwarning    step {number} compiled a program, though one with as many microbatches of the shape "
                f"{shapes} was done before; `compilations` in metrics.jsonl has all of them",
                file=sys.stderr,
            )
        self._profile.end(number)
        self._stopwatch.lap("logging")

    def _count(self, batches: Sequence[Batch], *, compiled: bool) -> None:
        """Adds a step to the timing."""
        self._tokens = sum(int((batch.group > 0).sum()) for batch in batches)
        self._work = sum(map(self._flops, batches))
        if self.timing is None:
            self.timing = Timing(self._stepped)
        elif not compiled:
            self.timing = Timing(
                self.timing.first,
                self.timing.steps + 1,
                self.timing.seconds + self._stepped,
                self.timing.waited + self._waited,
                self.timing.tokens + self._tokens,
                self.timing.flops + self._work,
            )

    def _new_shapes(self, batches: Sequence[Batch]) -> bool:
        """Whether a step is the first that runs the programs of its shapes."""
        # A coupled loss of several microbatches is compiled for its number of groups.
        several = sum(int(batch.group_mask.sum()) for batch in batches) if len(batches) > 1 else 0
        needed = {(several, batch.tokens.shape) for batch in batches}
        new = not needed <= self._shapes
        self._shapes |= needed
        return new

    def row(self, number: int, groups: int) -> dict[str, float]:
        """What a row says of the step that was done, and of the time since the row before; begins the next one.

        Args:
          number: of the step, from 1.
          groups: how many it has.
        """
        seconds, made = self._stopwatch.seconds, self._stopwatch.compilations
        spent = {phase: total - self._before[phase] for phase, total in seconds.items()}
        if number <= self._redone:
            seconds["step"] -= spent["step"]
            seconds["redone"] += spent["step"]
        cached = made.from_cache - self._from_cache
        made_now = {"compilations": made.programs - self._programs - cached, "compilations_cached": cached}
        device_seconds = self._stepped * self._mesh.size
        row = {
            "tokens": self._tokens,
            "pairs_per_second": groups / self._stepped,
            "tokens_per_second_per_device": self._tokens / device_seconds,
            "mfu": self._work / (device_seconds * self._peak.flops),
            "goodput": seconds["step"] / sum(seconds.values()),
            **{f"seconds/{phase}": round(t, DIGITS) for phase, t in spent.items() if t > 0 or phase in ALWAYS},
            **{name: n for name, n in made_now.items() if n},
            **memory_in_use(self._mesh),
        }
        self._begin_row()
        return row
