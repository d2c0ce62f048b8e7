import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdpo.data import partners
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.groups import TokenizedGroup
from jaxdpo.data.partners import _left, with_partners
from jaxdpo.data.pipeline import microbatches
from jaxdpo.data.tokenize import tokenize_dataset
from jaxdpo.types import UNRANKED, InputError, Origin, Preference, check_batch
from tests import tiny
from tests.data.toy_tokenizers import EOS, SMOLLM_LIKE
from tests.data.trees import expected_paths, read_paths

LONG = 64


def judged(*texts, truncated=False):
    """Labelled groups of `prompt|completion`, one token per letter."""
    groups = []
    for line, text in enumerate(texts, start=1):
        prompt, completion = (np.array([ord(letter) for letter in part], np.int32) for part in text.split("|"))
        groups.append(
            TokenizedGroup(prompt, (completion,), truncated, (truncated,), Origin("data.jsonl", line), label=True)
        )
    return TokenizedDataset.of(groups)


def written(dataset):
    """The groups as `prompt|completion|partner`."""
    return ["|".join("".join(map(chr, part)) for part in (g.prompt, *g.completions)) for g in dataset.groups]


@pytest.mark.parametrize(
    ("groups", "partnered"),
    [
        (["p|a", "q|b", "r|c"], ["p|a|b", "q|b|c", "r|c|a"]),
        (["p|a", "p|b", "q|c"], ["p|a|c", "p|b|c", "q|c|a"]),
        (["p|a", "q|a", "r|b"], ["p|a|b", "q|a|b", "r|b|a"]),
        (["p|a", "q|b", "p|c"], ["p|a|b", "q|b|c", "p|c|b"]),
        (["p|a", "p|b", "q|a", "q|b"], ["p|a|b", "p|b|a", "q|a|b", "q|b|a"]),
        (["p|a", "p|a", "q|b", "q|b"], ["p|a|b", "p|a|b", "q|b|a", "q|b|a"]),
    ],
    ids=["the next", "not of its prompt", "not its completion", "around the end", "neither", "repeated"],
)
def test_partner_is_the_next_with_another_prompt_and_another_completion(groups, partnered):
    assert written(with_partners(judged(*groups), LONG)) == partnered


@pytest.mark.parametrize(
    ("max_length", "partnered"),
    [
        (9, ["pqrs|a|bcdef", "t|bcdef|a"]),
        (8, ["pqrs|a|bcde", "t|bcdef|a"]),
        (5, ["pqrs|a|b", "t|bcdef|a"]),
        (4, ["pqrs|a|b", "t|bcdef|a"]),
    ],
    ids=["fits", "cut", "one token", "still one token"],
)
def test_partner_is_cut_at_its_end_and_the_prompt_never(max_length, partnered):
    assert written(with_partners(judged("pqrs|a", "t|bcdef"), max_length)) == partnered


def test_a_completion_that_is_the_same_once_cut_is_no_partner():
    assert written(with_partners(judged("pq|a", "r|ab", "s|cd"), 3)) == ["pq|a|c", "r|ab|cd", "s|cd|a"]


def test_what_a_partner_leaves_as_it_is():
    data = judged("p|a", "q|b", truncated=True)
    made = with_partners(data, LONG)
    for before, after in zip(data.groups, made.groups, strict=True):
        np.testing.assert_array_equal(after.completions[0], before.completions[0])
        assert (after.label, after.origin, after.ranks) == (before.label, before.origin, None)
        assert after.completions_truncated == (True, False) and after.prompt_truncated
        assert after.candidate_ranks == (0, UNRANKED)
    assert made.tokens.tolist() == [3, 3] and made.slots.tolist() == [2, 2]
    assert (made.truncated_prompts, made.truncated_completions) == (2, 2)
    assert made.labelled and not made.has_ranks
    assert written(with_partners(made, LONG)) == written(made)
    assert made.arrays.ids is data.arrays.ids


