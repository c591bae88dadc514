"""
Streamers that show a text while it is generated: committed tokens, and the drafts of the block in work.

transformers' `TextDiffusionStreamer` saves and restores the cursor, which goes wrong where a draft makes the terminal
scroll; here a draft is wrapped into rows that are counted, and taken back by as many.
"""

import math
import operator
import os
import shutil
import time
from collections.abc import Callable
from functools import wraps
from itertools import groupby, takewhile
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from .text_layout import one_line, printable, wrap


MASK = "░"
DRAFT_SECONDS = 0.08  # a draft stays at least so long on a terminal
_SURE = math.log(0.99)  # a token that the model gives this log-probability counts as decided
_UNDECIDED, _PLAIN = "\033[33m", "\033[0m"  # yellow
_CLEAR_BELOW = "\r\033[J"


def _drawing(method: Callable[..., None]) -> Callable[..., None]:
    """Adds the time that a streamer's method takes to its `seconds`."""

    @wraps(method)
    def timed(self: "StreamedText", *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        method(self, *args, **kwargs)
        self.seconds += time.perf_counter() - started

    return timed


class StreamedText(TextStreamer):
    """Writes committed tokens to `output` as soon as they form words. `seconds` is the time that this took."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.output = output
        self.seconds = 0.0

    def write(self, text: str) -> None:
        self.output.write(text)
        self.output.flush()

    @_drawing
    def put(self, value: torch.Tensor) -> None:
        super().put(value)

    @_drawing
    def end(self) -> None:
        super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = printable(text) if self.output.isatty() else text
        self.write(text + "\n" if stream_end else text)


class DraftStreamer(StreamedText):
    """
    Base of the streamers that show drafts. Of a masked model it shows the tokens that are placed, and masks. Of a
    uniform model, which has no masks, it shows the likeliest tokens; they count as decided where log x_hat is sure.

    Args:
        decides: whether tokens of a draft may count as decided. In speculation none is before it is verified.
    """

    _takes_masks = True  # `put_draft` is told where a masked model has masks

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO, decides: bool = True) -> None:
        super().__init__(tokenizer, output)
        self.decides = decides

    @_drawing
    def put_draft(self, logits: torch.Tensor, is_mask: torch.Tensor | None = None, **kwargs: Any) -> None:
        log_probs, token_ids = logits[0].max(-1)
        masks = [False] * len(token_ids) if is_mask is None else is_mask[0].tolist()
        decided = (log_probs > _SURE).tolist() if is_mask is None else [not mask for mask in masks]
        decided = [self.decides and is_sure for is_sure in decided]
        tokens: list[int | None] = [
            None if mask else token for token, mask in zip(token_ids.tolist(), masks, strict=True)
        ]
        if self.tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(self.tokenizer.eos_token_id)]
        self.draw(tokens, decided)

    def draw(self, tokens: list[int | None], decided: list[bool]) -> None:
        """Shows tokens, None for a mask."""
        raise NotImplementedError

    def pieces(self, tokens: list[int | None], decode: Callable[[list[int]], str]) -> list[str]:
        """What `decode` gives of no token, and what each token adds to it; a sign for a mask."""
        known: list[int] = []
        length = len(printable(decode([])))
        pieces = [printable(decode([]))]
        whole = printable(decode([token for token in tokens if token is not None]))
        for token in tokens:
            if token is None:
                pieces.append(MASK)
                continue
            known.append(token)
            end = max(length, min(len(printable(decode(known))), len(whole)))  # a sign may be of several tokens
            pieces.append(whole[length:end])
            length = end
        return pieces

    def decode_behind(self, tokens: list[int]) -> str:
        """The text of the tokens, and of what is committed but not printed yet."""
        text: str = self.tokenizer.decode(self.token_cache + tokens, **self.decode_kwargs)
        return text[self.print_len :]


class TerminalDrafts(DraftStreamer):
    """Redraws the block in work in place, undecided tokens in yellow."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO, decides: bool = True) -> None:
        super().__init__(tokenizer, output, decides)
        self.line = ""  # the committed text in the terminal's last line
        self.rows_below = 0  # rows of the draft below the row in which that line starts
        self.last_draft = 0.0
        self.color = "NO_COLOR" not in os.environ

    def draw(self, tokens: list[int | None], decided: list[bool]) -> None:
        committed, *pieces = self.pieces(tokens, self.decode_behind)
        committed = self.line + committed
        text = committed + "".join(pieces)
        is_decided = [True] * len(committed)
        for piece, is_sure in zip(pieces, decided, strict=False):
            is_decided += [is_sure] * len(piece)
        size = shutil.get_terminal_size()
        rows = wrap(text, size.columns - 1)[: size.lines - 1]
        drawn = "\n".join(self._paint(text[start:end], is_decided[start:end]) for start, end in rows)
        time.sleep(max(0.0, self.last_draft + DRAFT_SECONDS - time.perf_counter()))
        self.write(self._take_back() + drawn)
        self.rows_below = len(rows) - 1
        self.last_draft = time.perf_counter()

    def _paint(self, text: str, is_decided: list[bool]) -> str:
        if not self.color:
            return text
        painted = ""
        for decided, signs in groupby(zip(text, is_decided, strict=True), key=operator.itemgetter(1)):
            run = "".join(sign for sign, _ in signs)
            painted += run if decided else f"{_UNDECIDED}{run}{_PLAIN}"
        return painted

    def _take_back(self) -> str:
        return (f"\033[{self.rows_below}A" if self.rows_below else "") + _CLEAR_BELOW

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = self.line + printable(text)
        rows = [text[start:end] for start, end in wrap(text, shutil.get_terminal_size().columns - 1)]
        self.write(self._take_back() + "\n".join([*rows, ""] if stream_end else rows))
        self.line, self.rows_below = rows[-1], 0


class DraftLog(DraftStreamer):
    """For files and pipes: the text at the end, and to `drafts` a line for each, with the number of decided tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO, drafts: TextIO) -> None:
        super().__init__(tokenizer, output)
        self.drafts = drafts
        self.block = 1
        self.passes = 0
        self.text = ""

    @_drawing
    def put(self, value: torch.Tensor) -> None:
        TextStreamer.put(self, value)
        self.block += self.passes > 0
        self.passes = 0

    def draw(self, tokens: list[int | None], decided: list[bool]) -> None:
        self.passes += 1
        count = f"{sum(decided):2}/{len(decided)}"
        self.log(f"block {self.block}, pass {self.passes:2}, {count} decided", tokens)

    def log(self, what: str, tokens: list[int | None]) -> None:
        text = one_line("".join(self.pieces(tokens, lambda some: self.tokenizer.decode(some, **self.decode_kwargs))))
        print(f"{what} | {text}", file=self.drafts, flush=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if stream_end:
            self.write(self.text + "\n")


class SpeculationLog(DraftLog):
    """The same for speculation: a line for each draft, with how many of its tokens the text goes on with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO, drafts: TextIO) -> None:
        super().__init__(tokenizer, output, drafts)
        self.draft: list[int | None] = []

    @_drawing
    def put(self, value: torch.Tensor) -> None:
        TextStreamer.put(self, value)
        if self.draft:
            agrees = map(operator.eq, self.draft, value.flatten().tolist())
            kept = sum(1 for _ in takewhile(bool, agrees))
            self.log(f"draft {self.block:2}, {kept:2} kept", self.draft)
            self.block += 1
        self.draft = []

    def draw(self, tokens: list[int | None], decided: list[bool]) -> None:
        self.draft = tokens  # of several passes, the last makes the draft
