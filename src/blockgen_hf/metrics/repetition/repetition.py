"""Repeated n-grams of generated texts (Welleck et al., 2020)."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate
from transformers import AutoTokenizer, PreTrainedTokenizerBase


DESCRIPTION = """
How much texts repeat themselves. rep-n: of the n-grams of all texts, the share that has occurred before in the same
text. seq-rep-n: the same share a text, 1 - (different n-grams) / (n-grams), averaged over texts. 0 says that nothing
is repeated. It grows with the length of the texts, so compare equal lengths.
"""

INPUTS = """
Args:
    predictions (`list[str]` or `list[list[int]]`): the generated texts, or their token ids.
    tokenizer (`str` or a tokenizer, *optional*): for texts. Without it they are split into words at white space.
    orders (`list[int]`): the n. Defaults to 1, 2, 3, 4.
Returns:
    rep_1 to rep_4 and seq_rep_1 to seq_rep_4, None where no text has n tokens; num_texts.
"""

CITATION = """
Welleck et al. (2020), https://arxiv.org/abs/1908.04319
"""


def repetition(
    sequences: Sequence[Sequence[Hashable]], orders: Sequence[int] = (1, 2, 3, 4)
) -> dict[str, float | None]:
    """
    Repeated n-grams: those that occurred before in the same sequence.

    Returns:
        `dict[str, float | None]`: for each of `orders`, `rep_<n>`, the share among the n-grams of all sequences, and
        `seq_rep_<n>`, the mean of the shares of the sequences with n tokens or more; None where there are none.

    Raises:
        ValueError: an order is below 1.
    """
    if any(order < 1 for order in orders):
        raise ValueError(f"orders={list(orders)} must be at least 1")
    shares: dict[str, float | None] = {}
    for order in orders:
        totals, repeated = [], []
        for sequence in sequences:
            ngrams = [tuple(sequence[start : start + order]) for start in range(len(sequence) - order + 1)]
            if ngrams:
                totals.append(len(ngrams))
                repeated.append(len(ngrams) - len(set(ngrams)))
        means = [count / total for count, total in zip(repeated, totals, strict=True)]
        shares[f"rep_{order}"] = sum(repeated) / sum(totals) if totals else None
        shares[f"seq_rep_{order}"] = math.fsum(means) / len(means) if totals else None
    return shares


def token_sequences(predictions: Sequence[Any], tokenizer: str | PreTrainedTokenizerBase | None) -> list[list[Any]]:
    """Tokens of texts, which are words if there is no tokenizer; token ids as they are."""
    if not any(isinstance(text, str) for text in predictions):
        return list(predictions)
    if tokenizer is None:
        return [text.split() for text in predictions]
    encode = (
        AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False) if isinstance(tokenizer, str) else tokenizer
    )
    return encode(list(predictions), add_special_tokens=False, verbose=False)["input_ids"]


class Repetition(evaluate.Metric):
    """[`repetition`] for `evaluate.load`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
            ],
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        orders: Sequence[int] = (1, 2, 3, 4),
    ) -> dict[str, Any]:
        return {**repetition(token_sequences(predictions, tokenizer), orders), "num_texts": len(predictions)}
