"""What a training step draws: Algorithm 2, its law over many steps, and that only seed, step and place matter."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chisquare, kstest
from tiny import MASK, PAD, VARIANTS, VOCAB_SIZE, tiny_config, tiny_model, words
from training import TokenRows, make_trainer

from blockgen_hf.modeling.diffusion_blockgen import diffusion_from_config
from blockgen_hf.training import stratified_block_sizes
from blockgen_hf.training.collator import BlockGenDataCollator
from blockgen_hf.training.draws import StepDraws, corrupt_batch


BELOW_ONE = math.nextafter(1.0, 0.0)
SIZES = [1, 2, 4, 8, 16]
UNIFORM = [0.2] * 5
MOSTLY_AR = [0.8, 0.05, 0.05, 0.05, 0.05]


def bounds(num_slots: int, share: float) -> tuple[int, int]:
    """Floor and ceil of the mean; a mean that is whole up to rounding is whole."""
    mean = num_slots * share
    if abs(mean - round(mean)) < 1e-9:
        return round(mean), round(mean)
    return math.floor(mean), math.ceil(mean)


# Algorithm 2


@pytest.mark.parametrize(
    "weights, num_slots, u, expected",
    [
        ([0.5, 0.25, 0.25], 4, 0.1, [1, 1, 2, 4]),  # 0.1, 0.35, 0.6, 0.85
        ([0.5, 0.25, 0.25], 4, 0.2, [1, 1, 2, 4]),
        ([0.5, 0.25, 0.25], 4, 0.9, [4, 1, 1, 2]),  # 0.9, 0.15, 0.4, 0.65
        ([0.7, 0.2, 0.1], 5, 0.15, [1, 1, 1, 2, 4]),  # 0.15, 0.35, 0.55, 0.75, 0.95
        ([0.7, 0.2, 0.1], 5, 0.05, [1, 1, 1, 1, 2]),  # 0.05, 0.25, 0.45, 0.65, 0.85
        ([0.7, 0.2, 0.1], 2, 0.5, [1, 1]),  # 0.5, 0.0
        ([14, 4, 2], 5, 0.15, [1, 1, 1, 2, 4]),  # any unit
        (None, 3, 0.0, [1, 2, 4]),
        (None, 3, 0.5, [2, 4, 1]),
        ([0.0, 1.0, 0.0], 3, 0.3, [2, 2, 2]),
    ],
)
def test_algorithm_2_by_hand(weights: list[float] | None, num_slots: int, u: float, expected: list[int]) -> None:
    assert stratified_block_sizes([1, 2, 4], weights, num_slots, u) == expected


DISTRIBUTIONS = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=12).filter(any)


@given(
    weights=DISTRIBUTIONS,
    num_slots=st.integers(1, 64),
    u=st.one_of(st.floats(0, 1, exclude_max=True), st.just(0.0), st.just(BELOW_ONE)),
)
@settings(max_examples=150)
def test_every_size_is_given_to_floor_or_ceil_of_its_mean_of_slots(
    weights: list[float], num_slots: int, u: float
) -> None:
    sizes = [2**power for power in range(len(weights))]
    counts = Counter(stratified_block_sizes(sizes, weights, num_slots, u))
    assert sum(counts.values()) == num_slots
    for size, weight in zip(sizes, weights, strict=True):
        mean = num_slots * weight / math.fsum(weights)
        assert mean - 1 - 1e-9 < counts[size] < mean + 1 + 1e-9
        if weight == 0:
            assert size not in counts


@pytest.mark.parametrize(
    "weights",
    [[0.5, 0.5, 0.0], [0.1] * 10, [1 / 3] * 3, [0.0, 0.5, 0.0, 0.5, 0.0], [1e-300, 1.0, 0.0], [0.7, 0.2, 0.1, 0.0]],
    ids=str,
)
def test_rounding_at_the_ends_never_draws_a_size_of_weight_zero(weights: list[float]) -> None:
    """Sums of floats end a little below or above 1; the last interval still ends at 1."""
    sizes = list(range(1, len(weights) + 1))
    possible = [size for size, weight in zip(sizes, weights, strict=True) if weight > 0]
    for u in (0.0, 0.5, 1 - 1e-12, BELOW_ONE):
        for num_slots in (1, 2, 3, 7, 8, 10, 64):
            assert set(stratified_block_sizes(sizes, weights, num_slots, u)) <= set(possible), (u, num_slots)
    assert stratified_block_sizes(sizes, weights, 1, 0.0) == [possible[0]]
    assert stratified_block_sizes(sizes, weights, 1, BELOW_ONE) == [possible[-1]]


@pytest.mark.parametrize("weights", [UNIFORM, MOSTLY_AR, [0.0, 0.3, 0.0, 0.6, 0.1]], ids=str)
def test_each_slot_has_the_weights_as_its_law(weights: list[float]) -> None:
    """Over a grid of u the shares are exact up to the grid."""
    grid, num_slots = 4000, 6
    slots: list[Counter[int]] = [Counter() for _ in range(num_slots)]
    for i in range(grid):
        for slot, size in enumerate(stratified_block_sizes(SIZES, weights, num_slots, (i + 0.5) / grid)):
            slots[slot][size] += 1
    for counts in slots:
        for size, weight in zip(SIZES, weights, strict=True):
            assert counts[size] / grid == pytest.approx(weight, abs=2 / grid)


@pytest.mark.parametrize(
    "arguments, name",
    [
        (([1, 2], [1.0], 2, 0.0), "weights"),
        (([1, 2], [1.0, -0.5], 2, 0.0), "weights"),
        (([1, 2], [0.0, 0.0], 2, 0.0), "weights"),
        (([1, 2], [1.0, math.nan], 2, 0.0), "weights"),
        (([1, 2], [1.0, math.inf], 2, 0.0), "weights"),
        (([1, 2], None, 0, 0.0), "num_slots"),
        (([1, 2], None, 2, 1.0), "u"),
        (([1, 2], None, 2, -0.1), "u"),
        (([1, 2], None, 2, math.nan), "u"),
    ],
)
def test_what_is_no_distribution_or_no_slot_is_refused(arguments: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        stratified_block_sizes(*arguments)


# Block sizes over the steps of a run


@pytest.mark.parametrize(
    "num_steps, weights",
    [
        (1000, UNIFORM),
        pytest.param(10_000, UNIFORM, marks=pytest.mark.slow),
        pytest.param(10_000, MOSTLY_AR, marks=pytest.mark.slow),
    ],
    ids=["uniform_short", "uniform", "mostly_ar"],
)
def test_over_many_steps_counts_and_slots_follow_the_stratified_law(num_steps: int, weights: list[float]) -> None:
    num_slots = 8
    drawn = torch.tensor(
        [
            StepDraws(0, step, num_slots).block_sizes(SIZES, weights, num_slots, "stratified")
            for step in range(num_steps)
        ]
    )
    for size, weight in zip(SIZES, weights, strict=True):
        counts = (drawn == size).sum(-1)
        low, high = bounds(num_slots, weight)
        assert counts.min() >= low and counts.max() <= high
        # Both occur, as often as the mean asks for.
        share = num_slots * weight - low
        more = int((counts == high).sum()) if high > low else 0
        assert binom.cdf(more, num_steps, share) > 1e-4 and binom.sf(more - 1, num_steps, share) > 1e-4
    for slot in range(num_slots):
        observed = [int((drawn[:, slot] == size).sum()) for size in SIZES]
        assert chisquare(observed, [weight * num_steps for weight in weights]).pvalue > 1e-4


def test_the_slots_of_a_step_are_permuted() -> None:
    """A rank has no stretch of the intervals of its own: pairs of slots agree as often as any other pair does."""
    drawn = torch.tensor(
        [StepDraws(3, step, 8).block_sizes([1, 2, 4, 8], None, 8, "stratified") for step in range(800)]
    )
    for other in range(1, 8):
        agree = int((drawn[:, 0] == drawn[:, other]).sum())  # each size twice: 1 of 7 other slots has the same
        assert binom.cdf(agree, 800, 1 / 7) > 1e-4 and binom.sf(agree - 1, 800, 1 / 7) > 1e-4


def test_independent_draws_spread_as_the_binomial_law() -> None:
    num_slots, num_steps, share = 8, 2000, 0.2
    counts = Counter(
        StepDraws(0, step, num_slots).block_sizes(SIZES, UNIFORM, num_slots, "independent").count(4)
        for step in range(num_steps)
    )
    observed = [counts[k] for k in range(5)] + [sum(counts[k] for k in range(5, 9))]
    expected = [binom.pmf(k, num_slots, share) * num_steps for k in range(5)] + [
        binom.sf(4, num_slots, share) * num_steps
    ]
    assert chisquare(observed, expected).pvalue > 1e-4


def test_shared_draws_give_all_slots_one_size() -> None:
    drawn = [StepDraws(0, step, 8).block_sizes(SIZES, MOSTLY_AR, 8, "shared") for step in range(2000)]
    assert all(len(set(sizes)) == 1 for sizes in drawn)
    observed = [sum(sizes[0] == size for sizes in drawn) for size in SIZES]
    assert chisquare(observed, [2000 * weight for weight in MOSTLY_AR]).pvalue > 1e-4


@pytest.mark.parametrize("sampling", ["stratified", "independent", "shared"])
def test_block_sizes_are_a_function_of_seed_and_step(sampling: str) -> None:
    def run(seed: int, first: int = 0) -> list[list[int]]:
        return [StepDraws(seed, step, 8).block_sizes(SIZES, None, 8, sampling) for step in range(first, first + 20)]

    assert run(0) == run(0)
    assert run(0) != run(1) != run(2)
    assert run(0) != run(0, first=1)
    assert run(0)[5:] == run(0, first=5)[:15]  # as after a resume


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draws = StepDraws(0, 0, 8)
    draws.block_sizes(SIZES, None, 8, "stratified")
    draws.noise_levels(torch.arange(8))
    draws.noise(torch.arange(8), 4).uniform()
    assert torch.equal(before, torch.get_rng_state())


class Rank:
    """An accelerator that says which of how many processes it is."""

    def __init__(self, accelerator: Any, process_index: int, num_processes: int) -> None:
        self._accelerator, self.process_index, self.num_processes = accelerator, process_index, num_processes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


def step_of_all_ranks(
    folder: Path, num_ranks: int, accumulation: int, rows: int, steps: int, **arguments: Any
) -> list[dict[int, tuple[int, float, list[int]]]]:
    """What `get_batch_samples` makes of the rows of some steps: block size, time and noisy tokens of each row."""
    trainer = make_trainer(
        folder,
        tiny_model(block_sizes=[1, 2, 4, 8], block_size_weights=[0.4, 0.3, 0.2, 0.1]),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        **arguments,
    )
    accelerator, data = trainer.accelerator, TokenRows(64, 16, shortest=5)
    collate = BlockGenDataCollator(default_pad_token_id=PAD)
    total = num_ranks * accumulation * rows
    found: list[dict[int, tuple[int, float, list[int]]]] = []
    for step in range(steps):
        trainer.state.global_step = step
        found.append({})
        for rank in range(num_ranks):
            trainer.accelerator = Rank(accelerator, rank, num_ranks)
            places = [[(i * num_ranks + rank) * rows + row for row in range(rows)] for i in range(accumulation)]
            micro_batches = iter([collate([data[(step * total + p) % 64] for p in group]) for group in places])
            batches, _ = trainer.get_batch_samples(micro_batches, accumulation, torch.device("cpu"))
            for group, batch in zip(places, batches, strict=True):
                sizes = batch["block_size"]
                for row, place in enumerate(group):
                    length = data.lengths[(step * total + place) % 64]
                    found[-1][place] = (
                        sizes if isinstance(sizes, int) else sizes[row],
                        batch["noise_level"].expand_as(batch["input_ids"])[row, 0].item(),
                        batch["noisy_input_ids"][row, :length].tolist(),
                    )
    return found


@pytest.mark.parametrize("sampling", ["stratified", "independent", "shared"])
def test_ranks_and_accumulation_share_one_draw(sampling: str, tmp_path: Path) -> None:
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1: the same sizes, times and noisy tokens for the rows of the global batch."""
    runs = [
        step_of_all_ranks(tmp_path, ranks, 8 // ranks, 2, steps=6, block_size_sampling=sampling)
        for ranks in (1, 2, 4, 8)
    ]
    assert runs[0] == runs[1] == runs[2] == runs[3]
    assert len({size for step in runs[0] for size, _, _ in step.values()}) > 1
    expected = [
        StepDraws(1, step, 16).block_sizes([1, 2, 4, 8], [0.4, 0.3, 0.2, 0.1], 8, sampling) for step in range(6)
    ]
    assert [[step[2 * slot][0] for slot in range(8)] for step in runs[0]] == expected


def test_with_a_size_a_sequence_the_size_of_micro_batches_makes_no_difference(tmp_path: Path) -> None:
    arguments = dict(steps=6, block_size_unit="sequence")
    runs = [
        step_of_all_ranks(tmp_path, ranks, accumulation, rows, **arguments)
        for ranks, accumulation, rows in [(1, 1, 8), (1, 8, 1), (2, 1, 4), (2, 2, 2)]
    ]
    assert runs[0] == runs[1] == runs[2] == runs[3]
    for step in runs[0]:  # the strata are those of 8 sequences
        counts = Counter(size for size, _, _ in step.values())
        for size, weight in zip([1, 2, 4, 8], [0.4, 0.3, 0.2, 0.1], strict=True):
            assert counts[size] in bounds(8, weight)


def test_the_short_last_step_of_an_epoch_is_stratified_too(tmp_path: Path) -> None:
    """Fewer micro-batches than asked for, the last with fewer rows; and none at all."""
    trainer = make_trainer(tmp_path, tiny_model(), per_device_train_batch_size=4, gradient_accumulation_steps=8)
    data, collate = TokenRows(), BlockGenDataCollator(default_pad_token_id=PAD)
    micro_batches = [collate([data[i] for i in range(4)]) for _ in range(3)] + [collate([data[0]])]
    batches, count = trainer.get_batch_samples(iter(micro_batches), 8, torch.device("cpu"))
    assert sorted(batch["block_size"] for batch in batches) == [1, 2, 4, 8]
    assert batches[-1]["noisy_input_ids"].shape == (1, 16)
    assert count == 13 * 16
    assert trainer.get_batch_samples(iter([]), 8, torch.device("cpu"))[0] == []


# Noise levels


@pytest.mark.parametrize("num_places", [1, 7, 64])
def test_times_are_a_grid_over_the_global_batch(num_places: int) -> None:
    levels = StepDraws(0, 5, num_places).noise_levels(torch.arange(num_places))
    assert levels.shape == (num_places, 1) and levels.dtype == torch.float64
    assert levels.min() >= 1e-3 and levels.max() <= 1
    points = (levels.flatten().sort().values - 1e-3) / (1 - 1e-3)
    torch.testing.assert_close(points.diff(), torch.full((num_places - 1,), 1 / num_places, dtype=torch.float64))
    assert points[0] < 1 / num_places and points[-1] >= 1 - 1 / num_places - 1e-12


def test_the_time_of_a_place_is_uniform_and_not_that_of_its_neighbour() -> None:
    levels = torch.stack([StepDraws(0, step, 8).noise_levels(torch.arange(8))[:, 0] for step in range(800)])
    unit = (levels - 1e-3) / (1 - 1e-3)
    for place in range(8):
        assert kstest(unit[:, place].numpy(), "uniform").pvalue > 1e-4
    ahead = ((unit[:, 1] - unit[:, 0]) % 1 * 8).round().long()  # 1 .. 7, all as likely
    assert chisquare(torch.bincount(ahead, minlength=8)[1:].numpy()).pvalue > 1e-4


def test_times_do_not_depend_on_how_places_are_grouped() -> None:
    draws = StepDraws(0, 3, 16)
    together = draws.noise_levels(torch.arange(16))
    alone = torch.cat([draws.noise_levels(torch.tensor([place])) for place in range(16)])
    assert torch.equal(together, alone)
    order = torch.tensor([5, 2, 11])
    assert torch.equal(draws.noise_levels(order), together[order])
    assert not torch.equal(together, StepDraws(0, 4, 16).noise_levels(torch.arange(16)))
    assert not torch.equal(together, StepDraws(1, 3, 16).noise_levels(torch.arange(16)))


def corrupted(
    rows: torch.Tensor,
    block_size: int | tuple[int, ...],
    sampling: str = "block",
    variant: str = "masked",
    draws: StepDraws | None = None,
    places: torch.Tensor | None = None,
    **columns: torch.Tensor,
) -> dict[str, torch.Tensor]:
    batch = {"input_ids": rows, "labels": rows, **columns}
    return corrupt_batch(
        batch,
        diffusion_from_config(tiny_config(variant)),
        draws or StepDraws(0, 0, len(rows)),
        torch.arange(len(rows)) if places is None else places,
        block_size,
        sampling,
    )


@pytest.mark.parametrize("block_size, num_blocks", [(4, 8), (8, 4), (5, 7), (32, 1)])
def test_times_of_blocks_are_a_joint_grid(block_size: int, num_blocks: int) -> None:
    """Constant within a block; all blocks of all rows together stand evenly, and so do those of a row."""
    num_rows, length = 6, 32
    levels = corrupted(words(num_rows, length), block_size)["noise_level"]
    assert levels.shape == (num_rows, length)
    per_block = levels[:, ::block_size]
    assert per_block.shape == (num_rows, num_blocks)
    assert torch.equal(levels, per_block.repeat_interleave(block_size, dim=1)[:, :length])
    assert levels.min() >= 1e-3 and levels.max() <= 1
    unit = (per_block - 1e-3) / (1 - 1e-3)
    joint = unit.flatten().sort().values
    step = torch.full((num_rows * num_blocks - 1,), 1 / (num_rows * num_blocks), dtype=torch.float64)
    torch.testing.assert_close(joint.diff(), step)
    for row in unit:  # one in each of the row's strata
        assert sorted((row * num_blocks).long().tolist()) == list(range(num_blocks))
    if num_blocks > 1:
        assert len({tuple(row.argsort().tolist()) for row in unit}) > 1  # in another order in each row


def test_the_time_of_a_block_is_uniform() -> None:
    rows = words(2, 16)
    levels = torch.stack([corrupted(rows, 4, draws=StepDraws(0, step, 2))["noise_level"] for step in range(400)])
    unit = (levels[:, :, ::4] - 1e-3) / (1 - 1e-3)
    for row in range(2):
        for block in range(4):
            assert kstest(unit[:, row, block].numpy(), "uniform").pvalue > 1e-4


def test_blocks_start_again_with_a_document() -> None:
    """Documents of 5, 3 and 8 tokens in blocks of 4: 4 + 1, 3, 4 + 4."""
    documents = torch.tensor([[0] * 5 + [1] * 3 + [2] * 8])
    levels = corrupted(words(1, 16), 4, document_ids=documents)["noise_level"][0]
    starts = [0, 4, 5, 8, 12, 16]
    parts = [levels[a:b] for a, b in pairwise(starts)]
    assert all(len(set(part.tolist())) == 1 for part in parts)
    assert len({part[0].item() for part in parts}) == 5
    assert sorted(((torch.stack([p[0] for p in parts]) - 1e-3) / (1 - 1e-3) * 5).long().tolist()) == list(range(5))


def test_padding_has_no_blocks() -> None:
    """A row padded on the right or on the left has the times that it has without padding."""
    rows = words(3, 12)
    plain = corrupted(rows, 4)
    for side in ("right", "left"):
        first = 0 if side == "right" else 7
        padded, mask = torch.full((3, 19), PAD), torch.zeros(3, 19, dtype=torch.long)
        padded[:, first : first + 12], mask[:, first : first + 12] = rows, 1
        levels = corrupted(padded, 4, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))["noise_level"]
        assert torch.equal(levels[:, first : first + 12], plain["noise_level"])


