"""A Gradio app of this metric: texts in, scores out."""

from pathlib import Path
from typing import Any

import evaluate
import gradio as gr
from evaluate.utils import parse_readme


HERE = Path(__file__).parent
metric = evaluate.load(str(HERE / "distinct_n.py"))


def score(texts: str) -> dict[str, Any]:
    """Scores of texts, one a line."""
    try:
        return metric.compute(predictions=texts.splitlines())
    except (OSError, ValueError) as error:
        raise gr.Error(str(error)) from error


interface = gr.Interface(
    score,
    inputs=[gr.Textbox(lines=8, label="Texts, one a line")],
    outputs=gr.JSON(),
    title="Distinct-n",
    description=metric.description,
    article=parse_readme(str(HERE / "README.md")),
)

if __name__ == "__main__":
    interface.launch()
