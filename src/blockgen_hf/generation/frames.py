"""
Frames with the texts of their tokens: what shows a denoising needs no tokenizer (docs/replay.md).

This file stands alone, so that a Space can have a copy of it.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_UNFINISHED = "\ufffd"  # what a tokenizer decodes a part of a character to


def frames(outputs: Any, tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, Any]]:
    """
    What a generation looked like, as plain data for `json`.

    Args:
        outputs ([`BlockGenGenerateOutput`]): of `generate(..., return_dict_in_generate=True, output_trajectory=True)`.
        tokenizer ([`PreTrainedTokenizerBase`]): the model's.

    Returns:
        `list[dict]`: for each row a document as docs/replay.md describes it.

    Raises:
        ValueError: the outputs have no frames.
    """
    documents = getattr(outputs, "frames", None)
    if documents is None:
        raise ValueError(
            "`outputs` have no frames: call `generate` with `return_dict_in_generate=True, output_trajectory=True`, "
            "and without beams, assistants and per-token outputs such as `output_scores`, which have no frames."
        )
    texts = FrameTexts(tokenizer)
    return [{**document, "frames": [texts.add(frame) for frame in document["frames"]]} for document in documents]


class FrameTexts:
    """
    Adds the texts of tokens to frames, also one at a time, while a text is generated.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): the model's.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        # Many tokenizers drop the space of a text's first token: tokens are decoded behind another one.
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)[:1]
        self._skipped = len(self._decode([]))
        self._known: dict[int, str] = {}

    def add(self, frame: dict[str, Any]) -> dict[str, Any]:
        """
        A copy of the frame, with a `text` for every token in it. The text of a character of several
        tokens is with the first of them.
        """
        positions = [self._with_texts(position) for position in frame["positions"]]
        for run in _runs(positions):
            text = self._decode([position["token"] for position in run])[self._skipped :]
            if _UNFINISHED not in text:
                for position in run:
                    position["text"] = ""
                run[0]["text"] = text
        return {**frame, "positions": positions}

    def text(self, token: int) -> str:
        """The text of a token, as it stands between others."""
        if token not in self._known:
            self._known[token] = self._decode([token])[self._skipped :]
        return self._known[token]

    def _with_texts(self, position: dict[str, Any]) -> dict[str, Any]:
        position = dict(position)
        position["text"] = self.text(position["token"])
        if "was" in position:
            position["was"] = {**position["was"], "text": self.text(position["was"]["token"])}
        for source in ("diffusion", "ar"):
            if source in position:
                position[source] = [{**likely, "text": self.text(likely["token"])} for likely in position[source]]
        return position

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            self._anchor + tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def since(frame: dict[str, Any], previous: dict[str, Any] | None) -> dict[str, Any]:
    """
    A frame for a stream, which leaves out the positions at the beginning that are as in the previous one: they are
    not sent again, and `offset` says how many they are.
    """
    old = [] if previous is None else previous["positions"]
    new = frame["positions"]
    same = 0
    while same < min(len(old), len(new)) and old[same] == new[same]:
        same += 1
    return {**frame, "offset": same, "positions": new[same:]}


def _runs(positions: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Neighbours that are each a part of a character."""
    for is_part, run in groupby(positions, key=lambda position: _UNFINISHED in position["text"]):
        if is_part:
            yield list(run)


__all__ = ["FrameTexts", "frames", "since"]
