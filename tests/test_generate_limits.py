"""Settings and inputs that cannot be right are refused at once; whatever is accepted gives a valid text."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MASK, generate, tiny_model, words

from blockgen_hf import BlockGenGenerationConfig


@pytest.mark.parametrize(
    "name, value",
    [("nfe_per_block", 30_000), ("denoising_steps", 10**6), ("corrector_start", 10**9), ("corrector_period", 10**9)],
)
def test_numbers_of_steps_that_would_take_minutes_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at most 10,000"):
        tiny_model().generate(words(1, 3), decoding="arpc", max_new_tokens=4, **{name: value})
    with pytest.raises(ValueError, match=f"`{name}`"):
        BlockGenGenerationConfig(**{name: value})


@pytest.mark.parametrize("decoding", ["block_diffusion", "arpc"])
def test_a_block_longer_than_the_model_has_positions_is_refused(decoding: str) -> None:
    model = tiny_model()
    for block_size in (model.config.max_position_embeddings + 1, 10**6):
        with pytest.raises(ValueError, match="`block_size` must be at most"):
            model.generate(words(1, 3), decoding=decoding, block_size=block_size, max_new_tokens=4)
    model.generation_config.block_size = 10**6  # as from a generation_config.json
    with pytest.raises(ValueError, match="`block_size` must be at most"):
        model.generate(words(1, 3), decoding=decoding, max_new_tokens=4)


@pytest.mark.parametrize("start, period", [(0, 1), (0, 3), (2, 2), (5, 4)])
def test_a_budget_pays_for_the_most_steps_that_fit(start: int, period: int) -> None:
    config = BlockGenGenerationConfig(
        decoding="arpc", block_size=16, corrector="ar_surprisal", corrector_start=start, corrector_period=period
    )
    for budget in range(start + 3, 60):
        config.nfe_per_block = budget
        counted = [
            steps
            for steps in range(1, budget + 1)
            if steps + sum(config.is_informed(step, steps) for step in range(steps)) <= budget
        ]
        assert config.num_denoising_steps() == max(counted)


def test_none_leaves_a_setting_at_its_default() -> None:
    """`corrector=None` was the random corrector."""
    model = tiny_model()
    call = dict(decoding="arpc", block_size=8, denoising_steps=4, max_new_tokens=8)
    expected = generate(model, words(2, 4), corrector="ar_surprisal", **call)
    assert torch.equal(generate(model, words(2, 4), corrector=None, **call), expected)
    assert not torch.equal(generate(model, words(2, 4), corrector="random", **call), expected)


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("decoding", ["ar", "block_diffusion", "arpc"])
def test_weights_that_are_no_numbers_raise_whether_greedy_or_sampled(decoding: str, do_sample: bool) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="NaN, infinite or all zero: its weights are damaged"):
        generate(model, words(1, 3), decoding=decoding, do_sample=do_sample, max_new_tokens=4)


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="one row at least"):
        tiny_model().generate(torch.zeros(0, 4, dtype=torch.long), max_new_tokens=4)


SETTINGS = st.fixed_dictionaries(
    {"decoding": st.sampled_from(["ar", "block_diffusion", "arpc"]), "max_new_tokens": st.integers(1, 12)},
    optional={
        "block_size": st.integers(-1, 70),
        "denoising_steps": st.integers(-1, 20),
        "nfe_per_block": st.integers(-1, 30),
        "ar_seed_tokens": st.integers(-1, 14),
        "corrector": st.sampled_from(["ar_surprisal", "ar_gap", "ar_kl", "entropy", "random", "none", None]),
        "corrector_start": st.integers(-1, 8),
        "corrector_period": st.integers(-1, 5),
        "noise_removal": st.sampled_from(["ancestral", "greedy", "x"]),
        "sampler": st.sampled_from(["ancestral", "first_hitting", "confidence", "entropy_bound"]),
        "confidence_threshold": st.floats(-0.5, 1.5),
        "do_sample": st.booleans(),
        "temperature": st.floats(0.1, 2.0),
        "top_k": st.integers(0, 10),
        "repetition_penalty": st.floats(0.5, 2.0),
        "eos_token_id": st.integers(0, 5),
    },
)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_any_settings_are_refused_or_give_text_that_keeps_the_rules(variant: str) -> None:
    model, prompts = tiny_model(variant), words(2, 3)

    @given(SETTINGS)
    @settings(max_examples=150)
    def check(given_settings: dict[str, Any]) -> None:
        call = dict(given_settings, pad_token_id=6, return_dict_in_generate=True)
        try:
            outputs = generate(model, prompts, **call)
        except ValueError:
            return
        new, width = outputs.sequences[:, 3:], given_settings["max_new_tokens"]
        assert torch.equal(outputs.sequences[:, :3], prompts) and 1 <= new.shape[1] <= width
        assert ((new >= 0) & (new < model.config.vocab_size)).all()
        assert variant == "uniform" or (new != MASK).all()
        assert (outputs.num_function_evaluations >= 1).all()
        assert (outputs.num_new_tokens >= 1).all() and (outputs.num_new_tokens <= width).all()
        for row, count in zip(new, outputs.num_new_tokens.tolist(), strict=True):
            assert (row[count:] == 6).all()  # pads behind the end
        assert torch.equal(generate(model, prompts, **call).sequences, outputs.sequences)

    check()
