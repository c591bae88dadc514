"""MAUVE of generated texts and references (Pillutla et al., 2021), through the package `mauve-text`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


DEFAULT_FEATURIZER = "openai-community/gpt2-large"

DESCRIPTION = """
MAUVE, between 0 and 1: how close the distribution of generated texts is to that of references; higher is closer. Texts
become features, the last hidden state of a language model at their last token, which are clustered; the score compares
the histograms. It needs many texts (hundreds at least) and compares only with scores under the same featurizer,
lengths, number of texts and of buckets.
"""

INPUTS = """
Args:
    predictions (`list[str]` or `list[list[float]]`): the generated texts, or their features.
    references (`list[str]` or `list[list[float]]`): as many texts, or features, to compare them with.
    model_id (`str`): featurizer of texts, on the Hub or a folder. Defaults to GPT-2 Large, as in the paper of MAUVE.
    gguf_file (`str`, *optional*): the featurizer's weights, a GGUF file in `model_id`.
    model, tokenizer (*optional*): a featurizer that is loaded already, instead of `model_id`.
    featurizer (*optional*): a function from a list of texts to features `[N, D]`, instead of a model.
    featurizer_name (`str`, *optional*): for the result.
    max_length (`int`, *optional*): tokens of a text that count. Defaults to 1024 or the featurizer's context.
    batch_size (`int`): texts in a forward pass. Defaults to 8.
    device (`str`, *optional*): where `model_id` is loaded. Defaults to `cuda` if there is one.
    num_buckets (`int`, *optional*): clusters. Defaults to a tenth of the texts, 2 at least.
    scaling_factor (`float`), seed (`int`): of MAUVE. Default to 5 and 25.
Returns:
    mauve, frontier_integral (lower is closer), mauve_star and frontier_integral_star (with smoothing), num_buckets,
    num_predictions, num_references, featurizer; of texts also num_truncated and max_length.
"""

CITATION = """
Pillutla et al. (2021), https://arxiv.org/abs/2102.01454; smoothing: Pillutla et al. (2023),
https://arxiv.org/abs/2212.14578
"""


@dataclass(frozen=True)
class MauveResult:
    """
    What [`mauve_score`] finds.

    Args:
        mauve (`float`): between 0 and 1, higher is closer.
        frontier_integral (`float`): between 0 and 1, lower is closer.
        mauve_star, frontier_integral_star (`float`): the same with smoothed histograms.
        num_buckets (`int`): clusters.
        num_predictions, num_references (`int`): texts on either side.
    """

    mauve: float
    frontier_integral: float
    mauve_star: float
    frontier_integral_star: float
    num_buckets: int
    num_predictions: int
    num_references: int


def mauve_score(
    predictions: Any, references: Any, *, num_buckets: int | None = None, scaling_factor: float = 5.0, seed: int = 25
) -> MauveResult:
    """
    MAUVE of features.

    Args:
        predictions (`[N, D]`), references (`[M, D]`): features as arrays or lists; N and M may differ.
        num_buckets (`int`, *optional*): clusters. Defaults to a tenth of the smaller side, 2 at least.
        scaling_factor (`float`): c of the paper.
        seed (`int`): of the clustering.

    Raises:
        ImportError: `mauve-text` is not installed.
        ValueError: the features do not fit, or there are more buckets than features.
    """
    try:
        import mauve
    except ImportError as error:
        raise ImportError("MAUVE needs the package mauve-text: pip install mauve-text") from error
    p, q = (np.asarray(features, dtype=np.float32) for features in (predictions, references))
    if p.ndim != 2 or q.ndim != 2 or p.shape[1] != q.shape[1] or min(len(p), len(q)) < 2:
        raise ValueError(
            f"predictions of shape {p.shape} and references of shape {q.shape} must be features [N, D] and [M, D]"
            " of two texts or more"
        )
    if num_buckets is None:
        num_buckets = max(2, round(min(len(p), len(q)) / 10))
    if not 2 <= num_buckets <= len(p) + len(q):
        raise ValueError(f"num_buckets={num_buckets} must be at least 2 and at most the {len(p) + len(q)} texts")
    found = mauve.compute_mauve(
        p_features=p, q_features=q, num_buckets=num_buckets, mauve_scaling_factor=scaling_factor, seed=seed
    )
    names = ("mauve", "frontier_integral", "mauve_star", "frontier_integral_star")
    scores = {name: float(getattr(found, name)) for name in names}
    return MauveResult(**scores, num_buckets=num_buckets, num_predictions=len(p), num_references=len(q))


@torch.no_grad()
def featurize(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_length: int = 1024,
) -> tuple[np.ndarray, int]:
    """
    The last hidden state of each text at its last token, and how many texts were cut to `max_length` tokens.

    Args:
        texts (`Sequence[str]`): none of them empty.
        model, tokenizer: a causal language model, with or without its head.

    Returns:
        `tuple[np.ndarray, int]`: features `[N, D]`, float32, and the number of truncated texts.

    Raises:
        ValueError: a text has no tokens.
    """
    sequences = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    if not all(sequences):
        raise ValueError(f"text {next(i for i, ids in enumerate(sequences) if not ids)} is empty: leave it out")
    features = []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(sequences), batch_size):
            rows = [ids[:max_length] for ids in sequences[start : start + batch_size]]
            input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for index, row in enumerate(rows):
                input_ids[index, : len(row)] = torch.tensor(row)
                attention_mask[index, : len(row)] = 1
            inputs = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
            hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
            features += [states[len(row) - 1].float().cpu().numpy() for row, states in zip(rows, hidden, strict=True)]
    finally:
        model.train(training)
    return np.stack(features), sum(len(ids) > max_length for ids in sequences)


def load_featurizer(
    model_id: str = DEFAULT_FEATURIZER, *, gguf_file: str | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Model without head, tokenizer and name of a featurizer on the Hub or in a folder; see `load_judge`."""
    source = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=False, **source)
    model = AutoModel.from_pretrained(model_id, trust_remote_code=False, **source)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return model, tokenizer, name_of(model_id, gguf_file)


