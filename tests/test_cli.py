"""The command line: flags, YAML and help; and bad input is one line on standard error and exit status 2."""

import dataclasses
import json
import re
import subprocess
import sys
import typing

import pytest

from jaxdpo import cli
from jaxdpo.config import DPOConfig, ExportConfig, QuickstartConfig
from jaxdpo.data.sources import open_sources
from jaxdpo.options import flag
from jaxdpo.types import InputError, RunStopped
from tests import tiny

NEEDED = ["--model", "m", "--data", "d.jsonl", "--output-dir", "run"]
CONFIGS = {verb: config for verb, (config, _) in cli.VERBS.items()}


def parse(*flags):
    verb, config = cli.parse(["dpo", *NEEDED, *flags])
    assert verb == "dpo"
    return config


@pytest.fixture
def yaml(tmp_path):
    """Writes a configuration file; returns the flags that name it."""

    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return ["--config", str(tmp_path / "run.yaml")]

    return write


# Flags and files.


def test_without_flags_the_defaults_count():
    assert parse() == DPOConfig(model="m", data="d.jsonl", output_dir="run")


def test_every_flag_of_the_contract():
    flags = (
        "--format hh --loss sigmoid --eval-data e.jsonl --batch-size 4 --max-steps 7 --beta 0.2 --label-smoothing 0.1 "
        "--learning-rate 1e-5 --warmup-steps 3 --optimizer adamw --max-grad-norm 0 --max-length 128 --row-lengths 256 "
        "--dtype bfloat16 --seed 5 --no-shuffle --save-every 2 --eval-every 3 --resume must --microbatch-tokens 512"
    )
    assert parse(*flags.split()) == DPOConfig(
        model="m",
        data="d.jsonl",
        output_dir="run",
        format="hh",
        loss="sigmoid",
        eval_data="e.jsonl",
        batch_size=4,
        max_steps=7,
        beta=0.2,
        label_smoothing=0.1,
        learning_rate=1e-5,
        warmup_steps=3,
        optimizer="adamw",
        max_grad_norm=0.0,
        max_length=128,
        row_lengths="256",
        dtype="bfloat16",
        seed=5,
        shuffle=False,
        save_every=2,
        eval_every=3,
        resume="must",
        microbatch_tokens=512,
    )
    assert parse("--epochs", "3").epochs == 3


def test_a_file_gives_every_option_and_flags_win(yaml):
    text = (
        "model: m\ndata: d.jsonl\noutput-dir: run\nlearning_rate: 1e-6\nbatch-size: 8\nbeta: 1\nshuffle: false\nseed: 3"
    )
    verb, config = cli.parse(["dpo", *yaml(text), "--beta", "0.3", "--seed", "0"])
    assert verb == "dpo"
    assert config == DPOConfig(
        model="m", data="d.jsonl", output_dir="run", learning_rate=1e-6, batch_size=8, beta=0.3, shuffle=False, seed=0
    )
    assert isinstance(config.learning_rate, float)


def test_the_file_may_be_named_with_an_equals_sign(yaml):
    assert parse("=".join(yaml("beta: 0.3"))).beta == 0.3


def test_two_files_are_refused(yaml):
    with pytest.raises(InputError, match=r"--config is given 2 times .*; allowed: once"):
        parse(*yaml("beta: 0.2"), "--config=other.yaml")


def test_flags_can_undo_the_file(yaml):
    named = yaml("shuffle: false\neval_data: e.jsonl\n")
    assert parse(*named).shuffle is False and parse(*named, "--shuffle").shuffle is True
    assert parse(*named).eval_data == "e.jsonl" and parse(*named, "--eval-data", "None").eval_data is None


@pytest.mark.parametrize(
    "text, flags, epochs, max_steps",
    [
        ("epochs: 3", [], 3, None),
        ("max_steps: 9", [], None, 9),
        ("epochs: 3", ["--max-steps", "5"], None, 5),
        ("max_steps: 9", ["--epochs", "2"], 2, None),
        ("epochs: 3", ["--epochs", "2"], 2, None),
        ("epochs:\nmax_steps: 9", ["--max-steps", "5"], None, 5),
    ],
)
def test_the_length_on_the_command_line_replaces_that_of_the_file(yaml, text, flags, epochs, max_steps):
    config = parse(*yaml(text), *flags)
    assert (config.epochs, config.max_steps) == (epochs, max_steps)


