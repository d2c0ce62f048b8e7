"""How completions are drawn: the same options wherever a model writes."""

import dataclasses

from jaxdpo.config.ranges import PATHS, RANGES
from jaxdpo.options import check_fields, flag, option
from jaxdpo.types import InputError

FILTERS = ("top_k", "top_p", "min_p")
"""Options that leave out unlikely tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How many completions of a prompt, how long, and how each token is chosen."""

    num_samples: int = option("completions of each prompt", "sampling", 1, alias="-n")
    max_new_tokens: int = option("most tokens of a completion", "sampling", 256)
    temperature: float = option("divides the logits; 0 always takes the likeliest token", "sampling", 1.0)
    top_k: int | None = option("draw from so many likeliest tokens", "sampling", None)
    top_p: float | None = option("draw from the likeliest tokens that have this probability together", "sampling", None)
    min_p: float | None = option("draw from tokens at least so likely, as a share of the likeliest", "sampling", None)
    seed: int = option("decides what is drawn, together with the prompt's text", "sampling", 0)

    def __post_init__(self) -> None:
        check_fields(self, RANGES, PATHS)
        if self.temperature == 0:
            given = [name for name in FILTERS if getattr(self, name) is not None]
            if given:
                name = given[0]
                raise InputError(
                    f"{flag(name)} {getattr(self, name)} has no effect at --temperature 0, which takes the likeliest "
                    "token; allowed: one of the two; drop it, or raise the temperature"
                )
            if self.num_samples > 1:
                raise InputError(
                    f"--num-samples {self.num_samples} at --temperature 0, where all would be equal; allowed: 1; raise "
                    "the temperature"
                )

    @property
    def warps(self) -> dict[str, float]:
        """What `generate.warp.choose` takes: of temperature and filters those that change anything."""
        if self.temperature == 0:
            return {}
        values = {name: getattr(self, name) for name in FILTERS}
        return {"temperature": self.temperature} | {name: v for name, v in values.items() if v is not None}
