"""`return_dict_in_generate`: evaluations, tokens per forward, trajectories, and the cache for a second turn."""

import itertools
from typing import Any

import pytest
import torch
from tiny import MASK, generate, left_padded, num_rows, record_forwards, tiny_model, words
from transformers import DynamicCache, GenerationConfig, StaticCache

from blockgen_hf import BlockGenGenerateOutput, BlockGenGenerationConfig


def outputs_of(*args: Any, **settings: Any) -> BlockGenGenerateOutput:
    return generate(*args, return_dict_in_generate=True, **settings)


def empty(rows: int = 1) -> torch.Tensor:
    return torch.zeros(rows, 0, dtype=torch.long)


# ---- function evaluations
SCHEDULES = [
    # block size, steps T, corrector_start, corrector_period, informed: start <= i < T - 1, (i - start) % period == 0
    (4, 1, 0, 1, 0),
    (4, 4, 0, 1, 3),
    (8, 6, 0, 3, 2),
    (8, 8, 2, 2, 3),
    (8, 7, 6, 1, 0),
    (8, 7, 5, 1, 1),
    (8, 5, 9, 1, 0),
    (3, 16, 1, 5, 3),
]


@pytest.mark.parametrize("block_size, steps, start, period, informed", SCHEDULES)
def test_an_arpc_block_costs_its_steps_and_its_informed_steps(
    block_size: int, steps: int, start: int, period: int, informed: int
) -> None:
    """T plus the informed steps that need an AR pass, the last step never; whole passes counted as they run.

    A model that knows the time needs them all.
    """
    model = tiny_model("uniform_time_conditional")
    settings = dict(
        decoding="arpc",
        block_size=block_size,
        denoising_steps=steps,
        corrector_start=start,
        corrector_period=period,
        max_new_tokens=2 * block_size + 1,
    )
    with record_forwards(model) as calls:
        outputs = outputs_of(model, words(2, 3), **settings)
    evaluations = [call for call in calls if call["noisy_input_ids"].shape[1] > 0]
    verifications = [call for call in evaluations if call["block_size"] == 1]
    assert len(verifications) == 3 * informed
    assert outputs.num_function_evaluations.tolist() == [3 * (steps + informed)] * 2 == [len(evaluations)] * 2
    expected = (2 * block_size + 1) / (3 * (steps + informed))
    assert outputs.tokens_per_forward.tolist() == pytest.approx([expected] * 2)


def test_period_1_from_the_start_costs_2t_minus_1() -> None:
    """With period 1 and start 0 a block of T steps takes 2T - 1 evaluations."""
    for steps in (1, 2, 5):
        outputs = outputs_of(
            tiny_model(), words(1, 3), decoding="arpc", block_size=8, denoising_steps=steps, max_new_tokens=8
        )
        assert outputs.num_function_evaluations.tolist() == [2 * steps - 1]


@pytest.mark.parametrize("corrector", ["random", "entropy", "confidence", "margin"])
def test_correctors_without_an_ar_pass_cost_nothing(corrector: str) -> None:
    """Suppl. B.1: the baselines read the diffusion predictions only."""
    model = tiny_model("uniform")
    outputs = outputs_of(
        model, words(1, 3), decoding="arpc", corrector=corrector, block_size=8, denoising_steps=5, max_new_tokens=16
    )
    assert outputs.num_function_evaluations.tolist() == [10]


BUDGETS = [
    # decoding, budget, start, period, steps
    ("arpc", 8, 0, 3, 6),  # the paper's tables: two AR passes
    ("arpc", 8, 0, 1, 4),
    ("arpc", 3, 0, 1, 2),
    ("arpc", 16, 4, 2, 12),
    ("arpc", 8, 5, 1, 7),
    ("block_diffusion", 8, 0, 1, 8),
    ("block_diffusion", 1, 0, 1, 1),
]