def test_export_and_quickstart_have_flags_of_their_own():
    assert cli.parse(["export", "--checkpoint", "c", "--output-dir", "o", "--dtype", "bfloat16"]) == (
        "export",
        ExportConfig(checkpoint="c", output_dir="o", dtype="bfloat16"),
    )
    assert cli.parse(["quickstart"]) == ("quickstart", QuickstartConfig())
    assert cli.parse(["quickstart", "--seed", "2", "--max-steps", "3"])[1] == QuickstartConfig(seed=2, max_steps=3)


# Bad input.


def status_and_message(capsys, *argv):
    """Exit status and the lines on standard error."""
    try:
        status = cli.main(list(argv))
    except SystemExit as stopped:
        status = stopped.code
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    return status, lines


def refused(capsys, *argv):
    """The one line that `jaxdpo: error:` starts."""
    status, lines = status_and_message(capsys, *argv)
    assert status == 2 and len(lines) == 1, lines
    return lines[0].removeprefix("jaxdpo: error: ")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch-size", "0"], "--batch-size is 0; allowed: a whole number of at least 1"),
        (["--beta", "-1"], "--beta is -1.0; allowed: a finite number above 0"),
        (["--learning-rate", "nan"], "--learning-rate is nan; allowed: a finite number above 0"),
        (["--label-smoothing", "0.5"], "--label-smoothing is 0.5; allowed: a number in [0, 0.5)"),
        (["--seed", "-1"], "--seed is -1; allowed: a whole number from 0 to 4294967295"),
        (
            ["--max-length", "1"],
            "--max-length is 1; allowed: a whole number of at least 2: one prompt token and one comp",
        ),
        (["--epochs", "1", "--max-steps", "5"], "--epochs 1 and --max-steps 5 exclude each other; give one"),
        (["--eval-every", "5"], "--eval-every 5 has no effect without --eval-data; add it or drop the flag"),
    ],
)
def test_a_flag_out_of_range(capsys, flags, message):
    assert refused(capsys, "dpo", *NEEDED, *flags).startswith(message)


@pytest.mark.parametrize(
    "argv, named",
    [
        (["dpo", *NEEDED, "--batch-size", "four"], "--batch-size"),
        (["dpo", *NEEDED, "--batch-size", "1.5"], "--batch-size"),
        (["dpo", *NEEDED, "--batchsize", "4"], "--batch-size"),
        (["dpo", *NEEDED, "--format", "csv"], "--format"),
        (["dpo", *NEEDED, "--optimizer", "sgd"], "--optimizer"),
        (["dpo", "--data", "d"], "--model"),
        (["export", "--checkpoint", "c"], "--output-dir"),
        (["export", "--checkpoint", "c", "--output-dir", "o", "--config", "x.yaml"], "--config"),
        (["train"], "train"),
        ([], "quickstart"),
    ],
)
def test_flags_that_do_not_parse_are_named(capsys, argv, named):
    status, lines = status_and_message(capsys, *argv)
    assert status == 2
    assert any(named in line for line in lines)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "learning_rat: 1e-6",
            "unknown key 'learning_rat'; did you mean 'learning_rate'? Allowed: model, data, output_dir",
        ),
        ("beta: abc", "beta is 'abc' (str); allowed: a number"),
        ("batch_size: 8.5", "batch_size is 8.5 (float); allowed: a whole number"),
        ("shuffle: no", "shuffle is 'no' (str); allowed: true or false"),
        ("optimizer: sgd", "optimizer is 'sgd'; allowed: rmsprop, adamw"),
        ("beta: 0.1\nBETA: 0.2", "unknown key 'BETA'; did you mean"),
        ("max_steps: 3\nmax-steps: 4", "key 'max-steps' is given twice; keep one"),
    ],
)
def test_a_bad_file_names_itself_and_the_key(capsys, yaml, text, message):
    named = yaml(text)
    assert refused(capsys, "dpo", *NEEDED, *named).startswith(f"{named[1]}: {message}")


def test_a_range_is_checked_whoever_gave_the_value(capsys, yaml):
    assert refused(capsys, "dpo", *NEEDED, *yaml("beta: 0")) == "--beta is 0.0; allowed: a finite number above 0"


def test_a_missing_file_of_options(capsys, tmp_path):
    message = refused(capsys, "dpo", *NEEDED, "--config", str(tmp_path / "no.yaml"))
    assert message == f"{tmp_path / 'no.yaml'} does not exist; allowed: a YAML file of options; fix: check the path"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def start(capsys, model, tmp_path):
    """`jaxdpo dpo` on these data lines and flags must be refused: the message; nothing is left behind."""

    def run(lines, *flags, model=model):
        if lines is not None:
            (tmp_path / "d.jsonl").write_text("".join(line + "\n" for line in lines))
        files = ["--model", str(model), "--data", str(tmp_path / "d.jsonl"), "--output-dir", str(tmp_path / "run")]
        length = [] if "--max-length" in flags else ["--max-length", "64"]
        status, printed = status_and_message(capsys, "dpo", *files, *length, *flags)
        assert status == 2
        assert not (tmp_path / "run").exists()
        return printed[-1].removeprefix("jaxdpo: error: ").replace(str(tmp_path), "DIR")

    return run


