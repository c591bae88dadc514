"""The decoding that a model's own generation config names, and what of it is not said anywhere."""

from .modeling.configuration_blockgen import BlockGenConfig


# Of ARPC where neither the user nor a budget says how often the model verifies: in every step but the last.
CORRECTOR_PERIOD = 1


def default_decoding(config: BlockGenConfig) -> str:
    """ARPC where the model verifies its own proposals, as in the paper; else the one decoding that it has."""
    sizes = config.block_sizes
    return "ar" if max(sizes) == 1 else "arpc" if 1 in sizes else "block_diffusion"


__all__ = ["CORRECTOR_PERIOD", "default_decoding"]
