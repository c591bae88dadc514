"""
Generation, from the prompt to the text:

prompt -> `generation_blockgen`: checks, and transformers' own preparation of `generate`, with the settings of
          `generation_configuration_blockgen`
       -> `block_decoding_blockgen`: the block loop. Seed autoregressively, then for each block
              canvas -> denoise -> propose -> verify -> re-noise (`correctors_blockgen`) -> commit
          with the steps in `denoising_blockgen`, the rows, their cache and their ends in `decoding_state_blockgen`,
          and logits processors in `logits_blockgen`; `speculation_blockgen` and `revision_blockgen` are block loops
          of their own
       -> text, and its cost

Like the files of `modeling/`, those named `*_blockgen.py` travel with a saved model.
"""

from .. import modeling as _modeling  # noqa: F401  the model first: it imports the mixin from here
from .block_decoding_blockgen import BlockDecoder
from .generation_blockgen import BlockGenGenerateOutput, BlockGenGenerationMixin
from .generation_configuration_blockgen import CORRECTORS, DECODINGS, BlockGenGenerationConfig


__all__ = [
    "CORRECTORS",
    "DECODINGS",
    "BlockDecoder",
    "BlockGenGenerateOutput",
    "BlockGenGenerationConfig",
    "BlockGenGenerationMixin",
]
