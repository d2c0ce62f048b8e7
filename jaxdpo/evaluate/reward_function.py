"""Any Python function as a reward, named `FILE.py:FUNCTION` or `PACKAGE.MODULE:FUNCTION`.

It is called by keyword with lists of texts, as TRL calls its reward functions, and returns one number for each:

    def short(prompts, completions):
        return [-len(completion) for completion in completions]

A function that fails is the user's own to mend, so errors show the sample that it failed on.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from jaxdpo.types import InputError

RewardFunction = Callable[..., Sequence[float]]
"""`(prompts=texts, completions=texts) -> a number for each`."""
SHOWN = 200
"""Characters of a text that an error shows."""


def load_reward_function(name: str) -> RewardFunction:
    """The function that `FILE.py:FUNCTION` or `PACKAGE.MODULE:FUNCTION` names; InputError if there is none."""
    where, colon, attribute = name.rpartition(":")
    if not (colon and where and attribute.isidentifier()):
        raise InputError(
            f"the reward is {name!r}; allowed: FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, as rewards.py:positive"
        )
    try:
        module = _module_of_file(Path(where).expanduser()) if where.endswith(".py") else importlib.import_module(where)
    except InputError:
        raise
    except Exception as error:  # whatever the module does when it is imported
        raise InputError(
            f"the reward {name}: {where} cannot be imported ({_said(error)}); mend it, or name another"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(
            f"the reward {name}: {where} has no function {attribute!r}; allowed: {', '.join(there) or 'it has none'}"
        )
    return function


def rewards_of(function: RewardFunction, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
    """The function's rewards of samples, float64 `[samples]`, checked.

    Args:
      function: as `load_reward_function` gives it.
      prompts: of each sample.
      completions: of each sample, the same number.
    Raises:
      InputError: if the function raises, or does not return a finite number for each sample; shows the sample.
    """
    try:
        returned = function(prompts=list(prompts), completions=list(completions))
    except Exception as error:
        culprit = _culprit(function, prompts, completions)
        shown = "all samples together, and on none alone" if culprit is None else _sample(prompts, completions, culprit)
        raise InputError(f"the reward function {_name(function)} raised {_said(error)} on {shown}; mend it") from error
    try:
        rewards = np.asarray(returned, np.float64)
    except (TypeError, ValueError):
        rewards = np.array([_number(value) for value in returned], np.float64)
    if rewards.shape != (len(completions),):
        raise InputError(
            f"the reward function {_name(function)} returned {_count(rewards)} for "
            f"{len(completions)} samples; allowed: a list of one number for each"
        )
    for number in np.flatnonzero(~np.isfinite(rewards))[:1]:
        raise InputError(
            f"the reward function {_name(function)} returned {list(returned)[number]!r} for "
            f"{_sample(prompts, completions, int(number))}; allowed: a finite number"
        )
    return rewards


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"the reward's file {path} does not exist; allowed: a Python file; check the path")
    spec = importlib.util.spec_from_file_location(f"_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look there
    spec.loader.exec_module(module)
    return module


def _culprit(function: RewardFunction, prompts: Sequence[str], completions: Sequence[str]) -> int | None:
    """The first sample that the function raises on alone; None if it does so only on several."""
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        try:
            function(prompts=[prompt], completions=[completion])
        except Exception:
            return number
    return None


def _number(value: object) -> float:
    """NaN for what is no number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _count(rewards: np.ndarray) -> str:
    return f"{'x'.join(map(str, rewards.shape))} numbers" if rewards.ndim else "a single number"


def _sample(prompts: Sequence[str], completions: Sequence[str], number: int) -> str:
    """A sample as errors show it."""

    def shown(text: str) -> str:
        return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")

    return f"sample {number}, prompt {shown(prompts[number])} and completion {shown(completions[number])}"


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", repr(function))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