def name_of(model_id: str, gguf_file: str | None = None) -> str:
    """A label, not a path, as results leave this machine: the name of the GGUF file, of the folder or on the Hub."""
    if gguf_file is not None:
        return Path(gguf_file).name
    return Path(model_id).name if Path(model_id).is_dir() else model_id


def featurize_pair(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    model_id: str = DEFAULT_FEATURIZER,
    gguf_file: str | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """
    Features of both sides, and what a result says about them: `featurizer`, `max_length`, `num_truncated`.

    Raises:
        ValueError: a model without its tokenizer, a text without tokens, or a `max_length` beyond the context.
    """
    if (model is None) != (tokenizer is None):
        raise ValueError("model and tokenizer come together: give both, or model_id instead")
    if model is None or tokenizer is None:
        model, tokenizer, name = load_featurizer(model_id, gguf_file=gguf_file, device=device)
    else:
        name = name_of(model.name_or_path) if model.name_or_path else type(model).__name__
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_length is None:
        max_length = min(1024, context or 1024)
    if max_length < 1 or (context is not None and max_length > context):
        raise ValueError(f"max_length={max_length} must be at least 1 and no more than the context, {context}")
    sizes = {"batch_size": batch_size, "max_length": max_length}
    p, p_truncated = featurize(predictions, model, tokenizer, **sizes)
    q, q_truncated = featurize(references, model, tokenizer, **sizes)
    return p, q, {"featurizer": name, "max_length": max_length, "num_truncated": p_truncated + q_truncated}


class MauveScore(evaluate.Metric):
    """[`featurize`] and [`mauve_score`] for `evaluate.load`."""

    def _info(self) -> evaluate.MetricInfo:
        texts = {name: datasets.Value("string") for name in ("predictions", "references")}
        features = {name: datasets.Sequence(datasets.Value("float64")) for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[datasets.Features(texts), datasets.Features(features)],
            reference_urls=["https://github.com/krishnap25/mauve"],
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        featurizer: Callable[[list[str]], Any] | None = None,
        featurizer_name: str | None = None,
        num_buckets: int | None = None,
        scaling_factor: float = 5.0,
        seed: int = 25,
        **settings: Any,
    ) -> dict[str, Any]:
        """`settings` are those of [`featurize_pair`]."""
        p: Any = predictions
        q: Any = references
        facts: dict[str, Any] = {"featurizer": featurizer_name}
        texts = any(isinstance(text, str) for text in predictions)
        if settings and (featurizer is not None or not texts):
            raise ValueError(f"{', '.join(settings)} are for texts and a model that featurizes them: leave them out")
        if texts and featurizer is not None:
            p, q = featurizer(list(predictions)), featurizer(list(references))
        elif texts:
            p, q, facts = featurize_pair(predictions, references, **settings)
            facts["featurizer"] = featurizer_name or facts["featurizer"]
        found = mauve_score(p, q, num_buckets=num_buckets, scaling_factor=scaling_factor, seed=seed)
        return {**asdict(found), **facts}
