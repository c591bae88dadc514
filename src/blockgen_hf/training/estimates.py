"""What a training run will take, before it is started: parameters, tokens, memory, time. Estimates, not promises."""

import time
from dataclasses import dataclass

import torch

from ..modeling.chunked_loss_blockgen import CHUNK_SIZE
from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.modeling_blockgen import BlockGenForDiffusionLM


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
    """

    total: int
    layers: int
    head: int


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


def count_parameters(config: BlockGenConfig) -> ParameterCount:
    """Of a model that is built without memory."""
    with torch.device("meta"):
        model = BlockGenForDiffusionLM(config)
    layers = sum(
        parameter.numel() for name, parameter in model.model.layers.named_parameters() if "modulation" not in name
    )
    return ParameterCount(model.num_parameters(), layers, config.vocab_size * config.hidden_size)


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
    The formula, N being the parameters, h the width, f that of the MLP, T = 2 * rows * length the tokens of both
    halves (one with `next_token_prediction`), and b the bytes of a value in the layers (4, or 2 in mixed precision):

    - weights 4 N, gradients 4 N, Adam 8 N, their average 4 N, divided by the shards; and b N in mixed precision, for
      the copy in lower precision.
    - a layer keeps for the backward pass T (13 h + 2 f) b bytes: what norms, modulation, projections, attention, gates
      and the two products of the MLP were computed from; with dropout 2 T h bytes more. With activation checkpointing
      it keeps its input, 4 T h, and one layer at a time all of it.
    - head: its gradient 4 V h, which is there before the backward pass; hidden states and their gradients, 8 h for
      each noisy token; the logits of a chunk in three copies.

    Args:
        rows, length: of a micro-batch.
        bytes_per_value: 4, or 2 for bf16 and fp16.
        ema: whether weights are averaged.
        checkpointing: activation checkpointing.
        shards: processes that share weights, gradients and optimizer (FSDP).
    """
    width, mlp, tokens = config.hidden_size, config.intermediate_size, _halves(config) * rows * length
    state = 4 * parameters.total // shards
    copy = bytes_per_value * parameters.total if bytes_per_value < 4 else 0
    layer = tokens * (13 * width + 2 * mlp) * bytes_per_value
    if config.hidden_dropout > 0:
        layer += 2 * tokens * width
    kept = config.num_hidden_layers * 4 * tokens * width + layer if checkpointing else config.num_hidden_layers * layer
    chunk = min(CHUNK_SIZE, rows * length) * config.vocab_size * 4 * 3
    return MemoryEstimate(
        weights=state + copy,
        gradients=state,
        optimizer=2 * state,
        average=state if ema else 0,
        activations=kept,
        head=4 * parameters.head + 8 * width * rows * length + chunk,
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
    has one half, and half of the attention.
    """
    passes = 8 if checkpointing else 6
    scored = 0.5 if config.diffusion_type == "masked" else 1.0
    layers = passes * parameters.layers * _halves(config) * length
    head = 6 * parameters.head * scored * length
    attention = _halves(config) * passes * config.num_hidden_layers * config.hidden_size * length**2
    return float(rows * (layers + head + attention))


def measure_speed(
    config: BlockGenConfig, device: str, dtype: torch.dtype, seconds: float = _MEASURING_SECONDS
) -> float:
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
        if repeat > 0 and spent > seconds:
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
