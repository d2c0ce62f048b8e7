import string

import numpy as np
import pytest

from jaxdpo.data import tokenize
from jaxdpo.data.encoding import EncodingFacts, encoding_facts
from jaxdpo.data.formats import Unusable
from jaxdpo.data.tokenize import tokenize_dataset, tokenize_preference
from jaxdpo.types import UNRANKED, InputError, Origin, Preference
from tests.data.toy_tokenizers import (
    BERT_LIKE,
    BOS,
    EOS,
    GPT2_LIKE,
    LLAMA_LIKE,
    NO_EOS,
    SMOLLM_LIKE,
    T5_LIKE,
    toy_tokenizer,
)

TOKENIZERS = {
    "smollm": (SMOLLM_LIKE, EncodingFacts(prefix=(), eos=EOS, empty_prompt=(BOS,))),
    "llama": (LLAMA_LIKE, EncodingFacts(prefix=(BOS,), eos=EOS, empty_prompt=(BOS,))),
    "gpt2": (GPT2_LIKE, EncodingFacts(prefix=(), eos=EOS, empty_prompt=(EOS,))),
    "t5": (T5_LIKE, EncodingFacts(prefix=(), eos=EOS, empty_prompt=(EOS,))),
    "prefix that is not its bos_token": (
        toy_tokenizer(bos=None, template="<bos> $A"),
        EncodingFacts(prefix=(BOS,), eos=EOS, empty_prompt=(BOS,)),
    ),
    "bert": (BERT_LIKE, EncodingFacts(prefix=(BOS,), eos=EOS, empty_prompt=(BOS,))),
}
each_tokenizer = pytest.mark.parametrize("tokenizer, facts", TOKENIZERS.values(), ids=TOKENIZERS)


def preference(prompt, *completions, line=1, **stated):
    return Preference(prompt, completions, Origin("data.jsonl", line), **stated)


def ids(text):
    return SMOLLM_LIKE(text)["input_ids"]


def as_lists(group):
    return [group.prompt.tolist(), *(completion.tolist() for completion in group.completions)]


@each_tokenizer
def test_encoding_facts(tokenizer, facts):
    assert encoding_facts(tokenizer) == facts


@each_tokenizer
def test_bos_stands_where_the_tokenizer_puts_it_and_eos_ends_every_completion(tokenizer, facts):
    group = tokenize_preference(preference("cat", " sat", " ran off"), tokenizer, 64)
    assert as_lists(group) == [[*facts.prefix, *ids("cat")], [*ids(" sat"), EOS], [*ids(" ran off"), EOS]]
    assert all(array.dtype == np.int32 for array in (group.prompt, *group.completions))
    assert not group.prompt_truncated and group.completions_truncated == (False, False)
    assert (group.slots, group.tokens) == (5 + 9, len(group.prompt) + 14)
    assert group.longest_path == len(group.prompt) + 9
    assert group.origin == Origin("data.jsonl", 1)


@each_tokenizer
def test_empty_prompt_has_a_predictor(tokenizer, facts):
    assert as_lists(tokenize_preference(preference("", "a", "b"), tokenizer, 64))[0] == list(facts.empty_prompt)


def test_bos_that_a_template_wrote_is_not_doubled():
    group = tokenize_preference(preference("<bos>cat", "a", "b"), LLAMA_LIKE, 64)
    assert as_lists(group)[0] == [BOS, *ids("cat")]


def test_eos_that_the_text_ends_in_is_not_doubled():
    group = tokenize_preference(preference("cat", "a<eos>", "b"), SMOLLM_LIKE, 64)
    assert as_lists(group)[1:] == [[*ids("a"), EOS], [*ids("b"), EOS]]


def test_no_merge_crosses_the_boundary():
    assert ids("th") != ids("t") + ids("h")
    group = tokenize_preference(preference("t", "h", "hth"), SMOLLM_LIKE, 64)
    assert as_lists(group) == [ids("t"), [*ids("h"), EOS], [*ids("h"), *ids("th"), EOS]]


LETTERS = string.ascii_lowercase.replace("t", "")  # one token each


