# Copyright 2026 The blockgen-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Scores of the predictor-corrector's informed steps: which tokens of a clean proposal go back to noise (BlockGen, Sec.
4.1 and Suppl. B.1). Every score is a penalty: the k highest positions are re-noised.
"""

import torch

from .sampling_blockgen import argsort_at_random
from .logits_blockgen import Prediction


# A log-probability instead of log 0. The diffusion distribution of a masked model is one-hot at tokens that are fixed
# already; with an infinite divergence they would all tie, with this floor the least likely under AR is the worst.
_LOG_FLOOR = -100.0


def penalties(
    corrector: str,
    proposal: torch.Tensor,
    diffusion_log_probs: torch.Tensor | None,
    verification: Prediction | None,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """
    Penalty of every proposed token.

    Args:
        corrector (`str`): name of the score.
        proposal (`torch.LongTensor` of shape `[B, n]`): the clean proposal x~.
        diffusion_log_probs (`torch.Tensor` of shape `[B, n, V]`, *optional*): log p_D, of the forward before the
            proposal, for the scores that are made of it.
        verification ([`Prediction`], *optional*): p_AR of all positions of the proposal, for the `ar_` scores.
        uniform (`torch.Tensor` of shape `[B, n]`): random numbers in [0, 1), for `"random"`.

    Returns:
        `torch.Tensor` of shape `[B, n]`, higher is worse:

        - `ar_surprisal`: -log p_AR(x~)
        - `ar_gap`: max_v log p_AR(v) - log p_AR(x~)
        - `ar_entropy`: H(p_AR)
        - `ar_kl`, `ar_reverse_kl`, `ar_tv`: KL(p_AR || p_D), KL(p_D || p_AR), total variation of the two
        - `entropy`, `confidence`, `margin`: H(p_D), -max p_D, and minus the gap between its two largest
        - `random`: a random number
    """
    if verification is not None and corrector == "ar_surprisal":
        return -verification.log_prob(proposal.flatten()).view(proposal.shape)
    if verification is not None and corrector == "ar_gap":
        tokens, best = proposal.flatten(), verification.best()
        return (verification.log_prob(best) - verification.log_prob(tokens)).view(proposal.shape)
    if verification is not None and corrector == "ar_entropy":
        return _entropy(verification.log_probs()).view(proposal.shape)
    if diffusion_log_probs is None:
        return uniform
    if verification is not None:
        return _divergences(corrector, diffusion_log_probs, verification.log_probs().view_as(diffusion_log_probs))
    if corrector == "entropy":
        return _entropy(diffusion_log_probs)
    largest = diffusion_log_probs.topk(2, dim=-1).values.exp()
    return -largest[..., 0] if corrector == "confidence" else largest[..., 1] - largest[..., 0]


def _divergences(corrector: str, diffusion_log_probs: torch.Tensor, ar_log_probs: torch.Tensor) -> torch.Tensor:
    if corrector == "ar_tv":
        return (ar_log_probs.exp() - diffusion_log_probs.exp()).abs().sum(-1) / 2
    if corrector == "ar_kl":
        return _divergence(ar_log_probs, diffusion_log_probs)
    return _divergence(diffusion_log_probs, ar_log_probs)


def _entropy(log_probs: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(log_probs.exp()).sum(-1)


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) `[B, n]`."""
    return (log_p.exp() * (log_p.clamp(min=_LOG_FLOOR) - log_q.clamp(min=_LOG_FLOOR))).sum(-1)


def worst_positions(
    penalty: torch.Tensor, count: int | torch.Tensor, fixed: torch.Tensor | None, uniform: torch.Tensor
) -> torch.Tensor:
    """
    The `count` positions of highest penalty, one number or `[B, 1]`, as a mask `[B, n]`. Fixed positions never are
    among them; which of equal ones are is drawn by `uniform`, random numbers in [0, 1) of shape `[B, n]`.
    """
    if fixed is not None:
        penalty = penalty.masked_fill(fixed, -torch.inf)
    rank = argsort_at_random(-penalty, uniform).argsort(-1)
    worst = rank < count
    return worst if fixed is None else worst & ~fixed


__all__ = ["penalties", "worst_positions"]
