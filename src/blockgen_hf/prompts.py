"""From prompts to token ids, in one way for all commands and evaluations."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .tokenizer_loading import tokenizer_errors


@dataclass(frozen=True)
class PromptEncoder:
    """
    Makes token ids of prompts, as training does (`training/tokenization.py`): no special tokens at the ends, and a
    spelled mask token is read as letters.

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
            with tokenizer_errors(self.tokenizer):
                encoded = self.tokenizer.apply_chat_template(
                    prompt, add_generation_prompt=True, tokenize=True, return_dict=True
                )
            return list(encoded["input_ids"])
        text = prompt + self.separator
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"The prompt is not valid UTF-8 text: {prompt[:80]!a}.") from None
        mask = self.tokenizer.mask_token
        as_letters = {"split_special_tokens": True} if mask is not None and mask in text else {}
        with tokenizer_errors(self.tokenizer):
            token_ids = self.tokenizer(text, add_special_tokens=False, verbose=False, **as_letters)["input_ids"]
        return ([self.tokenizer.bos_token_id] if self.add_bos_token else []) + list(token_ids)


__all__ = ["PromptEncoder"]
