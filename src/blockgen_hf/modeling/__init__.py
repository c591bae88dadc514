"""
The model: configuration, mask, diffusion, transformer, and the generation mixin. Importing it registers the classes
with transformers' Auto classes.

Files named `*_blockgen.py` are the remote-code closure: they import only torch, transformers, the standard library
and one another, and `save_pretrained` copies them as they are. They stand in one folder because transformers copies
flat folders.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_blockgen import BlockGenConfig
from .diffusion_blockgen import MaskedDiffusion, NoiseSchedule, UniformDiffusion, diffusion_from_config
from .generation_blockgen import BlockGenGenerateOutput
from .generation_configuration_blockgen import BlockGenGenerationConfig
from .modeling_blockgen import BlockGenForDiffusionLM
from .outputs_blockgen import BlockGenOutput
from .trunk_blockgen import BlockGenModel


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
