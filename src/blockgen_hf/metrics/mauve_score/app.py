"""A Gradio app of this metric: texts in, scores out."""

from pathlib import Path
from typing import Any

import evaluate
import gradio as gr
from evaluate.utils import parse_readme


HERE = Path(__file__).parent
metric = evaluate.load(str(HERE / "mauve_score.py"))


def score(predictions: str, references: str, featurizer: str) -> dict[str, Any]:
    """Scores of texts, one a line."""
    try:
        return metric.compute(
            predictions=predictions.splitlines(), references=references.splitlines(), model_id=featurizer
        )
    except (OSError, ValueError) as error:
        raise gr.Error(str(error)) from error


interface = gr.Interface(
    score,
    inputs=[
        gr.Textbox(lines=8, label="Generated texts, one a line"),
        gr.Textbox(lines=8, label="As many references, one a line"),
        gr.Textbox("openai-community/gpt2", label="Featurizer"),
    ],
    outputs=gr.JSON(),
    title="MAUVE Score",
    description=metric.description,
    article=parse_readme(str(HERE / "README.md")),
)

if __name__ == "__main__":
    interface.launch()
