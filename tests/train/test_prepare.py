"""What is found out before a run costs anything, and where it puts its parameters."""

import dataclasses
import gzip
import os

import jax
import pytest

from jaxdpo import cli
from jaxdpo.config import DPOConfig
from jaxdpo.hf import load_tokenizer, save_hf
from jaxdpo.train.dpo import DPO
from jaxdpo.train.prepare import prepare
from jaxdpo.types import InputError
from tests import tiny


def config(inputs, root, **options):
    needed = {"model": str(inputs.model), "data": str(inputs.data), "output_dir": str(root), "max_length": 64}
    return DPOConfig(**{**needed, **options})


def test_a_token_beyond_the_vocabulary_is_refused_with_its_line(inputs, tmp_path):
    """XLA would take the last embedding in its place, and nobody would know."""
    small = dataclasses.replace(tiny.WITH_TOKENIZER, vocab_size=120)
    decoder = tiny.decoder(small)
    model = save_hf(tmp_path / "model", decoder, tiny.params(decoder), tokenizer=load_tokenizer(inputs.model))
    with pytest.raises(InputError, match=r"pairs\.jsonl, line 1: the tokenizer gives id \d+; allowed: below .* 120;"):
        prepare(config(inputs, tmp_path / "run", model=str(model)), DPO, jax.devices()[:1])


def test_the_architecture_is_looked_at_before_the_data_is_tokenized(inputs, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mamba"}')
    monkeypatch.setattr("jaxdpo.train.prepare.load_dataset", lambda *_, **__: pytest.fail("it was tokenized"))
    with pytest.raises(InputError, match=r"model_type 'mamba' .* is not supported; allowed: llama, mistral, gpt2"):
        prepare(config(inputs, tmp_path / "run", model=str(tmp_path / "model")), DPO, jax.devices()[:1])


@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (3, 1), (6, 2), (8, 8)])
def test_as_many_devices_as_divide_the_width_split_the_parameters(inputs, tmp_path, devices, fsdp):
    assert tiny.WITH_TOKENIZER.embed_dim % 8 == 0
    ready = prepare(config(inputs, tmp_path / "run"), DPO, jax.devices()[:devices])
    assert dict(ready.mesh.shape) == {"data": devices // fsdp, "fsdp": fsdp, "tensor": 1, "context": 1}
    assert all(shape.rows % devices == 0 for shape in ready.layout.shapes)
    assert not (tmp_path / "run").exists()


def test_microbatch_tokens_that_hold_no_row_of_the_largest_group_are_refused(inputs, tmp_path):
    with pytest.raises(
        InputError,
        match=r"--microbatch-tokens 40 does not hold a row of 64 tokens, which the largest group needs \(\d+ tokens; "
        r"\S+pairs\.jsonl, line \d+\); allowed: at least 64; raise it",
    ):
        prepare(config(inputs, tmp_path / "run", microbatch_tokens=40), DPO, jax.devices()[:1])


def test_microbatch_tokens_that_hold_no_row_of_the_length_asked_for_are_refused(inputs, tmp_path):
    with pytest.raises(
        InputError, match="does not hold a row of 256 tokens, which --row-lengths asks for; allowed: at"
    ):
        prepare(config(inputs, tmp_path / "run", microbatch_tokens=128, row_lengths="64,256"), DPO, jax.devices()[:1])


def test_the_usual_microbatch_grows_with_the_largest_group_and_says_so(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxdpo.train.defaults.MICROBATCH_TOKENS", {"cpu": 32})
    ready = prepare(config(inputs, tmp_path / "run"), DPO, jax.devices()[:1])
    assert "microbatch 64 tokens a device, above the usual 32: one row of so many, which the" in capsys.readouterr().out
    assert (ready.config.microbatch_tokens, ready.config.row_lengths) == (64, "64")


@pytest.mark.parametrize("given, resolved", [(None, None), ("96", "96"), ("64, 128", "128,64")])
def test_a_run_knows_its_row_lengths_and_gets_the_same_layout_from_them(inputs, tmp_path, given, resolved):
    first = prepare(config(inputs, tmp_path / "run", row_lengths=given), DPO, jax.devices()[:1])
    if resolved is not None:
        assert first.config.row_lengths == resolved
    again = prepare(first.config, DPO, jax.devices()[:1])
    assert again.layout == first.layout and again.config == first.config


def test_a_pipe_is_refused_because_looking_at_it_drains_it(inputs, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe cannot be read, it is no regular file; allowed: JSON lines"):
        prepare(config(inputs, tmp_path / "run", data=str(tmp_path / "pipe")), DPO, jax.devices()[:1])


def test_gzipped_data_is_the_same_data(inputs, tmp_path):
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(inputs.data.read_bytes()))
    plain = prepare(config(inputs, tmp_path / "run"), DPO, jax.devices()[:1])
    zipped = prepare(config(inputs, tmp_path / "run", data=str(tmp_path / "pairs.jsonl.gz")), DPO, jax.devices()[:1])
    assert zipped.layout == plain.layout
    for one, other in zip(plain.data[0].dataset.groups, zipped.data[0].dataset.groups, strict=True):
        assert one.prompt.tolist() == other.prompt.tolist()


def test_a_model_directory_that_is_not_the_runs_own_is_left_alone(inputs, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("mine")
    assert cli.main(inputs.command(tmp_path, "--max-steps 1")) == 2
    assert "holds model but no config.yaml" in capsys.readouterr().err
    assert (tmp_path / "model" / "config.json").read_text() == "mine"


def test_a_directory_that_cannot_be_made_is_refused_at_once(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxdpo.train.run.prepare", lambda *_: pytest.fail("it went on"))
    (tmp_path / "file").touch()
    assert cli.main(inputs.command(tmp_path / "file" / "run", "--max-steps 1")) == 2
    assert f"cannot be made in {tmp_path / 'file'}; allowed: a writable directory" in capsys.readouterr().err


def test_paths_are_the_same_however_they_are_spelt(inputs, tmp_path, monkeypatch):
    root = tmp_path / "run"
    assert cli.main(inputs.command(root, "--batch-size 24 --max-steps 1")) == 0
    monkeypatch.chdir(inputs.data.parent)
    relative = inputs._replace(data=inputs.data.relative_to(inputs.data.parent))
    assert cli.main(relative.command(root, "--batch-size 24 --max-steps 1 --resume must")) == 0


def test_a_run_that_lost_its_checkpoints_is_not_begun_again(inputs, tmp_path, capsys):
    root = tmp_path / "run"
    assert cli.main(inputs.command(root, "--batch-size 24 --max-steps 1")) == 0
    (root / "checkpoints").rename(tmp_path / "moved")
    before = (root / "export" / "model.safetensors").read_bytes()
    for resume in ("auto", "must"):
        assert cli.main(inputs.command(root, f"--batch-size 24 --max-steps 1 --resume {resume}")) == 2
        assert "holds a run without its checkpoints" in capsys.readouterr().err
    assert (root / "export" / "model.safetensors").read_bytes() == before