def test_rows_with_block_sizes_of_their_own_have_their_own_blocks() -> None:
    rows, sizes = words(4, 16), (2, 16, 1, 4)
    levels = corrupted(rows, sizes)["noise_level"]
    assert [len(set(row.tolist())) for row in levels] == [8, 1, 1, 4]
    assert (levels[2] == 1).all()  # block size 1 is fully noised


# Noisy tokens


@pytest.mark.parametrize("sampling", ["sequence", "block"])
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_noise_is_keyed_by_place_and_position_alone(variant: str, sampling: str) -> None:
    """Rows alone, in another order or beside longer ones get the noisy tokens that they get in one batch."""
    rows, draws = words(8, 16), StepDraws(0, 7, 8)
    together = corrupted(rows, 4, sampling, variant, draws)
    for place in range(8):
        alone = corrupted(rows[place : place + 1], 4, sampling, variant, draws, torch.tensor([place]))
        assert torch.equal(alone["noisy_input_ids"][0], together["noisy_input_ids"][place])
    order = torch.tensor([6, 1, 3])
    padded = torch.nn.functional.pad(rows[order], (0, 5), value=PAD)
    mask = torch.nn.functional.pad(torch.ones_like(rows[order]), (0, 5))
    labels = padded.masked_fill(mask == 0, -100)
    again = corrupted(padded, 4, sampling, variant, draws, order, attention_mask=mask, labels=labels)
    assert torch.equal(again["noisy_input_ids"][:, :16], together["noisy_input_ids"][order])
    assert (again["noisy_input_ids"][:, 16:] == PAD).all()
    for other in (StepDraws(0, 8, 8), StepDraws(1, 7, 8)):
        different = corrupted(rows, 4, sampling, variant, other)["noisy_input_ids"]
        assert not torch.equal(different, together["noisy_input_ids"])


