"""Reading GGUF, the single-file format of llama.cpp: configuration, tensors and tokenizer of Llama-shaped models.

Everything comes out in Hugging Face form: a `config.json` dict, tensors under their Hugging Face names, a fast
tokenizer. Quantized tensors are expanded block by block as they are read.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxdpo.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TENSOR_TYPES = ("F32", "F16", "Q8_0", "Q4_1")

_NAMES = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"blk\.(\d+)\.attn_(q|k|v)\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"blk\.(\d+)\.attn_output\.weight": r"model.layers.\1.self_attn.o_proj.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.weight": r"model.layers.\1.mlp.\2_proj.weight",
}
"""GGUF name -> Hugging Face name, as regular expressions."""

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    # As transformers reads a SmolLM2 GGUF. The tokenizer on the hub (and llama.cpp) splits off digits first, which
    # differs where two or more spaces or newlines stand before a digit: "\n\n1" is 3 tokens here and 2 there.
    "smollm": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}
"""`tokenizer.ggml.pre` -> how text is split before byte-pair merging."""


def find_gguf(directory: pathlib.Path) -> "GGUFFile | None":
    """The GGUF file of a directory that has no `config.json`; InputError where there are several."""
    paths = [] if (directory / "config.json").is_file() else sorted(directory.glob("*.gguf"))
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise InputError(f"{directory} holds {len(paths)} GGUF files ({names}); keep the one you mean")
    return _open(paths[0], paths[0].stat().st_mtime_ns) if paths else None


class GGUFFile:
    """A GGUF file of a Llama-shaped model; a `families.Tensors` under Hugging Face names.

    Attributes:
      where: the path, for messages.
      shapes: name -> shape.
    """

    def __init__(self, path: pathlib.Path):
        self.where = str(path)
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise InputError(f"{path} is not a whole GGUF file ({error}); download it again") from error
        architecture = self._get("general.architecture")
        if architecture != "llama":
            raise InputError(f"{path} holds architecture {architecture!r}; allowed in GGUF: 'llama'")
        self._tensors = {_hf_name(tensor.name, path): tensor for tensor in self._reader.tensors}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()
        }
        for tensor in self._reader.tensors:
            if tensor.tensor_type.name not in TENSOR_TYPES:
                raise InputError(
                    f"{path}: tensor {tensor.name!r} is stored as {tensor.tensor_type.name}; "
                    f"allowed: {', '.join(TENSOR_TYPES)}; convert the file, or use the model's safetensors"
                )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A block of a tensor, float32."""
        tensor = self._tensors[name]
        if not re.search(r"\.[qk]_proj\.", name):
            rows = gguf.quants.dequantize(np.ascontiguousarray(tensor.data[index[0]]), tensor.tensor_type)
            return rows[(slice(None), *index[1:])]
        config = self.config
        heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # llama.cpp turns feature 2i with 2i + 1, Hugging Face i with i + head_dim/2: put the rows back in that order.
        pairs = whole.reshape(heads, config["head_dim"] // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(whole.shape)[index]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """What `config.json` of the model would say."""
        heads, embed = self._need("attention.head_count"), self._need("embedding_length")
        head_dim = self._get("llama.attention.key_length", embed // heads)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if self._get(key, head_dim) != head_dim:
                raise InputError(f"{self.where}: {key} is {self._get(key)}; allowed: the key length, {head_dim}")
        scaling = self._get("llama.rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise InputError(f"{self.where}: rope scaling {scaling!r} in GGUF; allowed: none, linear")
        if "model.embed_tokens.weight" not in self.shapes:
            raise InputError(f"{self.where}: missing tensor 'token_embd.weight'; download the file again")
        ids = {name: self._get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKEN_IDS.items()}
        return {
            "model_type": "llama",
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": embed,
            "num_hidden_layers": self._need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("llama.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self._need("feed_forward_length"),
            "max_position_embeddings": self._need("context_length"),
            "rms_norm_eps": _shortest(self._need("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(self._get("llama.rope.freq_base", 10000.0)),
            "rope_scaling": {"rope_type": "linear", "factor": self._need("rope.scaling.factor")}
            if scaling == "linear"
            else None,
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            **{f"{name}_id": value for name, value in ids.items() if name != "unk_token"},
        }

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer in the file, with special tokens and chat template; InputError if not byte-level BPE."""
        kind, split = self._get("tokenizer.ggml.model"), self._get("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or split not in PRE_TOKENIZERS:
            raise InputError(
                f"{self.where}: tokenizer {kind!r} with splitting {split!r}; allowed in GGUF: 'gpt2' with "
                f"{', '.join(map(repr, PRE_TOKENIZERS))}; use the model's Hugging Face directory"
            )
        texts, types = self._get("tokenizer.ggml.tokens"), self._get("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self._get("tokenizer.ggml.merges")]
        bpe = tokenizers.Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges))
        bpe.pre_tokenizer = PRE_TOKENIZERS[split]()
        bpe.decoder = decoders.ByteLevel()
        for kinds, special in ((_CONTROL, True), (_USER_DEFINED, False)):
            added = [t for t, token_type in zip(texts, types, strict=True) if token_type == kinds]
            bpe.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False) for text in added])
        ids = {name: self._get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKEN_IDS.items()}
        special_tokens = {name: texts[i] for name, i in ids.items() if i is not None}
        first = f"{special_tokens['bos_token']} " if self._get("tokenizer.ggml.add_bos_token", False) else ""
        if first:
            bpe.post_processor = processors.TemplateProcessing(
                single=f"{first}$A", pair=f"{first}$A {first}$B", special_tokens=[(first.strip(), ids["bos_token"])]
            )
        from transformers import PreTrainedTokenizerFast  # 2 s to import, and reading weights does not need it

        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            model_max_length=self.config["max_position_embeddings"],
            clean_up_tokenization_spaces=False,
            chat_template=self._get("tokenizer.chat_template"),
            **special_tokens,
        )

    def _get(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _need(self, key: str) -> Any:
        value = self._get(f"llama.{key}")
        if value is None:
            raise InputError(f"{self.where} lacks the key 'llama.{key}'; convert the model again")
        return value


_TOKEN_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Name of a special token -> what GGUF calls it."""


@functools.lru_cache(maxsize=1)
def _open(path: pathlib.Path, modified: int) -> GGUFFile:
    """Parsing the header takes seconds (100 000 strings), and configuration, weights and tokenizer each need it."""
    return GGUFFile(path)


def _hf_name(name: str, path: pathlib.Path) -> str:
    for pattern, replacement in _NAMES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise InputError(f"{path}: unknown tensor {name!r}; use the model's safetensors")


def _shortest(value: float) -> float:
    """The decimal that was meant by a float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))
