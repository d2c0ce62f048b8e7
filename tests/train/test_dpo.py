"""`jaxdpo dpo` from end to end on a tiny model: what it writes, that it repeats, and that options do what they say."""

import dataclasses
import json
import math
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdpo import cli
from jaxdpo.config import DPOConfig
from jaxdpo.config.processes import PROCESS_OPTIONS
from jaxdpo.data.load import load_dataset
from jaxdpo.data.plan import StepPlan
from jaxdpo.hf import load_tokenizer
from jaxdpo.train.dpo import run_dpo
from jaxdpo.train.run_dir import read_yaml
from jaxdpo.types import RunStopped
from tests import tiny

ROW = [
    "step",
    "loss",
    "rewards/accuracies",
    "rewards/accuracies_longer",
    "rewards/accuracies_shorter",
    "rewards/chosen",
    "rewards/gradient_weight",
    "rewards/margins",
    "rewards/rejected",
    "rewards/saturated",
    "logps/chosen",
    "logps/chosen_drift",
    "logps/rejected",
    "chosen_longer",
    "chosen_shorter",
    "grad_norm",
    "kl",
    "logps_per_token/chosen",
    "logps_per_token/rejected",
    "learning_rate",
    "tokens",
    *(name for name in tiny.MEASURED if name not in tiny.AT_TIMES),
]
"""Keys of a line of metrics.jsonl: others script against them."""
EVALUATED = [f"eval_{name}" for name in ROW[1 : ROW.index("learning_rate")] if name != "grad_norm"]


def metrics(root):
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def timeless(root):
    """The metrics without what no two runs have in common."""
    return tiny.timeless(metrics(root))


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


def change(root, inputs):
    """Largest change of every weight."""
    before, after = load_file(inputs.model / "model.safetensors"), load_file(root / "export" / "model.safetensors")
    return {name: np.abs(after[name] - before[name]).max() for name in before}


@pytest.fixture(scope="module")
def dataset(inputs):
    return load_dataset(str(inputs.data), load_tokenizer(inputs.model), 64).dataset


# What a run leaves.


