"""
The model: configuration, mask, diffusion, transformer, and the generation mixin. Importing it registers the classes
with transformers' Auto classes.

Files named `*_blockgen.py`, here and in `generation/`, travel with a saved model as remote code: they import only
torch, transformers, the standard library and one another. `save_pretrained` writes them as one flat folder, the form
that transformers loads (`remote_code_blockgen.py`).
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ..generation.generation_blockgen import BlockGenGenerateOutput
from ..generation.generation_configuration_blockgen import BlockGenGenerationConfig
from .configuration_blockgen import BlockGenConfig
from .diffusion_blockgen import MaskedDiffusion, NoiseSchedule, UniformDiffusion, diffusion_from_config
from .modeling_blockgen import BlockGenForDiffusionLM, BlockGenOutput
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
