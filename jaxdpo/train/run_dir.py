"""The directory of a run: what lies where, whose run it is, and whether this one may continue it.

config.yaml     the resolved configuration; the same command with `--config` on it reproduces the run
metrics.jsonl   one object per optimizer step
tensorboard/    the same for TensorBoard, if asked for; run_id names the run to other loggers
curves.png      the same as a picture
profile/        a trace of some steps by jax's profiler, if asked for
checkpoints/    Orbax
model/          the model's Hugging Face configuration and tokenizer, without weights
export/         the trained model in Hugging Face format
"""

import dataclasses
import io
import os
from pathlib import Path
from typing import Any, TypeVar

import ruamel.yaml

from jaxdpo.config import RunConfig
from jaxdpo.config.processes import PROCESS_OPTIONS
from jaxdpo.disk import writing
from jaxdpo.options import flag, from_mapping
from jaxdpo.train.writer import read_metrics
from jaxdpo.types import InputError

MAY_DIFFER = frozenset(
    {
        "output_dir",
        "resume",
        "epochs",
        "max_steps",
        "save_every",
        "eval_every",
        "report_to",
        "profile",
        "run_name",
        "remat",
        "mesh",
        "precompute_ref_log_probs",
        *PROCESS_OPTIONS,
    }
)
"""Options that a resumed run may change: they do not change any step that both runs take."""

CHOSEN = ("dtype", "attention", "remat", "row_lengths", "microbatch_tokens")
"""Options that a run chooses where they are left open; continued, it keeps its choice."""

_YAML = "allowed: options by name, one a line, with spaces and no tabs, e.g. `beta: 0.1`"

Config = TypeVar("Config", bound=RunConfig)

_PATHS = ("model", "data", "eval_data")


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    root: Path

    def create(self) -> None:
        """Makes the directory; InputError where that is not possible."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output-dir {self.root} cannot be made ({error.strerror}); name another") from error

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per optimizer step."""
        return self.root / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """The metrics as a picture."""
        return self.root / "curves.png"

    @property
    def profile(self) -> Path:
        """Traces of jax's profiler."""
        return self.root / "profile"

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints, one directory per step."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """Hugging Face configuration and tokenizer of the model, without weights."""
        return self.root / "model"

    @property
    def export(self) -> Path:
        """The trained model in Hugging Face format."""
        return self.root / "export"


def read_yaml(path: Path) -> dict:
    """A YAML 1.2 mapping (`1e-6` is a float, `no` is a text); InputError with the line otherwise."""
    if not os.path.isfile(path):  # unlike pathlib's, it takes every text for a path
        raise InputError(f"{path} does not exist; allowed: a YAML file of options; fix: check the path")
    try:
        mapping = ruamel.yaml.YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except ruamel.yaml.error.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else path
        raise InputError(f"{where}: not YAML ({error.problem}); {_YAML}; correct the line") from error
    except (ruamel.yaml.error.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())}); {_YAML}; write it again") from error
    if not isinstance(mapping, dict):
        raise InputError(f"{path} holds no options; {_YAML}")
    return mapping


def stated(config: Any) -> dict[str, Any]:
    """What a configuration says of a run or a command, by option: the same on every process."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in PROCESS_OPTIONS}


def write_config(run: RunDir, config: RunConfig) -> None:
    """Writes the resolved configuration, which reproduces the run elsewhere: with `resume: auto`, whatever it was."""
    text = io.StringIO()
    yaml = ruamel.yaml.YAML()
    yaml.dump({**stated(config), "resume": "auto"}, text)
    run.create()
    temporary = run.config.with_suffix(".tmp")
    with writing(run.config):
        temporary.write_text(text.getvalue(), encoding="utf-8")
        os.replace(temporary, run.config)


