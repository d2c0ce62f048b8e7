"""Options are valid once they exist: every range is refused by name, and mappings are read strictly."""

import dataclasses
import doctest
import math
import re
import typing

import pytest

from jaxdpo import options
from jaxdpo.config import (
    AuditConfig,
    ConvertConfig,
    Divergence,
    DPOConfig,
    ExportConfig,
    Format,
    GenerateConfig,
    PlanConfig,
    PPOOptions,
    QuickstartConfig,
    RewardConfig,
    ScoreConfig,
    SFTConfig,
)
from jaxdpo.config.processes import PROCESS_OPTIONS
from jaxdpo.config.ranges import RANGES
from jaxdpo.options import flag, from_mapping
from jaxdpo.types import InputError

NEEDED = {"model": "m", "data": "d.jsonl", "output_dir": "run"}
CONFIGS = {
    DPOConfig: NEEDED,
    SFTConfig: NEEDED,
    RewardConfig: NEEDED,
    AuditConfig: {"data": "d.jsonl"},
    ConvertConfig: {"data": "d.jsonl", "output_dir": "out"},
    GenerateConfig: {"model": "m", "prompts": "p.jsonl", "output": "out.jsonl"},
    ScoreConfig: {"model": "m", "data": "d.jsonl", "output": "scores.jsonl"},
    ExportConfig: {"checkpoint": "run/checkpoints", "output_dir": "out"},
    PlanConfig: {"model": "m", "topology": "v5e:2x2"},
    QuickstartConfig: {},
    PPOOptions: {},
}
every_config = pytest.mark.parametrize("config", CONFIGS)

LIMITS = {  # option -> (values on the edge that are allowed, values just past it that are not)
    "model": (["m"], [""]),
    "data": (["d"], [""]),
    "eval_data": (["d"], [""]),
    "output_dir": (["o"], [""]),
    "output": (["o"], [""]),
    "json": (["o"], [""]),
    "plot": (["o"], [""]),
    "prompts": (["p"], [""]),
    "num_samples": ([1], [0, -1]),
    "max_new_tokens": ([1], [0]),
    "temperature": ([0.0, 1e-3, 9.0], [-0.1, math.inf, math.nan]),
    "top_k": ([1], [0, -1]),
    "top_p": ([1e-9, 0.999], [0.0, 1.0, -0.1, math.nan]),
    "min_p": ([1e-9, 1.0], [0.0, 1.1, math.nan]),
    "batch_size": ([1], [0, -1]),
    "epochs": ([1], [0]),
    "max_steps": ([1], [0]),
    "save_every": ([1], [0]),
    "eval_every": ([1], [0]),
    "microbatch_tokens": ([1], [0]),
    "slices": ([1], [0, -1]),
    "length": ([2], [1, 0]),
    "prompt_tokens": ([1], [0]),
    "completion_tokens": ([1], [0]),
    "max_length": ([2], [1, 0, -512]),
    "warmup_steps": ([0], [-1]),
    "seed": ([0, 2**32 - 1], [-1, 2**32]),
    "beta": ([1e-9, 1e9], [0.0, -0.1, math.inf, math.nan]),
    "label_smoothing": ([0.0, 0.499], [-0.1, 0.5, 1.0, math.nan]),
    "f_alpha_divergence_coef": ([-1.0, 2.0], [math.inf, math.nan]),
    "ld_alpha": ([0.0, 1.0], [-0.1, 1.1, math.nan]),
    "discopop_tau": ([1e-6], [0.0, -1.0, math.inf]),
    "simpo_gamma": ([-1.0, 0.0, 2.0], [math.inf, math.nan]),
    "alphapo_alpha": ([-1.0, 0.0, 2.0], [math.inf, math.nan]),
    "cpo_alpha": ([0.0, 2.0], [-0.1, math.inf]),
    "unlikelihood_alpha": ([0.0, 1.0], [-0.1, 1.1]),
    "desirable_weight": ([0.0, 2.0], [-0.1, math.inf]),
    "undesirable_weight": ([0.0, 2.0], [-0.1, math.inf]),
    "ref_model_sync_steps": ([1], [0, -1]),
    "ref_model_mixup_alpha": ([1e-3, 1.0], [0.0, 1.1, math.nan]),
    "center_rewards_coefficient": ([0.0, 0.01], [-0.01, math.inf, math.nan]),
    "kl_coef": ([0.0, 1e3], [-0.1, math.inf, math.nan]),
    "kl_target": ([1e-9], [0.0, -1.0, math.inf, math.nan]),
    "kl_horizon": ([1], [0, -1]),
    "num_ppo_epochs": ([1], [0, -1]),
    "num_mini_batches": ([1], [0, -1]),
    "cliprange": ([1e-9, 2.0], [0.0, -0.1, math.inf, math.nan]),
    "vf_coef": ([0.0, 2.0], [-0.1, math.inf, math.nan]),
    "cliprange_value": ([1e-9, 2.0], [0.0, -0.1, math.inf, math.nan]),
    "gamma": ([0.0, 1.0], [-0.1, 1.1, math.nan]),
    "lam": ([0.0, 1.0], [-0.1, 1.1, math.nan]),
    "missing_eos_penalty": ([1e-9, 10.0], [0.0, -1.0, math.inf, math.nan]),
    "coordinator": (
        ["host:1", "10.0.0.1:65535", "[fe80::1]:80"],
        ["host", "host:0", "host:65536", "a b:1", ":1"],
    ),
    "num_processes": ([1], [0, -1]),
    "process_id": ([0, 1], [-1]),
    "learning_rate": ([1e-12, 1.0], [0.0, -1e-6, math.inf, math.nan]),
    "max_grad_norm": ([0.0, 10.0], [-1.0, math.inf, math.nan]),
}


