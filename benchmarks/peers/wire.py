"""How the driver and the runners talk: JSON lines over a runner's stdin and stdout. Standard library only.

A runner is called with a specification, `python run_trl.py spec.json`. It loads what it needs, says what it is, and
then does one optimizer step each time it is asked, until its input ends:

    runner  {"ready": {"versions": {"trl": "1.16.0"}}}
    driver  {"step": 0}
    runner  {"step": 0, "loss": 0.69, "seconds": 190.2, "reference_seconds": null, "peak_rss_bytes": 9500000000}

Whatever else a library prints goes to the runner's stderr, which is a log file.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Spec(NamedTuple):
    """What a runner is asked to do."""

    model: str
    """A Hugging Face directory, float32."""
    pairs: str
    """JSON lines of `prompt`, `chosen` and `rejected` with their ids, `pairs_per_step` for each step, in order."""
    output: str
    """A directory of the runner's own, for what a library insists on writing."""
    steps: int
    """How many will be asked for at most."""
    pairs_per_step: int
    beta: float
    learning_rate: float
    warmup_steps: int
    """The learning rate of step n, from 0, is `learning_rate * min(1, (n + 1) / (warmup_steps + 1))`."""
    rmsprop_decay: float
    rmsprop_eps: float
    max_length: int
    """Tokens of prompt and completion; no pair is longer."""
    max_prompt_length: int
    """Tokens of the longest prompt, for libraries that pad every one to it."""
    max_response_length: int
    options: dict[str, Any]
    """What is special to this setting of the library."""

    def records(self) -> list[dict[str, Any]]:
        """The pairs, all steps one after another."""
        with open(self.pairs, encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def write_spec(path: Path, spec: Spec) -> None:
    """What `read_spec` reads."""
    path.write_text(json.dumps(spec._asdict(), indent=1) + "\n", encoding="utf-8")


def read_spec(arguments: Sequence[str]) -> Spec:
    """The specification that a runner is called with; SystemExit, saying what is wrong, for anything else."""
    if len(arguments) != 1:
        raise SystemExit(f"arguments are {list(arguments)}; allowed: the path of one specification (JSON)")
    path = Path(arguments[0])
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; allowed: a specification as benchmarks/dpo_vs_peers.py writes it")
    fields = json.loads(path.read_text(encoding="utf-8"))
    if set(fields) != set(Spec._fields):
        differ = ", ".join(sorted(set(fields) ^ set(Spec._fields)))
        raise SystemExit(f"{path}: {differ} missing or unknown; allowed: {', '.join(Spec._fields)}, each once")
    return Spec(**fields)


class Wire:
    """A runner's side. Make it before a library is imported that might print."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def ready(self, *packages: str) -> None:
        """Says that all is loaded, and the versions of the packages that matter."""
        self._send({"ready": {"versions": {name: importlib.metadata.version(name) for name in packages}}})

    def next_step(self) -> int | None:
        """Waits for the driver to ask for a step; None when it wants no more."""
        line = sys.stdin.readline()
        return int(json.loads(line)["step"]) if line else None

    def done(self, step: int, loss: float, seconds: float, reference_seconds: float | None = None) -> None:
        """Reports a step: its mean loss before the update, and the time of what was asked for."""
        peak = peak_rss_bytes()
        answer = {"loss": loss, "seconds": seconds, "reference_seconds": reference_seconds, "peak_rss_bytes": peak}
        self._send({"step": step, **answer})

    def _send(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


def peak_rss_bytes() -> int:
    """Most memory that this process has had resident; not `ru_maxrss`, which begins with that of its parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


class Runner:
    """A runner as the driver sees it: a process that stays alive between steps."""

    def __init__(self, python: Path, script: Path, spec: Path, log: Path) -> None:
        self.log = log
        with open(log, "w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [str(python), str(script), str(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        self.versions: dict[str, str] = {}

    def wait_until_ready(self) -> None:
        """Waits until everything is loaded."""
        self.versions = self._receive()["ready"]["versions"]

    def step(self, number: int) -> dict[str, Any]:
        """Does one optimizer step; its loss, times and the peak memory so far."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"step": number}) + "\n")
        self._process.stdin.flush()
        answer = self._receive()
        if answer["step"] != number:
            raise RuntimeError(f"{self.log}: asked for step {number}, got {answer['step']}")
        return answer

    def close(self) -> None:
        """Ends the process: by the end of its input, or at once if it does not hear."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise RuntimeError(f"the runner ended with status {status}; the end of {self.log}:\n{tail}")
        return json.loads(line)
