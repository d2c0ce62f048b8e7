"""The real step is exact: its gradient is that of the mean loss over separate, unpacked forward passes.

However the groups of a step are packed, split into microbatches, ordered or spread over devices, the update is the
same, for losses whose groups depend on each other too; in float64 to 1e-10, so that what is left is rounding.
"""

import dataclasses
import functools
import typing
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest

from jaxdpo.data.pipeline import all_batches, microbatches
from jaxdpo.losses import LOSSES, LossSpec, combine, dpo_loss, over_all_pairs
from jaxdpo.reference import dataset_logps, make_logp_program, slot_logps
from jaxdpo.sharding import batch_size_multiple, make_mesh, place_batch
from jaxdpo.train.evaluation import group_data
from jaxdpo.train.objective import Outputs, group_losses, preference_task, step_counts
from jaxdpo.train.state import init_state, move_reference
from jaxdpo.train.step import Microbatch, make_programs, run_step, shortest
from tests import tiny
from tests.test_logprobs import relative, unpacked
from tests.test_sharding import DIVISIBLE

BETA = 0.3
SCALARS = {"beta": BETA, "label_smoothing": 0.1}
PAIRS = tiny.dataset(groups=12, seed=1)
RANKINGS = tiny.dataset(groups=9, candidates=(1, 4), seed=2)


def labelled(data):
    """Completions that are judged one by one, two good ones for each bad one."""
    return tiny.of_groups([dataclasses.replace(group, label=i % 3 > 0) for i, group in enumerate(data.groups)])


WITH_PARTNERS = labelled(PAIRS)
SINGLE = labelled(tiny.dataset(groups=12, candidates=(1, 1), seed=3))
RANKED = LOSSES["plackett_luce"]._replace(data=())
TASKS = {
    "pairs": (PAIRS, LOSSES["sigmoid"]),
    "rankings": (RANKINGS, RANKED),
    "token mean": (PAIRS, LOSSES["sft"]),
    "token mean and more": (PAIRS, LOSSES["cpo"]),
    "batch statistic": (WITH_PARTNERS, LOSSES["kto"]),
    "running mean": (SINGLE, LOSSES["bco"]),
    "sorted": (PAIRS, LOSSES["aot"]),
    "sorted apart": (PAIRS, LOSSES["aot_unpaired"]),
    "sorted, of all pairs": (RANKINGS, over_all_pairs(LOSSES["aot"])),
    "several": (PAIRS, combine([LOSSES["sigmoid"], LOSSES["sft"], LOSSES["aot"]])),
}
SGD = optax.chain(optax.trace(decay=0.0), optax.sgd(1.0))
"""Subtracts the gradient, and keeps it as its state."""
MESHES = {
    "one device": lambda: make_mesh(jax.devices()[:1]),
    "eight devices": make_mesh,
    "data x fsdp x tensor": lambda: make_mesh(fsdp=2, tensor=2),
    "fsdp x context": lambda: make_mesh(fsdp=2, context=4),
}


class Expected(NamedTuple):
    """What separate forward passes say."""

    losses: np.ndarray
    """`[groups]`."""
    grads: dict
    """Of the mean loss."""


class Taken(NamedTuple):
    """What a step did."""

    change: dict
    """Parameters before minus parameters after."""
    grads: dict
    metrics: dict
    losses: dict
    """Example -> loss."""
    microbatches: int
    row_lengths: set[int]


@functools.cache
def expected(task: str) -> Expected:
    """In float64, from the numbers that float32 parameters hold; call it in x64 mode."""
    data, loss = TASKS[task]
    decoder = tiny.decoder(DIVISIBLE, "float64")
    reference = unpacked(decoder, tiny.params(decoder, seed=1, dtype="float64"), data)
    groups = group_data(data, reference if loss.needs_reference else None)

    def losses(params):
        return group_losses(loss, Outputs(unpacked(decoder, params, data), {}), groups, SCALARS)

    params = tiny.params(decoder, dtype="float64")
    return Expected(np.asarray(losses(params)), jax.jit(jax.grad(lambda p: losses(p).mean()))(params))


@functools.cache
def reference_logps(task: str, dtype: str):
    data, _ = TASKS[task]
    decoder, mesh = tiny.decoder(DIVISIBLE, dtype), make_mesh(jax.devices()[:1])
    params = tiny.params(decoder, mesh, seed=1, dtype=dtype)
    batches = all_batches(data, tiny.layout(data))
    with jax.set_mesh(mesh):
        return dataset_logps(make_logp_program(decoder), params, batches, mesh, label="reference")


@functools.cache
def setup(task: str, dtype: str, on: str):
    """Mesh, shardings and programs; the programs serve every layout."""
    decoder, mesh = tiny.decoder(DIVISIBLE, dtype), MESHES[on]()
    shardings = jax.tree.map(lambda x: x.sharding, fresh_state(dtype, mesh, task))
    return mesh, make_programs(preference_task(decoder, TASKS[task][1]), SGD, shardings)


