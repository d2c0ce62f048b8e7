"""From a checkpoint, or from parameters in memory, to a Hugging Face directory.

A run keeps the model's configuration and tokenizer in `model/`, so exporting needs neither the hub nor the original.
"""

import json
from pathlib import Path
from typing import Any

import jax

from jaxdpo.config import ExportConfig
from jaxdpo.hf import hf_config, hf_generation_config, load_config, load_tokenizer, save_hf
from jaxdpo.models import Decoder, abstract_params, make_decoder
from jaxdpo.sharding import make_mesh
from jaxdpo.train.checkpoint import find_checkpoint, load_params, read_meta
from jaxdpo.train.run_dir import RunDir
from jaxdpo.types import InputError


def export_checkpoint(config: ExportConfig) -> None:
    """Writes one checkpoint as a directory that `AutoModelForCausalLM.from_pretrained` and vLLM load.

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
    decoder = make_decoder(load_config(run.model))
    params = load_params(checkpoint, abstract_params(decoder, make_mesh(jax.devices()[:1])))
    write_export(output, decoder, params, run, dtype=config.dtype)
    print(f"export     step {read_meta(checkpoint)['step']} of {run.root} to {output}, {config.dtype}")


def write_export(
    directory: Path, decoder: Decoder, params: dict, run: RunDir, *, dtype: str = "float32", overwrite: bool = False
) -> None:
    """Writes parameters with the tokenizer and the generation configuration that the run keeps in `model/`."""
    save_hf(
        directory,
        decoder,
        params,
        tokenizer=load_tokenizer(run.model),
        generation_config=hf_generation_config(run.model),
        dtype=dtype,
        overwrite=overwrite,
    )


def keep_model_files(run: RunDir, source: Path, tokenizer: Any) -> None:
    """Keeps what is not weights of the model in `source` in the run's `model/`: configuration and tokenizer."""
    run.model.mkdir(parents=True, exist_ok=True)
    (run.model / "config.json").write_text(json.dumps(hf_config(source), indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(run.model)
    generation = hf_generation_config(source)
    if generation is not None:
        (run.model / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
