"""
Reinforcement learning with TRL's GRPO: [`BlockGenGRPOTrainer`].

    prompts -> rollouts by any decoding -> rewards -> advantages -> exact AR log-probabilities -> TRL's loss

Needs TRL (`pip install 'blockgen-hf[trl]'`).
"""

from typing import Any

import torch
from torch import nn
from trl import GRPOConfig, GRPOTrainer

from ..generation.generation_configuration_blockgen import BlockGenGenerationConfig


class BlockGenGRPOTrainer(GRPOTrainer):
    """
    TRL's `GRPOTrainer` for [`BlockGenForDiffusionLM`]. The policy pi is the model at block size 1, whose probabilities
    are exact. All ratios and divergences, of the current, the old and the reference policy, are of

        log pi(y_i | x, y_<i) = log softmax(logits_i / temperature)[y_i],

    from one causal forward pass. Rollouts come from any decoding, by `generation_kwargs` of `GRPOConfig`, such as
    `{"decoding": "arpc", "block_size": 8, "nfe_per_block": 8}`. The default is `"ar"`, which draws from the policy:
    the gradient is then that of GRPO. For masked models the same holds of `"speculative"`, with either acceptance: it
    draws from the law of `"ar"`, in fewer passes. Other decodings draw from another law mu, whose probabilities are
    not tractable: the ratio of the loss stays pi / pi_old, without mu, and the gradient is that of the
    advantage-weighted log-likelihood, under pi, of the texts of mu. It is not the policy gradient of the reward.

    Only block size 1 is trained. All block sizes share the weights, so check the others afterwards.

    Dropout is always off (`disable_dropout`), because a token would get another probability in every pass. AR rollouts
    of a uniform model use the default query tokens of `forward`, as the log-probabilities do. Its speculative rollouts
    draw a query for each token, as `generate` does: their law is close to the policy's, but not the same.

    The arguments are those of `GRPOTrainer`.

    Raises:
        ValueError: the model does not have a generation setting; an engine other than `generate` is selected; there is
            a `hub_token`, which would be uploaded; or the model has `clean_attention="block_causal"`, and so no
            autoregressive probabilities.
    """

    def __init__(
        self, model: str | nn.Module, reward_funcs: Any = None, args: GRPOConfig | None = None, **kwargs: Any
    ) -> None:
        if args is None:
            args = GRPOConfig(output_dir="trainer_output")
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(args, name):
                raise ValueError(f"`{name}` must be False: BlockGen's decodings are those of `generate`.")
        if args.hub_token is not None:
            raise ValueError(
                "`hub_token` must be None, as TRL writes it to training_args.bin, which it uploads: log in with "
                "`hf auth login`, or set HF_TOKEN."
            )
        args.generation_kwargs = {"decoding": "ar", **(args.generation_kwargs or {})}
        args.disable_dropout = True
        super().__init__(model, reward_funcs, args, **kwargs)
        config = self.model.config
        if config.clean_attention != "causal" and config.block_sizes != [1]:
            raise ValueError(
                f"`clean_attention` of the model must be 'causal', but is {config.clean_attention!r}: it has no exact "
                "autoregressive probabilities."
            )
        self.generation_config = BlockGenGenerationConfig(**self.generation_kwargs, disable_compile=True)
        if self.generation_config.decoding == "ar" and config.diffusion_type == "uniform":
            # The loop of GenerationMixin, which serves it, has `forward` choose the query; ours draws one a token.
            self.generation_config.output_scores = True

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """
        Log-probabilities, and entropies in nats, of the last `logits_to_keep` of the tokens `[B, L]`, padded on either
        side: float32 `[B, logits_to_keep]`, zero at padding. `batch_size` rows go through the model at a time.
        """
        logps, entropies = [], []
        rows = batch_size or len(input_ids)
        for ids, mask in zip(input_ids.split(rows), attention_mask.split(rows), strict=True):
            with self.accelerator.autocast():
                logits = model(
                    input_ids=ids, attention_mask=mask, logits_to_keep=logits_to_keep + 1, use_cache=False
                ).logits
            log_probs = (logits[:, :-1].float() / self.temperature).log_softmax(-1)
            is_padding = mask[:, -logits_to_keep:] == 0
            tokens = ids[:, -logits_to_keep:, None]
            logps.append(log_probs.gather(-1, tokens).squeeze(-1).masked_fill(is_padding, 0))
            if compute_entropy:
                # The mask token's probability is zero, and 0 log 0 is zero, with a gradient of zero.
                finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
                entropies.append(-(log_probs.exp() * finite).sum(-1).masked_fill(is_padding, 0))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None


__all__ = ["BlockGenGRPOTrainer"]
