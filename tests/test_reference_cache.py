"""Log-probs of a reference on disk: computed once, for what is asked for; what is read is what was written."""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import threading

import filelock
import jax
import numpy as np
import pytest

from jaxdpo import reference_cache, reference_store
from jaxdpo.data.load import Loaded
from jaxdpo.data.partners import with_partners
from jaxdpo.data.pipeline import all_batches
from jaxdpo.reference import dataset_logps, make_logp_program
from jaxdpo.reference_cache import packed, reference_facts, stored_logps, tokens_digest
from jaxdpo.sharding import make_mesh
from jaxdpo.types import InputError, RunStopped
from tests import tiny

DATA = tiny.dataset(groups=40, candidates=(1, 3), seed=5)
LAYOUT = tiny.layout(DATA, row_lengths=[64], tokens=128)
MESH = make_mesh(jax.devices()[:1])
FACTS = {"model": "stand-in"}
EVERY = np.arange(len(DATA))


class Program:
    """Stands in for the model: the log-prob of a token is minus its id. Remembers what it was asked for."""

    def __init__(self, stop_after=None):
        self.examples: list[int] = []
        self.stop_after = stop_after

    def __call__(self, params, batch):
        if self.stop_after is not None and len(self.examples) >= self.stop_after:
            raise KeyboardInterrupt
        self.examples += np.asarray(batch.example_id)[np.asarray(batch.group_mask)].tolist()
        return -np.asarray(batch.slot_target, np.float32), {}


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """The entry of these facts, in a cache of its own; each batch is a part."""
    monkeypatch.setenv("JAXDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(reference_store, "COMMIT_SECONDS", 0.0)
    return tmp_path / "reference" / reference_cache.digest_of(FACTS)


def stored(program, examples=EVERY, facts=FACTS):
    return stored_logps(program, {}, DATA, np.asarray(examples), LAYOUT, MESH, facts=facts, label="test")


def assert_right(logps, examples=EVERY):
    """These, and no others."""
    assert np.flatnonzero(logps.size).tolist() == sorted(examples)
    for example in examples:
        np.testing.assert_array_equal(logps.of(example), -np.concatenate(DATA.groups[example].completions))


def parts(directory):
    return [json.loads(line) for line in (directory / "parts.jsonl").read_text().splitlines()[1:]]


# What is computed.


def test_the_numbers_are_those_of_a_direct_pass():
    decoder = tiny.decoder()
    program, params = make_logp_program(decoder), tiny.params(decoder)
    with jax.set_mesh(MESH):
        got = stored_logps(program, params, DATA, EVERY, LAYOUT, MESH, facts=FACTS, label="test").logps
        want = dataset_logps(program, params, all_batches(DATA, LAYOUT), MESH, label="test")
    assert got.values.dtype == np.float32 and not got.values.flags.writeable
    for example in EVERY:
        np.testing.assert_allclose(got.of(example), want.of(example), rtol=1e-6, atol=1e-5)


def test_a_second_run_computes_nothing(directory):
    first, second = stored(Program()), stored(program := Program())
    assert (first.computed, second.computed) == (len(DATA), 0) and program.examples == []
    assert first.directory == second.directory == directory
    assert_right(first.logps)
    assert_right(second.logps)


def test_only_what_is_asked_for_is_computed_and_later_what_is_missing():
    assert_right(stored(Program(), [7, 3, 30]).logps, [7, 3, 30])
    more = stored(program := Program(), [3, 5, 30, 6])
    assert sorted(program.examples) == [5, 6] and more.computed == 2
    assert_right(more.logps, [7, 3, 30, 5, 6])
    stored(program := Program())
    assert len(program.examples) == len(DATA) - 5


def test_of_no_examples_nothing_is_written(directory):
    assert_right(stored(Program(), np.zeros(0, int)).logps, [])
    assert not directory.exists()


def test_examples_are_packed_well_once_and_alike(monkeypatch):
    """Groups of unlike data, with margins and without, go through one program."""
    monkeypatch.setattr(reference_cache, "PACKED_TOGETHER", 16)
    judged = tiny.dataset(groups=40, candidates=(2, 2), labelled=True)
    for data in (DATA, judged):
        batches = list(packed(data, EVERY[::-1], tiny.layout(data)))
        assert sorted(np.concatenate([batch.example_id[batch.group_mask] for batch in batches])) == EVERY.tolist()
        assert all(batch.label is None and batch.margin is None for batch in batches)


# What is interrupted.


def test_a_pass_goes_on_where_it_was_interrupted(monkeypatch):
    monkeypatch.setattr(reference_store, "COMMIT_SECONDS", 1e9)  # nothing was due to be written yet
    interrupted = Program(stop_after=15)
    with pytest.raises(KeyboardInterrupt):
        stored(interrupted)
    after = stored(program := Program())
    assert sorted([*interrupted.examples, *program.examples]) == EVERY.tolist()
    assert 0 < after.computed < len(DATA)
    assert_right(after.logps)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:-size])


