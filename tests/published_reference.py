"""
Checkpoints in the published layouts, and an evaluation of them in plain torch, written from the description of the
layouts. It shares no code with the package: everything is dense, and every mask is its definition.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, linear, silu


ROWS, WIDTH, LAYERS, HEADS, COND, LENGTH = 23, 16, 2, 2, 8, 24
SETTINGS: dict[str, Any] = {
    "name": "small",
    "type": "block-dit",
    "hidden_size": WIDTH,
    "cond_dim": COND,
    "length": LENGTH,
    "n_blocks": LAYERS,
    "n_heads": HEADS,
    "dropout": 0.1,
    "attn_backend": "flex",
    "x0_causal": True,
}
BD3LM_SETTINGS: dict[str, Any] = {
    "_name_or_path": "somewhere",
    "architectures": ["BD3LM"],
    "auto_map": {"AutoConfig": "configuration_bd3lm.BD3LMConfig"},
    "model_type": "bd3lm",
    "torch_dtype": "float32",
    "transformers_version": "4.49.0",
    "block_size": 4,
    "vocab_size": ROWS,
    "model_length": LENGTH,
    "hidden_dim": WIDTH,
    "cond_dim": COND,
    "n_blocks": LAYERS,
    "n_heads": HEADS,
    "dropout": 0.1,
    "adaln": True,
    "cross_attn": True,
    "causal": False,
    "time_conditioning": False,
    "var_min": True,
    "sampling_eps_min": 0.001,
    "sampling_eps_max": 0.999,
}


def settings(family: str, **changes: Any) -> dict[str, Any]:
    """A config.json as it is published; `x0_causal=None` leaves a setting out."""
    own = dict(BD3LM_SETTINGS if family == "bd3lm" else SETTINGS)
    if family in ("dense-dit", "ar"):
        own["type"] = "dit"
        del own["x0_causal"]
    return {name: value for name, value in {**own, **changes}.items() if value is not None}


def weights(
    family: str,
    seed: int = 0,
    *,
    rows: int = ROWS,
    width: int = WIDTH,
    layers: int = LAYERS,
    heads: int = HEADS,
    cond: int = COND,
    adaptive: bool | None = None,
    inv_freq: bool = True,
) -> dict[str, Tensor]:
    """Random tensors under their published names, none of them zero."""
    adaptive = family != "ar" if adaptive is None else adaptive
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (rows, width)}
    for n in range(layers):
        shapes |= {
            f"blocks.{n}.norm1.weight": (width,),
            f"blocks.{n}.attn_qkv.weight": (3 * width, width),
            f"blocks.{n}.attn_out.weight": (width, width),
            f"blocks.{n}.norm2.weight": (width,),
            f"blocks.{n}.mlp.0.weight": (4 * width, width),
            f"blocks.{n}.mlp.0.bias": (4 * width,),
            f"blocks.{n}.mlp.2.weight": (width, 4 * width),
            f"blocks.{n}.mlp.2.bias": (width,),
        }
        if adaptive:
            shapes[f"blocks.{n}.adaLN_modulation.weight"] = (6 * width, cond)
            shapes[f"blocks.{n}.adaLN_modulation.bias"] = (6 * width,)
    shapes |= {
        "output_layer.norm_final.weight": (width,),
        "output_layer.linear.weight": (rows, width),
        "output_layer.linear.bias": (rows,),
    }
    if adaptive:
        shapes |= {
            "output_layer.adaLN_modulation.weight": (2 * width, cond),
            "output_layer.adaLN_modulation.bias": (2 * width,),
            "sigma_map.mlp.0.weight": (cond, 256),
            "sigma_map.mlp.0.bias": (cond,),
            "sigma_map.mlp.2.weight": (cond, cond),
            "sigma_map.mlp.2.bias": (cond,),
        }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        scale = 0.5 if len(shape) == 1 else 1.5 / math.sqrt(shape[-1])
        tensors[name] = 1 + 0.3 * noise if "norm" in name else noise if "embed" in name else scale * noise
    if inv_freq:
        head = width // heads
        tensors["rotary_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, head, 2).float() / head)
    if family != "bd3lm":
        return tensors
    interval = {"sampling_eps_min": torch.tensor(0.001), "sampling_eps_max": torch.tensor(0.999)}
    return {f"backbone.{name}": tensor for name, tensor in tensors.items()} | interval


def write(folder: Path, config: dict[str, Any] | None, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A published checkpoint, or one in several files with an index."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, folder / file)
        files |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


class Reference:
    """
    Evaluates a checkpoint on any tokens at any positions, with a mask that is given.

    Args:
        tensors: of [`weights`], of any family.
        heads: number of attention heads.
    """

    def __init__(self, tensors: dict[str, Tensor], heads: int = HEADS) -> None:
        self.tensors = {name.removeprefix("backbone."): tensor.float() for name, tensor in tensors.items()}
        self.heads = heads
        self.layers = 1 + max(int(name.split(".")[1]) for name in self.tensors if name.startswith("blocks."))

    def logits(self, ids: Tensor, positions: Tensor, mask: Tensor, sigma: Tensor | None = None) -> Tensor:
        """
        `[B, N]` ids at `[N]` positions under a `[N, N]` mask (query, key) -> `[B, N, rows]`.

        Args:
            sigma: the noise level that the time embedding gets, `[B, N]`. Default: zero, as published models do it.
        """
        condition = self._condition(torch.zeros(ids.shape) if sigma is None else sigma)
        x = self.tensors["vocab_embed.embedding"][ids]
        for n in range(self.layers):
            x = self._layer(f"blocks.{n}.", x, positions, mask, condition)
        x = self._norm("output_layer.norm_final", x)
        if condition is not None:
            shift, scale = self._linear("output_layer.adaLN_modulation", condition).chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        return self._linear("output_layer.linear", x)

    def _layer(self, prefix: str, x: Tensor, positions: Tensor, mask: Tensor, condition: Tensor | None) -> Tensor:
        one, zero = torch.ones(()), torch.zeros(())
        shift1, scale1, gate1, shift2, scale2, gate2 = zero, zero, one, zero, zero, one
        if condition is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = self._linear(prefix + "adaLN_modulation", condition).chunk(
                6, dim=-1
            )
        normed = self._norm(prefix + "norm1", x) * (1 + scale1) + shift1
        x = x + gate1 * linear(self._attend(prefix, normed, positions, mask), self.tensors[prefix + "attn_out.weight"])
        normed = self._norm(prefix + "norm2", x) * (1 + scale2) + shift2
        hidden = gelu(self._linear(prefix + "mlp.0", normed), approximate="tanh")
        return x + gate2 * self._linear(prefix + "mlp.2", hidden)

    def _attend(self, prefix: str, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = linear(x, self.tensors[prefix + "attn_qkv.weight"])
        query, key, value = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key = self._rotate(query, positions), self._rotate(key, positions)
        scores = query @ key.transpose(-1, -2) / math.sqrt(width // self.heads)
        scores = scores.masked_fill(~mask, -math.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width)

    @staticmethod
    def _rotate(x: Tensor, positions: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angles = positions[:, None] / 10000 ** (torch.arange(half) / half)
        left, right = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.tensors[name + ".weight"]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.tensors[name + ".weight"], self.tensors[name + ".bias"])

    def _condition(self, sigma: Tensor) -> Tensor | None:
        if "sigma_map.mlp.0.weight" not in self.tensors:
            return None
        angles = sigma[..., None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return silu(self._linear("sigma_map.mlp.2", silu(self._linear("sigma_map.mlp.0", embedding))))


def block_mask(clean: Sequence[int], noisy: Sequence[int], block_size: int, clean_block_size: int) -> Tensor:
    """
    Who sees whom among clean tokens, then noisy ones, at their positions: a noisy token the clean ones before its
    block and the noisy ones of its block, which are counted from the first; a clean token the clean ones up to the end
    of its own block, which with block size 1 is the token itself.
    """
    mask = torch.zeros(len(clean) + len(noisy), len(clean) + len(noisy), dtype=torch.bool)
    for i, query in enumerate([*clean, *noisy]):
        for j, key in enumerate([*clean, *noisy]):
            if i < len(clean):
                mask[i, j] = j < len(clean) and key // clean_block_size <= query // clean_block_size
            else:
                block = (query - noisy[0]) // block_size
                same_block = j >= len(clean) and (key - noisy[0]) // block_size == block
                mask[i, j] = same_block or (j < len(clean) and key < noisy[0] + block * block_size)
    return mask