def fresh_state(dtype: str, mesh, task="pairs"):
    params = tiny.params(tiny.decoder(DIVISIBLE, dtype), mesh, dtype=dtype)
    return init_state(params, SGD, mesh, loss=TASKS[task][1])


def host_microbatches(task, dtype, order, layout):
    data, loss = TASKS[task]
    reference = reference_logps(task, dtype) if loss.needs_reference else None
    made = microbatches(data, order, layout)
    return [Microbatch(batch, None if reference is None else slot_logps(reference, batch)) for batch in made]


def take_step(
    task="pairs", dtype="float64", on="one device", *, order=None, rows=slice(None), row_lengths=(64,), tokens=256
) -> Taken:
    """One step over a whole dataset: its groups in `order`, the rows of each microbatch in the order `rows`."""
    data, _ = TASKS[task]
    mesh, programs = setup(task, dtype, on)
    layout = tiny.layout(data, row_multiple=batch_size_multiple(mesh), row_lengths=row_lengths, tokens=tokens)
    made = host_microbatches(task, dtype, range(len(data)) if order is None else order, layout)
    made = [jax.tree.map(lambda x: x[rows], microbatch) for microbatch in made]
    state = fresh_state(dtype, mesh, task)
    counts = step_counts([microbatch.batch for microbatch in made])
    assert counts.groups == len(data)
    with jax.set_mesh(mesh):
        before = jax.device_get(state.params)
        state, metrics, losses = run_step(programs, state, place_batch(made, mesh), counts, SCALARS)
        change = jax.tree.map(np.subtract, before, jax.device_get(state.params))
        grads = jax.device_get(state.opt_state[0].trace)
    by_example = {}
    for (batch, _), of_batch in zip(made, losses, strict=True):
        at = np.nonzero(batch.group_mask)
        by_example |= dict(zip(batch.example_id[at].tolist(), of_batch[at].tolist(), strict=True))
    return Taken(
        change, grads, metrics, by_example, len(made), {microbatch.batch.tokens.shape[1] for microbatch in made}
    )


def check(taken: Taken, task: str) -> None:
    want = expected(task)
    assert relative(taken.change, want.grads) < 1e-10
    assert relative(taken.grads, want.grads) < 1e-10
    np.testing.assert_allclose([taken.losses[i] for i in range(len(want.losses))], want.losses, rtol=1e-10)
    np.testing.assert_allclose(taken.metrics["loss"], want.losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(taken.metrics["grad_norm"], optax.tree.norm(want.grads), rtol=1e-6)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


SHUFFLED = np.random.default_rng(0).permutation(len(PAIRS))
VARIANTS = {
    "one microbatch": ({}, 1),
    "several microbatches": ({"tokens": 64}, 4),
    "rows of two lengths": ({"row_lengths": (104, 48), "tokens": 104}, 3),
    "longer rows": ({"row_lengths": (384,), "tokens": 384}, 1),
    "rows reversed": ({"rows": slice(None, None, -1)}, 1),
    "groups in another order": ({"order": SHUFFLED}, 1),
    "eight devices": ({"on": "eight devices"}, 1),
    "data x fsdp x tensor": ({"on": "data x fsdp x tensor"}, 1),
    "fsdp x context": ({"on": "fsdp x context", "tokens": 128}, 2),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_is_the_gradient_of_the_mean_loss(x64, variant):
    options, count = VARIANTS[variant]
    taken = take_step(**options)
    assert taken.microbatches == count
    assert taken.row_lengths == set(options.get("row_lengths", (64,)))
    check(taken, "pairs")


ELSEWHERE = [
    (task, on) for task in ("batch statistic", "sorted", "several") for on in ("eight devices", "fsdp x context")
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "variant"),
    [(task, variant) for task in TASKS if task != "pairs" for variant in list(VARIANTS)[:3]] + ELSEWHERE,
)
def test_every_coupling_gives_the_gradient_of_the_whole_step(x64, task, variant):
    options, count = VARIANTS[variant]
    taken = take_step(task, **options)
    assert (taken.microbatches > 1) == (count > 1)
    assert taken.row_lengths == set(options.get("row_lengths", (64,)))
    check(taken, task)


def test_every_coupling_is_among_the_tasks():
    assert {loss.coupling for _, loss in TASKS.values()} == set(typing.get_args(LossSpec.__annotations__["coupling"]))


@pytest.mark.parametrize("on, options", [("one device", {}), ("one device", {"tokens": 64}), ("eight devices", {})])
def test_float32_rounds_within_its_precision(on, options):
    taken = take_step(dtype="float32", on=on, **options)
    with jax.enable_x64(True):
        want = expected("pairs")
    assert {leaf.dtype for leaf in jax.tree.leaves(taken.grads)} == {np.dtype(np.float32)}
    assert relative(taken.grads, jax.tree.map(np.asarray, want.grads)) < 5e-6
    np.testing.assert_allclose([taken.losses[i] for i in range(len(PAIRS))], want.losses, rtol=1e-5)


def test_metrics_are_means_over_the_groups(x64):
    """Against the definitions: rewards are beta times the log-ratio, ties would count one half."""
    taken = take_step()
    decoder = tiny.decoder(DIVISIBLE, "float64")
    policy, reference = (
        np.asarray(unpacked(decoder, tiny.params(decoder, seed=seed, dtype="float64"), PAIRS)) for seed in (0, 1)
    )
    rewards = BETA * (policy - reference)
    want = {
        "loss": expected("pairs").losses.mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).mean(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "logps/chosen": policy[:, 0].mean(),
        "logps/rejected": policy[:, 1].mean(),
    }
    assert set(want) < set(taken.metrics) and 0 < want["rewards/accuracies"] < 1
    assert {name: taken.metrics[name] for name in want} == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("tokens", [256, 64])
def test_the_state_is_donated(tokens):
    mesh, programs = setup("pairs", "float32", "one device")
    made = host_microbatches("pairs", "float32", range(len(PAIRS)), tiny.layout(PAIRS, row_lengths=[64], tokens=tokens))
    state = fresh_state("float32", mesh)
    with jax.set_mesh(mesh):
        counts = step_counts([microbatch.batch for microbatch in made])
        after, _, _ = run_step(programs, state, place_batch(made, mesh), counts, SCALARS)
    assert int(after.step) == 1
    donated = jax.tree.leaves((state.params, state.opt_state))
    assert donated and all(leaf.is_deleted() for leaf in donated)
    assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, fresh_state("float32", mesh))