GOOD = json.dumps({"prompt": "Is 1 fine?", "chosen": " yes", "rejected": " no"})


@pytest.mark.parametrize(
    "lines, message",
    [
        (None, "data file DIR/d.jsonl cannot be read (No such file or directory); allowed: JSON lines, "),
        ([], "DIR/d.jsonl holds no record; allowed: JSON lines, a JSON array, CSV or Parquet"),
        ([GOOD, GOOD, '{"prompt": '], "DIR/d.jsonl, line 3: bad JSON ("),
        ([GOOD, '{"prompt": "p", "chosen": " a"}'], "DIR/d.jsonl, line 2: field 'rejected' is missing; got the fields"),
        (
            [GOOD, '{"prompt": "p", "chosen": "", "rejected": "b"}'],
            "DIR/d.jsonl, line 2: field 'chosen' is ''; allowed: ",
        ),
        (
            [GOOD, '{"prompt": 1, "chosen": "a", "rejected": "b"}'],
            "DIR/d.jsonl, line 2: field 'prompt' is a number; all",
        ),
        (['{"question": "q"}'], "DIR/d.jsonl, line 1: no format fits a record with the fields ['question']; allowed: "),
        (
            ['{"prompt": "p", "chosen": "a", "rejected": "a"}'],
            "DIR/d.jsonl: none of its 1 records is usable, dropped 1: ",
        ),
    ],
)
def test_bad_data_names_file_and_line(start, lines, message):
    assert start(lines).startswith(message)


def test_held_out_data_is_checked_before_anything_runs(start, tmp_path):
    (tmp_path / "e.jsonl").write_text("{")
    assert start([GOOD], "--eval-data", str(tmp_path / "e.jsonl")).startswith("DIR/e.jsonl, line 1: bad JSON (")


def test_no_such_model(start, tmp_path):
    message = start([GOOD], model=tmp_path / "none" / "of" / "these")
    assert message.startswith("no such model: 'DIR/none/of/these' is no directory, and no hub id either; allowed: ")


def test_an_architecture_that_is_not_supported(start, model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text()) | {"model_type": "mamba", "architectures": ["Mamba"]}
    (other / "config.json").write_text(json.dumps(config))
    message = start([GOOD], model=other)
    assert "model_type 'mamba' (architectures ['Mamba']) is not supported; allowed: llama, mistral, gpt2" in message


def test_a_path_longer_than_the_models_positions(start):
    record = json.dumps({"prompt": "p" * 60, "chosen": " yes", "rejected": " no"})
    message = start([GOOD, record], "--max-length", "512")
    assert message.startswith(
        "DIR/d.jsonl, line 2: prompt and completion have 65 tokens; allowed: the model's 64 positions"
    )


def test_a_row_shorter_than_the_largest_pair(start):
    message = start([GOOD], "--row-lengths", "8")
    assert message.startswith(
        "DIR/d.jsonl, line 1: the prompt and its 2 completions need 19 tokens; allowed: 8, the longest of row_lengths"
    )


def test_must_resume_a_run_that_is_not_there(start):
    message = start([GOOD], "--resume", "must")
    assert message == "--resume must: DIR/run holds no run; fix: check --output-dir, or use --resume auto"


def test_an_output_directory_that_is_a_file(capsys, tmp_path):
    (tmp_path / "run").touch()
    message = refused(capsys, "dpo", *NEEDED[:-1], str(tmp_path / "run"))
    assert message == f"--output-dir {tmp_path / 'run'} is a file; allowed: a directory, new or this run's own"


def test_the_output_directory_of_another_program(capsys, tmp_path):
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    message = refused(capsys, "dpo", *NEEDED[:-1], str(tmp_path / "run"))
    assert message.startswith(f"--output-dir {tmp_path / 'run'} holds checkpoints but no config.yaml, so it is another")


@pytest.mark.parametrize("error", [FloatingPointError, RunStopped])
def test_a_run_that_had_to_stop_has_status_one(capsys, monkeypatch, error):
    def stop(config):
        raise error("step 3: loss nan")

    monkeypatch.setitem(cli.VERBS, "dpo", (DPOConfig, stop))
    assert status_and_message(capsys, "dpo", *NEEDED) == (1, ["jaxdpo: stopped: step 3: loss nan"])


