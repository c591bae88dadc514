"""A model in a word, and likelihood figures as tables."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..tables import Table, error_bar


if TYPE_CHECKING:
    from ..evaluation import LengthResult
    from ..modeling.configuration_blockgen import BlockGenConfig


# Names in the metrics, and in the table.
_MIXTURE = {
    "jensen": "mixture, Jensen (Eq. 7)",
    "log_sum_exp": "mixture, log-sum-exp (Eq. 20)",
    "log_sum_exp_corrected": "mixture, the same, corrected",
    "log_sum_exp_upper": "mixture, the same, from above",
}
_BLOCK = "block_size_"


def noise_name(config: "BlockGenConfig") -> str:
    """The diffusion of a model, or that it has none."""
    return "autoregressive" if config.next_token_prediction else config.diffusion_type


def likelihood_table(metrics: Mapping[str, Any]) -> Table:
    """
    Args:
        metrics: of `LikelihoodResult.metrics()`: `nll_block_size_16`, `perplexity_jensen` ...
    """
    names = [name.removeprefix("nll_") for name in metrics if name.startswith("nll_") and "standard_error" not in name]
    names.sort(key=_place)  # a trainer's metrics come sorted by letters: 1, 16, 2
    rows = []
    for name in names:
        if name.startswith(_BLOCK):
            label = f"block size {name.removeprefix(_BLOCK)}"
        else:
            label = _MIXTURE.get(name, name.replace("_", " "))
        nll, perplexity = metrics[f"nll_{name}"], metrics[f"perplexity_{name}"]
        error = metrics.get(f"perplexity_standard_error_{name}")
        rows.append((label, f"{nll:.4f}", f"{perplexity:.2f}", error_bar(error, perplexity)))
    return Table(("", "nll", "perplexity", ""), rows)


def length_tables(result: "LengthResult") -> tuple[Table, Table]:
    """The nll of tokens by their position, and the perplexity of texts by their length, of every block size."""
    sizes = [f"block size {size}" for size in result.lengths[0].at_positions]
    by_position, up_to_end = [], []
    for part in result.lengths:
        nlls = [f"{figure.nll:.4f}" for figure in part.at_positions.values()]
        perplexities = [f"{figure.perplexity:.2f}" for figure in part.up_to_end.values()]
        by_position.append((f"{part.start:,} to {part.end - 1:,}", f"{part.num_tokens:,}", *nlls))
        up_to_end.append((f"{part.end:,}", *perplexities))
    return Table(("positions", "tokens", *sizes), by_position), Table(("length", *sizes), up_to_end)


def _place(name: str) -> tuple[int, int]:
    """Block sizes in the order of their numbers, then the others as they came."""
    return (0, int(name.removeprefix(_BLOCK))) if name.startswith(_BLOCK) else (1, 0)
