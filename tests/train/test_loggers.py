"""Every logger shows the same names and values at the same steps; one that fails does not end a run."""

import contextlib
import importlib
import importlib.util
import json
import sqlite3
import struct

import pytest

from jaxdpo.train import loggers
from jaxdpo.train.loggers import LOGGERS, PACKAGES, open_loggers
from jaxdpo.train.writer import read_metrics
from jaxdpo.types import InputError

CONFIG = {"beta": 0.1, "eval_data": None, "loss": "sigmoid"}


def row(step):
    return {"step": step, "loss": 0.5 / (step + 1), "rewards/margins": 0.25 * step, "eval_rewards/accuracies": 1.0}


def log(names, directory, steps, *, resume_step=0):
    with contextlib.closing(
        open_loggers(names, directory, run_name="tiny", config=CONFIG, resume_step=resume_step)
    ) as opened:
        for step in steps:
            opened.write(row(step))


def shown(step):
    return {name: value for name, value in row(step).items() if name != "step"}


def test_every_logger_has_its_package():
    assert list(LOGGERS) == list(PACKAGES)


def test_without_names_there_is_metrics_jsonl_alone(tmp_path):
    log((), tmp_path, (0, 1, 2))
    log((), tmp_path, (2, 3), resume_step=1)
    assert read_metrics(tmp_path / "metrics.jsonl") == [row(step) for step in (0, 1, 2, 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(
        InputError, match=rf"--report-to {name} needs the package {PACKAGES[name]}; fix: pip install 'jaxdpo\[{name}\]'"
    ):
        open_loggers([name], tmp_path, run_name="tiny", config={}, resume_step=0)
    assert list(tmp_path.iterdir()) == []


class Broken:
    """A logger whose network goes away at the second row."""

    def __init__(self, run):
        self.rows, self.closed = [], False

    def write(self, step, metrics):
        self.rows.append(step)
        if len(self.rows) == 2:
            raise ConnectionError("no route to host\nand more")

    def close(self):
        self.closed = True


class Sound(Broken):
    def write(self, step, metrics):
        self.rows.append((step, metrics))


@pytest.fixture
def fakes(monkeypatch):
    """Loggers that stand for real ones, by name."""
    made = {}

    def opening(name, kind):
        def open_it(run):
            made[name] = kind(run)
            return made[name]

        return open_it

    monkeypatch.setattr(loggers, "PACKAGES", {"wandb": "json", "trackio": "json"})
    monkeypatch.setitem(LOGGERS, "wandb", opening("wandb", Broken))
    monkeypatch.setitem(LOGGERS, "trackio", opening("trackio", Sound))
    return made


def test_a_logger_that_fails_is_dropped_with_one_line(tmp_path, fakes, capsys):
    log(("wandb", "trackio"), tmp_path, (1, 2, 3, 4))
    assert capsys.readouterr().err == (
        "\nwarning    wandb failed and gets no more rows (ConnectionError: no route to host); "
        "metrics.jsonl has them all\n"
    )
    assert fakes["wandb"].rows == [1, 2] and not fakes["wandb"].closed
    assert fakes["trackio"].rows == [(step, shown(step)) for step in (1, 2, 3, 4)] and fakes["trackio"].closed
    assert read_metrics(tmp_path / "metrics.jsonl") == [row(step) for step in (1, 2, 3, 4)]


def test_a_logger_that_cannot_start_says_what_to_do(tmp_path, fakes, monkeypatch):
    def refuse(run):
        raise RuntimeError("No API key configured.\nmore")

    monkeypatch.setitem(LOGGERS, "wandb", refuse)
    with pytest.raises(InputError) as error:
        log(("trackio", "wandb"), tmp_path, ())
    assert str(error.value) == (
        "--report-to wandb cannot start (RuntimeError: No API key configured.); fix: log in with `wandb login`, or set "
        "WANDB_MODE=offline, or leave it out"
    )
    assert fakes["trackio"].closed


def test_the_id_of_a_run_is_kept_by_a_resume_and_new_for_another_start(tmp_path, fakes, monkeypatch):
    ids = []
    monkeypatch.setitem(LOGGERS, "trackio", lambda run: ids.append(run.id) or Sound(run))
    for resume_step in (0, 3, 5, 0):
        log(("trackio",), tmp_path, (), resume_step=resume_step)
    assert ids[0] == ids[1] == ids[2] != ids[3]


def events(directory):
    """The events of TensorBoard files, oldest first: length, its checksum, the event, its checksum."""
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    for path in sorted((directory / "tensorboard").iterdir(), key=lambda path: int(path.name.rsplit(".", 1)[1])):
        data = path.read_bytes()
        while data:
            length = struct.unpack("<Q", data[:8])[0]
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard(tmp_path):
    """A reader drops what is behind the step at which a later session starts."""
    pytest.importorskip("tensorboardX")
    log(("tensorboard",), tmp_path, (0, 1, 2, 3))
    log(("tensorboard",), tmp_path, (3, 4), resume_step=2)
    starts, rows = [], []
    for event in events(tmp_path):
        if event.HasField("session_log"):
            starts.append(event.step)
        if event.HasField("summary"):
            rows.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
        assert event.wall_time > 1e9
    assert starts == [0, 3]
    assert [step for step, _ in rows] == [0, 1, 2, 3, 3, 4]
    assert all(values == pytest.approx(shown(step)) for step, values in rows)


def test_wandb(tmp_path, monkeypatch, capfd):
    """Offline; each start writes a directory of its own, of the same run."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    seen = []
    for resume_step, steps in ((0, (0, 1, 2)), (1, (2, 3))):
        opened = open_loggers(("wandb",), tmp_path, run_name="tiny", config=CONFIG, resume_step=resume_step)
        run = wandb.run
        for step in steps:
            opened.write(row(step))
        summary = {name: run.summary[name] for name in shown(0)}
        seen.append((run.id, run.name, run.project, dict(run.config), run.step - 1, summary))
        opened.close()
    run_id = (tmp_path / "run_id").read_text().strip()
    assert seen == [(run_id, "tiny", "jaxdpo", CONFIG, last, shown(last)) for last in (2, 3)]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))) >= 1
    assert "failed" not in capfd.readouterr().err


def test_trackio(tmp_path, monkeypatch, capfd):
    """One run after a resume; the row of a step that is done again comes twice, with the same numbers."""
    pytest.importorskip("trackio")
    folder = tmp_path / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", folder)  # read from the environment when it was imported
    log(("trackio",), tmp_path, (0, 1, 2))
    log(("trackio",), tmp_path, (2, 3), resume_step=1)
    with contextlib.closing(sqlite3.connect(folder / "jaxdpo.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    name = f"tiny-{(tmp_path / 'run_id').read_text().strip()}"
    assert [(run, step, json.loads(metrics)) for run, step, metrics in rows] == [
        (name, step, shown(step)) for step in (0, 1, 2, 2, 3)
    ]
    assert "failed" not in capfd.readouterr().err
