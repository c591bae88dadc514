"""How much of its own drafts a model accepts: what speculative decoding gains by them."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_utils import unwrap_model

from .likelihood import evaluation_mode


_ROWS = 4  # at a time, as there are logits of every token


@torch.no_grad()
def greedy_texts(model: Any, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Prompts `[N, P]` and what greedy autoregressive decoding makes of them, `[N, P + new_tokens]`."""
    unwrapped = unwrap_model(model)
    with evaluation_mode(model):
        found: torch.Tensor = unwrapped.generate(
            prompts.to(unwrapped.device),
            attention_mask=torch.ones_like(prompts, device=unwrapped.device),
            decoding="ar",
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,  # all rows as long
        )
    return found


@torch.no_grad()
def accepted_draft_tokens(
    model: Any, texts: torch.Tensor, prompt_length: int, block_sizes: Sequence[int]
) -> dict[int, float]:
    """
    The mean number of tokens of a draft that greedy speculative decoding accepts.

    Behind a prefix of a text that the model writes by itself, greedily, a draft of one denoising pass is accepted as
    far as it agrees with that text. One pass drafts all blocks of a text at once, each behind its own prefix.

    Args:
        model ([`BlockGenForDiffusionLM`]): also wrapped, or with an adapter.
        texts (`torch.LongTensor` of shape `[N, L]`): from [`greedy_texts`].
        prompt_length (`int`): what of them are prompts, which are not drafted.
        block_sizes (`Sequence[int]`): sizes of the drafts.

    Returns:
        the mean for each block size B, from 0 to B. With `ar_prediction="clean"` it is 1 at least: the first token of
        a block is predicted autoregressively.
    """
    unwrapped = unwrap_model(model)
    config, length = unwrapped.config, texts.shape[1]
    shift = 1 if config.is_anchored else 0  # a token is scored one place before its own
    positions = torch.arange(length, device=texts.device)[None]
    noise = unwrapped.fixed_queries(positions).expand_as(texts)
    accepted: dict[int, float] = {}
    with evaluation_mode(model):
        for size in block_sizes:
            first, last = -(-(prompt_length - shift) // size) * size, (length - shift) // size * size
            if first >= last:
                continue
            agrees = []
            for start in range(0, len(texts), _ROWS):
                rows = texts[start : start + _ROWS]
                logits = model(input_ids=rows, noisy_input_ids=noise[: len(rows)], block_size=size, noise_level=1.0)
                scores = logits.logits[:, first:last]
                if config.has_mask_row:
                    scores[..., config.mask_token_id] = -torch.inf
                agrees.append(scores.argmax(-1) == rows[:, first + shift : last + shift])
            blocks = torch.cat(agrees).unflatten(1, (-1, size)).long()
            accepted[size] = blocks.cumprod(-1).sum(-1).double().mean().item()
    return accepted


__all__ = ["accepted_draft_tokens", "greedy_texts"]
