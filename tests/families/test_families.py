"""Every family reads and writes Hugging Face checkpoints exactly; a row of FAMILIES is tested by being there."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdpo.families import FAMILIES, export_config, load_params
from jaxdpo.hf import load_hf, load_reward_model, save_hf
from jaxdpo.models import Decoder, Rope, abstract_params, logical_axes, make_decoder
from jaxdpo.sharding import make_mesh
from jaxdpo.types import InputError
from tests.families.cases import CASES, CLASSIFIERS, TOKENS, tensors, write_checkpoint
from tests.families.make_golden import GOLDEN, torch_logits, torch_model

LOGITS = jax.jit(Decoder.logits, static_argnums=0)
WITHOUT_TORCH = "needs torch: pip install torch --index-url https://download.pytorch.org/whl/cpu"

every_case = pytest.mark.parametrize("case", CASES)
every_classifier = pytest.mark.parametrize("case", CLASSIFIERS)
every_family = pytest.mark.parametrize("case", ["llama-biases", "mistral-window", "gpt2-tied", "gpt2-untied"])


@dataclasses.dataclass
class InMemory:
    """A checkpoint as a dict of arrays: the smallest `families.Tensors`."""

    values: dict[str, np.ndarray]
    where: str = "checkpoint"

    @property
    def shapes(self):
        return {name: value.shape for name, value in self.values.items()}

    def read(self, name, index):
        return self.values[name][index]


@functools.cache
def decoder_of(case):
    return make_decoder(FAMILIES[CASES[case]["model_type"]].from_hf(CASES[case]))


def load(case, values=None, mesh=None):
    source = InMemory(tensors(CASES[case]) if values is None else values)
    return load_params(FAMILIES[CASES[case]["model_type"]], decoder_of(case), source, mesh)


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


def test_every_family_has_a_case():
    assert {config["model_type"] for config in CASES.values()} == set(FAMILIES)


@every_case
def test_golden_logits(case):
    logits = LOGITS(decoder_of(case), load(case), TOKENS)
    np.testing.assert_allclose(logits[:, -1], np.load(GOLDEN)[case], rtol=0, atol=1e-4)


@pytest.mark.parity
@every_case
def test_logits_of_transformers(case):
    pytest.importorskip("torch", reason=WITHOUT_TORCH)
    expected = torch_logits(torch_model(CASES[case]), TOKENS)
    np.testing.assert_allclose(LOGITS(decoder_of(case), load(case), TOKENS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama-rope-llama3", {"rope": Rope(theta=500.0)}),
        ("llama-rope-linear", {"rope": Rope()}),
        (
            "llama-rope-parameters",
            {"rope": dataclasses.replace(decoder_of("llama-rope-parameters").config.rope, theta=1e4)},
        ),
        ("llama-biases", {"activation": "silu"}),
        ("mistral-window", {"sliding_window": None}),
        ("gpt2-untied", {"activation": "gelu_tanh"}),
    ],
)
def test_what_the_cases_cover_changes_their_logits(case, change):
    other = dataclasses.replace(decoder_of(case), config=dataclasses.replace(decoder_of(case).config, **change))
    difference = np.abs(LOGITS(other, load(case), TOKENS)[:, -1] - np.load(GOLDEN)[case]).max()
    assert difference > 3e-4  # so that the 1e-4 above would notice


@every_case
def test_config_round_trip(case):
    config = decoder_of(case).config
    exported = json.loads(json.dumps(export_config(config)))
    assert FAMILIES[config.model_type].from_hf(exported) == config


@every_classifier
def test_config_round_trip_of_a_classifier(case):
    family = FAMILIES[CLASSIFIERS[case]["model_type"]]
    config = family.from_hf(CLASSIFIERS[case])
    exported = json.loads(json.dumps(export_config(config)))
    assert config.head == "score"
    assert family.from_hf(exported) == config
    assert exported["architectures"] == CLASSIFIERS[case]["architectures"] == [family.architectures["score"]]
    assert (exported["id2label"], exported["label2id"]) == ({"0": "reward"}, {"reward": 0})
    assert exported["problem_type"] == "regression"


@every_classifier
def test_import_export_import_of_a_classifier_is_bitwise(case, tmp_path):
    expected = tensors(CLASSIFIERS[case])
    assert expected["score.weight"].shape == (1, 36) and "lm_head.weight" not in expected
    decoder, params = load_reward_model(write_checkpoint(tmp_path / "in", CLASSIFIERS[case]))
    save_hf(tmp_path / "out", decoder, params)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(written[name].tobytes() == expected[name].tobytes() for name in expected)
    again, params_again = load_reward_model(tmp_path / "out")
    assert again == decoder
    assert_equal_trees(params, params_again)


@every_case
@pytest.mark.parametrize("max_shard_bytes", [2**40, 20_000], ids=["single", "sharded"])
def test_import_export_import_is_bitwise(case, max_shard_bytes, tmp_path):
    decoder, params = load_hf(write_checkpoint(tmp_path / "in", CASES[case]))
    save_hf(tmp_path / "out", decoder, params, max_shard_bytes=max_shard_bytes)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 20_000)
    written = {name: value for path in files for name, value in load_file(path).items()}
    expected = tensors(CASES[case])
    assert written.keys() == expected.keys()
    assert all(written[name].tobytes() == expected[name].tobytes() for name in expected)
    again, params_again = load_hf(tmp_path / "out")
    assert again == decoder
    assert_equal_trees(params, params_again)


@pytest.mark.parity
@every_case
def test_export_loads_in_transformers(case, tmp_path):
    torch = pytest.importorskip("torch", reason=WITHOUT_TORCH)
    import transformers

    decoder, params = decoder_of(case), load(case)
    save_hf(tmp_path / "out", decoder, params, max_shard_bytes=20_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.float32
    assert type(model).__name__ == FAMILIES[decoder.config.model_type].architectures["lm"]
    expected = LOGITS(decoder, params, TOKENS)
    np.testing.assert_allclose(torch_logits(model, TOKENS), expected, rtol=0, atol=1e-4)


@every_case
def test_patterns_name_the_logical_axes_of_the_module(case):
    config = decoder_of(case).config
    axes = logical_axes(decoder_of(case))
    covered = []
    for weight in FAMILIES[config.model_type].weights(config):
        for path in weight.paths:
            leaf = functools.reduce(lambda tree, key: tree[key], path.split("/"), axes)
            if config.num_kv_heads == config.num_heads:  # then a table may call both heads
                leaf = tuple(axis.removeprefix("kv_") for axis in leaf)
            assert leaf == (("layers",) if weight.stacked else ()) + weight.axes, path
            covered.append(path)
    assert len(covered) == len(set(covered)) == len(jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)))


@every_classifier
def test_a_score_head_is_a_row_of_the_table(case):
    config = FAMILIES[CLASSIFIERS[case]["model_type"]].from_hf(CLASSIFIERS[case])
    *backbone, head = FAMILIES[config.model_type].weights(config)
    assert (head.paths, head.axes) == (("score",), logical_axes(make_decoder(config))["score"])
    assert "head" not in {weight.path for weight in backbone}


@every_family
def test_tensor_of_param_inverts_param_of_tensor(case):
    config = decoder_of(case).config
    values = tensors(CASES[case])
    for weight in FAMILIES[config.model_type].weights(config):
        value = values[weight.name.format(layer=1)]
        sizes = weight.sizes(config)
        whole = tuple(slice(0, sizes[axis]) for axis in weight.axes)
        parts = [weight.to_param(config, part, whole, value.__getitem__) for part in range(len(weight.parts))]
        np.testing.assert_array_equal(weight.to_tensor(config, parts), value)
        # Any block equals that block of the whole parameter.
        block = tuple(slice(sizes[axis] // 3, max(sizes[axis] - 1, sizes[axis] // 3 + 1)) for axis in weight.axes)
        for part, param in enumerate(parts):
            np.testing.assert_array_equal(weight.to_param(config, part, block, value.__getitem__), param[block])


@every_family
def test_loaded_onto_a_mesh(case):
    config = CASES[case]
    heads = "n_head" if config["model_type"] == "gpt2" else "num_attention_heads"
    wide = {"vocab_size": 104, heads: 6 if heads == "n_head" else config[heads]}
    mesh = make_mesh(fsdp=4, tensor=2)
    family = FAMILIES[config["model_type"]]
    decoder = make_decoder(family.from_hf(config | wide))
    source = InMemory(tensors(config | wide))
    sharded, whole = load_params(family, decoder, source, mesh), load_params(family, decoder, source)
    assert_equal_trees(jax.device_get(sharded), jax.device_get(whole))
    expected = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(decoder, mesh))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, sharded, expected))
    kernel = sharded["blocks"]["attention"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    with jax.set_mesh(mesh):
        tokens = np.repeat(TOKENS, 2, axis=0)
        np.testing.assert_allclose(LOGITS(decoder, sharded, tokens), LOGITS(decoder, whole, tokens), rtol=0, atol=2e-5)


@every_family
def test_a_tensor_is_read_once_for_all_devices_that_hold_it(case):
    class Counting(InMemory):
        reads = 0

        def read(self, name, index):
            self.reads += 1
            return super().read(name, index)

    source = Counting(tensors(CASES[case]))
    family, config = FAMILIES[CASES[case]["model_type"]], decoder_of(case).config
    load_params(family, decoder_of(case), source, make_mesh(fsdp=1))
    per_layer = [len(w.parts) * (config.num_layers if w.stacked else 1) for w in family.weights(config)]
    assert source.reads == sum(per_layer)


@every_family
def test_backbone_names_and_buffers(case):
    family = FAMILIES[CASES[case]["model_type"]]
    values = tensors(CASES[case])
    bare = {name.removeprefix(family.prefix): value for name, value in values.items()}
    assert bare.keys() != values.keys()
    buffer = "h.0.attn.bias" if family.prefix == "transformer." else "layers.0.self_attn.rotary_emb.inv_freq"
    assert_equal_trees(load(case, bare | {buffer: np.ones(3), family.prefix + buffer: np.ones(3)}), load(case))


def test_copy_of_a_tied_head_is_ignored():
    values = tensors(CASES["gpt2-tied"])
    assert_equal_trees(
        load("gpt2-tied", values | {"lm_head.weight": values["transformer.wte.weight"]}), load("gpt2-tied")
    )


@every_family
@pytest.mark.parametrize("fault", ["unknown", "missing", "twice", "shape"])
def test_four_loud_failures_name_the_tensor(case, fault):
    family = FAMILIES[CASES[case]["model_type"]]
    values = tensors(CASES[case])
    name = [name for name in values if ".1." in name][-1]
    bare = name.removeprefix(family.prefix)
    faults = {
        "unknown": (
            values | {"model.layers.0.extra.weight": values[name]},
            "unknown tensor 'model.layers.0.extra.weight'",
        ),
        "missing": ({k: v for k, v in values.items() if k != name}, f"missing tensor '{name}'"),
        "twice": (values | {bare: values[name]}, f"tensor '{name}' is there twice, also as '{bare}'"),
        "shape": (values | {name: values[name][:-1]}, f"tensor '{name}' has shape"),
    }
    changed, message = faults[fault]
    with pytest.raises(InputError, match="checkpoint: " + message.replace("(", r"\(")):
        load(case, changed)


REFUSED = [
    ("llama-biases", {"hidden_act": "quick_gelu"}, "activation 'quick_gelu'; allowed: silu, gelu"),
    ("llama-biases", {"pretraining_tp": 2}, "pretraining_tp = 2"),
    ("llama-biases", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("llama-biases", {"sliding_window": 8}, "sliding_window = 8"),
    ("llama-biases", {"quantization_config": {"bits": 4}}, "quantization_config"),
    (
        "llama-biases",
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        "rope scaling 'yarn'; allowed: default, linear",
    ),
    ("llama-biases", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
    ("llama-biases", {"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
    (
        "llama-biases",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    ("llama-biases", {"rope_parameters": {"rope_type": "default", "mscale": 0.5}}, "mscale = 0.5"),
    ("llama-biases", {"num_key_value_heads": 4}, "num_heads is 6 with num_kv_heads 4"),
    ("llama-biases", {"head_dim": 5}, "head_dim is 5 with rope; allowed: even"),
    ("llama-biases", {"hidden_size": None}, "lacks 'hidden_size'"),
    ("mistral-window", {"attention_bias": True}, "attention_bias = True"),
    ("mistral-window", {"sliding_window": 0}, "sliding_window is 0"),
    ("gpt2-tied", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("gpt2-tied", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
    ("gpt2-tied", {"add_cross_attention": True}, "add_cross_attention = True"),
    ("gpt2-tied", {"scale_attn_weights": False}, "scale_attn_weights = False"),
    ("gpt2-tied", {"n_head": 5}, "5 heads for 36 features"),
    (
        "llama-biases",
        {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}},
        "LlamaForSequenceClassification with 3 labels; allowed: 1",
    ),
    (  # two labels are the default, which transformers does not save
        "gpt2-tied",
        {"architectures": ["GPT2ForSequenceClassification"]},
        "GPT2ForSequenceClassification with 2 labels; allowed: 1",
    ),
]


@pytest.mark.parametrize(("case", "change", "message"), REFUSED)
def test_what_would_change_the_mathematics_is_refused(case, change, message):
    config = CASES[case] | change
    with pytest.raises(InputError) as error:
        FAMILIES[config["model_type"]].from_hf(config)
    assert message in str(error.value)


def test_defaults_of_transformers():
    config = {key: value for key, value in CASES["mistral-window"].items() if key != "sliding_window"}
    assert FAMILIES["mistral"].from_hf(config).sliding_window == 4096
    del config["head_dim"], config["rms_norm_eps"], config["rope_theta"]
    config["model_type"] = "llama"
    read = FAMILIES["llama"].from_hf(config)
    assert (read.head_dim, read.norm_eps, read.rope, read.tie_embeddings) == (36 // 6, 1e-6, Rope(), False)


@pytest.mark.parametrize(
    ("case", "change", "field"),
    [
        ("llama-biases", {"sliding_window": 4}, "sliding_window"),
        ("llama-biases", {"norm": "layernorm"}, "norm"),
        ("llama-biases", {"rope": None}, "rope"),
        ("mistral-window", {"mlp_bias": True}, "mlp_bias"),
        ("gpt2-tied", {"head_dim": 8}, "head_dim"),
    ],
)
def test_export_refuses_what_config_json_cannot_say(case, change, field):
    config = dataclasses.replace(decoder_of(case).config, **change)
    with pytest.raises(InputError, match=f"config.json cannot say {field} = "):
        export_config(config)
