"""How likely a model finds a data set: bounds for each block size and for the mixture (BlockGen, Suppl. C)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_utils import unwrap_model
from transformers.utils import logging

from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.evaluation_draws_blockgen import evaluation_rows, is_exact, make_draw
from ..modeling.objective_blockgen import SMALLEST_TIME
from .columns import model_columns
from .figures import LikelihoodResult, likelihood_metrics, mixture_weights
from .processes import Processes
from .rows import Collator, check_batch, collated


@torch.no_grad()
def sequence_nll(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    block_sizes: Sequence[int] | None = None,
    monte_carlo_samples: int = 8,
    *,
    seed: int = 0,
    smallest_time: float = SMALLEST_TIME,
) -> torch.Tensor:
    """
    Negative log-likelihood bounds of the rows of a batch: NLL_s(t_k, z_k) of Eq. 18 for block sizes s and draws k.

    The noise is keyed by the seed, the block size, the draw and what a row says (see `evaluation_draws_blockgen.py`),
    so that a row gets the same figures in every batch, up to rounding. No global random number is used, and the model
    is left in the mode it was in.

    Args:
        model ([`BlockGenForDiffusionLM`]): also wrapped, as for training in several processes.
        batch (mapping): `input_ids`, long `[B, L]`, and the columns that [`model_columns`] lists, of the same shape:
            `labels` (-100 where not scored; without them every token is scored that is not padding), `attention_mask`
            (0 for padding, which is never scored), `document_ids` ... On any device; other entries are ignored.
        block_sizes (`Sequence[int]`, *optional*): S sizes. Default: those of the configuration.
        monte_carlo_samples (`int`): K. The first K // 2 draws are independent of the others.
        seed (`int`): of the noise.
        smallest_time (`float`): t is uniform on (smallest_time, 1].

    Returns:
        `torch.DoubleTensor` of shape `[B, S, K]`, on the model's device: nats, summed over the scored tokens of a row.
        With a block size of 1 a masked model is exact, in one forward pass for all draws; else each takes one.

    Raises:
        ValueError: block sizes, number of draws or smallest time that cannot be evaluated.
    """
    return nll_by_position(
        model, batch, [0], block_sizes, monte_carlo_samples, seed=seed, smallest_time=smallest_time
    ).squeeze(-1)


@torch.no_grad()
def nll_by_position(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    starts: Sequence[int],
    block_sizes: Sequence[int] | None,
    monte_carlo_samples: int,
    *,
    seed: int = 0,
    smallest_time: float = SMALLEST_TIME,
    cache_window: int | None = None,
) -> torch.Tensor:
    """
    As [`sequence_nll`], in parts: the bound is a sum over blocks, and a block's term is of the tokens up to its end.

    Args:
        starts (`Sequence[int]`): where the parts start, positions from 0 on; each ends where the next one starts.
        cache_window (`int`, *optional*): how many clean tokens a token sees.

    Returns:
        `torch.DoubleTensor` of shape `[B, S, K, parts]`.
    """
    unwrapped = unwrap_model(model)
    config: BlockGenConfig = unwrapped.config
    sizes = checked_block_sizes(config, block_sizes)
    check_draws(monte_carlo_samples, smallest_time)
    tensors = {name: tensor.to(unwrapped.device) for name, tensor in model_columns(batch, "`batch`").items()}
    attention_mask = None if tensors["attention_mask"].all() else tensors["attention_mask"]
    document_ids = tensors.get("document_ids")
    rows = evaluation_rows(
        tensors["input_ids"], tensors["labels"], attention_mask, document_ids, seed, config.is_anchored
    )
    labels = torch.where(rows.scored, rows.tokens, -100)
    parts = parts_of(rows.token_positions, starts)
    shape = len(rows.tokens), len(sizes), monte_carlo_samples, len(starts)
    nll = torch.zeros(shape, dtype=torch.float64, device=rows.tokens.device)
    shared: dict[str, Any] = {}  # by all draws and block sizes: keys and values of the clean half
    if document_ids is None and not config.predicts_from_clean:
        shared["cache"] = DynamicCache(config=config)
    with evaluation_mode(model):
        for column, size in enumerate(sizes):
            exact = is_exact(config, size)
            for k in range(1 if exact else monte_carlo_samples):
                draw = make_draw(
                    unwrapped.diffusion, rows, size, k, monte_carlo_samples, smallest_time, config.time_conditioning
                )
                noise: dict[str, Any] = dict(
                    shared,
                    noisy_input_ids=draw.noisy_input_ids,
                    noise_level=draw.noise_level,
                    block_size=size,
                    objective=draw.objective,
                )
                losses = model(
                    input_ids=rows.tokens,
                    labels=labels,
                    attention_mask=attention_mask,
                    document_ids=document_ids,
                    cache_window=cache_window,
                    skip_logits=unwrapped._has_plain_head,
                    **({} if config.next_token_prediction else noise),
                ).token_losses
                weighted = draw.weights * losses.double()
                nll[:, column, k:] = torch.stack([(weighted * part).sum(-1) for part in parts], dim=-1)[:, None]
    return nll


def parts_of(positions: torch.Tensor, starts: Sequence[int]) -> list[torch.Tensor]:
    """Which positions `[B, L]` belong to each part, as [`nll_by_position`] has them."""
    number = torch.bucketize(positions, torch.tensor(starts, device=positions.device), right=True) - 1
    return [number == part for part in range(len(starts))]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_draws(monte_carlo_samples: int, smallest_time: float) -> None:
    """Raises a `ValueError` for numbers of draws, or smallest times, that mean nothing."""
    is_count = isinstance(monte_carlo_samples, int) and not isinstance(monte_carlo_samples, bool)
    if not is_count or monte_carlo_samples < 1:
        raise ValueError(f"`monte_carlo_samples` must be a positive integer, but is {monte_carlo_samples!r}.")
    if not 0 <= smallest_time < 1:
        raise ValueError(f"`smallest_time` must be in [0, 1), but is {smallest_time!r}.")


def checked_block_sizes(config: BlockGenConfig, block_sizes: Sequence[int] | None) -> list[int]:
    """The block sizes to evaluate. Raises a `ValueError` for those that the model cannot evaluate."""
    sizes = list(config.block_sizes if block_sizes is None else block_sizes)
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`block_sizes` must be positive integers, but are {sizes!r}.")
    if not sizes or len(set(sizes)) < len(sizes):
        raise ValueError(f"`block_sizes` must be at least one size, each once, but are {sizes!r}.")
    if config.next_token_prediction and sizes != [1]:
        raise ValueError(
            f"`block_sizes` must be [1] for a model with `next_token_prediction=True`, but are {sizes!r}."
        )
    grid = config.block_sizes[0]
    if config.clean_attention == "block_causal" and any(size % grid for size in sizes):
        raise ValueError(
            f"`block_sizes` must be multiples of {grid}, the blocks of a model with `clean_attention='block_causal'`, "
            f"but are {sizes!r}: clean tokens would reveal the tokens to be predicted."
        )
    return sizes


def evaluate_likelihood(
    model: nn.Module,
    dataset: Any,
    block_sizes: Sequence[int] | None = None,
    monte_carlo_samples: int = 8,
    *,
    batch_size: int = 8,
    data_collator: Collator | None = None,
    weights: Mapping[int, float] | Sequence[float] | None = None,
    seed: int = 0,
    smallest_time: float = SMALLEST_TIME,
    accelerator: Any = None,
    progress: bool = False,
) -> LikelihoodResult:
    r"""
    Bounds of the negative log-likelihood of a data set, and perplexities, for each block size and for the mixture.

    - Block size s: the ELBO (Eq. 15, 16) from K draws per sequence (Eq. 18, 19), summed over the data set and divided
      by its scored tokens (Eq. 13). For block size 1, it is the cross entropy with fully noised inputs: the exact
      likelihood of masked models (Eq. 14), and a mean over random inputs from K draws for uniform ones. Models with
      `next_token_prediction` or `ar_prediction="clean"` are exact there, and do not score the first token of a text.
    - Mixture: `jensen` (Eq. 7), and the tighter `log_sum_exp` (Eq. 20), reduced for each sequence, with one estimate
      that is corrected for its bias and one that is certainly a bound.

    Except for rounding, the results do not depend on batch size, padding, order or number of processes: noise is keyed
    by the seed and the content of a row. Rows with the same content get the same noise.

    As in the paper's code, t is uniform on (smallest_time, 1]. This leaves out two parts of the bound: the rest of the
    text at t = 1, where alpha is `noise_schedule_eps` (1e-3), and times below `smallest_time`, which are replaced by
    the mean of the others. For masked models, each is about one part in a thousand. The second may be large for a
    uniform model that has not learnt to trust the tokens it sees; `smallest_time=0` gives the whole integral.

    Args:
        model ([`BlockGenForDiffusionLM`]): the model on its device; may be wrapped by `accelerator.prepare`.
        dataset: rows with `input_ids` and the columns that [`model_columns`] lists, as lists or tensors, in a
            sequence, a `Dataset` or an iterable; or only token ids; or the columns that a tokenizer returns; or a
            tensor of token ids `[N, L]`. Rows of unequal length are padded. Tokens whose label is not -100 are scored
            (without labels, all tokens), except padding.
        block_sizes (`Sequence[int]`, *optional*): block sizes to evaluate, any positive numbers. Default: those of the
            configuration.
        monte_carlo_samples (`int`): K, draws of noise for each row and block size. The time is proportional to it.
        batch_size (`int`): rows per forward pass and process.
        data_collator (`Callable`, *optional*): makes a batch of tensors from a list of rows. Default: pads on the
            right.
        weights (`Mapping[int, float]` or `Sequence[float]`, *optional*): gamma, by block size or in their order.
            Default: those of the configuration; the mixture then has only its block sizes. If `block_sizes` leaves
            some of them out, the weights of the others are scaled to add up to 1: see `weights` of the result.
        seed (`int`): seed of the noise.
        smallest_time (`float`): smallest time, in [0, 1).
        accelerator (`accelerate.Accelerator`, *optional*): shares the rows among its processes. Every process gets the
            same result and needs the same data set. Default: created if several processes were launched.
        progress (`bool`): whether the main process shows a progress bar.

    Returns:
        [`LikelihoodResult`].

    Raises:
        ValueError: the data set has no scored token; a row (named by its number) or an argument is invalid; or a
            likelihood (named by row and block size) is not finite.
    """
    config: BlockGenConfig = unwrap_model(model).config
    sizes = checked_block_sizes(config, block_sizes)
    check_draws(monte_carlo_samples, smallest_time)
    gamma = mixture_weights(config.block_sizes, config.block_size_weights, sizes, weights)

    def measure(rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return sequence_nll(model, rows, sizes, monte_carlo_samples, seed=seed, smallest_time=smallest_time)

    rows = MeasuredRows(model, dataset, data_collator, batch_size, accelerator=accelerator, progress=progress)
    num_tokens, nll = rows.measured(measure, sizes, config.max_position_embeddings)
    return likelihood_metrics(nll, num_tokens, sizes, gamma, num_skipped=rows.num_skipped)


class MeasuredRows:
    """
    The rows of a data set, measured by all processes together. The arguments are those of [`evaluate_likelihood`].

    After [`~MeasuredRows.measured`], `num_skipped` says how many rows had no scored token.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        data_collator: Collator | None,
        batch_size: int,
        *,
        accelerator: Any,
        progress: bool,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be positive, but is {batch_size!r}.")
        self.config: BlockGenConfig = unwrap_model(model).config
        self.processes = Processes(accelerator, on_cpu=next(model.parameters()).device.type == "cpu")
        self.dataset, self.data_collator, self.batch_size, self.progress = dataset, data_collator, batch_size, progress
        self.num_skipped = 0

    def measured(
        self, measure: Callable[[Mapping[str, torch.Tensor]], torch.Tensor], sizes: Sequence[int], positions: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            measure: NLL `[B, S, ...]` of the rows of a batch.
            sizes (`Sequence[int]`): the S block sizes, for messages.
            positions (`int`): how many positions a row may have.

        Returns:
            the scored tokens of each row, `[N]`, and what was measured, `[N, S, ...]`, in every process.
        """
        dataset, processes = self.dataset, self.processes
        found: list[tuple[torch.Tensor, ...]] = []  # numbers of rows, scored tokens, bounds
        num_rows = 0
        total = len(dataset) if hasattr(dataset, "__len__") and not isinstance(dataset, Mapping) else None
        with logging.tqdm(total=total, unit="row", disable=not self.progress or not processes.is_main) as bar:
            for start, batch in collated(dataset, self.batch_size * processes.count, self.data_collator):
                num_tokens = check_batch(batch, start, self.config, positions)
                scored_rows = num_tokens.nonzero().squeeze(-1)
                num_rows += len(num_tokens)
                self.num_skipped += len(num_tokens) - len(scored_rows)
                own, is_spare = _share(scored_rows, processes)
                if len(own):
                    measured = measure({name: tensor[own] for name, tensor in batch.items()})
                    if not is_spare:
                        found.append((start + own.cpu(), num_tokens[own].cpu(), measured.cpu()))
                bar.update(len(num_tokens))
        if num_rows == self.num_skipped:
            raise ValueError(
                "`dataset` must have rows with scored tokens (labels other than -100, outside of padding), but none "
                f"of its {num_rows} rows has any."
            )
        numbers, num_tokens, nll = _joined(processes.gather(found))
        _check_finite(nll.flatten(3).sum(3) if nll.ndim > 3 else nll, numbers, sizes)
        return num_tokens, nll


def _share(rows: torch.Tensor, processes: Processes) -> tuple[torch.Tensor, bool]:
    """
    The rows of this process among `[n]`. Where there are too few it takes one that is another's, and True is
    returned: sharded models are evaluated by all processes at once.
    """
    each = -(-len(rows) // processes.count)
    own = rows[processes.rank * each : (processes.rank + 1) * each]
    return (own, False) if len(own) else (rows[:1], True)


def _joined(parts: list[list[tuple[torch.Tensor, ...]]]) -> tuple[torch.Tensor, ...]:
    """What all processes found, the rows in their order: the same tensors everywhere."""
    columns = [torch.cat(column) for column in zip(*chain.from_iterable(parts), strict=True)]
    order = columns[0].argsort()
    return tuple(column[order] for column in columns)


def _check_finite(nll: torch.Tensor, numbers: torch.Tensor, block_sizes: Sequence[int]) -> None:
    for row, column, _ in (~nll.isfinite()).nonzero()[:1].tolist():
        raise ValueError(
            f"The likelihood of row {int(numbers[row])} of `dataset` at block size {block_sizes[column]} is not "
            f"finite: {nll[row, column].tolist()} by draw. Are the weights of the model finite?"
        )


__all__ = ["evaluate_likelihood", "evaluation_mode", "likelihood_metrics", "mixture_weights", "sequence_nll"]
