"""A run killed with SIGKILL at any moment, and resumed, ends bit by bit as one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests import tiny

STEPS = 30
FLAGS = f"--batch-size 5 --max-steps {STEPS} --learning-rate 1e-3 --warmup-steps 3 --save-every 2 --eval-every 5"
"""24 pairs: six epochs, the last step of each smaller."""
TORN = '{"step": 99, "loss": 0.'


class Process:
    """`python -m jaxdpo.cli dpo` in a process of its own."""

    def __init__(self, inputs, root: Path, compiled: Path, *flags: str) -> None:
        command = inputs.command(root, f"--eval-data {inputs.held_out} {FLAGS}")
        self.root = root
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "jaxdpo.cli", *command, *flags],
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(compiled),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                "PYTHONUNBUFFERED": "1",  # what is printed outlives the kill
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self) -> str:
        """What it printed; it must end well."""
        printed, _ = self.popen.communicate(timeout=300)
        assert self.popen.returncode == 0, printed
        return printed

    def kill_when(self, happens) -> str:
        """SIGKILL as soon as `happens(root)`; what it printed."""
        while not happens(self.root):
            assert self.popen.poll() is None, self.popen.communicate()[0]
            time.sleep(0.0005)
        self.popen.kill()
        printed, _ = self.popen.communicate(timeout=60)
        assert self.popen.returncode == -signal.SIGKILL
        return printed


def steps_done(root: Path) -> int:
    path = root / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def saving(root: Path) -> bool:
    """Orbax renames the directory when it is complete."""
    return any(path.name.endswith(".orbax-checkpoint-tmp") for path in (root / "checkpoints").glob("*"))


def saved(root: Path) -> list[int]:
    return sorted(int(path.name) for path in (root / "checkpoints").glob("*") if path.name.isdigit())


def timeless(root: Path) -> list[dict]:
    return tiny.timeless(json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_killed_and_resumed_is_as_if_never_killed(inputs, compiled, tmp_path):
    alone, root = tmp_path / "alone", tmp_path / "run"
    Process(inputs, alone, compiled).wait()
    assert steps_done(alone) == STEPS and saved(alone) == [28, 30]

    # After a step, most likely before its checkpoint is complete; a line of the metrics was torn as well.
    Process(inputs, root, compiled).kill_when(lambda root: steps_done(root) >= 3)
    assert steps_done(root) < STEPS
    with (root / "metrics.jsonl").open("a") as file:
        file.write(TORN)

    # In the middle of a save, after another one was completed; again if the save was faster than the signal.
    for _ in range(4):
        before = saved(root)
        printed = Process(inputs, root, compiled).kill_when(
            lambda root, old=before: saving(root) and saved(root) != old
        )
        assert (f"resume     step {before[-1]} of {STEPS}," if before else "starting again") in printed
        if saving(root):
            break
    assert saving(root) and steps_done(root) < STEPS

    # In another epoch.
    latest, rows = saved(root)[-1], steps_done(root)
    printed = Process(inputs, root, compiled).kill_when(lambda root: steps_done(root) > rows + 2)
    assert f"resume     step {latest} of {STEPS}, from {root}/checkpoints/{latest}\n" in printed
    assert not (root / "export").exists()

    Process(inputs, root, compiled, "--resume", "must").wait()
    assert timeless(root) == timeless(alone)
    assert (root / "export" / "model.safetensors").read_bytes() == (alone / "export" / "model.safetensors").read_bytes()
    assert saved(root) == saved(alone) and not saving(root)
    trained, start = load_file(root / "export" / "model.safetensors"), load_file(inputs.model / "model.safetensors")
    assert all((trained[name] != start[name]).any() for name in start)
