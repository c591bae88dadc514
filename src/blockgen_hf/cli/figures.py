"""A model in a word, and likelihood figures as a table."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
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


def likelihood_table(metrics: Mapping[str, Any]) -> list[str]:
    """
    Lines of a table.

    Args:
        metrics: of `LikelihoodResult.metrics()`: `nll_block_size_16`, `perplexity_jensen` ...
    """
    names = [name.removeprefix("nll_") for name in metrics if name.startswith("nll_") and "standard_error" not in name]
    rows = [("", "nll", "perplexity", "")]
    for name in names:
        if name.startswith(_BLOCK):
            label = f"block size {name.removeprefix(_BLOCK)}"
        else:
            label = _MIXTURE.get(name, name.replace("_", " "))
        error = metrics.get(f"perplexity_standard_error_{name}")
        bar = "" if not error else f"± {error:.2g}"
        rows.append((label, f"{metrics[f'nll_{name}']:.4f}", f"{metrics[f'perplexity_{name}']:.2f}", bar))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{label:<{widths[0]}}  {nll:>{widths[1]}}  {perplexity:>{widths[2]}}  {bar}".rstrip()
        for label, nll, perplexity, bar in rows
    ]
