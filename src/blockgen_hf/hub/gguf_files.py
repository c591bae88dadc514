"""GGUF files that transformers would read as other models than they are."""

from pathlib import Path
from typing import Any

from ..errors import first_line


_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def check_gguf(file: Path) -> None:
    """
    Args:
        file: a GGUF file; the package gguf is installed.

    Raises:
        ValueError: its rotary embedding is scaled, which transformers does not read, or it is damaged.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        tensors = [tensor.name for tensor in reader.tensors if tensor.name in _ROPE_TENSORS]
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if ".rope.scaling." in name or name.endswith(".rope.scale_linear")
        }
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ValueError(f"{file} is no GGUF file, or damaged: {first_line(error)}") from error
    found = [*tensors, *(f"{name} = {value!r}" for name, value in _scaling(fields).items())]
    if found:
        raise ValueError(
            f"{file} scales its rotary embedding ({', '.join(found)}), which transformers does not read from GGUF "
            "files: convert the original checkpoint instead, a folder or hf:org/name."
        )


def _scaling(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that scale, as llama.cpp reads them: a factor without a type is one of linear scaling."""
    kinds = {name: kind for name, kind in fields.items() if name.endswith(".rope.scaling.type")}
    if kinds:
        return {name: kind for name, kind in kinds.items() if kind != "none"}
    factors = (".rope.scaling.factor", ".rope.scale_linear")
    return {name: value for name, value in fields.items() if name.endswith(factors) and value not in (0, 1)}


__all__ = ["check_gguf"]
