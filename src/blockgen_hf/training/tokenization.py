"""From documents to tokens: which of them are scored, and which documents are skipped."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..evaluation.columns import IGNORED_LABEL
from ..prompts import encode_pieces, spells_mask
from ..tokenizer_loading import tokenizer_errors
from .documents import RowForm, number_as_text, split_text


# What became of a document.
KEPT, EMPTY, UNSCORED, HOLDS_MASK, TRUNCATED, CONTINUATION = range(6)
NUM_STATUS = 6
SKIPPED = (EMPTY, UNSCORED, HOLDS_MASK, CONTINUATION)
REASONS = {
    EMPTY: "skipped, because they are empty",
    UNSCORED: "skipped, because no token of theirs would be scored",
    HOLDS_MASK: "skipped, because the mask token is written in their messages",
    TRUNCATED: "truncated to `sequence_length`",
}

# The tokenizer is handed so many characters at a time: some hundred megabytes while it works.
_CHARACTERS_AT_A_TIME = 2**20
# Texts whose tokens are seldom joined with those of what follows.
_ANCHORS = ("\n", ".")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class DocumentTokenizer:
    """
    Makes tokens of batches of documents, as a function for `Dataset.map(batched=True, with_indices=True)`.

    Args:
        tokenizer: with an end-of-text token.
        form: the columns of a document.
        where: names the data in errors.
        max_length: documents are truncated to so many tokens; None keeps them whole, for packing.
        train_on_prompt: score prompts and the turns of users too.
        prompt_separator: stands between a prompt and its completion, and belongs to the prompt.
        train_on_padding: end-of-text tokens that are scored behind the first one, up to `max_length`.
        add_bos_token: begin documents with the tokenizer's BOS.
    """

    tokenizer: PreTrainedTokenizerBase
    form: RowForm
    where: str
    max_length: int | None = None
    train_on_prompt: bool = False
    prompt_separator: str = ""
    train_on_padding: int = 0
    add_bos_token: bool = False
    _begin: list[int] = field(init=False)
    _end: list[int] = field(init=False)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer has no end-of-text token, which documents are joined with: set `tokenizer.eos_token`, "
                "for instance to `tokenizer.sep_token` for BERT's."
            )
        if self.add_bos_token and self.tokenizer.bos_token_id is None:
            raise ValueError("`add_bos_token`: the tokenizer has no BOS token; set `tokenizer.bos_token`.")
        if self.form.conversational and self.tokenizer.chat_template is None:
            raise ValueError(
                f"{self.where} holds conversations, and the tokenizer has no chat template: set "
                "`tokenizer.chat_template`, or take the tokenizer of a chat model."
            )
        self._begin = [self.tokenizer.bos_token_id] if self.add_bos_token else []
        self._end = [self.tokenizer.eos_token_id]

    @property
    def has_labels(self) -> bool:
        """Whether there may be tokens that are not scored."""
        return self.form.kind != "text" and not self.train_on_prompt

    def fingerprint(self) -> list[Any]:
        """What the tokens depend on, the same in every process."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            backend = json.loads(tokenizer.backend_tokenizer.to_str())
            backend.pop("truncation"), backend.pop("padding")  # left by whoever called it last
            state: Any = json.dumps(backend)
        else:
            state = (sorted(tokenizer.get_vocab().items()), repr(tokenizer))
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token, tokenizer.chat_template)
        form = (self.form.kind, self.form.columns, self.form.conversational)
        settings = [self.max_length, self.train_on_prompt, self.prompt_separator, self.add_bos_token]
        return [state, special, tokenizer.split_special_tokens, form, settings, self.train_on_padding]

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """
        Args:
            batch: the columns of the form, and `begins` and `ends` of text that comes in pieces.
            indices: numbers of the rows.

        Returns:
            `input_ids` and, with [`has_labels`], `labels` (arrays of int32, empty for what is skipped), `begins`,
            `status` (what became of the row) and `source` (its number).

        Raises:
            ValueError: a value of the wrong type, a conversation that the chat template refuses, or a regular
                expression of the tokenizer that takes too long.
        """
        columns_of = [[number_as_text(value, self.form) for value in batch[column]] for column in self.form.columns]
        rows = list(zip(*columns_of, strict=True))
        for index, row in zip(indices, rows, strict=True):
            self._check(row, index)
        begins = batch.get("begins") or [True] * len(rows)
        ends = batch.get("ends") or [True] * len(rows)

        input_ids, labels = [_NO_TOKENS] * len(rows), [_NO_TOKENS] * len(rows)
        status = [KEPT] * len(rows)
        filled = []
        for place, row in enumerate(rows):
            if self.max_length is not None and not begins[place]:
                status[place] = CONTINUATION
            elif begins[place] and ends[place] and _is_empty(row):
                status[place] = EMPTY
            else:
                filled.append(place)
        with tokenizer_errors(self.tokenizer):
            encoded = self._encode([rows[place] for place in filled], [indices[place] for place in filled])
        for place, (ids, scored) in zip(filled, encoded, strict=True):
            input_ids[place], labels[place], status[place] = self._finish(ids, scored, begins[place], ends[place])
        columns = {"input_ids": input_ids, "begins": begins, "status": status, "source": list(indices)}
        return {**columns, "labels": labels} if self.has_labels else columns

    def _check(self, row: tuple[Any, ...], index: int) -> None:
        for column, value in zip(self.form.columns, row, strict=True):
            if value is None or (isinstance(value, str) and not self.form.conversational):
                continue
            where = f"{self.where}, row {index} (counted from 0), `{column}`"
            if not self.form.conversational:
                raise ValueError(f"{where}: a {type(value).__name__} instead of a string.")
            if not is_conversation(read_messages(value)):
                raise ValueError(f"{where}: not a list of messages, each with a `role` and a `content`.")

    def _encode(self, rows: list[tuple[Any, ...]], indices: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids, int32 `[L]`, and what of them is scored, bool `[L]`, of documents that are not empty."""
        if self.form.conversational:
            return [self._conversation(row, index) for row, index in zip(rows, indices, strict=True)]
        if self.form.kind == "text":
            return [(ids, np.ones(len(ids), bool)) for ids in self._texts([text for (text,) in rows])]
        # The prompt has the tokens that it will have in generation; the completion those that it has behind the
        # prompt, unless a token would cross the border: then those that it has alone.
        prompts = [(prompt or "") + self.prompt_separator for prompt, _ in rows]
        completions = [completion for _, completion in rows]
        prompt_ids = self._texts(prompts)
        joint_ids = self._texts([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
        encoded = []
        for prompt, joint, completion in zip(prompt_ids, joint_ids, completions, strict=True):
            if not np.array_equal(joint[: len(prompt)], prompt):
                joint = np.concatenate([prompt, self._behind(prompt, joint, completion)])
            encoded.append((joint, np.arange(len(joint)) >= len(prompt)))
        return encoded

    def _behind(self, prompt: np.ndarray, joint: np.ndarray, completion: str) -> np.ndarray:
        """
        Ids of a completion on its own, int32, which with those of the prompt are the text of `joint`. Tokenizers such
        as SentencePiece put a space before every text: there the ids are those behind another text, an anchor.
        """
        text = self.tokenizer.decode(joint, clean_up_tokenization_spaces=False)
        alone, *anchored = self._texts([completion, *(anchor + completion for anchor in _ANCHORS)])
        candidates = [alone]
        for anchor, ids in zip(self._texts(list(_ANCHORS)), anchored, strict=True):
            if np.array_equal(ids[: len(anchor)], anchor):
                candidates.append(ids[len(anchor) :])
        for ids in candidates:
            if self.tokenizer.decode([*prompt, *ids], clean_up_tokenization_spaces=False) == text:
                return ids
        return alone

    def _texts(self, texts: list[str]) -> list[np.ndarray]:
        """
        Ids of texts, int32, without special tokens at the ends. A text that spells the mask token, which no clean text
        can hold, is read as letters.
        """
        pieces: list[list[np.ndarray]] = [[] for _ in texts]
        for letters in (False, True):
            owners = [place for place, text in enumerate(texts) if spells_mask(self.tokenizer, text) is letters]
            for group in _groups((place, piece) for place in owners for piece in split_text(texts[place])):
                encoded = encode_pieces(self.tokenizer, [piece for _, piece in group], letters)
                for (place, _), ids in zip(group, encoded, strict=True):
                    pieces[place].append(np.asarray(ids, np.int32))
        return [np.concatenate(ids) if ids else _NO_TOKENS for ids in pieces]

    def _finish(self, ids: np.ndarray, scored: np.ndarray, begins: bool, ends: bool) -> tuple[Any, Any, int]:
        """Ids and labels with the tokens around them, truncated, and what became of them."""
        if self.form.conversational:
            if self.tokenizer.mask_token_id is not None and self.tokenizer.mask_token_id in ids:
                return _NO_TOKENS, _NO_TOKENS, HOLDS_MASK
            # A template writes the tokens around a conversation; only an end that it lacks is added.
            before, after = [], [] if self._end[0] in ids else self._end
        else:
            before, after = self._begin if begins else [], self._end if ends else []
        is_scored_at_end = bool(scored[-1]) if len(scored) else True
        ids = np.concatenate([np.asarray(before, np.int32), ids, np.asarray(after, np.int32)])
        scored = np.concatenate([np.zeros(len(before), bool), scored, np.full(len(after), is_scored_at_end)])
        if self.train_on_prompt or self.form.kind == "text":
            scored[:] = True
        status = KEPT
        if self.max_length is not None and len(ids) > self.max_length:
            ids, scored, status = ids[: self.max_length], scored[: self.max_length], TRUNCATED
        if len(ids) and not scored.any():
            return _NO_TOKENS, _NO_TOKENS, UNSCORED
        if self.train_on_padding and self.max_length is not None:
            count = min(self.train_on_padding, self.max_length - len(ids))
            ids = np.concatenate([ids, np.full(count, self._end[0], np.int32)])
            scored = np.concatenate([scored, np.ones(count, bool)])
        return ids, np.where(scored, ids, np.int32(IGNORED_LABEL)), status

    # Conversations

    def _conversation(self, row: tuple[Any, ...], index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a conversation, int32, and whether they belong to the assistant, bool."""
        from jinja2.exceptions import TemplateError

        try:
            if self.form.kind == "prompt":
                prompt, completion = (read_messages(value) for value in row)
                ids = self._render(prompt + completion)
                border = self._prefix_length(ids, prompt, index, add_generation_prompt=True)
                return ids, np.arange(len(ids)) >= border
            return self._assistant_turns(read_messages(row[0]), index)
        except TemplateError as error:
            raise ValueError(
                f"{self.where}, row {index} (counted from 0): the chat template refuses it: {error}"
            ) from error

    def _assistant_turns(self, messages: list[dict[str, Any]], index: int) -> tuple[np.ndarray, np.ndarray]:
        if _GENERATION.search(str(self.tokenizer.chat_template)):
            encoded = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["assistant_masks"], bool)
        ids = self._render(messages)
        scored: np.ndarray = np.zeros(len(ids), bool)
        if self.train_on_prompt:
            return ids, scored  # all is scored in the end, whoever speaks
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._prefix_length(ids, messages[:turn], index, add_generation_prompt=True)
                stop = self._prefix_length(ids, messages[: turn + 1], index)
                scored[start:stop] = True
        return ids, scored

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> np.ndarray:
        encoded = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        return np.asarray(encoded["input_ids"], np.int32)

    def _prefix_length(
        self, ids: np.ndarray, messages: list[dict[str, Any]], index: int, add_generation_prompt: bool = False
    ) -> int:
        """Tokens of the first messages, which the whole conversation must begin with."""
        if not messages and not add_generation_prompt:
            return 0
        prefix = self._render(messages, add_generation_prompt=add_generation_prompt)
        if not np.array_equal(ids[: len(prefix)], prefix):
            raise ValueError(
                f"{self.where}, row {index} (counted from 0): the chat template writes the first {len(messages)} "
                "messages otherwise when more follow, so that the assistant's tokens cannot be told apart. Take a "
                "template with {% generation %}, or `train_on_prompt`."
            )
        return len(prefix)


_NO_TOKENS: np.ndarray = np.zeros(0, np.int32)


def _is_empty(row: tuple[Any, ...]) -> bool:
    """Nothing to learn: no text, no completion, no messages."""
    last = row[-1]
    return not (last.strip() if isinstance(last, str) else last)


def read_messages(value: Any) -> Any:
    """Messages of a row, read from JSON if need be, without the fields that Arrow added to make all messages alike."""
    value = json.loads(value) if isinstance(value, str) and value else value or []
    if not isinstance(value, list):
        return value
    return [_without_none(message) if isinstance(message, dict) else message for message in value]


def _without_none(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}


def is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and "role" in message and ("content" in message or "tool_calls" in message)
        for message in value
    )


def _groups(pieces: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Pieces, so many at a time as the tokenizer should hold."""
    group: list[tuple[int, str]] = []
    characters = 0
    for place, piece in pieces:
        group.append((place, piece))
        characters += len(piece)
        if characters >= _CHARACTERS_AT_A_TIME:
            yield group
            group, characters = [], 0
    if group:
        yield group
