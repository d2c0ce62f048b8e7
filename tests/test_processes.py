"""Processes find each other, agree, and read what lies on all of their devices; commands on two give what one gives."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdpo import cli, processes
from jaxdpo.sharding import make_mesh
from jaxdpo.train.digests import tree_digests
from jaxdpo.types import InputError
from tests import several, tiny
from tests.launch import Launched, cached_programs

STEPS = "--batch-size 12 --max-steps 2 --learning-rate 1e-3 --warmup-steps 0 --max-length 64"
SAME = {
    "kto": f"dpo --data UNPAIRED --loss kto --mesh fsdp=2,tensor=4 --row-lengths 64 --microbatch-tokens 64 {STEPS}",
    "sft": f"sft --data PAIRS --mesh fsdp=1,context=8 {STEPS}",
    "reward": f"reward --data PAIRS --eval-data HELD_OUT --mesh data=2,fsdp=4 --eval-every 1 {STEPS}",
    "score": "score --model OUT/reward/export --data PAIRS --max-length 64 --mesh fsdp=4,tensor=2 --output OUT/scores",
}
"""Commands that do the same on two processes as on one: mesh axes that go over both, microbatches that depend on each
other, a checkpoint that is kept as the best, what is scored."""
REFUSED = {
    "options": "dpo --data PAIRS --beta 0.NUMBER1 --output-dir OUT/refused",
    "data": "dpo --data pairs.jsonl --max-length 64 --output-dir OUT/refused",
    "model": "dpo --data PAIRS --model model --max-length 64 --output-dir OUT/refused",
    "one": "dpo --data only_here.jsonl --max-length 64 --output-dir OUT/refused",
    "directory": "dpo --data PAIRS --max-length 64 --output-dir run",
    "nothing": "dpo --data PAIRS --resume must --output-dir OUT/refused",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    tiny.write_model(folder / "model")
    tiny.write_pairs(folder / "pairs.jsonl", range(24))
    tiny.write_pairs(folder / "held_out.jsonl", range(100, 108))
    tiny.write_unpaired(folder / "unpaired.jsonl", range(24))
    for number in range(2):
        cwd = folder / f"cwd-{number}"
        cwd.mkdir()
        tiny.write_pairs(cwd / "pairs.jsonl", range(number, 24))
        tiny.write_model(cwd / "model", seed=number)
    tiny.write_pairs(folder / "cwd-0" / "only_here.jsonl", range(24))
    return folder


def words(folder: Path, flags: str, out: str) -> list[str]:
    """The words of a command."""
    names = {"PAIRS": "pairs.jsonl", "UNPAIRED": "unpaired.jsonl", "HELD_OUT": "held_out.jsonl", "OUT": out}
    for name, file in names.items():
        flags = flags.replace(name, str(folder / file))
    given = flags.split()
    return given if "--model" in given else [*given, "--model", str(folder / "model")]


@pytest.fixture(scope="module")
def found(folder) -> list[dict]:
    """What each of two processes of 4 devices found."""
    commands = {name: words(folder, f"{flags} --output-dir OUT/{name}", "two") for name, flags in SAME.items()}
    commands["score"] = words(folder, SAME["score"], "two")
    commands |= {name: words(folder, flags, "two") for name, flags in REFUSED.items()}
    (folder / "commands.json").write_text(json.dumps(commands))
    environment = {**cached_programs(folder / "programs"), "JAXDPO_CACHE": str(folder / "cache")}
    launched = Launched(
        [["-m", "tests.several", str(folder)]] * 2, devices=4, environment=environment, cwd=Path(__file__).parent.parent
    )
    ended = launched.ended()
    assert [status for status, *_ in ended] == [0, 0], ended
    return [json.loads((folder / f"found-{number}.json").read_text()) for number in range(2)]


def test_what_processes_tell_each_other(found):
    for number, got in enumerate(of_process["exchanges"] for of_process in found):
        assert got["gathered"] == [{"number": 0, "text": ""}, {"number": 1, "text": "ä" * 1000}]
        assert got["of_main"] == 7 and got["largest"] == 3
        assert got["anywhere"] == [True, True, False, False]
        assert got["together"] == ("this does not work here" if number else "process 1: this does not work here")
        assert got["agree"].startswith(
            "the processes of a run differ: --beta is 0.1 on process 0 and 1.1 on process 1; missing is 'here' on "
            "process 0 and None on process 1; allowed: the same on all; fix: "
        )
        assert got["first_sharing"] == [0, number, number] and got["left"] == []


def test_arrays_of_several_processes_are_read_whole(found):
    one = tree_digests(several.arrays(make_mesh()))
    assert len(set(one.values())) == len(one)
    for got in (of_process["mesh"] for of_process in found):
        assert got["fetched"] and got["apart"] and got["batch"]
        assert got["digests"] == one
    decoder = tiny.decoder()
    exported = several.export_tensors(several.FAMILIES["llama"], decoder, tiny.params(decoder))
    assert found[0]["mesh"]["exported"] == {name: float(np.abs(tensor).sum()) for name, tensor in exported}


def test_each_cache_is_filled_by_one_process_with_what_it_lacks(found):
    for got in (of_process["caches"] for of_process in found):
        assert got["computed"] == [10, 0, 10, 20]
        for sums in got["sums"]:
            assert sums == pytest.approx(got["direct"][: len(sums)], rel=1e-6)
    assert found[0]["caches"]["unchanged"]
    assert found[0]["caches"]["sums"] == found[1]["caches"]["sums"]


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    """The same commands in this one process."""
    for name, flags in SAME.items():
        out = "" if name == "score" else f" --output-dir OUT/{name}"
        assert cli.main(words(folder, flags + out, "one")) == 0
    return folder / "one"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kto", "sft", "reward"])
def test_a_run_on_two_processes_is_that_of_one(found, folder, alone, name):
    assert [of_process["commands"][name][0] for of_process in found] == [0, 0], found[0]["commands"][name]
    both = (tiny.timeless(rows(root / name / "metrics.jsonl")) for root in (folder / "two", alone))
    for got, want in zip(*both, strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    got, want = (load_file(root / name / "export" / "model.safetensors") for root in (folder / "two", alone))
    assert set(got) == set(want)
    for tensor, values in want.items():
        np.testing.assert_allclose(got[tensor], values, rtol=0, atol=2e-6, err_msg=tensor)


@pytest.mark.slow
def test_scores_of_two_processes_are_those_of_one(found, folder, alone):
    assert [of_process["commands"]["score"][0] for of_process in found] == [0, 0], found[0]["commands"]["score"]
    for got, want in zip(rows(folder / "two" / "scores"), rows(alone / "scores"), strict=True):
        assert got.pop("scores") == pytest.approx(want.pop("scores"), abs=1e-5)
        assert got == want


@pytest.mark.parametrize(
    "name, message",
    [
        ("options", "the processes of a run differ: --beta is 0.01 on process 0 and 0.11 on process 1; allowed: "),
        ("data", "the processes of a run differ: what --data holds is '"),
        ("model", "the processes of a run differ: the model is '"),
        (
            "directory",
            "--output-dir run is another directory on process 1 than on process 0; allowed: one on a",
        ),
    ],
)
def test_processes_that_differ_are_refused_on_each(found, folder, name, message):
    for of_process in found:
        status, said = of_process["commands"][name]
        assert status == 2 and said.startswith(f"jaxdpo: error: {message}"), said
    assert not (folder / "two" / "refused").exists()


@pytest.mark.parametrize(
    "name, on, message",
    [
        ("one", 1, "data file only_here.jsonl cannot be read (No such file or directory)"),
        ("nothing", 0, "--resume must: "),
    ],
)
def test_what_one_process_cannot_do_ends_all(found, name, on, message):
    for number, (status, said) in enumerate(of_process["commands"][name] for of_process in found):
        assert status == 2
        assert said.startswith(f"jaxdpo: error: {'' if number == on else f'process {on}: '}"), said
        assert message in said


def test_one_that_fails_alone_does_not_wait_for_the_others(found, folder):
    assert json.loads((folder / "left.json").read_text()) is False


def test_others_that_do_not_come_end_a_process_with_a_message():
    """jax would abort it, with a stack trace."""
    source = (
        "import jax; jax.config.update('jax_platforms', 'cpu')\nfrom jaxdpo import processes\n"
        "processes.CONNECT_SECONDS = 2\nprocesses.start('127.0.0.1:9', 2, 1)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "jaxdpo: error: the processes (2 at 127.0.0.1:9) cannot be connected: not all of them came; fix: start all of "
        "them within 2 s"
    )


# What the environment says.

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def initialized(monkeypatch) -> list:
    """The calls of `jax.distributed.initialize`, which does nothing."""
    calls: list = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: calls.append((args, options)))
    before = jax.config.jax_enable_preemption_service
    yield calls
    jax.config.update("jax_enable_preemption_service", before)


@pytest.mark.parametrize(
    "environment, connects",
    [
        ({}, False),
        (SLURM, True),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False),  # the shell of an interactive allocation
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, False),  # a batch script
        ({"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a pod that is no part of an indexed job
    ],
)
def test_the_environment_says_whether_there_are_others(initialized, monkeypatch, environment, connects):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.start()
    assert [args for args, _ in initialized] == ([(None, None, None)] if connects else [])
    assert all(options["cluster_detection_method"] is None for _, options in initialized)


def test_options_win_over_the_environment(initialized, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    processes.start("host:1", 1, 0)
    assert initialized == []
    processes.start("host:1", 3, 2)
    ((args, options),) = initialized
    assert args == ("host:1", 3, 2) and options["cluster_detection_method"] == "deactivate"


def test_jax_that_was_used_already_is_an_error():
    jax.devices()
    with pytest.raises(InputError, match=r"cannot be connected: jax.distributed.initialize\(\) must be called before"):
        processes.start("127.0.0.1:1", 2, 0)


# One process.


def test_with_one_process_nothing_is_exchanged(tmp_path):
    assert processes.gathered({"a": 1}) == [{"a": 1}] and processes.of_main("a") == "a"
    assert processes.largest(3) == 3 and processes.first_sharing(tmp_path / "no") == 0
    assert processes.anywhere(np.array([True, False])).tolist() == [True, False]
    processes.agree({"a": object()})
    with pytest.raises(KeyError), processes.together():
        raise KeyError("a")
    assert processes.ended()
