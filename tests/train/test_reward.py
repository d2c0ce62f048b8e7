"""Reward models: they learn a rule, the most accurate checkpoint is exported with mean 0, and others score with it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdpo import cli
from jaxdpo.hf import load_config, load_tokenizer, save_hf
from tests import tiny


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(inputs, root, data, flags=""):
    needed = ["--model", str(inputs.model), "--data", str(data), "--output-dir", str(root), "--max-length", "64"]
    return ["reward", *needed, *flags.split()]


RULE = "--batch-size 16 --learning-rate 1e-2 --warmup-steps 2 --save-every 6"


def write_rule(path, numbers):
    """Pairs whose better completion is yes or no by the prompt, of whatever length: no one answer is always right."""

    def record(n):
        good = n * 7919 % 13 % 2
        better, worse = (" yes", " no")[:: 1 if good else -1]
        prompt = f"{n}: {'good' if good else 'bad'}?"
        return {"prompt": prompt, "chosen": better * (1 + n % 2), "rejected": worse * (1 + n % 3)}

    return tiny.write_records(path, map(record, numbers))


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """The directory of a run on a rule, and of its data."""
    folder = tmp_path_factory.mktemp("reward")
    data, held_out = (
        write_rule(folder / "pairs.jsonl", range(96)),
        write_rule(folder / "held_out.jsonl", range(200, 240)),
    )
    assert cli.main(command(inputs, folder / "run", data, f"{RULE} --epochs 8 --eval-data {held_out}")) == 0
    return folder


def test_a_rule_is_learnt(trained):
    before, *steps = rows(trained / "run" / "metrics.jsonl")
    assert before["eval_accuracy"] < 0.6 and before["eval_loss"] == pytest.approx(np.log(2), abs=0.1)
    assert steps[-1]["eval_accuracy"] >= 0.95 and steps[-1]["eval_loss"] < 0.1
    assert {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"} <= set(steps[0])
    for row in steps:
        assert row["min_reward"] <= row["mean_reward"] <= row["max_reward"]
    evaluated = {row["step"]: (row["eval_accuracy"], -row["eval_loss"]) for row in steps if "eval_loss" in row}
    best = max(evaluated, key=lambda step: evaluated[step])
    kept = sorted(int(path.name) for path in (trained / "run" / "checkpoints").iterdir())
    assert kept == sorted({best, 42, 48})


def test_the_exported_rewards_have_mean_0_and_order_the_held_out_pairs(trained, tmp_path):
    model = str(trained / "run" / "export")
    for name in ("pairs", "held_out"):
        flags = ["--data", str(trained / f"{name}.jsonl"), "--output", str(tmp_path / name), "--max-length", "64"]
        assert cli.main(["score", "--model", model, *flags]) == 0
    scores = np.array([row["scores"] for row in rows(tmp_path / "pairs")])
    assert abs(scores.mean()) < 1e-4 * scores.std()
    held_out = rows(tmp_path / "held_out")
    assert np.mean([better > worse for better, worse in (row["scores"] for row in held_out)]) >= 0.95
    assert [row["number"] for row in held_out] == list(range(1, 41))
    records = rows(trained / "held_out.jsonl")
    assert [(row["prompt"], *row["completions"]) for row in held_out] == [
        (record["prompt"], record["chosen"], record["rejected"]) for record in records
    ]
    assert load_config(model, head="score").head == "score"


def test_the_best_checkpoint_is_exported_and_not_the_last(inputs, tmp_path, capsys):
    """On held-out pairs that are the wrong way round, training makes it worse."""
    data = write_rule(tmp_path / "pairs.jsonl", range(96))
    swapped = ({**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(data)[:24])
    held_out = tiny.write_records(tmp_path / "held_out.jsonl", swapped)
    root = tmp_path / "run"
    assert cli.main(command(inputs, root, data, f"{RULE} --eval-data {held_out} --epochs 6")) == 0
    evaluated = {
        row["step"]: (row["eval_accuracy"], -row["eval_loss"])
        for row in rows(root / "metrics.jsonl")[1:]
        if "eval_loss" in row
    }
    best = max(evaluated, key=lambda step: evaluated[step])
    assert best < 36 and f"best       step {best}: highest eval_accuracy" in capsys.readouterr().out
    weights = {}
    for step in (best, 36):
        flags = ["--checkpoint", str(root / "checkpoints" / str(step)), "--output-dir", str(tmp_path / f"{step}")]
        assert cli.main(["export", *flags]) == 0
        weights[step] = load_file(tmp_path / f"{step}" / "model.safetensors")["model.norm.weight"]
    exported = load_file(root / "export" / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(exported, weights[best])
    assert not np.array_equal(exported, weights[36])


def test_scores_are_a_ranking_that_can_be_trained_on(trained, inputs, tmp_path):
    scores = tmp_path / "scores.jsonl"
    data = tiny.write_ranked(tmp_path / "ranked.jsonl", range(9))
    flags = ["--data", str(data), "--output", str(scores), "--max-length", "64"]
    assert cli.main(["score", "--model", str(trained / "run" / "export"), *flags]) == 0
    assert [len(row["scores"]) for row in rows(scores)] == [2 + n % 3 for n in range(9)]
    assert (
        cli.main([*inputs._replace(data=scores).command(tmp_path / "run", "--max-steps 1 --loss plackett_luce")]) == 0
    )


def test_what_is_equal_or_ties_is_scored_too(trained, tmp_path):
    """Samples of one prompt often are; what the record says of them is kept, and does not matter."""
    records = [
        {"prompt": "1: good?", "completions": [" yes", " no", " yes"], "ranks": [0, 0, 0]},
        {"prompt": "2: good?", "completions": [" no", " yes"], "scores": [1, 1]},
    ]
    data = tiny.write_records(tmp_path / "data.jsonl", records)
    flags = ["--data", str(data), "--output", str(tmp_path / "scores.jsonl")]
    assert cli.main(["score", "--model", str(trained / "run" / "export"), *flags]) == 0
    first, second = rows(tmp_path / "scores.jsonl")
    assert first["completions"] == records[0]["completions"] and second["completions"] == records[1]["completions"]
    assert first["scores"][0] == pytest.approx(first["scores"][2], rel=1e-5) != first["scores"][1]


def test_the_mesh_changes_nothing_but_rounding(trained, inputs, tmp_path):
    for name, mesh in (("auto", "auto"), ("split", "fsdp=2,context=4")):
        flags = ["--data", str(inputs.data), "--output", str(tmp_path / name), "--mesh", mesh]
        assert cli.main(["score", "--model", str(trained / "run" / "export"), *flags]) == 0
    for row, split in zip(rows(tmp_path / "auto"), rows(tmp_path / "split"), strict=True):
        assert row["scores"] == pytest.approx(split["scores"], rel=1e-3, abs=1e-5)


def test_messages_are_scored_as_the_template_writes_them_and_stay_messages(trained, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(trained / "run" / "export", model)
    template = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}a: {% endif %}")
    said = [{"role": "assistant", "content": text} for text in ("yes", "no")]
    record = {"prompt": [{"role": "user", "content": "7: good?"}], "chosen": said[:1], "rejected": said[1:]}
    data = tiny.write_records(tmp_path / "data.jsonl", [record])
    written = {"prompt": "u: 7: good?\na: ", "chosen": "yes\n", "rejected": "no\n"}
    for name, path in (("messages", data), ("text", tiny.write_records(tmp_path / "text.jsonl", [written]))):
        flags = ["--data", str(path), "--output", str(tmp_path / name)]
        assert cli.main(["score", "--model", str(model), *flags]) == 0
    (messages,), (text,) = rows(tmp_path / "messages"), rows(tmp_path / "text")
    assert (messages["prompt"], messages["completions"]) == (record["prompt"], [said[:1], said[1:]])
    assert messages["scores"] != text["scores"]  # whose completions end in EOS, read there
    again = ["--data", str(tmp_path / "messages"), "--output", str(tmp_path / "again")]
    assert cli.main(["score", "--model", str(model), *again]) == 0
    assert sorted(rows(tmp_path / "again")[0]["scores"]) == pytest.approx(sorted(messages["scores"]), rel=1e-5)


def test_records_that_are_dropped_are_not_scored(trained, tmp_path, capsys):
    records = rows(trained / "held_out.jsonl")[:3]
    records[1]["rejected"] = " "
    data = tiny.write_records(tmp_path / "data.jsonl", records)
    flags = ["--data", str(data), "--output", str(tmp_path / "scores.jsonl")]
    assert cli.main(["score", "--model", str(trained / "run" / "export"), *flags]) == 0
    assert [row["number"] for row in rows(tmp_path / "scores.jsonl")] == [1, 3]
    assert "row 1 (line 2): a completion is empty" in capsys.readouterr().out
    assert cli.main(["score", "--model", str(trained / "run" / "export"), *flags]) == 2
    assert "exists; allowed: a new file" in capsys.readouterr().err


def test_rankings_with_ties_are_plackett_luce(inputs, tmp_path):
    """Its first loss is nearly that of equal rewards, as the new head is small: the log of the number of orders."""
    data = tiny.write_records(
        tmp_path / "ranked.jsonl",
        ({"prompt": f"{n}?", "completions": [" a", " b", " c"], "ranks": [0, 1, 1]} for n in range(8)),
    )
    small = dataclasses.replace(tiny.WITH_TOKENIZER, init_std=1e-3)
    decoder = tiny.decoder(small)
    model = save_hf(tmp_path / "model", decoder, tiny.params(decoder), tokenizer=load_tokenizer(inputs.model))
    assert cli.main(command(inputs._replace(model=model), tmp_path / "run", data, "--max-steps 1")) == 0
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(np.log(3), abs=5e-3)  # of six orders two are observed


def test_a_stated_margin_is_asked_for(inputs, tmp_path):
    """With equal rewards, -log sigmoid(-margin)."""
    pairs = ({"prompt": f"{n}?", "chosen": " a", "rejected": " b", "margin": 2.0} for n in range(8))
    data = tiny.write_records(tmp_path / "pairs.jsonl", pairs)
    small = dataclasses.replace(tiny.WITH_TOKENIZER, init_std=1e-3)
    decoder = tiny.decoder(small)
    model = save_hf(tmp_path / "model", decoder, tiny.params(decoder), tokenizer=load_tokenizer(inputs.model))
    assert cli.main(command(inputs._replace(model=model), tmp_path / "run", data, "--max-steps 1")) == 0
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(np.log1p(np.exp(2.0)), abs=5e-3)


@pytest.mark.parametrize(
    "data, flags, message",
    [
        ("unpaired", "", "DATA, line 1: there is one completion, and a reward model learns from several"),
        ("ranked", "--center-rewards-coefficient 0.01", "--center-rewards-coefficient has no effect on rankings"),
    ],
)
def test_data_that_it_cannot_use(inputs, tmp_path, capsys, data, flags, message):
    path = getattr(tiny, f"write_{data}")(tmp_path / "data.jsonl", range(6))
    assert cli.main(command(inputs, tmp_path / "run", path, flags)) == 2
    assert message.replace("DATA", str(path)) in capsys.readouterr().err


def test_a_language_model_has_no_scores(inputs, tmp_path, capsys):
    flags = ["--data", str(inputs.data), "--output", str(tmp_path / "scores.jsonl")]
    assert cli.main(["score", "--model", str(inputs.model), *flags]) == 2
    assert "is a language model without a score head" in capsys.readouterr().err


def test_a_reward_model_is_no_policy(trained, inputs, tmp_path, capsys):
    model = trained / "run" / "export"
    assert cli.main(inputs._replace(model=model).command(tmp_path / "run", "")) == 2
    assert "is a reward model without an LM head" in capsys.readouterr().err


def test_a_checkpoint_of_a_reward_model_is_exported_as_one(trained, tmp_path):
    checkpoint = str(trained / "run" / "checkpoints" / "48")
    assert cli.main(["export", "--checkpoint", checkpoint, "--output-dir", str(tmp_path / "export")]) == 0
    assert load_config(tmp_path / "export", head="score").head == "score"
