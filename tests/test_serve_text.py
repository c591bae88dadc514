"""Pieces of a text: whole characters only, nothing of a stop string, and together what the tokenizer makes of all."""

import random

import pytest
from tiny import spaced_tokenizer, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from blockgen_hf.checkpoints import shipped_checkpoint
from blockgen_hf.serving.text import AnswerText
from blockgen_hf.tokenizer_loading import pretrained_tokenizer


TEXT = "Once upon a time, “Zoë” 👩‍👩‍👧 said: naïve façade 東京! \n\n ﷽ end"


@pytest.fixture(scope="module")
def shipped() -> PreTrainedTokenizerBase:
    return pretrained_tokenizer(str(shipped_checkpoint()))


def pieces(text: AnswerText, token_ids: list[int], sizes: list[int]) -> list[str]:
    """What is sent after so many tokens each, and at the end."""
    found, start = [], 0
    for size in sizes:
        text.add(token_ids[start : start + size])
        found.append(text.take().text)
        start += size
    text.add(token_ids[start:])
    return [*found, text.end().text]


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_whole_characters_and_make_the_text(shipped: PreTrainedTokenizerBase, seed: int) -> None:
    ids, rng = shipped(TEXT)["input_ids"], random.Random(seed)
    sizes = [1] * len(ids) if seed == 0 else [rng.randint(0, 9) for _ in range(10)]
    found = pieces(AnswerText(shipped, [5, 6], ()), ids, sizes)
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)


def test_half_a_character_at_the_end_is_told_as_such(shipped: PreTrainedTokenizerBase) -> None:
    ids = shipped("a👩")["input_ids"][:-1]
    found = pieces(AnswerText(shipped, [], ()), ids, [1] * len(ids))
    assert "".join(found) == shipped.decode(ids) == "a\ufffd"
    assert found[:-1] == ["a"] + [""] * (len(ids) - 1)


def test_spaces_between_tokens_stay_where_a_prompt_ends() -> None:
    """Of tokenizers whose first token has no space before it."""
    tokenizer = spaced_tokenizer()
    found = pieces(AnswerText(tokenizer, [0, 1], ()), [2, 3, 4], [1, 1])
    assert "".join(found) == " c d e"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("bc",), ["", "a", "", "", "", ""]),
        (("ce", "bd"), ["", "a", "", "b", "cd", "a"]),
        (("cd", "bcd"), ["", "a", "", "", "", ""]),
        (("da", "ax"), ["", "", "ab", "c", "", ""]),
    ],
)
def test_a_text_ends_before_a_stop_string_of_which_nothing_was_sent(
    stops: tuple[str, ...], expected: list[str]
) -> None:
    """A token at a time; what may be the beginning of a stop string waits until it is not."""
    ids = tiny_tokenizer()("abcda")["input_ids"]
    text = AnswerText(tiny_tokenizer(), [], stops)
    assert pieces(text, ids, [0, 1, 1, 1, 1]) == expected


def test_logprobs_come_with_their_text_and_none_behind_a_stop() -> None:
    tokenizer = tiny_tokenizer()
    text = AnswerText(tokenizer, [], ("cd",))
    sent = []
    for token in tokenizer("abcde")["input_ids"]:
        text.add_scored(token, -1.0, [(0, -float("inf"))])
        sent.append(text.take())
    sent.append(text.end())
    assert [piece.text for piece in sent] == ["a", "b", "", "", "", ""]
    assert [[token.text for token in piece.tokens] for piece in sent] == [["a"], ["b"], [], [], [], []]
    assert sent[1].tokens[0].offset == 1 and sent[1].tokens[0].top == [("a", -9999.0)]
