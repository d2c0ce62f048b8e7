"""Direct Preference Optimization for JAX: `jaxdpo <verb> --help` lists a verb's options.

The options are those of `jaxdpo.config`, as flags and as YAML keys. No jax is imported before a verb runs.
"""

import dataclasses
import importlib
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxdpo.config import (
    AuditConfig,
    ConvertConfig,
    DPOConfig,
    ExportConfig,
    GenerateConfig,
    PlanConfig,
    QuickstartConfig,
    RewardConfig,
    RunConfig,
    ScoreConfig,
    SFTConfig,
)
from jaxdpo.hub import cache_root
from jaxdpo.options import check_words, config_path, from_mapping
from jaxdpo.train.interrupt import Terminated, terminable
from jaxdpo.types import InputError, RunInterrupted, RunStopped


def _dpo(config: DPOConfig) -> None:
    from jaxdpo.train.dpo import run_dpo

    _report(config, run_dpo(config))


def _sft(config: SFTConfig) -> None:
    from jaxdpo.train.sft import run_sft

    _report(config, run_sft(config))


def _reward(config: RewardConfig) -> None:
    from jaxdpo.train.reward import run_reward

    _report(config, run_reward(config))


def _report(config: RunConfig, result: Any) -> None:
    from jaxdpo.train.report import print_report

    print_report(result, config)


def _quickstart(config: QuickstartConfig) -> None:
    from jaxdpo.train.quickstart import run_quickstart

    run_quickstart(config)


def _late(module: str, name: str) -> typing.Callable[[Any], int | None]:
    """A function that is imported when it is called."""
    return lambda config: getattr(importlib.import_module(module), name)(config)


VERBS: dict[str, tuple[type, typing.Callable[[Any], int | None]]] = {
    "quickstart": (QuickstartConfig, _quickstart),
    "audit": (AuditConfig, _late("jaxdpo.audit", "run_audit")),
    "sft": (SFTConfig, _sft),
    "dpo": (DPOConfig, _dpo),
    "reward": (RewardConfig, _reward),
    "score": (ScoreConfig, _late("jaxdpo.train.score", "score")),
    "generate": (GenerateConfig, _late("jaxdpo.generate.run", "run_generate")),
    "plan": (PlanConfig, _late("jaxdpo.plan.command", "run_plan")),
    "convert": (ConvertConfig, _late("jaxdpo.data.convert", "convert")),
    "export": (ExportConfig, _late("jaxdpo.train.export", "export_checkpoint")),
}
"""Verb -> its configuration and what it does, which may return an exit status. The first line of the configuration's
docstring is its help."""

CONFIG_VERBS = ("sft", "dpo", "reward")
"""Verbs that take `--config FILE.yaml`."""

INTERRUPTED = (130, 143)
"""Exit statuses after Ctrl-C and SIGTERM."""

