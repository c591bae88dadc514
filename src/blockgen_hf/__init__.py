"""BlockGen: one denoiser that is an autoregressive, a block-diffusion and a full-sequence diffusion language model."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling.configuration_blockgen import BlockGenConfig
from .modeling.diffusion_blockgen import MaskedDiffusion, NoiseSchedule, UniformDiffusion, diffusion_from_config
from .modeling.generation_blockgen import BlockGenGenerateOutput
from .modeling.generation_configuration_blockgen import BlockGenGenerationConfig
from .modeling.modeling_blockgen import BlockGenForDiffusionLM
from .modeling.outputs_blockgen import BlockGenOutput
from .modeling.trunk_blockgen import BlockGenModel


__version__ = "0.1.0"

AutoConfig.register(BlockGenConfig.model_type, BlockGenConfig)
AutoModel.register(BlockGenConfig, BlockGenForDiffusionLM)
AutoModelForCausalLM.register(BlockGenConfig, BlockGenForDiffusionLM)

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
