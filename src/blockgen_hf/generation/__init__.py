"""
Generation, from the prompt to the text. The files stand in `modeling/`, because remote code must be one flat folder:

prompt -> `generation_blockgen`: settings, checks and transformers' preparation of `generate`
       -> `block_decoding_blockgen`: the block loop. Seed autoregressively, then for each block
              canvas -> denoise -> propose -> verify -> re-noise (`correctors_blockgen`) -> commit
          with the rows, their cache and their ends in `decoding_state_blockgen`, logits processors in
          `logits_blockgen`, random numbers in `sampling_blockgen`
       -> text, and its cost

The settings of all that are `generation_configuration_blockgen`.
"""

from ..modeling.block_decoding_blockgen import BlockDecoder
from ..modeling.generation_blockgen import BlockGenGenerateOutput, BlockGenGenerationMixin
from ..modeling.generation_configuration_blockgen import CORRECTORS, DECODINGS, BlockGenGenerationConfig


__all__ = [
    "CORRECTORS",
    "DECODINGS",
    "BlockDecoder",
    "BlockGenGenerateOutput",
    "BlockGenGenerationConfig",
    "BlockGenGenerationMixin",
]
