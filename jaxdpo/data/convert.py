"""`jaxdpo convert`: any sources as a data set of TensorFlow Datasets."""

from jaxdpo.config import ConvertConfig
from jaxdpo.data.sources import open_sources
from jaxdpo.data.tfds import build_tfds


def convert(config: ConvertConfig) -> None:
    """Writes the records as splits of a data set and prints where they are."""
    splits = {"train": open_sources(config.data)}
    if config.eval_data is not None:
        splits["test"] = open_sources(config.eval_data)
    path = build_tfds(splits, config.output_dir, name=config.name, version=config.version)
    print(f"written    {path}: read it with --data tfds:{path}")
