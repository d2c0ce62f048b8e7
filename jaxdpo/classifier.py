"""A classifier of texts as a reward: texts in, one number for each out.

The paper's sentiment experiment has its true reward from such a model. What is read off the logits is a choice, see
`LABEL_SCORES`; all but the logit itself order the texts of two labels alike:

  classifier = load_classifier("siebert/sentiment-roberta-large-english")
  reward = classifier.reward("POSITIVE")
  reward(["I loved it.", "I left early."])  # [texts]
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxdpo.hf import load_encoder, load_tokenizer
from jaxdpo.hub import resolve_model
from jaxdpo.models.encoder import Encoder
from jaxdpo.processes import fetch
from jaxdpo.sharding import batch_size_multiple, make_mesh, place_batch
from jaxdpo.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST = 16
"""Tokens of the shortest rows; texts are padded to powers of two from here on, so that few programs are compiled."""

_LOGITS = jax.jit(Encoder.logits, static_argnums=0)


def log_odds(logits: np.ndarray, label: int) -> np.ndarray:
    """`log p - log(1 - p)` of a label; `[..., labels]` -> `[...]`. Of two labels the difference of their logits."""
    return logits[..., label] - np.logaddexp.reduce(np.delete(logits, label, axis=-1), axis=-1)


def log_probability(logits: np.ndarray, label: int) -> np.ndarray:
    """`log p` of a label, in nats; `[..., labels]` -> `[...]`."""
    return -np.logaddexp(0, -log_odds(logits, label))


def probability(logits: np.ndarray, label: int) -> np.ndarray:
    """`p` of a label; `[..., labels]` -> `[...]`."""
    return np.exp(log_probability(logits, label))


def logit(logits: np.ndarray, label: int) -> np.ndarray:
    """The logit of a label; `[..., labels]` -> `[...]`."""
    return logits[..., label]


LABEL_SCORES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "probability": probability,
    "log_probability": log_probability,
    "log_odds": log_odds,
    "logit": logit,
}
"""What a label's reward can be: `(logits [..., labels], label) -> [...]`.

