"""Tunix's own `DPOTrainer`, one optimizer step at a time: the iterator that gives it its data blocks between steps.

Every prompt is padded to the longest one and every completion to the longest one: Tunix compiles for one shape, and
cuts nothing. What is compiled within a step is not counted as the step's time. Tunix 0.1.7 leaves the `rope_theta` of a
Llama's configuration out of account; the runner gives it to the function that lacks it, or another model would be
trained.
"""

import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wire import Spec, Wire, read_spec


def main() -> None:
    spec, wire = read_spec(sys.argv[1:]), Wire()
    pairs = min(spec.options["pairs"], spec.pairs_per_step)
    if spec.pairs_per_step % pairs:
        raise SystemExit(f"pairs_per_step is {spec.pairs_per_step}; allowed: a multiple of the microbatch's {pairs}")
    import jax
    import numpy as np
    import optax
    from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

    accumulated = spec.pairs_per_step // pairs
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def learning_rate(n: Any) -> Any:
        return spec.learning_rate * jax.numpy.minimum(1.0, (n + 1) / (spec.warmup_steps + 1))

    losses: list[Any] = []
    compiling: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiling.append(seconds) if event.endswith("backend_compile_duration") else None
    )

    class Recorded(DPOTrainer):
        """Keeps the loss of every microbatch: what the trainer logs comes a step late."""

        def _buffer_metrics(self, metrics_buffer: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
            losses.append(loss)
            return super()._buffer_metrics(metrics_buffer, loss, *args, **kwargs)

    with mesh:
        policy, reference = (load(spec.model, mesh) for _ in range(2))
        trainer = Recorded(
            model=policy,
            ref_model=reference,
            optimizer=optax.rmsprop(learning_rate, decay=spec.rmsprop_decay, eps=spec.rmsprop_eps, eps_in_sqrt=False),
            training_config=DPOTrainingConfig(
                beta=spec.beta,
                gradient_accumulation_steps=accumulated,
                max_steps=spec.steps,
                eval_every_n_steps=spec.steps + 1,
            ),
        )

        def data() -> Iterator[Any]:
            records = spec.records()
            wire.ready("google-tunix", "jax", "flax", "optax")
            for number in range(spec.steps):
                asked = wire.next_step()
                if asked is None:
                    return
                losses.clear()
                compiling.clear()
                began = time.perf_counter()
                first = number * spec.pairs_per_step
                for start in range(first, first + spec.pairs_per_step, pairs):
                    yield TrainingInput(**padded(records[start : start + pairs], spec, np))
                jax.block_until_ready(jax.tree.leaves(trainer.optimizer) + jax.tree.leaves(trainer.model))
                seconds = time.perf_counter() - began - sum(compiling)
                wire.done(asked, float(np.mean([float(loss) for loss in losses])), seconds)

        trainer.train(data())


def load(directory: str, mesh: Any) -> Any:
    """The model, in float32."""
    import jax.numpy as jnp
    from transformers import AutoConfig
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3.params import create_model_from_safe_tensors

    hf = AutoConfig.from_pretrained(Path(directory))
    theta = hf.rope_parameters["rope_theta"]
    llama.apply_rope = functools.partial(unpatched(llama.apply_rope), rope_theta=theta)
    config = llama.ModelConfig(
        num_layers=hf.num_hidden_layers,
        vocab_size=hf.vocab_size,
        embed_dim=hf.hidden_size,
        hidden_dim=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        head_dim=hf.head_dim,
        num_kv_heads=hf.num_key_value_heads,
        rope_theta=theta,
        norm_eps=hf.rms_norm_eps,
        weight_tying=hf.tie_word_embeddings,
    )
    return create_model_from_safe_tensors(directory, config, mesh, dtype=jnp.float32)


def unpatched(function: Any) -> Any:
    """The function itself, of one that was given its `rope_theta` before."""
    return function.func if isinstance(function, functools.partial) else function


def padded(records: list[dict[str, Any]], spec: Spec, np: Any) -> dict[str, Any]:
    """The arrays of a microbatch: prompts padded on the left, completions on the right."""
    arrays = {}
    sizes = {"prompt": spec.max_prompt_length, "chosen": spec.max_response_length, "rejected": spec.max_response_length}
    for name, size in sizes.items():
        ids, mask = np.zeros((len(records), size), np.int32), np.zeros((len(records), size), bool)
        for row, record in enumerate(records):
            of_pair = record[f"{name}_ids"]
            place = slice(size - len(of_pair), size) if name == "prompt" else slice(0, len(of_pair))
            ids[row, place], mask[row, place] = of_pair, True
        arrays |= {f"{name}_ids": ids, f"{name}_mask": mask}
    return arrays


if __name__ == "__main__":
    main()
