"""Full disks and read-only directories: one error that names the path, says how much is free there, and what to do."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxdpo.types import RunStopped

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR})
LFS_POINTER = b"version https://git-lfs.github.com/"
"""First bytes of what Git leaves in place of a large file that it did not fetch."""
_FIXES = {errno.ENOENT: "make its directory, or name another", errno.ENOTDIR: "name another: a file is in its place"}
_STATED = re.compile(r"\bos[ _]error(?:_code)?[ :=']*(\d+)", re.IGNORECASE)
"""How libraries of C++ and Rust state an errno: Orbax "[os_error_code='28']", safetensors "(os error 28)"."""


def disk_errno(error: BaseException) -> int | None:
    """The errno of a disk that did not take what was written; None for an error of another kind.

    >>> disk_errno(OSError(28, "No space left on device")), disk_errno(ValueError("x [os_error_code='28']"))
    (28, 28)
    >>> disk_errno(ConnectionRefusedError(111, "Connection refused")), disk_errno(ValueError("x"))
    (None, None)
    """
    stated = _STATED.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(stated[1]) if stated else None
    return number if number in _FULL | _REFUSED else None


@contextlib.contextmanager
def writing(path: Path, *, left: str = "") -> Iterator[None]:
    """Turns what a disk answers to the body into a message; other errors pass.

    Args:
      path: what the body writes.
      left: what is whole on the disk nevertheless, if that needs saying.
    Raises:
      RunStopped: if the disk is full or `path` must not be written.
    """
    try:
        yield
    except Exception as error:
        number = disk_errno(error)
        if number is None:
            raise
        fix = "make room there" if number in _FULL else _FIXES.get(number, "make it writable")
        free = f"{_free(path)} free there; " if number in _FULL else ""
        raise RunStopped(
            f"{path} cannot be written: {os.strerror(number)}; {free}{left}{'; ' * bool(left)}"
            f"fix: {fix}, then give the same command again"
        ) from error


def _free(path: Path) -> str:
    """Of the disk that holds `path`, or would."""
    above = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    size = float(shutil.disk_usage(above).free)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
