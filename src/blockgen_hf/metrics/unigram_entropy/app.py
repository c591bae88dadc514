"""A Gradio app of this metric: texts in, scores out."""

from pathlib import Path
from typing import Any

import evaluate
import gradio as gr
from evaluate.utils import parse_readme


HERE = Path(__file__).parent
metric = evaluate.load(str(HERE / "unigram_entropy.py"))


def score(texts: str, tokenizer: str) -> dict[str, Any]:
    """Scores of texts, one a line."""
    try:
        return metric.compute(predictions=texts.splitlines(), tokenizer=tokenizer)
    except (OSError, ValueError) as error:
        raise gr.Error(str(error)) from error


interface = gr.Interface(
    score,
    inputs=[
        gr.Textbox(lines=8, label="Texts, one a line"),
        gr.Textbox("openai-community/gpt2", label="Tokenizer"),
    ],
    outputs=gr.JSON(),
    title="Unigram Entropy",
    description=metric.description,
    article=parse_readme(str(HERE / "README.md")),
)

if __name__ == "__main__":
    interface.launch()
