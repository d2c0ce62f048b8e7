"""Tokenised datasets on disk, found by the content that they were made of.

An entry is a directory `data/<key>` of the cache. It is written beside its place and renamed, so it is whole or absent;
of two processes that make the same one, the second uses what the first has made. Entries, and the digests of files in
`data/digests`, may be deleted at any time.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from jaxdpo.data.encoding import PROBES, encode
from jaxdpo.data.records import Source
from jaxdpo.disk import writing
from jaxdpo.hub import cache_root
from jaxdpo.types import RunStopped

ABANDONED = 7 * 24 * 3600.0
"""Seconds from which what was begun to be written is taken to be given up."""
SETTLED = 2.0
"""Seconds after its last change from which a file's times tell whether it changes again."""


def data_cache() -> pathlib.Path:
    """Where tokenised datasets are kept: `$JAXDPO_CACHE/data`, else `~/.cache/jaxdpo/data`."""
    return cache_root() / "data"


def entry_key(tokenizer: Any, facts: Any) -> str:
    """The name of an entry: a digest of all that it follows from.

    Args:
      tokenizer: a Hugging Face tokenizer; its content counts, not where it was loaded from.
      facts: what else the entry follows from, JSON-able. The code of this package and the versions of the libraries
        that render and tokenise are added.
    """
    code = [path.read_bytes() for path in sorted(pathlib.Path(__file__).parent.glob("*.py"))]
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    return digest_of(
        [[hashlib.blake2b(part).hexdigest() for part in code], versions, _tokenizer_facts(tokenizer), facts]
    )


def digest_of(facts: Any) -> str:
    """BLAKE2b of facts that are JSON-able, 128 bits in hexadecimal."""
    text = json.dumps(facts, sort_keys=True, default=str)  # of what is not, a tokenizer's options, its text
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def source_digest(source: Source) -> str:
    """`Source.digest()`, remembered until the size, time or inode of one of its files changes."""
    files = [os.fspath(file.absolute()) for file in source.files]
    stamp = [list(_stamp(file)) for file in source.files]
    note = data_cache() / "digests" / f"{digest_of([source.split, *files])}.json"
    with contextlib.suppress(OSError, ValueError):
        remembered = json.loads(note.read_text(encoding="utf-8"))
        if stamp and remembered["stamp"] == stamp:
            return str(remembered["digest"])
    digest = source.digest()
    if stamp and time.time() - max(modified / 1e9 for _, modified, *_ in stamp) > SETTLED:
        # It only saves time: a cache that is read-only is read nevertheless.
        with contextlib.suppress(RunStopped), making(note) as partial, writing_data():
            partial.write_text(json.dumps({"files": files, "stamp": stamp, "digest": digest}), encoding="utf-8")
    return digest


@contextlib.contextmanager
def making(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to in place of a file or directory of the cache, which it becomes if nothing is raised.

    Raises:
      RunStopped: if the disk is full or read-only.
    """
    with writing_data():
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(".partial-*"):  # of a process that was killed
            with contextlib.suppress(FileNotFoundError):  # of one that is done
                if time.time() - left.stat().st_mtime > ABANDONED:
                    shutil.rmtree(left, ignore_errors=True)
        scratch = pathlib.Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    try:
        partial = scratch / target.name
        yield partial
        with writing_data():
            try:
                partial.replace(target)
            except OSError:
                if not target.is_dir():  # otherwise another process was first
                    raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def writing_data() -> contextlib.AbstractContextManager[None]:
    """`disk.writing` to this cache."""
    return writing(
        data_cache(), left="all that it holds may be deleted, and JAXDPO_CACHE can name a directory on another disk"
    )


def _stamp(file: pathlib.Path) -> tuple[int, int, int, int]:
    """What changes with a file's content: size, times of its last change in ns, of which one cannot be set, inode."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _tokenizer_facts(tokenizer: Any) -> list[Any]:
    """What a tokenizer's ids and texts follow from, JSON-able."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "init_kwargs", None)]
    else:
        encode(tokenizer, list(PROBES))  # the backend keeps how the last call truncates and pads: here, not at all
        content = backend.to_str()
    return [
        type(tokenizer).__name__,
        content,
        getattr(tokenizer, "special_tokens_map", None),
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        getattr(tokenizer, "chat_template", None),
    ]
