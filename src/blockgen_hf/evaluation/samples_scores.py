"""What drawn texts are worth: perplexity under a judge, entropy, distinct n-grams, repetition, MAUVE."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..prompts import encode_texts
from ..run_folders import digest
from .samples_drawing import DrawnText


if TYPE_CHECKING:
    from ..metrics.generative_perplexity.generative_perplexity import Judge, PerplexityResult


@dataclass(frozen=True)
class SampleScorer:
    """
    Scores the texts of cells, all in the same way.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the generator's.
        judge (`Judge`, *optional*): of `load_judge`. None: no generative perplexity, no MAUVE.
        max_length (`int`, *optional*): tokens that the judge reads of a text. Default: its context.
        batch_size (`int`): texts that the judge reads at once. It does not change the scores.
        references (`Sequence[str]`): texts for MAUVE, whose features are the judge's.

    Raises:
        ValueError: references without a judge.
        ImportError: references, but no `mauve-text`.
    """

    tokenizer: PreTrainedTokenizerBase
    judge: "Judge | None" = None
    max_length: int | None = None
    batch_size: int = 8
    references: Sequence[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.references and self.judge is None:
            raise ValueError("`references` need a `judge`, whose features MAUVE compares.")
        if self.references and find_spec("mauve") is None:
            raise ImportError("`references` are for MAUVE, which needs `pip install 'blockgen-hf[mauve]'`.")

    @property
    def settings(self) -> dict[str, Any]:
        """What scores depend on, for comparison with those that are there."""
        return {
            "judge": None if self.judge is None else self.judge.name,
            "start_token": self._start_token,
            "max_length": self.max_length,
            "references": digest([json.dumps(list(self.references))]) if self.references else None,
        }

    def score(self, texts: Sequence[DrawnText]) -> dict[str, Any]:
        """
        The scores of a cell, by name.

        - `perplexity`, with `nll` (nats a token of the judge) and standard errors over the texts: Eq. 10. The judge
          reads the text with its own tokens, its start token in front and in place of the generator's end of text. Of
          continued prompts what is behind the prompt counts, given the prompt.
        - `entropy` (Eq. 11), `distinct_<n>`, `rep_<n>`, `seq_rep_<n>`: on the drawn tokens of the generator.
        - `mauve`, `mauve_star`: with references, which should be as long as the texts, see [`cut_texts`].
        """
        from ..metrics.distinct_n.distinct_n import distinct
        from ..metrics.repetition.repetition import repetition
        from ..metrics.unigram_entropy.unigram_entropy import unigram_entropy

        token_ids = [text.token_ids for text in texts]
        entropy = unigram_entropy(token_ids)
        scores: dict[str, Any] = {"settings": self.settings}
        if self.judge is not None:
            scores |= self._perplexity(self.judge, texts)
        scores |= {"entropy": entropy.entropy, "entropy_standard_error": entropy.standard_error}
        scores |= distinct(token_ids) | repetition(token_ids)
        if self.judge is not None and self.references:
            scores |= self._mauve(self.judge, texts)
        return scores

    @property
    def _start_token(self) -> str | None:
        if self.judge is None:
            return None
        from ..metrics.generative_perplexity.generative_perplexity import start_token_id

        tokenizer = self.judge.tokenizer
        return str(tokenizer.convert_ids_to_tokens(start_token_id(tokenizer, self.judge.start_token)))

    def _for_judge(self, text: str) -> str:
        """With the judge's mark between documents in place of the generator's."""
        end = self.tokenizer.eos_token
        return text if end is None else text.replace(end, self._start_token or "")

    def _perplexity(self, judge: "Judge", texts: Sequence[DrawnText]) -> dict[str, Any]:
        found = self._read(judge, [self._for_judge(text.prompt + text.text) for text in texts])
        nlls, lengths = list(found.nlls), list(found.lengths)
        prompts = sorted({text.prompt for text in texts if text.prompt})
        if prompts:
            given = self._read(judge, [self._for_judge(prompt) for prompt in prompts])
            known = {prompt: index for index, prompt in enumerate(prompts)}
            for row, text in enumerate(texts):
                nlls[row] -= given.nlls[known[text.prompt]]
                lengths[row] -= given.lengths[known[text.prompt]]
        if sum(lengths) == 0:
            raise ValueError(
                f"`max_length` must be more than the prompts' tokens, but the judge, which reads {found.max_length} "
                "tokens, sees nothing behind them."
            )
        nll = math.fsum(nlls) / sum(lengths)
        error = _standard_error_of_ratio(nlls, lengths, nll)
        return {
            "judge": found.judge,
            "perplexity": math.exp(nll),
            "perplexity_standard_error": None if error is None else math.exp(nll) * error,
            "nll": nll,
            "nll_standard_error": error,
            "num_judge_tokens": sum(lengths),
            "num_truncated_tokens": found.num_truncated_tokens,
            "judge_max_length": found.max_length,
            "judge_start_token": found.start_token,
        }

    def _read(self, judge: "Judge", texts: list[str]) -> "PerplexityResult":
        from ..metrics.generative_perplexity.generative_perplexity import score_texts

        return score_texts(
            texts,
            judge.model,
            judge.tokenizer,
            batch_size=self.batch_size,
            max_length=self.max_length,
            start_token=judge.start_token,
            judge=judge.name,
        )

    def _mauve(self, judge: "Judge", texts: Sequence[DrawnText]) -> dict[str, Any]:
        from ..metrics.mauve_score.mauve_score import mauve_score

        found = mauve_score(self._features(judge, [text.text for text in texts]), self._reference_features)
        return {"mauve": found.mauve, "mauve_star": found.mauve_star, "num_references": found.num_references}

    @cached_property
    def _reference_features(self) -> Any:
        return None if self.judge is None else self._features(self.judge, self.references)

    def _features(self, judge: "Judge", texts: Sequence[str]) -> Any:
        from ..metrics.generative_perplexity.generative_perplexity import read_length
        from ..metrics.mauve_score.mauve_score import featurize

        limit = read_length(judge.model, self.max_length) or 1024
        read = [self._for_judge(text) for text in texts]
        length = min(1024, limit)
        features, _ = featurize(read, judge.model, judge.tokenizer, batch_size=self.batch_size, max_length=length)
        return features


def cut_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], num_tokens: int) -> list[str]:
    """The texts up to so many tokens, as references for drawn texts of this length."""
    ids = encode_texts(tokenizer, texts)
    return list(tokenizer.batch_decode([row[:num_tokens] for row in ids], clean_up_tokenization_spaces=False))


def _standard_error_of_ratio(sums: Sequence[float], counts: Sequence[int], ratio: float) -> float | None:
    """Of sum(sums) / sum(counts) over texts; None for a single one."""
    if len(sums) < 2:
        return None
    residuals = [total - ratio * count for total, count in zip(sums, counts, strict=True)]
    return statistics.stdev(residuals, xbar=0.0) / (statistics.fmean(counts) * math.sqrt(len(sums)))


__all__ = ["SampleScorer", "cut_texts"]
