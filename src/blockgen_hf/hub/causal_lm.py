"""Causal language models of transformers, and the configuration that each has here."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..modeling.configuration_blockgen import BlockGenConfig
from .families import Choices


MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# Those that have these settings; transformers does not read them of others. Qwen2 has biases of its own.
_WITH_ATTENTION_BIAS = ("llama", "qwen3", "smollm3")
_WITH_MLP_BIAS = ("llama", "smollm3")

# Fields of the same name and meaning.
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rope_parameters", "tie_word_embeddings",
    "pad_token_id", "bos_token_id", "eos_token_id", "use_cache",
)  # fmt: skip
# What `layer_types` and these say of a checkpoint cannot be computed here.
_REFUSED = {
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"),
    "soft-caps of logits": ("final_logit_softcapping", "attn_logit_softcapping", "logits_soft_cap"),
    "inputs that are no text": ("vision_config", "audio_config", "image_token_id"),
}
NO_TOKEN = -1  # as `pad_token_id` of old Llama checkpoints
_DEFAULT_SIZES = [1, 2, 4, 8]
# 1.0 x AR + 0.3 x the blocks, as weights of a mixture.
_AR_SHARE = 1 / 1.3


def source_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """
    The configuration of transformers that a config.json describes, with its defaults.

    Raises:
        ValueError: it is of a model that cannot be computed here, or describes none; says what of it.
    """
    _refuse_parts(values)
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"`model_type` of the checkpoint must be one of {list(MODEL_TYPES)} to become a BlockGen, but is "
            f"{model_type!r}."
        )
    if values.get("quantization_config"):
        raise ValueError(
            "The checkpoint is quantised (`quantization_config`), which cannot be converted: take the original, or a "
            "GGUF file of it."
        )
    try:
        # transformers writes into the dictionaries that it is given.
        config = CONFIG_MAPPING[model_type].from_dict(deepcopy(dict(values)))
        blockgen_config(config, Choices())
    except Exception as error:  # transformers raises all kinds
        what = _words(error).replace("`layer_norm_eps`", "`rms_norm_eps`")  # as it is called there
        raise ValueError(f"config.json of the checkpoint describes no model: {what}") from error
    _refuse_windows(config)
    _check_rope_factors(config)
    return config


def _words(error: Exception) -> str:
    """What it says, on one line: the Hub's client names the field on the first one, and what is wrong below."""
    return " ".join(str(error).split()) or type(error).__name__