def test_docstrings():
    assert doctest.testmod(options) == (0, 1)


def dpo(**options) -> DPOConfig:
    needs_eval = {"eval_data": "e.jsonl"} if "eval_every" in options else {}
    return DPOConfig(**{**NEEDED, **needs_eval, **options})


def made(**options):
    """A configuration that has these options, with what it needs besides."""
    kind = next(kind for kind in CONFIGS if set(options) <= {field.name for field in dataclasses.fields(kind)})
    needs = {"eval_data": "e.jsonl"} if "eval_every" in options else {}
    if "kl_horizon" in options:
        needs = {"kl_target": 6.0}
    if set(options) & set(PROCESS_OPTIONS):
        needs = {"coordinator": "host:1", "num_processes": 2, "process_id": 0}
    return kind(**{**CONFIGS[kind], **needs, **options})


def test_every_range_has_its_limits_here():
    assert set(LIMITS) == set(RANGES)


@pytest.mark.parametrize("name, value", [(name, value) for name, (good, _) in LIMITS.items() for value in good])
def test_the_edge_of_a_range_is_allowed(name, value):
    assert getattr(made(**{name: value}), name) == value


@pytest.mark.parametrize("name, value", [(name, value) for name, (_, bad) in LIMITS.items() for value in bad])
def test_past_the_edge_is_refused_by_name(name, value):
    with pytest.raises(InputError) as error:
        made(**{name: value})
    assert str(error.value) == f"{flag(name)} is {value!r}; allowed: {RANGES[name][0]}"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"coordinator": "host:1"}, "--coordinator without --num-processes, --process-id; allowed: all three, or none"),
        ({"num_processes": 2, "process_id": 0}, "--num-processes, --process-id without --coordinator; allowed: all"),
        (
            {"coordinator": "host:1", "num_processes": 2, "process_id": 2},
            "--process-id 2 of --num-processes 2; allowed: 0 to 1, another one for each process",
        ),
    ],
)
@pytest.mark.parametrize("config", [DPOConfig, ScoreConfig])
def test_processes_are_given_whole_or_not_at_all(config, given, message):
    with pytest.raises(InputError) as error:
        config(**{**CONFIGS[config], **given})
    assert str(error.value).startswith(message)


