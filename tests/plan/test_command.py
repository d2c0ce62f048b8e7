"""`jaxdpo plan` as a command: a process that compiles, its answer, and what happens where it fails."""

import importlib.util
import json
import sys

import pytest

from jaxdpo.cli import main
from jaxdpo.config import PlanConfig
from jaxdpo.hf import save_hf
from jaxdpo.plan import command
from jaxdpo.types import InputError, RunStopped
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model")
    decoder = tiny.decoder()
    save_hf(directory, decoder, tiny.params(decoder))
    return str(directory)


def test_json_is_all_that_is_printed(model, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    small = ["--length", "64", "--batch-size", "4", "--prompt-tokens", "8", "--completion-tokens", "8"]
    assert main(["plan", "--model", model, "--remat", "full", *small, "--json"]) == 0
    printed = capsys.readouterr()
    plan = json.loads(printed.out)
    assert (plan["model"], plan["topology"], plan["fits"], plan["device_kind"]) == (model, "local", True, "cpu")
    assert "plan       compiling" in printed.err


def worker_that(tmp_path, monkeypatch, source: str) -> None:
    """The process that compiles runs this instead."""
    script = tmp_path / "worker.py"
    script.write_text(source)
    monkeypatch.setattr(command, "WORKER", [sys.executable, str(script)])


def test_bad_input_is_said_as_the_process_says_it(tmp_path, monkeypatch):
    worker_that(tmp_path, monkeypatch, 'import sys; sys.stdin.read(); print(\'{"error": "no such model: x"}\')')
    with pytest.raises(InputError, match="no such model: x"):
        command.plan_in_process(PlanConfig(model="x"), print)


def test_a_process_that_dies_leaves_its_last_words(tmp_path, monkeypatch):
    worker_that(tmp_path, monkeypatch, "import os; os.write(2, b'libtpu: out of luck'); os.abort()")
    with pytest.raises(RunStopped, match=r"ended with status -6[\s\S]*libtpu: out of luck"):
        command.plan_in_process(PlanConfig(model="x"), print)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_libtpu(capsys):
    assert main(["plan", "--model", "llama-3.1-8b", "--topology", "v5e:4x4"]) == 2
    assert "needs libtpu, the TPU compiler" in capsys.readouterr().err


def test_a_topology_that_does_not_exist(capsys):
    assert main(["plan", "--model", "llama-3.1-8b", "--topology", "v5e:5x5"]) == 2
    assert "v5e has no slice '5x5'; allowed: 1x1, 2x2" in capsys.readouterr().err
