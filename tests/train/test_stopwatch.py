"""All time belongs to a phase, and what jax compiles is counted once, told apart from what it reads from disk."""

import doctest
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.train import stopwatch
from jaxdpo.train.stopwatch import COMPILED, PHASES, Compilations, Stopwatch


def test_docstrings():
    assert doctest.testmod(stopwatch).failed == 0


X = np.arange(5, dtype=np.float32)


def program():
    """A function that was not compiled before; every one of them is the same program."""

    def anew(x):
        return jnp.sin(x) * 1.25 + jnp.cos(x)

    return jax.jit(anew)


def test_a_fresh_shape_is_compiled_and_a_known_one_is_not():
    function = program()
    with Compilations() as made:
        function(X)
        assert made.programs == 1 and made.seconds > 0
        before = made.seconds
        function(X + 1)
        assert made.programs == 1 and made.seconds == before
        function(X[:3])
        assert made.programs == 2 and made.seconds > before


def test_what_lies_in_the_cache_is_told_apart():
    program()(X)  # keeps it there
    with Compilations() as made:
        program()(X)
    assert (made.programs, made.from_cache) == (1, 1)


def test_nothing_is_counted_before_or_after():
    with Compilations() as made:
        pass
    program()(X)
    assert (made.programs, made.from_cache, made.seconds) == (0, 0, 0.0)
    with Compilations() as other:
        program()(X)
    assert made.programs == 0 and other.programs == 1


def test_a_span_within_another_counts_once():
    """As of a function that is compiled while another one is traced."""
    made = Compilations()
    trace = "/jax/core/compile/jaxpr_trace_duration"
    for event, start, end in [(trace, 0, 1), (trace, 2, 3), (COMPILED, 3, 5), (trace, 1.5, 6), ("/other", 0, 99)]:
        made._span(event, start, end)
    assert made.seconds == 1 + (6 - 1.5) and made.programs == 1


@pytest.fixture
def clock(monkeypatch):
    moments = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr("jaxdpo.train.stopwatch.time.perf_counter", lambda: moments.now)
    return moments


def test_all_time_is_given_to_phases_and_compilation_to_its_own(clock):
    made = Compilations()
    watch = Stopwatch(made)
    laps = []
    for phase, seconds, compiled in [("start", 3, 0), ("step", 10, 8), ("data_wait", 2, 0), ("step", 1, 0)]:
        clock.now += seconds
        made.seconds += compiled
        laps.append(watch.lap(phase))
    assert laps == [3, 10, 2, 1]
    spent = {phase: seconds for phase, seconds in watch.seconds.items() if seconds}
    assert spent == {"start": 3, "compilation": 8, "data_wait": 2, "step": 2 + 1}
    assert sum(watch.seconds.values()) == clock.now - 100 and set(watch.seconds) == set(PHASES)


def test_no_phase_is_shorter_than_nothing(clock):
    """jax reads another clock than we do."""
    made = Compilations()
    watch = Stopwatch(made)
    clock.now, made.seconds = 101.0, 1.001
    watch.lap("step")
    assert (watch.seconds["step"], watch.seconds["compilation"]) == (0, 1)
