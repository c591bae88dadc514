"""
What a training step draws: block sizes, noise levels and noise (BlockGen, Sec. 3.2, Algorithm 2).

Every number is a function of (seed, global step, place in the global batch) and of nothing else: the ranks of a
distributed run agree without talking to one another, a run that was resumed draws what it would have drawn, and how
the global batch is spread over ranks, accumulation steps and micro-batches makes no difference.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..modeling.diffusion_blockgen import DiffusionProcess
from ..modeling.inputs_blockgen import document_positions
from ..modeling.masking_blockgen import BlockSize
from ..modeling.objective_blockgen import SMALLEST_TIME, times_and_alphas
from ..modeling.sampling_blockgen import CounterGenerator


BLOCK_SIZE_SAMPLINGS = ("stratified", "independent", "shared")
NOISE_LEVEL_SAMPLINGS = ("sequence", "block")

# Noise levels t are uniform on one, from beta to omega.
NoiseInterval = tuple[float, float]
WHOLE_INTERVAL: NoiseInterval = (SMALLEST_TIME, 1.0)

# What the numbers of a step are for.
_SIZES, _SLOTS, _LEVEL_OFFSET, _LEVEL_ORDER, _BLOCK_ORDER, _NOISE = range(6)


def check_interval(name: str, interval: object) -> None:
    """
    Raises:
        ValueError: no pair of noise levels.
    """
    ends = interval if isinstance(interval, Sequence) and not isinstance(interval, str) else ()
    if not (len(ends) == 2 and all(isinstance(end, int | float) for end in ends) and 0 < ends[0] < ends[1] <= 1):
        raise ValueError(f"`{name}` must be two numbers, 0 < beta < omega <= 1, but is {interval!r}.")


def stratified_block_sizes(
    block_sizes: Sequence[int], weights: Sequence[float] | None, num_slots: int, u: float
) -> list[int]:
    """
    Algorithm 2: slot d = 0 .. D-1 gets the block size in whose interval of the cumulative weights (u + d / D) mod 1
    lies.

    Each size of weight gamma is given to at most one slot more or less than D gamma, and has probability gamma in
    every slot.

    Args:
        block_sizes (`list[int]`): S.
        weights (`list[float]`, *optional*): gamma, in any unit; None: uniform.
        num_slots (`int`): D.
        u (`float`): a uniform number in [0, 1).

    Returns:
        `num_slots` sizes; those of weight zero are never among them.

    Raises:
        ValueError: the weights are not a distribution over the sizes, there is no slot, or `u` is outside [0, 1).
    """
    weights = [1.0] * len(block_sizes) if weights is None else list(weights)
    if len(weights) != len(block_sizes) or not all(0 <= w < math.inf for w in weights) or sum(weights) == 0:
        raise ValueError(
            f"`weights` must be {len(block_sizes)} non-negative numbers, one a block size and not all zero, but are "
            f"{weights}."
        )
    if num_slots < 1 or not 0 <= u < 1:
        raise ValueError(f"`num_slots` must be positive and `u` in [0, 1), but they are {num_slots!r} and {u!r}.")
    # Sizes of weight zero have no interval, and the last interval ends at 1 whatever the sum of the floats is.
    sizes, masses = zip(*((size, w) for size, w in zip(block_sizes, weights, strict=True) if w > 0), strict=True)
    total = math.fsum(masses)
    ends = [end / total for end in accumulate(masses[:-1])]
    return [sizes[bisect_right(ends, (u + slot / num_slots) % 1)] for slot in range(num_slots)]


@dataclass(frozen=True)
class StepDraws:
    """
    The draws of one optimizer step.

    Args:
        seed (`int`): of the run.
        step (`int`): optimizer steps done before.
        num_places (`int`): rows of the global batch, over all ranks and accumulation steps.
    """

    seed: int
    step: int
    num_places: int

    def _generator(self, purpose: int) -> CounterGenerator:
        return CounterGenerator.from_seed(self.seed, "cpu").fold_in(self.step, purpose)

    def _permutation(self, purpose: int, length: int) -> torch.Tensor:
        return self._generator(purpose).fold_in(torch.arange(length)).uniform().argsort()

    def block_sizes(
        self, block_sizes: Sequence[int], weights: Sequence[float] | None, num_slots: int, sampling: str
    ) -> list[int]:
        """
        The block sizes of the slots, by [`stratified_block_sizes`] and a permutation of the slots (`"stratified"`),
        each for itself (`"independent"`), or one for all (`"shared"`).
        """
        generator = self._generator(_SIZES)
        if sampling == "shared":
            return stratified_block_sizes(block_sizes, weights, 1, generator.uniform().item()) * num_slots
        if sampling == "independent":
            numbers = generator.fold_in(torch.arange(num_slots)).uniform().tolist()
            return [stratified_block_sizes(block_sizes, weights, 1, number)[0] for number in numbers]
        sizes = stratified_block_sizes(block_sizes, weights, num_slots, generator.uniform().item())
        return [sizes[slot] for slot in self._permutation(_SLOTS, num_slots).tolist()]

    def noise_levels(
        self,
        places: torch.Tensor,
        block_of_token: torch.Tensor | None = None,
        interval: NoiseInterval | tuple[torch.Tensor, torch.Tensor] = WHOLE_INTERVAL,
    ) -> torch.Tensor:
        """
        Times t of an interval, low-discrepancy over the global batch: each is uniform, and together they are a grid.

        Args:
            places (`torch.LongTensor` of shape `[B]`): places of the rows in the global batch.
            block_of_token (`torch.LongTensor` of shape `[B, L]`, *optional*): the number of every token's block in
                its row; given, each block has a time of its own, and those of a row are spread evenly.
            interval (`tuple`): its ends, as numbers or as tensors `[B or 1, 1]`.

        Returns:
            `torch.DoubleTensor` of shape `[B, 1]`, or `[B, L]` with blocks.
        """
        device = places.device
        offset = self._generator(_LEVEL_OFFSET).uniform().to(device)
        order = self._permutation(_LEVEL_ORDER, self.num_places).to(device)
        quantiles = ((offset + order[places].double() / self.num_places) % 1)[:, None]
        if block_of_token is not None:
            num_blocks = block_of_token.amax(-1, keepdim=True) + 1
            blocks = torch.arange(block_of_token.shape[1], device=device)
            keys = self._generator(_BLOCK_ORDER).fold_in(places.cpu()[:, None], blocks.cpu()).uniform().to(device)
            stratum = keys.masked_fill(blocks >= num_blocks, math.inf).argsort(-1).argsort(-1)
            quantiles = (quantiles + stratum.gather(1, block_of_token)) / num_blocks
        low, high = interval
        return low + (high - low) * quantiles

    def noise(self, places: torch.Tensor, length: int) -> CounterGenerator:
        """The random numbers of every token of some rows: a generator with keys `[B, L]`."""
        tokens = torch.arange(length, device=places.device)
        generator = CounterGenerator.from_seed(self.seed, places.device).fold_in(self.step, _NOISE)
        return generator.fold_in(places[:, None], tokens)


def corrupt_batch(
    batch: dict[str, torch.Tensor],
    diffusion: DiffusionProcess,
    draws: StepDraws,
    places: torch.Tensor,
    block_size: BlockSize,
    noise_level_sampling: str,
    intervals: Mapping[int, NoiseInterval] | None = None,
    is_anchored: bool = False,
) -> dict[str, torch.Tensor]:
    """
    Noise levels and noisy tokens of a batch, as `forward` takes them.

    Args:
        batch: `input_ids` and `labels` `[B, L]`, with `attention_mask` and `document_ids` as the case may be.
        places (`torch.LongTensor` of shape `[B]`): places of its rows in the global batch.
        noise_level_sampling (`str`): a time a `"sequence"` (the paper) or a `"block"` (BD3-LM).
        intervals (`Mapping[int, tuple[float, float]]`, *optional*): of noise levels, by block size. Default: whole.
        is_anchored (`bool`): whether blocks begin with the clean token before them, as in adapted models.

    Returns:
        `noise_level`, double `[B, 1]` or `[B, L]`, and `noisy_input_ids`, long `[B, L]`.
    """
    input_ids, scored = batch["input_ids"], batch["labels"] != -100
    targets = torch.where(scored, batch["labels"], input_ids)
    blocks = None
    if noise_level_sampling == "block":
        blocks = _blocks(batch, block_size, is_anchored)
    sizes = (block_size,) if isinstance(block_size, int) else block_size
    ends = [(intervals or {}).get(size, WHOLE_INTERVAL) for size in sizes]
    low, high = torch.tensor(ends, dtype=torch.float64, device=input_ids.device).T[..., None]
    times = draws.noise_levels(places, blocks, (low, high))
    noise_level, alpha_t = times_and_alphas(diffusion, times, block_size)
    noise = draws.noise(places, input_ids.shape[1])
    noisy_input_ids = diffusion.corrupt(targets, alpha_t, noise, keep=~scored)
    return {"noise_level": noise_level, "noisy_input_ids": noisy_input_ids}


def _blocks(batch: dict[str, torch.Tensor], block_size: BlockSize, is_anchored: bool) -> torch.Tensor:
    """The number of every token's block in its row, `[B, L]`; blocks are counted anew in every document."""
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    if "document_ids" in batch:
        positions = document_positions(batch["document_ids"], mask)
    elif mask is not None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    else:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    sizes = torch.tensor(block_size, device=input_ids.device).view(-1, 1)
    starts = (positions - 1) % sizes == 0 if is_anchored else positions % sizes == 0
    if mask is not None:
        starts = starts & mask.bool()
    return (starts.long().cumsum(-1) - 1).clamp(min=0)


__all__ = ["StepDraws", "check_interval", "corrupt_batch", "stratified_block_sizes"]
