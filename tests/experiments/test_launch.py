"""Launch scripts, with recorders in place of gcloud, xpk, srun and the rest: what they would have run."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "experiments" / "launch"
COMMAND = ["dpo", "--model", "a/b", "--data", "my pairs.jsonl", "--run-name", "it's $HOME"]
"""Words that a careless shell would split or expand."""


@pytest.fixture
def launch(tmp_path):
    """`(script, *arguments, **environment) -> exit status, commands`: the words that each program got."""
    bin_dir, log = tmp_path / "bin", tmp_path / "log"
    bin_dir.mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    recorder = (
        f'#!/usr/bin/env bash\n{{ printf "%q " "$(basename "$0")" "$@"; echo; }} >> {shlex.quote(str(log))}\n'
        'exit "${STATUS:-0}"\n'
    )
    for program in (*(bin_dir / name for name in ("gcloud", "xpk", "srun", "scontrol")), tmp_path / ".venv/bin/jaxdpo"):
        program.write_text(recorder)
        program.chmod(0o755)

    def run(script: str, *arguments: str, **environment: str) -> tuple[int, list[list[str]]]:
        done = subprocess.run(
            [str(SCRIPTS / script), *arguments],
            env={"PATH": f"{bin_dir}:{os.environ['PATH']}", "HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        calls = log.read_text().splitlines() if log.exists() else []
        return done.returncode, [unquoted(line) for line in calls]

    return run


def unquoted(line: str) -> list[str]:
    """The words of a line that bash quoted."""
    done = subprocess.run(["bash", "-c", f'printf "%s\\0" {line}'], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def value(words: list[str], option: str) -> str:
    """Of `--option=value`."""
    return next(word for word in words if word.startswith(f"{option}=")).partition("=")[2]


def test_one_host(launch):
    status, calls = launch("gpus_one_host.sh", *COMMAND)
    assert status == 0
    assert calls == [["jaxdpo", *COMMAND]]


def test_slurm_starts_the_command_once_for_each_task(launch):
    status, calls = launch("slurm_gpus.sh", *COMMAND, SLURM_JOB_ID="7")
    assert status == 0
    assert calls == [["srun", "--kill-on-bad-exit=0", ".venv/bin/jaxdpo", *COMMAND]]


@pytest.mark.parametrize(("status", "again"), [(143, True), (130, False), (2, False)])
def test_slurm_goes_on_in_another_allocation_after_sigterm_alone(launch, status, again):
    done, calls = launch("slurm_gpus.sh", *COMMAND, SLURM_JOB_ID="7", STATUS=str(status))
    assert (["scontrol", "requeue", "7"] in calls) is again
    assert done == status


def test_xpk_runs_the_command_in_every_pod(launch):
    environment = {"CLUSTER": "c", "TPU_TYPE": "v5litepod-16", "IMAGE": "i", "SLICES": "2", "STORAGE": "nfs"}
    status, [words] = launch("gke_xpk.sh", "my-run", *COMMAND, XPK_OPTIONS="--spot --priority=low", **environment)
    assert status == 0
    assert words[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=c", "--workload=my-run", "--num-slices=2", "--storage=nfs"} < {*words}
    assert words[-2:] == ["--spot", "--priority=low"]
    assert unquoted(value(words, "--command")) == ["exec", "jaxdpo", *COMMAND]


def test_tpu_vm_starts_the_command_on_every_host_of_every_slice(launch):
    status, calls = launch("cloud_tpu_vm.sh", "start", *COMMAND, TPU="a b", ZONE="z")
    assert status == 0
    assert sorted(words[5] for words in calls) == ["a", "b"]
    for words in calls:
        assert {"--zone=z", "--worker=all"} < {*words}
        command = value(words, "--command").removeprefix("nohup ~/jaxdpo/bin/")
        assert unquoted(command.partition(" >")[0]) == ["jaxdpo", *COMMAND]


def test_tpu_vm_builds_this_checkout_and_installs_it_with_libtpu(launch, tmp_path):
    pip = tmp_path / "bin" / "pip"
    pip.write_text('#!/usr/bin/env bash\ntouch "$5/jaxdpo-0-py3-none-any.whl"\necho "$6" > built\n')
    pip.chmod(0o755)
    status, (copied, installed) = launch("cloud_tpu_vm.sh", "install", TPU="a", ZONE="z")
    assert status == 0
    assert Path((tmp_path / "built").read_text().strip()) == SCRIPTS.parents[1]
    assert copied[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"] and copied[5].endswith(".whl")
    assert 'jaxdpo[tpu] @ file://$HOME/jaxdpo-0-py3-none-any.whl"' in value(installed, "--command")


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "message"),
    [
        ("gpus_one_host.sh", [], {}, "a jaxdpo command is missing"),
        ("slurm_gpus.sh", [], {}, "a jaxdpo command is missing"),
        ("gke_xpk.sh", COMMAND, {}, "CLUSTER: set it"),
        ("gke_xpk.sh", ["name"], {"CLUSTER": "c", "TPU_TYPE": "t", "IMAGE": "i"}, "usage:"),
        ("cloud_tpu_vm.sh", ["start"], {"TPU": "a"}, "ZONE: set it"),
        ("cloud_tpu_vm.sh", ["start"], {"TPU": "a", "ZONE": "z"}, "start needs a jaxdpo command"),
        ("cloud_tpu_vm.sh", ["begin"], {"TPU": "a", "ZONE": "z"}, "usage:"),
    ],
)
def test_what_is_missing_is_named(script, arguments, environment, message):
    environment = {"PATH": os.environ["PATH"], **environment}
    done = subprocess.run([str(SCRIPTS / script), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
