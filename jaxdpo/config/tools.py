"""Commands beside training."""

import dataclasses

from jaxdpo.config.names import Attention, DType, Format, Remat
from jaxdpo.config.processes import check_processes
from jaxdpo.config.ranges import PATHS, RANGES
from jaxdpo.options import check_fields, option
from jaxdpo.types import InputError


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """A checkpoint as a Hugging Face directory: `jaxdpo export`."""

    checkpoint: str = option("DIR/checkpoints of a run (its latest), or DIR/checkpoints/STEP", "run")
    output_dir: str = option("the Hugging Face directory to write; must be new or empty", "run")
    dtype: DType = option("of the written weights; float32 is exact", "run", "float32")

    def __post_init__(self) -> None:
        check_fields(self, RANGES, PATHS)


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """DPO on a small pretrained model and an embedded preference set: `jaxdpo quickstart`."""

    output_dir: str = option("where everything of this run goes", "run", "runs/quickstart")
    model: str | None = option(
        "as in jaxdpo dpo; by default SmolLM2-135M-Instruct, from the hub or from its PyPI wheel", "run", None
    )
    max_steps: int | None = option("stop early, for a quick look; by default the recipe's", "run", None)
    seed: int = option("decides the order of the data", "run", 0)

    def __post_init__(self) -> None:
        check_fields(self, RANGES, PATHS)


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Rewards of completions under a reward model: `jaxdpo score`."""

    model: str = option("a reward model: the export of `jaxdpo reward`, or another sequence classifier", "data")
    data: str = option("records, as in jaxdpo reward; labels and ranks may be missing", "data")
    output: str = option("the JSON lines to write: each record with its rewards", "run")
    format: Format = option("what a record looks like; auto decides by the first record", "data", "auto")
    max_length: int = option("tokens of one path: the prompt plus one completion", "data", 512)
    dtype: DType | None = option("compute dtype; by default bfloat16 on accelerators, float32 on CPU", "compute", None)
    microbatch_tokens: int | None = option(
        "most tokens of one forward pass per device; by default 2048 on CPU, 16384 elsewhere", "compute", None
    )
    mesh: str = option("how devices share rows and parameters, as in jaxdpo dpo", "compute", "auto")
    coordinator: str | None = option("HOST:PORT of process 0, as in jaxdpo dpo", "processes", None)
    num_processes: int | None = option("how many processes there are", "processes", None)
    process_id: int | None = option("which of them this is, from 0", "processes", None)

    def __post_init__(self) -> None:
        check_fields(self, RANGES, PATHS)
        check_processes(self)


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """What a data set holds, and what is wrong with it, before anything is trained on it: `jaxdpo audit`."""

    data: str = option("records, as in jaxdpo dpo", "data")
    model: str | None = option(
        "whose tokenizer and chat template to audit with; by default lengths are words", "data", None
    )
    eval_data: str | None = option("held-out records, to look for those that are in both", "data", None)
    format: Format = option("what a record looks like; auto decides by the first record", "data", "auto")
    max_length: int | None = option(
        "tokens of one path, to see what is truncated; by default 512, as in jaxdpo dpo; needs --model", "data", None
    )
    json: str | None = option("file to write everything to as JSON, with every record named", "report", None)
    plot: str | None = option("picture of the lengths to write, a PNG", "report", None)
    strict: bool = option("exit with 1 if there are warnings but no errors", "report", False)

    def __post_init__(self) -> None:
        check_fields(self, RANGES, PATHS)
        if self.max_length is not None and self.model is None:
            raise InputError(
                f"--max-length {self.max_length} without --model; allowed: both, or neither: words are never cut; "
                "name the model whose tokens are meant"
            )


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Any data as a TensorFlow Datasets directory of array_record files, without TensorFlow: `jaxdpo convert`."""

    data: str = option("records, as in jaxdpo dpo; they become the split train", "data")
    output_dir: str = option("where the data set goes, below its name", "run")
    eval_data: str | None = option("held-out records; they become the split test", "data", None)
    name: str = option("of the data set", "data", "preferences")
    version: str = option("of the data set", "data", "1.0.0")

    def __post_init__(self) -> None:
        check_fields(self, RANGES, PATHS)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What a DPO step needs and takes on devices that need not be there: `jaxdpo plan`."""

    model: str = option(
        "a known shape (smollm2-135m, llama-3.1-8b, llama-3.1-70b, …), or HF directory or hub id, of which only "
        "config.json is read",
        "data",
    )
    topology: str = option("a TPU slice such as v5e:4x4 or v5p:2x2x2; local plans for this machine", "compute", "local")
    slices: int = option("TPU slices of that topology, connected by a network", "compute", 1)
    mesh: str = option(
        "as in jaxdpo dpo; auto looks for the one that takes the least time of those that fit", "compute", "auto"
    )
    length: int = option("tokens of a packed row", "compute", 2048)
    batch_size: int = option("pairs per optimizer step", "data", 64)
    prompt_tokens: int = option("tokens of every prompt: what is planned for has no data", "data", 164)
    completion_tokens: int = option("tokens of every completion", "data", 68)
    microbatch_tokens: int | None = option(
        "most tokens of one forward pass per device; by default 2048 on CPU, 16384 elsewhere", "compute", None
    )
    dtype: DType | None = option("compute dtype; by default bfloat16 on accelerators, float32 on CPU", "compute", None)
    attention: Attention | None = option("as in jaxdpo dpo", "compute", None)
    remat: Remat | None = option("as in jaxdpo dpo; by default the fastest that fits", "compute", None)
    quick: bool = option(
        "compile for TPUs with the least effort, in a quarter of the time: says about the same of memory and FLOPs, "
        "and nothing of memory traffic",
        "compute",
        False,
    )
    json: bool = option("print the plan as JSON", "report", False)

    def __post_init__(self) -> None:
        check_fields(self, RANGES, PATHS)
        if self.topology == "local" and (self.slices != 1 or self.quick):
            given = "--quick" if self.quick else f"--slices {self.slices}"
            raise InputError(f"{given} has no effect on local devices; name a TPU's --topology, or drop the flag")