COMPILED_BYTES = 8 * 2**30
"""How much the compiled programs that are kept may take; those that were not used for the longest time go first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    It is 0, 1 for a run that had to stop, 2 for bad input, and 130 or 143 after Ctrl-C or SIGTERM.

    Raises:
      SystemExit: after `--help`, or for flags that do not parse.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        verb, config = parse(argv)
        with terminable():
            status = VERBS[verb][1](config)
    except InputError as error:
        print(f"jaxdpo: error: {error}", file=sys.stderr)
        return 2
    except RunInterrupted as error:
        if _speaks():
            print(f"jaxdpo: interrupted: {error}", file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt as error:
        name, number = ("SIGTERM", 15) if isinstance(error, Terminated) else ("Ctrl-C", 2)
        print(f"\njaxdpo: interrupted: {name}; what was saved before is whole", file=sys.stderr)
        return 128 + number
    except (FloatingPointError, RunStopped) as error:
        print(f"jaxdpo: stopped: {error}", file=sys.stderr)
        return 1
    return status or 0


def console() -> None:
    """The command `jaxdpo`: `main`, as a process.

    What XLA compiles is kept on disk, unless jax was told where. After an interruption the process ends without the
    interpreter's clean-up, which crashes where the signal came while XLA was compiling (jax 0.10.2); so does one of
    several processes that fails alone, as jax would wait for the others.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_root() / "programs")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(COMPILED_BYTES))
    status = main()
    alone = bool(status) and "jaxdpo.processes" in sys.modules and not sys.modules["jaxdpo.processes"].ended()
    if alone or status in INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _speaks() -> bool:
    """Whether this is the process that prints for all; asked when a command has run."""
    return "jaxdpo.processes" not in sys.modules or sys.modules["jaxdpo.processes"].is_main()


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """The verb and its validated configuration; the command line wins over `--config`'s file.

    Raises:
      InputError: for a value out of range, or a YAML file with an unknown key.
      SystemExit: after `--help` (0), or for flags that do not parse (2).
    """
    verb = argv[0] if argv and argv[0] in VERBS else None
    from_file: dict[str, Any] = {}
    if verb is None and argv and not argv[0].startswith("-"):
        raise InputError(
            f"unknown command {argv[0]!r}; allowed: jaxdpo {', '.join(VERBS)}; jaxdpo --help says what for"
        )
    path = config_path(argv)
    if verb is not None and not {"-h", "--help"} & set(argv):
        check_words(VERBS[verb][0], argv[1:], f"jaxdpo {verb}", others=["--config"] if verb in CONFIG_VERBS else [])
    if path is not None and verb in CONFIG_VERBS:
        from jaxdpo.train.run_dir import read_yaml

        from_file = from_mapping(VERBS[verb][0], read_yaml(Path(path)), path)
    if verb is None:
        verbs = tuple(
            Annotated[_flags(name, config, {}), tyro.conf.subcommand(name, description=config.__doc__)]
            for name, (config, _) in VERBS.items()
        )
        tyro.cli(typing.Union[verbs], prog="jaxdpo", description=__doc__.split("\n")[0], args=argv)  # type: ignore # noqa: UP007
        raise AssertionError("tyro.cli exits when it is given no verb")
    parsed: Any = tyro.cli(
        _flags(verb, VERBS[verb][0], from_file),
        prog=f"jaxdpo {verb}",
        description=VERBS[verb][0].__doc__,
        args=argv[1:],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    values = {
        field.name: getattr(group, field.name)
        for group in (getattr(parsed, g.name) for g in dataclasses.fields(parsed))
        for field in dataclasses.fields(group)
        if field.name != "config"
    }
    return verb, VERBS[verb][0](**_settle_length(values, from_file))


def _settle_length(values: dict[str, Any], from_file: Mapping[str, Any]) -> dict[str, Any]:
    """`--max-steps` on the command line replaces the file's `epochs`, and the reverse."""
    for given, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        stated = from_file.get(other) is not None and values[other] == from_file[other]
        if stated and values[given] not in (None, from_file.get(given)):
            return {**values, other: None}
    return values


def _flags(verb: str, config: type, defaults: Mapping[str, Any]) -> type:
    """A dataclass of one nested dataclass per option group, as tyro shows them; the fields of `config`, unchecked."""
    hints = typing.get_type_hints(config)
    groups: dict[str, list] = {}
    for field in dataclasses.fields(config):
        unset = field.default is None  # the help says in words what happens then
        alias = field.metadata.get("alias")
        arg = tyro.conf.arg(
            help=field.metadata["help"],
            metavar=_metavar(hints[field.name]),
            help_behavior_hint="" if unset else None,
            aliases=[alias] if alias else None,
        )
        hint = Annotated[hints[field.name], arg]  # type: ignore[valid-type,name-defined]
        default = defaults.get(field.name, field.default)
        entry = (field.name, hint) if default is dataclasses.MISSING else (field.name, hint, default)
        groups.setdefault(field.metadata["group"], []).append(entry)
    if verb in CONFIG_VERBS:
        help_text = "YAML file of options by name (--max-steps is max_steps); flags win over it"
        arg = tyro.conf.arg(help=help_text, metavar="FILE", help_behavior_hint="")
        groups["run"].append(("config", Annotated[Path | None, arg], None))
    nested = []
    for name, entries in groups.items():
        group = dataclasses.make_dataclass(name, sorted(entries, key=len))
        # Without a help text tyro parses source files in search of one: slow, and not thread-safe in Python 3.11.
        nested.append((name, Annotated[group, tyro.conf.arg(help="")], dataclasses.field()))
    return dataclasses.make_dataclass(verb, nested)


def _metavar(hint: Any) -> str | None:
    """`INT` for `int | None`: that the option may be left out goes without saying."""
    if types.NoneType not in typing.get_args(hint):
        return None
    arm = typing.get_args(hint)[0]
    choices = typing.get_args(arm)
    return "{" + ",".join(choices) + "}" if choices else arm.__name__.upper()


if __name__ == "__main__":
    console()
