"""TRL's own `DPOTrainer`, one optimizer step at a time: a callback blocks it between steps."""

import os
import sys
import time
from typing import Any

from wire import Spec, Wire, read_spec

PAIRS = 4
"""Of a microbatch: TRL's best fit on two cores."""


def main() -> None:
    spec, wire = read_spec(sys.argv[1:]), Wire()
    os.environ["HF_DATASETS_CACHE"] = os.path.join(spec.output, "datasets")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    pairs = min(PAIRS, spec.pairs_per_step)
    if spec.pairs_per_step % pairs:
        raise SystemExit(f"pairs_per_step is {spec.pairs_per_step}; allowed: below {PAIRS} or a multiple of it")
    losses: list[float] = []

    class Recorded(DPOTrainer):
        """Keeps the loss of every microbatch: what the trainer logs is rounded."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            losses.append((result[0] if isinstance(result, tuple) else result).item())
            return result

    class Blocked(TrainerCallback):
        """Warms up on a microbatch, then answers for each step that has ended, and waits to be asked for another."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"]
            trainer.current_gradient_accumulation_steps = 1  # set anew by the loop that begins after this
            trainer.training_step(model, next(iter(kwargs["train_dataloader"])))
            model.zero_grad()
            losses.clear()
            wire.ready("trl", "torch", "transformers", "accelerate", "datasets")
            self._wait(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds = time.perf_counter() - self.began
            wire.done(self.step, sum(losses) / len(losses), seconds)
            losses.clear()
            self._wait(control)

        def _wait(self, control: Any) -> None:
            asked = wire.next_step()
            control.should_training_stop = asked is None
            self.step = -1 if asked is None else asked
            self.began = time.perf_counter()

    model = AutoModelForCausalLM.from_pretrained(
        spec.model, dtype=torch.float32, attn_implementation=spec.options["attention"]
    )
    optimizer = torch.optim.RMSprop(
        model.parameters(), lr=spec.learning_rate, alpha=spec.rmsprop_decay, eps=spec.rmsprop_eps
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / (spec.warmup_steps + 1)))
    trainer = Recorded(
        model,
        args=config(DPOConfig, spec, pairs),
        train_dataset=Dataset.from_list(
            [{key: r[key] for key in ("prompt", "chosen", "rejected")} for r in spec.records()]
        ),
        processing_class=AutoTokenizer.from_pretrained(spec.model),
        callbacks=[Blocked()],
        optimizers=(optimizer, warmup),
    )
    check_tokens(trainer.train_dataset, spec)
    trainer.train()


def config(kind: Any, spec: Spec, pairs: int) -> Any:
    """TRL's options: what every library is given, and of the setting the reference, its dtype and the attention."""
    return kind(
        output_dir=spec.output,
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=spec.pairs_per_step // pairs,
        max_steps=spec.steps,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        beta=spec.beta,
        max_length=spec.max_length,
        bf16=spec.options["autocast"],
        precompute_ref_log_probs=spec.options["precomputed_reference"],
        gradient_checkpointing=False,  # slower, and its memory is not what is short
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
    )


def check_tokens(dataset: Any, spec: Spec) -> None:
    """RuntimeError unless the trainer tokenised the pairs into the ids that all libraries are to train on."""
    for number, (got, expected) in enumerate(zip(dataset, spec.records(), strict=True)):
        for name in ("prompt", "chosen", "rejected"):
            if list(got[f"{name}_ids"]) != expected[f"{name}_ids"]:
                raise RuntimeError(f"pair {number}: TRL tokenises its {name} into other ids than jaxdpo")


if __name__ == "__main__":
    main()
