"""A Gradio app: a BlockGen model, its decodings, and what they cost."""

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


MODEL = "MODEL_ID"

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=True).to(device).eval()

SIZES = sorted(model.config.block_sizes)
POSITIONS = model.config.max_position_embeddings
if SIZES == [1]:
    DECODINGS = ["ar"]
elif 1 in SIZES:
    DECODINGS = ["arpc", "block_diffusion", "speculative", "ar"]
else:
    DECODINGS = ["block_diffusion"]


def generate(
    prompt: str, decoding: str, block_size: int, steps: int, max_new_tokens: int, temperature: float, seed: int
) -> tuple[str, str]:
    """The text, and its cost in words."""
    token_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    room = POSITIONS - len(token_ids)
    if room < 1:
        raise gr.Error(f"The prompt has {len(token_ids)} tokens; the model takes {POSITIONS}, the answer included.")
    settings = {"decoding": decoding, "max_new_tokens": min(int(max_new_tokens), room)}
    if decoding != "ar":
        settings["block_size"] = int(block_size)
    if decoding in ("arpc", "block_diffusion"):
        settings["denoising_steps"] = int(steps)
    settings |= {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    set_seed(int(seed))
    input_ids = torch.tensor([token_ids], dtype=torch.long, device=device)
    try:
        outputs = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), return_dict_in_generate=True, **settings
        )
    except ValueError as error:  # settings that the model does not take
        raise gr.Error(str(error)) from error
    text = tokenizer.decode(outputs.sequences[0], skip_special_tokens=True)
    evaluations, per_forward = outputs.num_function_evaluations[0].item(), outputs.tokens_per_forward[0].item()
    cost = f"{evaluations} function evaluations, {per_forward:.2f} tokens per forward"
    if decoding == "speculative":
        drafted, accepted = outputs.num_drafted_tokens[0].item(), outputs.num_accepted_tokens[0].item()
        cost += f", {accepted} of {drafted} drafted tokens accepted"
    return text, cost


demo = gr.Interface(
    generate,
    inputs=[
        gr.Textbox("Once upon a time", label="Prompt"),
        gr.Radio(DECODINGS, value=DECODINGS[0], label="Decoding"),
        gr.Dropdown(SIZES, value=SIZES[-1], label="Block size"),
        gr.Slider(
            1,
            SIZES[-1] if SIZES[-1] > 1 else 2,
            value=max(1, SIZES[-1] // 2),
            step=1,
            label="Denoising steps a block (arpc, block_diffusion)",
        ),
        gr.Slider(1, POSITIONS, value=min(128, POSITIONS // 2), step=1, label="New tokens"),
        gr.Slider(0, 2, value=0.8, step=0.05, label="Temperature (0: the likeliest token)"),
        gr.Number(0, precision=0, minimum=0, label="Seed"),
    ],
    outputs=[gr.Textbox(label="Text"), gr.Textbox(label="Cost")],
    title="MODEL_ID",
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch()