@pytest.mark.parametrize("left", ["half a line", "half a header", "no line"])
def test_what_a_killed_process_had_not_finished_does_not_count(directory, left):
    """The numbers of the last part are on the disk, its line is not, or not whole."""
    stored(Program())
    journal, every = directory / "parts.jsonl", parts(directory)
    header, *lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) > 3
    text = {"half a line": header + "".join(lines)[:-9], "half a header": header[:-2], "no line": header}[left]
    journal.write_text(text)
    known = sum(part["groups"] for part in (every[:-1] if left == "half a line" else []))
    after = stored(program := Program())
    assert after.computed == len(program.examples) == len(DATA) - known
    assert_right(after.logps)
    assert sum(part["groups"] for part in parts(directory)) == len(DATA)
    assert (directory / "examples.i32").stat().st_size == 4 * len(DATA)
    assert_right(stored(Program()).logps)


def test_a_part_is_not_counted_before_it_is_written(directory, monkeypatch):
    """Whichever of its files a kill comes before: the line is the last one."""
    write = reference_store._write_at
    for stop in range(3, 7):  # within the second part, and before the third
        written = []

        def until(path, offset, data, stop=stop, written=written):
            if len(written) >= stop:
                raise KeyboardInterrupt  # also when what is left is to be written
            written.append(path.name)
            write(path, offset, data)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(reference_store, "_write_at", until)
            stored(Program())
        assert written[:4] == ["examples.i32", "values.f32", "parts.jsonl", "examples.i32"][:stop]
        assert len(parts(directory)) == stop // 3
        assert_right(stored(Program()).logps)
        for path in directory.iterdir():
            path.unlink()


# What is damaged.


def flip(path, place=-3):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def swap_header(path):
    header, rest = path.read_text().split("\n", 1)
    path.write_text(header.replace("stand-in", "another") + "\n" + rest)


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("values.f32", flip, "values.f32 is damaged, or examples.i32 beside it"),
        ("examples.i32", flip, "values.f32 is damaged, or examples.i32 beside it"),
        ("examples.i32", lambda path: flip(path, 1), "values.f32 is damaged, or examples.i32 beside it"),
        ("values.f32", lambda path: cut(path, 1), "values.f32 does not hold the .* numbers that were written"),
        ("examples.i32", os.remove, "examples.i32 does not hold the 40 numbers that were written"),
        ("parts.jsonl", lambda path: flip(path, -2), "parts.jsonl is damaged"),  # its closing brace
        ("parts.jsonl", lambda path: flip(path, -5), "values.f32 is damaged, or examples.i32"),  # a digit of the CRC
        ("parts.jsonl", lambda path: flip(path, 2), "parts.jsonl is damaged, or of another model or data than"),
        ("parts.jsonl", swap_header, "parts.jsonl is damaged, or of another model or data than"),
    ],
)
def test_a_damaged_or_foreign_entry_is_refused(directory, name, damage, what):
    stored(Program())
    damage(directory / name)
    for examples in (EVERY, [0]):
        with pytest.raises(InputError, match=rf"{what}.*; fix: remove {directory}, it will be computed again$"):
            stored(program := Program(), examples)
        assert program.examples == []


def test_what_is_written_is_read_again_before_it_is_used(monkeypatch):
    write = reference_store._write_at
    spoil = {"values.f32": lambda data: bytes(len(data))}
    monkeypatch.setattr(
        reference_store,
        "_write_at",
        lambda path, offset, data: write(path, offset, spoil.get(path.name, bytes)(data)),
    )
    with pytest.raises(InputError, match=r"values\.f32 is damaged"):
        stored(Program())


