"""What was saved comes back bit by bit, or an error says which array the disk changed."""

import math
import shutil

import jax
import numpy as np
import optax
import pytest

from jaxdpo.sharding import make_mesh, replicated
from jaxdpo.train.checkpoint import KEPT, Checkpoints, find_checkpoint, load_params, read_meta
from jaxdpo.train.digests import tree_digests
from jaxdpo.train.optimizer import adamw, rmsprop
from jaxdpo.train.state import TrainState, init_state
from jaxdpo.types import InputError

META = {"config": {"beta": 0.1, "eval_data": None}, "data": [], "note": {}}
SIZES = {"blocks": {"kernel": (8, 1024)}, "scale": (16,)}


def make_state(step=0, *, optimizer=rmsprop, sizes=SIZES, seed=0, devices=None) -> TrainState:
    """Random parameters split over the devices, and moments that are not zero."""
    mesh = make_mesh(devices)
    rng = np.random.default_rng([seed, step])

    def draw(shape):
        return jax.device_put(rng.normal(size=shape).astype(np.float32), jax.NamedSharding(mesh, jax.P("fsdp")))

    params = jax.tree.map(draw, sizes, is_leaf=lambda node: isinstance(node, tuple))
    state = init_state(params, optimizer(optax.constant_schedule(1.0)), mesh)
    filled = jax.tree.map(lambda x: draw(x.shape) if x.ndim else x + step, state.opt_state)
    return TrainState(jax.device_put(np.int32(step), replicated(mesh)), params, filled)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def opened(tmp_path):
    """Opens the checkpoints of one directory, again and again."""
    made = []

    def reopen() -> Checkpoints:
        made.append(Checkpoints(tmp_path / "checkpoints", META))
        return made[-1]

    yield reopen
    for checkpoints in made:
        checkpoints.close()


@pytest.mark.parametrize("optimizer", [rmsprop, adamw])
def test_round_trip_is_bitwise(opened, optimizer):
    state = make_state(3, optimizer=optimizer)
    checkpoints = opened()
    assert checkpoints.latest_step is None
    checkpoints.save(state)
    checkpoints.wait()
    assert checkpoints.latest_step == 3
    restored = opened().restore(make_state(optimizer=optimizer))
    assert_same(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)


def test_a_state_moves_to_other_devices(opened):
    state = make_state(3)
    first = opened()
    first.save(state)
    first.wait()
    one = make_state(devices=jax.devices()[:1])
    checkpoints = opened()
    restored = checkpoints.restore(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), one)
    )
    assert_same(restored, state)
    assert {x.sharding.mesh for x in jax.tree.leaves(restored)} == {make_mesh(jax.devices()[:1])}
    path = checkpoints.directory / "3"
    assert_same(load_params(path, one.params), state.params)


def test_what_goes_with_a_state(opened):
    checkpoints = opened()
    state = make_state(3)
    checkpoints.save(state)
    checkpoints.wait()
    digests = {"params": tree_digests(state.params), "opt_state": tree_digests(state.opt_state)}
    assert read_meta(checkpoints.directory / "3") == {**META, "step": 3, "digests": digests}
    assert "['scale'] float32[16]" in digests["params"]


def test_a_state_may_be_donated_while_it_is_written(opened):
    """4 MiB take longer to write than the next step takes to overwrite them."""
    state = make_state(1, sizes={"kernel": (1024, 1024)})
    saved = jax.tree.map(np.array, state)
    checkpoints = opened()
    checkpoints.save(state)
    after = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)(state)
    jax.block_until_ready(after)
    checkpoints.wait()
    assert_same(opened().restore(make_state(sizes={"kernel": (1024, 1024)})), saved)


def test_only_the_latest_are_kept(opened):
    """In the order of numbers, not of names: 10 comes after 9."""
    checkpoints = opened()
    for step in (7, 8, 9, 10):
        checkpoints.save(make_state(step))
    checkpoints.wait()
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["10", "9"] and KEPT == 2
    assert find_checkpoint(checkpoints.directory) == checkpoints.directory / "10"
    assert_same(opened().restore(make_state()), make_state(10))


VALUES = {1: 0.5, 2: 0.9, 3: None, 4: 0.9, 5: math.nan, 6: None, 7: 0.2, 8: 0.95, 9: None, 10: None}
"""Step -> its accuracy on held-out data, where it was evaluated."""


@pytest.mark.parametrize("reopened", [False, True])
def test_the_best_is_kept_besides_the_latest(tmp_path, reopened):
    """Of equal ones the first; by what stands on disk, so a resume changes nothing."""

    def reopen():
        return Checkpoints(tmp_path / "checkpoints", META, keep_best="eval_accuracy")

    kept = {}
    checkpoints = reopen()
    assert checkpoints.best_step is None
    for step, value in VALUES.items():
        checkpoints.save(make_state(step), None if value is None else {"eval_loss": 1.0, "eval_accuracy": value})
        checkpoints.wait()
        if reopened:
            checkpoints.close()
            checkpoints = reopen()
        names = sorted(int(path.name) for path in checkpoints.directory.iterdir())
        kept[step] = (checkpoints.best_step, names)
    checkpoints.close()
    assert kept[3] == (2, [2, 3]) and kept[4] == (2, [2, 3, 4])
    assert kept[6] == (2, [2, 5, 6]) and kept[7] == (2, [2, 6, 7])
    assert kept[8] == (8, [7, 8]) and kept[10] == (8, [8, 9, 10])
    best = load_params(checkpoints.directory / "8", make_state().params)
    assert_same(best, make_state(8).params)


