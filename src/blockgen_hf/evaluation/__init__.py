"""Evaluation: how likely a model finds a data set."""

from .figures import LikelihoodResult, likelihood_metrics
from .lengths import LengthResult, evaluate_lengths
from .likelihood import evaluate_likelihood, sequence_nll


__all__ = [
    "LengthResult",
    "LikelihoodResult",
    "evaluate_lengths",
    "evaluate_likelihood",
    "likelihood_metrics",
    "sequence_nll",
]
