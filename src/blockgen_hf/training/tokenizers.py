"""A tokenizer for people who have nothing but a text."""

from collections.abc import Iterable

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from ..tokenizer_loading import MASK


END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
_SPECIAL_TOKENS = (END_OF_TEXT, PAD, MASK)
_NUM_BYTES = 256  # every byte is a token, so that any text can be written


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, sequence_length: int, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """
    Byte-level BPE, trained on a text. Its last ids are end of text, padding and mask, the mask last of all.

    Args:
        documents: texts, read once.
        vocab_size: ids in all, special tokens included. A text that is too short for so many gives fewer.
        sequence_length: the tokenizer's `model_max_length`.
        min_frequency: pairs of tokens that occur less often are not merged.

    Raises:
        ValueError: a vocabulary that has no room for the 256 bytes and the special tokens, or no text.
    """
    smallest = _NUM_BYTES + len(_SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"`vocab_size` is {smallest} at least (256 bytes and 3 special tokens), not {vocab_size}.")
    characters = 0

    def counted() -> Iterable[str]:
        nonlocal characters
        for document in documents:
            characters += len(document)
            yield document

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        counted(), vocab_size=vocab_size - len(_SPECIAL_TOKENS), min_frequency=min_frequency, show_progress=False
    )
    if characters == 0:
        raise ValueError("There is no text in `documents` to train a tokenizer on.")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        mask_token=MASK,
        padding_side="left",
        model_max_length=sequence_length,
        model_input_names=["input_ids", "attention_mask"],
    )