@every_config
def test_every_number_has_a_range(config):
    for name, hint in typing.get_type_hints(config).items():
        if {int, float} & {hint, *typing.get_args(hint)}:
            assert name in RANGES, f"{flag(name)} takes any number"


@every_config
def test_every_option_has_a_help_text_and_a_group(config):
    for field in dataclasses.fields(config):
        assert set(field.metadata) - {"alias"} == {"help", "group"} and all(field.metadata.values())


@every_config
def test_defaults_are_valid_and_frozen(config):
    made = config(**CONFIGS[config])
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.output_dir = "elsewhere"


def test_the_defaults_are_the_contract():
    config = dpo()
    stated = {
        "format": "auto",
        "loss": "sigmoid",
        "eval_data": None,
        "batch_size": 64,
        "epochs": None,
        "max_steps": None,
        "beta": 0.1,
        "label_smoothing": None,
        "learning_rate": 1e-6,
        "warmup_steps": 150,
        "optimizer": "rmsprop",
        "max_grad_norm": 10.0,
        "max_length": 512,
        "row_lengths": None,
        "dtype": None,
        "seed": 0,
        "shuffle": True,
        "save_every": None,
        "eval_every": None,
        "resume": "auto",
    }
    assert {name: getattr(config, name) for name in stated} == stated


@pytest.mark.parametrize(
    "text, lengths", [(None, None), ("512", (512,)), ("512, 2048", (2048, 512)), ("1,2,3", (3, 2, 1))]
)
def test_row_lengths_are_a_list(text, lengths):
    assert dpo(row_lengths=text).lengths_of_rows == lengths


@pytest.mark.parametrize("text", ["", "0", "-64", "64,", "64,64", "1,2,3,4", "1e3", "64.0", "long", "²"])
def test_row_lengths_that_are_none(text):
    message = f"--row-lengths is {text!r}; allowed: one to 3 different whole numbers of at least 1 separated by commas"
    with pytest.raises(InputError, match=re.escape(message)):
        dpo(row_lengths=text)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epochs": 1, "max_steps": 5}, "--epochs 1 and --max-steps 5 exclude each other; give one"),
        (
            {"eval_every": 5, "eval_data": None},
            "--eval-every 5 has no effect without --eval-data; add it or drop the flag",
        ),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(InputError) as error:
        dpo(**options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("beta", "0.1", "--beta is '0.1' (str); allowed: a number"),
        ("batch_size", 4.0, "--batch-size is 4.0 (float); allowed: a whole number"),
        ("batch_size", True, "--batch-size is True (bool); allowed: a whole number"),
        ("beta", True, "--beta is True (bool); allowed: a number"),
        ("shuffle", 1, "--shuffle is 1 (int); allowed: true or false"),
        ("shuffle", "no", "--shuffle is 'no' (str); allowed: true or false"),
        ("model", 5, "--model is 5 (int); allowed: a text"),
        ("model", None, "--model is None (NoneType); allowed: a text"),
        ("loss", ["sigmoid"], "--loss is ['sigmoid'] (list); allowed: a text"),
        (
            "format",
            "csv",
            "--format is 'csv'; allowed: " + ", ".join(typing.get_args(Format)),
        ),
        ("f_divergence_type", "kl", "--f-divergence-type is 'kl'; allowed: " + ", ".join(typing.get_args(Divergence))),
        ("optimizer", "sgd", "--optimizer is 'sgd'; allowed: rmsprop, adamw"),
        ("dtype", "float16", "--dtype is 'float16'; allowed: float32, bfloat16"),
        ("resume", True, "--resume is True; allowed: auto, never, must"),
    ],
)
def test_a_wrong_type_is_refused_by_name(name, value, message):
    with pytest.raises(InputError) as error:
        dpo(**{name: value})
    assert str(error.value) == message
    in_file = message.replace(flag(name), f"run.yaml: {name}", 1)
    with pytest.raises(InputError) as error:
        from_mapping(DPOConfig, {name: value}, "run.yaml")
    assert str(error.value) == in_file


