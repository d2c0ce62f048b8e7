"""A tiny language model all of whose completions can be written down, so that its optimum is known in closed form."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.data.groups import TokenizedGroup
from jaxdpo.data.pipeline import microbatches
from jaxdpo.logprobs import sequence_logps, token_logps
from jaxdpo.models import Decoder
from jaxdpo.types import Origin
from tests import tiny

EOS = 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt, all of its completions, and the reward of each.

    Attributes:
      vocab: tokens.
      longest: tokens of a completion that EOS does not end earlier.
      rewards: of each completion, in the order of `completions`.
    """

    vocab: int
    longest: int
    rewards: tuple[float, ...]

    @property
    def decoder(self) -> Decoder:
        # Learned positions: with rotary ones a token that repeats the prompt's would be continued as the prompt is.
        config = dataclasses.replace(tiny.GPT2, vocab_size=self.vocab, num_layers=1, tie_embeddings=False)
        return tiny.decoder(config)

    @property
    def prompt(self) -> np.ndarray:
        return np.array([0], np.int32)

    @functools.cached_property
    def completions(self) -> list[tuple[int, ...]]:
        """Every text: to its EOS, or of the full length."""
        found, open_ones = [], [()]
        for place in range(self.longest):
            longer = [(*text, token) for text in open_ones for token in range(self.vocab)]
            found += [text for text in longer if text[-1] == EOS or place + 1 == self.longest]
            open_ones = [text for text in longer if text[-1] != EOS]
        return found

    @functools.cached_property
    def batch(self):
        """One group with all completions as candidates, so that one pass gives every probability."""
        ids = tuple(np.array(text, np.int32) for text in self.completions)
        group = TokenizedGroup(self.prompt, ids, False, (False,) * len(ids), Origin("all", 1))
        data = tiny.of_groups([group])
        return microbatches(data, [0], tiny.layout(data))[0]

    def logps(self, params: dict) -> jax.Array:
        """Log-probs of all completions, `[completions]`."""
        return sequence_logps(token_logps(self.decoder, params, self.batch), self.batch)[0, 0]

    def drawn(self, logps: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Which completions a policy writes, int `[count]`."""
        p = np.exp(np.asarray(logps, np.float64))
        return rng.choice(len(p), size=count, p=p / p.sum())

    def written(self, numbers: np.ndarray) -> list:
        """Those completions as a sampler gives them."""

        def completion(text: tuple[int, ...]) -> types.SimpleNamespace:
            reason = "eos" if text[-1] == EOS else "length"
            return types.SimpleNamespace(ids=np.array(text, np.int32), finish_reason=reason)

        return [completion(self.completions[number]) for number in numbers.tolist()]


def divergence(logps: jax.Array, target: jax.Array) -> jax.Array:
    """KL(policy || target), nats."""
    return (jnp.exp(logps) * (logps - target)).sum(axis=-1)