@pytest.mark.parametrize("decoding, budget, start, period, steps", BUDGETS)
def test_a_budget_gives_the_largest_number_of_steps(
    decoding: str, budget: int, start: int, period: int, steps: int
) -> None:
    """T is the largest that fits; never more than the budget, and one more step would be."""
    config = BlockGenGenerationConfig(
        decoding=decoding,
        corrector="ar_surprisal",
        nfe_per_block=budget,
        corrector_start=start,
        corrector_period=period,
        block_size=8,
    )
    assert config.num_denoising_steps() == steps

    def cost(t: int) -> int:
        informed = [i for i in range(t - 1) if i >= start and (i - start) % period == 0]
        return t + (len(informed) if decoding == "arpc" else 0)

    assert cost(steps) <= budget < cost(steps + 1)
    outputs = outputs_of(
        tiny_model("uniform_time_conditional"),
        empty(),
        decoding=decoding,
        nfe_per_block=budget,
        corrector_start=start,
        corrector_period=period,
        block_size=8,
        max_new_tokens=8,
    )
    assert outputs.num_function_evaluations.tolist() == [cost(steps)]


def test_steps_default_to_the_block_size() -> None:
    """Defaults: `denoising_steps` = `block_size`, `block_size` = the largest trained."""
    model = tiny_model("uniform_time_conditional")
    outputs = outputs_of(model, empty(), decoding="block_diffusion", max_new_tokens=16)
    assert outputs.num_function_evaluations.tolist() == [16]
    outputs = outputs_of(model, empty(), decoding="block_diffusion", max_new_tokens=16, block_size=2)
    assert outputs.num_function_evaluations.tolist() == [16]


def test_autoregressive_tokens_cost_one_evaluation_each() -> None:
    """AR: one a token. Seeds too, then T for each block of the rest."""
    outputs = outputs_of(tiny_model(), words(2, 3), decoding="ar", max_new_tokens=9)
    assert outputs.num_function_evaluations.tolist() == [9, 9]
    assert outputs.tokens_per_forward.tolist() == [1.0, 1.0]
    outputs = outputs_of(
        tiny_model("uniform_time_conditional"),
        words(2, 3),
        decoding="block_diffusion",
        ar_seed_tokens=5,
        block_size=4,
        denoising_steps=3,
        max_new_tokens=11,
    )
    assert outputs.num_function_evaluations.tolist() == [5 + 2 * 3] * 2
    assert outputs.tokens_per_forward.tolist() == [1.0, 1.0]


def test_a_plain_tensor_comes_without_the_dictionary() -> None:
    """As in every transformers model, and the two are the same text."""
    settings = dict(decoding="arpc", block_size=4, max_new_tokens=6)
    sequences = generate(tiny_model(), words(2, 3), **settings)
    assert isinstance(sequences, torch.Tensor)
    assert torch.equal(outputs_of(tiny_model(), words(2, 3), **settings).sequences, sequences)
    assert outputs_of(tiny_model(), words(2, 3), **settings).trajectory is None


# ---- trajectories
@pytest.mark.parametrize("decoding", ["block_diffusion", "arpc"])
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_trajectory_runs_from_noise_to_the_text(variant: str, decoding: str) -> None:
    """For each block T + 1 states `[B, n]`: all noise first, the committed tokens last."""
    outputs = outputs_of(
        tiny_model(variant),
        words(3, 5),
        decoding=decoding,
        block_size=4,
        denoising_steps=6,
        max_new_tokens=10,
        output_trajectory=True,
    )
    assert [len(states) for states in outputs.trajectory] == [7, 7, 7]
    assert [tuple(states[0].shape) for states in outputs.trajectory] == [(3, 4), (3, 4), (3, 2)]
    last = torch.cat([states[-1] for states in outputs.trajectory], dim=1)
    assert torch.equal(last, outputs.sequences[:, 5:])
    if variant == "masked":
        assert all((states[0] == MASK).all() for states in outputs.trajectory)
        assert not (last == MASK).any()
    else:
        assert len(torch.cat([states[0] for states in outputs.trajectory], dim=1).unique()) > 8


