"""Whose directory it is: a run continues its own, and refuses any other by the option that differs."""

import dataclasses

import pytest

from jaxdpo.config import DPOConfig
from jaxdpo.options import flag
from jaxdpo.train.run_dir import MAY_DIFFER, RunDir, claim, read_yaml, stored_config, write_config
from jaxdpo.types import InputError


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def asked(run, **options):
    return DPOConfig(**{"model": "m", "data": "d.jsonl", "output_dir": str(run.root), **options})


def resolved(run, **options):
    """As a run writes it: nothing is left open."""
    chosen = {"epochs": 1, "dtype": "float32", "row_lengths": "64", "microbatch_tokens": 2048, "save_every": 5}
    return asked(run, **{**chosen, **options})


def begun(run, **options):
    """A run with a checkpoint."""
    write_config(run, resolved(run, **options))
    (run.checkpoints / "5").mkdir(parents=True)


def test_a_new_directory_is_anyones(run):
    assert claim(asked(run)) == asked(run)
    assert not run.root.exists()  # a command that is refused leaves nothing behind
    run.root.mkdir()
    assert claim(asked(run)) == asked(run)
    (run.root / "data").mkdir()  # what the quickstart puts there first
    assert claim(asked(run)) == asked(run)


def test_the_configuration_that_was_written_is_read_back(run):
    config = resolved(run, learning_rate=1e-6, eval_data="held out.jsonl", shuffle=False, model="päth: #1")
    write_config(run, config)
    assert stored_config(run, DPOConfig) == config
    assert "learning_rate: 1e-06\n" in run.config.read_text()
    assert [path.name for path in run.root.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_the_configuration_can_start_a_run_elsewhere(run, resume):
    write_config(run, resolved(run, resume=resume))
    assert stored_config(run, DPOConfig).resume == "auto"


def test_a_run_goes_on_with_what_it_has_chosen(run):
    begun(run)
    assert claim(asked(run)) == dataclasses.replace(resolved(run), epochs=None, save_every=None)


OTHERS = {
    "model": "other",
    "data": "other.jsonl",
    "format": "hh",
    "data_weights": "2",
    "eval_data": "other.jsonl",
    "max_length": 7,
    "attention": "dense",
    "shuffle": False,
    "loss": "hinge",
    "beta": 0.2,
    "label_smoothing": 0.2,
    "reference_free": True,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.2,
    "ld_alpha": 0.2,
    "use_weighting": True,
    "discopop_tau": 0.2,
    "simpo_gamma": 0.2,
    "alphapo_alpha": 0.2,
    "cpo_alpha": 0.2,
    "unlikelihood_alpha": 0.2,
    "desirable_weight": 0.2,
    "undesirable_weight": 0.2,
    "ref_model_sync_steps": 7,
    "ref_model_mixup_alpha": 0.2,
    "batch_size": 7,
    "optimizer": "adamw",
    "learning_rate": 0.2,
    "warmup_steps": 7,
    "max_grad_norm": 0.0,
    "dtype": "bfloat16",
    "row_lengths": "128",
    "microbatch_tokens": 7,
    "seed": 7,
}


def test_every_option_is_here_or_may_differ():
    names = {field.name for field in dataclasses.fields(DPOConfig)}
    assert set(OTHERS) | MAY_DIFFER | {"loss_weights"} == names  # which only several losses have
    assert not set(OTHERS) & MAY_DIFFER


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_by_the_option_that_differs(run, name):
    begun(run)
    with pytest.raises(InputError) as error:
        claim(asked(run, **{name: OTHERS[name]}))
    had = getattr(resolved(run), name)
    assert str(error.value) == (
        f"--output-dir {run.root} holds another run: {flag(name)} is {OTHERS[name]!r} here and {had!r} there; "
        "fix: give another --output-dir, or the options that run was started with"
    )


def test_held_out_data_cannot_be_dropped_silently(run):
    begun(run, eval_data="e.jsonl")
    with pytest.raises(InputError, match=r"--eval-data is None here and 'e\.jsonl' there"):
        claim(asked(run))


def test_all_differences_are_named(run):
    begun(run)
    with pytest.raises(InputError, match=r"--seed is 1 here and 0 there; --beta is 0.3 here and 0.1 there; fix"):
        claim(asked(run, beta=0.3, seed=1))


@pytest.mark.parametrize("options", [{"max_steps": 99}, {"epochs": 3}, {"save_every": 1}, {"resume": "must"}])
def test_what_changes_no_step_may_differ(run, options):
    begun(run)
    claimed = claim(asked(run, **options))
    assert {name: getattr(claimed, name) for name in options} == options


def test_never_refuses_a_run(run):
    begun(run)
    with pytest.raises(InputError, match=f"--resume never: {run.root} holds a run; fix: give another --output-dir, or"):
        claim(asked(run, resume="never"))


def test_must_refuses_a_directory_without_a_run(run):
    message = f"--resume must: {run.root} holds no run; fix: check --output-dir, or use --resume auto"
    with pytest.raises(InputError, match=message):
        claim(asked(run, resume="must"))
    write_config(run, resolved(run))
    with pytest.raises(InputError, match=message):
        claim(asked(run, resume="must"))


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_died_before_its_first_step_may_start_anew(run, resume):
    """Of too large a microbatch perhaps: other options are what its user wants to try."""
    write_config(run, resolved(run))
    run.checkpoints.mkdir()
    run.metrics.write_text('{"step": 0, "eval_loss": 0.69}\n')
    assert claim(asked(run, microbatch_tokens=64, resume=resume)).microbatch_tokens == 64


def test_a_run_with_steps_but_no_checkpoint_yet_is_a_run(run):
    write_config(run, resolved(run))
    run.metrics.write_text('{"step": 1, "loss": 0.69}\n{"step": 2, "lo')
    with pytest.raises(InputError, match="holds another run: --beta"):
        claim(asked(run, beta=0.3))


def test_a_run_that_was_killed_as_it_started_may_start_again(run):
    """Between the directory of checkpoints and config.yaml."""
    run.checkpoints.mkdir(parents=True)
    assert claim(asked(run)) == asked(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "export", "checkpoints/5"])
