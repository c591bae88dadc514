"""
The plain baseline of benchmarks/generation.py: block decoding as the algorithm reads, and as research code runs it.

The network is ours, only the loop around it differs: logits at every position of every pass, float64 Gumbel noise over
the whole vocabulary for every draw, T passes a block whatever they change, a finished block committed to a
`DynamicCache` (which grows by concatenation) in a pass of its own, verification by a full log-softmax, and no row ends
before the last one does.
"""

import torch
from transformers import DynamicCache, GenerationConfig

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.evaluation.throughput import Contender, Generated
from blockgen_hf.evaluation.throughput_contenders import Decoding


# Settings that this loop knows.
_SETTINGS = {"decoding", "block_size", "denoising_steps", "nfe_per_block", "corrector_start", "corrector_period"}


def plain_contenders(model: BlockGenForDiffusionLM, decodings: list[Decoding]) -> list[Contender]:
    """The plain loop with every decoding that it knows."""
    known = [decoding for decoding in decodings if set(decoding.settings) <= _SETTINGS]
    return [
        Contender("plain", decoding.name, model, PlainDecoder(model, decoding.in_effect(model)).generate)
        for decoding in known
    ]


def gumbel_draw(log_probs: torch.Tensor) -> torch.Tensor:
    """`[B, n, V]` -> `[B, n]`: the arg-max of log-probabilities and Gumbel noise, in float64."""
    noise = -(-torch.rand(log_probs.shape, dtype=torch.float64, device=log_probs.device).log()).log()
    return (log_probs.double() + noise).argmax(-1)


class PlainDecoder:
    """Algorithm 1 with the surprisal corrector, and block size 1, for prompts of one length."""

    def __init__(self, model: BlockGenForDiffusionLM, settings: GenerationConfig) -> None:
        self.model = model
        self.settings = settings
        self.process = model.diffusion
        self.is_masked = model.config.diffusion_type == "masked"

    @torch.no_grad()
    def generate(self, prompts: torch.Tensor, new_tokens: int) -> Generated:
        self.cache = DynamicCache(config=self.model.config)
        self.evaluations = 0
        self.tokens = prompts
        decode = self._autoregressive if self.settings.decoding == "ar" else self._blocks
        decode(new_tokens)
        num_new = self.tokens.shape[1] - prompts.shape[1]
        return Generated(len(prompts) * num_new, float(self.evaluations))

    def _autoregressive(self, new_tokens: int) -> None:
        pending = self.tokens
        for _ in range(new_tokens):
            query = self._prior(1)
            outputs = self.model(
                input_ids=pending, query_input_ids=query, cache=self.cache, use_cache=True, logits_to_keep=1
            )
            self.evaluations += 1
            pending = gumbel_draw(self._log_probs(outputs.logits, query))
            self.tokens = torch.cat([self.tokens, pending], dim=1)

    def _blocks(self, new_tokens: int) -> None:
        pending = self.tokens
        end = self.tokens.shape[1] + new_tokens
        while self.tokens.shape[1] < end:
            if pending.shape[1]:
                self._commit(pending)
            pending = self._denoise_block(min(self.settings.block_size, end - self.tokens.shape[1]))
            self.tokens = torch.cat([self.tokens, pending], dim=1)

    def _commit(self, tokens: torch.Tensor) -> None:
        nothing = tokens[:, :0]
        self.model(input_ids=tokens, noisy_input_ids=nothing, cache=self.cache, use_cache=True, noise_level=1.0)

    def _denoise_block(self, length: int) -> torch.Tensor:
        num_steps = self.settings.num_denoising_steps()
        times = torch.linspace(1, 1e-5, num_steps + 1, dtype=torch.float64)
        alphas = [*self.process.schedule.alpha(times[:-1]).tolist(), 1.0]
        z_t = self._prior(length)
        for step in range(num_steps):
            alpha_t, alpha_s = alphas[step], alphas[step + 1]
            outputs = self.model(
                noisy_input_ids=z_t,
                block_size=self.settings.block_size,
                cache=self.cache,
                noise_level=times[step].item(),
            )
            self.evaluations += 1
            log_probs = self._log_probs(outputs.logits, z_t)
            if self.settings.is_informed(step, num_steps):
                proposal = self._posterior_draw(log_probs, z_t, 1.0, alpha_t)
                z_t = self._renoise(proposal, max(1, round((1 - alpha_s) * length)))
            else:
                z_t = self._posterior_draw(log_probs, z_t, alpha_s, alpha_t)
        return z_t

    def _renoise(self, proposal: torch.Tensor, count: int) -> torch.Tensor:
        """The tokens of highest surprisal under block size 1 go back to the prior."""
        queries = self._prior(proposal.shape[1])
        outputs = self.model(
            input_ids=proposal,
            noisy_input_ids=queries,
            block_size=1,
            cache=self.cache,
            noise_level=1.0,
        )
        self.evaluations += 1
        surprisal = -self._log_probs(outputs.logits, queries).gather(-1, proposal[..., None]).squeeze(-1)
        worst = surprisal.topk(count, dim=-1).indices
        return proposal.scatter(1, worst, self._prior(proposal.shape[1]).gather(1, worst))

    def _posterior_draw(
        self, log_probs: torch.Tensor, z_t: torch.Tensor, alpha_s: float, alpha_t: float
    ) -> torch.Tensor:
        """A draw of Eq. 2 or Eq. 3, whose probabilities are written out over the whole vocabulary."""
        probs = log_probs.exp().double()
        if self.is_masked:
            unmask = (alpha_s - alpha_t) / (1 - alpha_t)
            probs *= unmask
            probs[..., self.process.mask_token_id] = 1 - unmask
            return torch.where(z_t == self.process.mask_token_id, gumbel_draw(probs.log()), z_t)
        vocab_size, alpha_ts = probs.shape[-1], alpha_t / alpha_s
        at_z = z_t[..., None]
        keep = alpha_t * vocab_size * probs.gather(-1, at_z) + (alpha_ts - alpha_t)
        probs = (alpha_s - alpha_t) * probs + (1 - alpha_ts) * (1 - alpha_s) / vocab_size
        return gumbel_draw(probs.scatter_add_(-1, at_z, keep).log())

    def _log_probs(self, logits: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
        """
        log x_hat over the whole vocabulary. A token that is unmasked already is not carried over here: what is drawn
        in its place is not used.
        """
        if self.is_masked:
            logits[..., self.process.mask_token_id] = -torch.inf
        return logits.float().log_softmax(-1)

    def _prior(self, length: int) -> torch.Tensor:
        return self.process.prior((len(self.tokens), length), self.tokens.device)
