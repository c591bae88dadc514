"""
Metrics for generated text, each a folder that `evaluate.load` takes, here and on the Hub.

A folder stands alone: its script imports nothing of this package. The functions behind a metric may be called without
`evaluate.load`, as `blockgen_hf.metrics.generative_perplexity.generative_perplexity.score_texts`.
"""

from pathlib import Path


METRICS = ("distinct_n", "generative_perplexity", "mauve_score", "repetition", "unigram_entropy")

__all__ = ["METRICS", "metric_path"]


def metric_path(name: str) -> str:
    """
    The folder of a metric, for `evaluate.load`.

    Raises:
        ValueError: `name` is not one of `METRICS`.
    """
    if name not in METRICS:
        raise ValueError(f"name={name!r} is not a metric of blockgen_hf; choose one of {', '.join(METRICS)}")
    return str(Path(__file__).parent / name)
