"""BlockGen: one denoiser that is an autoregressive, a block-diffusion and a full-sequence diffusion language model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._registration import register_with_transformers


if TYPE_CHECKING:
    from .modeling import (
        BlockGenConfig,
        BlockGenForDiffusionLM,
        BlockGenGenerateOutput,
        BlockGenGenerationConfig,
        BlockGenModel,
        BlockGenOutput,
        MaskedDiffusion,
        NoiseSchedule,
        UniformDiffusion,
        diffusion_from_config,
    )


__version__ = "0.1.0"

__all__ = [
    "BlockGenConfig",
    "BlockGenForDiffusionLM",
    "BlockGenGenerateOutput",
    "BlockGenGenerationConfig",
    "BlockGenModel",
    "BlockGenOutput",
    "MaskedDiffusion",
    "NoiseSchedule",
    "UniformDiffusion",
    "diffusion_from_config",
]

register_with_transformers()


def __getattr__(name: str) -> Any:
    """Imports the model where it is first asked for: the command line prints its help without torch."""
    if name in __all__:
        return getattr(import_module(f"{__name__}.modeling"), name)
    if name == "modeling":
        return import_module(f"{__name__}.modeling")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
