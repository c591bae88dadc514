"""
Streamers that show a text while it is generated: committed tokens, and the drafts of the block in work.

transformers' `TextDiffusionStreamer` saves and restores the cursor, which goes wrong where a draft makes the terminal
scroll; here a draft is wrapped into rows that are counted, and taken back by as many.
"""

import math
import os
import shutil
import time
from collections.abc import Callable
from functools import wraps
from itertools import groupby
from operator import itemgetter
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from .text_layout import one_line, printable, wrap


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
    Base of the streamers that show drafts. It asks for log x_hat: where that is sure, as at the tokens that a masked
    model has placed already, the token counts as decided; elsewhere the draft shows the likeliest token.
    """

    _takes_logits = True

    @_drawing
    def put_draft(self, logits: torch.Tensor, **kwargs: Any) -> None:
        log_probs, token_ids = logits[0].max(-1)
        tokens = token_ids.tolist()
        if self.tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(self.tokenizer.eos_token_id)]
        self.draw(tokens, (log_probs > _SURE).tolist())

    def draw(self, tokens: list[int], decided: list[bool]) -> None:
        raise NotImplementedError

    def decode_behind(self, tokens: list[int]) -> str:
        """The text of the tokens, and of what is committed but not printed yet."""
        text: str = self.tokenizer.decode(self.token_cache + tokens, **self.decode_kwargs)
        return text[self.print_len :]


class TerminalDrafts(DraftStreamer):
    """Redraws the block in work in place, undecided tokens in yellow."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO) -> None:
        super().__init__(tokenizer, output)
        self.line = ""  # the committed text in the terminal's last line
        self.rows_below = 0  # rows of the draft below the row in which that line starts
        self.last_draft = 0.0
        self.color = "NO_COLOR" not in os.environ

    def draw(self, tokens: list[int], decided: list[bool]) -> None:
        text = self.line + printable(self.decode_behind(tokens))
        is_decided = self._decided_characters(tokens, decided, len(text))
        size = shutil.get_terminal_size()
        rows = wrap(text, size.columns - 1)[: size.lines - 1]
        drawn = "\n".join(self._paint(text[start:end], is_decided[start:end]) for start, end in rows)
        time.sleep(max(0.0, self.last_draft + DRAFT_SECONDS - time.perf_counter()))
        self.write(self._take_back() + drawn)
        self.rows_below = len(rows) - 1
        self.last_draft = time.perf_counter()

    def _decided_characters(self, tokens: list[int], decided: list[bool], length: int) -> list[bool]:
        """For each character of line and draft whether it is committed, or of a decided token."""
        ends = [len(printable(self.decode_behind(tokens[:count]))) for count in range(len(tokens) + 1)]
        flags = [True] * (len(self.line) + ends[0])
        for start, end, is_decided in zip(ends, ends[1:], decided, strict=False):
            flags += [is_decided] * (end - start)
        return (flags + [False] * length)[:length]  # a character of several tokens may upset the count

    def _paint(self, text: str, is_decided: list[bool]) -> str:
        if not self.color:
            return text
        painted = ""
        for decided, signs in groupby(zip(text, is_decided, strict=True), key=itemgetter(1)):
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
    """For files and pipes: a line for each draft, with the number of decided tokens, and the text at the end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO) -> None:
        super().__init__(tokenizer, output)
        self.block = 1
        self.passes = 0
        self.text = ""

    @_drawing
    def put(self, value: torch.Tensor) -> None:
        TextStreamer.put(self, value)
        self.block += self.passes > 0
        self.passes = 0

    def draw(self, tokens: list[int], decided: list[bool]) -> None:
        self.passes += 1
        text = one_line(printable(self.tokenizer.decode(tokens, **self.decode_kwargs)))
        self.write(f"block {self.block}, pass {self.passes:2}, {sum(decided):2}/{len(decided)} decided | {text}\n")

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if stream_end:
            self.write(self.text + "\n")
