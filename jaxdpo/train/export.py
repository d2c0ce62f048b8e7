"""From a checkpoint, or from parameters in memory, to a Hugging Face directory.

A run keeps the model's configuration and tokenizer in `model/`, so exporting needs neither the hub nor the original.
"""

import json
from pathlib import Path
from typing import Any

import jax

from jaxdpo.config import ExportConfig
from jaxdpo.disk import writing
from jaxdpo.hf import hf_config, hf_generation_config, load_config, load_tokenizer, save_hf
from jaxdpo.models import Decoder, abstract_params, make_decoder
from jaxdpo.sharding import make_mesh
from jaxdpo.train.checkpoint import find_checkpoint, load_params, read_meta
from jaxdpo.train.prepare import Prepared
from jaxdpo.train.run_dir import RunDir
from jaxdpo.types import InputError


def export_checkpoint(config: ExportConfig) -> None:
    """Writes one checkpoint as a directory that transformers and vLLM load.

    That of a reward model is written as it was trained: the mean of its rewards is moved to 0 by `jaxdpo reward` only,
    which has the data.

    Raises:
      InputError: if there is no checkpoint, the tokenizer beside it is missing, or the output directory is not empty.
    """
    checkpoint = find_checkpoint(Path(config.checkpoint))
    run = RunDir(checkpoint.absolute().parent.parent)
    if not run.model.is_dir():
        raise InputError(
            f"{run.model} is missing: it holds the tokenizer of {checkpoint}; allowed: a checkpoint in the directory "
            "of its run; fix: export from DIR/checkpoints where the run wrote it"
        )
    output = Path(config.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output-dir {output} exists and is not empty; allowed: a new directory; fix: name another")
    meta = read_meta(checkpoint)
    decoder = make_decoder(load_config(run.model, head=meta["head"]))
    params = load_params(checkpoint, abstract_params(decoder, make_mesh(jax.devices()[:1])))
    write_export(output, decoder, params, run, dtype=config.dtype)
    print(f"export     step {meta['step']} of {run.root} to {output}, {config.dtype}")


def write_export(
    directory: Path, decoder: Decoder, params: dict, run: RunDir, *, dtype: str = "float32", overwrite: bool = False
) -> None:
    """Writes parameters with the tokenizer and the generation configuration that the run keeps in `model/`."""
    tokenizer, generation_config = load_tokenizer(run.model), hf_generation_config(run.model)
    with writing(directory):
        save_hf(
            directory,
            decoder,
            params,
            tokenizer=tokenizer,
            generation_config=generation_config,
            dtype=dtype,
            overwrite=overwrite,
        )


def export_policy(run: RunDir, ready: Prepared, params: dict) -> None:
    """Writes a trained policy to the run's `export/`."""
    write_export(run.export, ready.model, params, run, overwrite=True)


def keep_model_files(run: RunDir, source: Path, tokenizer: Any) -> None:
    """Keeps what is not weights of the model in `source` in the run's `model/`: configuration and tokenizer."""
    files = {"config.json": hf_config(source), "generation_config.json": hf_generation_config(source)}
    with writing(run.model):
        run.model.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(run.model)
        for name, content in files.items():
            if content is not None:
                (run.model / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
