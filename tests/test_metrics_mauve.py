"""MAUVE of features and of texts under any featurizer, and what is said without `mauve-text`."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LETTERS
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

from blockgen_hf.metrics import metric_path


evaluate = pytest.importorskip("evaluate")

from blockgen_hf.metrics.mauve_score.mauve_score import featurize, mauve_score  # noqa: E402


@pytest.fixture
def featurizer() -> GPT2Model:
    """A random GPT-2 without head, for the letters of the tiny tokenizer."""
    return GPT2Model(GPT2Config(vocab_size=23, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()


def features(num: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, 4)) + shift


def test_mauve_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ImportError, match="pip install mauve-text"):
        mauve_score(features(4), features(4))


def test_features_are_the_last_hidden_state_at_the_last_token(
    featurizer: GPT2Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = ["abcdefgh", "t", "abc"]
    found, num_truncated = featurize(texts, featurizer, tokenizer, batch_size=2, max_length=5)
    assert found.shape == (3, 16) and found.dtype == np.float32 and num_truncated == 1
    for row, text in zip(found, texts, strict=True):
        ids = torch.tensor([[LETTERS.index(letter) for letter in text[:5]]])
        with torch.no_grad():
            hidden = featurizer(ids).last_hidden_state
        assert row == pytest.approx(hidden[0, -1].numpy(), abs=1e-5)
    with pytest.raises(ValueError, match="text 1 is empty"):
        featurize(["a", ""], featurizer, tokenizer)


@pytest.mark.parametrize(
    ("p", "q", "settings", "message"),
    [
        (features(4), features(1), {}, "of two texts or more"),
        (features(4), features(4)[:, :2], {}, "features [N, D] and [M, D]"),
        (features(4), features(4), {"num_buckets": 9}, "num_buckets=9"),
        (features(4), features(4), {"num_buckets": 1}, "num_buckets=1"),
    ],
)
def test_bad_input_for_mauve_is_refused(p: Any, q: Any, settings: dict[str, Any], message: str) -> None:
    pytest.importorskip("mauve")
    with pytest.raises(ValueError) as caught:
        mauve_score(p, q, **settings)
    assert message in str(caught.value)


def test_mauve_is_one_for_the_same_texts_and_low_for_distant_ones() -> None:
    pytest.importorskip("mauve")
    same = mauve_score(features(60), features(60))
    near = mauve_score(features(60), features(50, seed=1))
    far = mauve_score(features(60), features(50, shift=8.0, seed=1))
    assert same.mauve == pytest.approx(1) and same.frontier_integral == pytest.approx(0)
    assert 0.8 < near.mauve < 1 and far.mauve < 0.1
    assert (near.num_predictions, near.num_references, near.num_buckets) == (60, 50, 5)
    assert mauve_score(features(60), features(50, seed=1)) == near


def test_mauve_through_evaluate_takes_features() -> None:
    pytest.importorskip("mauve")
    metric = evaluate.load(metric_path("mauve_score"))
    p, q = features(30), features(30, seed=1)
    expected = mauve_score(p, q)
    result = metric.compute(predictions=p.tolist(), references=q.tolist())
    assert result["mauve"] == pytest.approx(expected.mauve) and result["featurizer"] is None
    with pytest.raises(ValueError, match="max_length are for texts"):
        metric.compute(predictions=p.tolist(), references=q.tolist(), max_length=6)


def test_mauve_through_evaluate_takes_texts_and_any_featurizer(
    featurizer: GPT2Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    pytest.importorskip("mauve")
    metric = evaluate.load(metric_path("mauve_score"))
    texts = [LETTERS[i % 20] * (1 + i % 7) for i in range(30)]
    others = [LETTERS[(3 * i + 1) % 20] * (1 + i % 5) for i in range(30)]
    result = metric.compute(predictions=texts, references=others, model=featurizer, tokenizer=tokenizer, max_length=6)
    by_hand = [featurize(side, featurizer, tokenizer, max_length=6)[0] for side in (texts, others)]
    assert result["mauve"] == pytest.approx(mauve_score(*by_hand).mauve)
    assert result["featurizer"] == "GPT2Model" and result["max_length"] == 6
    assert result["num_truncated"] == sum(len(text) > 6 for text in texts) == 4
    result = metric.compute(
        predictions=texts,
        references=others,
        featurizer=lambda side: featurize(side, featurizer, tokenizer, max_length=6)[0],
        featurizer_name="tiny",
    )
    assert result["mauve"] == pytest.approx(mauve_score(*by_hand).mauve) and result["featurizer"] == "tiny"
    with pytest.raises(ValueError, match="model and tokenizer come together"):
        metric.compute(predictions=texts, references=others, model=featurizer)
