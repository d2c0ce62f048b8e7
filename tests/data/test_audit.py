"""Every kind of finding is found where it is, named, and not where it is not."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxdpo.data.audit import MESSAGES, REASONS, Audit
from jaxdpo.data.audit_text import SUMMARY_LINES, report, summary
from jaxdpo.data.boundary import differs_jointly
from jaxdpo.data.findings import KINDS, RULES, TextChecks
from jaxdpo.data.tokenize import tokenize_preference
from jaxdpo.types import UNRANKED, Origin, Preference
from tests.data.toy_tokenizers import BERT_LIKE, GPT2_LIKE, LLAMA_LIKE, SMOLLM_LIKE

TOKENIZERS = [SMOLLM_LIKE, LLAMA_LIKE, GPT2_LIKE, BERT_LIKE]


def pair(line=1, prompt="Q:", chosen=" yes.", rejected=" no.", **rest):
    return Preference(prompt, (chosen, rejected), Origin("a.jsonl", line), **rest)


def audited(*preferences, tokenizer=None, max_length=64):
    audit = Audit(tokenizer)
    for item in preferences:
        audit.see(item, None if tokenizer is None else tokenize_preference(item, tokenizer, max_length))
    return audit


def found(audit, **options):
    """`kind -> (severity, count, records)`."""
    findings = audit.result(**options)["findings"]
    return {item["kind"]: (item["severity"], item["count"], item["records"]) for item in findings}


CLEAN = [pair(line, f"{line}+{line}=", f" {2 * line}.", f" {3 * line}.") for line in range(1, 40)]


@pytest.mark.parametrize("tokenizer", [None, *TOKENIZERS])
def test_nothing_is_found_in_clean_data(tokenizer):
    result = audited(*CLEAN, tokenizer=tokenizer).result()
    assert result["findings"] == []
    assert result["records"] == result["used"] == result["kinds"]["pairs"] == len(CLEAN)
    assert result["unit"] == ("words" if tokenizer is None else "tokens")
    assert report(result)[-1] == "found      nothing to complain about"


# What one text has.


@pytest.mark.parametrize(
    "kind, change",
    [
        ("role_marker", {"chosen": " yes\n\nHuman: why?"}),
        ("role_marker", {"rejected": "<|im_start|>user\nwhy?"}),
        ("role_marker", {"rejected": " no [INST] why?"}),
        ("role_marker", {"rejected": " no\n### Instruction: go on"}),
        ("role_marker", {"chosen": "Assistant: yes"}),
        ("prompt_ends_in_space", {"prompt": "Q: "}),
        ("prompt_ends_in_space", {"prompt": "Q:\u00a0"}),
        ("control_character", {"prompt": "Q\x00:"}),
        ("control_character", {"chosen": " yes\x1b[0m"}),
        ("control_character", {"rejected": " no\x85"}),
        ("replacement_character", {"chosen": " \ufffd"}),
        ("invisible_character", {"rejected": " n\u200bo"}),
        ("invisible_character", {"prompt": "Q\u202e:"}),
        ("begins_with_bos", {"prompt": "<bos>Q:"}),
        ("ends_with_eos", {"chosen": " yes<eos>"}),
        ("special_token_in_prompt", {"prompt": "Q<eos>:"}),
        ("special_token_in_prompt", {"prompt": "<bos><bos>"}),
        ("special_token_in_completion", {"rejected": " n<bos>o"}),
        ("special_token_in_completion", {"rejected": " no<eos><eos>"}),
    ],
)
def test_what_a_text_has(kind, change):
    checks = TextChecks(SMOLLM_LIKE)
    assert kind in checks(pair(**change))
    assert kind not in checks(pair())
    assert found(audited(pair(7, **change), tokenizer=SMOLLM_LIKE))[kind] == (
        KINDS[kind].severity,
        1,
        ["a.jsonl, line 7"],
    )


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "\n\nHuman: Hi\n\nAssistant:"},
        {"prompt": "Q:\n"},
        {"prompt": ""},
        {"prompt": "\tQ\r\n:"},
        {"chosen": " the User: said"},
        {"chosen": " 👩‍👩‍👧 می‌خواهم"},  # joined by U+200D and U+200C
        {"chosen": " <b>"},
    ],
)
def test_what_is_no_finding(change):
    assert TextChecks(SMOLLM_LIKE)(pair(**change)) == set()


def test_special_tokens_of_a_chat_template_are_no_finding():
    written = pair(prompt="<bos>Q <eos>", chosen="yes<eos>", rejected="n<bos>o<eos>", templated=True)
    assert TextChecks(SMOLLM_LIKE)(written) == set()
    assert TextChecks(SMOLLM_LIKE)(dataclasses.replace(written, templated=False)) == {
        "begins_with_bos",
        "ends_with_eos",
        "special_token_in_prompt",
        "special_token_in_completion",
    }


# Records that repeat and contradict.


def test_duplicates_name_both_records():
    audit = audited(*CLEAN, pair(90, "1+1=", " 2.", " 3."), pair(91, "1+1=", " 2.", " 3."))
    assert found(audit) == {
        "duplicate": ("warning", 2, ["a.jsonl, line 90: see a.jsonl, line 1", "a.jsonl, line 91: see a.jsonl, line 1"])
    }


@pytest.mark.parametrize("change", [{"prompt": "1+1= "}, {"chosen": " 2"}, {"rejected": " 4."}])
def test_other_texts_are_no_duplicates(change):
    one = {"prompt": "1+1=", "chosen": " 2.", "rejected": " 3."}
    assert not {"duplicate", "contradiction"} & set(found(audited(pair(1, **one), pair(2, **(one | change)))))


def test_a_swapped_pair_is_a_contradiction():
    assert found(audited(pair(1), pair(2, chosen=" no.", rejected=" yes."))) == {
        "contradiction": ("warning", 1, ["a.jsonl, line 2: see a.jsonl, line 1"])
    }


@pytest.mark.parametrize(
    "ranks, other, kind",
    [
        ((0, 0, 1), (0, 0, 1), "duplicate"),
        ((0, 0, 1), (0, 1, 1), "contradiction"),
        ((0, 0, 1), None, "contradiction"),
        ((0, 1, UNRANKED), None, "contradiction"),
        (None, None, "duplicate"),
    ],
)
def test_rankings_contradict_by_their_ranks(ranks, other, kind):
    one, two = (
        Preference("Q:", (" a.", " b.", " c."), Origin("a.jsonl", line), stated)
        for line, stated in ((1, ranks), (2, other))
    )
    assert set(found(audited(one, two))) == {kind}


def test_tied_completions_may_stand_in_any_order():
    one = Preference("Q:", (" a.", " b.", " c."), Origin("a.jsonl", 1), (0, 0, 1))
    two = Preference("Q:", (" b.", " a.", " c."), Origin("a.jsonl", 2), (0, 0, 1))
    assert set(found(audited(one, two))) == {"duplicate"}


def labelled(line, label, text=" yes."):
    return Preference("Q:", (text,), Origin("a.jsonl", line), label=label)


def test_labels_contradict():
    assert set(found(audited(labelled(1, True), labelled(2, False)))) == {"contradiction"}
    assert set(found(audited(labelled(1, True), labelled(2, True), labelled(3, False, " no.")))) == {"duplicate"}


def test_labels_all_alike_and_labels_among_pairs():
    assert found(audited(labelled(1, False), labelled(2, False, " no.")))["one_label"] == ("warning", 2, [])
    assert found(audited(labelled(1, True), pair(2)))["mixed"][:2] == ("error", 1)


def test_held_out_records_that_training_has_too():
    train = audited(*CLEAN)
    held_out = Audit()
    texts = [(" 2.", " 3."), (" 3.", " 2."), (" 2!", " 3."), (" 4.", " 5.")]
    prompts = ["1+1=", "1+1=", "1+1=", "new"]
    for line, (prompt, completions) in enumerate(zip(prompts, texts, strict=True), start=1):
        held_out.see(Preference(prompt, completions, Origin("b.jsonl", line)), None)
    both = found(held_out, training=train)
    assert both["held_out_record"] == (
        "warning",
        2,
        ["b.jsonl, line 1: see a.jsonl, line 1", "b.jsonl, line 2: see a.jsonl, line 1"],
    )
    assert both["held_out_prompt"] == ("note", 1, ["b.jsonl, line 3: see a.jsonl, line 1"])
    assert set(found(held_out)) == {"contradiction"}


def test_an_empty_prompt_is_no_shared_one():
    train, held_out = audited(pair(1, "")), audited(pair(2, "", " other."))
    assert found(held_out, training=train) == {}


# Lengths, truncation and giveaways.


def test_lengths_are_words_or_tokens():
    item = pair(1, "a b  c", " d", " e\nf g h")
    lengths = {name: of["quantiles"]["50"] for name, of in audited(item).result()["lengths"].items()}
    assert lengths == {"prompt": 3, "chosen": 1, "rejected": 4, "chosen - rejected": -3}
    group = tokenize_preference(item, LLAMA_LIKE, 64)
    lengths = {n: of["mean"] for n, of in audited(item, tokenizer=LLAMA_LIKE).result()["lengths"].items()}
    assert lengths == {
        "prompt": len(group.prompt),
        "chosen": len(group.completions[0]),
        "rejected": len(group.completions[1]),
        "chosen - rejected": len(group.completions[0]) - len(group.completions[1]),
    }


def test_a_label_says_which_side_a_completion_is_on():
    result = audited(labelled(1, True, " a b"), labelled(2, False, " c")).result()
    assert {name: of["mean"] for name, of in result["lengths"].items()} == {"prompt": 1, "chosen": 2, "rejected": 1}
    assert result["kinds"] | {"good": 1, "bad": 1} == result["kinds"]
    assert result["rules"] == {}


def test_truncation_is_a_note_where_it_is_rare():
    long = pair(99, "Q:", " x" * 30, " no.")
    assert found(audited(long, tokenizer=SMOLLM_LIKE, max_length=20)) == {
        "truncated_completion": ("warning", 1, ["a.jsonl, line 99"])
    }
    long = pair(99, "Q" * 30, " yes.", " no.")
    rare = found(audited(*CLEAN, long, tokenizer=SMOLLM_LIKE, max_length=20))
    assert rare == {"truncated_prompt": ("note", 1, ["a.jsonl, line 99"])}


def lengths(chosen_longer, ties, rejected_longer):
    """Pairs of which so many have the longer completion chosen, neither, or rejected; otherwise alike."""
    sides = [(2, 1)] * chosen_longer + [(1, 1)] * ties + [(1, 2)] * rejected_longer
    return [
        pair(line, f"{line}:", " a" * chosen + ".", " b" * rejected + ".")
        for line, (chosen, rejected) in enumerate(sides, start=1)
    ]


@pytest.mark.parametrize(
    "counts, accuracy, told",
    [((70, 10, 20), 0.75, True), ((20, 10, 70), 0.25, True), ((60, 0, 40), 0.6, False), ((4, 0, 1), 0.8, False)],
)
def test_length_bias(counts, accuracy, told):
    audit = audited(*lengths(*counts))
    rule = audit.result()["rules"]["is longer"]
    assert rule == {"chosen": counts[0], "rejected": counts[2], "pairs": sum(counts), "accuracy": accuracy}
    assert ("giveaway" in found(audit)) == told


@pytest.mark.parametrize(
    "rule, chosen, rejected",
    [
        ("begins with white space", " {}.", "{}."),
        ("ends with white space", " {}. ", " {}."),
        ("ends with a full stop, or the like", " {}.", " {}"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_surface_gives_the_chosen_away(rule, chosen, rejected, swapped):
    texts = [(chosen.format(2 * n), rejected.format(2 * n + 1)) for n in range(40)]
    audit = audited(*(pair(n, f"{n}:", *(reversed(text) if swapped else text)) for n, text in enumerate(texts)))
    result = audit.result()
    assert result["rules"][rule]["accuracy"] == (0.0 if swapped else 1.0)
    (finding,) = result["findings"]
    assert finding["kind"] == "giveaway" and f"the {'rejected' if swapped else 'chosen'} one {rule}" in finding["what"]


def test_the_rules_are_those_of_the_table():
    assert list(audited(pair()).result()["rules"]) == list(RULES)


# Records that are not used.


def test_dropped_records_are_grouped_by_their_reason():
    audit = audited(*CLEAN)
    for line in (50, 51):
        audit.drop(Origin("a.jsonl", line), "two completions are equal once they are cut")
    audit.drop(Origin("b.csv", 3, "row"), "a completion is empty")
    dropped = {item["what"]: item["records"] for item in audit.result()["findings"]}
    assert dropped == {
        "dropped: two completions are equal once they are cut": ["a.jsonl, line 50", "a.jsonl, line 51"],
        "dropped: a completion is empty": ["b.csv, row 3"],
    }
    assert audit.result()["records"] == len(CLEAN) + 3


def test_reasons_are_bounded_and_no_record_is_lost():
    audit = Audit()
    for i in range(REASONS + 5):
        audit.drop(Origin("a.jsonl", i), "odd " + "x" * i)
    dropped = [item for item in audit.result()["findings"] if item["kind"] == "dropped"]
    assert len(dropped) == REASONS + 1
    assert sum(item["count"] for item in dropped) == REASONS + 5


def test_what_tokenisation_drops_is_counted_once():
    audit = Audit(SMOLLM_LIKE)
    audit.see(pair(4, chosen="<eos>"), None)
    audit.drop(Origin("a.jsonl", 4), "a completion has no tokens")
    assert audit.result()["records"] == 1 and audit.result()["used"] == 0
    assert set(found(audit)) == {"dropped", "unusable"}


def test_every_broken_record_is_named_even_where_messages_are_not_kept():
    audit = audited(*CLEAN)
    for line in range(MESSAGES + 3):
        audit.refuse(Origin("a.jsonl", line), f"a.jsonl, line {line}: field 'chosen' is a number")
    severity, count, records = found(audit, named=None)["broken"]
    assert (severity, count, len(records)) == ("error", MESSAGES + 3, MESSAGES + 3)
    assert records[0] == "a.jsonl, line 0: field 'chosen' is a number"
    assert records[-1] == f"a.jsonl, line {MESSAGES + 2}"


def test_a_source_that_breaks_off_is_an_error():
    audit = audited(*CLEAN)
    audit.stop("a.jsonl.gz, behind line 39: the compressed stream is broken")
    assert found(audit) == {"unreadable": ("error", 1, ["a.jsonl.gz, behind line 39: the compressed stream is broken"])}


def test_fields_that_are_not_read_are_a_note():
    audit = audited(*CLEAN)
    audit.ignore("a.jsonl", {"id": 1200, "x" * 99: 1})
    severity, count, (text,) = found(audit)["unread_field"]
    assert (severity, count) == ("note", 1)
    assert text == f"a.jsonl: 'id' in 1,200, 'xx{'x' * 37} in 1"


def test_what_has_no_count_shows_none():
    lines = report(Audit().result())
    assert "error              no record is usable; correct the data; there is nothing to train on" in lines


def test_no_record_at_all_is_an_error():
    result = Audit().result()
    assert [(item["kind"], item["severity"]) for item in result["findings"]] == [("unusable", "error")]
    assert report(result)[-1] == "found      1 error"


# The result and its text.


def test_a_result_is_json_and_names_as_many_records_as_asked_for():
    copies = [dataclasses.replace(CLEAN[0], origin=Origin("a.jsonl", line)) for line in range(100, 130)]
    audit = audited(*CLEAN, *copies)
    result = audit.result()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert [len(audit.result(named)["findings"][0]["records"]) for named in (0, 3, 10, None)] == [0, 3, 10, 30]
    assert all(audit.result(named)["findings"][0]["count"] == 30 for named in (0, None))


def test_findings_stand_gravest_first():
    audit = audited(pair(1, "Q <eos>: ", " yes\x00"), pair(2, rejected="\u200b."), tokenizer=SMOLLM_LIKE)
    audit.refuse(Origin("a.jsonl", 3), "a.jsonl, line 3: broken")
    severities = [item["severity"] for item in audit.result()["findings"]]
    assert severities == ["error", "warning", "warning", "note", "note"]


def test_a_summary_is_short_and_says_what_it_leaves_out():
    odd = pair(1, "<bos>Q<eos> ", " yes\x00<eos>\ufffd\nUser:", " no\u200b<bos><eos>")
    audit = audited(odd, dataclasses.replace(odd, origin=Origin("a.jsonl", 2)), tokenizer=SMOLLM_LIKE)
    result = audit.result()
    lines = summary(result)
    assert len(lines) == SUMMARY_LINES < len(result["findings"])
    shown = [item["what"] for item in result["findings"] if any(item["what"] in line for line in lines)]
    assert f"and {len(result['findings']) - len(shown)} findings more" in lines[-1]
    assert all(any(item["what"] in line for line in report(result)) for item in result["findings"])


# The boundary.


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(
    "prompt, chosen, differs",
    [("Q:", " yes", False), ("t", "he", True), ("", "the", False), ("t", "e", False), ("that", "that", False)],
)
@pytest.mark.parametrize("max_length", [4, 64])
def test_joint_tokenisation_differs_where_a_merge_crosses_the_boundary(tokenizer, prompt, chosen, differs, max_length):
    item = pair(prompt=prompt, chosen=chosen, rejected=" no")
    group = tokenize_preference(item, tokenizer, max_length)
    assert differs_jointly([(item, group)], tokenizer) == [differs]


def test_what_was_cut_off_is_not_compared():
    """The merge at the boundary is seen even where the prompt lost its start and the completion its end."""
    for end, differs in (("t", True), ("s", False)):
        item = pair(prompt="a long prompt" + end, chosen="h" + " and more" * 9, rejected="no")
        group = tokenize_preference(item, LLAMA_LIKE, 12)
        assert group.prompt_truncated and group.completions_truncated == (True, False)
        assert differs_jointly([(item, group)], LLAMA_LIKE) == [differs]


def test_of_a_template_the_ids_are_compared_as_they_are():
    item = pair(prompt="<bos>t", chosen="he<eos>", rejected="no<eos>", templated=True)
    group = tokenize_preference(item, LLAMA_LIKE, 64)
    assert differs_jointly([(item, group)], LLAMA_LIKE) == [True]
    item = dataclasses.replace(item, prompt="<bos>s")
    assert differs_jointly([(item, tokenize_preference(item, LLAMA_LIKE, 64))], LLAMA_LIKE) == [False]


def test_memory_per_record_is_what_the_module_states():
    audit = audited(*lengths(1000, 1000, 1000))
    sizes = [audit._used, audit._prompt_hash, audit._content_hash, audit._statement_hash, *audit._lengths.values()]
    sizes += [audit._origins._source, audit._origins._number]
    assert sum(array.itemsize for array in sizes) == 52
    assert all(len(array) == 3000 for array in sizes)
    assert np.sum([len(names) for names in audit._found.values()]) == 0


def test_the_page_lists_every_kind_with_its_severity():
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text("utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (error|warning|note) \|", page, re.MULTILINE)
    listed = {kind: severity for names, severity in rows for kind in re.findall(r"`(\w+)`", names)}
    assert listed == {kind: entry.severity for kind, entry in KINDS.items()}
    assert all(f"*{rule}*" in " ".join(page.split()) for rule in RULES)