@pytest.mark.parametrize("tokenizer", [SMOLLM_LIKE, LLAMA_LIKE], ids=["no prefix", "prefix"])
@pytest.mark.parametrize(
    ("prompt", "completions", "max_length", "kept_prompt", "kept_completions"),
    [
        # sizes in tokens: completions with their EOS, the prompt with the tokenizer's prefix
        pytest.param(4, (4, 3), 8, 4, (4, 3), id="fits exactly"),
        pytest.param(4, (4, 3), 7, 4, (3, 3), id="loses nothing but EOS"),
        pytest.param(10, (3, 2), 8, 5, (3, 2), id="long prompt: cut for the longest completion"),
        pytest.param(10, (10, 4), 8, 4, (4, 4), id="both long: half each"),
        pytest.param(10, (10, 4), 7, 4, (3, 3), id="odd: the prompt gets the odd token"),
        pytest.param(2, (10, 4), 8, 2, (6, 4), id="short prompt: its room goes to the completions"),
        pytest.param(10, (10, 9, 2, 3), 8, 4, (4, 4, 2, 3), id="ragged"),
        pytest.param(9, (2, 3), 4, 2, (2, 2), id="tiny"),
    ],
)
def test_over_long_paths(tokenizer, prompt, completions, max_length, kept_prompt, kept_completions):
    prefix = list(encoding_facts(tokenizer).prefix)
    prompt_text = LETTERS[: prompt - len(prefix)]
    texts = [LETTERS[i : i + size - 1] for i, size in enumerate(completions)]
    group = tokenize_preference(preference(prompt_text, *texts), tokenizer, max_length)

    kept_text = kept_prompt - len(prefix)
    assert group.prompt.tolist() == prefix + ids(prompt_text)[prompt - len(prefix) - kept_text :]  # keeps its end
    for ids_kept, text, size in zip(group.completions, texts, kept_completions, strict=True):
        assert ids_kept.tolist() == [*ids(text), EOS][:size]  # keeps its start
    assert group.prompt_truncated == (kept_prompt < prompt)
    assert group.completions_truncated == tuple(a < b for a, b in zip(kept_completions, completions, strict=True))
    assert group.longest_path <= max_length


def test_smallest_max_length_holds_the_prefix():
    group = tokenize_preference(preference("cat", "a", "b"), LLAMA_LIKE, 2)
    assert as_lists(group) == [[BOS], ids("a"), ids("b")]


def templated(*texts):
    return preference(*texts, templated=True)


@each_tokenizer
def test_nothing_is_added_to_what_a_template_wrote(tokenizer, facts):
    group = tokenize_preference(templated("cat", " sat", " ran<eos>"), tokenizer, 64)
    assert as_lists(group) == [ids("cat"), ids(" sat"), [*ids(" ran"), EOS]]


@each_tokenizer
def test_what_a_template_wrote_first_stands_once(tokenizer, facts):
    group = tokenize_preference(templated("<bos>cat", "a", "b"), tokenizer, 64)
    assert as_lists(group) == [[BOS, *ids("cat")], ids("a"), ids("b")]


@each_tokenizer
def test_an_empty_prompt_of_a_template_has_a_predictor(tokenizer, facts):
    assert as_lists(tokenize_preference(templated("", "a", "b"), tokenizer, 64)) == [
        list(facts.empty_prompt),
        ids("a"),
        ids("b"),
    ]


def test_the_prefix_that_a_template_wrote_is_not_cut():
    prompt = "<bos>" + LETTERS[:9]
    group = tokenize_preference(templated(prompt, "abc", "ab"), LLAMA_LIKE, 8)
    assert as_lists(group) == [[BOS, *ids(LETTERS[5:9])], ids("abc"), ids("ab")] and group.prompt_truncated
    group = tokenize_preference(templated(prompt, "abc", "ab"), SMOLLM_LIKE, 8)  # no prefix of its own
    assert as_lists(group)[0] == ids(LETTERS[4:9])


@pytest.mark.parametrize(
    ("tokenizer", "item", "expected"),
    [
        (SMOLLM_LIKE, preference("cat", " sat"), [[BOS], [*ids("cat"), *ids(" sat"), EOS]]),
        (GPT2_LIKE, preference("cat", " sat"), [[EOS], [*ids("cat"), *ids(" sat"), EOS]]),
        (LLAMA_LIKE, preference("cat", " sat"), [[BOS], [*ids("cat"), *ids(" sat"), EOS]]),
        (LLAMA_LIKE, preference("t", "h"), [[BOS], [*ids("t"), *ids("h"), EOS]]),
        (LLAMA_LIKE, preference("", "sat"), [[BOS], [*ids("sat"), EOS]]),
        (LLAMA_LIKE, templated("<bos>cat", " sat"), [[BOS], [*ids("cat"), *ids(" sat")]]),
        (SMOLLM_LIKE, templated("<bos>cat", " sat"), [[BOS], [*ids("cat"), *ids(" sat")]]),
        (LLAMA_LIKE, templated("cat", " sat"), [ids("c"), [*ids("at"), *ids(" sat")]]),
        (SMOLLM_LIKE, preference("t", "h", "e"), [[BOS], [*ids("t"), *ids("h"), EOS], [*ids("te"), EOS]]),
    ],
)
def test_the_prompt_can_be_scored_too(tokenizer, item, expected):
    (group,) = tokenize_dataset([item], tokenizer, 64, score_prompt=True).groups
    assert as_lists(group) == expected


