"""The tensors of a saved model: the headers of its safetensors files, their values, and what they should be."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..modeling.configuration_blockgen import BlockGenConfig
from ..modeling.modeling_blockgen import BlockGenForDiffusionLM
from .files import ADAPTER_WEIGHTS, CONFIG, INDEX, SHARDS, WEIGHTS, read_json


DTYPES = ("float32", "bfloat16", "float16")  # that a model can be in
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}
_LAYER = re.compile(r"\blayers\.(\d{1,9})\.")


@dataclass(frozen=True)
class SavedTensor:
    """Shape, dtype as safetensors writes it (`"F32"`), and the file that holds it."""

    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def dtype_name(self) -> str:
        return _DTYPES.get(self.dtype, self.dtype)


def read_tensors(folder: Path) -> dict[str, SavedTensor]:
    """
    Names and headers of all tensors; none is loaded.

    Raises:
        ValueError: no weights, two sets of them, shards that are missing or of another index, or a damaged file.
    """
    index, single = folder / INDEX, folder / WEIGHTS
    shards = {path.name for path in folder.glob(SHARDS)}
    if single.is_file() and (index.is_file() or shards):
        raise ValueError(
            f"{folder} holds {WEIGHTS} and shards ({min(shards | {index.name})}): one of the two is of an "
            "earlier save. Delete it."
        )
    if single.is_file():
        return read_file(single)
    if (folder / ADAPTER_WEIGHTS).is_file() and not index.is_file():
        return read_file(folder / ADAPTER_WEIGHTS)
    if not index.is_file():
        raise ValueError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX}.")
    return _read_shards(folder, index, shards)


def _read_shards(folder: Path, index: Path, shards: set[str]) -> dict[str, SavedTensor]:
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
        raise ValueError(f"{index} is damaged: it has no `weight_map` from tensors to files. Save the model again.")
    missing = sorted(set(named.values()) - shards)
    if missing:
        raise ValueError(f"{index.name} names {', '.join(missing)}, which {folder} does not hold.")
    others = sorted(shards - set(named.values()))
    if others:
        raise ValueError(
            f"{index.name} does not name {', '.join(others)}: of an earlier save? Delete what is not needed."
        )
    tensors: dict[str, SavedTensor] = {}
    for shard in sorted(shards):
        tensors.update(read_file(folder / shard))
    absent = sorted(name for name, shard in named.items() if name not in tensors or tensors[name].file != shard)
    if absent:
        raise ValueError(f"{absent[0]} is not in {named[absent[0]]}, where {index.name} says. Save the model again.")
    return tensors


def read_file(path: Path) -> dict[str, SavedTensor]:
    """
    Raises:
        ValueError: it is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            return {
                name: SavedTensor(tuple(found.get_shape()), str(found.get_dtype()), path.name)
                for name, found in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from error


class Weights:
    """The tensors of a folder, in one safetensors file or in several with an index; each is read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._tensors = read_tensors(folder)
        self._files = {
            file: safe_open(folder / file, framework="pt") for file in {saved.file for saved in self._tensors.values()}
        }
        self.shapes: Mapping[str, tuple[int, ...]] = {name: saved.shape for name, saved in self._tensors.items()}

    def dtype(self, names: Iterable[str], requested: str | None) -> torch.dtype:
        """
        The dtype that these weights have or, if `requested` is given, are to have.

        Raises:
            ValueError: they have several, or one that no model is in.
        """
        found = sorted({self._tensors[name].dtype_name for name in names})
        strange = [name for name in found if name not in (*DTYPES, "float64")]
        if strange:
            raise ValueError(f"The weights have the type {strange[0]}: quantised weights cannot be converted.")
        if requested is None and (len(found) > 1 or found == ["float64"]):
            raise ValueError(
                f"The weights are in {' and '.join(found)}, but a model is in one of "
                f"{', '.join(DTYPES)}: choose with `dtype` (--dtype)."
            )
        return getattr(torch, requested or found[0])

    def common_dtype(self, names: Iterable[str]) -> str | None:
        """The name of the type that these weights have; None if they have several."""
        found = {self._tensors[name].dtype_name for name in names}
        return found.pop() if len(found) == 1 else None

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """A tensor, or some of its rows."""
        file = self._files[self._tensors[name].file]
        return file.get_tensor(name) if start is None else file.get_slice(name)[start:stop]


def check_weights(config: BlockGenConfig, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """
    Compares weights with what a configuration asks for. The layers are counted first, so that nothing is built of a
    configuration with a hundred thousand of them.

    Raises:
        ValueError: they are not those of the configuration.
    """
    num_layers = len({match.group(1) for match in map(_LAYER.search, found) if match})
    if num_layers != config.num_hidden_layers:
        raise ValueError(
            f"The weights of {where} have {num_layers} layers, but its {CONFIG} says "
            f"`num_hidden_layers={config.num_hidden_layers}`. Take the {CONFIG} that was saved with these weights."
        )
    expected, tied = model_shapes(config, where)
    check_shapes(expected, found, tied, where)


def model_shapes(config: BlockGenConfig, where: str) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """
    Names and shapes of the weights of a model, and those of them that may be absent, as they are tied to others.

    Raises:
        ValueError: the configuration describes no model.
    """
    try:
        with torch.device("meta"):
            model = BlockGenForDiffusionLM(config)
    except (RuntimeError, ArithmeticError, TypeError, MemoryError) as error:
        raise ValueError(f"The {CONFIG} of {where} describes no model that can be built: {error}") from error
    tied = set(model._tied_weights_keys) if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, tied


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    optional: Collection[str],
    where: str,
) -> None:
    """
    Compares the names and shapes of weights with those that a configuration asks for.

    Args:
        optional: names that may be absent, or be there without being expected.

    Raises:
        ValueError: missing and unknown tensors, and those of another shape.
    """
    problems = {
        "missing": [name for name in expected if name not in found and name not in optional],
        "unknown": [name for name in found if name not in expected and name not in optional],
        "of another shape": [
            f"{name} is {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    words = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if words:
        raise ValueError(
            f"The weights of {where} are not those of its {CONFIG}; {'; '.join(words)}. Take the {CONFIG} that was "
            "saved with these weights; if this is the one, they are those of another architecture."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def check_values(folder: Path, tensors: Mapping[str, SavedTensor]) -> None:
    """
    Reads every tensor, one at a time.

    Raises:
        ValueError: a value that is NaN or infinite.
    """
    for file in sorted({saved.file for saved in tensors.values()}):
        with safe_open(folder / file, framework="pt") as opened:
            for name in sorted(name for name, saved in tensors.items() if saved.file == file):
                value = opened.get_tensor(name)
                saved_as = tensors[name].dtype_name
                if value.is_floating_point() and not value.to(_readable(value.dtype)).isfinite().all():
                    raise ValueError(
                        f"{folder / file} gives {name} values that are NaN or infinite in {saved_as}: the model is "
                        "damaged, or its training diverged. Take another checkpoint."
                    )


def _readable(dtype: torch.dtype) -> torch.dtype:
    """Types of eight bits have no test of their own."""
    return torch.float32 if dtype.itemsize == 1 else dtype


def name_of(dtype: torch.dtype) -> str:
    """`torch.float32` as a config.json has it: `float32`."""
    return str(dtype).removeprefix("torch.")


def count_values(tensors: dict[str, SavedTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


__all__ = [
    "DTYPES",
    "SavedTensor",
    "Weights",
    "check_shapes",
    "check_values",
    "check_weights",
    "count_values",
    "name_of",
    "read_file",
    "read_tensors",
]
