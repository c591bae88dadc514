"""Log-probabilities of prompts that are echoed."""

import pytest
import torch
from causal_models import adopted, original, texts
from tiny import MASK, tiny_model
from transformers import DynamicCache, PreTrainedModel

from blockgen_hf.serving.logprobs import score_prompt


@pytest.mark.parametrize("kind", ["masked", "uniform", "adapted"])
@torch.no_grad()
def test_a_prompt_is_scored_by_the_autoregressive_model(kind: str) -> None:
    """The mask token of an adapted model is no row of its output layer, and is not looked for there."""
    causal = original("tied_llama")
    models: dict[str, PreTrainedModel] = {
        "masked": tiny_model(),
        "uniform": tiny_model("uniform"),
        "adapted": adopted(causal, diffusion_type="masked"),
    }
    model = models[kind]
    prompt = texts(1, 9)[0].remainder(MASK).tolist()
    logits = (causal if kind == "adapted" else model)(torch.tensor([prompt])).logits[0].double()
    if kind == "masked":
        logits[:, MASK] = -torch.inf
    expected = logits.log_softmax(-1)
    found = score_prompt(model, prompt, 2, DynamicCache(config=model.config), chunk=4)
    assert [score.token_id for score in found] == prompt[1:]
    for place, score in enumerate(found):
        assert score.logprob == pytest.approx(expected[place, prompt[place + 1]].item(), abs=1e-4)
        assert [token for token, _ in score.top] == expected[place].topk(2).indices.tolist()
