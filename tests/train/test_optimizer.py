"""The optimizers are torch's, number by number, and the warm-up is the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdpo.config import DPOConfig
from jaxdpo.train.optimizer import OPTIMIZERS, adamw, make_optimizer, rmsprop, warmup_schedule

STEPS = 20
RATE, WARMUP = 1e-3, 5


def gradients(seed=0):
    """`[steps, parameters]` of magnitudes 1e-12 to 10, and zeros: where the place of epsilon shows."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-12, 1, size=300)
    grads = rng.normal(size=(STEPS, 300)) * size
    grads[:, :10] = 0
    return grads.astype(np.float32)


def rate(n):
    return RATE * min(1, (n + 1) / (WARMUP + 1))


def numpy_rmsprop(grads):
    """Updates of torch.optim.RMSprop(alpha=0.99, eps=1e-8), in float64."""
    mean_square = 0.0
    for n, grad in enumerate(grads.astype(np.float64)):
        mean_square = 0.99 * mean_square + 0.01 * grad**2
        yield -rate(n) * grad / (np.sqrt(mean_square) + 1e-8)


def numpy_adamw(grads):
    """Updates of torch.optim.AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0), in float64."""
    mean = mean_square = 0.0
    for n, grad in enumerate(grads.astype(np.float64)):
        mean = 0.9 * mean + 0.1 * grad
        mean_square = 0.999 * mean_square + 0.001 * grad**2
        corrected = mean / (1 - 0.9 ** (n + 1)), mean_square / (1 - 0.999 ** (n + 1))
        yield -rate(n) * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)


def ours(optimizer, params, grads):
    """Parameters after every step, `[steps + 1, parameters]`."""

    @jax.jit
    def step(params, state, grad):
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    path = [jnp.asarray(params)]
    state = optimizer.init(path[0])
    for grad in grads:
        params, state = step(path[-1], state, grad.astype(path[0].dtype))
        path.append(params)
    return np.array(path)


REFERENCES = {"rmsprop": numpy_rmsprop, "adamw": numpy_adamw}


def test_every_optimizer_has_a_reference():
    assert set(REFERENCES) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", REFERENCES)
def test_optimizer_is_its_definition(name):
    """Every single update, also those of gradients far below epsilon; the learning rate itself is float32."""
    want = list(REFERENCES[name](gradients()))
    with jax.enable_x64(True):
        got = np.diff(ours(OPTIMIZERS[name](warmup_schedule(RATE, WARMUP)), np.zeros(300), gradients()), axis=0)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (got[:, :10] == 0).all() and (got[:, 10:] != 0).all()


@pytest.mark.parity
@pytest.mark.parametrize("name", REFERENCES)
def test_optimizer_is_torchs(name):
    torch = pytest.importorskip("torch")
    start = np.random.default_rng(1).normal(size=300).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(start))
    theirs = {
        "rmsprop": lambda: torch.optim.RMSprop([parameter], lr=RATE, alpha=0.99, eps=1e-8),
        "adamw": lambda: torch.optim.AdamW([parameter], lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
    }[name]()
    schedule = torch.optim.lr_scheduler.LambdaLR(theirs, lambda n: min(1, (n + 1) / (WARMUP + 1)))
    for grad in gradients():
        parameter.grad = torch.tensor(grad)
        theirs.step()
        schedule.step()
    got = ours(OPTIMIZERS[name](warmup_schedule(RATE, WARMUP)), start, gradients())
    np.testing.assert_allclose(got[-1], parameter.detach().numpy(), rtol=0, atol=1e-6)


def test_the_usual_rmsprop_is_another():
    """The gradients above tell torch's semantics from Optax's defaults."""
    want = sum(numpy_rmsprop(gradients()))
    usual = optax.rmsprop(warmup_schedule(RATE, WARMUP), decay=0.99, eps=1e-8)
    got = ours(usual, np.zeros(300, np.float32), gradients())[-1]
    assert np.abs(got - want).max() > RATE


@pytest.mark.parametrize("warmup", [0, 1, 5, 150])
def test_warm_up(warmup):
    schedule = warmup_schedule(1e-6, warmup)
    for n in (0, 1, warmup // 2, max(warmup - 1, 0), warmup, warmup + 1, 10_000):
        assert float(schedule(n)) == pytest.approx(1e-6 * min(1, (n + 1) / (warmup + 1)), rel=1e-6)
    assert float(schedule(jnp.int32(0))) > 0  # the first update moves


def config(**options):
    return DPOConfig(model="m", data="d", output_dir="o", warmup_steps=0, **options)


def first_update(optimizer, grads):
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    return updates


@pytest.mark.parametrize("limit, scale", [(10.0, 1.0), (2.5, 0.5), (0.0, 1.0)])
def test_the_global_norm_is_clipped_and_zero_is_off(limit, scale, monkeypatch):
    """The norm of (3, 4) is 5; an update rule that passes gradients through shows what reaches it."""
    monkeypatch.setitem(OPTIMIZERS, "rmsprop", lambda schedule: optax.identity())
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    got = first_update(make_optimizer(config(max_grad_norm=limit)), grads)
    np.testing.assert_allclose([got["a"][0], got["b"][0]], [3 * scale, 4 * scale], rtol=1e-6)


@pytest.mark.parametrize("name, update", [("rmsprop", rmsprop), ("adamw", adamw)])
def test_the_configured_optimizer_is_built(name, update):
    grads = {"a": jnp.array([3.0, -0.2])}
    made = make_optimizer(config(optimizer=name, learning_rate=0.1))
    want = first_update(update(warmup_schedule(0.1, 0)), grads)
    np.testing.assert_allclose(first_update(made, grads)["a"], want["a"], rtol=1e-6)