`probability` is the paper's, which ranks completions by p(positive | x, y), and that of transformers' pipelines. Where
the classifier is sure it saturates, and float32 probabilities are equal; `log_odds` still differ, and so does
`log_probability` where the label is unlikely. `logit` is the only one for a model of one label.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier of texts; from `load_classifier`.

    Attributes:
      encoder: the model without its parameters.
      params: its parameters, on `mesh`.
      tokenizer: the model's own.
      mesh: where it runs.
      microbatch_tokens: tokens, padding included, that a device takes at once.
    """

    encoder: Encoder
    params: dict[str, Any]
    tokenizer: "PreTrainedTokenizerBase"
    mesh: jax.sharding.Mesh
    microbatch_tokens: int

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the logits."""
        return self.encoder.config.labels

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Logits of texts, which do not depend on the others beyond rounding.

        Longer texts than the model has positions are cut as its tokenizer cuts, and a warning says how many.

        Args:
          texts: any number of them.
        Returns:
          `[texts, labels]`, at least float32.
        Raises:
          InputError: for anything else than a sequence of strings.
        """
        ids = self._encode(texts)
        lengths = np.array([len(row) for row in ids], np.int32)
        found = []
        with jax.set_mesh(self.mesh):
            for members, rows, length in self._microbatches(lengths):
                tokens, used = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
                used[: len(members)] = lengths[members]
                for row, member in enumerate(members):
                    tokens[row, : lengths[member]] = ids[member]
                placed = place_batch((tokens, used), self.mesh)
                found.append((members, _LOGITS(self.encoder, self.params, *placed)))
        if not found:
            return np.zeros((0, len(self.labels)), np.float32)
        # All of them are under way before the first is waited for.
        values = np.concatenate([fetch(logits)[: len(members)] for members, logits in found])
        return values[np.argsort(np.concatenate([members for members, _ in found]))]

    def reward(self, label: str, kind: str = "probability") -> Callable[[Sequence[str]], np.ndarray]:
        """The reward that a label's score is: for PPO, for the choice of the best of N, for labelling pairs.

        Args:
          label: one of `labels`.
          kind: a key of `LABEL_SCORES`; says what the score is.
        Returns:
          `texts -> float32 [texts]`; a text is prompt and completion together.
        Raises:
          InputError: for another label or kind, or a kind that compares labels where there is one.
        """
        if label not in self.labels:
            raise InputError(f"label is {label!r}; allowed: {', '.join(self.labels)}")
        if kind not in LABEL_SCORES:
            raise InputError(f"kind is {kind!r}; allowed: {', '.join(LABEL_SCORES)}")
        if len(self.labels) == 1 and kind != "logit":
            raise InputError(f"kind is {kind!r}, which compares labels, and the model has one; allowed: 'logit'")
        score, index = LABEL_SCORES[kind], self.labels.index(label)
        return lambda texts: score(self.logits(texts), index)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as many as the model has positions at most."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"texts are {texts!r:.80}; allowed: a sequence of strings; one text is a list of one")
        if len(texts) == 0:
            return []
        limit = self.encoder.config.max_positions
        ids = self.tokenizer(list(texts), verbose=False)["input_ids"]
        long = [index for index, row in enumerate(ids) if len(row) > limit]
        if long:
            cut = self.tokenizer([texts[index] for index in long], truncation=True, max_length=limit)["input_ids"]
            for index, row in zip(long, cut, strict=True):
                ids[index] = row
            warnings.warn(
                f"{len(long)} of {len(ids)} texts are longer than the classifier's {limit} tokens and were cut",
                stacklevel=3,
            )
        return ids

    def _microbatches(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
        """Which texts go together, and the number and length of their rows; both are powers of two where they can.

        So the number of programs is at most that of lengths times that of row counts, whatever the texts.
        """
        devices = batch_size_multiple(self.mesh)
        padded = np.minimum(_power_of_two(np.maximum(lengths, SHORTEST)), self.encoder.config.max_positions)
        for length in np.unique(padded).tolist():
            of_length = np.flatnonzero(padded == length)
            most = max(1, self.microbatch_tokens // length) * devices
            for start in range(0, len(of_length), most):
                members = of_length[start : start + most]
                rows = _power_of_two(np.ceil(len(members) / devices)) * devices
                yield members, min(most, int(rows)), length


def load_classifier(
    source: str | os.PathLike[str],
    *,
    compute_dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    microbatch_tokens: int = 8192,
) -> Classifier:
    """A classifier of texts with its tokenizer.

    Args:
      source: as for `resolve_model`; a sequence classifier of a family in `families.CLASSIFIERS`, with its tokenizer.
      compute_dtype: as in `make_decoder`; "bfloat16" is the faster one on accelerators.
      mesh: from `make_mesh`; None for one device.
      microbatch_tokens: tokens, padding included, that a device takes at once.
    Raises:
      InputError: for a source that holds no such model or does not fit, or a tokenizer that is not the model's.
    """
    if microbatch_tokens < 1:
        raise InputError(f"microbatch_tokens is {microbatch_tokens}; allowed: at least 1")
    directory = resolve_model(source)
    mesh = make_mesh(jax.devices()[:1]) if mesh is None else mesh
    encoder, params = load_encoder(directory, compute_dtype=compute_dtype, mesh=mesh)
    tokenizer = load_tokenizer(directory)
    largest, vocabulary = max(tokenizer.get_vocab().values()), encoder.config.vocab_size
    if largest >= vocabulary:
        raise InputError(
            f"{directory}: the tokenizer has ids up to {largest}, the model embeddings for {vocabulary}; "
            f"copy the tokenizer of this model there"
        )
    if not tokenizer("")["input_ids"]:
        raise InputError(
            f"{directory}: the tokenizer puts no token before a text, where the classifier reads; allowed: one that "
            f"adds <s> and </s>; copy the tokenizer of this model there"
        )
    return Classifier(encoder, params, tokenizer, mesh, microbatch_tokens)


def _power_of_two(sizes: np.ndarray) -> np.ndarray:
    """The next power of two that is not smaller, int."""
    return 2 ** np.ceil(np.log2(sizes)).astype(int)
