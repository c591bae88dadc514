"""Figures of drawn samples as Markdown tables, laid out as tables 2, 8 and 9 of the BlockGen paper, and as a plot."""

import textwrap
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import chain, count
from math import ceil, floor, log
from typing import Any

from ..tables import MISSING, Table, error_bar, number, terminal_width
from .samples import SampleResults


Figures = dict[str, Any]
Part = str | Table

_NO_JUDGE = "none"
_MOST_TICKS = 9


def markdown(results: SampleResults) -> str:
    """The page of an evaluation: what was done, a row a cell, AR seeds side by side, what was skipped."""
    return "\n\n".join(part if isinstance(part, str) else part.markdown() for part in _parts(results)) + "\n"


def plain(results: SampleResults, width: int | None = None) -> str:
    """The same for a terminal, of so many columns (default: those it has)."""
    width = terminal_width() if width is None else width
    parts = []
    for part in _parts(results):
        if isinstance(part, Table):
            parts.append(part.text(width))
        else:
            lines = part.replace("`", "").lstrip("# ").splitlines()
            parts.append("\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in lines))
    return "\n\n".join(parts) + "\n"


def _parts(results: SampleResults) -> list[Part]:
    settings = results.settings
    parts: list[Part] = ["# Samples", _what(settings), _table(results.cells, settings["judge"], settings["device"])]
    seeds = sorted({figures["cell"]["ar_seed_tokens"] for figures in results.cells if figures["cell"]["num_blocks"]})
    if len(seeds) > 1:
        parts += ["## By AR seed tokens k", _by_seed(results.cells, seeds, settings)]
    if results.skipped:
        reasons: dict[str, list[str]] = {}
        for cell in results.skipped:
            reasons.setdefault(cell.reason, []).append(f"`{cell.name}`")
        lines = [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        parts += ["## Skipped", "\n".join(lines)]
    return parts


def judge_label(judge: str | None) -> str:
    """For the head of a column."""
    return f"gen. PPL ({judge or _NO_JUDGE})"


def _what(settings: dict[str, Any]) -> str:
    prompts = f"behind {settings['num_prompts']} prompts" if settings["num_prompts"] else "without prompt"
    lines = [
        f"{settings['model']} ({settings['diffusion_type']}, {settings['dtype']}, weights {settings['weights']}): "
        f"{settings['num_samples']} texts a row, of {settings['max_new_tokens']} tokens, {prompts}, seed "
        f"{settings['seed']}.",
        f"Tokens per second on {settings['device']}, threads: {settings['threads']}, processes: "
        f"{settings['processes']}, {settings['batch_size']} texts at once.",
    ]
    if settings["judge"] is not None:
        length = "" if settings["max_length"] is None else f", which read {settings['max_length']} tokens of a text"
        lines.append(
            f"Generative perplexity under {settings['judge']}{length}, {settings['start_token']!r} in front: compare "
            "it with scores under the same judge only. ± is a standard error over the texts."
        )
    lines.append(
        "NFE: function evaluations, AR passes counted; a block's budget, and what `generate` ran: passes that cannot "
        "change anything are left out. Entropy: unigrams of the model's tokens, nats (Eq. 11)."
    )
    return "\n".join(lines)


def _speed(device: str) -> tuple[str, str]:
    """Key and name of the throughput: other jobs on the machine disturb the seconds of a CPU less than the clock."""
    return ("tokens_per_cpu_second", "tokens/CPU s") if device == "cpu" else ("tokens_per_second", "tokens/s")


def _table(cells: Sequence[Figures], judge: str | None, device: str) -> Table:
    has = {
        "T": any(figures["cell"]["temperature"] != 1.0 for figures in cells),
        "top-p": any(figures["cell"]["top_p"] != 1.0 for figures in cells),
        "MAUVE": any("mauve" in figures["scores"] for figures in cells),
        "ppl": judge is not None,
    }
    names = ["decoding", "L'", "k"] + [name for name in ("T", "top-p") if has[name]]
    names += ["NFE a block"]
    num_keys = len(names)
    names += ["run", "NFE a token"] + ([judge_label(judge)] if has["ppl"] else [])
    names += ["entropy", "distinct-2", "rep-4"] + (["MAUVE"] if has["MAUVE"] else [])
    speeds = dict([_speed(device), ("tokens_per_second", "tokens/s")])
    names += speeds.values()
    rows = []
    for figures in cells:
        cell, scores = figures["cell"], figures["scores"]
        row = [f"`{cell['series']}`", number(cell["block_size"], "d"), _seed(cell)]
        row += [number(cell[key], "g") for name, key in (("T", "temperature"), ("top-p", "top_p")) if has[name]]
        row += [number(cell["nfe"], "d"), number(figures["evaluations_per_block"], ".1f")]
        row += [number(figures["evaluations_per_token"], ".2f")]
        row += [_with_error(scores["perplexity"], scores["perplexity_standard_error"], 1)] if has["ppl"] else []
        row += [_with_error(scores["entropy"], scores["entropy_standard_error"], 2)]
        row += [number(scores["distinct_2"], ".2f"), number(scores["rep_4"], ".3f")]
        row += [number(scores["mauve"], ".3f")] if has["MAUVE"] else []
        rows.append([*row, *(f"{figures[key]:.0f}" for key in speeds)])
    return Table(names, rows, num_keys=num_keys)


def _by_seed(cells: Sequence[Figures], seeds: Sequence[int], settings: dict[str, Any]) -> Table:
    """As table 2: perplexity with entropy behind it and throughput, for each number of AR seed tokens."""
    judge, (speed, speed_name) = settings["judge"], _speed(settings["device"])
    quality = "entropy" if judge is None else f"{judge_label(judge)} (entropy)"
    names = ["decoding", "L'", "NFE a block"]
    names += [name for seed in seeds for name in (f"k = {seed}: {quality}", speed_name)]
    found: dict[tuple[Any, ...], dict[int, Figures]] = {}
    for figures in cells:
        cell = figures["cell"]
        if cell["num_blocks"]:
            series = cell["series"] + "".join(
                f" {short}={cell[key]:g}" for short, key in (("T", "temperature"), ("p", "top_p")) if cell[key] != 1.0
            )
            found.setdefault((series, cell["block_size"], cell["nfe"]), {})[cell["ar_seed_tokens"]] = figures
    rows = []
    order = list(dict.fromkeys(series for series, *_ in found))
    for (series, block_size, nfe), by_seed in sorted(
        found.items(), key=lambda item: (order.index(item[0][0]), item[0][1], item[0][2] or 0)
    ):
        row = [f"`{series}`", str(block_size), number(nfe, "d")]
        for seed in seeds:
            if seed in by_seed:
                scores = by_seed[seed]["scores"]
                entropy = number(scores["entropy"], ".2f")
                row.append(entropy if judge is None else f"{scores['perplexity']:.1f} ({entropy})")
                row.append(f"{by_seed[seed][speed]:.0f}")
            else:
                row += [MISSING, MISSING]
        rows.append(row)
    return Table(names, rows, num_keys=3)


def _seed(cell: dict[str, Any]) -> str:
    return number(cell["ar_seed_tokens"] if cell["num_blocks"] else None, "d")


def _with_error(value: float, error: float | None, digits: int) -> str:
    layout = f".{digits}f"
    return f"{number(value, layout)} {error_bar(error, value, layout)}".rstrip()


def plot(results: SampleResults) -> bytes:
    """
    An SVG image: generative perplexity, and entropy below it, against function evaluations a token and against tokens
    per second (of the CPU, on a CPU); a line for cells that differ in their budget only.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    judge = results.settings["judge"]
    measures = [("entropy", "unigram entropy, nats")]
    if judge is not None:
        measures.insert(0, ("perplexity", "generative perplexity (log scale)"))
    speed, speed_name = _speed(results.settings["device"])
    axes_of_x = [
        ("evaluations_per_token", "function evaluations a token (log scale)"),
        (speed, f"{speed_name} (log scale)"),
    ]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "blockgen-hf", "font.size": 9}):
        figure = Figure(figsize=(8.5, 1.2 + 2.6 * len(measures)), layout="constrained")
        panels: Any = figure.subplots(len(measures), 2, sharey="row", sharex="col", squeeze=False)
        for row, (measure, label) in zip(panels, measures, strict=True):
            row[0].set_ylabel(label)
            for panel, (x, _) in zip(row, axes_of_x, strict=True):
                _draw(panel, results.cells, x, measure)
            if measure == "perplexity":
                log_axis(row[0].yaxis)
        for panel, (x, label) in zip(panels[-1], axes_of_x, strict=True):
            panel.set_xlabel(label)
            log_axis(panel.xaxis, doubling=x == "evaluations_per_token")
        bars = "bars: ± a standard error over the texts"
        figure.suptitle(bars if judge is None else f"judge: {judge}; {bars}", fontsize="medium")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        image = BytesIO()
        figure.savefig(image, format="svg", metadata={"Date": None})
    return image.getvalue()


def log_axis(axis: Any, *, doubling: bool = False) -> None:
    """
    Makes an axis logarithmic, with plain numbers at its ticks: powers of 2 if `doubling`; else, or where these are too
    many, 1, 2 and 5 of each power of 10; or powers of 10 alone. A range with fewer than two ticks is widened.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    is_x = axis.axis_name == "x"
    (axis.axes.set_xscale if is_x else axis.axes.set_yscale)("log")
    low, high = axis.axes.get_xlim() if is_x else axis.axes.get_ylim()
    ticks = next(ticks for ticks in _tick_choices(low, high, doubling) if len(ticks) <= _MOST_TICKS)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
    (axis.axes.set_xlim if is_x else axis.axes.set_ylim)(min(low, ticks[0]), max(high, ticks[-1]))


def _tick_choices(low: float, high: float, doubling: bool) -> Iterator[list[float]]:
    """From fine to coarse; each from the last tick below the range to the first above it if it has less than two."""
    fine = [(2, (1,))] if doubling else []
    for base, factors in chain([*fine, (10, (1, 2, 5))], ((10**step, (1,)) for step in count(1))):
        first, last = floor(log(low, base)) - 1, ceil(log(high, base)) + 1
        ticks = [factor * float(base) ** power for power in range(first, last + 1) for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) < 2:
            inside = [max(tick for tick in ticks if tick <= low), *inside, min(tick for tick in ticks if tick >= high)]
        yield inside


def _draw(panel: Any, cells: Sequence[Figures], x: str, measure: str) -> None:
    for color, (label, members) in enumerate(_series(cells).items()):
        scores = [figures["scores"] for figures in members]
        panel.errorbar(
            [figures[x] for figures in members],
            [score[measure] for score in scores],
            yerr=[score.get(f"{measure}_standard_error") or 0.0 for score in scores],
            fmt="o-" if len(members) > 1 else "*",
            label=label,
            color=f"C{color % 10}",
            markersize=4 if len(members) > 1 else 10,
            capsize=2,
        )
    panel.grid(visible=True, alpha=0.3)


def _series(cells: Sequence[Figures]) -> dict[str, list[Figures]]:
    """Cells that differ in their budget only, by a label that tells them from the others."""
    series: dict[str, list[Figures]] = {}
    for figures in cells:
        cell = figures["cell"]
        words = [cell["series"]]
        words += [f"L'={cell['block_size']}"] if cell["block_size"] is not None else []
        words += [f"k={cell['ar_seed_tokens']}"] if cell["num_blocks"] else []
        words += [
            f"{short}={cell[key]:g}" for short, key in (("T", "temperature"), ("p", "top_p")) if cell[key] != 1.0
        ]
        series.setdefault(" ".join(words), []).append(figures)
    return series


__all__ = ["judge_label", "log_axis", "markdown", "plain", "plot"]