# What an entry follows from.


def facts(decoder=None, weights=("a", 1), tokens="t", platform="cpu"):
    return reference_facts(decoder or tiny.decoder(), list(weights), tokens, platform)


@pytest.mark.parametrize(
    "other",
    [
        {"decoder": tiny.decoder(compute_dtype="bfloat16")},
        {"decoder": dataclasses.replace(tiny.decoder(), attention="another")},
        {"decoder": tiny.decoder(dataclasses.replace(tiny.LLAMA, norm_eps=1e-3))},
        {"weights": ("a", 2)},
        {"tokens": "u"},
        {"platform": "tpu"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_whatever_changes_the_numbers_changes_the_entry(other):
    first = stored(Program(), facts=facts())
    second = stored(program := Program(), facts=facts(**other))
    assert first.directory != second.directory and len(program.examples) == len(DATA)
    assert stored(Program(), facts=facts()).computed == 0


def test_other_code_or_another_jax_changes_the_entry(monkeypatch):
    entries = [facts()]
    monkeypatch.setattr(reference_cache, "COMPUTED_BY", ("logprobs.py",))
    entries.append(facts())
    monkeypatch.setattr(jax, "__version__", "0")
    entries.append(facts())
    assert len({json.dumps(entry) for entry in entries}) == 3


def test_the_code_that_computes_is_all_there():
    root = reference_cache.pathlib.Path(reference_cache.__file__).parent
    assert all(list(root.glob(pattern)) for pattern in reference_cache.COMPUTED_BY)


def test_a_dataset_that_was_made_of_the_loaded_one_has_a_digest_of_its_own(tmp_path):
    judged = tiny.dataset(groups=20, candidates=(1, 1), labelled=True)
    loaded = Loaded(judged, (), (), None, "", "digest", None, tmp_path)
    assert tokens_digest(loaded, judged) == "digest"
    accompanied, cut_short = with_partners(judged, 64), with_partners(judged, 16)
    assert tokens_digest(loaded, accompanied) == tokens_digest(loaded, with_partners(judged, 64))
    other = tiny.dataset(groups=20, candidates=(1, 1), labelled=True, seed=1)
    made = [judged, accompanied, cut_short, other]
    assert len({tokens_digest(loaded, dataset) for dataset in made}) == len(made)


# Several runs, and disks.


def test_a_second_run_waits_and_uses_what_the_first_has_computed(directory, capsys):
    holding, waiting = threading.Event(), threading.Event()

    class Slow(Program):
        def __call__(self, params, batch):
            holding.set()
            assert waiting.wait(30)
            return super().__call__(params, batch)

    results = []
    thread = threading.Thread(target=lambda: results.append(stored(Slow())))
    thread.start()
    assert holding.wait(30)
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(directory / "lock").acquire(timeout=0)
    second = threading.Thread(target=lambda: results.append(stored(program)))
    program = Program()
    second.start()
    said = ""
    while not said:
        said = capsys.readouterr().out
    assert said == f"reference  another run is computing {directory}: waiting for it\n"
    assert second.is_alive() and program.examples == []
    waiting.set()
    thread.join()
    second.join()
    assert [result.computed for result in results] == [len(DATA), 0]
    assert_right(results[1].logps)


@contextlib.contextmanager
def full_disk(size):
    """Within it no file grows beyond some bytes, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_names_itself_and_keeps_what_it_took(directory):
    size = 4 * int(DATA.slots.sum()) // 2
    message = rf"^{directory} cannot be written: .* free there; .*JAXDPO_CACHE can name"
    with pytest.raises(RunStopped, match=message), full_disk(size):
        stored(Program())
    kept = sum(part["groups"] for part in parts(directory))
    after = stored(program := Program())
    assert kept > 0 and len(program.examples) == len(DATA) - kept
    assert_right(after.logps)


def test_a_cache_that_is_read_only_is_read_and_names_itself_where_it_must_be_written(directory, monkeypatch):
    stored(Program(), [1, 2])

    def refuse(*args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(reference_store, "_write_at", refuse)
    assert_right(stored(Program(), [2]).logps, [1, 2])
    with pytest.raises(RunStopped, match=rf"^{directory} cannot be written: Read-only file system; .*JAXDPO_CACHE"):
        stored(Program(), [2, 3])
