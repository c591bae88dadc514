"""From tokens to text while they arrive: whole characters, and nothing of a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from .requests import TokenLogprob


# Tokens of a prompt that a text is decoded behind: tokenizers such as Llama's drop a space at the beginning.
_CONTEXT = 6
_LEAST = -9999.0  # JSON has no infinity
_INCOMPLETE = "\ufffd"  # what bytes of half a character are decoded to


class Detokenizer:
    """
    The text of a growing list of tokens. Half a character waits for its other half.

    Args:
        tokenizer: that of the model.
        prompt: token ids before the text.
        has_special_tokens: whether special tokens are text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], has_special_tokens: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.has_special_tokens = has_special_tokens
        self.token_ids = list(prompt[-_CONTEXT:])
        # Tokens before `known` have been decoded. Those from `start` on are decoded again, as the next ones may depend
        # on them.
        self.start, self.known = 0, len(self.token_ids)

    def add(self, token_ids: Sequence[int]) -> str:
        """What the tokens add to the text."""
        self.token_ids.extend(token_ids)
        before, after = self._decode(self.start, self.known), self._decode(self.start, None)
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return ""
        self.start, self.known = self.known, len(self.token_ids)
        return after[len(before) :]

    def end(self) -> str:
        """What was waiting for another half."""
        return self._decode(self.start, None)[len(self._decode(self.start, self.known)) :]

    def _decode(self, start: int, end: int | None) -> str:
        return str(self.tokenizer.decode(self.token_ids[start:end], skip_special_tokens=not self.has_special_tokens))


@dataclass(frozen=True)
class ScoredToken:
    """
    A token and its log-probability under the autoregressive model.

    Args:
        text: the token, decoded alone.
        logprob: None where there is nothing that predicts it: the first token of a prompt.
        top: the likeliest tokens there, and their log-probabilities.
        offset: characters of the answer before it.
    """

    text: str
    logprob: float | None
    top: list[tuple[str, float]]
    offset: int


@dataclass
class Piece:
    """A piece of an answer, to be sent."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)

    def __add__(self, other: "Piece") -> "Piece":
        return Piece(self.text + other.text, self.tokens + other.tokens)


class AnswerText:
    """
    The text of an answer. It ends before the first stop string; a piece that may be the beginning of one waits.

    Args:
        tokenizer: that of the model.
        prompt: token ids before the answer.
        stops: strings that end it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.detokenizer = Detokenizer(tokenizer, prompt)
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self.stops = stops
        self.text = ""
        self.is_stopped = False
        self._begin = 0  # of what is not echoed
        self._num_sent = 0  # characters
        self._tokens: list[ScoredToken] = []  # not sent yet

    def add(self, token_ids: Sequence[int]) -> None:
        """Tokens without log-probabilities."""
        self._append(self.detokenizer.add(token_ids))

    def add_scored(self, token_id: int, logprob: float, top: Sequence[tuple[int, float]]) -> None:
        """A token with its log-probabilities. Special ones are no text."""
        if not self.is_stopped and token_id not in self._special_ids:
            self._tokens.append(self._scored(token_id, logprob, top, len(self.text)))
            self._append(self.detokenizer.add([token_id]))

    def echo(self, prompt: Sequence[int], scores: Sequence[TokenLogprob] | None) -> None:
        """
        Puts the prompt before the answer, with the special tokens that it has. No stop string is looked for in it.

        Args:
            prompt: its tokens.
            scores: of all of them but the first.
        """
        echoed = Detokenizer(self.detokenizer.tokenizer, [], has_special_tokens=True)
        for number, token_id in enumerate(prompt):
            if scores is not None:
                score = None if number == 0 else scores[number - 1]
                logprob, top = (None, ()) if score is None else (score.logprob, score.top)
                self._tokens.append(self._scored(token_id, logprob, top, len(self.text)))
            self.text += echoed.add([token_id])
        self.text += echoed.end()
        self._begin = len(self.text)

    def take(self) -> Piece:
        """What can be sent by now and has not been sent."""
        end = len(self.text) - (0 if self.is_stopped else self._num_waiting())
        return self._take(end, [token for token in self._tokens if token.offset < end])

    def end(self) -> Piece:
        """The rest, when no more tokens come."""
        self._append(self.detokenizer.end())
        return self._take(len(self.text), self._tokens)

    def _append(self, text: str) -> None:
        if self.is_stopped or not text:
            return
        longest = max(map(len, self.stops), default=0)
        begin = max(self._begin, len(self.text) - longest + 1)
        self.text += text
        places = [place for stop in self.stops if (place := self.text.find(stop, begin)) >= 0]
        if places:
            self.is_stopped = True
            self.text = self.text[: min(places)]
            self._tokens = [token for token in self._tokens if token.offset < len(self.text)]

    def _num_waiting(self) -> int:
        """Characters at the end that a stop string may begin with."""
        behind = len(self.text) - self._begin
        lengths = (
            next((size for size in range(min(len(stop) - 1, behind), 0, -1) if self.text.endswith(stop[:size])), 0)
            for stop in self.stops
        )
        return max(lengths, default=0)

    def _take(self, end: int, tokens: list[ScoredToken]) -> Piece:
        piece = Piece(self.text[self._num_sent : end], tokens)
        self._num_sent = max(self._num_sent, end)
        self._tokens = self._tokens[len(tokens) :]
        return piece

    def _scored(
        self, token_id: int, logprob: float | None, top: Sequence[tuple[int, float]], offset: int
    ) -> ScoredToken:
        alternatives = [(self.token_text(other), max(value, _LEAST)) for other, value in top]
        logprob = logprob if logprob is None else max(logprob, _LEAST)
        return ScoredToken(self.token_text(token_id), logprob, alternatives, offset)

    def token_text(self, token_id: int) -> str:
        """Of a token alone; of a part of a character, the sign for what cannot be decoded."""
        return str(self.detokenizer.tokenizer.decode([token_id]))


__all__ = ["AnswerText", "Detokenizer", "Piece", "ScoredToken"]
