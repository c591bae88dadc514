"""The bodies of answers, made of the types of the `openai` package."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openai import BaseModel
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion import ChoiceLogprobs as ChatLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import CompletionTokensDetails

from .requests import Usage
from .text import Piece, ScoredToken


@dataclass
class Cost:
    """
    What the answers to a body took, all choices together.

    Args:
        num_prompt_tokens: tokens of the prompts, each counted once.
    """

    num_prompt_tokens: int
    num_new_tokens: int = 0
    num_function_evaluations: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0

    def add(self, usage: Usage) -> None:
        """A finished choice."""
        self.num_new_tokens += usage.completion_tokens
        self.num_function_evaluations += usage.function_evaluations
        self.num_accepted_tokens += usage.accepted_draft_tokens
        self.num_rejected_tokens += usage.rejected_draft_tokens

    def usage(self) -> CompletionUsage:
        details = CompletionTokensDetails(
            accepted_prediction_tokens=self.num_accepted_tokens, rejected_prediction_tokens=self.num_rejected_tokens
        )
        ours: dict[str, Any] = {"function_evaluations": self.num_function_evaluations}
        return CompletionUsage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_new_tokens,
            total_tokens=self.num_prompt_tokens + self.num_new_tokens,
            completion_tokens_details=details,
            **ours,
        )


class AnswerFormat(ABC):
    """
    How answers are written, whole and in pieces.

    Args:
        model: its name.
        has_logprobs: whether log-probabilities were asked for.
        includes_usage: whether a stream ends with the usage, and has a null in its place before.
    """

    prefix: str

    def __init__(self, model: str, has_logprobs: bool, includes_usage: bool) -> None:
        self.has_logprobs = has_logprobs
        self.nulls = {"usage": None} if includes_usage else {}
        self.common: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def openings(self, num_choices: int) -> list[BaseModel]:
        """Chunks before the first token."""
        return []

    @abstractmethod
    def chunk(self, index: int, piece: Piece, finish_reason: str | None = None) -> BaseModel:
        """A piece of a choice."""

    @abstractmethod
    def usage_chunk(self, cost: Cost) -> BaseModel:
        """The last chunk of a stream that was asked for usage."""

    @abstractmethod
    def whole(self, choices: Sequence[tuple[Piece, str]], cost: Cost) -> BaseModel:
        """All choices, with their finish reasons."""

    def draft(self, index: int, start: int, tokens: Sequence[str]) -> dict[str, Any]:
        """
        The draft of the block in work. Clients that take it for a chunk find no choices in it.

        Args:
            start: tokens of the answer before the draft.
            tokens: the texts of its tokens.
        """
        kind = {"object": "blockgen.draft", "choices": []}
        return {**self.common, **kind, "index": index, "start": start, "tokens": list(tokens)}

    def frame(self, index: int, frame: dict[str, Any]) -> dict[str, Any]:
        """A frame, as docs/replay.md describes it, with its `offset`. It has no choices either."""
        return {**self.common, "object": "blockgen.frame", "choices": [], "index": index, "frame": frame}


class CompletionFormat(AnswerFormat):
    """`/v1/completions`: pieces look like whole answers."""

    prefix = "cmpl"

    def chunk(self, index: int, piece: Piece, finish_reason: str | None = None) -> BaseModel:
        return self._completion([self._choice(index, piece, finish_reason)], self.nulls)

    def usage_chunk(self, cost: Cost) -> BaseModel:
        return self._completion([], {"usage": cost.usage()})

    def whole(self, choices: Sequence[tuple[Piece, str]], cost: Cost) -> BaseModel:
        made = [self._choice(index, *choice) for index, choice in enumerate(choices)]
        return self._completion(made, {"usage": cost.usage()})

    def _completion(self, choices: list[CompletionChoice], more: dict[str, Any]) -> Completion:
        return Completion.construct(object="text_completion", choices=choices, **self.common, **more)

    def _choice(self, index: int, piece: Piece, finish_reason: str | None) -> CompletionChoice:
        # Not checked: the type has no null in places where streams, and a first token without a logprob, need one.
        logprobs = self._logprobs(piece.tokens) if self.has_logprobs else None
        return CompletionChoice.construct(index=index, text=piece.text, logprobs=logprobs, finish_reason=finish_reason)

    @staticmethod
    def _logprobs(tokens: Sequence[ScoredToken]) -> Logprobs:
        return Logprobs.construct(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            # Beside the likeliest ones the token itself, as OpenAI's do.
            top_logprobs=[
                None if token.logprob is None else {token.text: token.logprob} | dict(token.top) for token in tokens
            ],
            text_offset=[token.offset for token in tokens],
        )


class ChatFormat(AnswerFormat):
    """`/v1/chat/completions`."""

    prefix = "chatcmpl"

    def openings(self, num_choices: int) -> list[BaseModel]:
        delta = ChoiceDelta(role="assistant", content="")
        return [
            self._chunk([ChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)], self.nulls)
            for index in range(num_choices)
        ]

    def chunk(self, index: int, piece: Piece, finish_reason: str | None = None) -> BaseModel:
        delta = ChoiceDelta(content=piece.text) if piece or finish_reason is None else ChoiceDelta()
        choice = ChunkChoice.construct(
            index=index, delta=delta, logprobs=self._logprobs(piece), finish_reason=finish_reason
        )
        return self._chunk([choice], self.nulls)

    def usage_chunk(self, cost: Cost) -> BaseModel:
        return self._chunk([], {"usage": cost.usage()})

    def whole(self, choices: Sequence[tuple[Piece, str]], cost: Cost) -> BaseModel:
        made = [
            ChatChoice.construct(
                index=index,
                message=ChatCompletionMessage(role="assistant", content=piece.text, refusal=None),
                logprobs=self._logprobs(piece),
                finish_reason=finish_reason,
            )
            for index, (piece, finish_reason) in enumerate(choices)
        ]
        return ChatCompletion.construct(object="chat.completion", choices=made, usage=cost.usage(), **self.common)

    def _chunk(self, choices: list[ChunkChoice], more: dict[str, Any]) -> ChatCompletionChunk:
        return ChatCompletionChunk.construct(object="chat.completion.chunk", choices=choices, **self.common, **more)

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self.has_logprobs:
            return None
        content = [
            ChatCompletionTokenLogprob(
                token=token.text,
                bytes=_bytes(token.text),
                logprob=token.logprob or 0.0,
                top_logprobs=[TopLogprob(token=text, bytes=_bytes(text), logprob=value) for text, value in token.top],
            )
            for token in piece.tokens
        ]
        return ChatLogprobs(content=content, refusal=None)


def _bytes(text: str) -> list[int] | None:
    """None for a piece of a character, whose bytes a tokenizer does not tell."""
    return None if "\ufffd" in text else list(text.encode())


def to_json(body: BaseModel) -> str:
    """With nulls where a null was set, and nothing where nothing was."""
    return body.to_json(indent=None, exclude_unset=True)


__all__ = ["AnswerFormat", "ChatFormat", "CompletionFormat", "Cost", "to_json"]
