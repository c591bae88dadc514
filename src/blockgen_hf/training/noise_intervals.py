"""
The noise levels of training clipped to an interval, the one with the least variance of the loss (Block Diffusion).

The ELBO (Eq. 15) is the mean of a weighted loss over noise levels t in [0, 1]. Some levels tell little and vary much:
near 0 few tokens are noised and each counts 1 / t, near 1 nothing is left to predict from. Training on levels uniform
on [beta, omega], with the weights of the ELBO, has less variance. Its expectation is the mean over that interval, and
the bound only for the whole one; evaluation always takes the whole one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.modeling_utils import unwrap_model

from ..evaluation.likelihood import evaluation_mode
from ..evaluation.rows import Collator, collated
from .draws import (
    NOISE_LEVEL_SAMPLINGS,
    WHOLE_INTERVAL,
    NoiseInterval,
    StepDraws,
    check_interval,
    corrupt_batch,
)


# Tenths that are at least half of the whole apart.
INTERVAL_GRID: tuple[NoiseInterval, ...] = tuple(
    (max(low / 10, WHOLE_INTERVAL[0]), high / 10) for low in range(6) for high in range(low + 5, 11)
)


@dataclass(frozen=True)
class NoiseVariance:
    """
    Args:
        mean (`float`): of the loss of a scored token.
        loss (`float`): variance of the mean loss of a row, over rows and draws of noise.
        gradient (`float`, *optional*): variance of the gradient of a batch's mean loss, over batches and draws, summed
            over the parameters.
    """

    mean: float
    loss: float
    gradient: float | None = None


def noise_variance(
    model: nn.Module,
    rows: Iterable[Any],
    block_size: int,
    interval: NoiseInterval = WHOLE_INTERVAL,
    *,
    noise_level_sampling: str = "block",
    draws: int = 1,
    batch_size: int = 8,
    gradient: bool = False,
    seed: int = 0,
    data_collator: Collator | None = None,
) -> NoiseVariance:
    """
    Estimates how much the training loss, and its gradient, vary with the rows and with the noise.

    Noise is drawn as in training, with levels spread evenly over all rows. Intervals are compared on the same random
    numbers. Dropout is off, no global random number is used, and the model is left as it was.

    Args:
        model ([`BlockGenForDiffusionLM`]): on its device.
        rows: as in [`evaluate_likelihood`]. Rows without a scored token do not count.
        block_size (`int`): the block size, more than 1.
        interval (`tuple[float, float]`): noise levels are uniform on it.
        noise_level_sampling (`str`): one noise level per `"sequence"` or per `"block"`.
        draws (`int`): draws of noise for each row.
        batch_size (`int`): rows per batch; the variance of the gradient depends on it.
        gradient (`bool`): whether to estimate the variance of the gradient too, which takes backward passes.
        seed (`int`): seed of the noise.
        data_collator (`Callable`, *optional*): makes a batch of tensors from a list of rows. Default: pads on the
            right.

    Returns:
        [`NoiseVariance`].

    Raises:
        ValueError: a block size of 1, which has no noise level, an interval that is none, an unknown sampling, or
            fewer than two losses to compare.
    """
    if not isinstance(block_size, int) or block_size < 2:
        raise ValueError(
            f"`block_size` must be an integer above 1, but is {block_size!r}: block size 1 is fully noised."
        )
    check_interval("interval", interval)
    if noise_level_sampling not in NOISE_LEVEL_SAMPLINGS:
        raise ValueError(
            f"`noise_level_sampling` must be one of {', '.join(NOISE_LEVEL_SAMPLINGS)}, but is "
            f"{noise_level_sampling!r}."
        )
    for name, count in (("draws", draws), ("batch_size", batch_size)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"`{name}` must be a positive integer, but is {count!r}.")
    unwrapped = unwrap_model(model)
    batches = [batch for _, batch in collated(rows, batch_size, data_collator)]
    num_rows = sum(len(batch["input_ids"]) for batch in batches)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    losses, gradients = [], _Moments()
    with evaluation_mode(model), torch.set_grad_enabled(gradient):
        for draw in range(draws):
            first, step = 0, StepDraws(seed, draw, num_rows)
            for batch in batches:
                tensors = {name: tensor.to(unwrapped.device) for name, tensor in batch.items()}
                if tensors["attention_mask"].all():
                    del tensors["attention_mask"]  # as in training
                count = len(tensors["input_ids"])
                places, first = first + torch.arange(count, device=unwrapped.device), first + count
                noise = corrupt_batch(
                    tensors,
                    unwrapped.diffusion,
                    step,
                    places,
                    block_size,
                    noise_level_sampling,
                    {block_size: interval},
                    unwrapped.config.is_anchored,
                )
                output = model(**tensors, **noise, block_size=block_size, skip_logits=unwrapped._has_plain_head)
                scored = (tensors["labels"] != -100).sum(-1)
                losses.append((output.token_losses.detach().double().sum(-1) / scored)[scored > 0])
                if gradient and scored.sum() > 0:
                    found = torch.autograd.grad(output.loss, weights, allow_unused=True)
                    gradients.add([part for part in found if part is not None])
    of_rows = torch.cat(losses) if losses else torch.zeros(0)
    if len(of_rows) < 2:
        raise ValueError(f"A variance needs two losses at least, but `rows` and `draws` give {len(of_rows)}.")
    return NoiseVariance(of_rows.mean().item(), of_rows.var().item(), gradients.variance() if gradient else None)


class _Moments:
    """Sums and sums of squares of gradients."""

    def __init__(self) -> None:
        self.count, self.squares = 0, 0.0
        self.sums: list[torch.Tensor] = []

    def add(self, gradients: list[torch.Tensor]) -> None:
        self.sums = self.sums or [torch.zeros_like(part, dtype=torch.float64) for part in gradients]
        for total, part in zip(self.sums, gradients, strict=True):
            total += part
            self.squares += part.double().square().sum().item()
        self.count += 1

    def variance(self) -> float:
        if self.count < 2:
            raise ValueError(f"The variance of a gradient needs two batches or draws at least, not {self.count}.")
        of_mean = sum(total.square().sum().item() for total in self.sums) / self.count
        return (self.squares - of_mean) / (self.count - 1)


@torch.no_grad()
def least_variance(
    model: nn.Module, rows: Iterable[Any], block_size: int, **options: Any
) -> tuple[NoiseInterval, float]:
    """
    The interval of `INTERVAL_GRID` with the least variance of the loss, and this variance; `options` are those of
    [`noise_variance`].
    """
    rows = list(rows)
    found = {interval: noise_variance(model, rows, block_size, interval, **options).loss for interval in INTERVAL_GRID}
    best = min(found, key=lambda interval: found[interval])
    return best, found[best]


def choose_intervals(
    model: nn.Module, rows: Iterable[Any], block_sizes: Iterable[int], **options: Any
) -> dict[int, tuple[NoiseInterval, float]]:
    """[`least_variance`] of each block size above 1, the same on every rank."""
    rows = list(rows)
    found = {size: least_variance(model, rows, size, **options) for size in block_sizes if size > 1}
    (agreed,) = broadcast_object_list([found])
    return dict(agreed)


__all__ = ["INTERVAL_GRID", "NoiseVariance", "choose_intervals", "least_variance", "noise_variance"]
