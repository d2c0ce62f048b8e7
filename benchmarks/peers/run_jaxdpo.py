"""jaxdpo's own programs as `jaxdpo dpo` runs them, one optimizer step at a time.

A run computes the reference's log-probs before it trains, while the policy still is the reference. So does this, and
besides it times the same pass over the pairs of each step beside that step, with the parameters that there are then:
equal work at the time of the others' steps, so that a drift of the machine hits both.
"""

import sys
import time

from wire import Spec, Wire, read_spec


def main() -> None:
    spec, wire = read_spec(sys.argv[1:]), Wire()
    import jax

    from jaxdpo.config import DPOConfig
    from jaxdpo.data.pipeline import microbatches
    from jaxdpo.reference import dataset_logps, make_logp_program, slot_logps
    from jaxdpo.sharding import place_batch
    from jaxdpo.train.dpo import DPO
    from jaxdpo.train.objective import step_counts
    from jaxdpo.train.optimizer import make_optimizer
    from jaxdpo.train.prepare import prepare
    from jaxdpo.train.state import init_state
    from jaxdpo.train.step import Microbatch, make_programs, run_step

    config = DPOConfig(**options(spec))
    ready = prepare(config, DPO, jax.devices())
    dataset, mesh = ready.data[0].dataset, ready.mesh
    check_tokens(dataset, spec)
    scalars = DPO.scalars(ready.config)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(ready.config)
        state = init_state(ready.params, optimizer, mesh)
        ready = ready._replace(params={})  # donated from now on
        program = make_logp_program(ready.model)
        programs = make_programs(
            DPO.task(ready.model, ready.loss), optimizer, jax.tree.map(lambda x: x.sharding, state)
        )
        steps = [microbatches(dataset, ready.order.groups_of_step(step), ready.layout) for step in range(spec.steps)]
        everything = (batch for batches in steps for batch in batches)
        reference = dataset_logps(program, state.params, everything, mesh, label="reference")
        referred = [[Microbatch(batch, slot_logps(reference, batch)) for batch in batches] for batches in steps]
        warm_up(programs, state, mesh, referred, scalars)
        state = init_state(prepare(config, DPO, jax.devices()).params, optimizer, mesh)
        wire.ready("jax", "jaxlib", "flax", "optax")
        while (step := wire.next_step()) is not None:
            began = time.perf_counter()
            dataset_logps(program, state.params, steps[step], mesh, label="reference")
            referred = time.perf_counter()
            batches = microbatches(dataset, ready.order.groups_of_step(step), ready.layout)
            parts = [place_batch(Microbatch(batch, slot_logps(reference, batch)), mesh) for batch in batches]
            state, metrics, _ = run_step(programs, state, parts, step_counts(batches), scalars)
            jax.block_until_ready(state)
            wire.done(step, metrics["loss"], time.perf_counter() - referred, referred - began)


def warm_up(programs, state, mesh, steps, scalars) -> None:
    """Runs every program that the steps will need, on microbatches of each shape; the state is donated and lost."""
    import jax
    import numpy as np

    from jaxdpo.sharding import place_batch
    from jaxdpo.train.objective import step_counts
    from jaxdpo.train.step import run_step

    def run(microbatches):
        counts = step_counts([microbatch.batch for microbatch in microbatches])
        placed = [place_batch(microbatch, mesh) for microbatch in microbatches]
        return run_step(programs, state, placed, counts, scalars)[0]

    by_shape = {str(jax.tree.map(np.shape, m.batch)): m for microbatches in steps for m in microbatches}
    if any(len(microbatches) > 1 for microbatches in steps):
        state = run([*by_shape.values()] * 2)
    for microbatch in by_shape.values() if any(len(microbatches) == 1 for microbatches in steps) else ():
        state = run([microbatch])


def options(spec: Spec) -> dict:
    """Of `jaxdpo dpo`: what every library is given, and those of the setting."""
    if (spec.rmsprop_decay, spec.rmsprop_eps) != (0.99, 1e-8):
        raise SystemExit(f"rmsprop is {spec.rmsprop_decay}, {spec.rmsprop_eps}; allowed: jaxdpo's 0.99 and 1e-8")
    return {
        "model": spec.model,
        "data": spec.pairs,
        "format": "pairs",
        "output_dir": spec.output,
        "batch_size": spec.pairs_per_step,
        "max_steps": spec.steps,
        "shuffle": False,
        "max_length": spec.max_length,
        "beta": spec.beta,
        "learning_rate": spec.learning_rate,
        "warmup_steps": spec.warmup_steps,
        "max_grad_norm": 0.0,
        **spec.options,
    }


def check_tokens(dataset, spec: Spec) -> None:
    """RuntimeError unless the dataset holds the ids that all libraries are to train on."""
    records = spec.records()
    if len(dataset) != len(records):
        raise RuntimeError(f"jaxdpo keeps {len(dataset)} of {len(records)} pairs")
    for number, record in enumerate(records):
        group = dataset.groups[number]
        got = [part.tolist() for part in (group.prompt, *group.completions)]
        if got != [record[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")]:
            raise RuntimeError(f"pair {number}: jaxdpo tokenises it into other ids than those of the pairs file")


if __name__ == "__main__":
    main()
