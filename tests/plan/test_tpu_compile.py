"""Plans for TPUs, which take libtpu and no TPU: that whole training steps of known models fit the slices they should.

Each compiles one program, the step, once and with the least effort; nothing of it is run.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

from jaxdpo.config import PlanConfig
from jaxdpo.plan.analytic import step_flops
from jaxdpo.plan.job import make_job
from jaxdpo.plan.programs import compiled_programs, computed_keys, scored_chunks
from jaxdpo.plan.search import candidates
from jaxdpo.plan.shapes import known_config
from jaxdpo.plan.worker import machine_of
from jaxdpo.types import InputError

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.usefixtures("least_effort"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"),
]

CASES = {
    "smollm2-135m on v5e:2x4": {"model": "smollm2-135m", "topology": "v5e:2x4", "remat": "full"},
    "smollm2-135m on two slices of v5e:2x4": {
        "model": "smollm2-135m",
        "topology": "v5e:2x4",
        "slices": 2,
        "remat": "full",
    },
    "llama-3.1-8b on v5e:4x4": {"model": "llama-3.1-8b", "topology": "v5e:4x4", "mesh": "fsdp=16", "remat": "full"},
    "llama-3.1-8b on v5p:2x2x2": {"model": "llama-3.1-8b", "topology": "v5p:2x2x2", "mesh": "fsdp=8", "remat": "full"},
    "llama-3.1-70b on v5p:4x4x4": {
        "model": "llama-3.1-70b",
        "topology": "v5p:4x4x4",
        "mesh": "fsdp=16,tensor=4",
        "remat": "full",
    },
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_step_fits(options):
    config = PlanConfig(length=2048, quick=True, **options)
    machine = machine_of(config)
    job = make_job(config, known_config(config.model), machine.devices, machine.usable)
    best, *_ = candidates(job, machine.rates, config.remat)
    placed = best.placed
    assert len(placed.batches) == 1 and placed.decoder.attention == "splash"
    step = next(compiled_programs(job, placed, print))
    print(f"{config.model} on {config.topology}: {step.memory / 2**30:.2f} GiB, {step.seconds:.0f} s to compile")
    assert step.memory <= machine.usable
    used, width = scored_chunks(placed.batches[0].slot_owner, placed.batches[0].candidate_mask, placed.mesh)
    by_arithmetic = step_flops(placed, keys=computed_keys(job, placed), scored=used * width)
    assert step.costs.flops * placed.mesh.size == pytest.approx(by_arithmetic, rel=0.05)
    sent = {item.network: item.bytes for item in step.costs.collectives}
    assert set(sent) == ({"ici", "dcn"} if config.slices > 1 else {"ici"})


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 1024,
}


def test_two_plans_at_once(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    options = ["--model", str(tmp_path), "--length", "512", "--attention", "dense", "--quick", "--json"]
    command = [sys.executable, "-m", "jaxdpo.cli", "plan", *options]
    both = [
        subprocess.Popen([*command, "--remat", "full", "--mesh", mesh, "--topology", "v5e:2x2"], stdout=subprocess.PIPE)
        for mesh in ("fsdp=4", "fsdp=2,tensor=2")
    ]
    plans = [json.loads(process.communicate(timeout=600)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [plan["mesh"] for plan in plans] == ["fsdp=4", "fsdp=2,tensor=2"]
    for plan in plans:
        assert plan["fits"] and plan["bound"] in plan["seconds"]
        assert set(plan["seconds"]) == {"compute", "ici", "dcn"}  # quick ones do not know memory's


def test_what_libtpu_does_not_know(monkeypatch):
    monkeypatch.setitem(sys.modules["jaxdpo.plan.topology"].SLICES, "v5e", ("3x3",))
    with pytest.raises(InputError, match=r"v5e:3x3: this libtpu does not know it .* allowed: others of v5e"):
        machine_of(PlanConfig(model="smollm2-135m", topology="v5e:3x3"))
