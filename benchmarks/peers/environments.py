"""An environment of its own for every library, from PyPI versions that are pinned here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PINNED: dict[str, tuple[tuple[str, ...], ...]] = {
    "trl": (
        ("torch==2.13.0",),  # first and alone: what comes later takes the build that is there
        ("trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0"),
    ),
    "tunix": (
        (
            "google-tunix==0.1.7",
            "optax==0.2.8",
            *("jax==0.10.2; python_version<'3.12'", "flax==0.12.8; python_version<'3.12'"),
            *("jax==0.12.0.1; python_version>='3.12'", "flax==0.12.12; python_version>='3.12'"),
        ),
    ),
}
"""Library -> what is installed, one call of pip after another. jaxdpo is this checkout."""
PEERS = ("jaxdpo", *PINNED)

_VERSION = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


def make_environment(peer: str, directory: Path, log: Path) -> Path:
    """The interpreter of a library's environment, which is built unless it is there and right.

    Args:
      peer: a name in `PEERS`.
      directory: of all environments; this one is a directory in it, or a link to one.
      log: what pip says.
    Raises:
      SystemExit: if it cannot be built, or if another one is there.
    """
    python = directory / peer / "bin" / "python"
    if not python.exists():
        print(f"environment {python.parent.parent}: building, see {log}", flush=True)
        steps = [[sys.executable, "-m", "venv", str(directory / peer)]]
        install = [str(python), "-m", "pip", "install"]
        steps += [[*install, *packages] for packages in PINNED.get(peer, (("--editable", str(ROOT)),))]
        with open(log, "w", encoding="utf-8") as file:
            for step in steps:
                if subprocess.run(step, stdout=file, stderr=subprocess.STDOUT).returncode:
                    raise SystemExit(f"{' '.join(step)} failed; see {log}; remove {directory / peer} to try again")
    problem = what_is_wrong(peer, python)
    if problem:
        raise SystemExit(f"environment {directory / peer}: {problem}; fix: remove it, and it is built again")
    return python


def what_is_wrong(peer: str, python: Path) -> str | None:
    """How an environment differs from what is pinned; None if it does not."""
    if peer == "jaxdpo":
        found = _run(python, "import jaxdpo; print(jaxdpo.__file__)", cwd=ROOT / "benchmarks")
        expected = str(ROOT / "jaxdpo" / "__init__.py")
        return None if found == expected else f"jaxdpo is {found or 'not importable'}; allowed: {expected}"
    pins = pinned_versions(peer, python)
    found = json.loads(_run(python, _VERSION, *pins) or "{}")
    wrong = [f"{name} is {found.get(name)}" for name, version in pins.items() if not _same(found.get(name), version)]
    wanted = " ".join(f"{name}=={version}" for name, version in pins.items())
    return f"{', '.join(wrong)}; allowed: {wanted}" if wrong else None


def pinned_versions(peer: str, python: Path) -> dict[str, str]:
    """Package -> version, of the pins that hold for this interpreter."""
    old = _run(python, "import sys; print(sys.version_info < (3, 12))") == "True"
    of_marker = {"": True, "python_version<'3.12'": old, "python_version>='3.12'": not old}
    pins = (pin.partition("; ") for packages in PINNED[peer] for pin in packages)
    return dict(pin.split("==") for pin, _, marker in pins if of_marker[marker])


def _same(found: str | None, pinned: str) -> bool:
    """Whether a version is the pinned one, whatever its build: 2.13.0+cpu is 2.13.0."""
    return found is not None and found.partition("+")[0] == pinned


def _run(python: Path, source: str, *arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run([str(python), "-c", source, *arguments], capture_output=True, text=True, cwd=cwd)
    return done.stdout.strip()
