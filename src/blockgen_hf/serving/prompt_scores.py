"""Log-probabilities of a prompt, for those who want it echoed with them."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from ..modeling.releases_blockgen import named_cache


# Tokens whose logits are in memory at the same time.
_CHUNK = 256


@torch.inference_mode()
def score_prompt(
    model: PreTrainedModel, token_ids: Sequence[int], num_top: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """
    log p(token | tokens before it) by the autoregressive model, of all tokens but the first, and the `num_top` most
    likely tokens at each place.
    """
    tokens = torch.tensor([token_ids], device=model.device)
    cache = DynamicCache(config=model.config)
    found: list[tuple[float, list[tuple[int, float]]]] = []
    for start in range(0, len(token_ids) - 1, _CHUNK):
        read = tokens[:, start : min(start + _CHUNK, len(token_ids) - 1)]
        logits = model(read, use_cache=True, **named_cache(cache)).logits[0].float()
        if model.config.diffusion_type == "masked" and not model.config.next_token_prediction:
            logits[:, model.config.mask_token_id] = -torch.inf  # which is never text
        log_probs = logits.log_softmax(-1)
        chosen = log_probs.gather(-1, tokens[0, start + 1 : start + 1 + read.shape[1], None])[:, 0]
        top = log_probs.topk(num_top)
        found += [
            (logprob, list(zip(ids, values, strict=True)))
            for logprob, ids, values in zip(chosen.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
        ]
    return found
