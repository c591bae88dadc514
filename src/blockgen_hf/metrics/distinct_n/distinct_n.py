"""Distinct n-grams of generated texts, as a share of all (Li et al., 2016)."""

from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate
from transformers import AutoTokenizer, PreTrainedTokenizerBase


DESCRIPTION = """
distinct-n: the number of different n-grams in all texts together, divided by the number of n-grams. 1 says that no
n-gram occurs twice, within a text or in two. It falls as texts are added, so compare equal amounts of text.
"""

INPUTS = """
Args:
    predictions (`list[str]` or `list[list[int]]`): the generated texts, or their token ids.
    tokenizer (`str` or a tokenizer, *optional*): for texts. Without it they are split into words at white space.
    orders (`list[int]`): the n. Defaults to 1, 2, 3, 4.
Returns:
    distinct_1 to distinct_4, None where no text has n tokens; num_texts.
"""

CITATION = """
Li et al. (2016), https://arxiv.org/abs/1510.03055
"""


def distinct(sequences: Sequence[Sequence[Hashable]], orders: Sequence[int] = (1, 2, 3, 4)) -> dict[str, float | None]:
    """
    Different n-grams of all sequences over n-grams of all sequences; an n-gram lies within a sequence.

    Returns:
        `dict[str, float | None]`: `distinct_<n>` for each of `orders`; None where no sequence has n tokens.

    Raises:
        ValueError: an order is below 1.
    """
    if any(order < 1 for order in orders):
        raise ValueError(f"orders={list(orders)} must be at least 1")
    shares: dict[str, float | None] = {}
    for order in orders:
        ngrams = [
            tuple(sequence[start : start + order])
            for sequence in sequences
            for start in range(len(sequence) - order + 1)
        ]
        shares[f"distinct_{order}"] = len(set(ngrams)) / len(ngrams) if ngrams else None
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


class DistinctN(evaluate.Metric):
    """[`distinct`] for `evaluate.load`."""

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
        return {**distinct(token_sequences(predictions, tokenizer), orders), "num_texts": len(predictions)}
