"""`blockgen-hf generate --compare`: one prompt, every decoding."""

import shutil
import textwrap
from typing import Any

from .sampling import Generation, Sampler, describe


# The decodings at equal budgets of function evaluations a block; start 0 and period 3 are what tables 10 to 12 of the
# paper find best for ARPC at a budget of 8.
_COMPARED: tuple[dict[str, Any], ...] = (
    {"decoding": "ar"},
    {"decoding": "block_diffusion", "nfe_per_block": 16},
    {"decoding": "block_diffusion", "nfe_per_block": 8},
    {"decoding": "block_diffusion", "nfe_per_block": 4},
    {"decoding": "arpc", "nfe_per_block": 16, "corrector_start": 0, "corrector_period": 3},
    {"decoding": "arpc", "nfe_per_block": 8, "corrector_start": 0, "corrector_period": 3},
)
_WIDTH = 100
_ROW = "{:<15}  {:<{}}  {:>11}  {:>9}  {:>9}"
_OTHER_COLUMNS = 15 + 11 + 9 + 9 + 4 * 2


def compare(sampler: Sampler, settings: dict[str, Any], quiet: bool) -> list[Generation]:
    """A generation for each decoding that the model knows, all with the same seed; prints a table unless quiet."""
    config = sampler.model.config
    knows_ar = config.clean_attention == "causal" or config.block_sizes[0] == 1
    compared = [{**row, **settings} for row in _COMPARED if knows_ar or row["decoding"] == "block_diffusion"]
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


def _width() -> int:
    return min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)


def _settings_width() -> int:
    return max(20, _width() - _OTHER_COLUMNS)


def _print_columns(decoding: str, settings: str, *figures: object) -> None:
    print(_ROW.format(decoding, settings, _settings_width(), *figures).rstrip())


def _print_head(prompt: str, seed: int) -> None:
    shown = textwrap.shorten(prompt, 2 * _WIDTH // 3, placeholder=" ...")
    print(f"Prompt: {shown}\nSeed: {seed}\n" if prompt else f"No prompt\nSeed: {seed}\n")
    _print_columns("", "", "function", "tokens /", "tokens /")
    _print_columns("decoding", "settings", "evaluations", "forward", "second")


def _print_row(generation: Generation) -> None:
    first, *others = textwrap.wrap(describe(generation.settings), _settings_width()) or [""]
    per_forward, per_second = f"{generation.tokens_per_forward:.2f}", f"{generation.tokens_per_second:.1f}"
    evaluations = generation.num_function_evaluations
    width = _width()
    print("-" * width)
    _print_columns(generation.settings["decoding"], first, evaluations, per_forward, per_second)
    for line in others:
        _print_columns("", line, "", "", "")
    for sample in generation.samples:
        text = textwrap.wrap(" ".join(sample.completion.split()), width - 2)
        print(textwrap.indent("\n".join(text), "  "), flush=True)
