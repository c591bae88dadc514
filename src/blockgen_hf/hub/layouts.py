"""
The published layouts: their tensors and settings, what these are called here, and which shapes they have.

`{n}` counts the layers; V is the number of rows of the vocabulary, d the hidden size, c the width of the time
embedding. The rows of `attn_qkv` are those of the queries, the keys and the values, in this order.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..modeling.configuration_blockgen import BlockGenConfig


FAMILIES = ("block-dit", "dense-dit", "ar", "bd3lm")
CAUSAL_LM = "causal-lm"  # a causal language model in the layout of transformers

# Published name, name here, shape.
_TRUNK = (
    ("vocab_embed.embedding", "model.embed_tokens.weight", "V x d"),
    ("blocks.{n}.norm1.weight", "model.layers.{n}.input_layernorm.weight", "d"),
    ("blocks.{n}.attn_qkv.weight", "model.layers.{n}.self_attn.{q,k,v}_proj.weight", "3d x d"),
    ("blocks.{n}.attn_out.weight", "model.layers.{n}.self_attn.o_proj.weight", "d x d"),
    ("blocks.{n}.norm2.weight", "model.layers.{n}.post_attention_layernorm.weight", "d"),
    ("blocks.{n}.mlp.0.weight", "model.layers.{n}.mlp.up_proj.weight", "4d x d"),
    ("blocks.{n}.mlp.0.bias", "model.layers.{n}.mlp.up_proj.bias", "4d"),
    ("blocks.{n}.mlp.2.weight", "model.layers.{n}.mlp.down_proj.weight", "d x 4d"),
    ("blocks.{n}.mlp.2.bias", "model.layers.{n}.mlp.down_proj.bias", "d"),
    ("output_layer.norm_final.weight", "model.norm.weight", "d"),
    ("output_layer.linear.weight", "lm_head.weight", "V x d"),
    ("output_layer.linear.bias", "lm_head.bias", "V"),
)
# With adaptive layer norms (adaLN) these too.
_ADAPTIVE = (
    ("sigma_map.mlp.0.weight", "model.time_embedding.linear_1.weight", "c x 256"),
    ("sigma_map.mlp.0.bias", "model.time_embedding.linear_1.bias", "c"),
    ("sigma_map.mlp.2.weight", "model.time_embedding.linear_2.weight", "c x c"),
    ("sigma_map.mlp.2.bias", "model.time_embedding.linear_2.bias", "c"),
    ("blocks.{n}.adaLN_modulation.weight", "model.layers.{n}.modulation.weight", "6d x c"),
    ("blocks.{n}.adaLN_modulation.bias", "model.layers.{n}.modulation.bias", "6d"),
    ("output_layer.adaLN_modulation.weight", "model.norm_modulation.weight", "2d x c"),
    ("output_layer.adaLN_modulation.bias", "model.norm_modulation.bias", "2d"),
)
_PREFIXES = {"bd3lm": "backbone."}
_INV_FREQ = "rotary_emb.inv_freq"
# Buffers that hold no weights, and may be absent. Those of BD3-LM are the interval of its noise levels.
_BUFFERS = {"bd3lm": ("sampling_eps_min", "sampling_eps_max")}

# Published setting, name here.
_SETTINGS = {
    "hidden_size": "hidden_size",
    "length": "max_position_embeddings",
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "dropout": "hidden_dropout",
    "cond_dim": "cond_dim",
}
_BD3LM_SETTINGS = {
    "hidden_dim": "hidden_size",
    "model_length": "max_position_embeddings",
    "n_blocks": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "dropout": "hidden_dropout",
    "cond_dim": "cond_dim",
}


@dataclass(frozen=True)
class PublishedTensor:
    """A tensor of a published checkpoint: its name, its shape, and what it is here, cut along its rows."""

    name: str
    shape: tuple[int, ...]
    names_here: tuple[str, ...]


def published_tensors(family: str, config: BlockGenConfig) -> list[PublishedTensor]:
    """The weights of a model in the layout of a family."""
    sizes = {"V": config.vocab_size, "d": config.hidden_size, "c": config.cond_dim}
    tensors = []
    for name, here, shape in _TRUNK + _ADAPTIVE if config.adaptive_layer_norm else _TRUNK:
        for n in range(config.num_hidden_layers) if "{n}" in name else (0,):
            tensors.append(
                PublishedTensor(
                    _PREFIXES.get(family, "") + name.replace("{n}", str(n)),
                    tuple(_length(word, sizes) for word in shape.split(" x ")),
                    _names_here(here.replace("{n}", str(n))),
                )
            )
    return tensors


def _length(word: str, sizes: Mapping[str, int]) -> int:
    return int(word[:-1] or 1) * sizes[word[-1]] if word[-1] in sizes else int(word)


def _names_here(name: str) -> tuple[str, ...]:
    return tuple(name.replace("{q,k,v}", letter) for letter in "qkv") if "{q,k,v}" in name else (name,)


def embedding_name(family: str) -> str:
    """The tensor whose rows are the vocabulary."""
    return _PREFIXES.get(family, "") + _TRUNK[0][0]


def inv_freq_name(family: str) -> str:
    """The frequencies of the rotary embedding."""
    return _PREFIXES.get(family, "") + _INV_FREQ


def buffer_names(family: str) -> tuple[str, ...]:
    """What a checkpoint may hold beside its weights."""
    return (inv_freq_name(family), *_BUFFERS.get(family, ()))


def setting_names(family: str) -> dict[str, str]:
    """Names in a published config.json -> names in `BlockGenConfig`."""
    return dict(_BD3LM_SETTINGS if family == "bd3lm" else _SETTINGS)


def is_prefixed(names: Iterable[str]) -> bool:
    """Whether the tensors have the names of BD3-LM."""
    return any(name.startswith(_PREFIXES["bd3lm"]) for name in names)


def is_adaptive(names: Iterable[str]) -> bool:
    """Whether the tensors are those of a model with adaptive layer norms."""
    return any("sigma_map." in name or "adaLN_modulation." in name for name in names)


__all__ = [
    "CAUSAL_LM",
    "FAMILIES",
    "PublishedTensor",
    "buffer_names",
    "embedding_name",
    "inv_freq_name",
    "is_adaptive",
    "is_prefixed",
    "published_tensors",
    "setting_names",
]
