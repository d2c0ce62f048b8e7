"""Several processes of one program on this machine, connected over loopback."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TIMEOUT = 900
"""Seconds that processes may take: on two busy cores programs compile for minutes."""


class Launched:
    """The processes of one program, each with CPU devices of its own."""

    def __init__(self, words: Sequence[Sequence[str]], *, devices: int, environment: dict[str, str], cwd: Path) -> None:
        """Starts `python WORDS --coordinator ... --num-processes ... --process-id ...`, one for each list of words."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for number, of_process in enumerate(words):
            options = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", len(words), "--process-id", number]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *of_process, *map(str, options)],
                    env={
                        **os.environ,
                        "JAX_PLATFORMS": "cpu",
                        "JAX_NUM_CPU_DEVICES": str(devices),
                        "PYTHONPATH": str(Path(__file__).parent.parent),
                        "PYTHONUNBUFFERED": "1",
                        "TF_CPP_MIN_LOG_LEVEL": "1",
                        **environment,
                    },
                    cwd=cwd,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def ended(self) -> list[tuple[int, str, str]]:
        """Exit status, stdout and stderr of each, without what Gloo prints."""
        try:
            said = [process.communicate(timeout=TIMEOUT) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        own = [[line for line in out.splitlines(True) if not line.startswith("[Gloo]")] for out, _ in said]
        return [
            (process.returncode, "".join(out), err)
            for process, out, (_, err) in zip(self.processes, own, said, strict=True)
        ]

    def signal(self, number: int, which: signal.Signals) -> None:
        """Sends a signal to one of them."""
        self.processes[number].send_signal(which)


def cached_programs(directory: Path) -> dict[str, str]:
    """The environment in which programs are kept, and so compiled once for all that run them."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(directory),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
