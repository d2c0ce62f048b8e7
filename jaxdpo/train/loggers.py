"""Where a run's metrics go: always to `metrics.jsonl`, and to TensorBoard, Weights & Biases and trackio if asked to.

Every logger gets the same names and values at the same steps. Its package is imported only where it is asked for.
"""

import importlib.util
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxdpo.disk import writing
from jaxdpo.train.run_dir import RunDir
from jaxdpo.train.writer import MetricsWriter
from jaxdpo.types import InputError, RunStopped

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
"""Logger -> the package it needs, which the extra of the logger's name installs."""
PROJECT = "jaxdpo"
"""Project of a run, unless `WANDB_PROJECT` or `TRACKIO_PROJECT` names another."""


class LoggedRun(NamedTuple):
    """The run that a logger shows."""

    root: Path
    """Its directory."""
    name: str
    id: str
    """What tells it from others of its name, also after a resume."""
    config: Mapping[str, Any]
    resume_step: int
    """The last step whose row stays; 0 for a run that starts."""


class Logger(Protocol):
    """Shows a run's metrics somewhere."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of one step."""

    def close(self) -> None:
        """Hands over what is still held back."""


class Loggers:
    """`metrics.jsonl` and the other loggers of a run, written to as one; nothing at all without `metrics`."""

    def __init__(self, metrics: MetricsWriter | None = None) -> None:
        self._metrics = metrics
        self._others: dict[str, Logger] = {}

    def add(self, name: str, run: LoggedRun) -> None:
        """Opens one of `LOGGERS` besides; InputError where it cannot start."""
        try:
            with writing(run.root):
                self._others[name] = LOGGERS[name](run)
        except RunStopped:
            raise
        except Exception as error:  # whatever another package raises
            raise InputError(
                f"--report-to {name} cannot start ({_one_line(error)}); fix: {_FIXES[name]}, or leave it out"
            ) from error

    def write(self, row: dict[str, float]) -> None:
        """Writes one row; one of its numbers is the `step`, the x axis everywhere.

        A logger that fails is dropped with one line on stderr: a network must not end a run, and `metrics.jsonl` has
        every row.

        Raises:
          RunStopped: if `metrics.jsonl` cannot be written.
        """
        if self._metrics is not None:
            self._metrics.write(row)
        step, numbers = int(row["step"]), {name: value for name, value in row.items() if name != "step"}
        self._each(lambda logger: logger.write(step, numbers))

    def close(self) -> None:
        """Closes all of them."""
        if self._metrics is not None:
            self._metrics.close()
        self._each(lambda logger: logger.close())

    def _each(self, action: Callable[[Logger], None]) -> None:
        for name, logger in list(self._others.items()):
            try:
                action(logger)
            except Exception as error:  # whatever another package raises
                del self._others[name]
                told = (
                    f"warning    {name} failed and gets no more rows ({_one_line(error)}); metrics.jsonl has them all"
                )
                print(f"\n{told}", file=sys.stderr)


def open_loggers(
    names: Sequence[str], directory: Path, *, run_name: str, config: Mapping[str, Any], resume_step: int
) -> Loggers:
    """Opens `metrics.jsonl` in a run's directory, and the loggers of these names.

    Args:
      names: of `LOGGERS`.
      directory: of the run.
      run_name: under which the loggers show it.
      config: the run's options, shown beside it.
      resume_step: the step a run goes on from; rows behind it are cut or, where a logger cannot, done again.
    Raises:
      InputError: for a package that is missing, or a logger that cannot start.
      RunStopped: if the disk is full or read-only.
    """
    check_loggers(names)
    opened = Loggers(MetricsWriter(RunDir(directory).metrics, resume_step=resume_step))
    try:
        run = LoggedRun(directory, run_name, _run_id(directory, resume_step) if names else "", config, resume_step)
        for name in names:
            opened.add(name, run)
    except BaseException:
        opened.close()
        raise
    return opened


def check_loggers(names: Sequence[str]) -> None:
    """InputError for a logger whose package is missing; imports none of them."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(
                f"--report-to {name} needs the package {PACKAGES[name]}; fix: pip install 'jaxdpo[{name}]', or leave "
                f"{name} out"
            )


class _TensorBoard:
    """Event files in `tensorboard/`, written without the thread and the queue of tensorboardX's SummaryWriter.

    That thread dies of a full disk unheard, and the run then waits for ever for room in the queue.
    """

    def __init__(self, run: LoggedRun) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = run.root / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{run.id}.{run.resume_step}")
        # Readers drop what other files hold from the step on at which a session starts.
        first = run.resume_step + 1 if run.resume_step else 0
        self._writer.write_event(
            Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START))
        )
        self._writer.flush()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases, of the same id after a resume."""

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id,
            dir=run.root,
            config=dict(run.config),
            resume="allow" if run.resume_step else None,
            # What is printed, the working tree's git state and the program's source stay here.
            settings=wandb.Settings(console="off", disable_git=True, save_code=False),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # A step that the server has cannot be written again: a resumed run does it again, with the same numbers.
        if step >= self._run.step:
            self._run.log(dict(metrics), step=step, commit=True)

    def close(self) -> None:
        self._run.finish(exit_code=0 if sys.exception() is None else 1)


class _Trackio:
    """A run of trackio, of the same name after a resume; its name ends in the id, as trackio finds runs by name."""

    def __init__(self, run: LoggedRun) -> None:
        import trackio

        self._finish = trackio.finish
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.name}-{run.id}",
            config=dict(run.config),
            resume="allow" if run.resume_step else "never",
            embed=False,
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._finish()  # of the module: it forgets the run, which would be finished again at exit


LOGGERS: dict[str, Callable[[LoggedRun], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}
"""What `--report-to` takes, and how it is opened."""


def _run_id(directory: Path, resume_step: int) -> str:
    """The id kept in the run's directory; another one for a run that starts."""
    path = directory / "run_id"
    if resume_step and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(4)
    with writing(path):
        path.write_text(made + "\n", encoding="utf-8")
    return made


def _one_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


_FIXES = {
    "tensorboard": "check the directory tensorboard/ in --output-dir",
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "trackio": "check TRACKIO_SPACE_ID, TRACKIO_SERVER_URL and TRACKIO_DIR",
}
