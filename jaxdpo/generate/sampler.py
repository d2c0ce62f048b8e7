"""Completions of prompts: batches of one shape, the stops that only text shows, and what comes out.

A completion follows from the weights, the options, the seed, its prompt's tokens and its number among the samples of
that prompt, and from nothing else: not from the other prompts, their order, or the mesh. Prompts of a batch are padded
to one length, and that is their own: the next power of two, whatever else is in the batch. So the same program computes
a prompt wherever it stands, and a program exists for each of a few lengths.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdpo.config import SamplingConfig
from jaxdpo.generate.programs import Programs, Samples, make_programs
from jaxdpo.generate.stops import Stops, find_stop
from jaxdpo.models import Decoder
from jaxdpo.models.decoding import DecodingParams, PromptCache
from jaxdpo.sharding import batch_size_multiple, place_batch, tokens_apart
from jaxdpo.types import InputError

CHUNK = 32
"""Steps between two looks at what was drawn: for stops in the text, the progress bar, and Ctrl-C."""
SHORTEST = {"splash": 128}
"""Shortest padded prompt by form of attention, 64 for the others; splash takes multiples of 128."""
CAPACITY = 128
"""Tokens of a sample that there is room for at first; doubled when they are used up, so that short ones read little."""


class Completion(NamedTuple):
    """One sample of a prompt."""

    ids: np.ndarray
    """int32 `[tokens]`: all that was drawn, with the token that ended it."""
    logps: np.ndarray
    """`[tokens]`: log-prob of each under the model at temperature 1 without filters, nats, at least float32."""
    finish_reason: str
    """What ended it: `eos`, `stop` (a stop token or text) or `length`."""
    text: str | None
    """Without special tokens, and cut before the first stop text; None without a tokenizer."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model, ready to be drawn from; made by `make_sampler`."""

    decoder: Decoder
    params: DecodingParams
    config: SamplingConfig
    stops: Stops
    batch_size: int
    mesh: jax.sharding.Mesh | None

    @property
    def prompts_per_batch(self) -> int:
        """Prompts that are read at once."""
        apart = 1 if self.mesh is None else batch_size_multiple(self.mesh)
        return -(-max(1, self.batch_size // self._samples) // apart) * apart

    @property
    def _samples(self) -> int:
        """Samples of a prompt that are drawn at once: all, or equal parts of them."""
        rounds = -(-self.config.num_samples // self.batch_size)
        return -(-self.config.num_samples // rounds)

    def __call__(
        self, prompts: Sequence[Sequence[int] | np.ndarray], *, progress: Callable[[int], Any] | None = None
    ) -> list[list[Completion]]:
        """The completions of each prompt.

        Args:
          prompts: token ids of each, BOS included where the model wants one.
          progress: called with the number of tokens drawn since its last call, as `tqdm.update` wants it.
        Returns:
          `config.num_samples` completions of each prompt, in the order of the prompts.
        Raises:
          InputError: for a prompt without tokens, with one beyond the vocabulary, or too long for the model.
        """
        arrays = [np.asarray(prompt, np.int32) for prompt in prompts]
        for i, ids in enumerate(arrays):
            check_prompt(ids, f"prompt {i}", self.decoder, self.config)
        lengths = [self._padded(len(ids)) for ids in arrays]
        completions: list[list[Completion]] = [[] for _ in arrays]
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            for length in sorted(set(lengths)):
                alike = [i for i in range(len(arrays)) if lengths[i] == length]
                for at in range(0, len(alike), self.prompts_per_batch):
                    batch = alike[at : at + self.prompts_per_batch]
                    for i, found in zip(batch, self._batch([arrays[i] for i in batch], length, progress), strict=True):
                        completions[i] = found
        return completions

    def _padded(self, tokens: int) -> int:
        return max(SHORTEST.get(self.decoder.attention, 64), 1 << (tokens - 1).bit_length())

    def _batch(
        self, prompts: Sequence[np.ndarray], length: int, progress: Callable[[int], Any] | None
    ) -> list[list[Completion]]:
        """Completions of prompts of one padded length; those that are missing in a batch are empty rows."""
        programs, count = make_programs(self.decoder), self.prompts_per_batch
        tokens = np.zeros((count, length), np.int32)
        lengths, digests = np.ones(count, np.int32), np.zeros((count, 2), np.uint32)
        for i, ids in enumerate(prompts):
            tokens[i, : len(ids)], lengths[i] = ids, len(ids)
            digests[i] = np.frombuffer(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "<u4")
        tokens, lengths, digests = self._placed((tokens, lengths, digests))
        logits, cache = programs.read(self.params, tokens, lengths)
        drawn: list[list[Completion]] = [[] for _ in prompts]
        for first in range(0, self.config.num_samples, self._samples):
            wanted = min(self._samples, self.config.num_samples - first)
            absent = np.ones((count, self._samples), bool)
            absent[: len(prompts), :wanted] = False
            start = (logits, np.uint32(self.config.seed), digests, np.uint32(first), self._placed(absent))
            found = self._draw(programs, cache, start, absent.reshape(-1), progress)
            rows = iter(found)
            for of_prompt in drawn:
                of_prompt.extend(next(rows) for _ in range(wanted))
        return drawn

    def _draw(
        self,
        programs: Programs,
        prompt: PromptCache,
        start: tuple,
        absent: np.ndarray,
        progress: Callable[[int], Any] | None,
    ) -> Iterator[Completion]:
        """The completions of the rows that are not absent."""
        most, options, ids = self.config.max_new_tokens, self.config.warps, np.asarray(self.stops.ids, np.int32)
        capacity = min(CAPACITY, -(-most // CHUNK) * CHUNK)
        samples: Samples = programs.start(*start, options, ids, capacity=capacity)
        ends = {}  # row -> tokens of a sample that ended in a stop text
        live, seen = ~absent, 0
        while True:
            done, lengths = np.asarray(samples.done), np.asarray(samples.lengths)
            if self.stops.texts:
                rows = np.asarray(samples.tokens)
                for row in np.flatnonzero(live):
                    if (end := find_stop(self.stops, rows[row, : lengths[row]])) is not None:
                        ends[int(row)] = end
                done = done | np.isin(np.arange(len(done)), list(ends))
                samples = samples._replace(done=self._placed(done))
            live = ~done
            total = int(lengths[~absent].sum())
            if progress is not None:
                progress(total - seen)
            seen, step = total, int(samples.step)
            if done.all() or step >= most:
                break
            if step >= capacity:
                capacity = min(2 * capacity, -(-most // CHUNK) * CHUNK)
                samples = programs.grow(samples, capacity=capacity)
            until = np.int32(min(step + CHUNK - step % CHUNK, most))
            samples = programs.advance(self.params, prompt, samples, until, options, ids)
        tokens, logps = np.asarray(samples.tokens), np.asarray(samples.logps)
        for row in np.flatnonzero(~absent):
            end = ends.get(int(row), int(lengths[row]))
            yield self._completion(tokens[row, :end], logps[row, :end], int(row) in ends)

    def _completion(self, ids: np.ndarray, logps: np.ndarray, stopped: bool) -> Completion:
        reason = "stop" if stopped else self.stops.reason(int(ids[-1]))
        return Completion(ids.copy(), logps.copy(), reason, self.stops.text(ids))

    def _placed(self, tree: Any) -> Any:
        return tree if self.mesh is None else place_batch(tree, self.mesh)


def make_sampler(
    decoder: Decoder,
    params: dict,
    config: SamplingConfig,
    stops: Stops = Stops(),  # noqa: B008, it is immutable
    *,
    batch_size: int = 32,
    mesh: jax.sharding.Mesh | None = None,
) -> Sampler:
    """A model, ready to be drawn from: a copy of its weights is laid out for decoding.

    Args:
      decoder: with an LM head.
      params: as from `load_hf`; they may change afterwards, this sampler does not.
      config: how completions are drawn.
      stops: what ends them; by default nothing but their length.
      batch_size: completions that are drawn at once; those of a prompt are drawn together, in equal parts if they are
        more.
      mesh: where `params` are; its axes `data` and `fsdp` split the prompts of a batch, `tensor` the heads.
    Raises:
      InputError: for a mesh that splits the length of rows, or a stop token beyond the vocabulary.
    """
    if mesh is not None and (parts := tokens_apart(mesh) // batch_size_multiple(mesh)) > 1:
        raise InputError(
            f"the mesh splits the length of rows in {parts}, and a sample is drawn token by token; allowed: data, fsdp "
            "and tensor; make a mesh without context"
        )
    vocabulary = decoder.config.vocab_size
    if beyond := [i for i in stops.ids if not 0 <= i < vocabulary]:
        raise InputError(
            f"stop token {beyond[0]} is beyond the model; allowed: below its vocabulary of {vocabulary}; "
            "use the model's own tokenizer"
        )
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return Sampler(decoder, make_programs(decoder).prepare(params), config, stops, batch_size, mesh)


def sample(
    decoder: Decoder,
    params: dict,
    prompts: Sequence[Sequence[int] | np.ndarray],
    config: SamplingConfig,
    stops: Stops = Stops(),  # noqa: B008, it is immutable
    **more: Any,
) -> list[list[Completion]]:
    """Completions of prompts, once; `make_sampler` for more calls with the same weights.

    Args:
      decoder, params, config, stops: as for `make_sampler`.
      prompts: token ids of each.
      more: `batch_size` and `mesh` of `make_sampler`.
    """
    return make_sampler(decoder, params, config, stops, **more)(prompts)


def check_prompt(ids: np.ndarray, where: str, decoder: Decoder, config: SamplingConfig) -> None:
    """InputError, beginning with `where`, for a prompt that the model cannot continue."""
    if not len(ids):
        raise InputError(f"{where}: the prompt has no tokens; allowed: at least 1; write something, or pass BOS")
    vocabulary, positions = decoder.config.vocab_size, decoder.config.max_positions
    if not 0 <= ids.min() <= ids.max() < vocabulary:
        raise InputError(
            f"{where}: the prompt has token {ids.max() if ids.min() >= 0 else ids.min()}; allowed: 0 to "
            f"{vocabulary - 1}, the model's vocabulary; use the model's own tokenizer"
        )
    if len(ids) + config.max_new_tokens > positions:
        room = positions - config.max_new_tokens
        fix = f"shorten it, or lower --max-new-tokens to {positions - len(ids)}"
        raise InputError(
            f"{where}: the prompt has {len(ids)} tokens, and a completion up to {config.max_new_tokens}; allowed: the "
            f"model's {positions} positions for both, which leaves a prompt {max(room, 0)}; fix: "
            f"{fix if len(ids) < positions else 'shorten it'}"
        )
