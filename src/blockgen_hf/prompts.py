"""From prompts to token ids, in one way for all commands and evaluations."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .tokenizer_loading import tokenizer_errors


@dataclass(frozen=True)
class PromptEncoder:
    """
    Makes token ids of prompts, with the same functions as training (`training/tokenization.py`): no special tokens at
    the ends, and a spelled mask token is read as letters. In the messages of a conversation all special tokens are:
    those that end a turn are the template's alone.

    Args:
        tokenizer: that of the model.
        separator: stands behind a prompt that is a text.
        add_bos_token: begin prompts that are texts with the BOS token.
    """

    tokenizer: PreTrainedTokenizerBase
    separator: str = ""
    add_bos_token: bool = False

    def __post_init__(self) -> None:
        if self.add_bos_token and self.tokenizer.bos_token_id is None:
            raise ValueError("`add_bos_token`: the tokenizer has no BOS token; set `tokenizer.bos_token`.")

    def __call__(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """
        Raises:
            ValueError: messages, and a tokenizer without a chat template; a text that is not valid Unicode; or a
                regular expression of the tokenizer that takes too long.
        """
        if not isinstance(prompt, str):
            return encode_messages(self.tokenizer, prompt)
        text = prompt + self.separator
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"The prompt is not valid UTF-8 text: {prompt[:80]!a}.") from None
        (token_ids,) = encode_texts(self.tokenizer, [text])
        return ([self.tokenizer.bos_token_id] if self.add_bos_token else []) + token_ids


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of whole texts, without special tokens at the ends. A text that spells the mask token is read as letters."""
    ids: list[list[int]] = [[] for _ in texts]
    for as_letters in (False, True):
        places = [place for place, text in enumerate(texts) if spells_mask(tokenizer, text) is as_letters]
        if places:
            found = encode_pieces(tokenizer, [texts[place] for place in places], as_letters)
            for place, row in zip(places, found, strict=True):
                ids[place] = row
    return ids


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[int]:
    """
    Ids of a conversation, up to where the answer begins. Its special tokens are those of the template; what messages
    spell is read as letters.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    texts = list(_texts(messages))
    spelled = [token for token in sorted(special, key=len, reverse=True) if any(token in text for text in texts)]
    with tokenizer_errors(tokenizer):
        if not spelled:
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            return list(encoded["input_ids"])
        # While the template is filled, a character of private use that nobody has written stands for each.
        unused = (char for char in map(chr, range(0xF0000, 0xFFFFE)) if not any(char in text for text in texts))
        stand_ins = dict(zip(spelled, unused, strict=False))
        protected = _with_texts(messages, lambda text: _replace(text, stand_ins))
        rendered = str(tokenizer.apply_chat_template(protected, add_generation_prompt=True, tokenize=False))
    meant = {char: token for token, char in stand_ins.items()}
    # Special tokens cut a text: what stands between two of them is encoded apart in any case.
    pieces = re.split(f"({'|'.join(map(re.escape, sorted(special, key=len, reverse=True)))})", rendered)
    ids: list[int] = []
    for as_letters, group in itertools.groupby(pieces, lambda piece: any(char in piece for char in meant)):
        (found,) = encode_pieces(tokenizer, [_replace("".join(group), meant)], as_letters)
        ids += found
    return ids


def _replace(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def _texts(value: Any) -> Iterator[str]:
    """Everything that messages say."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from _texts(inner)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Messages with other texts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _with_texts(inner, change) for name, inner in value.items()}
    return [_with_texts(inner, change) for inner in value] if isinstance(value, list) else value


def spells_mask(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text spells the mask token, which no clean text can hold."""
    mask = tokenizer.mask_token
    return mask is not None and mask in text


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: list[str], as_letters: bool) -> list[list[int]]:
    """
    Ids of texts, or of pieces of long ones, at once.

    Args:
        as_letters: whether special tokens that they spell are read as letters.
    """
    options = {"split_special_tokens": True} if as_letters else {}
    with tokenizer_errors(tokenizer):
        encoded = tokenizer(
            pieces,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


__all__ = ["PromptEncoder", "encode_messages", "encode_pieces", "encode_texts", "spells_mask"]