def test_a_whole_number_is_a_number():
    assert dpo(beta=1).beta == 1.0 and isinstance(dpo(beta=1).beta, float)
    assert isinstance(from_mapping(DPOConfig, {"max-grad-norm": 0}, "run.yaml")["max_grad_norm"], float)


def test_keys_are_names_or_flags():
    assert from_mapping(DPOConfig, {"max_steps": 3, "batch-size": 4}, "run.yaml") == {"max_steps": 3, "batch_size": 4}


@pytest.mark.parametrize(
    "key, nearest",
    [("learning_rat", "learning_rate"), ("warmup", "warmup_steps"), ("max-step", "max_steps"), ("epoch", "epochs")],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(InputError) as error:
        from_mapping(DPOConfig, {key: 1}, "run.yaml")
    assert str(error.value).startswith(f"run.yaml: unknown key {key!r}; did you mean {nearest!r}? Allowed: model, data")


def test_a_key_that_is_no_text_is_unknown():
    with pytest.raises(InputError, match=r"run.yaml: unknown key 1; did you mean '\w+'\? Allowed: model, data"):
        from_mapping(DPOConfig, {1: 1}, "run.yaml")


def test_a_key_in_both_spellings_is_refused():
    with pytest.raises(InputError, match=r"run.yaml: key 'max-steps' is given twice; keep one"):
        from_mapping(DPOConfig, {"max_steps": 3, "max-steps": 4}, "run.yaml")


def test_a_negated_flag_is_a_key_too():
    assert from_mapping(DPOConfig, {"no_shuffle": True}, "f") == {"shuffle": False}
    assert from_mapping(DPOConfig, {"no-shuffle": False}, "f") == {"shuffle": True}
    with pytest.raises(InputError, match=r"f: no_shuffle is 'yes' \(str\); allowed: true or false"):
        from_mapping(DPOConfig, {"no_shuffle": "yes"}, "f")
    with pytest.raises(InputError, match="given twice"):
        from_mapping(DPOConfig, {"no_shuffle": True, "shuffle": True}, "f")


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = DPOConfig(model="~/m", data="~/d.jsonl,~/e.csv,hf:name", output_dir="~/run")
    home = "/home/somebody"
    assert (config.model, config.output_dir) == (f"{home}/m", f"{home}/run")
    assert config.data == f"{home}/d.jsonl,{home}/e.csv,hf:name"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "sigmoyd"}, "--loss 'sigmoyd' is unknown; did you mean 'sigmoid'? Allowed: sigmoid, hinge"),
        ({"loss": "sigmoid,,sft"}, "--loss '' is unknown"),
        ({"loss": "sft,sft"}, "--loss sft,sft names an objective twice; name it once"),
        (
            {"loss": "sigmoid", "loss_weights": "1"},
            "gives 1 weights for --loss sigmoid; allowed: one for each of several",
        ),
        ({"loss": "sigmoid,sft", "loss_weights": "1"}, "gives 1 weights for --loss sigmoid,sft"),
        (
            {"loss": "sigmoid,sft", "loss_weights": "1,a"},
            "--loss-weights is '1,a'; allowed: numbers separated by commas",
        ),
        ({"loss": "sigmoid,sft", "loss_weights": "1,nan"}, "--loss-weights is '1,nan'; allowed: finite numbers"),
    ],
)
def test_objectives_and_weights_are_checked(options, message):
    with pytest.raises(InputError) as error:
        dpo(**options)
    assert message in str(error.value)


def test_several_objectives_and_their_weights():
    made = dpo(loss="sigmoid, sft", loss_weights="1,0.005")
    assert made.losses == ("sigmoid", "sft") and made.weights == (1.0, 0.005)
    assert dpo().losses == ("sigmoid",) and dpo().weights is None
