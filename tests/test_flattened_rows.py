"""Positions that start again within a row (flattened, padding-free batches) keep its documents apart."""

from typing import Any

import pytest
import torch
from tiny import MASK, left_padded, tiny_model, words
from transformers import DynamicCache


A, B = words(6, seed=1), words(5, seed=2)
FLAT, POSITIONS = torch.cat([A, B])[None], torch.cat([torch.arange(6), torch.arange(5)])[None]


@pytest.mark.parametrize("overrides", [{}, {"diffusion_type": "uniform"}, {"next_token_prediction": True}], ids=str)
def test_positions_that_start_again_keep_documents_apart_for_the_language_model(overrides: dict[str, Any]) -> None:
    if overrides.get("next_token_prediction"):
        overrides = {**overrides, "block_sizes": [1], "mask_token_id": None}
    model = tiny_model(**overrides)
    apart = torch.cat([model(row[None]).logits for row in (A, B)], dim=1)
    for use_cache in (False, True):
        torch.testing.assert_close(
            model(FLAT, position_ids=POSITIONS, use_cache=use_cache).logits, apart, atol=1e-5, rtol=1e-5
        )
    last = model(FLAT, position_ids=POSITIONS, logits_to_keep=3).logits
    torch.testing.assert_close(last, apart[:, -3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_positions_that_start_again_keep_documents_apart_in_training_and_denoising(block_size: int) -> None:
    model = tiny_model()
    kwargs: dict[str, Any] = dict(block_size=block_size, noise_level=0.7 if block_size > 1 else 1.0)

    def losses(ids: torch.Tensor, **more: Any) -> torch.Tensor:
        noisy = torch.full_like(ids, MASK)
        loss: torch.Tensor = model(ids, labels=ids, noisy_input_ids=noisy, **kwargs, **more).token_losses
        torch.testing.assert_close(model(ids, noisy, **kwargs, **more).logits.shape[1], ids.shape[1])
        return loss

    apart = torch.cat([losses(row[None]) for row in (A, B)], dim=1)
    torch.testing.assert_close(losses(FLAT, position_ids=POSITIONS), apart, atol=1e-5, rtol=1e-5)


def test_positions_of_padding_are_no_documents() -> None:
    """transformers gives padding the position 1, from which the first token starts again."""
    model, batch = tiny_model(), left_padded([words(6), words(3, seed=1)])
    positions = batch["attention_mask"].cumsum(-1) - 1
    positions = positions.masked_fill(batch["attention_mask"] == 0, 1)
    kwargs: dict[str, Any] = dict(cache=DynamicCache(config=model.config), use_cache=True)
    logits = model(**batch, position_ids=positions, **kwargs).logits
    torch.testing.assert_close(logits[:, -3:], model(**batch).logits[:, -3:])


def test_positions_that_start_again_are_refused_where_documents_cannot_be_told_apart() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="cache"):
        model(FLAT, position_ids=POSITIONS, cache=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="noisy_input_ids"):
        model(FLAT, words(1, 4), position_ids=POSITIONS, noisy_position_ids=torch.arange(5, 9)[None])
