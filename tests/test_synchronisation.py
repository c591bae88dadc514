"""How often a host has to wait for its device: calls whose result Python, or the shape of a tensor, depends on."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import generate, record_forwards, tiny_model, words
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts them by name; on a CPU they are the same calls."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = (
            [index for index in args[1] if index is not None] if name in ("index", "index_put", "index_put_") else []
        )
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"):
            self.counts[name] += 1
        elif any(mask.dtype == torch.bool for mask in masks):
            self.counts["nonzero"] += 1
        return function(*args, **(kwargs or {}))


def waits_of(call: Callable[[], Any]) -> Counter[str]:
    with Waits() as waits:
        call()
    return waits.counts


def per_pass(settings: dict[str, Any]) -> dict[str, float]:
    """Of a text of 16 tokens more than of one of 8, for each of its further passes."""
    model, found = tiny_model(), []
    for length in (8, 16):
        with record_forwards(model) as calls:
            counts = waits_of(lambda length=length: generate(model, words(2, 8), max_new_tokens=length, **settings))
        found.append((len(calls), counts))
    (few, before), (many, after) = found
    return {name: (after[name] - before[name]) / (many - few) for name in after}


def test_ar_waits_once_a_token() -> None:
    """To see whether all rows have ended."""
    found = per_pass({"decoding": "ar"})
    assert found.pop("_local_scalar_dense") == 1 and not any(found.values())


def test_block_diffusion_waits_to_leave_passes_out() -> None:
    """Which tokens are due, how many, and their logits; once per block whether all rows have ended."""
    found = per_pass({"decoding": "block_diffusion", "block_size": 8, "denoising_steps": 8})
    assert found["_local_scalar_dense"] <= 2.5 and found["nonzero"] <= 2


@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_training_waits_at_most_once(variant: str) -> None:
    """To find the tokens that are scored."""
    model, text = tiny_model(variant).train(), words(2, 32)
    counts = waits_of(lambda: model(text, labels=text, block_size=4).loss.backward())
    assert sum(counts.values()) <= 1
