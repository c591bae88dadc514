"""Evaluation: how likely a model finds a data set."""

from .figures import LikelihoodResult, likelihood_metrics
from .likelihood import evaluate_likelihood, sequence_nll


__all__ = ["LikelihoodResult", "evaluate_likelihood", "likelihood_metrics", "sequence_nll"]