GROUPS = st.lists(
    st.tuples(st.text("pq", min_size=1, max_size=3), st.text("ab", min_size=1, max_size=3)), min_size=1, max_size=20
)


@settings(deadline=None)
@given(GROUPS, st.integers(4, 6))
def test_search_is_the_plain_one(groups, max_length):
    groups = [(prompt, completion[: max_length - len(prompt)]) for prompt, completion in groups]
    expected = []
    for i, (prompt, own) in enumerate(groups):
        others = [
            (other_prompt, completion[: max_length - len(prompt)])
            for other_prompt, completion in groups[i + 1 :] + groups[:i]
        ]
        fitting = [partner for other_prompt, partner in others if other_prompt != prompt and partner != own]
        expected.append(f"{prompt}|{own}|{fitting[0]}" if fitting else None)
    data = judged(*map("|".join, groups))
    if None in expected:
        with pytest.raises(InputError, match=f"^data.jsonl, line {expected.index(None) + 1}: no other record has both"):
            with_partners(data, max_length)
    else:
        assert written(with_partners(data, max_length)) == expected


@pytest.mark.parametrize("groups", [["p|a"], ["p|a", "p|b", "p|c"], ["p|a", "q|a"]])
def test_a_group_without_partner_is_an_error_that_names_its_line(groups):
    message = r"^data\.jsonl, line 1: no other record has .*; allowed: at least two prompts with different completions"
    with pytest.raises(InputError, match=message):
        with_partners(judged(*groups), LONG)


def test_only_labelled_completions_have_partners():
    with pytest.raises(
        InputError, match=r"^these groups compare completions; allowed: single completions with a label"
    ):
        with_partners(tiny.dataset(groups=3), LONG)


@pytest.mark.parametrize(
    ("letters", "left"),
    [
        ("aabcc", [2, 1, 1, 2, 1]),
        ("abbaa", [1, 2, 1, 3, 2]),
        ("ab", [1, 1]),
        ("aaa", [3, 3, 3]),
        ("a", [1]),
    ],
)
def test_runs_are_cyclic(letters, left):
    assert _left(np.array([ord(letter) for letter in letters])).tolist() == left


def test_a_long_run_of_one_completion_is_passed_at_once(monkeypatch):
    rounds, search = [], partners._same_when_cut
    monkeypatch.setattr(partners, "_same_when_cut", lambda *args: rounds.append(1) or search(*args))
    made = with_partners(judged(*(f"{i}|a" for i in range(300)), "p|b"), LONG)
    assert written(made)[:2] == ["0|a|b", "1|a|b"] and written(made)[-1] == "p|b|a"
    assert len(rounds) <= 2  # one by one: 300


def test_batches_of_partners_from_text():
    texts = [("Is 1 fine?", " yes", True), ("Is 2 fine?", " no", False), ("3?", " yes" * 9, True)]
    preferences = [
        Preference(prompt, (text,), Origin("data.jsonl", line), label=label)
        for line, (prompt, text, label) in enumerate(texts, start=1)
    ]
    data = with_partners(tokenize_dataset(preferences, SMOLLM_LIKE, 24), 24)
    ids = [SMOLLM_LIKE(text)["input_ids"] + [EOS] for _, text, _ in texts]
    assert (
        [[part.tolist() for part in group.completions] for group in data.groups]
        == [
            [ids[0], ids[1]],
            [ids[1], ids[2][:14]],  # 24 less a prompt of 10
            [ids[2][:22], ids[0]],
        ]
    )
    assert data.truncated_completions == 1
    batches = microbatches(data, [0, 1, 2], tiny.layout(data))
    paths = {}
    for batch in batches:
        check_batch(batch)
        paths |= read_paths(batch)
    assert paths == expected_paths(data, [0, 1, 2])
    assert [paths[i, 0].label for i in range(3)] == [1.0, 0.0, 1.0]
    assert {paths[i, 1].rank for i in range(3)} == {UNRANKED}
