"""`jaxdpo export`: a checkpoint as a Hugging Face directory, the same that the run itself wrote."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdpo import cli
from jaxdpo.hf import load_hf, load_tokenizer


def export(checkpoint, output_dir, *flags):
    return cli.main(["export", "--checkpoint", str(checkpoint), "--output-dir", str(output_dir), *flags])


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("checkpoint", ["", "checkpoints", "checkpoints/10"])
def test_export_of_the_last_checkpoint_is_that_of_the_run(full, tmp_path, checkpoint, capsys):
    assert export(full.root / checkpoint, tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(full.root / "export")
    assert f"export     step 10 of {full.root} to {tmp_path / 'out'}, float32" in capsys.readouterr().out


def test_export_of_an_earlier_checkpoint_is_another(full, tmp_path):
    assert export(full.root / "checkpoints" / "9", tmp_path / "out") == 0
    last, earlier = (load_file(path / "model.safetensors") for path in (full.root / "export", tmp_path / "out"))
    assert 0 < max(np.abs(last[name] - earlier[name]).max() for name in last) < 0.1


def test_an_empty_directory_will_do(full, tmp_path):
    (tmp_path / "out").mkdir()
    assert export(full.root / "checkpoints", tmp_path / "out") == 0


def test_bfloat16_is_the_nearest(full, tmp_path):
    assert export(full.root / "checkpoints", tmp_path / "out", "--dtype", "bfloat16") == 0
    exact = load_file(full.root / "export" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, exact[name].astype(tensor.dtype))
        assert tensor.dtype.name == "bfloat16"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_export_is_a_model_to_start_from(full, inputs):
    decoder, params = load_hf(full.root / "export")
    before, _ = load_hf(inputs.model)
    assert decoder == before
    assert set(params) == {"tokens", "blocks", "final_norm"}
    tokenizer, original = load_tokenizer(full.root / "export"), load_tokenizer(inputs.model)
    assert tokenizer("Is 7 fine?")["input_ids"] == original("Is 7 fine?")["input_ids"]


def refused(capsys, *args):
    assert export(*args) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_directory_in_use_is_refused(full, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    message = refused(capsys, full.root / "checkpoints", tmp_path)
    assert message.startswith(
        f"jaxdpo: error: --output-dir {tmp_path} exists and is not empty; allowed: a new directory"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_no_checkpoint_is_refused(full, tmp_path, capsys):
    message = refused(capsys, full.root / "export", tmp_path / "out")
    assert message.startswith(
        f"jaxdpo: error: {full.root / 'export'} holds no checkpoint; allowed: the --output-dir of "
    )


def test_a_checkpoint_far_from_its_run_is_refused(full, tmp_path, capsys):
    shutil.copytree(full.root / "checkpoints" / "10", tmp_path / "away" / "checkpoints" / "10")
    message = refused(capsys, tmp_path / "away" / "checkpoints", tmp_path / "out")
    assert f"{tmp_path / 'away' / 'model'} is missing: it holds the tokenizer of " in message
