"""
Adapters (PEFT) of converted causal language models, which act on noisy tokens alone and cannot be merged into weights:
in one folder with their base, and beside the plain causal language model.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..modeling.configuration_blockgen import BlockGenConfig
from ..whole_files import write_json
from .conversion_output import new_folder
from .files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    CONFIG,
    CONVERSION,
    MODEL_FILES,
    RECIPE,
    STATE,
    TOKENIZER_CONFIG,
    WEIGHT_FILES,
    copy_tokenizer,
    matches,
    read_json,
)
from .sources import Source


PLAIN_ADAPTER = "adapter"  # the folder beside the plain weights
_OF_A_LAYER = re.compile(r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj\.lora_[AB]\.weight")
# What a plain LoRA does not have, and servers that read one do not know.
_PLAIN_LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def join_adapter(source: Source, output: Path, overwrite: bool) -> tuple[BlockGenConfig, bool]:
    """
    Writes one folder with the base, bit by bit, its code and the adapter: `from_pretrained` loads all of it.

    Args:
        source: a base model of this package, with an adapter in a folder of its own.

    Returns:
        the configuration, and whether there is a tokenizer.

    Raises:
        ValueError: the adapter can be merged into the weights instead.
    """
    adapter = _adapter(source)
    config = BlockGenConfig.from_dict(dict(source.config))
    if config.adapter_rows != "noisy":
        raise ValueError(
            f"The adapter {adapter} acts on all tokens (`adapter_rows` of its base is {config.adapter_rows!r}): merge "
            "it into the weights with PEFT's `merge_and_unload()`."
        )
    files = [path for path in source.folder.iterdir() if matches(path.name, (CONFIG, *WEIGHT_FILES, *MODEL_FILES))]
    files += [adapter / name for name in (*ADAPTER_FILES, RECIPE, STATE) if (adapter / name).is_file()]
    conversion = source.folder / CONVERSION
    with new_folder(output, overwrite) as folder:
        for path in files:
            shutil.copy(path, folder / path.name)
        copy_tokenizer(source.folder if (source.folder / TOKENIZER_CONFIG).is_file() else adapter, folder)
        # The folder that it is in: transformers looks for the base there, and PEFT where this says.
        write_json(folder / ADAPTER_CONFIG, {**_settings(adapter), "base_model_name_or_path": str(output.resolve())})
        written = sorted([*(path.name for path in folder.iterdir()), CONVERSION])
        notes = read_json(conversion) if conversion.is_file() else {}
        write_json(folder / CONVERSION, {**notes, "files": written})
    return config, (output / TOKENIZER_CONFIG).is_file()


def check_plain_adapter(source: Source, config: BlockGenConfig) -> None:
    """
    Raises:
        ValueError: over the plain causal language model, the adapter would not be what it is here.
    """
    adapter = _adapter(source)
    if config.diffusion_type != "uniform" or config.noisy_attention != "causal":
        raise ValueError(
            "An adapter goes with a plain causal language model only if its noise consists of tokens and its tokens "
            "see what is before them: `diffusion_type` must be 'uniform' and `noisy_attention` 'causal', but are "
            f"{config.diffusion_type!r} and {config.noisy_attention!r}. For the weights alone, {_without(source)}."
        )
    settings = _settings(adapter)
    wrong = [
        f"`{name}` is {settings[name]!r}"
        for name, plain in _PLAIN_LORA.items()
        if name in settings and (settings[name] or None) != (plain or None)
    ]
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        wrong += [f"it has {name}" for name in sorted(file.keys()) if not _OF_A_LAYER.fullmatch(name)][:1]
    if wrong:
        raise ValueError(f"{adapter} must be a plain LoRA of the layers to be written so, but {', '.join(wrong)}.")


def _without(source: Source) -> str:
    if source.adapter == source.folder:
        return f"convert a copy of {source.name} without the files {' and '.join(ADAPTER_FILES)}"
    return f"convert the base, {source.name}"


def write_plain_adapter(source: Source, folder: Path, base: str) -> None:
    """
    Writes the adapter as one of the plain causal language model, whose tensors have the same names.

    Args:
        base: where that model is, or will be.
    """
    adapter = _adapter(source)
    folder.mkdir()
    shutil.copy(adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    changes = {"base_model_name_or_path": base, "revision": None, "auto_mapping": None}
    write_json(folder / ADAPTER_CONFIG, {**_settings(adapter), **changes})


def _adapter(source: Source) -> Path:
    if source.adapter is None:
        raise ValueError(f"{source.name} has no adapter.")
    return source.adapter


def _settings(adapter: Path) -> dict[str, Any]:
    return dict(read_json(adapter / ADAPTER_CONFIG))


__all__ = ["PLAIN_ADAPTER", "check_plain_adapter", "join_adapter", "write_plain_adapter"]
