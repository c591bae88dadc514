"""What a model's card can say without measuring anything: of its configuration, its weights and its origin."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..modeling.configuration_blockgen import BlockGenConfig
from ..places import is_hub_id
from .files import ADAPTER_CONFIG, CONFIG, CONVERSION, TOKENIZER_CONFIG, read_json
from .layouts import CAUSAL_LM
from .sources import HUB_PREFIX
from .weights import SavedTensor, count_values, read_tensors


Rows = list[tuple[str, str]]

_DIFFUSIONS = {"masked": "masked (absorbing)", "uniform": "uniform-state"}
_OBJECTIVES = {"cross_entropy": "cross entropy", "elbo": "ELBO"}
_CLEAN_ATTENTIONS = {"causal": "causal", "block_causal": "block-causal: a token sees its whole block"}
_DESCRIPTIONS = {
    "ar": "One token after the other.",
    "block_diffusion": "A block of `block_size` tokens after the other, each denoised in `denoising_steps` steps.",
    "arpc": "Block diffusion; the model's autoregressive predictions pick out unlikely tokens, which return to noise.",
    "speculative": 'The text of `"ar"` in fewer passes: the model drafts a block, then verifies it autoregressively.',
}
_NEW_TOKENS = 64


@dataclass(frozen=True)
class Decoding:
    """A decoding that the model was trained for, and the arguments of `generate` that a card shows."""

    name: str
    arguments: str

    @property
    def description(self) -> str:
        return _DESCRIPTIONS[self.name]


@dataclass(frozen=True)
class ModelFacts:
    """
    Args:
        config ([`BlockGenConfig`]): of the model; None for an adapter, whose base model has it.
        tensors (`dict[str, SavedTensor]`): what is stored.
        base_model (`str`, *optional*): what an adapter is for, or a causal language model that was converted.
        has_tokenizer (`bool`): whether the folder brings one.
        conversion (`dict`, *optional*): what `blockgen-hf convert` left: the source, and its family.
        adapter (`dict`, *optional*): settings of an adapter beside the model, which is loaded with it.
    """

    config: BlockGenConfig | None
    tensors: dict[str, SavedTensor]
    base_model: str | None
    has_tokenizer: bool
    conversion: dict[str, Any] | None
    adapter: dict[str, Any] | None = None

    @property
    def is_full_sequence(self) -> bool:
        config = self.config
        return (
            config is not None
            and len(config.block_sizes) == 1
            and self.largest_block >= config.max_position_embeddings
        )

    @property
    def is_autoregressive(self) -> bool:
        return self.config is not None and self.config.block_sizes == [1]

    @property
    def largest_block(self) -> int:
        return 1 if self.config is None else max(self.config.block_sizes)

    @property
    def kind(self) -> str:
        """In a few words."""
        if self.config is None:
            return "An adapter (PEFT) of a BlockGen language model"
        if self.config.next_token_prediction:
            return "An autoregressive language model, a dense causal transformer"
        if self.is_autoregressive:
            return "An autoregressive language model"
        name = f"{self.config.diffusion_type} diffusion language model"
        if self.is_full_sequence:
            return f"A full-sequence {name}"
        return f"A block-wise {name}"

    @property
    def tags(self) -> list[str]:
        tags = ["blockgen"]
        if self.config is None:
            return [*tags, "lora"]
        if self.is_autoregressive:
            tags.append("autoregressive")
        else:
            tags += ["diffusion", f"{self.config.diffusion_type}-diffusion"]
            if not self.is_full_sequence:
                tags.append("block-diffusion")
        return [*tags, "custom_code"]

    def decodings(self) -> list[Decoding]:
        """Those that the model was trained for, the one to begin with first."""
        if self.config is None:
            return []
        new_tokens = f"max_new_tokens={min(_NEW_TOKENS, self.config.max_position_embeddings // 2)}"
        if self.is_autoregressive:
            return [Decoding("ar", new_tokens)]
        size = self.largest_block
        if self.is_full_sequence:
            return [Decoding("block_diffusion", f"block_size={size}, denoising_steps={size}, max_new_tokens={size}")]
        blocks = f"block_size={size}, {new_tokens}"
        if 1 not in self.config.block_sizes:
            return [Decoding("block_diffusion", blocks)]
        names = ("arpc", "block_diffusion", "speculative")
        return [*(Decoding(name, blocks) for name in names), Decoding("ar", new_tokens)]

    def decoding_rows(self) -> Rows:
        """The decodings and what they are, as a table."""
        return [(f'`"{decoding.name}"`', decoding.description) for decoding in self.decodings()]

    def rows(self) -> Rows:
        """What it is, as a table."""
        stored = sorted({tensor.dtype_name for tensor in self.tensors.values()})
        size = [("Parameters", f"{count_values(self.tensors):,}"), ("Stored as", ", ".join(stored))]
        if self.adapter is not None:
            size.append(("Adapter (PEFT)", f"LoRA of rank {self.adapter.get('r')}, on noisy tokens only"))
        return size if self.config is None else [*_configuration_rows(self.config), *size]


def _configuration_rows(config: BlockGenConfig) -> Rows:
    rows: Rows = []
    if not config.next_token_prediction:
        objective = _OBJECTIVES[str(config.training_objective)]
        diffusion = f"{_DIFFUSIONS[config.diffusion_type]}, {config.noise_schedule} schedule, trained by {objective}"
        rows = [("Diffusion", diffusion), ("Block sizes", ", ".join(map(str, config.block_sizes)))]
        if config.block_size_weights is not None and len(config.block_sizes) > 1:
            weights = ", ".join(f"{weight:g}" for weight in config.block_size_weights)
            rows.append(("Their weights in training", weights))
        rows.append(("Attention among clean tokens", _CLEAN_ATTENTIONS[config.clean_attention]))
        time = "noise level" if config.time_conditioning else "none"
        rows.append(("Time conditioning", time if config.adaptive_layer_norm else "none, no adaptive layer norm"))
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size)
    rows.append(("Layers, width, heads, MLP", ", ".join(map(str, sizes))))
    rows.append(("Positions", f"{config.max_position_embeddings:,}"))
    mask = "" if config.mask_token_id is None else f", mask token {config.mask_token_id}"
    return [*rows, ("Vocabulary", f"{config.vocab_size:,}{mask}")]


def read_model(folder: Path) -> ModelFacts:
    """
    Raises:
        ValueError: the folder holds no BlockGen model, nor an adapter with the name of its base model.
    """
    tensors = read_tensors(folder)
    has_tokenizer = (folder / TOKENIZER_CONFIG).is_file()
    conversion = read_json(folder / CONVERSION) if (folder / CONVERSION).is_file() else None
    if (folder / CONFIG).is_file():
        adapter = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else None
        base = _converted_from(conversion)
        return ModelFacts(read_config(folder), tensors, base, has_tokenizer, conversion, adapter)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder} holds no model: it has neither {CONFIG} nor {ADAPTER_CONFIG}.")
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not is_hub_id(base):
        raise ValueError(
            f"{ADAPTER_CONFIG} names {base!r} as base model, which nobody else can load: push the base model first, "
            "and write its name on the Hub into `base_model_name_or_path`."
        )
    return ModelFacts(None, tensors, base, has_tokenizer, conversion)


def _converted_from(conversion: dict[str, Any] | None) -> str | None:
    """The causal language model on the Hub that a folder was converted from."""
    if conversion is None or conversion.get("family") != CAUSAL_LM or not conversion.get("revision"):
        return None
    return "/".join(str(conversion["source"]).removeprefix(HUB_PREFIX).split("/")[:2])


def read_config(folder: Path) -> BlockGenConfig:
    """
    Raises:
        ValueError: config.json is damaged, or of another type of model.
    """
    values = read_json(folder / CONFIG)
    if values.get("model_type") != BlockGenConfig.model_type:
        raise ValueError(
            f"{folder / 'config.json'} is of a model of type {values.get('model_type')!r}, and must be of type "
            f"{BlockGenConfig.model_type!r}."
        )
    try:
        config: BlockGenConfig = BlockGenConfig.from_dict(values)
    except Exception as error:  # huggingface_hub, and fields of any type, raise all kinds
        raise ValueError(f"{folder / CONFIG} describes no model: {error}") from error
    return config


def first_prompt(config: BlockGenConfig | None) -> str:
    """Token ids to begin with where there is no tokenizer, as Python."""
    if config is not None and config.predicts_from_clean:
        token = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
        first = token[0] if isinstance(token, list) else token
        return f"torch.tensor([[{0 if first is None else first}]])"
    return "torch.empty(1, 0, dtype=torch.long)"


__all__ = [
    "Decoding",
    "ModelFacts",
    "Rows",
    "first_prompt",
    "read_config",
    "read_model",
]
