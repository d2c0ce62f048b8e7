"""A reward of the user's own: found by its name, and held to one finite number for each sample."""

import numpy as np
import pytest

from jaxdpo.evaluate.reward_function import load_reward_function, rewards_of
from jaxdpo.types import InputError

SOURCE = """
import dataclasses

@dataclasses.dataclass
class Scale:
    by: float

def short(prompts, completions):
    return [-Scale(2.0).by * len(c) for c in completions]

ANSWER = 42
"""
PROMPTS, COMPLETIONS = ["a", "b", "c"], [" yes", " no", " perhaps"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(SOURCE)
    return path


def test_a_function_of_a_file(file):
    rewards = rewards_of(load_reward_function(f"{file}:short"), PROMPTS, COMPLETIONS)
    assert rewards.dtype == np.float64
    assert rewards.tolist() == [-8.0, -6.0, -16.0]


def test_a_function_of_an_installed_module():
    assert load_reward_function("math:fsum")([0.5, 0.25]) == 0.75


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "'short'; allowed: FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"),
        ("{file}:", "allowed: FILE.py:FUNCTION"),
        ("{file}:a b", "allowed: FILE.py:FUNCTION"),
        ("{file}:long", "has no function 'long'; allowed: Scale, short"),
        ("{file}:ANSWER", "has no function 'ANSWER'"),
        ("{file}x.py:short", "rewards.pyx.py does not exist"),
        ("no_such_module:f", "no_such_module cannot be imported .ModuleNotFoundError"),
        ("{broken}:f", "cannot be imported .ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_found(file, tmp_path, name, message):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(InputError, match=message):
        load_reward_function(name.format(file=file, broken=broken))


def on_no(prompts, completions):
    if " no" in completions:
        raise RuntimeError("no")
    return [0.0] * len(completions)


def on_several(prompts, completions):
    if len(completions) > 1:
        raise RuntimeError("one by one")
    return [0.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (on_no, "on_no raised RuntimeError: no on sample 1, prompt 'b' and completion ' no'; mend it"),
        (on_several, "on_several raised RuntimeError: one by one on all samples together, and on none alone"),
        (lambda prompts, completions: [0.0, float("nan"), 1.0], "returned nan for sample 1, prompt 'b' and completion"),
        (lambda prompts, completions: [0.0, 1.0, None], "returned None for sample 2, prompt 'c'"),
        (lambda prompts, completions: [0.0, "high", 1.0], "returned 'high' for sample 1"),
        (lambda prompts, completions: [0.0, 1.0], "returned 2 numbers for 3 samples; allowed: a list of one number"),
        (lambda prompts, completions: 1.0, "returned a single number for 3 samples"),
        (lambda prompts, completions: [[0.0]] * 3, "returned 3x1 numbers for 3 samples"),
    ],
)
def test_what_it_may_not_return(function, message):
    with pytest.raises(InputError, match=message):
        rewards_of(function, PROMPTS, COMPLETIONS)


def test_long_texts_are_shown_in_part():
    with pytest.raises(InputError) as raised:
        rewards_of(lambda prompts, completions: [float("inf")], ["x" * 1000], ["y"])
    assert f"{'x' * 200}…" in str(raised.value) and "x" * 201 not in str(raised.value)
