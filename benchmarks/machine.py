"""What a benchmark ran on, for its results."""

import importlib.metadata
import os
import platform
from pathlib import Path


def machine(*packages: str) -> str:
    """The processor, its cores, the version of Python and those of the packages."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    cores = f"{os.cpu_count()} cores"
    return ", ".join([processor(), cores, f"Python {platform.python_version()}", *versions])


def processor() -> str:
    """The model of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
