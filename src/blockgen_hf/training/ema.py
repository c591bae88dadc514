"""The exponential moving average of the weights, which is what is evaluated and published (BlockGen, Suppl. A.4)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The weights as the optimizer knows them, beside the averages in the model's own files.
TRAINING_WEIGHTS = "training_weights.safetensors"


class EMACallback(TrainerCallback):
    """
    Averages the trained weights after every optimizer step, in float32 at least. The decay is warmed up as
    min(decay, (1 + n) / (10 + n)) in step n, so that the average soon forgets the initial weights.

    [`BlockGenTrainer`] adds it for `ema_decay > 0`, evaluates and saves with [`~EMACallback.applied`], and keeps both
    kinds of weights in its checkpoints. When training ends, the model has the averages.

    Args:
        decay (`float`): in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.parameters: dict[str, nn.Parameter] = {}
        self.averages: dict[str, torch.Tensor] = {}

    def start(self, model: nn.Module) -> None:
        """Begins with the weights that the model has now."""
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.averages = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in self.parameters.items()
        }

    def stop(self) -> None:
        self.parameters, self.averages = {}, {}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Averages the weights of step `num_updates`, counted from 1."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        averages = list(self.averages.values())
        weights = [p.to(average.dtype) for p, average in zip(self.parameters.values(), averages, strict=True)]
        get_ema_multi_avg_fn(decay)(averages, weights, num_updates)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within, the model has the averages; nothing changes where there are none."""
        if not self.averages:
            yield
            return
        _reshard(model)
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._copy(self.averages)
        try:
            yield
        finally:
            _reshard(model)
            self._copy(weights)

    @torch.no_grad()
    def _copy(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save(self, folder: str | Path) -> None:
        """
        Writes the weights; the averages are those of the model's own files, unless these are saved in less precision.
        """
        tensors = {name: parameter.detach().contiguous() for name, parameter in self.parameters.items()}
        rounded = {n: average for n, average in self.averages.items() if average.dtype != self.parameters[n].dtype}
        tensors.update({f"average.{name}": average.contiguous() for name, average in rounded.items()})
        save_file(tensors, Path(folder) / TRAINING_WEIGHTS, metadata={"format": "pt"})

    @torch.no_grad()
    def load(self, folder: str | Path, model: nn.Module) -> None:
        """Takes the averages from the model, which has been loaded from the folder, and gives it its weights back."""
        self.start(model)
        with safe_open(Path(folder) / TRAINING_WEIGHTS, framework="pt") as file:
            names = set(file.keys())
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(name))
                if f"average.{name}" in names:
                    self.averages[name].copy_(file.get_tensor(f"average.{name}"))

    @torch.no_grad()
    def load_averages(self, folder: str | Path, model: nn.Module) -> None:
        """Takes the averages of a model with sharded parameters from the model's files in a folder."""
        self.start(model)
        for path in sorted(Path(folder).glob("model*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in sorted(set(file.keys()) & set(self.averages)):  # the same order on every rank
                    average, value = self.averages[name], file.get_tensor(name)
                    if isinstance(average, DTensor):
                        value = distribute_tensor(value.to(average.device), average.device_mesh, average.placements)
                    average.copy_(value)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Gives the model the averages, for good."""
        _reshard(model)
        self._copy(self.averages)
        self.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.averages:  # they come from a checkpoint
            return
        if state.global_step > 0:
            logger.warning(
                "The checkpoint has no %s: training goes on from the model that was saved, and the average of the "
                "weights begins with it. A run that averages its weights and saves with `save_only_model=True` saves "
                "the average alone.",
                TRAINING_WEIGHTS,
            )
        self.start(kwargs["model"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.update(state.global_step + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.averages:  # else the best model has been loaded
            self.finish(kwargs["model"])


def _reshard(model: nn.Module) -> None:
    """FSDP2 may hold gathered copies of parameters, which would outlive a change of the shards."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


__all__ = ["TRAINING_WEIGHTS", "EMACallback"]
