"""`jaxdpo generate`: completions of the prompts of a data set, as JSON lines, in the order of the prompts.

Prompts are read a window at a time, and what they became is written before the next window: memory does not grow with
their number. Lines go to a file beside the output, which is renamed in the end. A command that is given again after it
was interrupted goes on behind the last whole line, and writes what it would have written.
"""

import collections
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import tqdm

from jaxdpo.config import GenerateConfig
from jaxdpo.data.prompts import Prompt, open_prompts, read_prompts
from jaxdpo.disk import writing
from jaxdpo.generate.sampler import Completion, Sampler, check_prompt, make_sampler
from jaxdpo.generate.stops import Stops, eos_ids
from jaxdpo.hf import hf_generation_config, load_config, load_hf, load_tokenizer
from jaxdpo.hub import resolve_model
from jaxdpo.train.defaults import default_attention, default_dtype, precision
from jaxdpo.train.prepare import mesh_of
from jaxdpo.types import InputError

BATCH_SIZE = {"cpu": 32}
BATCH_SIZE_ELSEWHERE = 128
"""Completions that are drawn at once, by platform, unless `batch_size` says otherwise."""
WINDOW = 16
"""Batches whose prompts are in memory: those of one padded length are drawn together."""


def run_generate(config: GenerateConfig) -> None:
    """Writes one line for each prompt: the prompt, its completions, and what is known of them.

    Raises:
      InputError: for prompts that cannot be read or continued, a model without an end, or an output that exists.
      RunStopped: if the disk is full or read-only.
    """
    to_stdout = config.output == "-"
    tell = functools.partial(print, file=sys.stderr if to_stdout else sys.stdout)
    output = None if to_stdout else _Output(Path(config.output), config)
    open_prompts(config.prompts)  # before a model is downloaded
    source = resolve_model(config.model)
    tokenizer = load_tokenizer(source)
    stops = find_stops(config, source, tokenizer)
    sampler = load_sampler(config, source, stops)
    tell(f"model      {config.model}, from {source}")
    tell(f"ends       {tokenizer.convert_ids_to_tokens(list(stops.ids))}{''.join(f', {t!r}' for t in stops.texts)}")
    prompts = read_prompts(config.prompts, tokenizer, format=config.format)
    counts: collections.Counter = collections.Counter()
    started = time.perf_counter()
    if output is None:
        _write(prompts, sampler, sys.stdout, counts)
    else:
        with output.opened() as file:
            if output.lines:
                tell(f"goes on    behind {output.lines:,} prompts, in {output.partial}")
                output.check_last(next(itertools.islice(prompts, output.lines - 1, None), None))
            _write(prompts, sampler, file, counts)
        output.finish()
    seconds = time.perf_counter() - started
    reasons = ", ".join(f"{reason} {counts[reason]:,}" for reason in ("eos", "stop", "length") if counts[reason])
    tell(f"drawn      {counts['completions']:,} completions, {counts['tokens']:,} tokens; ended by {reasons}")
    tell(f"speed      {counts['tokens'] / seconds:,.1f} tokens/s, compilation included")
    if output is not None:
        tell(f"output     {config.output}")


def find_stops(config: GenerateConfig, source: Path, tokenizer: Any) -> Stops:
    """What ends a completion: the model's EOS, and what the options add; InputError where nothing would."""
    eos = eos_ids(hf_generation_config(source), load_config(source).eos_token_id, tokenizer)
    tokens = []
    for text in config.stop_tokens:
        number = tokenizer.convert_tokens_to_ids(text)
        if number is None or (number == tokenizer.unk_token_id and text != tokenizer.unk_token):
            raise InputError(
                f"--stop-token {text!r} is no token of {config.model}; allowed: one of its tokenizer, as "
                f"{tokenizer.convert_ids_to_tokens(0)!r}; use --stop for other texts"
            )
        tokens.append(int(number))
    if not eos:
        raise InputError(
            f"{source} states no EOS in generation_config.json, config.json or its tokenizer; allowed: a model with "
            "one, since its texts have no end otherwise; write eos_token_id to generation_config.json"
        )
    return Stops(eos, tuple(tokens), config.stop_texts, tokenizer)


