"""Token ids of prompts: what a user spells is letters, what a template writes is special."""

from typing import Any

import pytest
from tiny import EOS, LETTERS, MASK, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from blockgen_hf.checkpoints import shipped_checkpoint
from blockgen_hf.prompts import PromptEncoder
from blockgen_hf.tokenizer_loading import pretrained_tokenizer


TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}{{ message.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def letters(text: str) -> list[int]:
    """As the tokenizer reads them: `a` is what it does not know."""
    return [max(LETTERS.find(letter), 0) for letter in text]


@pytest.mark.parametrize("spelled", ["<mask>", "b<mask>c<end>d", " <end><pad> ", "<end>", "\U000f0000<mask>"])
def test_special_tokens_that_messages_spell_are_letters_and_those_of_the_template_stay_special(
    tokenizer: PreTrainedTokenizerBase, spelled: str
) -> None:
    messages = [{"role": "system", "content": "bcd"}, {"role": "user", "content": spelled}]
    found = PromptEncoder(tokenizer)(messages)
    expected = [*letters("sbcd"), EOS, *letters("u" + spelled.strip()), EOS, *letters("a")]
    assert found == expected and MASK not in found


def test_messages_without_them_are_encoded_as_the_tokenizer_does(tokenizer: PreTrainedTokenizerBase) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "bcd < mask"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert PromptEncoder(tokenizer)(messages) == ids


def test_the_letters_of_messages_are_those_of_the_text() -> None:
    """Nothing is lost, and nothing is merged otherwise, where a tokenizer knows pieces of words."""
    tokenizer = pretrained_tokenizer(str(shipped_checkpoint()))
    end = tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE.replace("<end>", end)
    for content in ("Once upon a time", f"Once {end}upon", f"{tokenizer.mask_token} upon a {end}"):
        messages = [{"role": "user", "content": "The dog said: hi!"}, {"role": "user", "content": content}]
        ids = PromptEncoder(tokenizer)(messages)
        assert tokenizer.decode(ids) == f"uThe dog said: hi!{end}u{content}{end}a"
        assert ids.count(tokenizer.eos_token_id) == 2 and tokenizer.mask_token_id not in ids
