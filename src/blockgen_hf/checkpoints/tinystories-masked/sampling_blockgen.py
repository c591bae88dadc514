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
Random numbers for discrete diffusion: draws that are keyed by what they are for, and exact categorical sampling.

A generation that batches, pads, streams and stops rows early gives each row the same text as it has alone only if its
random numbers do not depend on who else is drawn at the same time. [`CounterGenerator`] therefore computes them from a
key (seed, row, position, step, purpose), the idea of counter-based generators (Salmon et al., 2011), instead of
handing them out in the order of the calls. torch has no such generator in its public interface.
"""

import torch


# Said where tokens are drawn, and where the most likely is taken.
NO_DISTRIBUTION = (
    "the predictions of the model are NaN, infinite or all zero: its weights are damaged or overflow in this dtype, "
    "or the settings suppress every token"
)

# Odd constants of the SplitMix64 generator (Steele, Lea, Flood, 2014), as signed 64-bit integers.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def _wrapped(value: int) -> int:
    """The int64 that a product or sum of int64 wraps to."""
    return (value + 2**63) % 2**64 - 2**63


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (`>>` on a signed tensor copies the sign bit)."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix(values: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser: a bijection of the 64-bit integers whose output looks random. int64 products wrap."""
    values = (values ^ _shift_right(values, 30)) * _MULTIPLIER_1
    values = (values ^ _shift_right(values, 27)) * _MULTIPLIER_2
    return values ^ _shift_right(values, 31)


class CounterGenerator:
    """
    A source of random numbers without state: one key an element, and every draw is a function of the keys.

    Args:
        keys (`torch.LongTensor`): any shape; elements with equal keys get equal numbers.

    ```python
    >>> rows = CounterGenerator.from_seed(0, device="cpu").fold_in(torch.arange(2)[:, None])  # a key a row, `[2, 1]`
    >>> rows.fold_in(torch.arange(3)).uniform().shape  # a number a row and position
    torch.Size([2, 3])
    ```
    """

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys

    @classmethod
    def from_seed(cls, seed: int, device: torch.device | str) -> "CounterGenerator":
        return cls(_mix(torch.tensor(seed, dtype=torch.int64, device=device) + _GOLDEN_GAMMA))

    def fold_in(self, *values: int | torch.Tensor) -> "CounterGenerator":
        """
        A generator whose keys depend on the values too: integers, or tensors of them that broadcast with the keys. A
        number is the same key in every integer type.
        """
        keys = self.keys
        for value in values:
            if isinstance(value, int):
                keys = _mix(keys + _wrapped(_GOLDEN_GAMMA * value))
                continue
            number = torch.as_tensor(value, device=keys.device)
            if number.is_floating_point():
                raise TypeError(f"keys of random numbers must be integers, but are of type {number.dtype}.")
            keys = _mix(keys + _GOLDEN_GAMMA * number.long())
        return CounterGenerator(keys)

    def select(self, rows: torch.Tensor) -> "CounterGenerator":
        """The generator of some rows: `rows` indexes the first dimension of the keys."""
        return CounterGenerator(self.keys[rows])

    def uniform(self, index: int = 0) -> torch.Tensor:
        """Numbers in [0, 1), float64 with 53 random bits, of the keys' shape. Different indices are independent."""
        return _shift_right(self.fold_in(index).keys, 11).to(torch.float64) * 2.0**-53


RandomSource = torch.Generator | CounterGenerator | None


def argsort_at_random(values: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """
    Indices that sort the last dimension in ascending order, with equal values in an order drawn at random.

    A ranking that leaves equal values in their places prefers the beginning of a block, and changes the law of what is
    drawn.

    Args:
        values (`torch.Tensor` of shape `[..., n]`): what is sorted.
        uniform (`torch.Tensor` of shape `[..., n]`): random numbers in [0, 1).

    Returns:
        `torch.LongTensor` of shape `[..., n]`.
    """
    shuffle = uniform.argsort(dim=-1)
    return shuffle.gather(-1, values.gather(-1, shuffle).argsort(dim=-1, stable=True))


def draw_uniform(
    shape: tuple[int, ...], device: torch.device | str, generator: RandomSource, index: int = 0
) -> torch.Tensor:
    """
    Uniform numbers in [0, 1), float64. A `CounterGenerator` must have keys of this shape, and tells draws of one
    purpose apart by `index`; a `torch.Generator` (None: torch's default one) tells them apart by its state.
    """
    if isinstance(generator, CounterGenerator):
        return generator.uniform(index).expand(shape)
    return torch.rand(shape, dtype=torch.float64, device=device, generator=generator)


def draw_token(uniform: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Ids of the uniform distribution over the vocabulary, from uniform numbers in [0, 1)."""
    return (uniform * vocab_size).long().clamp_(max=vocab_size - 1)


def sample_categorical(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """
    One draw from each categorical distribution by inversion of its cumulative distribution, for one random number a
    draw.

    The vocabulary is cut into about sqrt(V) chunks: a cumulative sum over the chunks' masses finds the chunk, one
    within the chunk finds the token. What is summed over many is summed in float64, so that every token, however
    unlikely, has its probability up to the relative rounding of the masses themselves (1e-6 for float32, 1e-15 for
    float64) and the 2^-53 between two uniform numbers, as in float64 sampling. Gumbel noise in float32 truncates the
    tail of the distribution instead, and lowers the entropy of the text (Zheng et al., 2025).

    Args:
        probs (`torch.Tensor` of shape `[..., V]`): non-negative masses, computed with in float32 at least; they need
            not add up to 1.
        uniform (`torch.Tensor` of shape `[...]`): numbers in [0, 1), float64.

    Returns:
        `torch.LongTensor` of shape `[...]`. A token of zero mass is never drawn.

    Raises:
        RuntimeError: masses that are NaN, infinite or all zero, as of a model whose numbers overflowed; on a GPU, as
            `torch.multinomial`, only when its queue gets there.
    """
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    vocab_size = probs.shape[-1]
    width = int(vocab_size**0.5) + 1
    num_chunks = -(-vocab_size // width)
    if num_chunks * width != vocab_size:
        probs = torch.nn.functional.pad(probs, (0, num_chunks * width - vocab_size))
    chunks = probs.unflatten(-1, (num_chunks, width))
    masses = chunks.sum(-1)
    total = masses.sum(-1)
    torch._assert_async(((total > 0) & (total < torch.inf)).all(), NO_DISTRIBUTION)
    cumulative, target, chunk = _invert(masses, uniform)
    end = cumulative.gather(-1, chunk)
    start = torch.where(chunk > 0, cumulative.gather(-1, (chunk - 1).clamp(min=0)), 0.0)
    place = ((target - start) / (end - start)).clamp(0, 1).squeeze(-1)  # in the chunk's share of the masses
    inside = torch.take_along_dim(chunks, chunk[..., None], dim=-2).squeeze(-2)
    _, _, token = _invert(inside, place)
    return (chunk * width + token).squeeze(-1)


def _invert(masses: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The cumulative masses `[..., n]`, the share of them that the number in [0, 1) stands for, and the index into which
    it falls, `[..., 1]` both.
    """
    cumulative = masses.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:]
    # Rounding may lift the target to the total, behind the last index of positive mass.
    target = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return cumulative, target, (cumulative <= target).sum(-1, keepdim=True)


__all__ = [
    "NO_DISTRIBUTION",
    "CounterGenerator",
    "argsort_at_random",
    "draw_token",
    "draw_uniform",
    "sample_categorical",
]