def load_sampler(config: GenerateConfig, source: Path, stops: Stops) -> Sampler:
    """The model in a directory, on the mesh of the options."""
    devices = jax.devices()
    mesh = mesh_of(config.mesh, devices, load_config(source))
    with jax.set_mesh(mesh):
        compute_dtype, product_dtype = precision(config.dtype or default_dtype(devices), devices)
        decoder, params = load_hf(source, compute_dtype=compute_dtype, mesh=mesh)
    decoder = dataclasses.replace(
        decoder, attention=default_attention(devices, decoder.config), product_dtype=product_dtype
    )
    usual = BATCH_SIZE.get(devices[0].platform, BATCH_SIZE_ELSEWHERE)
    return make_sampler(decoder, params, config, stops, batch_size=config.batch_size or usual, mesh=mesh)


def _write(prompts: Iterator[Prompt], sampler: Sampler, file: IO[str], counts: collections.Counter) -> None:
    """Draws the completions of prompts, window by window, and writes a line for each."""
    with tqdm.tqdm(desc="generate", unit="token", leave=False, disable=None) as bar:
        while window := list(itertools.islice(prompts, WINDOW * sampler.prompts_per_batch)):
            for prompt in window:
                check_prompt(prompt.ids, str(prompt.origin), sampler.decoder, sampler.config)
            drawn = sampler([prompt.ids for prompt in window], progress=bar.update)
            for prompt, completions in zip(window, drawn, strict=True):
                file.write(json.dumps(_line(prompt, completions), ensure_ascii=False) + "\n")
                counts["completions"] += len(completions)
                counts["tokens"] += sum(len(completion.ids) for completion in completions)
                counts.update(completion.finish_reason for completion in completions)
            file.flush()
            bar.set_description(f"generate, {counts['completions']:,} completions")


def _line(prompt: Prompt, completions: list[Completion]) -> dict[str, Any]:
    content = prompt.content
    others = ("tools", "chat_template_kwargs")
    said: list[Any] = [completion.text for completion in completions]
    if not isinstance(content.prompt, str):
        said = [[{"role": "assistant", "content": text}] for text in said]
    return {
        "prompt": content.prompt,
        **({"completion": said[0]} if len(said) == 1 else {"completions": said}),
        "tokens": [len(completion.ids) for completion in completions],
        "logps": [float(completion.logps.sum()) for completion in completions],
        "finish_reasons": [completion.finish_reason for completion in completions],
        **{name: value for name in others if (value := getattr(content, name)) is not None},
        **prompt.origin._asdict(),
    }


class _Output:
    """The file that is written, and what an interrupted command has left of it."""

    def __init__(self, path: Path, config: GenerateConfig) -> None:
        self._path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self._options = path.with_name(f".{path.name}.options")
        if path.exists():
            raise InputError(f"--output {path} exists; allowed: a new file; fix: name another, or remove it")
        if not (above := next(folder for folder in path.absolute().parents if folder.exists())).is_dir():
            raise InputError(f"--output {path}: {above} is a file; allowed: a new file in a directory; name another")
        options = json.dumps(dataclasses.asdict(config), sort_keys=True)
        if self.partial.exists() and self._options.exists() and self._options.read_text(encoding="utf-8") != options:
            raise InputError(
                f"{self.partial} is what another command has left, with other options; allowed: the same command, "
                "which goes on there; fix: remove that file, or name another --output"
            )
        with writing(path):  # before anything costs time
            path.parent.mkdir(parents=True, exist_ok=True)
            self._options.write_text(options, encoding="utf-8")
            with open(self.partial, "ab+") as file:
                file.seek(0)
                whole = [line for line in file if line.endswith(b"\n")]
                file.truncate(sum(map(len, whole)))
        self.lines = len(whole)
        """Prompts that were written before."""
        self._last = json.loads(whole[-1]) if whole else None

    def opened(self) -> Any:
        """The file, to write behind what it has."""
        return open(self.partial, "a", encoding="utf-8")

    def check_last(self, prompt: Prompt | None) -> None:
        """InputError if the last line that was written is of another prompt."""
        assert self._last is not None
        if prompt is None or prompt.content.prompt != self._last["prompt"]:
            raise InputError(
                f"{self.partial} ends with the prompt of {self._last['source']}, {self._last['unit']} "
                f"{self._last['number']}, which is another one there now; allowed: the prompts as they were; remove "
                "that file to begin anew"
            )

    def finish(self) -> None:
        self.partial.replace(self._path)
        self._options.unlink()
