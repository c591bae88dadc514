"""Which samples to compare: decodings x block sizes x function evaluations x AR seed tokens x temperatures."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from ..generation.generation_configuration_blockgen import BlockGenGenerationConfig
from .throughput_contenders import Decoding


# The model's distribution as it is, whatever its own generation config says: what the paper samples from.
_NEUTRAL: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "stop_strings": None,
    "max_time": None,
    "num_return_sequences": 1,
}
# Decodings with a budget, and the settings that say it otherwise.
_BUDGETED = ("block_diffusion", "arpc")
_BUDGETS = ("denoising_steps", "nfe_per_block")


@dataclass(frozen=True)
class SampleCell:
    """
    A cell of the grid.

    Args:
        name (`str`): of its files.
        decoding (`str`): as `Decoding.parse` reads it, its budget included.
        series (`str`): the same without a budget of the grid, for cells that differ in it only.
        nfe (`int`, *optional*): function evaluations a block, AR passes counted: the grid's, or what the decoding's
            own settings come to. None where nothing says how many: AR, speculation and first hitting.
        block_size (`int`, *optional*): None for AR. In speculation it bounds the drafts.
        ar_seed_tokens (`int`): first tokens drawn autoregressively.
        temperature (`float`): of the draws.
        top_p (`float`): of the draws.
        settings (`dict`): of `generate`.
        max_evaluations (`int`): function evaluations that a text without prompt takes at most.
        num_blocks (`int`): blocks of a text; 0 for AR and speculation.
    """

    name: str
    decoding: str
    series: str
    nfe: int | None
    block_size: int | None
    ar_seed_tokens: int
    temperature: float
    top_p: float
    settings: dict[str, Any]
    max_evaluations: int
    num_blocks: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SkippedCell:
    """A cell that cannot be, and why."""

    name: str
    reason: str


def sample_cells(
    model: PreTrainedModel,
    decodings: Sequence[str],
    *,
    max_new_tokens: int,
    nfe: Sequence[int] = (4, 8, 16, 32, 64),
    block_sizes: Sequence[int] | None = None,
    ar_seed_tokens: Sequence[int] = (0,),
    temperatures: Sequence[float] = (1.0,),
    top_p: Sequence[float] = (1.0,),
) -> tuple[list[SampleCell], list[SkippedCell]]:
    """
    The cells of a grid, and those that are impossible for the model or the length of the texts.

    A setting that a decoding does not have adds no cells: `"ar"` is one cell per temperature and top-p, and
    `"block_diffusion:sampler=first_hitting"` has no number of evaluations, nor has `"speculative"`, whose text is that
    of `"ar"` with any number of AR seed tokens. Neither does a setting that it fixes:
    `"arpc:8"` has 8 evaluations per block whatever `nfe` is, and `"ar:temperature=0.7"` has that temperature.

    Args:
        model ([`BlockGenForDiffusionLM`]): the model, which decides what is possible.
        decodings (`Sequence[str]`): in the form of `Decoding.parse`. A number of function evaluations is
            `denoising_steps` with `"block_diffusion"`, `nfe_per_block` with `"arpc"`, whose AR passes count.
        max_new_tokens (`int`): length of the texts.
        nfe (`Sequence[int]`): function evaluations per block.
        block_sizes (`Sequence[int]`, *optional*): L'. Default: the largest that the model was trained for; for the
            drafts of `"draft_revise"`, that of `generate`.
        ar_seed_tokens (`Sequence[int]`): k.
        temperatures (`Sequence[float]`): of all draws, autoregressive and diffusion alike.
        top_p (`Sequence[float]`): of all draws.

    Raises:
        ValueError: an unknown decoding, an invalid number, or a grid without a possible cell.
    """
    sizes = [max(model.config.block_sizes)] if block_sizes is None else list(block_sizes)
    for name, values, smallest in (("nfe", nfe, 1), ("block_sizes", sizes, 1), ("ar_seed_tokens", ar_seed_tokens, 0)):
        if not values or any(not isinstance(value, int) or value < smallest for value in values):
            raise ValueError(f"`{name}` must be integers of at least {smallest}, but are {list(values)!r}.")
    without_size = ("ar", "draft_revise") if block_sizes is None else ("ar",)
    axes = {"block_size": sizes, "ar_seed_tokens": ar_seed_tokens, "temperature": temperatures, "top_p": top_p}
    cells: dict[str, SampleCell] = {}
    skipped: dict[str, SkippedCell] = {}
    for text in decodings:
        for decoding, series, budget, chosen in _settings_of(text, nfe, axes, without_size):
            name = _file_name(decoding, chosen)
            if name in cells or name in skipped:
                raise ValueError(f"`decodings` must differ, but two of {list(decodings)!r} are {name!r}.")
            settings = {**_NEUTRAL, **decoding.settings, **chosen}
            try:
                cells[name] = _cell(model, name, decoding, series, budget, settings, max_new_tokens)
            except ValueError as error:
                skipped[name] = SkippedCell(name, str(error))
    if not cells:
        reasons = "; ".join(f"{cell.name}: {cell.reason}" for cell in skipped.values())
        raise ValueError(f"`decodings` must have a cell that the model can run, but have none. {reasons}")
    return list(cells.values()), list(skipped.values())


def _settings_of(
    text: str, nfe: Sequence[int], axes: dict[str, Any], without_size: Collection[str]
) -> Iterator[tuple[Decoding, str, int | None, dict[str, Any]]]:
    """Decoding, series, budget and the values of the axes, for each cell of a decoding."""
    own = Decoding.parse(text).settings  # raises for what no cell could be
    kind, *words = text.split(":")
    given = {word.partition("=")[0] for word in words}
    has_budget = kind in _BUDGETED and own.get("sampler") != "first_hitting"
    budgets: Sequence[int | None] = nfe if has_budget and not any(name in own for name in _BUDGETS) else [None]
    without = {"block_size"} if kind in without_size else set()
    without |= {"ar_seed_tokens"} if kind in ("ar", "speculative") else set()
    without |= {"temperature", "top_p"} if own.get("do_sample") is False else set()
    names = [name for name in axes if name not in given | without]
    for budget, *values in product(budgets, *(axes[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        full = text if budget is None else ":".join([kind, str(budget), *words])
        yield Decoding.parse(full), text, budget, chosen


def _file_name(decoding: Decoding, chosen: dict[str, Any]) -> str:
    short = {"block_size": "L", "ar_seed_tokens": "k", "temperature": "T", "top_p": "p"}
    values = [
        f"{short[name]}{value:g}"
        for name, value in chosen.items()
        if name in ("block_size", "ar_seed_tokens") or value != 1.0
    ]
    return "-".join([re.sub(r"[^\w.=+]+", "-", decoding.name), *values])


def _evaluations_per_round(config: BlockGenGenerationConfig) -> int:
    """Of speculation, at most: a draft, and its verification, which gives a token at least."""
    if config.fused_drafts:
        return 1
    return config.drafting().function_evaluations(config.draft_steps) + 1


def _revising_evaluations(config: BlockGenGenerationConfig, max_new_tokens: int) -> int:
    """Of all revisions of a text, at most: the steps of every block, and a pass where the finished draft is scored."""
    scoring = int(config.revise_score in ("ar_surprisal", "posthoc"))
    return sum(
        scoring + -(-max_new_tokens // stage.block_size) * config.drafting().function_evaluations(stage.num_steps)
        for stage in config.revisions(longest=max_new_tokens)
        if stage.ratio > 0
    )


def _cell(
    model: PreTrainedModel,
    name: str,
    decoding: Decoding,
    series: str,
    budget: int | None,
    settings: dict[str, Any],
    max_new_tokens: int,
) -> SampleCell:
    """Raises a `ValueError` that says why there is no such cell."""
    config = Decoding(decoding.name, settings).in_effect(model)
    model._validate_generation_mode(GenerationMode.SAMPLE, config, {})
    BlockGenGenerationConfig(**settings)
    if config.decoding == "ar":
        block_size, nfe, seeded, num_blocks, evaluations = None, None, 0, 0, max_new_tokens
    elif config.decoding == "speculative":
        block_size, nfe, seeded, num_blocks = config.block_size, None, 0, 0
        evaluations = max_new_tokens * _evaluations_per_round(config)
    else:
        block_size, seeded = config.block_size, config.ar_seed_tokens
        left = max_new_tokens - seeded
        if block_size > left:
            raise ValueError(
                f"A block has {block_size} tokens, but of the text's {max_new_tokens} tokens {max(0, left)} are left "
                f"behind {seeded} AR seed tokens."
            )
        num_blocks = -(-left // block_size)
        drafting = config.drafting() if config.decoding == "draft_revise" else config
        per_block = drafting.function_evaluations(drafting.num_denoising_steps())
        if config.decoding == "draft_revise":
            nfe, evaluations = None, seeded + num_blocks * per_block + _revising_evaluations(config, max_new_tokens)
        elif config.sampler == "first_hitting":  # an evaluation a token, whatever the steps
            nfe, evaluations = None, max_new_tokens
        else:
            nfe, evaluations = budget or per_block, seeded + num_blocks * per_block
    return SampleCell(
        name=name,
        decoding=decoding.name,
        series=series,
        nfe=nfe,
        block_size=block_size,
        ar_seed_tokens=seeded,
        temperature=float(config.temperature),
        top_p=float(config.top_p),
        settings=settings,
        max_evaluations=evaluations,
        num_blocks=num_blocks,
    )


__all__ = ["SampleCell", "SkippedCell", "sample_cells"]
