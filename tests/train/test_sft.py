"""Supervised fine-tuning: the loss is the mean over tokens, of completions or of whole texts, of the best ones."""

import json

import jax
import numpy as np
import pytest

from jaxdpo import cli
from jaxdpo.data.load import load_dataset
from jaxdpo.hf import load_hf, load_tokenizer
from tests import tiny


def rows(root):
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def command(inputs, root, data, flags=""):
    needed = ["--model", str(inputs.model), "--data", str(data), "--output-dir", str(root), "--max-length", "64"]
    return ["sft", *needed, "--batch-size", "6", *flags.split()]


def token_statistics(inputs, data, **options):
    """Of every scored token, by a plain pass over each text alone: log-prob, entropy, whether it was likeliest."""
    tokenizer = load_tokenizer(inputs.model)
    decoder, params = load_hf(inputs.model)
    found = []
    for group in load_dataset(str(data), tokenizer, 64, **options).dataset.groups:
        path = np.concatenate([group.prompt, group.completions[0]])
        log_probs = np.asarray(jax.nn.log_softmax(decoder.logits(params, path[None])[0]), np.float64)
        predicted = log_probs[len(group.prompt) - 1 : -1]
        target = group.completions[0]
        entropy = -(np.exp(predicted) * predicted).sum(axis=-1)
        found += zip(
            predicted[np.arange(len(target)), target], entropy, predicted.argmax(axis=-1) == target, strict=True
        )
    return np.array(found, np.float64)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    records = ({"prompt": f"Is {n} fine?", "completion": " yes" * (1 + n % 3)} for n in range(6))
    return tiny.write_records(tmp_path_factory.mktemp("sft") / "demonstrations.jsonl", records)


@pytest.mark.parametrize("flags, score_prompt", [("", False), ("--no-completion-only-loss", True)])
def test_the_first_loss_is_the_mean_over_tokens(inputs, demonstrations, tmp_path, flags, score_prompt):
    assert cli.main(command(inputs, tmp_path / "run", demonstrations, f"--max-steps 1 {flags}")) == 0
    (row,) = rows(tmp_path / "run")
    logps, entropy, right = token_statistics(inputs, demonstrations, score_prompt=score_prompt).T
    assert len(logps) > (60 if score_prompt else 20)
    assert row["loss"] == pytest.approx(-logps.mean(), rel=1e-5)
    assert row["entropy"] == pytest.approx(entropy.mean(), rel=1e-5)
    assert row["mean_token_accuracy"] == pytest.approx(right.mean(), abs=1e-6)


def test_microbatches_do_not_change_the_step(inputs, demonstrations, tmp_path):
    first = {}
    for name, flags in (("one", ""), ("several", "--microbatch-tokens 40 --row-lengths 40")):
        assert cli.main(command(inputs, tmp_path / name, demonstrations, f"--max-steps 1 {flags}")) == 0
        (first[name],) = rows(tmp_path / name)
    for key in ("loss", "entropy", "mean_token_accuracy", "grad_norm"):
        assert first["one"][key] == pytest.approx(first["several"][key], rel=1e-4), key


def test_of_preferences_the_best_completions_are_learnt(inputs, tmp_path, capsys):
    """Preferred-FT: of pairs the chosen, of rankings the first, of labelled completions the good ones."""
    data = {
        "pairs": inputs.data,
        "ranked": tiny.write_ranked(tmp_path / "ranked.jsonl", range(6), ties=True),
        "unpaired": tiny.write_unpaired(tmp_path / "unpaired.jsonl", range(6)),
    }
    for name, path in data.items():
        assert cli.main(command(inputs, tmp_path / name, path, "--max-steps 1 --no-shuffle")) == 0
        logps = token_statistics(inputs, path, use="imitate")[:, 0]
        if name != "pairs":  # whose first step has six of 24
            assert rows(tmp_path / name)[0]["loss"] == pytest.approx(-logps.mean(), rel=1e-5), name
    assert "dropped 3: " in capsys.readouterr().out  # the bad ones


def test_it_learns_and_says_so(inputs, tmp_path, capsys):
    flags = f"--eval-data {inputs.held_out} --epochs 4 --learning-rate 1e-2 --warmup-steps 1"
    assert cli.main(command(inputs, tmp_path / "run", inputs.data, flags)) == 0
    before, *_, last = rows(tmp_path / "run")
    assert before["step"] == 0 and last["eval_loss"] < 0.7 * before["eval_loss"]
    assert last["eval_mean_token_accuracy"] > 0.4 > 0.1 > before["eval_mean_token_accuracy"]
    printed = capsys.readouterr().out
    assert f"loss         {before['eval_loss']:.3f} -> {last['eval_loss']:.3f}" in printed
    assert f"dpo --model {tmp_path / 'run' / 'export'} --data" in printed
    assert cli.main(command(inputs, tmp_path / "run", inputs.data, f"{flags} --resume must")) == 0


def test_a_run_of_another_command_is_not_continued(full, inputs, capsys):
    assert cli.main(command(inputs, full.root, inputs.data)) == 2
    assert "holds a run of another command, with options such as --alphapo-alpha" in capsys.readouterr().err