def test_a_scored_prompt_keeps_the_start_of_the_path():
    (group,) = tokenize_dataset([preference("abcdef", "gh")], LLAMA_LIKE, 6, score_prompt=True).groups
    assert as_lists(group) == [[BOS], ids("abcde")]
    assert (group.prompt_truncated, group.completions_truncated) == (False, (True,))


def test_the_best_completion_alone():
    preferences = [
        preference("x", "a", "b", line=1, margin=2),
        preference("x", "c", "d", "e", line=2, ranks=(0, 0, 1)),
        preference("x", "f", line=3, label=True),
        preference("x", "g", line=4, label=False),
        preference("x", "h", line=5),
        preference("x", "long one", "long one too", line=6),
    ]
    dataset = tokenize_dataset(preferences, SMOLLM_LIKE, 8, use="imitate")
    assert [as_lists(group)[1:] for group in dataset.groups[:4]] == [[[*ids(text), EOS]] for text in "acfh"]
    assert {(group.ranks, group.label, group.margin) for group in dataset.groups} == {(None, None, None)}
    assert [group.origin.number for group in dataset.groups] == [1, 2, 3, 5, 6]
    assert dataset.candidates == 1 and not dataset.labelled
    assert dataset.dropped.first == [
        (Origin("data.jsonl", 4), "the completion is a bad one, and only the best are asked for")
    ]


def test_margins_come_through():
    preferences = [preference("x", "a", "b", margin=margin) for margin in (None, 0.1, -3.0)]
    dataset = tokenize_dataset(preferences, SMOLLM_LIKE, 8)
    assert [group.margin for group in dataset.groups] == [None, 0.1, -3.0]
    assert dataset.has_margins and not tokenize_dataset(preferences[:1], SMOLLM_LIKE, 8).has_margins


