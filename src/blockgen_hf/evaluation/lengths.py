"""How likely a model finds texts that are longer than those it was trained on, by the position of their tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import unwrap_model

from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.evaluation_draws_blockgen import evaluation_rows
from ..modeling.inputs_blockgen import check_window
from ..modeling.objective_blockgen import SMALLEST_TIME
from .columns import model_columns
from .figures import LikelihoodFigure, likelihood_metrics
from .likelihood import MeasuredRows, check_draws, checked_block_sizes, nll_by_position, parts_of
from .rows import Collator


@dataclass(frozen=True)
class LengthFigures:
    """
    Args:
        start, end (`int`): positions from `start` on, before `end`.
        num_tokens (`int`): how many scored tokens stand there.
        at_positions (`dict[int, LikelihoodFigure]`): of these tokens, for every block size.
        up_to_end (`dict[int, LikelihoodFigure]`): of all tokens before `end`: what an evaluation of texts that are cut
            off there finds.
    """

    start: int
    end: int
    num_tokens: int
    at_positions: dict[int, LikelihoodFigure]
    up_to_end: dict[int, LikelihoodFigure]


@dataclass(frozen=True)
class LengthResult:
    """
    What [`evaluate_lengths`] finds.

    Args:
        lengths (`list[LengthFigures]`): one for each length.
        cache_window (`int`, *optional*): how many clean tokens each token saw; None: all of them.
        num_sequences (`int`): number of sequences with a scored token.
        num_tokens (`int`): number of scored tokens.
        num_draws (`int`): K.
    """

    lengths: list[LengthFigures]
    cache_window: int | None
    num_sequences: int
    num_tokens: int
    num_draws: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, nested, as JSON has it, but for the keys by block size, which are integers."""
        return dataclasses.asdict(self)


def evaluate_lengths(
    model: nn.Module,
    dataset: Any,
    lengths: Sequence[int] = (1, 2, 4, 8),
    block_sizes: Sequence[int] | None = None,
    monte_carlo_samples: int = 2,
    *,
    cache_window: int | None = None,
    batch_size: int = 1,
    data_collator: Collator | None = None,
    seed: int = 0,
    smallest_time: float = SMALLEST_TIME,
    accelerator: Any = None,
    progress: bool = False,
) -> LengthResult:
    """
    The bounds of [`evaluate_likelihood`] against the length of the text, up to several times the trained length.

    A token's term depends only on the tokens up to the end of its block. So one evaluation of long rows gives the
    figures of all shorter ones. Every pass computes the text under the mask of the window, which is what `generate`
    computes with the same `cache_window`.

    Args:
        model, block_sizes, monte_carlo_samples, batch_size, data_collator, seed, smallest_time, accelerator, progress:
            as in [`evaluate_likelihood`].
        dataset: as in [`evaluate_likelihood`], with rows of up to the longest of the lengths.
        lengths (`Sequence[int]`): increasing multiples of the model's positions (`max_position_embeddings`).
        cache_window (`int`, *optional*): how many clean tokens each token sees. Default: all, at distances that the
            model was not trained for.

    Returns:
        [`LengthResult`].

    Raises:
        ValueError: as [`evaluate_likelihood`]; lengths that do not increase; or no scored token between two lengths.
    """
    config: BlockGenConfig = unwrap_model(model).config
    sizes = checked_block_sizes(config, block_sizes)
    check_draws(monte_carlo_samples, smallest_time)
    check_window(config, cache_window)
    is_sorted = all(isinstance(n, int) and n > before for before, n in zip([0, *lengths], lengths, strict=False))
    if not lengths or not is_sorted:
        raise ValueError(f"`lengths` must be increasing positive integers, but are {list(lengths)!r}.")
    ends = [n * config.max_position_embeddings for n in lengths]
    starts = [0, *ends[:-1]]

    def measure(rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        nll = nll_by_position(
            model,
            rows,
            starts,
            sizes,
            monte_carlo_samples,
            seed=seed,
            smallest_time=smallest_time,
            cache_window=cache_window,
        )
        counts = _counts(rows, starts, config).to(nll)
        return torch.cat([nll, counts[:, None, None].expand(-1, *nll.shape[1:3], -1)], dim=-1)

    rows = MeasuredRows(model, dataset, data_collator, batch_size, accelerator=accelerator, progress=progress)
    num_tokens, measured = rows.measured(measure, sizes, ends[-1])
    nll, counts = measured.split(len(ends), dim=-1)
    counts = counts[:, 0, 0].long()
    figures = []
    for part, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not counts[:, part].any():
            raise ValueError(
                f"`dataset` must have rows with scored tokens at positions {start} to {end - 1}, but has none: make "
                "the rows longer, or leave out the longest of `lengths`."
            )
        here, so_far = nll[..., part], nll[..., : part + 1].sum(-1)
        figures.append(
            LengthFigures(
                start,
                end,
                int(counts[:, part].sum()),
                likelihood_metrics(here, counts[:, part], sizes).block_sizes,
                likelihood_metrics(so_far, counts[:, : part + 1].sum(-1), sizes).block_sizes,
            )
        )
    return LengthResult(figures, cache_window, len(nll), int(num_tokens.sum()), monte_carlo_samples)


def _counts(batch: Mapping[str, torch.Tensor], starts: Sequence[int], config: BlockGenConfig) -> torch.Tensor:
    """How many scored tokens of each row stand in each part, `[B, parts]`."""
    columns = model_columns(batch, "`batch`")
    rows = evaluation_rows(
        columns["input_ids"], columns["labels"], columns["attention_mask"], columns.get("document_ids"), seed=0
    )
    # Where clean tokens predict, nothing predicts the first one.
    scored = rows.scored & (rows.token_positions > 0) if config.predicts_from_clean else rows.scored
    return torch.stack([(scored & part).sum(-1) for part in parts_of(rows.token_positions, starts)], dim=-1)


__all__ = ["LengthFigures", "LengthResult", "evaluate_lengths"]
