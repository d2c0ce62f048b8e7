"""Where the wall time of a run goes: every moment belongs to one phase, and compiling is a phase of its own."""

import time
from typing import Any

import jax

PHASES = {
    "start": "start-up",
    "reference": "reference",
    "compilation": "compilation",
    "data_wait": "data wait",
    "step": "steps",
    "redone": "steps done again",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "logging": "logging",
}
"""Phase -> what it is called for people."""

COMPILING = frozenset(
    f"/jax/core/compile/{name}_duration" for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)
"""What jax calls the ways from a function to its program: traced, lowered, and compiled or read from the cache."""
COMPILED, FROM_CACHE = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"


class Compilations:
    """Counts the programs that jax makes within it, and the seconds that it takes to.

    Example:
      >>> with Compilations() as made:
      ...     _ = jax.jit(lambda x: x + 1)(1.5)
      >>> made.programs > 0 and made.seconds > 0
      True
    """

    def __init__(self) -> None:
        self.programs = 0
        """Compiled, or read from the cache on disk."""
        self.from_cache = 0
        """Those that were read."""
        self.seconds = 0.0
        """Of tracing, lowering and compiling."""
        self._spans: list[tuple[float, float]] = []

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_time_span_listener(self._span)
        jax.monitoring.register_event_listener(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._span)
        jax.monitoring.unregister_event_listener(self._event)

    def _event(self, event: str, **kwargs: Any) -> None:
        del kwargs
        self.from_cache += event == FROM_CACHE

    def _span(self, event: str, start_time: float, end_time: float, **kwargs: Any) -> None:
        del kwargs
        if event not in COMPILING:
            return
        self.programs += event == COMPILED
        # What began later than this span and has ended was part of it, as a function that is traced in another.
        while self._spans and self._spans[-1][0] >= start_time:
            inner = self._spans.pop()
            self.seconds -= inner[1] - inner[0]
        self._spans.append((start_time, end_time))
        self.seconds += end_time - start_time


class Stopwatch:
    """Gives all time since it was made to phases, one after another; what was compiled in one does not count there."""

    def __init__(self, compilations: Compilations) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        """By phase; together, all until the last lap."""
        self.compilations = compilations
        self._began = self._mark = time.perf_counter()
        self._compiled = compilations.seconds

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._began

    def lap(self, phase: str) -> float:
        """Ends a phase: the time since the last lap was its; returns the seconds, with what was compiled in them."""
        now, compiled = time.perf_counter(), self.compilations.seconds
        elapsed, compiling = now - self._mark, compiled - self._compiled
        self._mark, self._compiled = now, compiled
        compiling = min(compiling, elapsed)  # jax reads another clock
        self.seconds[phase] += elapsed - compiling
        self.seconds["compilation"] += compiling
        return elapsed
