"""What a run does about its reference: it is computed once for all runs, or at every step, with the same numbers."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdpo.config import DPOConfig
from jaxdpo.train import run
from jaxdpo.train.dpo import run_dpo
from tests import tiny


@pytest.fixture
def trained(inputs, tmp_path, monkeypatch, capsys):
    """A function that trains, and returns its metrics and what it printed of the reference, in a cache of its own."""
    monkeypatch.setenv("JAXDPO_CACHE", str(tmp_path / "cache"))

    def call(name, **options):
        files = {"model": str(inputs.model), "data": str(inputs.data), "eval_data": str(inputs.held_out)}
        recipe = {"max_length": 64, "batch_size": 8, "max_steps": 3, "learning_rate": 1e-3, "warmup_steps": 0}
        config = DPOConfig(**{**files, "output_dir": str(tmp_path / name), **recipe, **options})
        run_dpo(config, devices=jax.devices()[:1])
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reference")]
        return tiny.timeless(rows), [line.split(" from the cache ")[0].removeprefix("reference  ") for line in said]

    return call


@pytest.fixture
def forward_passes(monkeypatch):
    """Batches that the reference's program was called with in this test."""
    made, honest = [], run.make_logp_program

    def counted(*args, **options):
        program = honest(*args, **options)
        return lambda params, batch: made.append(batch) or program(params, batch)

    monkeypatch.setattr(run, "make_logp_program", counted)
    return made


def test_a_sweep_and_a_longer_run_pay_for_the_reference_once(trained, forward_passes):
    _, said = trained("short", max_steps=1)
    assert said == ["computed for 8 groups, 0", "held out: computed for 8 groups, 0"]
    _, said = trained("first")
    assert said == ["computed for 16 groups, 8", "held out: computed for 0 groups, 8"]
    done = len(forward_passes)
    assert done > 0
    for number, other in enumerate([{"beta": 0.3, "seed": 5}, {"batch_size": 12}, {"loss": "ipo", "ld_alpha": 0.5}]):
        _, said = trained(f"other-{number}", **other)
        assert said == ["computed for 0 groups, 24", "held out: computed for 0 groups, 8"]
    assert len(forward_passes) == done


def test_a_run_that_goes_on_computes_nothing(trained, forward_passes):
    whole, _ = trained("whole", max_steps=3, eval_every=2)
    done = len(forward_passes)
    trained("run", max_steps=2, eval_every=2)
    rows, said = trained("run", max_steps=3, eval_every=2)
    assert rows == whole
    assert said == ["computed for 0 groups, 8", "held out: computed for 0 groups, 8"]  # of the step that is left
    rows, said = trained("run", max_steps=3, eval_every=2)  # complete already
    assert rows == whole and said == ["held out: computed for 0 groups, 8"]
    assert len(forward_passes) == done


def test_on_the_fly_is_as_precomputed(trained, forward_passes, tmp_path):
    options = {"eval_every": 1, "ld_alpha": 0.5}
    want, said = trained("stored", **options)
    assert len(said) == 2
    forward_passes.clear()
    rows, said = trained("fly", precompute_ref_log_probs=False, **options)
    assert said == [] and len(forward_passes) >= 3  # a microbatch of each step at least
    assert [list(row) for row in rows] == [list(row) for row in want]
    for row, expected in zip(rows, want, strict=True):
        # Margins are 0 before the first update but for rounding, which decides who is accurate.
        names = [name for name in row if row["step"] > 1 or "accuracies" not in name]
        assert {name: row[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, rel=1e-4, abs=1e-5
        )
    got, stored = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("fly", "stored"))
    for name, tensor in stored.items():
        np.testing.assert_allclose(got[name], tensor, atol=1e-4)


def test_on_the_fly_writes_no_reference_and_goes_on_exactly(trained, tmp_path):
    options = {"precompute_ref_log_probs": False, "eval_every": 2}
    whole, _ = trained("whole", max_steps=4, **options)
    trained("run", max_steps=2, **options)
    rows, _ = trained("run", max_steps=4, **options)
    assert rows == whole
    assert not (tmp_path / "cache" / "reference").exists()
