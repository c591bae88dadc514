"""The decoding that a model's own generation config names."""

from .modeling.configuration_blockgen import BlockGenConfig


def default_decoding(config: BlockGenConfig) -> str:
    """ARPC where the model verifies its own proposals, as in the paper; else the one decoding that it has."""
    sizes = config.block_sizes
    return "ar" if max(sizes) == 1 else "arpc" if 1 in sizes else "block_diffusion"


__all__ = ["default_decoding"]
