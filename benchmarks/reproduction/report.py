"""Tables, verdicts and figures of a claim, over seeds."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockgen_hf.evaluation.samples_tables import log_axis
from blockgen_hf.tables import Table, error_bar

from ..experiments import svg_figure
from .claims import HIGHER_IS_BETTER, Claim, Ordering, Panel
from .runs import Bench, Cell


_PANEL_SIZE = (4.4, 3.4)


def cells(claim: Claim) -> list[Cell]:
    """All that a claim needs, each once."""
    of_panels = [cell for panel in claim.panels for series in panel.series for cell in series.points.values()]
    of_orderings = [cell for ordering in claim.orderings for cell in (ordering.better, ordering.worse)]
    return list(dict.fromkeys([*of_panels, *of_orderings]))


def known(claim: Claim, bench: Bench) -> Claim:
    """Of a claim, what all seeds have been measured of."""
    panels = []
    for panel in claim.panels:
        points = [{name: cell for name, cell in line.points.items() if bench.is_known(cell)} for line in panel.series]
        lines = [replace(line, points=kept) for line, kept in zip(panel.series, points, strict=True) if kept]
        if len(lines) >= min(2, len(panel.series)):  # a line alone compares nothing
            panels.append(replace(panel, series=lines))
    orderings = [one for one in claim.orderings if bench.is_known(one.better) and bench.is_known(one.worse)]
    return replace(claim, panels=panels, orderings=orderings)


def markdown(claim: Claim, bench: Bench) -> str:
    """The tables of the panels, and of the orderings with what became of them."""
    tables = [table.markdown() for table in (*_tables(claim, bench), _verdicts(claim, bench))]
    return "\n\n".join(tables)


def _tables(claim: Claim, bench: Bench) -> Iterator[Table]:
    for panel in claim.panels:
        heading = f"{panel.title}: {panel.y}"
        if panel.cost:
            rows = [
                [f"{series.label}: {name}", _mean(_costs(bench, cell)), _mean(bench.values(cell))]
                for series in panel.series
                for name, cell in series.points.items()
            ]
            yield Table([heading, panel.x, panel.y], rows)
        else:
            names = list(dict.fromkeys(name for series in panel.series for name in series.points))
            rows = [
                [series.label, *(_mean(bench.values(series.points[n])) if n in series.points else "" for n in names)]
                for series in panel.series
            ]
            yield Table([f"{heading}, by {panel.x}", *names], rows)


def _verdicts(claim: Claim, bench: Bench) -> Table:
    rows = [
        [
            ordering.statement,
            ordering.source,
            _mean(bench.values(ordering.better)),
            _mean(bench.values(ordering.worse)),
            _verdict(ordering, bench),
        ]
        for ordering in claim.orderings
    ]
    return Table(["claim", "source", "first", "second", "here"], rows, num_labels=2)


def _verdict(ordering: Ordering, bench: Bench) -> str:
    sign = -1 if ordering.better.metric in HIGHER_IS_BETTER else 1
    pairs = zip(bench.values(ordering.better), bench.values(ordering.worse), strict=True)
    agreeing = sum(sign * better < sign * worse for better, worse in pairs)
    seeds = bench.settings.seeds
    word = {seeds: "holds", 0: "does not hold"}.get(agreeing, "undecided")
    return f"{word} ({agreeing} of {seeds} seeds)"


def _costs(bench: Bench, cell: Cell) -> list[float]:
    return [bench.record(cell, seed)["evaluations_per_token"] for seed in range(bench.settings.seeds)]


def _mean(values: Sequence[float]) -> str:
    """± the standard deviation over seeds."""
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    layouts = (".3g", ".2g") if mean < 1 else (".2f", ".2f") if mean < 100 else (".0f", ".0f")
    return f"{mean:{layouts[0]}} {error_bar(spread, mean, layouts[1])}".rstrip()


def draw(claim: Claim, bench: Bench, file: Path) -> None:
    """An SVG image with the panels side by side; bars are ± the standard deviation over seeds."""
    columns = min(len(claim.panels), 3)
    lines = -(-len(claim.panels) // columns)
    with svg_figure(file, _PANEL_SIZE[0] * columns, _PANEL_SIZE[1] * lines) as figure:
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axis in axes[len(claim.panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes, claim.panels, strict=False):
            _draw_panel(axis, panel, bench)


def _draw_panel(axis: Any, panel: Panel, bench: Bench) -> None:
    names = list(dict.fromkeys(name for series in panel.series for name in series.points))
    for series in panel.series:
        found = [bench.values(cell) for cell in series.points.values()]
        places: list[float] = [names.index(name) for name in series.points]
        if panel.cost:
            places = [statistics.fmean(_costs(bench, cell)) for cell in series.points.values()]
        axis.errorbar(
            places,
            [statistics.fmean(values) for values in found],
            yerr=[statistics.stdev(values) if len(values) > 1 else 0.0 for values in found],
            fmt="o-" if len(found) > 1 else "D",
            markersize=4,
            capsize=2,
            label=series.label,
        )
    if not panel.cost:
        axis.set_xticks(range(len(names)), names)
    if "perplexity" in panel.y or panel.y == "variance":
        log_axis(axis.yaxis)
    axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axis.grid(visible=True, alpha=0.3)
    if len(panel.series) > 1:
        axis.legend(fontsize="small", frameon=False)
