"""Weight tables: which tensor of a Hugging Face checkpoint is which parameter, read in both directions.

A family's table has one `Weight` per tensor. Its pattern is invertible: read left to right on import, right to left on
export. `(heads head_dim) embed -> embed heads head_dim` says that the checkpoint's first dimension is heads times
head_dim and that the parameter holds three axes, embed first. The words are the logical axes of the parameter.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxdpo.models import EncoderConfig, ModelConfig, TransformerConfig

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint, or one for each layer.

    Attributes:
      name: its name there; `{layer}` stands for the layer's number.
      path: where it goes in the parameters, as in `blocks/attention/q/kernel`; `{part}` stands for one of `parts`.
      pattern: its dimensions `->` the parameter's axes without `layers`; no arrow where they are the same.
      parts: for a tensor that holds several parameters, side by side along the axis `part`.
    """

    name: str
    path: str
    pattern: str
    parts: tuple[str, ...] = ("",)

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor for each layer."""
        return "{layer}" in self.name

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters that the tensor holds."""
        return tuple(self.path.format(part=part) for part in self.parts)

    @property
    def dimensions(self) -> tuple[tuple[str, ...], ...]:
        """Axes of each dimension of the tensor."""
        found = re.findall(r"\(([^)]*)\)|(\w+)", self.pattern.split("->")[0])
        return tuple(tuple((group or single).split()) for group, single in found)

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical axes of the parameter, without `layers`."""
        return tuple(self.pattern.split("->")[-1].split())

    def sizes(self, config: ModelConfig) -> dict[str, int]:
        """Size of every axis in the pattern."""
        return {**config.axis_sizes, "part": len(self.parts)}

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape that the tensor must have."""
        sizes = self.sizes(config)
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.dimensions)

    def to_param(self, config: ModelConfig, part: int, index: Index, read: Callable[[Index], np.ndarray]) -> np.ndarray:
        """The block `index` of one parameter (one layer of it), reading little more of the tensor than that.

        Args:
          config: sizes of the axes.
          part: number of the parameter in `parts`.
          index: a slice with start and stop for each of `axes`.
          read: returns the given block of the tensor.
        Returns:
          array with the extent of `index`.
        """
        sizes = self.sizes(config)
        wanted = dict(zip(self.axes, index, strict=True)) | {"part": slice(part, part + 1)}
        block, shape, rest = [], [], []
        for first, *inner in self.dimensions:
            # A range of the first axis is a range of the whole dimension; the other axes are cut after reading.
            step = math.prod(sizes[axis] for axis in inner)
            block.append(slice(wanted[first].start * step, wanted[first].stop * step))
            shape += [wanted[first].stop - wanted[first].start, *(sizes[axis] for axis in inner)]
            rest += [slice(None), *(wanted[axis] for axis in inner)]
        array = read(tuple(block)).reshape(shape)[tuple(rest)]
        names = [axis for group in self.dimensions for axis in group]
        if "part" in names:
            array = array.squeeze(names.index("part"))
            names.remove("part")
        return array.transpose([names.index(axis) for axis in self.axes])

    def to_tensor(self, config: ModelConfig, params: list[np.ndarray]) -> np.ndarray:
        """The tensor (of one layer), contiguous, from the parameters it holds: the inverse of `to_param`."""
        names = [axis for group in self.dimensions for axis in group]
        axes = list(self.axes)
        array = params[0]
        if "part" in names:
            array, axes = np.stack(params), ["part", *axes]
        array = array.transpose([axes.index(axis) for axis in names]).reshape(self.shape(config))
        return np.ascontiguousarray(array)


def head_weights(config: TransformerConfig) -> tuple[Weight, ...]:
    """The tensor of the head, if it has one of its own; transformers names it alike in every family."""
    if config.head == "score":
        return (Weight("score.weight", "score", "part embed -> embed"),)
    return () if config.tie_embeddings else (Weight("lm_head.weight", "head", "vocab embed"),)


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one Hugging Face `model_type` are read and written.

    Attributes:
      architectures: class name that the exported `config.json` states, by `TransformerConfig.head`.
      from_hf: contents of a `config.json` -> `TransformerConfig`; refuses what would change the mathematics.
      to_hf: the inverse.
      weights: the table for a configuration.
      prefix: of the names of the backbone; checkpoints of the bare backbone lack it.
      ignored: regular expressions of tensors that carry no parameter: buffers, and an LM head that is not used.
    """

    architectures: Mapping[str, str]
    from_hf: Callable[[Mapping[str, Any]], TransformerConfig]
    to_hf: Callable[[TransformerConfig], dict[str, Any]]
    weights: Callable[[TransformerConfig], tuple[Weight, ...]]
    prefix: str
    ignored: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class EncoderFamily:
    """How classifiers of one Hugging Face `model_type` are read; the attributes are those of `Family`."""

    from_hf: Callable[[Mapping[str, Any]], EncoderConfig]
    weights: Callable[[EncoderConfig], tuple[Weight, ...]]
    prefix: str
    ignored: tuple[str, ...]


Config = TypeVar("Config", bound=ModelConfig, contravariant=True)


class Table(Protocol[Config]):
    """What the import of weights needs of a family, be it of decoders or of encoders."""

    @property
    def weights(self) -> Callable[[Config], tuple[Weight, ...]]: ...

    @property
    def prefix(self) -> str: ...

    @property
    def ignored(self) -> tuple[str, ...]: ...
