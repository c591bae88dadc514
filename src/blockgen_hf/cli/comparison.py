"""`blockgen-hf generate --compare`: one prompt, every decoding."""

import textwrap
from typing import Any

from ..default_decoding import CORRECTOR_PERIOD
from ..modeling.configuration_blockgen import BlockGenConfig
from ..tables import aligned, terminal_width
from .sampling import Generation, Sampler, describe


# The decodings at equal budgets of function evaluations a block; those of the autoregressive law have none. ARPC
# verifies as often as it does without `--compare`.
_COMPARED: tuple[dict[str, Any], ...] = (
    {"decoding": "ar"},
    {"decoding": "speculative"},
    {"decoding": "block_diffusion", "nfe_per_block": 16},
    {"decoding": "block_diffusion", "nfe_per_block": 8},
    {"decoding": "block_diffusion", "nfe_per_block": 4},
    {"decoding": "arpc", "nfe_per_block": 16, "corrector_period": CORRECTOR_PERIOD},
    {"decoding": "arpc", "nfe_per_block": 8, "corrector_period": CORRECTOR_PERIOD},
    {"decoding": "draft_revise"},
)
_WIDTH = 100
_COLUMNS = ("decoding", "settings", "function evaluations", "tokens / forward", "tokens / second")
_DECODING, _FIGURES = 15, (11, 9, 9)  # widths


def compare(sampler: Sampler, settings: dict[str, Any], quiet: bool) -> list[Generation]:
    """A generation for each decoding that the model knows, all with the same seed; prints a table unless quiet."""
    config = sampler.model.config
    known = [row for row in _COMPARED if _knows(config, row["decoding"])]
    compared = [{**row, **settings} for row in known]
    sampler.generate({**compared[-1], "max_new_tokens": 1})  # the first call pays for what is set up once
    generations = []
    for row in compared:
        generations.append(sampler.generate(row))
        if quiet:
            continue
        if len(generations) == 1:
            _print_head(sampler.prompt, sampler.seed)
        _print_row(generations[-1])
    return generations


def _knows(config: BlockGenConfig, decoding: str) -> bool:
    if config.next_token_prediction:
        return decoding == "ar"
    return decoding == "block_diffusion" or config.clean_attention == "causal" or config.block_sizes[0] == 1


def _widths() -> tuple[int, ...]:
    """Those of the columns: the settings have what the others leave."""
    return (_DECODING, max(20, _width() - _DECODING - sum(_FIGURES) - 2 * len(_FIGURES) - 2), *_FIGURES)


def _width() -> int:
    return min(_WIDTH, terminal_width())


def _print_head(prompt: str, seed: int) -> None:
    shown = textwrap.shorten(prompt, 2 * _WIDTH // 3, placeholder=" ...")
    print(f"Prompt: {shown}\nSeed: {seed}\n" if prompt else f"No prompt\nSeed: {seed}\n")
    print("\n".join(aligned(_COLUMNS, _widths(), 2, bottom=True)))


def _print_row(generation: Generation) -> None:
    cells = (
        generation.settings["decoding"],
        describe(generation.settings),
        str(generation.num_function_evaluations),
        f"{generation.tokens_per_forward:.2f}",
        f"{generation.tokens_per_second:.1f}",
    )
    print("-" * _width())
    print("\n".join(aligned(cells, _widths(), 2)))
    for sample in generation.samples:
        text = textwrap.wrap(" ".join(sample.completion.split()), _width() - 2)
        print(textwrap.indent("\n".join(text), "  "), flush=True)
