"""Log-probabilities of tokens under the autoregressive model, of answers and of prompts that are echoed."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.releases_blockgen import named_cache
from .requests import TokenLogprob


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: int, config: BlockGenConfig
) -> tuple[TokenLogprob, ...]:
    """
    log p(token | tokens before it) from the autoregressive logits `[n, V]` of n tokens, and the `num_top` most likely
    tokens at each place.
    """
    logits = logits.double()
    if config.has_mask_row:  # which is never text
        logits[:, config.mask_token_id] = -torch.inf
    log_probs = logits.log_softmax(-1)
    values, ids = log_probs.topk(min(num_top, log_probs.shape[-1]), dim=-1)
    chosen = log_probs[torch.arange(len(token_ids)), torch.tensor(token_ids)].tolist()
    return tuple(
        TokenLogprob(token, logprob, tuple(zip(top_ids, top_values, strict=True)))
        for token, logprob, top_ids, top_values in zip(token_ids, chosen, ids.tolist(), values.tolist(), strict=True)
    )


def score_prompt(
    model: PreTrainedModel, token_ids: Sequence[int], num_top: int, cache: Cache, chunk: int
) -> list[TokenLogprob]:
    """
    All tokens of a prompt but the first, with [`token_logprobs`].

    Args:
        cache: an empty one; it has all tokens but the last then.
        chunk: tokens whose logits are in memory at the same time.
    """
    tokens = torch.tensor([token_ids], dtype=torch.long, device=model.device)
    found: list[TokenLogprob] = []
    for start in range(0, len(token_ids) - 1, chunk):
        read = tokens[:, start : min(start + chunk, len(token_ids) - 1)]
        logits = model(read, use_cache=True, **named_cache(cache)).logits[0]
        found += token_logprobs(logits, token_ids[start + 1 : start + 1 + read.shape[1]], num_top, model.config)
    return found


__all__ = ["score_prompt", "token_logprobs"]