def test_another_programs_directory_is_refused(run, name):
    (run.root / name).mkdir(parents=True)
    with pytest.raises(
        InputError, match=f"holds {name.split('/')[0]} but no config.yaml, so it is another program's; fix"
    ):
        claim(asked(run))


def test_a_file_is_refused(run):
    run.root.touch()
    with pytest.raises(
        InputError, match=f"--output-dir {run.root} is a file; allowed: a directory, new or this run's own"
    ):
        claim(asked(run))


@pytest.mark.parametrize(
    "text, message",
    [
        ("beta: [", "config.yaml, line 1: not YAML "),
        ("- beta", "config.yaml holds no options; allowed: options by name, .*e.g. `beta: 0.1`"),
        ("", "config.yaml holds no options; allowed: options by name"),
        ("beta: 0.1\nbeta: 0.2", "config.yaml, line 2: not YAML .found duplicate key"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"(?s){message}"):
        read_yaml(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"model: \xff")
    with pytest.raises(InputError, match=r"config.yaml: not YAML \(.*0xff"):
        read_yaml(path)


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: 1e-6\nb: 1E3\nc: 010\nd: no\ne: 0.1\nf: null\ng:\nh: true\n")
    assert read_yaml(path) == {
        "a": 1e-6,
        "b": 1000.0,
        "c": 10,
        "d": "no",
        "e": 0.1,
        "f": None,
        "g": None,
        "h": True,
    }


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"x.yaml does not exist; allowed: a YAML file of options; fix: check the path"
    ):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize("name, value", [("ld_alpha", 0.5), ("label_smoothing", 0.3), ("ref_model_sync_steps", 4)])
def test_an_objective_cannot_be_dropped_silently(run, name, value):
    begun(run, **{name: value})
    with pytest.raises(InputError, match=f"{flag(name)} is None here and {value} there"):
        claim(asked(run))