@pytest.mark.parametrize("sampling", ["sequence", "block"])
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_tokens_are_noised_with_the_probability_of_their_time(variant: str, sampling: str) -> None:
    """A token is replaced with probability 1 - alpha_t, by the prior."""
    rows, length = words(8, 4096), 4096
    batch = corrupted(rows, 1024, sampling, variant)
    schedule = diffusion_from_config(tiny_config(variant)).schedule
    chance = (1 - schedule.alpha(batch["noise_level"])).expand_as(rows)
    if variant == "uniform":
        chance = chance * (1 - 1 / VOCAB_SIZE)  # the prior may draw the token itself
    noised = (batch["noisy_input_ids"] != rows).double()
    for start in range(0, length, 1024):
        part = slice(start, start + 1024)
        expected, spread = chance[:, part].sum(-1), (chance * (1 - chance))[:, part].sum(-1).sqrt()
        assert ((noised[:, part].sum(-1) - expected).abs() < 4.5 * spread + 1e-9).all()
    if variant == "masked":
        assert (batch["noisy_input_ids"][noised.bool()] == MASK).all()


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "block_causal" not in name])
def test_block_size_one_is_fully_noised(variant: str) -> None:
    rows = words(4, 256)
    batch = corrupted(rows, 1, "sequence", variant)
    assert (batch["noise_level"] == 1).all()
    kept = (batch["noisy_input_ids"] == rows).double().mean()
    assert kept < 0.1 if "uniform" in variant else kept == 0


@pytest.mark.parametrize("sampling", ["sequence", "block"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_tokens_that_are_not_scored_stay_clean(block_size: int, sampling: str) -> None:
    """A prompt, and padding."""
    rows, labels = words(8, 16), words(8, 16)
    labels[:, :5] = -100
    batch = corrupted(rows, block_size, sampling, labels=labels)
    assert torch.equal(batch["noisy_input_ids"][:, :5], rows[:, :5])
    assert (batch["noisy_input_ids"][:, 5:] == MASK).any()
