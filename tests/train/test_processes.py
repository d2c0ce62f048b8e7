"""A run on two and on four real processes is that of one: numbers, checkpoints, export; a signal to one stops all."""

import json
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdpo import cli
from jaxdpo.train.run_dir import read_yaml
from tests.launch import TIMEOUT, Launched, cached_programs
from tests.train.test_resume import saved, steps_done, timeless

pytestmark = pytest.mark.slow


class Stopped(NamedTuple):
    """What a run on two processes left that a signal to the second one stopped, and one on four that went on."""

    root: Path
    stopped: list[tuple[int, str, str]]
    step: int
    rows: list[dict]
    continued: list[tuple[int, str, str]]


@pytest.fixture(scope="module")
def runs(inputs, full, compiled, tmp_path_factory) -> Stopped:
    """The steps of `full`, by two processes of 4 devices, then by four of 2; what they share is one file system."""
    folder = tmp_path_factory.mktemp("processes")
    root, environment = folder / "run", {**cached_programs(compiled), "JAXDPO_CACHE": str(folder / "cache")}
    words = ["-m", "jaxdpo.cli", *inputs.command(root, full.flags)]
    two = Launched([words] * 2, devices=4, environment=environment, cwd=folder)
    began = time.monotonic()
    while steps_done(root) < 3 and time.monotonic() < began + TIMEOUT and two.processes[1].poll() is None:
        time.sleep(0.01)
    two.signal(1, signal.SIGTERM)
    stopped = two.ended()
    step, rows = saved(root)[-1], timeless(root)
    four = Launched([[*words, "--resume", "must"]] * 4, devices=2, environment=environment, cwd=folder)
    return Stopped(root, stopped, step, rows, four.ended())


def test_a_signal_to_one_process_stops_all_after_the_same_step(runs):
    assert [status for status, *_ in runs.stopped] == [143, 143], runs.stopped
    (_, out, err), (_, silent, of_other) = runs.stopped
    assert runs.rows[-1]["step"] == runs.step < 10
    assert f"jaxdpo: interrupted: SIGTERM after step {runs.step} of 10, saved in {runs.root}/checkpoints" in err
    assert "SIGTERM: stopping after this step; once more to stop now" in of_other
    assert "reference  computed for 24 groups, 0 from the cache" in out and silent == ""
    assert "Traceback" not in err + of_other and "interrupted" not in of_other


def test_the_first_process_alone_speaks(runs):
    assert [status for status, *_ in runs.continued] == [0] * 4, runs.continued
    printed = runs.continued[0][1]
    assert "on 8 device(s), fsdp=8\n" in printed and "\ndone       step 10, " in printed
    assert f"resume     step {runs.step} of 10, from {runs.root}/checkpoints/{runs.step}\n" in printed
    assert [out for _, out, _ in runs.continued[1:]] == [""] * 3


def test_the_numbers_are_those_of_one_process_but_for_rounding(runs, full):
    for got, want in zip(timeless(runs.root), timeless(full.root), strict=True):
        assert list(got) == list(want)
        assert got == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_the_same_steps_are_taken_again_bit_by_bit(runs):
    """Rows that both runs have: those of the first one stay as they are."""
    assert timeless(runs.root)[: len(runs.rows)] == runs.rows


def test_what_four_processes_export_is_what_they_saved(runs, full, tmp_path):
    assert saved(runs.root) == [9, 10]
    checkpoints = str(runs.root / "checkpoints")
    assert cli.main(["export", "--checkpoint", checkpoints, "--output-dir", str(tmp_path / "exported")]) == 0
    exported, file = runs.root / "export", "model.safetensors"
    assert (tmp_path / "exported" / file).read_bytes() == (exported / file).read_bytes()
    alone, got = load_file(full.root / "export" / file), load_file(exported / file)
    assert {name: array.shape for name, array in got.items()} == {name: array.shape for name, array in alone.items()}
    for name, array in alone.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=1e-6, err_msg=name)
    others = {path.name for path in (full.root / "export").iterdir()} - {file}
    assert all((exported / name).read_bytes() == (full.root / "export" / name).read_bytes() for name in others)


def test_what_is_written_is_what_one_process_writes(runs, full):
    assert {path.name for path in runs.root.iterdir()} == {path.name for path in full.root.iterdir()}
    config = read_yaml(runs.root / "config.yaml")
    assert config == {**read_yaml(full.root / "config.yaml"), "output_dir": str(runs.root)}
    assert "process_id" not in config  # it starts the run anywhere


def test_the_reference_is_computed_once(runs):
    printed = runs.continued[0][1]
    assert "reference  computed for 0 groups, 24 from the cache" in printed
    assert "reference  held out: computed for 0 groups, 8 from the cache" in printed


def test_one_process_goes_on_with_what_four_saved(runs, inputs, full, tmp_path, monkeypatch):
    """With the same weights: the checkpoint of four processes is read back whole."""
    flags = full.flags.replace("--epochs 2", "--max-steps 11")
    command = inputs.command(runs.root, f"{flags} --resume must")
    monkeypatch.setenv("JAXDPO_CACHE", str(runs.root.parent / "cache"))
    assert cli.main(command) == 0
    rows = [json.loads(line) for line in (runs.root / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(12))
    assert rows[-1]["loss"] < rows[5]["loss"]
