"""Hugging Face checkpoints in and out: safetensors, `config.json`, generation config, tokenizer and chat template.

Language models load with `load_hf`, reward models with `load_reward_model`; `save_hf` writes either. Encoders that
classify texts load with `load_encoder`. Nothing here unpickles, runs code from a checkpoint, or needs torch.
"""

from jaxdpo.hf.encoders import load_encoder
from jaxdpo.hf.load import hf_config, hf_generation_config, load_config, load_hf, load_reward_model, load_tokenizer
from jaxdpo.hf.save import EXPORT_DTYPES, save_hf

__all__ = [
    "EXPORT_DTYPES",
    "hf_config",
    "hf_generation_config",
    "load_config",
    "load_encoder",
    "load_hf",
    "load_reward_model",
    "load_tokenizer",
    "save_hf",
]
