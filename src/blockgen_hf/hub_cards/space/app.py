"""A Gradio app: watch a BlockGen model write, replay every step, and compare two decodings by their cost."""

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr
import torch
from replay import Run, live_html, live_style, replay_html
from transformers import AutoModelForCausalLM, AutoTokenizer
from writing import Fields, Writer, correctors, decodings


MODEL, TITLE = "MODEL_ID", "MODEL_TITLE"
NOTHING = "nothing"
QUEUE = 20  # visitors who wait; one is served at a time

# The replay says how high it is.
_HEAD = """<script>
addEventListener("message", (event) => {
  if (!event.data || !event.data.replayHeight) return;
  for (const frame of document.querySelectorAll("iframe.replay-frame"))
    if (frame.contentWindow === event.source) frame.style.height = `${event.data.replayHeight}px`;
});
</script>"""
_CSS = """
.replay-frame { width: 100%; height: 46rem; border: 0; display: block; }
.replay.live { max-width: none; padding: 0; background: none; }
.replay .problem { border: 2px solid var(--bad-line); border-radius: .5rem; padding: .75rem; background: var(--bad); }
"""


def show_live(runs: list[tuple[Run, dict[str, Any]]]) -> str:
    """What has been written of the runs so far."""
    boxes = "".join(live_html(run, frame) for run, frame in runs)
    return (
        f'<div class="replay live" aria-busy="true"><div class="runs{" two" * (len(runs) == 2)}">{boxes}</div></div>'
    )


def show_replay(runs: list[Run], title: str) -> str:
    """The viewer in a frame of its own, from which its script cannot reach this page."""
    said = " ".join(
        f"{run.name}: {run.frames[-1]['new_tokens']} new tokens, {run.frames[-1]['function_evaluations']} function "
        "evaluations."
        for run in runs
    )
    page = escape(replay_html(runs, title))
    return (
        f'<div class="replay live"><p role="status" class="silent">{escape(said)}</p></div>'
        f'<iframe class="replay-frame" title="Replay" sandbox="allow-scripts" srcdoc="{page}"></iframe>'
    )


def show_problem(error: Exception) -> str:
    return f'<div class="replay live"><p class="problem" role="alert">{escape(str(error))}</p></div>'


class App:
    """
    The page of a model.

    Args:
        model, tokenizer: as they are loaded.
        title (`str`): what stands above the page.
    """

    def __init__(self, model: Any, tokenizer: Any, title: str) -> None:
        self.writer = Writer(model, tokenizer)
        self.config = model.config
        self.title = title
        self.decodings = decodings(model.config)

    def generate(self, prompt: str, decoding: str, other: str, *fields: Any) -> Iterator[str]:
        """HTML for the page: the text while it is written, then the replay, or what is wrong."""
        wanted = [decoding] if other in (NOTHING, decoding) else [decoding, other]
        finished: list[tuple[Run, dict[str, Any]]] = []
        try:
            for name in wanted:
                run = None
                for run, frame in self.writer.write(prompt, Fields(name, *fields)):
                    yield show_live([*finished, (run, frame)])
                finished.append((run, frame))
        except ValueError as error:  # a field, or settings that the model does not take
            yield show_problem(error)
            return
        yield show_replay([run for run, _ in finished], prompt[:80] or "No prompt")

    def page(self) -> gr.Blocks:
        """The page, to be launched with [`App.launch`]."""
        sizes, positions = sorted(self.config.block_sizes), self.config.max_position_embeddings
        largest = max(2, sizes[-1])
        with gr.Blocks(title=self.title, analytics_enabled=False) as page:
            gr.Markdown(
                f"# {self.title}\nWatch a BlockGen model write, then replay every step. A function evaluation is one "
                "forward pass."
            )
            prompt = gr.Textbox("Once upon a time", label="Prompt", lines=2, max_lines=8)
            with gr.Row():
                decoding = gr.Radio(self.decodings, value=self.decodings[0], label="Decoding")
                other = gr.Dropdown(
                    [NOTHING, *self.decodings],
                    value=NOTHING,
                    label="Compare with",
                    info="aligned by function evaluations",
                )
            with gr.Row():
                start = gr.Button("Generate", variant="primary")
                stop = gr.Button("Stop")
            with gr.Accordion("Settings", open=False):
                with gr.Row():
                    block_size = gr.Dropdown(sizes, value=sizes[-1], label="Block size", allow_custom_value=False)
                    kind = gr.Radio(
                        [("denoising steps", "steps"), ("function evaluations", "evaluations")],
                        value="evaluations",
                        label="Budget per block, in (arpc, block_diffusion)",
                    )
                    budget = gr.Slider(1, largest, value=max(1, largest // 2), step=1, label="Budget per block")
                with gr.Row():
                    corrector = gr.Dropdown(
                        correctors(self.config), value="ar_surprisal", label="Corrector", info="of arpc"
                    )
                    seeded = gr.Slider(0, 16, value=0, step=1, label="AR seed tokens")
                    length = gr.Slider(1, positions, value=min(64, positions // 2), step=1, label="New tokens")
                with gr.Row():
                    temperature = gr.Slider(0, 2, value=0.8, step=0.05, label="Temperature", info="0: greedy")
                    seed = gr.Number(0, precision=0, label="Seed")
            output = gr.HTML(elem_id="output", label="Text")
            fields = [prompt, decoding, other, block_size, kind, budget, corrector, seeded, length, temperature, seed]
            running = gr.on(
                [start.click, prompt.submit],
                self.generate,
                fields,
                output,
                show_progress="minimal",  # of those who wait, the place in the queue
                api_name="generate",
            )
            stop.click(None, cancels=[running])
        page.queue(max_size=QUEUE, default_concurrency_limit=1)
        return page

    def launch(self, **options: Any) -> Any:
        """As `gr.Blocks.launch`."""
        return self.page().launch(css=live_style() + _CSS, head=_HEAD, footer_links=["gradio", "settings"], **options)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    App(
        AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=True).to(device).eval(),
        AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False),
        title=TITLE,
    ).launch()
