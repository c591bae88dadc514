"""Entropy of the tokens within a text, a mean over texts (BlockGen, Eq. 11)."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import evaluate
from transformers import AutoTokenizer, PreTrainedTokenizerBase


DESCRIPTION = """
The entropy, in nats, of the distribution of tokens within a text, averaged over texts. It is low for texts that repeat
themselves, which a low perplexity does not show. It grows with the length of the texts and depends on the tokenizer.
"""

INPUTS = """
Args:
    predictions (`list[list[int]]` or `list[str]`): token ids of the generated texts, or the texts.
    tokenizer (`str` or a tokenizer): for texts, that of the generator (in the paper GPT-2's).
Returns:
    entropy (mean over texts), standard_deviation (over texts) and standard_error (of the mean), both None for one
    text, entropies and lengths (of each text), num_texts, num_empty.
"""

CITATION = """
BlockGen, Eq. 11; after Dieleman et al. (2022), https://arxiv.org/abs/2211.15089
"""


@dataclass(frozen=True)
class EntropyResult:
    """
    What [`unigram_entropy`] finds.

    Args:
        entropy (`float`): in nats, the mean over all texts.
        standard_deviation (`float`, *optional*): over the texts. None if there is one.
        standard_error (`float`, *optional*): of `entropy`. None if there is one text.
        entropies (`list[float]`): of each text.
        lengths (`list[int]`): tokens of each text.
        num_texts (`int`): texts.
        num_empty (`int`): texts without tokens, whose entropy counts as 0.
    """

    entropy: float
    standard_deviation: float | None
    standard_error: float | None
    entropies: list[float]
    lengths: list[int]
    num_texts: int
    num_empty: int


def entropy_of_tokens(sequences: Sequence[Sequence[int]]) -> list[float]:
    """Entropy in nats of the tokens of each sequence: between 0, also without tokens, and log of its length."""
    entropies = []
    for sequence in sequences:
        total = len(sequence)
        counts = Counter(sequence).values()
        entropies.append(math.fsum(count / total * math.log(total / count) for count in counts))
    return entropies


def unigram_entropy(sequences: Sequence[Sequence[int]]) -> EntropyResult:
    """
    Eq. 11 for token ids of texts, of any lengths.

    Raises:
        ValueError: there is no text.
    """
    if len(sequences) == 0:
        raise ValueError("sequences are empty: give the tokens of at least one text")
    entropies = entropy_of_tokens(sequences)
    lengths = [len(sequence) for sequence in sequences]
    deviation = statistics.stdev(entropies) if len(entropies) > 1 else None
    return EntropyResult(
        entropy=statistics.fmean(entropies),
        standard_deviation=deviation,
        standard_error=None if deviation is None else deviation / math.sqrt(len(entropies)),
        entropies=entropies,
        lengths=lengths,
        num_texts=len(lengths),
        num_empty=lengths.count(0),
    )


class UnigramEntropy(evaluate.Metric):
    """[`unigram_entropy`] for `evaluate.load`."""

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
        self, predictions: Sequence[Any], tokenizer: str | PreTrainedTokenizerBase | None = None
    ) -> dict[str, Any]:
        if any(isinstance(text, str) for text in predictions):
            if tokenizer is None:
                raise ValueError("predictions are texts: give the generator's tokenizer=, or token ids instead")
            encode = (
                AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
                if isinstance(tokenizer, str)
                else tokenizer
            )
            predictions = encode(list(predictions), add_special_tokens=False, verbose=False)["input_ids"]
        return asdict(unigram_entropy(predictions))
