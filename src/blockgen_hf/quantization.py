"""
Packed and smaller weights for generation on CPUs, multiplied by the kernels that torch brings for them.

What `quantization_config=` offers on CPUs (torchao, quanto, bitsandbytes) saves memory, but runs slower than float32
without compilation. oneDNN's and FBGEMM's own products are several times faster: docs/speed.md has the figures.
"""

import platform
from functools import cache
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from .modeling.configuration_blockgen import BlockGenConfig


# The matrices that every token meets. Those of the condition are multiplied once a text. The first three become one.
_JOINED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LAYER_MATRICES = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SMALLEST = 1e-30  # of what is divided by
_NUMBERS_OF_A_SAMPLE = 64
# Entries of a layer's largest matrix from which on packing pays: a call of oneDNN costs some 30 microseconds more.
_LARGE = 2**20
_ROWS_OF_A_BLOCK = 16  # oneDNN orders weights for a number of rows; this order is as good as any for others


def some_numbers(weight: torch.Tensor) -> torch.Tensor:
    """Some of the entries, evenly spread, `[up to 64]`, by which models and changed weights are told apart; a copy."""
    flat = weight.detach().flatten()
    return flat[:: -(-flat.numel() // _NUMBERS_OF_A_SAMPLE)].clone()


class PackedLinear(nn.Module):
    """A linear layer for inference, `[..., in]` -> `[..., out]` in float32. Its weights cannot be read or saved."""

    def __init__(self, linear: nn.Linear, nbytes: int) -> None:
        super().__init__()
        self.nbytes = nbytes  # of the weights
        self.sample = some_numbers(linear.weight)

    def train(self, mode: bool = True) -> "PackedLinear":
        if mode:
            raise ValueError("A model with packed weights cannot be trained: load it again for training.")
        super().train(mode)
        return self

    def get_extra_state(self) -> NoReturn:
        raise ValueError("Packed weights cannot be saved: save the model that they were made of.")

    @staticmethod
    def check(hidden_states: torch.Tensor) -> None:
        """Refuses what the kernels do not take, or would silently compute without a gradient."""
        if hidden_states.device.type != "cpu" or hidden_states.dtype != torch.float32:
            raise ValueError(
                "Packed weights serve float32 models on CPUs, but the hidden states are "
                f"{hidden_states.dtype} on {hidden_states.device}: do not move or convert such a model."
            )
        if hidden_states.requires_grad:
            raise ValueError("Packed weights pass no gradient on: call the model under `torch.no_grad()`.")


class Int8Linear(PackedLinear):
    """
    Weights of 8 bits with a scale for each output, times hidden states of 8 bits with a scale for each token, summed
    in integers. A token's result does not depend on the tokens beside it, to the last bit.
    """

    def __init__(self, linear: nn.Linear) -> None:
        weight, bias = linear.weight.detach(), linear.bias
        super().__init__(linear, weight.numel() + 4 * len(weight) + (0 if bias is None else bias.nbytes))
        self.scale = weight.abs().amax(-1).clamp(min=_SMALLEST) / 127
        self.zero_point = torch.zeros(len(weight), dtype=torch.int32)
        self.weight = _pack_int8((weight / self.scale[:, None]).round().to(torch.int8))
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.largest_level = 63 if _saturates() else 127

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.check(hidden_states)
        step = hidden_states.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST).div_(self.largest_level)
        levels = (hidden_states / step).round_().add_(self.largest_level + 1).to(torch.uint8)
        product = _multiply_int8(levels, self.largest_level + 1, self.weight, self.scale, self.zero_point)
        return product.mul_(step) if self.bias is None else torch.addcmul(self.bias, product, step, out=product)


class Float16Linear(PackedLinear):
    """Weights of 16 bits, which are multiplied as float32 numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, 2 * linear.weight.numel() + (0 if linear.bias is None else linear.bias.nbytes))
        self.weight = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach(), linear.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.check(hidden_states)
        return torch.ops.quantized.linear_dynamic_fp16(hidden_states, self.weight)


class Float32Linear(PackedLinear):
    """The same weights, in an order that makes products of the rows of a block fast. A single row is no faster."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, linear.weight.nbytes + (0 if linear.bias is None else linear.bias.nbytes))
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_OF_A_BLOCK)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.check(hidden_states)
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.weight, self.bias, "none", [], "")


FORMATS: dict[str, type[Int8Linear] | type[Float16Linear] | type[Float32Linear]] = {
    "int8": Int8Linear,
    "float16": Float16Linear,
    "float32": Float32Linear,
}


def quantize_for_cpu(model: PreTrainedModel, weights: str = "int8") -> PreTrainedModel:
    """
    Replaces the matrices of the layers and the output layer by packed ones, for inference on an x86 CPU.

    Args:
        model ([`BlockGenForDiffusionLM`]): a float32 model on the CPU, in evaluation mode. It is changed in place, and
            its parameters no longer require gradients. Embeddings, norms and layers that depend on the noise level
            stay unchanged.
        weights (`str`): `"int8"`: a quarter of the memory, products of 8 bits times 8 bits. `"float16"`: half of the
            memory, the precision of float16 in the weights, that of float32 elsewhere. `"float32"`: the same weights,
            only packed; faster with the many rows of a block, not with the single one of `decoding="ar"`.

    Returns:
        the model.

    Raises:
        ValueError: the format is unknown; the model, its type, device or mode is not supported; layers are already
            adapted or quantised; or this CPU or torch lacks the kernels.
    """
    if weights not in FORMATS:
        raise ValueError(f"`weights` must be one of {', '.join(map(repr, FORMATS))}, but is {weights!r}.")
    _check_model(model, weights)  # all of it, before the first matrix is replaced
    model.requires_grad_(False)
    pack = FORMATS[weights]
    for layer in model.model.layers:
        layer.self_attn.qkv_proj = pack(_joined([layer.get_submodule(name) for name in _JOINED])).eval()
        layer.self_attn.q_proj = layer.self_attn.k_proj = layer.self_attn.v_proj = None
        for name in _layer_matrices(model):
            layer.set_submodule(name, pack(layer.get_submodule(name)).eval())
    model.lm_head = pack(model.lm_head).eval()
    return model