# Help, and the process.


def shown(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*argv, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_verbs(capsys):
    text = " ".join(shown(capsys).split())
    for verb, config in CONFIGS.items():
        assert verb in text
        assert config.__doc__.split(":")[0] in text


@pytest.mark.parametrize("verb", CONFIGS)
def test_help_of_a_verb_shows_every_option_in_its_group(capsys, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    text = shown(capsys, verb)
    for field in dataclasses.fields(CONFIGS[verb]):
        assert f"{flag(field.name)} " in text or f"{flag(field.name)}," in text
        assert f"{field.metadata['group']} options" in text
        for choice in typing.get_args(field.type):
            if isinstance(choice, str):
                assert choice in text
    assert ("--config FILE" in text) == (verb in cli.CONFIG_VERBS)


def test_help_is_typed_and_states_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    text = shown(capsys, "dpo")
    for line in ("--batch-size INT", "--beta FLOAT", "--optimizer {rmsprop,adamw}", "--dtype {float32,bfloat16}"):
        assert line in text
    for default in (
        "(default: 64)",
        "(default: 0.1)",
        "(default: 1e-06)",
        "(default: 150)",
        "(default: auto)",
        "(required)",
    ):
        assert default in text


def process(source):
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)


def test_help_imports_no_jax():
    """It must come at once: jax, Flax and transformers take seconds to import."""
    done = process(
        "import sys\n"
        "from jaxdpo.cli import main\n"
        "for argv in ([], ['dpo'], ['export'], ['quickstart']):\n"
        "    try: main([*argv, '--help'])\n"
        "    except SystemExit as stopped: assert stopped.code == 0\n"
        "print('\\nLOADED', *sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split("LOADED")[1].split())
    assert "tyro" in loaded
    assert not loaded & {"jax", "flax", "optax", "orbax", "grain", "transformers", "safetensors", "matplotlib"}


COMPILING = (
    "import sys\n"
    "from jaxdpo import cli\n"
    "def run(config):\n"
    "    import jax\n"
    "    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
    "    jax.jit(lambda x: x + 1)(0)\n"
    "    print(jax.config.jax_compilation_cache_max_size)\n"
    "cli.VERBS['convert'] = (cli.ConvertConfig, run)\n"
    "sys.argv = ['jaxdpo', 'convert', '--data', 'a.jsonl', '--output-dir', 'b']\n"
    "cli.console()"
)
"""A process in which a verb compiles a program."""


def test_compiled_programs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDPO_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    done = process(COMPILING)
    assert done.stdout == f"{8 * 2**30}\n", done.stderr
    assert any(tmp_path.glob("programs/*-cache"))


def test_compiled_programs_are_kept_where_jax_was_told(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDPO_CACHE", str(tmp_path / "unused"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "stated"))
    done = process(COMPILING)
    assert done.stdout == "-1\n", done.stderr
    assert any(tmp_path.glob("stated/*-cache")) and not (tmp_path / "unused").exists()


def test_a_process_ends_with_the_status_and_one_line(tmp_path):
    flags = ["--model", "m", "--data", str(tmp_path / "none.jsonl"), "--output-dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "jaxdpo.cli", "dpo", *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"jaxdpo: error: data file {tmp_path / 'none.jsonl'} cannot be read (")
    assert done.stderr.count("\n") == 1


def test_convert_writes_what_tfds_reads(tmp_path, capsys):
    pairs = {
        name: tiny.write_pairs(tmp_path / f"{name}.jsonl", range(start, start + 3))
        for name, start in (("train", 0), ("test", 9))
    }
    flags = ["--data", str(pairs["train"]), "--eval-data", str(pairs["test"]), "--output-dir", str(tmp_path / "sets")]
    assert cli.main(["convert", *flags, "--name", "sums"]) == 0
    name = re.search(r"--data (tfds:\S+)", capsys.readouterr().out)[1]
    for split, path in pairs.items():
        (source,) = open_sources(f"{name}:{split}")
        assert [record for _, record in source.records()] == [
            json.loads(line) for line in path.read_text().splitlines()
        ]
    assert cli.main(["convert", *flags, "--name", "sums"]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 1, 2, 130, 143])
def test_an_interrupted_process_ends_without_clean_up(monkeypatch, status):
    """Which crashes where XLA was compiling."""
    ended = []
    monkeypatch.setattr(cli, "main", lambda: status)
    monkeypatch.setattr("os._exit", lambda status: ended.append(status))
    with pytest.raises(SystemExit) as exit:
        cli.console()
    assert exit.value.code == status
    assert ended == ([status] if status > 2 else [])
