"""The script that does the quickstart's work through the library, on a model small enough for a test."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from jaxdpo.hf import load_hf
from tests import tiny

LONGER = dataclasses.replace(tiny.WITH_TOKENIZER, max_positions=128)  # the script's max_length
SCRIPT = Path(__file__).parents[2] / "experiments" / "quickstart.py"


@pytest.mark.slow
def test_script_trains_evaluates_and_exports(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("experiment_quickstart", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "MODEL", str(tiny.write_model(tmp_path / "model", LONGER)))
    monkeypatch.chdir(tmp_path)
    script.main()
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step")]
    assert len(steps) == 25
    assert re.search(r"loss 0\.6931", steps[0])
    assert re.fullmatch(r"held-out accuracy [01]\.\d{3}, margin -?\d+\.\d{3} ± \d+\.\d{3}", lines[-1])
    decoder, _ = load_hf(tmp_path / "quickstart-export")
    assert decoder.config.max_positions == LONGER.max_positions
