"""
What a training run will take, before it is started: parameters, tokens, memory, time. Estimates, not promises.

Not `accelerate estimate-memory`: it counts weights and Adam, and nothing of activations, averages and adapters.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.modeling_blockgen import BlockGenForDiffusionLM
from ..modeling.objective_blockgen import chunk_size_on
from .recipe_adapter import add_adapter


# Of the time of a step, the share that its matrix products would take alone at the speed of a large one: norms, gates,
# dropout, rotations, softmax, loss and optimizer take the rest. Measured on a CPU; for other devices it is a guess.
_MATMUL_SHARE = {"cpu": 0.5, "cuda": 0.35}
_MEASURED_ROWS = 2048
_MEASURING_SECONDS = 0.3


@dataclass(frozen=True)
class ParameterCount:
    """
    Args:
        total: all parameters.
        layers: those of the layers' matrices, which every token of both halves is multiplied with.
        head: those of the output matrix, which only scored tokens are multiplied with.
        trained: those that have a gradient: all, or those of an adapter.
    """

    total: int
    layers: int
    head: int
    trained: int

    @property
    def is_adapter(self) -> bool:
        return self.trained < self.total


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a process holds at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations + self.head


def count_parameters(config: BlockGenConfig, adapter: dict[str, Any] | None = None) -> ParameterCount:
    """
    Of a model that is built without memory.

    Args:
        adapter: arguments of `peft.LoraConfig`, as a recipe has them; empty or None where all weights are trained.
    """
    with torch.device("meta"):
        model = BlockGenForDiffusionLM(config)
        layers = model.model.layers
        if adapter:
            add_adapter(model, adapter, checkpoint="")
    in_layers = sum(parameter.numel() for name, parameter in layers.named_parameters() if "modulation" not in name)
    head = config.vocab_size * config.hidden_size
    trained = model.num_parameters(only_trainable=True)
    return ParameterCount(model.num_parameters(), in_layers, head, trained)


def estimate_memory(
    config: BlockGenConfig,
    parameters: ParameterCount,
    rows: int,
    length: int,
    *,
    bytes_per_value: int = 4,
    ema: bool = True,
    checkpointing: bool = False,
    shards: int = 1,
) -> MemoryEstimate:
    """
    The formula, N being the parameters, M those that are trained, h the width, f that of the MLP,
    T = 2 * rows * length the tokens of both halves (one with `next_token_prediction`), and b the bytes of a value in
    the layers (4, or 2 in mixed precision):

    - weights 4 N, gradients 4 M, Adam 8 M, their average 4 M, divided by the shards; and b N in mixed precision, for
      the copy in lower precision.
    - a layer keeps for the backward pass T (13 h + 2 f) b bytes: what norms, modulation, projections, attention, gates
      and the two products of the MLP were computed from; with dropout 2 T h bytes more. With activation checkpointing
      it keeps its input, 4 T h, and one layer at a time all of it. Adapters of its matrices change little.
    - head: its gradient 4 V h, which is there before the backward pass, unless only an adapter is trained; hidden
      states and their gradients, 8 h for each noisy token; the logits of a chunk in three copies.

    Args:
        rows, length: of a micro-batch.
        bytes_per_value: 4, or 2 for bf16 and fp16.
        ema: whether weights are averaged.
        checkpointing: activation checkpointing.
        shards: processes that share weights, gradients and optimizer (FSDP).
    """
    width, mlp, tokens = config.hidden_size, config.intermediate_size, _halves(config) * rows * length
    weights, trained = 4 * parameters.total // shards, 4 * parameters.trained // shards
    copy = bytes_per_value * parameters.total if bytes_per_value < 4 else 0
    layer = tokens * (13 * width + 2 * mlp) * bytes_per_value
    if config.hidden_dropout > 0:
        layer += 2 * tokens * width
    kept = config.num_hidden_layers * 4 * tokens * width + layer if checkpointing else config.num_hidden_layers * layer
    chunk_size = chunk_size_on("cuda" if torch.cuda.is_available() else "cpu")
    chunk = min(chunk_size, rows * length) * config.vocab_size * 4 * 3
    return MemoryEstimate(
        weights=weights + copy,
        gradients=trained,
        optimizer=2 * trained,
        average=trained if ema else 0,
        activations=kept,
        head=(0 if parameters.is_adapter else 4 * parameters.head) + 8 * width * rows * length + chunk,
    )


def _halves(config: BlockGenConfig) -> int:
    """Clean and noisy half of a training step."""
    return 1 if config.next_token_prediction else 2


def step_operations(
    config: BlockGenConfig, parameters: ParameterCount, rows: int, length: int, *, checkpointing: bool = False
) -> float:
    """
    Floating-point operations of an optimizer step: 6 a parameter and token of both halves in the layers (8 with
    activation checkpointing), 6 a parameter of the head and scored token, which are half of all in a masked model, and
    12 h L^2 a layer and row for attention, whose mask is three quarters empty. A model with `next_token_prediction`
    has one half, and half of the attention. Under an adapter weights have no gradients: 2 less a parameter.
    """
    passes = 8 if checkpointing else 6
    saved = 2 if parameters.is_adapter else 0
    scored = 0.5 if config.diffusion_type == "masked" else 1.0
    layers = (passes - saved) * parameters.layers * _halves(config) * length
    head = (6 - saved) * parameters.head * scored * length
    attention = _halves(config) * passes * config.num_hidden_layers * config.hidden_size * length**2
    return float(rows * (layers + head + attention))


def measure_speed(config: BlockGenConfig, device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the products of an MLP of this size, on this machine as busy as it is."""
    left = torch.ones(_MEASURED_ROWS, config.hidden_size, device=device, dtype=dtype)
    right = torch.ones(config.hidden_size, config.intermediate_size, device=device, dtype=dtype)
    best, spent = 0.0, 0.0
    for repeat in range(10_000):
        started = time.perf_counter()
        for _ in range(1 if device == "cpu" else 20):
            left @ right
        if device != "cpu":
            torch.accelerator.synchronize()
        elapsed = time.perf_counter() - started
        if repeat > 0:  # the first pays for what is set up once
            count = 1 if device == "cpu" else 20
            best = max(best, count * 2.0 * _MEASURED_ROWS * right.numel() / elapsed)
        spent += elapsed
        if repeat > 0 and spent > _MEASURING_SECONDS:
            break
    return best


def estimate_seconds(operations: float, speed: float, processes: int, device: str) -> float:
    """Of a step: its operations at the speed measured, of which only a share is reached, shared by the processes."""
    return operations / (speed * processes * _MATMUL_SHARE.get(device, _MATMUL_SHARE["cuda"]))


__all__ = [
    "MemoryEstimate",
    "ParameterCount",
    "count_parameters",
    "estimate_memory",
    "estimate_seconds",
    "measure_speed",
    "step_operations",
]
