"""`jaxdpo quickstart` on a tiny model: what it prints and leaves, and where its model comes from."""

import dataclasses

import pytest

from jaxdpo import cli
from jaxdpo.hub import HubUnreachable
from jaxdpo.train import quickstart
from jaxdpo.train.quickstart import HELD_OUT, HUB_ID, RECIPE, WHEEL
from jaxdpo.train.run_dir import read_yaml
from jaxdpo.types import InputError
from tests import tiny

LONGER = dataclasses.replace(tiny.WITH_TOKENIZER, max_positions=RECIPE["max_length"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("quickstart") / "model", LONGER)


def test_it_says_what_it_did_and_what_to_try_next(model, tmp_path, capsys):
    root = tmp_path / "run"
    assert cli.main(["quickstart", "--model", str(model), "--max-steps", "2", "--output-dir", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "recipe     batch_size 8, learning_rate 5e-06, warmup_steps 5, beta 0.1, max_length 128, max_steps 2" in lines
    )
    assert f"held out   {HELD_OUT} examples, before -> after" in lines
    command = next(line for line in lines if line.startswith("try next   ")).split()[3:]
    verb, config = cli.parse(command)
    assert (verb, config.beta, config.output_dir) == ("dpo", 0.3, f"{root}-beta-0.3")
    assert {name: read_yaml(root / "config.yaml")[name] for name in RECIPE} == {**RECIPE, "epochs": None}
    assert {path.name for path in (root / "data").iterdir()} == {"train.jsonl", "heldout.jsonl"}
    for name in ("curves.png", "checkpoints/2", "export/model.safetensors"):
        assert (root / name).exists()


class Stop(Exception):
    """Ends a test where training would begin."""


@pytest.fixture
def asked(monkeypatch):
    """The configurations that would be run."""
    configs = []

    def run(config):
        configs.append(config)
        raise Stop

    monkeypatch.setattr(quickstart, "run_dpo", run)
    return configs


def start(*flags):
    with pytest.raises(Stop):
        cli.main(["quickstart", *flags])


def reachable(monkeypatch, answer):
    def resolve(name):
        if not answer:
            raise HubUnreachable("no answer")
        return name

    monkeypatch.setattr(quickstart, "resolve_model", resolve)


@pytest.mark.parametrize("answer, model", [(True, HUB_ID), (False, WHEEL)])
def test_the_model_comes_from_the_hub_or_from_the_wheel(asked, monkeypatch, tmp_path, capsys, answer, model):
    reachable(monkeypatch, answer)
    start("--output-dir", str(tmp_path / "run"))
    assert asked[0].model == model
    assert (WHEEL in capsys.readouterr().out) == (not answer)


def test_a_run_that_has_begun_keeps_its_model(asked, monkeypatch, tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    (root / "config.yaml").write_text(f"model: {WHEEL}\ndata: d\noutput_dir: {root}\n")
    reachable(monkeypatch, True)
    start("--output-dir", str(root))
    assert asked[0].model == WHEEL


def test_seed_and_length_are_passed_on(asked, tmp_path):
    start("--model", "m", "--seed", "7", "--output-dir", str(tmp_path / "run"))
    start("--model", "m", "--max-steps", "3", "--output-dir", str(tmp_path / "run"))
    assert [(config.seed, config.epochs, config.max_steps) for config in asked] == [(7, 1, None), (0, None, 3)]


def test_data_that_is_not_its_own_stays_untouched(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "heldout.jsonl").write_text("mine")
    with pytest.raises(InputError, match=r"heldout\.jsonl holds other data than the embedded pairs; fix: "):
        quickstart.run_quickstart(quickstart.QuickstartConfig(model="m", output_dir=str(tmp_path)))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["heldout.jsonl"]
    assert (tmp_path / "data" / "heldout.jsonl").read_text() == "mine"


def test_a_directory_that_is_not_its_own_stays_untouched(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file is a file; allowed: a directory, new or this run's own"):
        quickstart.run_quickstart(quickstart.QuickstartConfig(model="m", output_dir=str(tmp_path / "file")))
    (tmp_path / "other" / "export").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds export but no config.yaml"):
        quickstart.run_quickstart(quickstart.QuickstartConfig(model="m", output_dir=str(tmp_path / "other")))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["export"]
