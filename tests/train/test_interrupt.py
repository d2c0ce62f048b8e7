"""Ctrl-C and SIGTERM: a run in training ends saved and goes on exactly; any other moment ends it at once."""

import doctest
import os
import signal
import threading
import time

import pytest
from transformers import PreTrainedTokenizerBase

from jaxdpo import cli
from jaxdpo.train import interrupt
from jaxdpo.train.checkpoint import Checkpoints
from jaxdpo.train.interrupt import SIGNALS, Interruption, Terminated, terminable
from jaxdpo.train.writer import MetricsWriter, read_metrics
from tests.train.test_resume import Process, saved, steps_done, timeless

FLAGS = "--batch-size 5 --max-steps 6 --learning-rate 1e-3 --warmup-steps 3"
every_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


def test_docstrings():
    assert doctest.testmod(interrupt).failed == 0


@every_signal
def test_the_first_signal_waits_and_the_second_does_not(number, capfd):
    with terminable():
        before = [signal.getsignal(n) for n in SIGNALS]
        with Interruption() as stop:
            stop.hold()
            stop.hold()
            assert not stop.requested
            signal.raise_signal(number)
            assert stop.requested and stop.signal == number
            assert capfd.readouterr().err == f"\n{number.name}: stopping after this step; once more to stop now\n"
            with pytest.raises(KeyboardInterrupt) as second:
                signal.raise_signal(number)
        assert isinstance(second.value, Terminated) == (number == signal.SIGTERM)
        assert [signal.getsignal(n) for n in SIGNALS] == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@every_signal
def test_with_nothing_to_save_a_signal_ends_it_at_once(number):
    with terminable(), Interruption() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert not stop.requested


def test_a_signal_that_is_let_go_again_is_as_before():
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as stop:
        stop.hold()
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_another_thread_than_the_main_one_leaves_the_handlers_alone():
    def hold():
        with terminable(), Interruption() as stop:
            stop.hold()
            seen.append([signal.getsignal(n) for n in SIGNALS])

    seen: list = []
    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert seen == [[signal.getsignal(n) for n in SIGNALS]]


def run(inputs, root, flags=FLAGS):
    return cli.main(inputs.command(root, flags))


def weights(root):
    return (root / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """A run that nobody interrupts."""
    root = tmp_path_factory.mktemp("alone") / "run"
    assert run(inputs, root) == 0
    return root


def raising_after(function, number, when=lambda *args: True):
    """The function, and then once a signal to this process."""
    raised = []

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        if not raised and when(*args):
            raised.append(number)
            signal.raise_signal(number)
        return result

    return wrapped


@pytest.mark.parametrize("number, save_every", [(signal.SIGINT, 1), (signal.SIGTERM, 100)])
def test_a_run_ends_saved_and_goes_on_as_if_nothing_had_happened(
    inputs, alone, tmp_path, monkeypatch, capfd, number, save_every
):
    """While the third step is saved, or before it is known whether it will be."""
    root, flags = tmp_path / "run", f"{FLAGS} --save-every {save_every}"
    owner, name = (Checkpoints, "save") if save_every == 1 else (MetricsWriter, "write")
    third = raising_after(getattr(owner, name), number, lambda *args: steps_done(root) == 3)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, third)
        assert run(inputs, root, flags) == 128 + number
    step = 4 if save_every == 1 else 3  # a signal behind the decision to save is heard after the next step
    printed = capfd.readouterr().err
    assert f"{number.name}: stopping after this step; once more to stop now\n" in printed
    assert printed.endswith(
        f"jaxdpo: interrupted: {number.name} after step {step} of 6, saved in {root}/checkpoints; "
        "give the same command again to go on from there\n"
    )
    assert "Traceback" not in printed
    assert saved(root)[-1] == step == read_metrics(root / "metrics.jsonl")[-1]["step"]
    assert not (root / "export").exists()
    assert run(inputs, root, flags) == 0
    assert timeless(root) == timeless(alone) and weights(root) == weights(alone)


def test_after_the_last_step_the_export_is_left_to_the_same_command(inputs, alone, tmp_path, monkeypatch, capfd):
    root = tmp_path / "run"
    last = raising_after(MetricsWriter.write, signal.SIGINT, lambda self, row: row["step"] == 6)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", last)
        assert run(inputs, root) == 130
    assert "SIGINT after all 6 steps, before the export, saved in" in capfd.readouterr().err
    assert not (root / "export").exists()
    assert run(inputs, root) == 0
    assert timeless(root) == timeless(alone) and weights(root) == weights(alone)


def test_during_the_export(inputs, alone, tmp_path, monkeypatch, capfd):
    root, number = tmp_path / "run", signal.SIGTERM
    tokenizer_saved = raising_after(
        PreTrainedTokenizerBase.save_pretrained, number, lambda self, path, *rest: "partial" in str(path)
    )
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", tokenizer_saved)
        assert run(inputs, root) == 128 + number
    assert "jaxdpo: interrupted" in capfd.readouterr().err
    assert saved(root)[-1] == 6 and not (root / "export").exists()
    assert run(inputs, root) == 0
    assert weights(root) == weights(alone) and not list(root.glob(".*partial"))


def signal_when(process: Process, number: signal.Signals, happens) -> str:
    """The signal as soon as `happens(root)`; what the process printed."""
    while not happens(process.root):
        assert process.popen.poll() is None, process.popen.communicate()[0]
        time.sleep(0.0005)
    os.kill(process.popen.pid, number)
    printed, _ = process.popen.communicate(timeout=60)
    assert process.popen.returncode == 128 + number, printed
    assert "Traceback" not in printed
    return printed


@pytest.mark.slow
def test_a_process_of_its_own(inputs, compiled, tmp_path):
    root = tmp_path / "run"
    printed = signal_when(Process(inputs, root, compiled), signal.SIGINT, lambda root: (root / "config.yaml").exists())
    assert "jaxdpo: interrupted: " in printed.splitlines()[-1]
    assert saved(root) == [] and not (root / "export").exists()  # before the first step

    printed = signal_when(Process(inputs, root, compiled), signal.SIGTERM, lambda root: steps_done(root) >= 3)
    latest = saved(root)[-1]
    assert f"SIGTERM after step {latest} of 30, saved in {root}/checkpoints; give the same" in printed
    assert read_metrics(root / "metrics.jsonl")[-1]["step"] == latest >= 3
