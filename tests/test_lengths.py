"""Likelihood by the length of the text, beyond the model's positions, with and without a window."""

from typing import Any

import pytest
import torch
from tiny import tiny_model, words

from blockgen_hf.evaluation import evaluate_lengths, evaluate_likelihood


POSITIONS = 16


def short_model(variant: str = "masked", **overrides: Any) -> Any:
    return tiny_model(variant, max_position_embeddings=POSITIONS, **overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"next_token_prediction": True, "block_sizes": [1]},
        {"ar_prediction": "clean"},
        {"ar_prediction": "clean", "noisy_attention": "causal", "diffusion_type": "uniform"},
    ],
)
@torch.no_grad()
def test_block_size_one_is_the_chain_rule_on_the_window(overrides: dict[str, Any]) -> None:
    """Token by token: to a model of one layer, the window is all there is; before that is full, the whole text."""
    model, rows, window = short_model(num_hidden_layers=1, **overrides), words(3, 40), 5
    result = evaluate_lengths(model, rows, (1, 2, 3), [1], cache_window=window)
    losses = torch.zeros(40)
    for place in range(1, 40):
        logits = model(rows[:, max(0, place - window) : place], use_cache=False).logits[:, -1].float()
        losses[place] = -logits.log_softmax(-1).gather(-1, rows[:, place, None]).sum()
    first = 1 if overrides else 0
    if first == 0:
        logits = model(rows[:, :0], use_cache=False).logits[:, -1].float()
        losses[0] = -logits.log_softmax(-1).gather(-1, rows[:, 0, None]).sum()
    for part, (start, end) in zip(result.lengths, ((first, 16), (16, 32), (32, 40)), strict=True):
        assert part.num_tokens == 3 * (end - start)
        expected = float(losses[start:end].sum()) / part.num_tokens
        assert part.at_positions[1].nll == pytest.approx(expected, rel=1e-5)
        expected = float(losses[first:end].sum()) / (3 * (end - first))
        assert part.up_to_end[1].nll == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", ["masked", "uniform", "block_causal"])
def test_the_first_length_is_the_evaluation_of_texts_that_end_there(variant: str) -> None:
    """Up to the draws of noise, which depend on the row: many of them, and a bound in the same range."""
    model, rows, sizes = short_model(variant), words(6, 32), [4]
    found = evaluate_lengths(model, rows, (1, 2), sizes, 16, cache_window=POSITIONS)
    cut = evaluate_likelihood(model, rows[:, :POSITIONS], sizes, 16).block_sizes[4]
    figure = found.lengths[0].up_to_end[4]
    assert figure == found.lengths[0].at_positions[4]
    assert abs(figure.nll - cut.nll) < 5 * (figure.nll_standard_error + cut.nll_standard_error)
    assert found.num_tokens == 6 * 32 and found.num_sequences == 6


def test_lengths_of_adapted_models_count_the_tokens_that_are_scored() -> None:
    """Nothing predicts the first token, and the figures of the whole text are those of its evaluation."""
    rows, overrides = words(3, 32), {"ar_prediction": "clean"}
    found = evaluate_lengths(short_model(**overrides).double(), rows, (1, 2), [1, 4])
    whole = tiny_model(max_position_embeddings=32, **overrides).double()
    expected = evaluate_likelihood(whole, rows, [1, 4], 2)
    assert [part.num_tokens for part in found.lengths] == [3 * 15, 3 * 16]
    assert found.num_tokens == expected.num_tokens == 3 * 31
    for size in (1, 4):
        assert found.lengths[1].up_to_end[size].nll == pytest.approx(expected.block_sizes[size].nll, rel=1e-9)


def test_a_window_as_long_as_the_text_is_none() -> None:
    model, rows = short_model(), words(2, 32)
    whole = evaluate_lengths(model, rows, (2,))
    assert evaluate_lengths(model, rows, (2,), cache_window=32).lengths == whole.lengths
    assert evaluate_lengths(model, rows, (2,), cache_window=8).lengths != whole.lengths


def test_what_cannot_be_measured_is_refused() -> None:
    model = short_model()
    with pytest.raises(ValueError, match="`lengths` must be increasing"):
        evaluate_lengths(model, words(2, 20), (2, 1))
    with pytest.raises(ValueError, match="scored tokens at positions 32 to 63"):
        evaluate_lengths(model, words(2, 20), (2, 4))
    with pytest.raises(ValueError, match="Row 0 of `dataset` has 40 tokens, but the longest of `lengths` has 32"):
        evaluate_lengths(model, words(2, 40), (2,))
    with pytest.raises(ValueError, match="`cache_window` must be an integer of at least 1, but is 0"):
        evaluate_lengths(model, words(2, 20), (2,), cache_window=0)