def test_a_call_of_the_tokenizer_is_bounded_in_records_and_in_text(monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK", 3)
    monkeypatch.setattr(tokenize, "CHUNK_CHARACTERS", 20)
    items = [preference("p", "a" * size, "b", line=line) for line, size in enumerate([1, 1, 1, 1, 30, 1, 17, 1], 1)]
    assert [[item.origin.number for item in chunk] for chunk in tokenize.chunks(items)] == [
        [1, 2, 3],
        [4, 5],
        [6, 7],
        [8],
    ]


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_max_length_too_small(max_length):
    with pytest.raises(InputError, match=f"max_length={max_length} cannot hold .* allowed: at least 2"):
        tokenize_preference(preference("cat", "a", "b"), SMOLLM_LIKE, max_length)


def test_completions_that_become_identical_are_unusable():
    with pytest.raises(Unusable, match="two completions are equal once they are cut"):
        tokenize_preference(preference("x" * 9, "same start", "same end"), SMOLLM_LIKE, 8)


def test_completion_of_eos_alone_is_unusable():
    with pytest.raises(Unusable, match="a completion has no tokens"):
        tokenize_preference(preference("cat", "a", "<eos>"), SMOLLM_LIKE, 8)


def test_tokenizer_without_eos():
    with pytest.raises(InputError, match=r"the tokenizer has no EOS token.*set eos_token"):
        tokenize_dataset([preference("cat", "a", "b")], NO_EOS, 8)


class Fixed:
    """A tokenizer that says the same of every text."""

    bos_token_id, eos_token_id = None, EOS

    def __init__(self, plain, whole):
        self.plain, self.whole = plain, whole

    def __call__(self, text, **options):
        return {"input_ids": self.whole if isinstance(text, str) else [self.plain for _ in text]}


@pytest.mark.parametrize("tokenizer", [Fixed([], [BOS]), Fixed([5, 6], [BOS, 7])], ids=["no ids", "other ids"])
def test_tokenizer_that_cannot_be_understood(tokenizer):
    with pytest.raises(InputError, match="the tokenizer encodes 'Hello world' as"):
        encoding_facts(tokenizer)


def test_dataset_is_its_preferences_one_by_one(monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK", 3)
    preferences = [
        preference("p" * n, *("abc"[k] * (n + k + 1) for k in range(1 + n % 3)), line=n + 1) for n in range(10)
    ]
    done = []
    dataset = tokenize_dataset(preferences, LLAMA_LIKE, 12, progress=done.append)
    one_by_one = [tokenize_preference(item, LLAMA_LIKE, 12) for item in preferences]
    assert [as_lists(group) for group in dataset.groups] == [as_lists(group) for group in one_by_one]
    assert done == [3, 3, 3, 1]
    assert len(dataset) == 10 and dataset.candidates == 3
    assert dataset.tokens.tolist() == [group.tokens for group in one_by_one]
    assert dataset.slots.tolist() == [group.slots for group in one_by_one]
    assert max(group.longest_path for group in dataset.groups) == 12


def test_dataset_counts_what_was_cut_and_names_what_was_dropped():
    preferences = [
        preference("abc", "d", "e", line=1),
        preference("x" * 9, "same start", "same end", line=2),
        preference("x" * 9, "long one", "other", line=4),
        preference("x" * 9, "d", "<eos>", line=5),
    ]
    dataset = tokenize_dataset(preferences, SMOLLM_LIKE, 8)
    assert [group.origin.number for group in dataset.groups] == [1, 4]
    assert dataset.dropped.first == [
        (Origin("data.jsonl", 2), "two completions are equal once they are cut"),
        (Origin("data.jsonl", 5), "a completion has no tokens"),
    ]
    assert (dataset.truncated_prompts, dataset.truncated_completions) == (1, 2)
    assert dataset.summary() == (
        f"2 groups, {3 + 2 + 2 + 4 + 4 + 4} tokens of which {2 + 2 + 4 + 4} are scored, "
        "1 prompts lost their beginning, 2 completions lost their end, "
        "dropped 2: row 1 (line 2): two completions are equal once they are cut; "
        "row 4 (line 5): a completion has no tokens"
    )


def test_ranks_come_through():
    preferences = [
        preference("x", "a", "b"),
        preference("x", "a", "b", "c", ranks=(0, 0, UNRANKED)),
        preference("x", "a", "b", "c", "d"),
    ]
    dataset = tokenize_dataset(preferences, SMOLLM_LIKE, 8)
    assert [group.ranks for group in dataset.groups] == [None, (0, 0, UNRANKED), None]
    assert [group.candidate_ranks for group in dataset.groups] == [(0, 1), (0, 0, UNRANKED), (0, 1, 2, 3)]
    assert dataset.has_ranks and not dataset.labelled
    assert dataset.candidates == 4
    assert not tokenize_dataset(preferences[::2], SMOLLM_LIKE, 8).has_ranks


def test_labels_come_through():
    judged = [preference("x", text, label=text == "a") for text in "aba"]
    dataset = tokenize_dataset([*judged, preference("x", "long" * 9, label=True)], SMOLLM_LIKE, 8)
    assert [group.label for group in dataset.groups] == [True, False, True, True]
    assert [group.candidate_ranks for group in dataset.groups] == [(0,)] * 4
    assert dataset.labelled and not dataset.has_ranks
    assert dataset.candidates == 1
    assert (
        "4 groups, 3 of them good, 17 tokens of which 13 are scored, 0 prompts lost their beginning, 1 completions"
        in dataset.summary()
    )


@pytest.mark.parametrize("turn", [1, -1])
def test_judged_and_compared_completions_do_not_mix(turn):
    preferences = [preference("x", "a", line=1, label=False), preference("x", "a", "b", line=2)][::turn]
    got, first = (item.label for item in preferences[::-1])
    complaint = f"{preferences[1].origin}: label is {got}, but {first} in {preferences[0].origin};"
    with pytest.raises(InputError, match=complaint):
        tokenize_dataset(preferences, SMOLLM_LIKE, 8)


def test_dataset_without_a_usable_preference():
    complaint = r"none of 1 preferences is usable .* row 6 \(line 7\): a completion has no tokens"
    with pytest.raises(InputError, match=complaint):
        tokenize_dataset([preference("x", "d", "<eos>", line=7)], SMOLLM_LIKE, 8)


def test_truncation_and_padding_saved_with_a_tokenizer_do_not_apply():
    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=20, pad_id=EOS)
    group = tokenize_preference(preference("longer than three", "a", "bb"), tokenizer, 64)
    assert as_lists(group) == [ids("longer than three"), [*ids("a"), EOS], [*ids("bb"), EOS]]
