"""From generated answers to the figures of a decoding: accuracy, pass@k, majority vote, intervals, cost."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..tables import Table


RESAMPLES = 10_000
CONFIDENCE = 0.95
_RESAMPLES_AT_A_TIME = 500


@dataclass(frozen=True)
class Estimate:
    """
    A mean over questions, from 0 to 1 (a difference: from -1 to 1).

    Args:
        value (`float`): the mean.
        low (`float`), high (`float`): 95% interval by the bootstrap over questions: by how much the figure would vary
            with other questions and samples of the same kind. Where all questions have the same score the bootstrap
            knows no spread: then the exact binomial interval of N of N questions that have it, with the others at
            either end of the scale.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AnswerFigures:
    """
    What [`evaluate_answers`] finds for one decoding.

    Args:
        accuracy ([`Estimate`]): share of right answers, the mean over questions of the mean over samples.
        pass_at_k (`dict[int, Estimate]`): probability that one of k samples is right, by the unbiased estimator
            1 - C(n - c, k) / C(n, k) with c of n samples right (Chen et al., 2021).
        majority_vote ([`Estimate`]): share of questions whose most frequent answer is right; among equally frequent
            ones the one that was given by the earliest sample. Samples without an answer do not vote.
        difference ([`Estimate`], *optional*): of the accuracy to that of the first decoding, question by question.
            None for the first.
        num_questions (`int`), num_samples (`int`): questions, and samples of each.
        num_truncated (`int`): samples that did not come to an end within `max_new_tokens`.
        num_without_answer (`int`): samples in which no number was found.
        num_new_tokens (`int`), num_function_evaluations (`int`): of all samples. The latter are denoiser and AR passes
            that a row took part in.
        function_evaluations_per_token (`float`): their ratio.
        function_evaluations_per_block (`int`, *optional*): what the settings allow a full block, None for `"ar"` and
            `"speculative"`.
        block_size (`int`, *optional*): None for `"ar"`. It bounds the drafts of `"speculative"`.
        seconds (`float`): spent in `generate`, summed over processes.
        tokens_per_second (`float`): new tokens of all rows by these seconds: of one process, in batches.
    """

    accuracy: Estimate
    pass_at_k: dict[int, Estimate]
    majority_vote: Estimate
    difference: Estimate | None
    num_questions: int
    num_samples: int
    num_truncated: int
    num_without_answer: int
    num_new_tokens: int
    num_function_evaluations: int
    function_evaluations_per_token: float
    function_evaluations_per_block: int | None
    block_size: int | None
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """
    The probability that one of k samples, drawn from n without putting back, is right: 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: k is not from 1 to n, or c not from 0 to n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"`k` must be from 1 to the number of samples, {num_samples}, but is {k!r}.")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"`num_correct` must be from 0 to {num_samples}, but is {num_correct!r}.")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_answer(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, of equals the one given first; None where there is none."""
    given = [answer for answer in answers if answer is not None]
    counts = Counter(given)
    return max(given, key=lambda answer: counts[answer]) if given else None  # the first of the largest


def bootstrap_estimates(scores: np.ndarray, seed: int = 0, num_differences: int = 0) -> list[Estimate]:
    """
    Means over questions with intervals. The same questions are drawn for every row.

    Args:
        scores (`np.ndarray` of shape `[M, N]`): M scores of N questions.
        seed (`int`): of the draws.
        num_differences (`int`): how many of the scores, the last ones, are differences.

    Returns:
        M estimates.
    """
    num_questions = scores.shape[1]
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES // _RESAMPLES_AT_A_TIME):
        shares = np.full(num_questions, 1 / num_questions)
        counts = generator.multinomial(num_questions, shares, size=_RESAMPLES_AT_A_TIME)
        means.append(counts @ scores.T / num_questions)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    first_difference = len(scores) - num_differences
    return [
        _widened(Estimate(float(row.mean()), float(low[m]), float(high[m])), row, m >= first_difference)
        for m, row in enumerate(scores)
    ]


def _widened(estimate: Estimate, scores: np.ndarray, signed: bool) -> Estimate:
    """
    Where all scores are the same, Clopper and Pearson's lower bound of the share of questions that have it, and what
    the mean is if all others have the lowest, or the highest.
    """
    same = float(scores[0])
    if not (scores == same).all():
        return estimate
    share = ((1 - CONFIDENCE) / 2) ** (1 / len(scores))
    low, high = share * same - (1 - share) * signed, share * same + (1 - share)
    return Estimate(same, max(low, -1.0 if signed else 0.0), min(high, 1.0))


