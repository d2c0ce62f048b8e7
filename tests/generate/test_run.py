"""`jaxdpo generate` from end to end: what is written, in which order, and how it goes on."""

import dataclasses
import json

import pytest

from jaxdpo import cli
from jaxdpo.generate import run
from jaxdpo.hf import load_tokenizer
from tests import tiny
from tests.tiny import write_model, write_records

PROMPTS = [{"prompt": f"Is {'really ' * (n % 3 * 5)}{n} fine?"} for n in range(11)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = dataclasses.replace(tiny.WITH_TOKENIZER, max_positions=256)
    return write_model(tmp_path_factory.mktemp("generate") / "model", config)


@pytest.fixture
def generate(model, tmp_path):
    """Runs the command on `prompts.jsonl`; returns the exit status."""
    prompts = write_records(tmp_path / "prompts.jsonl", PROMPTS)

    def command(output, *flags, prompts=prompts):
        # Flags that are given twice: the last one holds.
        usual = ["--model", str(model), "--prompts", str(prompts), "--output", str(output), "--max-new-tokens", "6"]
        return cli.main(["generate", *usual, *flags])

    return command


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_completions_stand_in_the_order_of_the_prompts(generate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "WINDOW", 1)
    assert generate(tmp_path / "out.jsonl", "-n", "2", "--batch-size", "8", "--top-p", "0.9") == 0
    found = rows(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in found] == [record["prompt"] for record in PROMPTS]
    assert [row["number"] for row in found] == list(range(1, 12)) and found[0]["unit"] == "line"
    for row in found:
        assert len(row["completions"]) == len(row["tokens"]) == len(row["logps"]) == 2
        assert all(1 <= count <= 6 for count in row["tokens"]) and all(logp < 0 for logp in row["logps"])
        assert set(row["finish_reasons"]) <= {"eos", "length"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    said = capsys.readouterr().out
    assert "drawn      22 completions" in said and "ends       ['<eos>']" in said


def test_one_completion_is_a_record_to_train_on_and_goes_to_standard_output(generate, capsys, tmp_path):
    assert generate("-", "--temperature", "0") == 0
    captured = capsys.readouterr()
    (tmp_path / "out.jsonl").write_text(captured.out, encoding="utf-8")
    assert len(rows(tmp_path / "out.jsonl")) == len(PROMPTS) and "drawn" in captured.err
    assert all(isinstance(row["completion"], str) and "completions" not in row for row in rows(tmp_path / "out.jsonl"))


def test_an_interrupted_command_goes_on_and_writes_the_same(generate, tmp_path, monkeypatch, capsys):
    flags = ["-n", "2", "--batch-size", "8"]
    assert generate(tmp_path / "whole.jsonl", *flags) == 0
    output, partial, drawn = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.partial", run.Sampler.__call__

    def interrupted(sampler, prompts, **options):
        if partial.stat().st_size:
            raise KeyboardInterrupt
        return drawn(sampler, prompts, **options)

    monkeypatch.setattr(run, "WINDOW", 1)  # of eight prompts, one for each device
    monkeypatch.setattr(run.Sampler, "__call__", interrupted)
    assert generate(output, *flags) == 130 and not output.exists()
    with open(partial, "ab") as file:
        file.write(b'{"prompt": "Is')  # a line that was cut off
    monkeypatch.setattr(run.Sampler, "__call__", drawn)
    assert generate(output, *flags, "--seed", "1") == 2
    assert "with other options; allowed: the same command" in capsys.readouterr().err
    assert generate(output, *flags) == 0
    assert "goes on    behind 8 prompts" in capsys.readouterr().out
    assert rows(output) == rows(tmp_path / "whole.jsonl")
    assert not partial.exists()


def test_other_prompts_are_not_gone_on_with(generate, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    (tmp_path / ".out.jsonl.partial").write_text(
        json.dumps({"prompt": "Is 5 fine?", "source": "prompts.jsonl", "number": 1, "unit": "line"}) + "\n"
    )
    assert generate(output) == 2
    assert "ends with the prompt of prompts.jsonl, line 1, which is another one there now" in capsys.readouterr().err


def test_messages_stay_messages(generate, tmp_path, model):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (model / "chat_template.jinja").write_text(template)
    try:
        ask = {"role": "user", "content": "2+2?"}
        prompts = write_records(tmp_path / "chat.jsonl", [{"prompt": [ask]}])
        assert generate(tmp_path / "out.jsonl", "-n", "2", prompts=prompts) == 0
    finally:
        (model / "chat_template.jinja").unlink()
    (row,) = rows(tmp_path / "out.jsonl")
    assert row["prompt"] == [ask]
    assert [[message["role"] for message in said] for said in row["completions"]] == [["assistant"]] * 2


def test_stops_are_texts_and_tokens(generate, tmp_path, model):
    token = load_tokenizer(model).convert_ids_to_tokens(70)
    flags = ["-n", "8", "--max-new-tokens", "30", "--stop-token", token, "--stop", '["e", "o"]']
    assert generate(tmp_path / "out.jsonl", *flags) == 0
    found = rows(tmp_path / "out.jsonl")
    assert "stop" in {reason for row in found for reason in row["finish_reasons"]}
    assert not any("e" in text or "o" in text for row in found for text in row["completions"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stop-token", "nothing"], "--stop-token 'nothing' is no token of"),
        (["--max-new-tokens", "250"], "prompts.jsonl, line 1: the prompt has 10 tokens, and a completion up to 250; "),
        (["--temperature", "0", "--top-k", "3"], "--top-k 3 has no effect at --temperature 0"),
        (["--temperature", "0", "-n", "3"], "--num-samples 3 at --temperature 0, where all would be equal"),
        (["--top-p", "1"], "--top-p is 1.0; allowed: a number in (0, 1)"),
        (["--min-p", "0"], "--min-p is 0.0; allowed: a number in (0, 1]"),
        (["--top-k", "0"], "--top-k is 0; allowed: a whole number of at least 1"),
        (["--temperature", "nan"], "--temperature is nan; allowed: a finite number of at least 0"),
        (["-n", "0"], "--num-samples is 0; allowed: a whole number of at least 1"),
        (["--stop", '["a", ""]'], "--stop is '[\"a\", \"\"]'; allowed: a text, or a JSON list of texts, none"),
        (["--stop", ""], "--stop is ''; allowed: a text, or a JSON list of texts"),
        (["--mesh", "context=8"], "the mesh splits the length of rows in 8"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(generate, tmp_path, capsys, flags, message):
    assert generate(tmp_path / "out.jsonl", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_without_an_end_is_refused(generate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "eos_ids", lambda *_: ())
    assert generate(tmp_path / "out.jsonl") == 2
    assert "states no EOS in generation_config.json, config.json or its tokenizer" in capsys.readouterr().err


def test_an_output_that_exists_is_refused(generate, tmp_path, capsys):
    (tmp_path / "out.jsonl").touch()
    assert generate(tmp_path / "out.jsonl") == 2
    assert "exists; allowed: a new file" in capsys.readouterr().err
    assert generate(tmp_path / "out.jsonl" / "below") == 2
    assert "is a file; allowed: a new file in a directory" in capsys.readouterr().err