def claim(config: Config) -> Config:
    """Makes `output_dir` this run's: new, or checked to hold the same run.

    Returns:
      The configuration; where it leaves a choice open that the run in the directory has made, with that choice.
    Raises:
      InputError: if the directory holds another run, if `resume` is "never" and it holds one, or "must" and it holds
        none.
    """
    run = RunDir(Path(config.output_dir))
    if os.path.lexists(run.root) and not run.root.is_dir():
        kind = "file" if run.root.exists() else "broken link"
        raise InputError(f"--output-dir {run.root} is a {kind}; allowed: a directory, new or this run's own")
    if _same_place(config.output_dir, config.model):
        raise InputError(
            f"--output-dir {run.root} is the model's directory; allowed: one of the run's own; name another"
        )
    if not run.config.exists():
        # An empty directory of checkpoints is all that a run leaves which was killed as it started.
        filled = (run.metrics, run.curves, run.export, run.model, *run.checkpoints.glob("*"))
        present = [path.relative_to(run.root).parts[0] for path in filled if path.exists()]
        if present:
            raise InputError(
                f"--output-dir {run.root} holds {', '.join(present)} but no config.yaml, so it is another program's; "
                "fix: give another directory"
            )
    above = next(path for path in (run.root.absolute(), *run.root.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"--output-dir {run.root} cannot be made in {above}; allowed: a writable directory")
    if not _has_begun(run):
        if config.resume == "must":
            raise InputError(f"--resume must: {run.root} holds no run; fix: check --output-dir, or use --resume auto")
        return config
    if config.resume == "never":
        raise InputError(f"--resume never: {run.root} holds a run; fix: give another --output-dir, or remove it")
    if not _saved(run):
        if config.resume == "must" or run.export.exists():
            raise InputError(
                f"--output-dir {run.root} holds a run without its checkpoints, which cannot be continued; "
                "fix: bring them back, or give another directory"
            )
        print(f"resume     {run.root} holds no checkpoint yet: starting again")
    return _continued(config, stored_config(run, type(config)), run)


def stored_config(run: RunDir, kind: type[Config]) -> Config:
    """The resolved configuration of the run in a directory; InputError if it was trained by another command."""
    stored = read_yaml(run.config)
    foreign = set(stored) - {field.name for field in dataclasses.fields(kind)}
    if foreign and foreign <= {
        field.name for other in RunConfig.__subclasses__() for field in dataclasses.fields(other)
    }:
        raise InputError(
            f"--output-dir {run.root} holds a run of another command, with options such as {flag(min(foreign))}; "
            "fix: give another --output-dir"
        )
    return kind(**from_mapping(kind, stored, str(run.config)))


def _has_begun(run: RunDir) -> bool:
    """Whether there is anything to continue: a checkpoint, or a row of a training step.

    A run that died before its first step, of too large a microbatch perhaps, may be started anew with other options.
    """
    rows = read_metrics(run.metrics) if run.metrics.exists() else []
    return run.config.exists() and (_saved(run) or any(row["step"] > 0 for row in rows))


def _saved(run: RunDir) -> bool:
    return any(path.name.isdigit() for path in run.checkpoints.glob("*"))


def _same_place(asked: str | None, had: str | None) -> bool:
    return (
        asked is not None and had is not None and Path(asked).exists() and Path(asked).resolve() == Path(had).resolve()
    )


def _continued(config: Config, stored: Config, run: RunDir) -> Config:
    differing = []
    adopted = {}
    for field in dataclasses.fields(config):
        name, asked, had = field.name, getattr(config, field.name), getattr(stored, field.name)
        if name in MAY_DIFFER or asked == had or (name in _PATHS and _same_place(asked, had)):
            continue
        if asked is None and had is not None and name in CHOSEN:
            adopted[name] = had
        else:
            differing.append(f"{flag(name)} is {asked!r} here and {had!r} there")
    if differing:
        raise InputError(
            f"--output-dir {run.root} holds another run: {'; '.join(differing)}; "
            "fix: give another --output-dir, or the options that run was started with"
        )
    return dataclasses.replace(config, **adopted)
