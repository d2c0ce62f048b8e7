"""Every objective trains through the command line, on data of the shape it needs; what it carries survives a resume."""

import json
import math
import re

import numpy as np
import pytest

from jaxdpo import cli, plots
from jaxdpo.losses import LOSSES
from tests import tiny

RUN = "--batch-size 4 --max-steps 2 --learning-rate 1e-3 --warmup-steps 0 --save-every 1"
MODIFIED = {
    "conservative": ("pairs", "--label-smoothing 0.1"),
    "reference-free": ("pairs", "--loss hinge --reference-free"),
    "forward KL": ("pairs", "--loss ipo --f-divergence-type forward_kl"),
    "alpha divergence": ("pairs", "--f-divergence-type alpha_divergence --f-alpha-divergence-coef 0.3"),
    "LD-DPO": ("pairs", "--ld-alpha 0.5"),
    "WPO": ("pairs", "--use-weighting"),
    "WPO over all pairs": ("ranked", "--loss hinge --use-weighting"),
    "RPO": ("pairs", "--loss sigmoid,sft --loss-weights 1,0.005"),
    "MPO": ("pairs", "--loss sigmoid,bco_pair,sft --loss-weights 0.8,0.2,1"),
    "sorted and more": ("pairs", "--loss aot,sft"),
    "TR-DPO, soft": ("pairs", "--ref-model-sync-steps 1"),
    "TR-DPO, hard": ("pairs", "--loss ipo --ref-model-sync-steps 2 --ref-model-mixup-alpha 1"),
    "all pairs": ("ranked", "--loss sigmoid"),
    "all pairs, coupled": ("ranked", "--loss cpo"),
    "listwise": ("ranked", "--loss nca_pair"),
    "rankings": ("ranked", "--loss plackett_luce"),
    "ties and a top k": ("partial", "--loss plackett_luce"),
    "all pairs of ties": ("partial", "--loss robust"),
}


@pytest.fixture(scope="module")
def data(inputs, tmp_path_factory):
    """A file of each shape."""
    folder = tmp_path_factory.mktemp("objectives")
    ranked = (
        {"prompt": f"{n}?", "completions": [" yes" * (1 + n % 3), " so so", " no"][: 2 + n % 2]} for n in range(8)
    )
    partial = (
        {
            "prompt": f"{n}?",
            "completions": [" a", " bb", " ccc", " d e"],
            "ranks": [[0, 0, 1, 1], [0, 1, None, None]][n % 2],
        }
        for n in range(8)
    )
    unpaired = (
        {"prompt": f"{n}?", "completion": [" no", " yes"][n % 2] * (1 + n % 3), "label": n % 2 == 1} for n in range(8)
    )
    files = {"pairs": inputs.data}
    for name, records in (("ranked", ranked), ("partial", partial), ("unpaired", unpaired)):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    return files


@pytest.fixture
def undrawn(monkeypatch):
    """Without curves, which take longer than the steps; the runs further below draw theirs."""
    monkeypatch.setattr(plots, "save_curves", lambda *args, **options: None)


def train(inputs, data, shape, flags, root):
    """The rows of metrics.jsonl of a run."""
    argv = ["dpo", "--model", str(inputs.model), "--data", str(data[shape]), "--output-dir", str(root)]
    assert cli.main([*argv, "--max-length", "64", *RUN.split(), *flags.split()]) == 0
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def check(rows, inputs, root):
    assert [row["step"] for row in rows][-2:] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["grad_norm"] > 0 for row in rows if row["step"])
    before, after = ((path / "model.safetensors").read_bytes() for path in (inputs.model, root / "export"))
    assert before != after


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", LOSSES)
def test_every_objective_trains(inputs, data, tmp_path, name):
    shape = "unpaired" if "label" in LOSSES[name].data else "pairs"
    rows = train(inputs, data, shape, f"--loss {name}", tmp_path / "run")
    check(rows, inputs, tmp_path / "run")
    first = rows[0]
    if "label" in LOSSES[name].data:
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "desirable"} <= set(first)
    else:
        assert {"rewards/accuracies", "rewards/margins", "logps/chosen", "logps_per_token/chosen"} <= set(first)
    assert ("kl" in first) == (LOSSES[name].needs_reference and name != "bco")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", MODIFIED)
def test_every_variant_trains(inputs, data, tmp_path, name):
    shape, flags = MODIFIED[name]
    held_out = f"--eval-data {data[shape]}" if "TR-DPO" in name or shape == "partial" or "WPO" in name else ""
    rows = train(inputs, data, shape, f"{flags} {held_out}", tmp_path / "run")
    check(rows, inputs, tmp_path / "run")
    assert ("eval_loss" in rows[-1]) == bool(held_out)


def test_unpaired_data_are_evaluated_too(inputs, data, tmp_path, capsys):
    rows = train(inputs, data, "unpaired", f"--loss kto --eval-data {data['unpaired']}", tmp_path / "run")
    assert rows[0]["step"] == 0 and rows[0]["eval_loss"] == pytest.approx(0.5, abs=1e-6)  # 1 - sigmoid(0)
    assert "eval_rewards/accuracies" not in rows[0]
    out = capsys.readouterr().out
    assert "examples, before -> after" in out and re.search(r"  margin +0\.000 -> ", out)


@pytest.mark.parametrize("flags", ["--loss bco", "--ref-model-sync-steps 2 --ref-model-mixup-alpha 0.5"])
def test_what_is_carried_survives_a_resume(inputs, data, tmp_path, flags):
    """The running mean, and the parameters of a reference that moves."""
    shape = "unpaired" if "bco" in flags else "pairs"
    whole = train(inputs, data, shape, f"{flags} --max-steps 4", tmp_path / "whole")
    train(inputs, data, shape, f"{flags} --max-steps 3", tmp_path / "parts")
    parts = train(inputs, data, shape, f"{flags} --max-steps 4", tmp_path / "parts")
    assert tiny.timeless(whole) == tiny.timeless(parts)
    exported = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert exported[0] == exported[1]


def test_a_hard_update_makes_the_policy_its_reference(inputs, data, tmp_path):
    rows = train(
        inputs, data, "pairs", "--ref-model-sync-steps 2 --ref-model-mixup-alpha 1 --max-steps 3", tmp_path / "run"
    )
    assert rows[0]["loss"] == rows[2]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(rows[1]["loss"] - math.log(2)) > 1e-4


def test_an_objective_that_cannot_use_the_data_is_refused(inputs, data, tmp_path, capsys):
    argv = ["dpo", "--model", str(inputs.model), "--data", str(data["unpaired"]), "--output-dir", str(tmp_path / "run")]
    assert cli.main(argv) == 2
    assert "allowed with this data: kto, bco" in capsys.readouterr().err
    assert cli.main([*argv, "--loss", "kto", "--cpo-alpha", "2"]) == 2
    assert "--cpo-alpha 2.0 has no effect with --loss kto; allowed with: cpo" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_smoothing_and_weights_are_in_the_loss(inputs, data, tmp_path):
    """At the reference the loss of sigmoid is ln 2, that of sft the token mean; logged is their weighted sum."""
    alone = train(inputs, data, "pairs", "--loss sft --max-steps 1", tmp_path / "sft")[0]
    both = train(inputs, data, "pairs", "--loss sigmoid,sft --loss-weights 2,0.5 --max-steps 1", tmp_path / "both")[0]
    np.testing.assert_allclose(both["loss"], 2 * math.log(2) + 0.5 * alone["loss"], rtol=1e-5)
