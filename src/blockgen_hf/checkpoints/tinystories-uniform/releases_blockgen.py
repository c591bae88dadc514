# Copyright 2026 The blockgen-hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
What differs between the supported releases of transformers, in one place.

transformers 5.24 renamed `past_key_values` to `cache`: in `generate`, in what `GenerationMixin` passes to `forward`,
and in outputs. Our own code says `cache`; what users pass and read may have both names. When 5.24 is the oldest
supported release, all of this module can go, except [`given_cache`] as long as callers may use the old name.
"""

from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast


_NAMES = ("cache", "past_key_values")

# What this release calls it, in the keywords of `generate`, in `GenerationMixin`, and as a field of outputs.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def named_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """The keyword argument that this release of transformers takes a cache by."""
    return {CACHE_NAME: cache}


def given_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """
    The cache, under whichever of its two names it was passed.

    Raises:
        ValueError: both names were passed.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: pass one of them.")
    return past_key_values if cache is None else cache


def take_cache(arguments: dict[str, Any]) -> Cache | None:
    """Removes the cache from keyword arguments, under whichever name it stands there, and returns it."""
    return given_cache(*(arguments.pop(name, None) for name in _NAMES))


class BothCacheNames:
    """Outputs whose cache is read by both names. From 5.24 on, `ModelOutput` knows the old name itself."""

    if CACHE_NAME != "cache":

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values  # type: ignore[attr-defined]

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__(CACHE_NAME if key == "cache" else key)  # type: ignore[misc]


__all__ = ["CACHE_NAME", "BothCacheNames", "given_cache", "named_cache", "take_cache"]