def answer_figures(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    expected: Sequence[str],
    k: Sequence[int],
    costs: Mapping[str, tuple[int | None, int | None]],
    seed: int = 0,
) -> dict[str, AnswerFigures]:
    """
    The figures of every decoding.

    Args:
        samples: by decoding the rows `{"question", "sample", "answer", "correct", "truncated", "num_new_tokens",
            "num_function_evaluations", "seconds"}`, as many of each question.
        expected: the right answers of the questions, as [`number_text`] writes them.
        k: of pass@k.
        costs: by decoding its block size and function evaluations a block, None where there are none.
        seed: of the bootstrap.
    """
    names = list(samples)
    scores: list[np.ndarray] = []
    for name in names:
        scores += _scores(samples[name], expected, k)
    each = 2 + len(k)
    differences = [scores[each * number] - scores[0] for number in range(1, len(names))]
    estimates = bootstrap_estimates(np.stack([*scores, *differences]), seed, len(differences))
    figures = {}
    for number, name in enumerate(names):
        accuracy, majority, *passes = estimates[each * number : each * (number + 1)]
        figures[name] = AnswerFigures(
            accuracy=accuracy,
            pass_at_k=dict(zip(k, passes, strict=True)),
            majority_vote=majority,
            difference=estimates[each * len(names) + number - 1] if number else None,
            **_cost(samples[name], len(expected)),
            block_size=costs[name][0],
            function_evaluations_per_block=costs[name][1],
        )
    return figures


def _scores(rows: Sequence[Mapping[str, Any]], expected: Sequence[str], k: Sequence[int]) -> list[np.ndarray]:
    """Accuracy, majority vote and pass@k of every question, `[N]` each."""
    of_question: list[list[Mapping[str, Any]]] = [[] for _ in expected]
    for row in sorted(rows, key=lambda row: row["sample"]):
        of_question[row["question"]].append(row)
    counts = [(len(group), sum(row["correct"] for row in group)) for group in of_question]
    votes = [
        majority_answer([row["answer"] for row in group]) == right
        for group, right in zip(of_question, expected, strict=True)
    ]
    return [
        np.array([correct / total for total, correct in counts]),
        np.array(votes, dtype=float),
        *(np.array([pass_at_k(total, correct, size) for total, correct in counts]) for size in k),
    ]


def _cost(rows: Sequence[Mapping[str, Any]], num_questions: int) -> dict[str, Any]:
    tokens, evaluations, seconds, truncated = (
        sum(row[name] for row in rows)
        for name in ("num_new_tokens", "num_function_evaluations", "seconds", "truncated")
    )
    return {
        "num_questions": num_questions,
        "num_samples": len(rows) // num_questions,
        "num_truncated": truncated,
        "num_without_answer": sum(row["answer"] is None for row in rows),
        "num_new_tokens": tokens,
        "num_function_evaluations": evaluations,
        "function_evaluations_per_token": evaluations / max(1, tokens),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }


def answer_table(figures: Mapping[str, AnswerFigures]) -> Table:
    """A decoding a row, in percent."""
    first = next(iter(figures.values()))
    header = ["decoding", "accuracy, % [95%]"]
    if first.num_samples > 1:
        header += [f"pass@{size}" for size in first.pass_at_k if size > 1] + [f"majority of {first.num_samples}"]
    if len(figures) > 1:
        header.append("minus the first")
    header += ["evaluations a block", "evaluations a token", "tokens/s", "truncated", "no answer"]
    rows = []
    for name, figure in figures.items():
        cells = [f"`{name}`", _cell(figure.accuracy)]
        if figure.num_samples > 1:
            cells += [_cell(value) for size, value in figure.pass_at_k.items() if size > 1]
            cells.append(_cell(figure.majority_vote))
        if len(figures) > 1:
            cells.append("" if figure.difference is None else _cell(figure.difference, sign="+"))
        block, evaluations = figure.block_size, figure.function_evaluations_per_block
        total = figure.num_questions * figure.num_samples
        cells += [
            "" if evaluations is None else f"{evaluations} of {block} tokens",
            f"{figure.function_evaluations_per_token:.2f}",
            f"{figure.tokens_per_second:.1f}",
            f"{figure.num_truncated} of {total}",
            f"{figure.num_without_answer} of {total}",
        ]
        rows.append(cells)
    return Table(header, rows)


def _cell(estimate: Estimate, sign: str = "") -> str:
    value, low, high = (format(100 * figure, f"{sign}.1f") for figure in asdict(estimate).values())
    return f"{value} [{low}, {high}]"


__all__ = ["AnswerFigures", "Estimate", "answer_figures", "answer_table", "bootstrap_estimates", "majority_answer"]