def gains_from_packing(model: PreTrainedModel) -> bool:
    """
    Whether `quantize_for_cpu(model, "float32")` is possible and makes passes of several tokens faster: on an x86 CPU,
    in float32, with layers of some width (512 and more).
    """
    try:
        _check_model(model, "float32")
    except ValueError:
        return False
    return bool(model.config.hidden_size * model.config.intermediate_size >= _LARGE)


def weights_format(model: PreTrainedModel) -> str:
    """How the weights are stored, in words: `"bfloat16"`, or `"int8, packed"` after [`quantize_for_cpu`]."""
    packed = next((module for module in model.modules() if isinstance(module, PackedLinear)), None)
    if packed is None:
        return str(model.dtype).removeprefix("torch.")
    return f"{next(name for name, kind in FORMATS.items() if isinstance(packed, kind))}, packed"


def readable_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state of a model by name, of packed weights some numbers; to tell models apart, not to save them."""
    samples = {name: module.sample for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    return {**dict(model.named_parameters(remove_duplicate=False)), **samples} if samples else model.state_dict()


def _layer_matrices(model: PreTrainedModel) -> list[str]:
    return [name for name in _LAYER_MATRICES if model.config.gated_mlp or name != "mlp.gate_proj"]


def _joined(linears: list[nn.Linear]) -> nn.Linear:
    """One linear layer, whose outputs are those of several, one behind the other."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    has_bias = linears[0].bias is not None
    joined = nn.Linear(weight.shape[1], len(weight), bias=has_bias, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if has_bias:
        joined.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
    return joined


def _check_model(model: PreTrainedModel, weights: str) -> None:
    """Raises a `ValueError` for a model or a machine with which packing is impossible."""
    _check_machine(weights)
    if not isinstance(model, PreTrainedModel) or model.config.model_type != BlockGenConfig.model_type:
        raise ValueError(f"`model` must be a BlockGen model, but is a {type(model).__name__}.")
    if model.training:
        raise ValueError("`model` is in training mode, and packed weights cannot be trained: call `model.eval()`.")
    _check_linear("lm_head", model.lm_head)  # first: of a model that is packed already, there is no `q_proj`
    for i, layer in enumerate(model.model.layers):
        for name in (*_JOINED, *_layer_matrices(model)):
            _check_linear(f"model.layers.{i}.{name}", layer.get_submodule(name))


def _check_machine(weights: str) -> None:
    has_kernels = {
        "int8": torch.backends.mkldnn.is_available(),
        "float32": torch.backends.mkldnn.is_available(),
        "float16": torch.backends.quantized.engine in ("x86", "fbgemm"),
    }
    if platform.machine().lower() not in ("x86_64", "amd64") or not has_kernels[weights]:
        raise ValueError(
            f"`weights={weights!r}` needs an x86 CPU and a torch that was built with oneDNN and FBGEMM, as its wheels "
            f"are, but this is {platform.machine()} with the engine {torch.backends.quantized.engine!r}."
        )


def _check_linear(name: str, module: nn.Module) -> None:
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        raise ValueError(
            f"`model` must have plain linear layers, but {name} is a {type(module).__name__}, wrapped or quantised "
            "already: load it without `quantization_config`, and without an adapter. An adapter that acts on all "
            "tokens can be merged into the weights first; one of noisy tokens only (`adapter_rows`) cannot."
        )
    weight = module.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(
            f"`model` must be float32 on the CPU, but {name} is {weight.dtype} on {weight.device}: load it with "
            "`dtype=torch.float32`, and without `device_map`."
        )


def _pack_int8(weight: torch.Tensor) -> Any:
    return torch.ops.onednn.qlinear_prepack(weight, None)


def _multiply_int8(
    levels: torch.Tensor, level_of_zero: int, weight: Any, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    """`[..., in]` of uint8 times packed weights, `[..., out]` of float32, scaled by the weights' scale."""
    flat = levels.flatten(0, -2)  # of no token at all the kernel returns a matrix, whatever its shape
    product = torch.ops.onednn.qlinear_pointwise(
        flat, 1.0, level_of_zero, weight, scale, zero_point, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product.view(*levels.shape[:-1], len(scale))


@cache
def _saturates() -> bool:
    """
    Whether the CPU adds pairs of products in 16 bits, as those without VNNI instructions do: then hidden states may
    have 7 bits only.
    """
    length = 64
    weight = torch.full((16, length), 127, dtype=torch.int8)
    levels = torch.full((1, length), 255, dtype=torch.uint8)
    product = _multiply_int8(levels, 0, _pack_int8(weight), torch.ones(16), torch.zeros(16, dtype=torch.int32))
    return bool((product != length * 127 * 255).any())


__all__ = [
    "FORMATS",
    "Float16Linear",
    "Float32Linear",
    "Int8Linear",
    "PackedLinear",
    "gains_from_packing",
    "quantize_for_cpu",
    "readable_weights",
    "some_numbers",
    "weights_format",
]