def test_of_equals_the_one_with_the_lower_loss_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", META, keep_best="eval_accuracy")
    for step, loss in ((1, 0.5), (2, 0.3), (3, 0.3), (4, 0.4)):
        checkpoints.save(make_state(step), {"eval_loss": loss, "eval_accuracy": 1.0})
    checkpoints.wait()
    assert checkpoints.best_step == 2
    checkpoints.close()


def test_without_a_metric_to_keep_by_there_is_no_best(opened):
    checkpoints = opened()
    for step in (1, 2, 3):
        checkpoints.save(make_state(step), {"eval_accuracy": 1 / step})
    checkpoints.wait()
    assert checkpoints.best_step is None
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["2", "3"]


def test_a_metric_that_no_evaluation_has_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", META, keep_best="eval_acc")
    with pytest.raises(InputError, match="by 'eval_acc': an evaluation has eval_loss, eval_accuracy; fix: name one"):
        checkpoints.save(make_state(1), {"eval_loss": 1.0, "eval_accuracy": 1.0})
    checkpoints.close()


def test_metrics_that_the_disk_changed_name_the_directory(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", META, keep_best="eval_accuracy")
    checkpoints.save(make_state(1), {"eval_accuracy": 1.0})
    checkpoints.close()
    flip(checkpoints.directory / "1" / "metrics" / "metrics", 0)
    with pytest.raises(InputError, match=r"checkpoints: the metrics of a checkpoint cannot be read .*; fix: remove"):
        Checkpoints(tmp_path / "checkpoints", META, keep_best="eval_accuracy")


def test_without_the_latest_the_one_before_it_counts(opened):
    checkpoints = opened()
    for step in (1, 2):
        checkpoints.save(make_state(step))
    checkpoints.close()
    shutil.rmtree(checkpoints.directory / "2")
    again = opened()
    assert again.latest_step == 1
    assert_same(again.restore(make_state()), make_state(1))


def test_a_save_that_was_cut_short_is_no_checkpoint(opened):
    """Orbax writes under another name, which it changes at the end; a leftover is cleared away before the next save."""
    checkpoints = opened()
    checkpoints.save(make_state(1))
    checkpoints.close()
    leftover = checkpoints.directory / "2.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints.directory / "1" / "params", leftover / "params")
    assert find_checkpoint(checkpoints.directory).name == "1"
    again = opened()
    assert again.latest_step == 1
    again.save(make_state(2))
    again.wait()
    assert not leftover.exists()
    assert_same(opened().restore(make_state()), make_state(2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the checkpoint of step 5."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("saved") / "checkpoints", META)
    checkpoints.save(make_state(5))
    checkpoints.close()
    return checkpoints.directory


def restore(directory):
    checkpoints = Checkpoints(directory, META)
    try:
        return checkpoints.restore(make_state())
    finally:
        checkpoints.close()


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0b100
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_a_flipped_bit_in_an_array_names_it(saved, tmp_path, share):
    """Orbax itself loads most of them in silence."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    arrays = max((directory / "5" / "params").glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    assert arrays.stat().st_size > 16_000
    flip(arrays, int(share * arrays.stat().st_size))
    with pytest.raises(InputError) as error:
        restore(directory)
    assert str(error.value).startswith(
        f"{directory}/5: params['blocks']['kernel'] float32[8, 1024] is not what was saved"
    )
    assert str(error.value).endswith(
        f"the disk changed it; fix: remove {directory}/5 to go on from the checkpoint before it"
    )


def test_a_flipped_bit_anywhere_is_harmless_or_an_error(saved, tmp_path):
    """Never a wrong number, and never a traceback of Orbax."""
    refused = set()
    files = sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    for number, file in enumerate(files):
        directory = tmp_path / str(number)
        shutil.copytree(saved, directory)
        flip(directory / file, (saved / file).stat().st_size // 2)
        try:
            assert_same(restore(directory), make_state(5))
        except InputError as error:
            assert f"fix: remove {directory}/5 to go on" in str(error)
            refused.add(file.parts[1])
    assert refused == {"params", "opt_state", "meta"}


@pytest.mark.parametrize("part", ["params", "opt_state", "meta"])
def test_a_lost_file_is_an_error(saved, tmp_path, part):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    (directory / "5" / part / "_METADATA").unlink()
    with pytest.raises(InputError, match=rf"5: .*{part}.* cannot be read .*; fix: remove"):
        restore(directory)


@pytest.mark.parametrize(
    "other, named",
    [
        ({"optimizer": adamw}, "opt_state holds other arrays than this model and optimizer: "),
        (
            {"sizes": {**SIZES, "head": (8,)}},
            "params holds other arrays than this model and optimizer: [\"['head'] float32[8]",
        ),
        (
            {"sizes": {**SIZES, "scale": (8,)}},
            "params holds other arrays than this model and optimizer: [\"['scale'] float32[16]",
        ),
    ],
)
def test_another_model_or_optimizer_is_refused(saved, other, named):
    checkpoints = Checkpoints(saved, META)
    with pytest.raises(InputError) as error:
        checkpoints.restore(make_state(**other))
    checkpoints.close()
    assert f"{saved}/5: {named}" in str(error.value)
    assert "fix: resume with the options the run was started with" in str(error.value)


def test_a_checkpoint_is_found_from_its_run_and_by_its_own_path(saved):
    for path in (saved.parent, saved, saved / "5"):
        assert find_checkpoint(path) == saved / "5"


@pytest.mark.parametrize("where", ["nowhere", "", "file"])
def test_a_path_without_checkpoint_is_refused(tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match="holds no checkpoint; allowed: the --output-dir of a run, its checkpoints, or one of them"
    ):
        find_checkpoint(tmp_path / where)