@pytest.mark.parametrize("on", ["one device", "eight devices"])
def test_each_program_is_compiled_once(on, caplog):
    """Over steps with one and with several microbatches, of different sizes, and over a sweep of beta."""
    decoder, mesh = tiny.decoder(DIVISIBLE), MESHES[on]()
    layout = tiny.layout(PAIRS, row_multiple=batch_size_multiple(mesh), row_lengths=[64], tokens=1)
    state = fresh_state("float32", mesh)
    programs = make_programs(
        preference_task(decoder, LOSSES["sigmoid"]), SGD, jax.tree.map(lambda x: x.sharding, state)
    )
    counts = set()
    with jax.set_mesh(mesh), jax.log_compiles(True):
        for beta, groups in ((0.1, 1), (0.2, 12), (0.3, 7), (0.4, 2), (0.5, 12)):
            made = host_microbatches("pairs", "float32", list(range(groups)) * 2, layout)
            counts.add(len(made) > 1)
            scalars = {"beta": beta, "label_smoothing": beta / 10}
            of_step = step_counts([microbatch.batch for microbatch in made])
            state, metrics, _ = run_step(programs, state, place_batch(made, mesh), of_step, scalars)
            assert np.isfinite(metrics["loss"])
        assert counts == ({False, True} if on == "one device" else {False})
    names = [record.args[0] for record in caplog.records if record.msg.startswith("Compiling")]
    compiled = {name: names.count(f"jit({name})") for name in ("step", "accumulate", "apply")}
    several = int(on == "one device")
    assert compiled == {"step": 1, "accumulate": several, "apply": several}


def test_beta_is_traced_and_counts(x64):
    """A sweep gives the loss of each beta from one program."""
    mesh, programs = setup("pairs", "float64", "one device")
    decoder = tiny.decoder(DIVISIBLE, "float64")
    policy, reference = (unpacked(decoder, tiny.params(decoder, seed=seed, dtype="float64"), PAIRS) for seed in (0, 1))
    made = host_microbatches("pairs", "float64", range(len(PAIRS)), tiny.layout(PAIRS, row_lengths=[64]))
    for beta in (0.01, 0.1, 1.0):
        scalars, state = {"beta": beta, "label_smoothing": 0.0}, fresh_state("float64", mesh)
        with jax.set_mesh(mesh):
            counts = step_counts([microbatch.batch for microbatch in made])
            _, metrics, _ = run_step(programs, state, place_batch(made, mesh), counts, scalars)
            want = dpo_loss(policy, reference, beta=beta).mean()
            np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)


@pytest.mark.parametrize("value", [5e-6, 0.1, -121.25, 1 / 3])
def test_metrics_are_the_shortest_decimals_of_their_precision(value):
    got = shortest(jax.numpy.float32(value))
    assert np.float32(got) == np.float32(value)
    assert len(repr(got)) <= len(repr(float(np.float32(value))))
    assert shortest(jax.numpy.float32(5e-6)) == 5e-6


@pytest.mark.parametrize("on", ["one device", "eight devices"])
def test_a_reference_that_moves_stays_where_it_is(on):
    """With other shardings every program would be compiled again."""
    mesh = MESHES[on]()
    params = tiny.params(tiny.decoder(DIVISIBLE), mesh)
    state = init_state(params, SGD, mesh, moving_reference=True)
    state = state._replace(params=jax.tree.map(lambda x: 2 * x, state.params))
    before, shardings = jax.device_get(state), jax.tree.map(lambda x: x.sharding, state)
    moved = move_reference(state, 0.25)
    assert jax.tree.map(lambda x: x.sharding, moved) == shardings
    jax.tree.map(np.testing.assert_array_equal, moved.params, before.params)
    expected = jax.tree.map(lambda x: 1.25 * x, before.ref_params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), moved.ref_params, expected)
