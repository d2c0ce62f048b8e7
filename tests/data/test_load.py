import contextlib
import errno
import json
import os
import resource
import threading
import time
import tracemalloc

import numpy as np
import pytest

from jaxdpo.data import cache, load, reading, tokenize
from jaxdpo.data.load import load_dataset
from jaxdpo.types import InputError, Origin, RunStopped
from tests import tiny
from tests.data.toy_tokenizers import LLAMA_LIKE, SMOLLM_LIKE, toy_tokenizer

TEMPLATE = "{% for m in messages %}<bos>{{ m['role'] }}:{{ m['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def pairs(tmp_path):
    return str(tiny.write_pairs(tmp_path / "pairs.jsonl", range(5)))


@pytest.fixture
def passes(monkeypatch):
    """One number for each pass over the data."""
    done = []
    write = load._write_entry
    monkeypatch.setattr(load, "_write_entry", lambda *args: done.append(1) or write(*args))
    return done


def as_lists(groups):
    return [[group.prompt.tolist(), *(completion.tolist() for completion in group.completions)] for group in groups]


def test_groups_are_those_of_the_texts_one_by_one(pairs, monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK", 2)
    done = []
    loaded = load_dataset(pairs, SMOLLM_LIKE, 64, progress=done.append)
    plain = tokenize.tokenize_dataset(
        reading.Reading(load.open_sources(pairs)[0], "pairs", None).preferences(pytest.fail), SMOLLM_LIKE, 64
    )
    assert as_lists(loaded.dataset.groups) == as_lists(plain.groups)
    assert [group.origin for group in loaded.dataset.groups] == [Origin(pairs, line) for line in range(1, 6)]
    for name, array in loaded.dataset.arrays._asdict().items():
        np.testing.assert_array_equal(array, getattr(plain.arrays, name))
        assert array.dtype == getattr(plain.arrays, name).dtype
    assert done == [2, 2, 1]
    assert loaded.summary() == f"{pairs}: 5 preferences (pairs)"
    assert (loaded.formats, loaded.records) == (("pairs",), (5,))


def test_the_second_start_reads_the_entry_alone(pairs, passes, monkeypatch):
    first = load_dataset(pairs, SMOLLM_LIKE, 64)
    monkeypatch.setattr(load.PreferenceTokenizer, "__call__", lambda *_: pytest.fail("it was tokenised"))
    again = load_dataset(pairs, toy_tokenizer(), 64)
    assert len(passes) == 1
    assert as_lists(again.dataset.groups) == as_lists(first.dataset.groups)
    assert again.digest == first.digest and again.summary() == first.summary()
    assert again.dataset.summary() == first.dataset.summary()
    assert not again.dataset.arrays.ids.flags.owndata  # it lies in the file


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer": LLAMA_LIKE},
        {"tokenizer": toy_tokenizer(bos="<eos>")},
        {"max_length": 63},
        {"format": "pairs"},
        {"use": "imitate"},
        {"score_prompt": True},
    ],
)
def test_an_entry_serves_what_it_was_made_of_alone(pairs, passes, changed):
    first = load_dataset(pairs, SMOLLM_LIKE, 64)
    options = {"tokenizer": SMOLLM_LIKE, "max_length": 64, **changed}
    assert load_dataset(pairs, **options).directory != first.directory
    assert len(passes) == 2


def test_a_run_goes_on_with_the_same_data_and_the_same_groups_alone(pairs, tmp_path):
    first = load_dataset(pairs, SMOLLM_LIKE, 64).digest
    assert load_dataset(pairs, SMOLLM_LIKE, 63, format="pairs").digest == first  # nothing is cut by either
    assert load_dataset(pairs, SMOLLM_LIKE, 9).digest != first
    assert load_dataset(pairs, LLAMA_LIKE, 64).digest != first
    other = str(tiny.write_pairs(tmp_path / "other.jsonl", range(1, 6)))
    assert load_dataset(other, SMOLLM_LIKE, 64).digest != first


def test_a_chat_template_is_part_of_the_tokenizer(pairs, passes):
    tokenizer = toy_tokenizer()
    load_dataset(pairs, tokenizer, 64)
    tokenizer.chat_template = TEMPLATE
    load_dataset(pairs, tokenizer, 64)
    assert len(passes) == 2


def test_changed_data_is_read_again_and_moved_data_is_named_as_it_is_called(pairs, passes, tmp_path):
    load_dataset(pairs, SMOLLM_LIKE, 64)
    os.rename(pairs, moved := str(tmp_path / "moved.jsonl"))
    assert load_dataset(moved, SMOLLM_LIKE, 64).dataset.groups[0].origin.source == moved
    tiny.write_pairs(tmp_path / "moved.jsonl", range(1, 6))
    assert len(load_dataset(moved, SMOLLM_LIKE, 64).dataset) == 5
    assert len(passes) == 3


