"""A Gradio app: watch a BlockGen model write, replay every step, and compare two decodings by their cost."""

import os
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr
from remote import ServerWriter
from replay import Run, live_html, live_style, replay_html
from writing import Fields, ModelFacts, ModelWriter, Writer


MODEL, TITLE = "MODEL_ID", "MODEL_TITLE"
NOTHING = "nothing"
QUEUE = 20  # visitors who wait

# More room on phones. The replay says how high it is.
_HEAD = """<style>@media (max-width: 30rem) { .gradio-container .main { padding: 1rem .75rem !important; } }</style>
<script>
addEventListener("message", (event) => {
  if (!event.data || !event.data.replayHeight) return;
  for (const frame of document.querySelectorAll("iframe.replay-frame"))
    if (frame.contentWindow === event.source) frame.style.height = `${event.data.replayHeight}px`;
});
</script>"""
_CSS = """
#output { min-height: 4rem; }  /* for the place in the queue */
#output .html-container { padding: 0; }
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


def settings_fields(facts: ModelFacts, first: Fields) -> list[Any]:
    """The fields behind the decoding, in the order of `Fields`, with their first values."""
    sizes = facts.block_sizes
    with gr.Row():
        block_size = gr.Dropdown(sizes, value=first.block_size, label="Block size")
        budget_kind = gr.Radio(
            [("denoising steps", "steps"), ("function evaluations", "evaluations")],
            value=first.budget_kind,
            label="Budget in",
            info="of arpc and block_diffusion",
        )
        largest = max(2, 2 * sizes[-1], first.budget)
        budget = gr.Slider(1, largest, value=first.budget, step=1, label="Budget per block")
    with gr.Row():
        corrector = gr.Dropdown(facts.correctors, value=first.corrector, label="Corrector", info="of arpc")
        most = max(16, first.ar_seed_tokens)
        seeded = gr.Slider(0, most, value=first.ar_seed_tokens, step=1, label="AR seed tokens")
        length = gr.Slider(1, facts.positions, value=first.max_new_tokens, step=1, label="New tokens")
    with gr.Row():
        temperature = gr.Slider(0, 2, value=first.temperature, step=0.05, label="Temperature", info="0: greedy")
        seed = gr.Number(first.seed, precision=0, label="Seed")
    return [block_size, budget_kind, budget, corrector, seeded, length, temperature, seed]


class App:
    """
    The page of a model.

    Args:
        writer (`Writer`): does the work.
        title (`str`): what stands above the page.
    """

    def __init__(self, writer: Writer, title: str) -> None:
        self.writer = writer
        self.title = title

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
        facts, first = self.writer.facts, Fields.first(self.writer.facts)
        with gr.Blocks(title=self.title, analytics_enabled=False) as page:
            gr.Markdown(
                f"# {self.title}\nWatch a BlockGen model write, then replay every step. A function evaluation is one "
                "forward pass."
            )
            prompt = gr.Textbox("Once upon a time", label="Prompt", lines=2, max_lines=8)
            with gr.Row():
                decoding = gr.Radio(facts.decodings, value=first.decoding, label="Decoding")
                other = gr.Dropdown(
                    [NOTHING, *facts.decodings],
                    value=NOTHING,
                    label="Compare with",
                    info="aligned by function evaluations",
                )
            with gr.Row():
                start = gr.Button("Generate", variant="primary")
                stop = gr.Button("Stop")
            with gr.Accordion("Settings", open=False):
                settings = settings_fields(facts, first)
            output = gr.HTML(elem_id="output", label="Text")
            running = gr.on(
                [start.click, prompt.submit],
                self.generate,
                [prompt, decoding, other, *settings],
                output,
                show_progress="minimal",  # of those who wait, the place in the queue
                api_name="generate",
            )
            # What was written stays, and is announced as finished.
            quiet = "() => document.querySelector('.replay.live')?.setAttribute('aria-busy', 'false')"
            stop.click(None, cancels=[running], js=quiet)
        page.queue(max_size=QUEUE, default_concurrency_limit=self.writer.at_once)
        return page

    def launch(self, **options: Any) -> Any:
        """As `gr.Blocks.launch`."""
        return self.page().launch(css=live_style() + _CSS, head=_HEAD, footer_links=["gradio", "settings"], **options)


def load_writer() -> Writer:
    """The model in this process; or where the variables of the Space name a server, that server."""
    server = os.environ.get("BLOCKGEN_HF_SERVER")
    if server:
        return ServerWriter(server, api_key=os.environ.get("BLOCKGEN_HF_API_KEY"))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=True).to(device).eval()
    return ModelWriter(model, AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False))


if __name__ == "__main__":
    App(load_writer(), title=TITLE).launch()
