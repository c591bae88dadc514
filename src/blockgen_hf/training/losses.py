"""The training loss of each block size, between two logs."""

from typing import TYPE_CHECKING

import torch

from ..modeling.masking_blockgen import BlockSize


if TYPE_CHECKING:
    from accelerate import Accelerator


class LossesBySize:
    """
    Sums of losses and numbers of scored tokens for every block size, on the device until they are logged.

    Args:
        block_sizes (`list[int]`): S.
    """

    def __init__(self, block_sizes: list[int]) -> None:
        self.block_sizes = block_sizes
        self._sums: torch.Tensor | None = None
        # Of each micro-batch: its losses of rows, and what an error names.
        self._recent: list[tuple[torch.Tensor, BlockSize, int, torch.Tensor | None]] = []

    def add(
        self,
        block_size: BlockSize,
        token_losses: torch.Tensor,
        labels: torch.Tensor,
        step: int,
        source: torch.Tensor | None,
    ) -> None:
        """
        Args:
            token_losses (`torch.Tensor` of shape `[B, L]`): in nats.
            labels (`torch.LongTensor` of shape `[B, L]`): -100 where not scored.
            step (`int`): optimizer steps done before.
            source (`torch.LongTensor` of shape `[B]`, *optional*): documents that the rows begin with.
        """
        sizes = (block_size,) * len(labels) if isinstance(block_size, int) else block_size
        rows = torch.tensor([self.block_sizes.index(size) for size in sizes], device=labels.device)
        losses = token_losses.detach().double().sum(-1)
        if self._sums is None:
            self._sums = torch.zeros(len(self.block_sizes), 2, dtype=torch.float64, device=labels.device)
        self._sums.index_add_(0, rows, torch.stack([losses, (labels != -100).sum(-1).double()], dim=-1))
        self._recent.append((losses, block_size, step, source))
        if len(self._recent) % 1000 == 0:  # a run that neither logs nor saves keeps the bad ones only
            self._recent = [entry for entry in self._recent if not entry[0].isfinite().all()]

    def drain(self, accelerator: "Accelerator") -> dict[str, float]:
        """
        The mean loss of a token for each block size that occurred, over all ranks, as `loss_block_size_N`.

        Raises:
            ValueError: a loss that is not finite.
        """
        self.check(accelerator)
        if self._sums is None:
            return {}
        sums = accelerator.reduce(self._sums, reduction="sum")
        self._sums = None
        return {
            f"loss_block_size_{size}": total / count
            for size, (total, count) in zip(self.block_sizes, sums.tolist(), strict=True)
            if count > 0
        }

    def check(self, accelerator: "Accelerator") -> None:
        """
        Raises:
            ValueError: a loss since the last check is not finite, on any rank; names step, block size and rows.
        """
        recent, self._recent = self._recent, []
        finite = [losses.isfinite().all() for losses, *_ in recent]
        num_bad = (~torch.stack(finite)).sum() if finite else torch.zeros((), dtype=torch.long)
        # Together, so that no rank waits for one that has given up.
        if accelerator.reduce(num_bad.to(accelerator.device), reduction="sum") > 0:
            raise ValueError(
                f"The loss is not finite{self._describe(recent)}. No checkpoint was saved since. A smaller learning "
                "rate, more warm-up, or bf16 instead of fp16 may help; or the data."
            )

    @staticmethod
    def _describe(recent: list[tuple[torch.Tensor, BlockSize, int, torch.Tensor | None]]) -> str:
        for losses, block_size, step, source in recent:
            bad = (~losses.isfinite()).nonzero().squeeze(-1)
            if len(bad):
                documents = "" if source is None else f", documents {source[bad].tolist()} of the training data"
                return f" in step {step + 1}: block size {block_size}, rows {bad.tolist()} of a batch{documents}"
        return " on another rank"


__all__ = ["LossesBySize"]
