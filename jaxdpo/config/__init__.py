"""Every option of the command line, with its default, its help and what it allows.

A configuration is a frozen dataclass that is valid once it exists: `DPOConfig(...)` raises `InputError` for a value out
of range. Nothing here imports jax.
"""

from jaxdpo.config.dpo import DPOConfig
from jaxdpo.config.generate import GenerateConfig
from jaxdpo.config.names import Attention, Divergence, DType, Format, Logger, Loss, Optimizer, Remat, Resume
from jaxdpo.config.ppo import PPOOptions
from jaxdpo.config.run import RunConfig
from jaxdpo.config.sampling import SamplingConfig
from jaxdpo.config.sft import RewardConfig, SFTConfig
from jaxdpo.config.tools import AuditConfig, ConvertConfig, ExportConfig, PlanConfig, QuickstartConfig, ScoreConfig

__all__ = [
    "Attention",
    "AuditConfig",
    "ConvertConfig",
    "DPOConfig",
    "DType",
    "Divergence",
    "ExportConfig",
    "Format",
    "GenerateConfig",
    "Logger",
    "Loss",
    "Optimizer",
    "PPOOptions",
    "PlanConfig",
    "QuickstartConfig",
    "Remat",
    "Resume",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
    "ScoreConfig",
]