def test_weights_do_not_change_the_entry(pairs, passes):
    load_dataset(pairs, SMOLLM_LIKE, 64)
    weighed = load_dataset(pairs, SMOLLM_LIKE, 64, weights=[0.5])
    assert len(passes) == 1
    assert weighed.weights == (0.5,) and weighed.summary() == f"{pairs}: 5 preferences (pairs), 0.5 times an epoch"
    with pytest.raises(InputError, match="2 data weights for 1 sources; allowed: one for each"):
        load_dataset(pairs, SMOLLM_LIKE, 64, weights=[1, 1])


def test_sources_of_several_formats_stand_one_after_another(pairs, tmp_path):
    ranked = str(tiny.write_ranked(tmp_path / "ranked.jsonl", range(3), ties=True))
    loaded = load_dataset(f"{pairs},{ranked}", SMOLLM_LIKE, 64)
    assert loaded.formats == ("pairs", "ranked") and loaded.dataset.sizes == (5, 3)
    assert [group.origin for group in loaded.dataset.groups[4:6]] == [Origin(pairs, 5), Origin(ranked, 1)]
    assert loaded.dataset.groups[6].ranks == (0, 0, 1)
    assert loaded.summary() == f"{pairs}: 5 preferences (pairs); {ranked}: 3 preferences (ranked)"


def test_messages_are_written_by_the_template(tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    record = {"prompt": messages} | {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    path = str(tiny.write_records(tmp_path / "chat.jsonl", [record]))
    tokenizer = toy_tokenizer()
    with pytest.raises(InputError, match=r"chat\.jsonl, line 1: .*no chat template"):
        load_dataset(path, tokenizer, 64)
    tokenizer.chat_template = TEMPLATE
    (group,) = load_dataset(path, tokenizer, 64).dataset.groups
    assert tokenizer.decode(group.prompt) == "<bos>user:Hi"
    assert [tokenizer.decode(ids) for ids in group.completions] == ["<bos>assistant:chosen", "<bos>assistant:rejected"]


@pytest.mark.parametrize("turn", [1, -1])
def test_judged_and_compared_completions_do_not_mix_across_sources(pairs, tmp_path, turn):
    judged = str(tiny.write_unpaired(tmp_path / "judged.jsonl", range(3)))
    first, second = [pairs, judged][::turn]
    with pytest.raises(InputError, match=f"^{second}, line 1: label is .*, but .* in {first}, line 1; allowed"):
        load_dataset(f"{first},{second}", SMOLLM_LIKE, 64)
    imitated = load_dataset(f"{first},{second}", SMOLLM_LIKE, 64, use="imitate")
    assert not imitated.dataset.labelled and imitated.dataset.candidates == 1
    assert imitated.dataset.dropped.total == 2  # the bad ones
    assert f"{pairs}: 5 completions (pairs)" in imitated.summary()


def broken(tmp_path, count=25):
    """Two good pairs, then `count` of which none is usable: some before tokenisation, some after."""
    records = [{"prompt": "x", "chosen": f"{n}", "rejected": "no"} for n in range(2)]
    unusable = [{"prompt": "x", "chosen": "<eos>" if n % 5 else "no", "rejected": "no"} for n in range(count)]
    return str(tiny.write_records(tmp_path / "broken.jsonl", records + unusable))


class Watching:
    """An audit that keeps what it sees."""

    def __init__(self):
        self.seen, self.dropped = [], []

    def see(self, preference, group, also=()):
        self.seen.append((preference.origin.number, group is not None))

    def ignore(self, source, fields):
        pytest.fail(f"{fields} of {source} are read")

    def drop(self, origin, reason):
        self.dropped.append((origin.number, reason))

    def result(self):
        return {"seen": len(self.seen), "dropped": len(self.dropped)}


def test_dropped_records_are_counted_and_all_of_them_named_in_the_entry(tmp_path):
    path = broken(tmp_path)
    for _ in range(2):  # from the pass, then from the cache
        loaded = load_dataset(path, SMOLLM_LIKE, 64)
        assert len(loaded.dataset) == 2 and loaded.records == (27,)
        assert loaded.dataset.dropped.counts == {"two completions are equal": 5, "a completion has no tokens": 20}
        assert len(loaded.dataset.dropped.first) == 10
        assert "dropped 25: row 2 (line 3): two completions are equal; " in loaded.dataset.summary()
        assert loaded.dataset.summary().endswith(
            "; and 15 more, in all 20 a completion has no tokens, 5 two completions are equal"
        )
    lines = (loaded.directory / "dropped.jsonl").read_text().splitlines()
    named = sorted(json.loads(line) for line in lines)
    assert len(named) == 25
    assert named[0] == [path, 3, "line", "two completions are equal"]
    assert named[-1] == [path, 27, "line", "a completion has no tokens"]


def test_an_audit_sees_every_record_once_and_its_result_is_kept(tmp_path, passes):
    path, first, second = broken(tmp_path), Watching(), Watching()
    assert load_dataset(path, SMOLLM_LIKE, 64).audit is None
    results = [load_dataset(path, SMOLLM_LIKE, 64, audit=audit).audit for audit in (first, second)]
    assert results == [{"seen": 22, "dropped": 25}] * 2
    assert len(passes) == 2 and not second.seen
    assert first.seen == [(n, n < 3) for n in range(1, 28) if n not in (3, 8, 13, 18, 23)]
    assert sorted(number for number, _ in first.dropped) == list(range(3, 28))


def test_a_source_without_a_usable_record_is_named(pairs, tmp_path):
    path = str(tiny.write_records(tmp_path / "bad.jsonl", [{"prompt": "x", "chosen": "no", "rejected": "no"}] * 2))
    message = rf"^{path}: none of its 2 records is usable, dropped 2: row 0 \(line 1\): two completions are equal; "
    with pytest.raises(InputError, match=message):
        load_dataset(f"{pairs},{path}", SMOLLM_LIKE, 64)


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"prompt": "x"}, {}, r"bad\.jsonl, line 1: no format fits"),
        ({"prompt": "x", "chosen": 3, "rejected": "y"}, {"format": "pairs"}, r"bad\.jsonl, line 1: field 'chosen'"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, {"format": "pair"}, "format='pair' is unknown; allowed"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, {"max_length": 1}, "max_length=1 cannot hold"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, cached, record, options, message):
    path = str(tiny.write_records(tmp_path / "bad.jsonl", [record]))
    with pytest.raises(InputError, match=message):
        load_dataset(path, SMOLLM_LIKE, **{"max_length": 64, **options})
    assert [path.name for path in cached.glob("*")] in ([], ["digests"])


