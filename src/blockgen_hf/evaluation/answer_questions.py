"""Questions with a number as their answer: from the rows of a data set to prompts."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .answers import MARKER, find_answer, number_text, parse_number


_COLUMNS = (("question", "answer"), ("prompt", "completion"), ("prompt", "answer"), ("question", "completion"))


@dataclass(frozen=True)
class Question:
    """
    Args:
        prompt (`str` or `list[dict]`): a text, or messages for the tokenizer's chat template.
        answer (`str`): the right answer, as [`number_text`] writes numbers.
        is_marked (`bool`): whether a `####` stood before it.
    """

    prompt: str | list[dict[str, Any]]
    answer: str
    is_marked: bool


def read_questions(
    rows: Iterable[Mapping[str, Any]], question_column: str | None = None, answer_column: str | None = None
) -> list[Question]:
    """
    Questions of rows of a data set.

    Args:
        rows: such as GSM8K's, `{"question", "answer"}`, or `{"prompt", "completion"}`. A prompt is a text or a list of
            messages; an answer a number, a text or a list of messages whose last holds it: behind the last `####`, or
            where there is none, the text itself or its last number.
        question_column, answer_column (`str`, *optional*): other names.

    Raises:
        ValueError: no rows, a column that is missing, or an answer without a number; by the number of the row.
    """
    questions: list[Question] = []
    names: tuple[str, str] | None = None
    for number, row in enumerate(rows):
        names = names or _find_columns(row, question_column, answer_column)
        if any(row.get(name) in (None, "", []) for name in names):
            raise ValueError(f"Row {number} of the questions has no `{names[0]}`, or no `{names[1]}`.")
        prompt, answer = (row[name] for name in names)
        text = str(answer[-1]["content"] if isinstance(answer, list) else answer)
        is_marked = MARKER in text
        right = _number(answer) if isinstance(answer, (int, float)) else _number_of_text(text)
        if right is None:
            raise ValueError(f"Row {number} of the questions has no number as answer: `{names[1]}` is {text[-80:]!r}.")
        questions.append(Question(prompt, number_text(right), is_marked))
    if not questions:
        raise ValueError("There are no questions.")
    return questions


def _number(answer: float) -> Fraction | None:
    """A number of a data file as it is written there, which may be 1e-07."""
    return Fraction(str(answer)) if not isinstance(answer, bool) and math.isfinite(answer) else None


def _number_of_text(text: str) -> Fraction | None:
    if MARKER in text:
        return find_answer(text)
    number = parse_number(text)
    return find_answer(text, last_number=True) if number is None else number


def _find_columns(row: Mapping[str, Any], question: str | None, answer: str | None) -> tuple[str, str]:
    for names in _COLUMNS:
        found = (question or names[0], answer or names[1])
        if all(name in row for name in found):
            return found
    raise ValueError(
        f"The questions have the columns {list(row)}, but `{question or 'question'}` and `{answer or 'answer'}`, or "
        f"`{question or 'prompt'}` and `{answer or 'completion'}`, are looked for: name others with `question_column` "
        "and `answer_column`."
    )


__all__ = ["Question", "read_questions"]
