"""The special tokens that a diffusion model cannot do without."""

from transformers import PreTrainedTokenizerBase


MASK = "<|mask|>"
PAD = "[PAD]"  # as in the published uniform models


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, diffusion_type: str) -> None:
    """Adds the token without which the model has no vocabulary: the mask, or a pad as in the published models."""
    if diffusion_type == "masked" and tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    if diffusion_type == "uniform" and tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": PAD})


__all__ = ["MASK", "PAD", "add_special_tokens"]