def test_unmasked_tokens_stay_under_block_diffusion() -> None:
    """Eq. 2: a masked process carries them over; what is masked only shrinks."""
    outputs = outputs_of(
        tiny_model(),
        words(8, 2),
        decoding="block_diffusion",
        block_size=8,
        denoising_steps=5,
        max_new_tokens=16,
        output_trajectory=True,
    )
    counts = []
    for states in outputs.trajectory:
        for before, after in itertools.pairwise(states):
            assert ((after == before) | (before == MASK)).all()
        counts.append([int((state == MASK).sum()) for state in states])
    assert all(0 < inner < 64 for row in counts for inner in row[1:-1])


def test_an_informed_step_leaves_its_number_of_masks() -> None:
    """Algorithm 1: k = max(1, round((1 - alpha_s) L')) positions are noise behind it, whatever stood there before."""
    steps, size = 5, 8
    outputs = outputs_of(
        tiny_model(),
        words(4, 2),
        decoding="arpc",
        block_size=size,
        denoising_steps=steps,
        max_new_tokens=16,
        output_trajectory=True,
    )
    times = torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64)
    alphas = 1e-3 + (1 - 1e-3) * (1 - times)
    expected = [size] + [max(1, round(float(1 - alpha) * size)) for alpha in alphas[1:-1]] + [0]
    for states in outputs.trajectory:
        assert [(state == MASK).sum(-1).tolist() for state in states] == [[count] * 4 for count in expected]
    fixed_twice = [
        (before != MASK) & (after == MASK) for s in outputs.trajectory for before, after in itertools.pairwise(s)
    ]
    assert any(mask.any() for mask in fixed_twice)  # tokens that were fixed go back to noise


def test_trajectory_of_a_batch_has_pads_where_rows_are_done() -> None:
    """Rows keep their place when others have left."""
    model, prompts = tiny_model(), words(4, 3)
    settings = dict(decoding="block_diffusion", block_size=4, max_new_tokens=12, output_trajectory=True)
    free = outputs_of(model, prompts, **settings)
    end = int(free.sequences[1, 4])
    outputs = outputs_of(model, prompts, eos_token_id=end, **settings)
    assert all(state.shape[0] == 4 for states in outputs.trajectory for state in states)
    done = [end in row[3:7] for row in outputs.sequences.tolist()]
    assert any(done) and not all(done)
    for row in range(4):
        for a, b in zip(outputs.trajectory[1], free.trajectory[1], strict=True):
            assert (a[row] == 20).all() if done[row] else torch.equal(a[row], b[row])


# ---- a second turn
@pytest.mark.parametrize("cache_class", ["dynamic", "static", "own"])
@pytest.mark.parametrize("decoding", ["ar", "block_diffusion", "arpc"])
def test_a_second_turn_with_the_returned_cache_equals_one_without(decoding: str, cache_class: str) -> None:
    """The whole text again, longer, with the cache of the first turn: the cached part is not computed anew."""
    model, prompt = tiny_model(), words(2, 5)
    settings = dict(decoding=decoding, max_new_tokens=9) | ({} if decoding == "ar" else {"block_size": 4})
    kwargs = {
        "dynamic": {},
        "static": dict(cache=StaticCache(model.config, max_cache_len=40)),
        "own": dict(cache=DynamicCache(config=model.config)),
    }[cache_class]
    first = outputs_of(model, prompt, **kwargs, **settings)
    cache = first.cache
    cached = int(cache.get_seq_length())
    assert 5 < cached < 14
    second = torch.cat([first.sequences, words(2, 3, seed=4)], dim=1)
    expected = generate(model, second, **settings)
    with record_forwards(model) as calls:
        text = generate(model, second, cache=cache, **settings)
    assert torch.equal(text, expected)
    committed = sum(call["input_ids"].shape[1] for call in calls if call.get("use_cache"))
    assert committed == int(cache.get_seq_length()) - cached


