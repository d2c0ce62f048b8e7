"""The embedded preference set is what the quickstart says it is."""

import importlib.resources
import json

import numpy as np
import pytest

from jaxdpo.data.load import load_dataset
from jaxdpo.data.reading import read_preferences
from jaxdpo.hf import load_tokenizer
from jaxdpo.hub import resolve_model
from jaxdpo.train.quickstart import HELD_OUT, WHEEL, write_data
from jaxdpo.types import InputError


@pytest.fixture(scope="module")
def pairs():
    text = importlib.resources.files("jaxdpo").joinpath("data/quickstart.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_two_hundred_and_forty_distinct_pairs(pairs):
    assert len(pairs) == 240
    for field in ("prompt", "chosen", "rejected"):
        assert len({pair[field] for pair in pairs}) == 240


def test_length_does_not_tell_chosen_from_rejected(pairs):
    """Tone is the one axis: a rule that prefers the longer answer is right about half of the time."""
    difference = np.array([len(pair["chosen"]) - len(pair["rejected"]) for pair in pairs])
    mean = np.mean([len(pair["chosen"]) for pair in pairs])
    assert abs(difference.mean()) < 0.05 * mean
    assert 0.45 < (difference > 0).mean() + 0.5 * (difference == 0).mean() < 0.55


def test_held_out_pairs_are_the_last_ones_and_share_no_prompt(tmp_path, pairs):
    train, held_out = (list(read_preferences(str(path))) for path in write_data(tmp_path))
    assert (len(train), len(held_out)) == (240 - HELD_OUT, HELD_OUT)
    assert [preference.prompt for preference in held_out] == [pair["prompt"] for pair in pairs[-HELD_OUT:]]


def test_trees_have_at_most_eighty_tokens(tmp_path, smollm2):
    for path in write_data(tmp_path):
        dataset = load_dataset(str(path), load_tokenizer(smollm2), 128).dataset
        assert dataset.tokens.max() <= 80
        assert not dataset.truncated_prompts and not dataset.truncated_completions


@pytest.fixture(scope="module")
def smollm2():
    try:
        return resolve_model(WHEEL)
    except InputError as error:
        pytest.skip(f"SmolLM2 is not to be had: run `jaxdpo quickstart` once while online ({error})")
