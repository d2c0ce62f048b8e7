"""Log-probs of a reference, computed once for all runs that have weights and tokens in common.

An entry of the cache is a directory `reference/<key>`, see `jaxdpo.reference_store`. The key is a digest of all that
the numbers follow from: weights, tokens, the form in which they are computed, and the code that does it. The loss, its
options, the order of the data and the batch size are not among it. Entries may be deleted at any time.
"""

import collections
import contextlib
import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdpo import processes
from jaxdpo.data.cache import digest_of
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.load import Loaded
from jaxdpo.data.packing import Layout
from jaxdpo.data.pipeline import PACKED_TOGETHER, microbatches
from jaxdpo.forward import forward_batches
from jaxdpo.hub import cache_root
from jaxdpo.models import Decoder
from jaxdpo.reference import LogpProgram, TokenLogps, scored_slots
from jaxdpo.reference_store import LogpStore
from jaxdpo.types import Batch

COMPUTED_BY = ("lm_head.py", "logprobs.py", "reference.py", "sharding.py", "data/batch.py", "models/*.py")
"""The code that the numbers follow from."""


class StoredLogps(NamedTuple):
    """What an entry holds, and what it cost."""

    logps: TokenLogps
    """Memory-mapped."""
    computed: int
    """Groups that were not there yet."""
    directory: pathlib.Path
    """The entry."""


def reference_cache() -> pathlib.Path:
    """Where log-probs of references are kept: `$JAXDPO_CACHE/reference`, else `~/.cache/jaxdpo/reference`."""
    return cache_root() / "reference"


def reference_facts(decoder: Decoder, weights: Any, tokens: str, platform: str) -> dict[str, Any]:
    """All that a reference's log-probs follow from: two runs for which it is the same share an entry.

    Args:
      decoder: the model.
      weights: digests of its parameters, JSON-able.
      tokens: digest of what is scored, `tokens_digest`.
      platform: of the devices.
    """
    package = pathlib.Path(__file__).parent
    code = [path.read_bytes() for pattern in COMPUTED_BY for path in sorted(package.glob(pattern))]
    return {
        "model": dataclasses.asdict(decoder.config),
        "dtype": decoder.compute_dtype,
        "product_dtype": str(decoder.multiplied_dtype),
        "attention": decoder.attention,
        "weights": digest_of(weights),
        "tokens": tokens,
        "platform": platform,
        "jax": jax.__version__,
        "code": digest_of([hashlib.blake2b(part).hexdigest() for part in code]),
    }


def tokens_digest(loaded: Loaded, dataset: TokenizedDataset) -> str:
    """Of a dataset as it is trained on: the loaded one, or one that was made of it."""
    if dataset is loaded.dataset:
        return loaded.digest
    arrays = dataset.arrays
    own = [arrays.start, arrays.size, arrays.first, arrays.completions]
    if arrays.ids is not loaded.dataset.arrays.ids:
        own.append(arrays.ids)
    return digest_of([loaded.digest, [hashlib.blake2b(array.tobytes()).hexdigest() for array in own]])


def stored_logps(
    program: LogpProgram,
    params: dict,
    dataset: TokenizedDataset,
    examples: np.ndarray,
    layout: Layout,
    mesh: jax.sharding.Mesh,
    *,
    facts: dict[str, Any],
    label: str,
) -> StoredLogps:
    """The log-probs of some examples, computed as far as the cache does not have them.

    Args:
      program: from `make_logp_program`.
      params: of the reference.
      dataset: what is scored.
      examples: int `[…]` which of its groups, each once.
      layout: shape of the batches.
      mesh: where to run.
      facts: from `reference_facts`.
      label: what the progress bar says.
    Returns:
      Those of the examples, and of whatever others the entry has.
    Raises:
      InputError: if the entry is not what was written to it, or is another one's.
      RunStopped: if it cannot be written.
    """
    entry = LogpStore(reference_cache() / digest_of(facts), facts, dataset.slots)
    with processes.together():
        logps = entry.read()
    if not processes.anywhere(_lacking(logps, examples)).any():
        return StoredLogps(logps, 0, entry.directory)
    writes = _writes()
    with contextlib.ExitStack() as lock:
        with processes.together():
            if writes:
                lock.enter_context(entry.locked())
        with processes.together():
            logps = entry.read()  # another run may have computed some in the meantime
        own = _lacking(logps, examples)
        missing = examples[processes.anywhere(own)]
        batches = packed(dataset, missing, layout)
        passes = forward_batches(program, params, batches, mesh, label=label, total=len(missing))
        if writes:
            lacking = np.isin(np.arange(len(dataset)), examples[own])
            entry.extend(_of_groups(batch, tokens, lacking) for batch, (tokens, _) in passes)
        else:
            collections.deque(passes, maxlen=0)
        processes.wait()
        with processes.together():
            logps = entry.read()
        return StoredLogps(logps, len(missing), entry.directory)


def _writes() -> bool:
    """Whether this process is the one that writes to its cache, which others may have too."""
    with contextlib.suppress(OSError):  # said where it is written to
        reference_cache().mkdir(parents=True, exist_ok=True)
    return processes.first_sharing(reference_cache()) == jax.process_index()


def _lacking(logps: TokenLogps, examples: np.ndarray) -> np.ndarray:
    """bool `[…]`: which of the examples are not stored."""
    return logps.size[examples] == 0


def packed(dataset: TokenizedDataset, examples: np.ndarray, layout: Layout) -> Iterator[Batch]:
    """These groups, each once, in few batches of one kind."""
    parts = math.ceil(len(examples) / PACKED_TOGETHER)
    order = examples[np.argsort(dataset.tokens[examples], kind="stable")]
    for part in range(parts):  # strided: every part has its share of long and short groups
        for batch in microbatches(dataset, order[part::parts], layout):
            yield batch._replace(label=None, margin=None)  # not read; held-out data without them shares the program


def _of_groups(batch: Batch, tokens: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The wanted examples of a batch, and their log-probs one after another, as they are stored."""
    slots = scored_slots(batch)
    kept = wanted[slots.example]
    of_kept = np.repeat(kept, slots.size)
    return slots.example[kept].astype("<i4"), tokens[slots.row[of_kept], slots.slot[of_kept]].astype("<f4")