def test_every_file_of_the_contract_is_there(full):
    names = {"config.yaml", "metrics.jsonl", "curves.png", "checkpoints", "model", "export"}
    assert {path.name for path in full.root.iterdir()} == names
    assert {path.name for path in (full.root / "checkpoints").iterdir()} == {"9", "10"}
    exported = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (full.root / "export").iterdir()} == exported
    assert {path.name for path in (full.root / "model").iterdir()} == exported - {"model.safetensors"}
    assert (full.root / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_hold_one_row_for_each_step(full):
    before, *rows = metrics(full.root)
    assert list(before) == ["step", *EVALUATED] and before["step"] == 0
    assert [row["step"] for row in rows] == list(range(1, 11))
    for row in rows:
        named = [name for name in row if name not in tiny.AT_TIMES]
        assert named == ROW + (EVALUATED if row["step"] % 2 == 0 else [])
        assert all(math.isfinite(value) for value in row.values())


def test_metrics_say_what_happened(full, dataset):
    before, *rows = metrics(full.root)
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["eval_rewards/accuracies"] == 0.5  # all tie, exactly
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the reference was packed in other rows
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["loss"] < 0.5 and rows[-1]["rewards/accuracies"] > 0.9 and rows[-1]["eval_loss"] < 0.6
    plan = StepPlan(dataset.sizes, 5, seed=0)
    for row in rows:
        assert row["tokens"] == dataset.tokens[plan.groups_of_step(row["step"] - 1)].sum()
        assert row["learning_rate"] == pytest.approx(1e-3 * min(1, row["step"] / 4), rel=1e-6)
        margin = row["rewards/chosen"] - row["rewards/rejected"]
        assert row["rewards/margins"] == pytest.approx(margin, rel=1e-5, abs=1e-6)
    assert sum(row["tokens"] for row in rows) == 2 * dataset.tokens.sum()


def words(lines):
    """`first word -> the rest`, the last line of each first word."""
    return dict(line.split(maxsplit=1) for line in lines)


def test_the_plan_is_printed_first(full, inputs):
    plan = full.printed[: full.printed.index("\n\n")]
    assert {"data", "tokens", "model", "layout", "run", "memory", "time"} <= set(words(plan.splitlines()))
    for fact in (
        f"{inputs.data}: 24 preferences (pairs)",
        f"{inputs.held_out}: 8 preferences (pairs)",
        str(inputs.model),
        "float32, on 8 device(s)",
        "10 steps of 5 pairs",
        "rmsprop, learning rate 0.001 after 3 warm-up steps",
    ):
        assert fact in plan


def test_the_result_is_printed_last(full):
    report = words(full.printed[full.printed.index("\n\n") :].strip().splitlines())
    last = metrics(full.root)[-1]
    assert report["done"].startswith("step 10, ")
    assert report["held"] == "out   8 examples, before -> after"
    assert report["accuracy"] == f"0.500 -> {last['eval_rewards/accuracies']:.3f}"
    assert report["margin"].startswith(f"0.000 -> {last['eval_rewards/margins']:.3f} (standard error 0.")
    assert re.fullmatch(
        r"[\d,]+ tokens/s a device, MFU [\d.]+% of \S+ TFLOP/s \(measured in float32\)", report["speed"]
    )
    assert re.fullmatch(r"[\d.]+% of \d+ s in steps that count", report["goodput"])
    assert report["files"].startswith(f"{full.root}: ")
    assert report["export"].startswith(f"{full.root / 'export'}: ")
    verb, config = cli.parse(shlex.split(report["try"])[2:])
    assert (verb, config.beta, config.output_dir) == ("dpo", 0.3, f"{full.root}-beta-0.3")


def test_the_configuration_is_resolved(full, inputs):
    config = read_yaml(full.root / "config.yaml")
    assert set(config) == set(DPOConfig.__dataclass_fields__) - set(PROCESS_OPTIONS)
    chosen = {"dtype": "float32", "row_lengths": "64", "microbatch_tokens": 2048, "save_every": 1, "epochs": 2}
    stated = {"data": str(inputs.data), "learning_rate": 1e-3, "eval_every": 2, "max_steps": None}
    assert {name: config[name] for name in chosen | stated} == chosen | stated


# That it repeats.


def test_the_configuration_reproduces_the_run(full, tmp_path):
    other = tmp_path / "other"
    assert cli.main(["dpo", "--config", str(full.root / "config.yaml"), "--output-dir", str(other)]) == 0
    assert timeless(other) == timeless(full.root)
    assert weights(other / "export") == weights(full.root / "export")
    assert read_yaml(other / "config.yaml") == {**read_yaml(full.root / "config.yaml"), "output_dir": str(other)}


def test_a_longer_run_goes_on_where_the_shorter_ended(full, inputs, tmp_path):
    """Whether the length is said in steps or in epochs."""
    root = tmp_path / "run"
    assert cli.main(inputs.command(root, full.flags.replace("--epochs 2", "--max-steps 4"))) == 0
    assert timeless(root) == timeless(full.root)[:5]
    assert cli.main(inputs.command(root, full.flags + " --resume must")) == 0
    assert timeless(root) == timeless(full.root)
    assert weights(root / "export") == weights(full.root / "export")


def copied(full, tmp_path):
    """A copy of the run's directory that believes it is the original."""
    root = tmp_path / "run"
    shutil.copytree(full.root, root)
    config = (root / "config.yaml").read_text().replace(str(full.root), str(root))
    (root / "config.yaml").write_text(config)
    return root


def test_a_complete_run_has_nothing_left_to_do(full, inputs, tmp_path):
    root = copied(full, tmp_path)
    before = (root / "metrics.jsonl").read_bytes(), weights(root / "export")
    assert cli.main(inputs.command(root, full.flags)) == 0
    assert ((root / "metrics.jsonl").read_bytes(), weights(root / "export")) == before


def test_a_lost_export_is_written_again(full, inputs, tmp_path):
    root = copied(full, tmp_path)
    shutil.rmtree(root / "export")
    assert cli.main(inputs.command(root, full.flags)) == 0
    assert weights(root / "export") == weights(full.root / "export")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continues(full, inputs, tmp_path, capsys):
    root = copied(full, tmp_path)
    latest = root / "checkpoints" / "10"
    arrays = max((latest / "params").glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 1
    arrays.write_bytes(bytes(data))
    assert cli.main(inputs.command(root, full.flags)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"jaxdpo: error: {latest}: params['") and f"remove {latest}" in message
    shutil.rmtree(latest)
    assert cli.main(inputs.command(root, full.flags)) == 0
    assert timeless(root) == timeless(full.root)
    assert weights(root / "export") == weights(full.root / "export")


def test_other_weights_other_data_and_fewer_steps_are_refused(inputs, tmp_path, capsys):
    own = inputs._replace(model=tmp_path / "model", data=tmp_path / "pairs.jsonl")
    shutil.copytree(inputs.model, own.model)
    shutil.copy(inputs.data, own.data)
    command = own.command(tmp_path / "run", "--batch-size 5 --max-steps 2")
    assert cli.main(command) == 0
    config = (tmp_path / "run" / "config.yaml").read_bytes()

    def refused(command):
        assert cli.main(command) == 2
        assert (tmp_path / "run" / "config.yaml").read_bytes() == config
        return capsys.readouterr().err.splitlines()[-1]

    latest = tmp_path / "run" / "checkpoints" / "2"
    message = refused([*command, "--max-steps", "1"])
    assert message.startswith(f"jaxdpo: error: {latest} is past the 1 steps asked for; allowed: at least 2; fix: raise")
    tiny.write_pairs(own.data, range(1, 25))
    assert f"{latest} was trained from other data than these" in refused(command)
    shutil.copy(inputs.data, own.data)
    shutil.rmtree(own.model)
    tiny.write_model(own.model, seed=1)
    assert f"{latest} was trained from other model's weights than these" in refused(command)


# That options do what they say.


@pytest.fixture(scope="module")
def smoothed(inputs, tmp_path_factory):
    """One pair a step, in file order, with label smoothing."""
    root = tmp_path_factory.mktemp("smoothed") / "run"
    flags = "--batch-size 1 --max-steps 4 --label-smoothing 0.2 --beta 0.5 --no-shuffle --learning-rate 1e-2"
    assert cli.main(inputs.command(root, flags + " --warmup-steps 0")) == 0
    return metrics(root)


def test_label_smoothing_is_in_the_loss(smoothed):
    """-(1 - s) log sigmoid(m) - s log sigmoid(-m) of the one margin m of the step."""
    for row in smoothed:
        m = row["rewards/margins"]
        assert row["loss"] == pytest.approx(0.8 * math.log1p(math.exp(-m)) + 0.2 * math.log1p(math.exp(m)), rel=1e-5)
    assert abs(smoothed[-1]["rewards/margins"]) > 0.1


def test_no_shuffle_is_file_order(smoothed, dataset):
    assert [row["tokens"] for row in smoothed] == dataset.tokens[:4].tolist()
    assert len(set(dataset.tokens[:4].tolist())) > 2


@pytest.mark.parametrize("optimizer, first", [("rmsprop", 10.0), ("adamw", 1.0)])
def test_the_optimizer_is_the_one_that_was_asked_for(inputs, tmp_path, optimizer, first):
    """The first update of RMSprop is rate * g / sqrt(0.01 g^2), that of Adam rate * g / sqrt(g^2)."""
    flags = f"--batch-size 8 --max-steps 1 --learning-rate 1e-3 --warmup-steps 0 --optimizer {optimizer}"
    assert cli.main(inputs.command(tmp_path / "run", flags)) == 0
    assert max(change(tmp_path / "run", inputs).values()) == pytest.approx(first * 1e-3, rel=1e-3)


def test_bfloat16_runs_on_a_cpu(inputs, tmp_path):
    root = tmp_path / "run"
    assert cli.main(inputs.command(root, "--dtype bfloat16 --batch-size 8 --max-steps 2 --learning-rate 1e-3")) == 0
    assert metrics(root)[0]["loss"] == pytest.approx(math.log(2), abs=2e-2)
    assert read_yaml(root / "config.yaml")["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(root / "export" / "model.safetensors").values()} == {
        np.dtype("float32")
    }
    assert 0 < max(change(root, inputs).values()) < 1e-3  # masters are float32: updates below bfloat16's spacing count


def run_small(inputs, root, **options):
    """Three steps of eight pairs on one device, unless the options say otherwise."""
    files = {"model": str(inputs.model), "data": str(inputs.data), "output_dir": str(root)}
    recipe = {"max_length": 64, "batch_size": 8, "max_steps": 3, "learning_rate": 1e-3, "warmup_steps": 0}
    return run_dpo(DPOConfig(**{**files, **recipe, **options}), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def small(inputs, tmp_path_factory):
    root = tmp_path_factory.mktemp("small") / "run"
    run_small(inputs, root)
    return root


def assert_equal_but_for_rounding(rows, expected):
    """Of the first step all margins are 0 but for rounding, which then decides who is accurate: it is left out."""
    assert len(rows) == len(expected)
    for row, want in zip(rows, expected, strict=True):
        names = [name for name in want if want["step"] > 1 or not name.startswith("rewards/accuracies")]
        got = {name: row[name] for name in names}
        assert got == pytest.approx({name: want[name] for name in names}, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "options", [{"row_lengths": "192"}, {"microbatch_tokens": 64}], ids=lambda options: next(iter(options))
)
def test_packing_changes_nothing_but_rounding(small, inputs, tmp_path, options):
    run_small(inputs, tmp_path / "run", **options)
    assert {name: read_yaml(tmp_path / "run" / "config.yaml")[name] for name in options} == options
    assert_equal_but_for_rounding(timeless(tmp_path / "run"), timeless(small))
    got = load_file(tmp_path / "run" / "export" / "model.safetensors")
    for name, tensor in load_file(small / "export" / "model.safetensors").items():
        np.testing.assert_allclose(got[name], tensor, atol=1e-3)


def test_the_number_of_devices_changes_nothing_but_rounding(small, inputs, tmp_path, capsys):
    flags = "--batch-size 8 --max-steps 3 --learning-rate 1e-3 --warmup-steps 0"
    assert cli.main(inputs.command(tmp_path / "run", flags)) == 0
    told = "warning: 8 pairs a step do not fill the rows of data x fsdp = 8 devices, which compute empty ones; fix: a"
    assert told in " ".join(capsys.readouterr().out.split())
    assert_equal_but_for_rounding(timeless(tmp_path / "run"), timeless(small))


@pytest.mark.parametrize(
    ("mesh", "told"), [("fsdp=2,tensor=2", "data=2,fsdp=2,tensor=2"), ("context=4", "fsdp=2,context=4")]
)
def test_the_mesh_changes_nothing_but_rounding(small, inputs, tmp_path, capsys, mesh, told):
    flags = f"--batch-size 8 --max-steps 3 --learning-rate 1e-3 --warmup-steps 0 --mesh {mesh}"
    assert cli.main(inputs.command(tmp_path / "run", flags)) == 0
    assert f"on 8 device(s), {told}" in capsys.readouterr().out
    assert_equal_but_for_rounding(timeless(tmp_path / "run"), timeless(small))


@pytest.mark.parametrize(
    "mesh, message",
    [
        ("fsdp=3", "--mesh: fsdp=3 does not divide 8 devices"),
        ("rows=2", "--mesh: got 'rows=2'; allowed: auto, or sizes of data, fsdp, tensor, context"),
        ("tensor=8", "is not divisible by the 'tensor' axis of 8 devices"),
        ("context=4 --row-lengths 192", "row_lengths=[192]; allowed: multiples of 512, because devices share"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(inputs, tmp_path, capsys, mesh, message):
    assert cli.main(inputs.command(tmp_path / "run", f"--mesh {mesh}")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_program_of_a_run_is_compiled_once(inputs, tmp_path, caplog, monkeypatch):
    """Two epochs of steps with several microbatches and a last one with a single one, and with held-out data."""
    monkeypatch.setenv("JAXDPO_CACHE", str(tmp_path / "cache"))  # one that has no reference yet
    options = {"batch_size": 11, "max_steps": 6, "eval_data": str(inputs.held_out), "eval_every": 1}
    with jax.log_compiles(True):
        run_small(inputs, tmp_path / "run", microbatch_tokens=64, **options)
    compiled = [record.args[0] for record in caplog.records if record.msg.startswith("Compiling")]
    of_the_run = ["jit(accumulate)", "jit(apply)", "jit(logps)", "jit(step)"]
    assert sorted(name for name in compiled if name in of_the_run) == of_the_run


# That it stops where it must.


def test_a_reference_that_differs_from_the_policy_stops_the_run(inputs, tmp_path, monkeypatch):
    from jaxdpo.train import run

    honest = run.stored_logps

    def shifted(*args, **kwargs):
        stored = honest(*args, **kwargs)
        ramp = np.linspace(0, 0.1, len(stored.logps.values), dtype=np.float32)
        return stored._replace(logps=dataclasses.replace(stored.logps, values=stored.logps.values - ramp))

    monkeypatch.setattr(run, "stored_logps", shifted)
    with pytest.raises(
        RunStopped, match=r"the loss of the first step is \S+; a policy equal to its reference has 0.693"
    ):
        run_small(inputs, tmp_path / "run")


@pytest.fixture(scope="module")
def poisoned(inputs, tmp_path_factory):
    """A model that cannot read the letter Z; the tenth usable pair, on line 11, holds one."""
    folder = tmp_path_factory.mktemp("poisoned")
    config = dataclasses.replace(tiny.WITH_TOKENIZER, tie_embeddings=False)
    (letter,) = load_tokenizer(inputs.model)("Z")["input_ids"]

    def poison(params):
        return {**params, "tokens": params["tokens"].at[letter].set(np.nan)}

    lines = tiny.write_pairs(folder / "pairs.jsonl", range(24)).read_text().splitlines(keepends=True)
    lines[2] = json.dumps({"prompt": "Is it?", "chosen": " yes", "rejected": " yes"}) + "\n"
    lines[10] = lines[10].replace("fine", "Zen")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return inputs._replace(model=tiny.write_model(folder / "model", config, edit=poison), data=folder / "pairs.jsonl")


def test_a_loss_that_is_not_finite_stops_the_run(poisoned, tmp_path, capsys):
    root = tmp_path / "run"
    flags = "--batch-size 4 --max-steps 6 --no-shuffle --save-every 1 --row-lengths 40"  # a row for each pair
    assert cli.main(poisoned.command(root, flags)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    good = root / "checkpoints" / "2"
    assert message.startswith(
        f"jaxdpo: stopped: step 3: loss nan, gradient norm nan, not finite; "
        f"examples (0-based, as kept) [9]: {poisoned.data}, line 11; "
    )
    assert f"last good: {good}; fix: look at these examples" in message
    assert [row["step"] for row in metrics(root)] == [1, 2]
    assert cli.main(["export", "--checkpoint", str(good), "--output-dir", str(tmp_path / "export")]) == 0
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert np.isnan(exported["model.embed_tokens.weight"]).any(axis=1).sum() == 1
    assert all(np.isfinite(x).all() for name, x in exported.items() if "embed" not in name)


def test_it_stops_before_the_first_checkpoint_too(poisoned, tmp_path, capsys):
    flags = "--batch-size 4 --max-steps 6 --no-shuffle --save-every 6 --row-lengths 40"
    assert cli.main(poisoned.command(tmp_path / "run", flags)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "[9]" in message and "; no checkpoint was saved yet; fix: look" in message
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
