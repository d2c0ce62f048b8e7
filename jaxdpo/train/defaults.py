"""What a run uses on a platform where its options leave that open."""

from collections.abc import Sequence

import jax

from jaxdpo.config import Attention, DType
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.layout import largest_row
from jaxdpo.models import TransformerConfig
from jaxdpo.types import InputError

MICROBATCH_TOKENS = {"cpu": 2048}
MICROBATCH_TOKENS_ELSEWHERE = 16384
"""Most tokens of one forward pass per device, by platform, unless `microbatch_tokens` says otherwise."""
ATTENTION_FORMS: dict[str, Attention] = {"cpu": "blockwise", "tpu": "splash"}
"""Form of attention by platform, unless `attention` says otherwise; dense elsewhere, and blockwise where a sliding
window keeps splash out."""


def default_dtype(devices: Sequence[jax.Device]) -> DType:
    """What is computed in where `dtype` is not given."""
    return "float32" if devices[0].platform == "cpu" else "bfloat16"


def precision(dtype: DType, devices: Sequence[jax.Device]) -> tuple[str, str | None]:
    """The compute dtype and, where it is another, that of matrix products: of a model in `dtype` on these devices.

    On CPUs bfloat16 is for matrix products: in everything else it takes longer than float32, and is less exact.
    """
    return ("float32", "bfloat16") if dtype == "bfloat16" and devices[0].platform == "cpu" else (dtype, None)


def default_attention(devices: Sequence[jax.Device], architecture: TransformerConfig) -> Attention:
    """The form of attention where `attention` is not given."""
    form = ATTENTION_FORMS.get(devices[0].platform, "dense")
    return "blockwise" if form == "splash" and architecture.sliding_window is not None else form


def choose_microbatch_tokens(
    given: int | None,
    datasets: Sequence[TokenizedDataset],
    devices: Sequence[jax.Device],
    row_lengths: Sequence[int] | None = None,
) -> int:
    """Most tokens of one forward pass per device.

    Args:
      given: what `--microbatch-tokens` says; by default as many as usual, or as the longest row needs.
      datasets: whose groups are packed.
      devices: where it will run.
      row_lengths: what `--row-lengths` says.
    Raises:
      InputError: if those given do not hold the longest row.
    """
    row = largest_row(datasets, row_lengths)
    if given is not None:
        if given < row.length:
            raise InputError(
                f"--microbatch-tokens {given} does not hold a row of {row.length} tokens, which "
                f"{row.reason}; allowed: at least {row.length}; raise it, or lower --max-length"
            )
        return given
    usual = MICROBATCH_TOKENS.get(devices[0].platform, MICROBATCH_TOKENS_ELSEWHERE)
    if usual < row.length:
        print(
            f"microbatch {row.length} tokens a device, above the usual {usual}: one row of so many, which {row.reason}"
        )
    return max(usual, row.length)
