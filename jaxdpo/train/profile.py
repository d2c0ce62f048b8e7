"""`--profile FIRST:LAST`: a trace of some steps by jax's profiler."""

import sys
from collections.abc import Callable
from pathlib import Path

import jax

from jaxdpo.types import InputError


class Profile:
    """Traces some steps of a run; the trace is closed when they are done, or when the run ends before."""

    def __init__(self, directory: Path, steps: range) -> None:
        """Traces nothing yet.

        Args:
          directory: where the trace goes.
          steps: which ones, from 1; none if empty.
        """
        self._directory, self._steps, self._running = directory, steps, False

    def begin(self, step: int) -> None:
        """Starts the trace, if the step is the first of it."""
        if step == self._steps.start and step in self._steps:
            self._running = self._tried(lambda: jax.profiler.start_trace(self._directory))

    def end(self, step: int) -> None:
        """Closes the trace, if the step is the last of it."""
        if step + 1 == self._steps.stop:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is running, and says how to look at it."""
        if not self._running:
            return
        self._running = False
        if self._tried(jax.profiler.stop_trace):
            print(f"\nprofile    {self._directory}: look at it with xprof --logdir {self._directory}")

    def _tried(self, action: Callable[[], None]) -> bool:
        """Whether an action succeeded; a trace that cannot be made must not end a run."""
        try:
            action()
        except Exception as error:  # whatever the profiler raises: another trace runs, or the disk is full
            told = next(iter(str(error).splitlines()), type(error).__name__)
            print(f"\nwarning    --profile failed ({told}); the run goes on", file=sys.stderr)
            return False
        return True


def steps_to_profile(asked: range, start: int, total: int, *, again: bool = False) -> range:
    """The steps of `--profile` that a run will take, from 1; says which are behind it.

    Args:
      asked: what the option names; empty without it.
      start: the step that the run goes on from.
      total: its last step.
      again: whether the run was started with the same option before, so that steps behind `start` were traced then.
    Raises:
      InputError: for steps that the run does not take.
    """
    if not asked:
        return asked
    if asked.stop > total + 1 or (asked.start <= start and not again):
        allowed = f"steps from {start + 1} to {total}" if start < total else "none, as all steps are done"
        raise InputError(
            f"--profile is {asked.start}:{asked.stop - 1}; allowed: {allowed}, which this run takes; name some of "
            "them, or drop the flag"
        )
    if asked.start <= start:
        print(f"profile    steps up to {start} are done, and not traced again")
    return range(max(asked.start, start + 1), asked.stop)
