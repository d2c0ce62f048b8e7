"""Writes golden/logits.npz: logits of the last token of every case, by transformers and torch in float64.

Run from the root of a clone, with torch installed: `python -m tests.families.make_golden`.
"""

import pathlib

import numpy as np

from tests.families.cases import CASES, TOKENS, tensor

GOLDEN = pathlib.Path(__file__).parent / "golden" / "logits.npz"


def torch_model(config: dict):
    """The transformers model of a case, float32, with the values of `cases.tensor`."""
    import torch
    import transformers

    hf = transformers.AutoConfig.for_model(**{key: value for key, value in config.items() if value is not None})
    if "sliding_window" in config:
        hf.sliding_window = config["sliding_window"]
    hf._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(hf).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(tensor(name, tuple(parameter.shape))))
    return model


def torch_logits(model, tokens: np.ndarray) -> np.ndarray:
    """`[rows, length, vocab]`."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.double().numpy()


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    last = {name: torch_logits(torch_model(config).double(), TOKENS)[:, -1] for name, config in CASES.items()}
    np.savez_compressed(GOLDEN, **{name: logits.astype(np.float32) for name, logits in last.items()})
    print(f"{GOLDEN}: {len(last)} cases, {GOLDEN.stat().st_size} bytes")