def _check_rope_factors(config: PreTrainedConfig) -> None:
    """Of `longrope`, which transformers warns of only, and computes until a text is long."""
    rope = config.rope_parameters or {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    expected = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if factors is not None and len(factors) != expected:
            raise ValueError(
                f"`{name}` in `rope_parameters` of config.json must have {expected} numbers, one for each pair of a "
                f"head, but has {len(factors)}."
            )


def _refuse_parts(values: Mapping[str, Any]) -> None:
    for what, names in _REFUSED.items():
        for name in names:
            if values.get(name):
                raise ValueError(
                    f"The checkpoint has {what} (`{name}` is {values[name]!r}), which BlockGen models do not have: it "
                    "cannot be converted."
                )


def _refuse_windows(config: PreTrainedConfig) -> None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    has_windows = any(kind != "full_attention" for kind in kinds) if kinds else window is not None
    if has_windows and (window is None or window < config.max_position_embeddings):
        raise ValueError(
            f"The checkpoint attends in a sliding window (`sliding_window` is {window!r}, `max_position_embeddings` "
            f"{config.max_position_embeddings}), which BlockGen models do not: it cannot be converted."
        )


def blockgen_config(source: PreTrainedConfig, chosen: Choices, noisy_attention: str | None = None) -> BlockGenConfig:
    """
    The configuration here of a causal language model.

    Args:
        source: from [`source_config`].
        chosen: `diffusion_type` (default `"masked"`), `block_sizes` ([1, 2, 4, 8]) and `block_size_weights` (0.77 for
            block size 1, the others alike).
        noisy_attention: `"block"` (default) or `"causal"`.

    Raises:
        ValueError: settings that no model has.
    """
    if chosen.time_conditioning:
        raise ValueError("`time_conditioning` is for models with adaptive layer norms: leave it out.")
    kind = source.model_type
    bias = kind == "qwen2" or (kind in _WITH_ATTENTION_BIAS and source.attention_bias)
    sizes = _DEFAULT_SIZES if chosen.block_sizes is None else chosen.block_sizes
    weights = default_weights(sizes) if chosen.block_size_weights is None else chosen.block_size_weights
    fields = {name: getattr(source, name) for name in _SAME}
    fields["rope_parameters"] = deepcopy(dict(fields["rope_parameters"]))
    if fields["pad_token_id"] == NO_TOKEN:
        fields["pad_token_id"] = None
    return BlockGenConfig(
        **fields,
        head_dim=getattr(source, "head_dim", None),
        layer_norm_eps=source.rms_norm_eps,
        norm_type="rms_norm",
        gated_mlp=True,
        qk_norm=kind == "qwen3",
        attention_bias=bias,
        attention_output_bias=bias and kind != "qwen2",
        mlp_bias=kind in _WITH_MLP_BIAS and source.mlp_bias,
        lm_head_bias=False,
        no_rope_layers=list(source.no_rope_layers) if kind == "smollm3" else None,
        hidden_dropout=0.0,
        adaptive_layer_norm=False,
        diffusion_type=chosen.diffusion_type or "masked",
        block_sizes=list(sizes),
        block_size_weights=weights,
        ar_prediction="clean",
        noisy_attention=noisy_attention or "block",
    )


def default_weights(block_sizes: Sequence[int]) -> list[float] | None:
    """Weights by which the autoregressive loss counts 1.0, and the losses of all larger blocks 0.3 together."""
    if 1 not in block_sizes or len(block_sizes) == 1:
        return None
    rest = (1 - _AR_SHARE) / (len(block_sizes) - 1)
    return [_AR_SHARE if size == 1 else rest for size in block_sizes]


def causal_config(config: BlockGenConfig) -> PreTrainedConfig:
    """
    The configuration of transformers for the causal language model that a BlockGen model is at block size 1.

    Raises:
        ValueError: none of [`MODEL_TYPES`] has its layers.
    """
    needed = {
        "ar_prediction": "clean",
        "norm_type": "rms_norm",
        "gated_mlp": True,
        "lm_head_bias": False,
        "adaptive_layer_norm": False,
    }
    wrong = [
        f"`{name}` is {getattr(config, name)!r}" for name, value in needed.items() if getattr(config, name) != value
    ]
    if wrong:
        raise ValueError(f"The model is no causal language model of transformers: {', '.join(wrong)}.")
    fields = {name: deepcopy(getattr(config, name)) for name in _SAME}
    fields |= {"rms_norm_eps": config.layer_norm_eps, "head_dim": config.head_dim}
    kind = "llama"
    if config.qk_norm:
        kind = "qwen3"
    elif config.attention_bias and not config.attention_output_bias:
        kind = "qwen2"
    elif config.no_rope_layers is not None:
        kind, fields["no_rope_layers"] = "smollm3", config.no_rope_layers
    if kind in _WITH_ATTENTION_BIAS:
        fields["attention_bias"] = config.attention_bias
    if kind in _WITH_MLP_BIAS:
        fields["mlp_bias"] = config.mlp_bias
    made = CONFIG_MAPPING[kind](**fields)
    again = blockgen_config(made, Choices())
    for name in ("head_dim", "attention_bias", "attention_output_bias", "mlp_bias", "qk_norm", "no_rope_layers"):
        if getattr(again, name) != getattr(config, name):
            raise ValueError(
                f"The model is no causal language model of transformers: no {kind} has `{name}` "
                f"{getattr(config, name)!r} beside its other settings."
            )
    made.architectures = [_ARCHITECTURES[kind]]
    return made


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}

__all__ = ["MODEL_TYPES", "NO_TOKEN", "blockgen_config", "causal_config", "default_weights", "source_config"]
