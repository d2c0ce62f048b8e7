"""`--profile FIRST:LAST`: what is written, what is refused, and that a run outlives a trace that cannot be made."""

import re
import warnings

import jax
import pytest

from jaxdpo import plots
from jaxdpo.config import DPOConfig
from jaxdpo.train.dpo import run_dpo
from jaxdpo.train.profile import Profile, steps_to_profile
from jaxdpo.train.run_dir import read_yaml
from jaxdpo.train.writer import read_metrics
from jaxdpo.types import InputError

RECIPE = {"batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0}


def traced(directory):
    """The steps that the traces in a directory hold, trace by trace."""
    return [steps_of(path) for path in sorted(directory.rglob("*.xplane.pb"))]


def steps_of(path):
    data = jax.profiler.ProfileData.from_file(str(path))
    events = (event for plane in data.planes for line in plane.lines for event in line.events if event.name == "train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as an error, one that jax 0.12's bindings raise ends the process
        return [dict(event.stats)["step_num"] for event in events]


def test_steps_of_a_run_are_traced_and_the_same_command_goes_on(inputs, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(plots, "save_curves", lambda *args, **options: None)
    root = tmp_path / "run"
    rest = {"model": str(inputs.model), "data": str(inputs.data), "output_dir": str(root), "max_length": 64}

    def run(profile, steps):
        result = run_dpo(DPOConfig(**rest, **RECIPE, profile=profile, max_steps=steps), devices=jax.devices()[:1])
        return result, capfd.readouterr()

    result, printed = run("2:3", 3)
    assert traced(root / "profile") == [[2, 3]]
    assert f"\nprofile    {root}/profile: look at it with xprof --logdir {root}/profile\n" in printed.out
    assert "warning" not in printed.err  # of a program that was compiled for a known shape
    spent = result.usage.spent
    assert 0 < spent["step"] < sum(spent.values()) < result.seconds and spent["redone"] == 0
    assert min(spent[phase] for phase in ("start", "reference", "compilation", "checkpoint", "logging")) > 0

    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4}\n')  # that step was done, but not saved
    # A scheduler gives the same command again, however far the run is.
    result, printed = run("2:3", 4)
    assert "profile    steps up to 3 are done, and not traced again\n" in printed.out
    assert len(traced(root / "profile")) == 1
    rows = read_metrics(root / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["seconds/step"] > 0 == rows[-1]["goodput"]
    assert result.usage.goodput == result.usage.spent["step"] == 0 < result.usage.spent["redone"]

    with pytest.raises(InputError, match="--profile is 3:5; allowed: steps from 5 to 5, which this run takes; name"):
        run("3:5", 5)
    with pytest.raises(InputError, match="--profile is 6:7; allowed: steps from 1 to 6"):
        run("6:7", 6)
    assert read_yaml(root / "config.yaml")["profile"] == "2:3" and len(read_metrics(root / "metrics.jsonl")) == 4


def config(text):
    return DPOConfig(model="m", data="d", output_dir="o", profile=text)


@pytest.mark.parametrize("text, steps", [("10:13", range(10, 14)), ("1:1", range(1, 2))])
def test_both_ends_are_included(text, steps):
    assert config(text).profiled_steps == steps


@pytest.mark.parametrize("text", ["", "10", ":", "10:", ":13", "0:3", "13:10", "a:b", "1:2:3", "-1:2", "1.0:2", "٣:٤"])
def test_other_texts_are_refused(text):
    with pytest.raises(InputError, match=re.escape(f"--profile is {text!r}; allowed: FIRST:LAST, steps from 1, as ")):
        config(text)


@pytest.mark.parametrize("start, total, allowed", [(0, 9, "steps from 1 to 9"), (4, 20, "steps from 5 to 20")])
def test_steps_that_a_run_does_not_take_are_refused(start, total, allowed):
    with pytest.raises(InputError, match=f"--profile is 4:10; allowed: {allowed}, which this run takes; name some"):
        steps_to_profile(range(4, 11), start, total)


def test_a_run_that_is_done_takes_none():
    with pytest.raises(InputError, match="--profile is 4:10; allowed: none, as all steps are done"):
        steps_to_profile(range(4, 11), 20, 20)


def test_a_run_that_goes_on_traces_what_is_left(capsys):
    assert steps_to_profile(range(4, 11), 6, 20, again=True) == range(7, 11)
    assert capsys.readouterr().out == "profile    steps up to 6 are done, and not traced again\n"
    assert steps_to_profile(range(4, 11), 3, 20) == range(4, 11)
    assert not steps_to_profile(range(0), 6, 20)
    assert capsys.readouterr().out == ""


def test_a_trace_that_is_cut_short_is_written(tmp_path):
    profile = Profile(tmp_path, range(1, 4))
    profile.begin(1)
    with jax.profiler.StepTraceAnnotation("train", step_num=1):
        pass
    profile.end(1)
    assert traced(tmp_path) == []
    profile.close()
    profile.close()
    assert traced(tmp_path) == [[1]]


def test_a_trace_that_cannot_be_made_ends_no_run(tmp_path, monkeypatch, capsys):
    late, lost = Profile(tmp_path / "late", range(1, 2)), Profile(tmp_path / "lost", range(1, 2))
    with jax.profiler.trace(tmp_path / "other"):  # there can be one at a time
        late.begin(1)
        late.end(1)
    assert re.fullmatch(r"\nwarning +--profile failed \(Profile .+\); the run goes on\n", capsys.readouterr().err)

    def full(stop=jax.profiler.stop_trace):
        stop()
        raise OSError("no space left")

    lost.begin(1)
    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    lost.end(1)
    lost.close()
    assert capsys.readouterr() == ("", "\nwarning    --profile failed (no space left); the run goes on\n")