def cut(path):
    os.truncate(path, os.path.getsize(path) - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def spoil_header(path):
    path.write_bytes(b"x" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("ids.npy", cut),
        ("ids.npy", flip),
        ("size.npy", spoil_header),
        ("rank.npy", os.remove),
        ("entry.json", cut),
        ("entry.json", os.remove),
        ("entry.json", lambda path: path.write_text("[]")),
    ],
)
def test_a_damaged_entry_is_made_again(pairs, passes, name, damage):
    first = load_dataset(pairs, SMOLLM_LIKE, 64)
    ids = as_lists(first.dataset.groups)
    damage(first.directory / name)
    assert as_lists(load_dataset(pairs, SMOLLM_LIKE, 64).dataset.groups) == ids
    assert len(passes) == 2
    load_dataset(pairs, SMOLLM_LIKE, 64)
    assert len(passes) == 2


def test_of_two_at_once_the_second_uses_what_the_first_has_made(pairs, cached, monkeypatch):
    meeting = threading.Barrier(2, timeout=30)
    write = load._write_entry
    monkeypatch.setattr(load, "_write_entry", lambda *args: write(*args) or meeting.wait())
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(load_dataset(pairs, toy_tokenizer(), 64))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert as_lists(results[0].dataset.groups) == as_lists(results[1].dataset.groups)
    assert sorted(path.name for path in cached.glob("*")) == [results[0].directory.name]


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond some bytes: what is written further is refused as by a full disk.

    Not for a whole test: pytest writes what came of it to a file, perhaps, before fixtures are undone.
    """
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_names_itself_and_leaves_nothing(tmp_path, cached):
    paths = [str(tiny.write_pairs(tmp_path / f"{part}.jsonl", range(part, part + 20))) for part in range(0, 400, 20)]
    message = rf"^{cached} cannot be written: .*; .* free there; .*may be deleted, and JAX"
    with pytest.raises(RunStopped, match=message), full_disk():
        load_dataset(",".join(paths), SMOLLM_LIKE, 64)
    assert [path.name for path in cached.glob("*")] in ([], ["digests"])


def test_a_read_only_cache_names_itself(pairs, cached, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cache.tempfile, "mkdtemp", refuse)
    with pytest.raises(RunStopped, match=rf"^{cached} cannot be written: Read-only file system; .* JAXDPO_CACHE can"):
        load_dataset(pairs, SMOLLM_LIKE, 64)


@pytest.mark.parametrize(("age", "hashed"), [(100, 1), (0, 2)], ids=["settled", "just changed"])
def test_the_digest_of_a_file_that_does_not_change_is_remembered(pairs, monkeypatch, age, hashed):
    then = time.time() - age
    os.utime(pairs, (then, then))
    done = []
    digest = type(load.open_sources(pairs)[0]).digest
    monkeypatch.setattr(
        type(load.open_sources(pairs)[0]), "digest", lambda self: done.append(self.name) or digest(self)
    )
    assert load_dataset(pairs, SMOLLM_LIKE, 64).digest == load_dataset(pairs, SMOLLM_LIKE, 64).digest
    assert len(done) == hashed
    then += 1
    os.utime(pairs, (then, then))
    load_dataset(pairs, SMOLLM_LIKE, 64)
    assert len(done) == hashed + 1


def test_memory_does_not_grow_with_the_number_of_records(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK", 64)
    peaks = []
    for records in (500, 4000):
        path = str(tiny.write_pairs(tmp_path / f"{records}.jsonl", range(records)))
        tracemalloc.start()
        load_dataset(path, SMOLLM_LIKE, 64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
