"""`jaxdpo plan`: checks, a process that compiles, and its answer as text or JSON. No jax is imported here."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from jaxdpo.config import PlanConfig
from jaxdpo.plan.report import report
from jaxdpo.plan.shapes import SHAPES, known_config
from jaxdpo.plan.topology import LOCAL, check_compiler, check_topology
from jaxdpo.types import InputError, RunStopped

COMPILER = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two processes that compile need not wait for each other
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask, and asking takes seconds
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""Environment of a process that compiles for TPUs which are not there."""
WORKER = [sys.executable, "-m", "jaxdpo.plan.worker"]
LAST_LINES = 12
"""Of what a process that failed printed, so many are shown."""


def run_plan(config: PlanConfig) -> None:
    """Prints a plan; see `jaxdpo.plan`.

    Raises:
      InputError: for a model, a topology or a mesh that cannot be planned for, or without the compiler it needs.
      RunStopped: if the process that compiles dies.
    """
    plan = plan_in_process(config, lambda text: print(f"plan       {text}", file=sys.stderr))
    print(json.dumps(plan, indent=2) if config.json else report(plan))


def plan_in_process(config: PlanConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """The plan as JSON, made by a process of its own; errors as in `run_plan`.

    Args:
      config: the options.
      say: takes a line about what is being done.
    """
    check_topology(config.topology)
    if config.model in SHAPES:
        known_config(config.model)
    check_compiler(config.topology)
    environment = os.environ | (COMPILER if config.topology != LOCAL else {})
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
        process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            env=environment,
            text=True,
        )
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as request:
                json.dump(dataclasses.asdict(config), request)
            for line in process.stdout:
                answer = json.loads(line)
                if "plan" in answer:
                    return answer["plan"]
                if "error" in answer:
                    raise InputError(answer["error"])
                say(answer["say"])
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        noise.seek(0)
        last = "".join(noise.readlines()[-LAST_LINES:])
    raise RunStopped(f"the process that compiles ended with status {status}; the last of what it printed:\n{last}")
