"""Plans on the CPU devices of the tests: what they say, against arithmetic and against what a run does."""

import dataclasses
import json

import jax
import pytest

from jaxdpo.config import PlanConfig
from jaxdpo.hf import save_hf
from jaxdpo.plan import worker
from jaxdpo.plan.job import make_job, place
from jaxdpo.plan.programs import TooLarge, needed_bytes, trip_counts
from jaxdpo.plan.report import report
from jaxdpo.plan.roofline import Rates
from jaxdpo.plan.search import candidates, sensible
from jaxdpo.sharding import batch_size_multiple, make_mesh
from jaxdpo.types import InputError
from tests import tiny

WIDE = dataclasses.replace(tiny.LLAMA, embed_dim=64, num_heads=8, head_dim=8, mlp_dim=128, vocab_size=4096)
RATES = Rates(1e12, 1e11, 1e10, 1e9)
KEYS = {
    "model", "topology", "mesh", "fits", "hbm_gib_per_chip", "hbm_limit_gib", "flops_per_step", "step_seconds_bound",
    "bound", "pairs_per_second_bound", "compile_seconds", "hbm_gib_by_kind", "mfu_bound", "sent_bytes_per_chip",
    "hbm_bytes_per_chip", "seconds", "remat", "warnings", "candidates", "reference_seconds_bound",
}  # fmt: skip


def options(**changes) -> PlanConfig:
    small = {"model": "m", "length": 128, "batch_size": 16, "prompt_tokens": 8, "completion_tokens": 10}
    return PlanConfig(**{**small, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model")
    decoder = tiny.decoder(WIDE)
    save_hf(directory, decoder, tiny.params(decoder))
    return str(directory)


@pytest.fixture(scope="module")
def one(model):
    """A plan of several microbatches on a mesh of all devices; and the lines that were said."""
    said = []
    config = options(model=model, mesh="fsdp=8", microbatch_tokens=128, batch_size=40, remat="full")
    return json.loads(json.dumps(worker.make_plan(config, said.append))), said


def test_the_keys_of_a_plan(one):
    plan, said = one
    assert set(plan) >= KEYS
    assert (plan["mesh"], plan["fits"], plan["bound"]) == ("fsdp=8", True, "compute")
    assert said == [f"compiling {name} for 8 devices" for name in ("accumulate", "apply", "reference")]
    assert plan["microbatches"] == 2 and plan["rows"] == 8


def test_flops_are_those_of_arithmetic(one):
    plan, _ = one
    assert plan["flops_per_step"] == pytest.approx(plan["flops_per_step_by_arithmetic"], rel=0.05)


def test_memory_by_kind_adds_up(one):
    plan, _ = one
    kinds = plan["hbm_gib_by_kind"]
    assert sum(kinds.values()) == pytest.approx(plan["hbm_gib_per_chip"], rel=1e-3)
    assert 0 < kinds["parameters"] == kinds["gradients"] == pytest.approx(kinds["optimizer"], rel=0.01)


def test_sums_over_the_devices_are_in_the_plan(one):
    """Parameters are gathered and gradients reduced over 8 devices, 7/8 of each at least, float32."""
    plan, _ = one
    sent = {item["collective"]: item["bytes"] for item in plan["sent_bytes_per_chip"]}
    assert sent["all-reduce"] + sent.get("reduce-scatter", 0) > plan["parameters"] * 4 * 7 / 8
    assert sent["all-gather"] > plan["parameters"] * 4 * 7 / 8


def test_a_plan_for_people(one):
    plan, _ = one
    text = report(plan)
    assert "fits" in text and "bound by matrix products" in text and "fsdp=8" in text
    assert "DOES NOT FIT" in report({**plan, "fits": False})


def test_a_step_of_one_microbatch_runs_one_program(model):
    config = options(model=model, mesh="fsdp=2", batch_size=4)
    job = make_job(config, WIDE, jax.devices()[:2], 1e12)
    placed = place(job, make_mesh(job.devices), "full")
    assert len(placed.batches) == 1
    assert trip_counts(placed)["microbatches"] == 1


def test_rows_are_those_of_a_run(model):
    job = make_job(options(model=model), WIDE, jax.devices(), 1e12)
    placed = place(job, make_mesh(job.devices, fsdp=4, tensor=2), "full")
    assert all(len(batch.tokens) % batch_size_multiple(placed.mesh) == 0 for batch in placed.batches)
    assert sum(int(batch.group_mask.sum()) for batch in placed.batches) == 16
    assert placed.layout.row_lengths == (128,)


def test_the_order_of_ways_to_do_it(model):
    """Those that fit come first, the fastest of them in front; of those that do not, the smallest."""
    found = candidates(make_job(options(model=model), WIDE, jax.devices(), 1e12), RATES, None)
    seconds = [item.roofline.step for item in found]
    assert all(item.fits for item in found) and seconds == sorted(seconds)
    none = candidates(make_job(options(model=model), WIDE, jax.devices(), 1.0), RATES, None)
    memory = [item.memory for item in none]
    assert not any(item.fits for item in none) and memory == sorted(memory)
    assert {item.placed.decoder.remat for item in found} == {"projections", "attention", "full"}


def test_meshes_that_are_looked_at_can_be_used():
    found = list(sensible(WIDE, 8, 2, 128))
    assert found
    for sizes in found:
        assert sizes["data"] % 2 == 0 and WIDE.num_heads % sizes["tensor"] == 0 and sizes["context"] == 1
        place(make_job(options(), WIDE, jax.devices(), 1e12), make_mesh(jax.devices(), **sizes), "full")


def test_what_the_compiler_refuses_does_not_fit(model, monkeypatch):
    """The next way is tried, three in all; the plan then says what the last one needs, and warns as any other."""
    refused = []

    def refuse(job, placed, say):
        refused.append(placed)
        raise TooLarge("step", 20 * 2.0**30)
        yield

    monkeypatch.setattr(worker, "compiled_programs", refuse)
    plan = worker.make_plan(options(model=model, batch_size=2, mesh="fsdp=8"), print)
    assert len(refused) == worker.TRIED
    assert (plan["fits"], plan["hbm_gib_per_chip"]) == (False, 20.0)
    assert "the compiler refuses step needs 20.0 GiB" in report(plan)
    (warning,) = plan["warnings"]
    assert warning.startswith("2 pairs a step do not fill the rows of data x fsdp = 8 devices")


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.44G of "
         "15.75G hbm. Exceeded hbm capacity by 2.69G.", 18.44),
        ("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (2.25T) exceeds available HBM (15.75G).",
         2304.0),
    ],
)  # fmt: skip
def test_what_a_refusal_says(message, gib):
    assert needed_bytes(message) == pytest.approx(gib * 2**30)
    assert needed_bytes("RESOURCE_EXHAUSTED: no numbers") != needed_bytes("RESOURCE_EXHAUSTED: no numbers")  # NaN


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": "fsdp=16"}, "--mesh: fsdp=16 does not divide 8 devices; allowed: divisors of 8"),
        ({"mesh": "rows=2"}, "--mesh: got 'rows=2'; allowed: auto, or sizes of data, fsdp, tensor, context"),
        ({"length": 20}, "need 28 tokens; allowed: 20"),
        ({"prompt_tokens": 60}, "are 70; allowed: the model's 64 positions"),
        ({"microbatch_tokens": 64}, "--microbatch-tokens 64 does not hold a row of 128"),
        ({"model": "pythia-99b"}, "pythia-99b"),
    ],
)
def test_what_is_refused(model, changes, said):
    with pytest.raises(InputError, match=said):
        worker.make_plan(options(**{"model": model, **changes}), print)