def test_a_second_turn_with_new_tokens_only() -> None:
    """`inputs` may be what the cache does not hold, with an attention mask over all of it (transformers' contract)."""
    model, prompt = tiny_model(), words(2, 5)
    settings = dict(decoding="block_diffusion", block_size=4, max_new_tokens=8, do_sample=False)
    cache = DynamicCache(config=model.config)
    model(prompt, cache=cache, use_cache=True)
    following = words(2, 3, seed=4)
    text = generate(model, following, cache=cache, attention_mask=torch.ones(2, 8, dtype=torch.long), **settings)
    assert torch.equal(text[:, :3], following)
    assert text.shape == (2, 11)
    greedy = dict(decoding="ar", do_sample=False, max_new_tokens=8)
    cache = DynamicCache(config=model.config)
    model(prompt, cache=cache, use_cache=True)
    text = generate(model, following, cache=cache, attention_mask=torch.ones(2, 8, dtype=torch.long), **greedy)
    expected = generate(model, torch.cat([prompt, following], dim=1), **greedy)
    assert torch.equal(text[:, 3:], expected[:, 8:])


@pytest.mark.parametrize("decoding", ["ar", "block_diffusion"])
def test_a_second_turn_of_a_padded_batch_whose_rows_ended_apart(decoding: str) -> None:
    """A cache of the caller keeps its rows; pads behind a row's end are masked out in the next turn."""
    model = tiny_model()
    settings = dict(decoding=decoding, max_new_tokens=9) | ({} if decoding == "ar" else {"block_size": 4})
    batch = left_padded([words(5), words(2, seed=3)])
    cache = DynamicCache(config=model.config)
    free = generate(model, None, **batch, **settings)
    end = int(free[0, 7])
    first = generate(model, None, eos_token_id=end, cache=cache, **batch, **settings)
    ended = (first == 20).long().cumsum(-1) > 0
    mask = torch.cat([batch["attention_mask"], (~ended[:, 5:]).long()], dim=1)
    second = torch.cat([first, words(2, 3, seed=4)], dim=1)
    mask = torch.nn.functional.pad(mask, (0, 3), value=1)
    expected = generate(model, second, attention_mask=mask, **settings)
    text = generate(model, second, attention_mask=mask, cache=cache, **settings)
    assert torch.equal(text, expected)


def test_a_cache_longer_than_the_text_is_refused() -> None:
    """It is the cache of something else."""
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    model(words(1, 8), cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="`cache`"):
        generate(model, words(1, 5), cache=cache, max_new_tokens=4, decoding="block_diffusion")


def test_no_cache_is_returned_when_rows_have_left_it() -> None:
    """It would hold other rows than the text has; a cache of the caller keeps all of them."""
    model, prompts = tiny_model(), words(4, 3)
    settings = dict(decoding="block_diffusion", block_size=4, max_new_tokens=12)
    end = int(generate(model, prompts, **settings)[1, 4])
    assert outputs_of(model, prompts, eos_token_id=end, **settings).cache is None
    cache = DynamicCache(config=model.config)
    outputs = outputs_of(model, prompts, eos_token_id=end, cache=cache, **settings)
    assert outputs.cache is cache
    assert cache.layers[0].keys.shape[0] == 4
    assert outputs_of(model, prompts, use_cache=False, **settings).cache is None


def test_evaluations_are_counted_a_row_when_rows_stay() -> None:
    """With the caller's cache done rows stay in the batch; they are computed, but need nothing any more."""
    model, prompts = tiny_model(), words(4, 3)
    settings = dict(decoding="block_diffusion", block_size=4, max_new_tokens=12, return_dict_in_generate=True)
    end = int(generate(model, prompts, **settings).sequences[1, 4])
    expected = generate(model, prompts, eos_token_id=end, **settings)
    with record_forwards(model) as calls:
        kept = generate(model, prompts, eos_token_id=end, cache=DynamicCache(config=model.config), **settings)
    assert {num_rows(call) for call in calls} == {4}
    assert torch.equal(kept.sequences, expected.sequences)
    assert kept.num_function_evaluations.tolist() == expected.num_function_evaluations.tolist()


def test_stock_generation_config_can_ask_for_the_dictionary() -> None:
    """A plain `GenerationConfig` is upgraded."""
    config = GenerationConfig(max_new_tokens=5, return_dict_in_generate=True)
    outputs = generate(tiny_model("uniform_time_conditional"), words(1, 3), generation_config=config)
    assert outputs.sequences.shape == (1, 8)
    assert outputs.num_function_evaluations.tolist() == [8]
