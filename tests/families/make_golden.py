"""Writes golden/logits.npz, logits of the last token of every language model of `cases`, and golden/classifiers.npz,
logits of every classifier of texts, by transformers and torch in float64.

Run from the root of a clone, with torch installed: `python -m tests.families.make_golden`.
"""

import pathlib

import numpy as np

from tests.families.cases import CASES, ENCODERS, TEXT_LENGTHS, TEXT_TOKENS, TOKENS, tensor

GOLDEN = pathlib.Path(__file__).parent / "golden" / "logits.npz"
CLASSIFIERS_GOLDEN = GOLDEN.with_name("classifiers.npz")


def torch_model(config: dict):
    """The transformers model of a case, float32, with the values of `cases.tensor`."""
    import transformers

    hf = transformers.AutoConfig.for_model(**{key: value for key, value in config.items() if value is not None})
    if "sliding_window" in config:
        hf.sliding_window = config["sliding_window"]
    hf._attn_implementation = "eager"
    return with_values(transformers.AutoModelForCausalLM.from_config(hf))


def with_values(model):
    """The model, to be evaluated, with the values of `cases.tensor`."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(tensor(name, tuple(parameter.shape))))
    return model.eval()


def torch_logits(model, tokens: np.ndarray) -> np.ndarray:
    """`[rows, length, vocab]`."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.double().numpy()


def torch_classifier(config: dict):
    """The transformers model of a classifier of texts, float32, with the values of `cases.tensor`."""
    import transformers

    hf = transformers.RobertaConfig.from_dict(config)
    return with_values(transformers.RobertaForSequenceClassification(hf))


def torch_label_logits(model) -> np.ndarray:
    """`[texts, labels]` of `cases.TEXT_TOKENS`, in one padded batch."""
    import torch

    seen = np.arange(TEXT_TOKENS.shape[1])[None] < TEXT_LENGTHS[:, None]
    tokens = np.where(seen, TEXT_TOKENS, model.config.pad_token_id)
    with torch.no_grad():
        out = model(torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(seen).long())
    return out.logits.double().numpy()


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    last = {name: torch_logits(torch_model(config).double(), TOKENS)[:, -1] for name, config in CASES.items()}
    labels = {name: torch_label_logits(torch_classifier(config).double()) for name, config in ENCODERS.items()}
    for path, cases in ((GOLDEN, last), (CLASSIFIERS_GOLDEN, labels)):
        np.savez_compressed(path, **{name: logits.astype(np.float32) for name, logits in cases.items()})
        print(f"{path}: {len(cases)} cases, {path.stat().st_size} bytes")
