"""What benchmarks share that train models and draw what they measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from io import BytesIO
from pathlib import Path
from typing import Any

from blockgen_hf.whole_files import write_whole


def option(default: Any, text: str) -> Any:
    """A field of settings, as `HfArgumentParser` makes an option of it."""
    return field(default=default, metadata={"help": text})


def rounded(value: Any) -> Any:
    """To as many digits as anyone can use, with keys as JSON has them."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


@contextmanager
def svg_figure(file: Path, width: float, height: float) -> Iterator[Any]:
    """A figure to draw in, in inches; then it is written, the same bytes for the same figure."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "blockgen-hf", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        image = BytesIO()
        figure.savefig(image, format="svg", metadata={"Date": None})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, image.getvalue())
