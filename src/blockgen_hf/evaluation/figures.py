"""From the bounds of sequences to the figures of a data set, with error bars (BlockGen, Eq. 7, 13, 19, 20)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LikelihoodFigure:
    """
    A negative log-likelihood bound of a data set, a scored token.

    Args:
        nll (`float`): in nats a token.
        perplexity (`float`): its exponential, Eq. 13.
        nll_standard_error (`float`, *optional*): of `nll`, over the Monte-Carlo draws: by how much the figure would
            vary with the seed, on the same data. None if there is one draw only.
        perplexity_standard_error (`float`, *optional*): of `perplexity`, by the delta method: their product.
    """

    nll: float
    perplexity: float
    nll_standard_error: float | None
    perplexity_standard_error: float | None


@dataclass(frozen=True)
class LikelihoodResult:
    """
    What [`evaluate_likelihood`] finds.

    Args:
        block_sizes (`dict[int, LikelihoodFigure]`): the bound of every block size evaluated.
        jensen ([`LikelihoodFigure`], *optional*): the mixture by Eq. 7: the weighted mean of the block sizes. A bound
            with any number of draws, and what training minimises. Report this one and compare runs by it.
        log_sum_exp ([`LikelihoodFigure`], *optional*): the mixture by Eq. 20 as printed, which is tighter: reduced for
            each sequence and then summed. Too low on average, since it prefers block sizes with lucky draws: not a
            bound of the likelihood unless K is large.
        log_sum_exp_corrected ([`LikelihoodFigure`], *optional*): the same without the part of the bias that falls as
            1 / K. The best estimate if the error is small. None, like the next, if there is only one draw.
        log_sum_exp_upper ([`LikelihoodFigure`], *optional*): on average at least Eq. 20 with any number of draws, and
            so a bound of the likelihood: some draws choose among the block sizes, and others measure them.
        weights (`dict[int, float]`): gamma, for the block sizes in the mixture. They add up to 1. If there are none,
            the results for the mixture are None.
        num_sequences (`int`): number of sequences with a scored token.
        num_tokens (`int`): number of scored tokens.
        num_skipped (`int`): number of rows without a scored token.
        num_draws (`int`): K.
    """

    block_sizes: dict[int, LikelihoodFigure]
    jensen: LikelihoodFigure | None
    log_sum_exp: LikelihoodFigure | None
    log_sum_exp_corrected: LikelihoodFigure | None
    log_sum_exp_upper: LikelihoodFigure | None
    weights: dict[int, float]
    num_sequences: int
    num_tokens: int
    num_skipped: int
    num_draws: int

    @property
    def geometric_mean(self) -> LikelihoodFigure | None:
        """
        The bound of another density, the normalised geometric mean of the block sizes' (Eq. 8, 33): it is `jensen`.

        What it leaves out is -log Z, Z <= 1 being the sum of the products over all texts, which nobody can compute:
        estimates need the exact likelihood of each block size, and of these only bounds are known.
        """
        return self.jensen

    def to_dict(self) -> dict[str, Any]:
        """Everything, nested, as JSON has it, but for the keys of `block_sizes` and `weights`, which are integers."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """The figures as a flat mapping, as `Trainer` logs them: `perplexity_block_size_16`, `nll_jensen` ..."""
        named = {f"block_size_{size}": figure for size, figure in self.block_sizes.items()}
        mixture = {
            "jensen": self.jensen,
            "log_sum_exp": self.log_sum_exp,
            "log_sum_exp_corrected": self.log_sum_exp_corrected,
            "log_sum_exp_upper": self.log_sum_exp_upper,
        }
        named.update({name: figure for name, figure in mixture.items() if figure is not None})
        return {
            f"{key}_{name}": value
            for name, figure in named.items()
            for key, value in asdict(figure).items()
            if value is not None
        }


def likelihood_metrics(
    nll: torch.Tensor,
    num_tokens: torch.Tensor,
    block_sizes: Sequence[int],
    weights: Sequence[float] | None = None,
    *,
    num_skipped: int = 0,
) -> LikelihoodResult:
    """
    The likelihood of a data set from the bounds of its sequences, tensors or arrays in any order of the sequences.

    Args:
        nll (`[N, S, K]`): bounds of [`sequence_nll`], in nats. NaN and infinite values carry over to the result.
        num_tokens (`[N]`): number of scored tokens of each sequence. Sequences without any are counted as skipped.
        block_sizes (`Sequence[int]`): the S block sizes.
        weights (`Sequence[float]`, *optional*): gamma, one per block size, zero for those outside the mixture; they
            are divided by their sum. Default: equal. [`mixture_weights`] gives those of a configuration.
        num_skipped (`int`): number of sequences that were left out before.

    Raises:
        ValueError: shapes do not fit, a weight is negative, or no sequence has a scored token.
    """
    nll = torch.as_tensor(nll).detach().to("cpu", torch.float64)
    num_tokens = torch.as_tensor(num_tokens).detach().to("cpu", torch.float64)
    if nll.ndim != 3 or nll.shape[1] != len(block_sizes) or nll.shape[2] < 1 or num_tokens.shape != nll.shape[:1]:
        raise ValueError(
            f"`nll` must have the shape [sequences, {len(block_sizes)} block sizes, draws] and `num_tokens` "
            f"[sequences], but have {list(nll.shape)} and {list(num_tokens.shape)}."
        )
    given = [1.0] * len(block_sizes) if weights is None else [float(weight) for weight in weights]
    gamma = torch.tensor(given, dtype=torch.float64)
    if len(gamma) != len(block_sizes) or not (gamma >= 0).all() or not gamma.isfinite().all():
        raise ValueError(
            f"`weights` must be {len(block_sizes)} numbers, one a block size and none negative, but are {weights!r}."
        )
    scored = num_tokens > 0
    if not scored.any():
        raise ValueError("There is no sequence with a scored token: nothing can be said of the likelihood.")
    nll, total = nll[scored], int(num_tokens.sum())
    in_mixture = (gamma > 0).nonzero().squeeze(-1)
    gamma = gamma[in_mixture] / gamma.sum()
    log_sum_exp = corrected = upper = jensen = None
    if len(in_mixture):
        log_sum_exp, corrected, upper = _log_sum_exp_figures(nll[:, in_mixture], gamma, total)
        jensen = _figure((nll[:, in_mixture] * gamma[:, None]).sum(1), total)
    return LikelihoodResult(
        block_sizes={size: _figure(nll[:, column], total) for column, size in enumerate(block_sizes)},
        log_sum_exp=log_sum_exp,
        log_sum_exp_corrected=corrected,
        log_sum_exp_upper=upper,
        jensen=jensen,
        weights={
            block_sizes[column]: weight for column, weight in zip(in_mixture.tolist(), gamma.tolist(), strict=True)
        },
        num_sequences=int(scored.sum()),
        num_tokens=total,
        num_skipped=num_skipped + int((~scored).sum()),
        num_draws=nll.shape[2],
    )


def mixture_weights(
    trained: Sequence[int],
    trained_weights: Sequence[float] | None,
    block_sizes: Sequence[int],
    weights: Mapping[int, float] | Sequence[float] | None = None,
) -> list[float]:
    """
    gamma of each of the `block_sizes`, not normalised: what `weights` say, by block size or in their order, else those
    of the configuration (`trained_weights`, None: equal), which are zero for sizes that it does not have.

    Raises:
        ValueError: weights for sizes that are not evaluated, or not one a size.
    """
    if isinstance(weights, Mapping):
        if not set(weights) <= set(block_sizes):
            raise ValueError(f"`weights` must be of the block sizes {list(block_sizes)}, but are {dict(weights)!r}.")
        return [float(weights.get(size, 0.0)) for size in block_sizes]
    if weights is not None:
        if len(weights) != len(block_sizes):
            raise ValueError(f"`weights` must be {len(block_sizes)}, one a block size, but are {list(weights)!r}.")
        return [float(weight) for weight in weights]
    by_size = dict(zip(trained, trained_weights or [1.0] * len(trained), strict=True))
    return [float(by_size.get(size, 0.0)) for size in block_sizes]


def _log_sum_exp_figures(
    nll: torch.Tensor, gamma: torch.Tensor, total: int
) -> tuple[LikelihoodFigure, LikelihoodFigure | None, LikelihoodFigure | None]:
    """
    Eq. 20 of `[N, S, K]`; the same without its bias of first order in 1 / K; and an upper bound of it.

    The log-sum-exp is concave in the bounds: their errors lower it, by some c / K on average. By either half of the
    draws it is lower by twice as much, so that twice the figure of all draws less the mean of the halves' is without.

    It is the least, over distributions q of the block sizes, of sum_i q_i NLL_i + KL(q from gamma): no q gives less
    than the truth. The best q by one half of the draws, with the bounds by the other, errs upwards on average.
    """
    num_draws, log_gamma = nll.shape[-1], gamma.log()

    def reduce(mean: torch.Tensor) -> torch.Tensor:
        return -torch.logsumexp(log_gamma - mean, dim=-1)

    def choose(by: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        log_q = (log_gamma - by).log_softmax(-1)
        return (log_q.exp() * (mean + log_q - log_gamma)).sum(-1)

    whole = reduce(nll.mean(-1))
    if num_draws < 2:
        return _make_figure(whole.sum().item() / total, None), None, None
    first, second = nll[..., : num_draws // 2].mean(-1), nll[..., num_draws // 2 :].mean(-1)
    share = (num_draws // 2) / num_draws
    halves = reduce(first), reduce(second)
    crossed = choose(second, first), choose(first, second)
    error, upper_error = (_standard_error(*pair, num_draws) / total for pair in (halves, crossed))
    corrected = 2 * whole - share * halves[0] - (1 - share) * halves[1]
    upper = share * crossed[0] + (1 - share) * crossed[1]
    return (
        _make_figure(whole.sum().item() / total, error),
        _make_figure(corrected.sum().item() / total, error),
        _make_figure(upper.sum().item() / total, upper_error),
    )


def _figure(nll: torch.Tensor, total: int) -> LikelihoodFigure:
    """From `[N, K]`: Eq. 19, 12, 13."""
    num_draws = nll.shape[-1]
    mean = nll.mean(-1).sum().item() / total
    if num_draws < 2:
        return _make_figure(mean, None)
    first = num_draws // 2
    return _make_figure(mean, _standard_error(nll[:, :first].mean(-1), nll[:, first:].mean(-1), num_draws) / total)


def _standard_error(first: torch.Tensor, second: torch.Tensor, num_draws: int) -> float:
    """
    Of the sum over sequences of the mean over draws, from its values by the first K // 2 draws and by the others,
    `[N]`. With variances v / K_1 and v / K_2 of the halves their squared difference is v K / (K_1 K_2) on average, and
    v / K is what is asked for.
    """
    in_first = num_draws // 2
    factor = in_first * (num_draws - in_first) / num_draws**2
    return math.sqrt(factor * (first - second).square().sum().item())


def _make_figure(nll: float, error: float | None) -> LikelihoodFigure:
    perplexity = math.inf if nll > 700 else math.exp(nll)
    return LikelihoodFigure(nll, perplexity, error, None if error is None else perplexity * error)


__all__ = ["LikelihoodFigure", "LikelihoodResult", "likelihood_metrics", "mixture_weights"]
