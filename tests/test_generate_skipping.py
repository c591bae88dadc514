"""What a generation need not compute: passes that change nothing, logits that nobody reads, commits of their own."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MASK, VARIANTS, generate, left_padded, record_forwards, tiny_model, words
from transformers import DynamicCache, StoppingCriteriaList

from blockgen_hf.generation import block_decoding_blockgen
from blockgen_hf.generation.denoising_blockgen import Block
from blockgen_hf.modeling.sampling_blockgen import sample_categorical


def outputs_of(model: Any, inputs: Any, **settings: Any) -> Any:
    settings = {"decoding": "block_diffusion", "block_size": 8, "max_new_tokens": 16, **settings}
    return generate(model, inputs, return_dict_in_generate=True, output_trajectory=True, **settings)


def num_changes(trajectory: tuple[tuple[torch.Tensor, ...], ...], row: int) -> int:
    """Steps of a row that changed it."""
    return sum(not torch.equal(before[row], after[row]) for states in trajectory for before, after in pairwise(states))


# ---- passes
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_a_masked_model_runs_for_steps_that_reveal_something(steps: int) -> None:
    model = tiny_model()
    with record_forwards(model) as calls:
        outputs = outputs_of(model, words(3, 5), denoising_steps=steps)
    evaluations = outputs.num_function_evaluations.tolist()
    assert evaluations == [num_changes(outputs.trajectory, row) for row in range(3)]
    assert max(evaluations) <= len(calls) <= 2 * min(8, steps)


def test_the_number_of_passes_is_that_of_the_arithmetic() -> None:
    """T (1 - (1 - 1/T)^n) of T steps in the mean, by the linear schedule without eps."""
    model = tiny_model(noise_schedule_eps=0.0)
    for steps in (4, 16, 64):
        outputs = outputs_of(model, words(1, 4).expand(400, -1), denoising_steps=steps, max_new_tokens=8)
        counts = outputs.num_function_evaluations.double()
        expected = steps * (1 - (1 - 1 / steps) ** 8)
        assert abs(counts.mean() - expected) < 5 * counts.std() / 20 + 0.02


@pytest.mark.parametrize("variant", ["uniform", "uniform_block_causal"])
def test_a_uniform_model_runs_again_only_after_a_change(variant: str) -> None:
    outputs = outputs_of(tiny_model(variant), words(3, 8), denoising_steps=40)
    for row in range(3):
        changes = num_changes(outputs.trajectory, row)
        assert changes <= outputs.num_function_evaluations[row] <= changes + len(outputs.trajectory)
        assert changes < 50


def test_with_and_without_skipping_the_text_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is told that its model knows the time runs every step."""
    model, prompts = tiny_model("uniform"), left_padded([words(5), words(2, seed=1)])
    settings = dict(decoding="arpc", block_size=8, denoising_steps=20, corrector_period=7, max_new_tokens=16)
    skipped = generate(model, None, **prompts, return_dict_in_generate=True, **settings)

    def block_that_never_skips(*arguments: Any, **others: Any) -> Block:
        *before, _, states = arguments
        return Block(*before, True, states, **others)

    monkeypatch.setattr(block_decoding_blockgen, "Block", block_that_never_skips)
    whole = generate(model, None, **prompts, return_dict_in_generate=True, **settings)
    assert skipped.sequences.tolist() == whole.sequences.tolist()
    assert whole.num_function_evaluations.tolist() == [46, 46]
    assert (skipped.num_function_evaluations < 42).all()


@pytest.mark.parametrize("variant", ["masked", "uniform"])
@pytest.mark.parametrize("decoding", ["block_diffusion", "arpc"])
def test_rows_pay_in_a_batch_what_they_pay_alone(variant: str, decoding: str) -> None:
    model, prompts = tiny_model(variant), [words(6), words(3, seed=1), words(9, seed=2)]
    settings = dict(decoding=decoding, denoising_steps=12, corrector_period=5)
    together = outputs_of(model, None, **left_padded(prompts), **settings)
    alone = [outputs_of(model, prompt[None], **settings) for prompt in prompts]
    assert together.sequences[:, -16:].tolist() == [one.sequences[0, -16:].tolist() for one in alone]
    expected = [int(one.num_function_evaluations) for one in alone]
    assert together.num_function_evaluations.tolist() == expected


def passes_behind_the_first_block(calls: list[dict[str, Any]]) -> int:
    starts = [
        number for number, call in enumerate(calls) if call["input_ids"].shape[1] > 0
    ]  # commits of what was before
    return len(calls) - starts[1]


def test_rows_that_are_done_need_no_pass_where_they_stay_in_the_batch() -> None:
    """The caller's cache keeps them; the rows that go on decide how many passes there are."""
    model, prompts = tiny_model(), words(2, 4)
    settings = dict(decoding="block_diffusion", block_size=4, denoising_steps=8, max_new_tokens=24)

    def ends_the_first_row(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids[:, :4] == prompts[0]).all(-1)

    with record_forwards(model) as alone:
        expected = generate(model, prompts[1:], **settings)
    with record_forwards(model) as together:
        cache = DynamicCache(config=model.config)
        criteria = StoppingCriteriaList([ends_the_first_row])
        texts = generate(model, prompts, cache=cache, stopping_criteria=criteria, **settings)
    assert texts[1].tolist() == expected[0].tolist()
    assert passes_behind_the_first_block(together) == passes_behind_the_first_block(alone) > 10


# ---- commits
def test_a_finished_block_is_committed_by_the_first_pass_of_the_next() -> None:
    model = tiny_model()
    with record_forwards(model) as calls:
        outputs_of(model, words(2, 5), max_new_tokens=24, denoising_steps=3)
    assert all(call["noisy_input_ids"].shape[1] == 8 for call in calls)
    assert [call["input_ids"].shape[1] for call in calls if call["input_ids"].shape[1]] == [5, 8, 8]


def test_a_long_prompt_is_committed_by_passes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny_model(), words(1, 21)
    expected = outputs_of(model, prompt).sequences
    monkeypatch.setattr(block_decoding_blockgen, "_MAX_RIDERS", 4)
    with record_forwards(model) as calls:
        assert outputs_of(model, prompt).sequences.tolist() == expected.tolist()
    assert calls[0]["input_ids"].shape[1] == 21 and calls[0]["noisy_input_ids"].shape[1] == 0
    with record_forwards(model) as calls:
        assert outputs_of(model, prompt, prefill_chunk_size=6).sequences.tolist() == expected.tolist()
    assert [call["input_ids"].shape[1] for call in calls[:5]] == [6, 6, 6, 3, 0]


# ---- logits
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_some_tokens_are_those_of_all(variant: str) -> None:
    model, clean, noisy = tiny_model(variant), words(2, 8), words(2, 8, seed=1)
    arguments = dict(block_size=4, noise_level=0.3)
    logits = model(clean, noisy, **arguments).logits
    keep = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    torch.testing.assert_close(model(clean, noisy, logits_to_keep=keep, **arguments).logits, logits[keep])


def test_a_masked_model_computes_logits_where_something_is_revealed() -> None:
    model = tiny_model()
    rows: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    outputs_of(model, words(1, 3), denoising_steps=6)
    handle.remove()
    assert sum(rows) == 16


@pytest.mark.parametrize("variant", ["masked", "uniform_time_conditional", "without_adaln"])
def test_modulations_that_are_known_give_the_same_logits(variant: str) -> None:
    model, clean = tiny_model(variant), words(2, 8)
    modulations = model.model.constant_modulations(torch.device("cpu"))
    assert (modulations is None) == (variant != "masked")
    noisy = torch.full_like(clean, MASK)
    expected = model(clean, noisy, block_size=4, noise_level=1.0).logits
    given = model(clean, noisy, block_size=4, noise_level=1.0, modulations=modulations).logits
    torch.testing.assert_close(given, expected)


# ---- samplers
@pytest.mark.parametrize("variant", ["masked", "uniform"])
@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        ({"sampler": "confidence", "confidence_threshold": 0.0}, 1),
        ({"sampler": "entropy_bound", "entropy_bound": 1000.0}, 1),
        ({"sampler": "confidence", "confidence_threshold": 1.0}, 8),
        ({"sampler": "entropy_bound", "entropy_bound": 0.0}, 8),
        ({"sampler": "confidence", "confidence_threshold": 1.0, "denoising_steps": 3}, 3),
    ],
)
def test_adaptive_samplers_take_what_the_model_is_sure_of(
    variant: str, settings: dict[str, Any], evaluations: int
) -> None:
    """Everything at once, or a token at a step, or the rest at the last step."""
    outputs = outputs_of(tiny_model(variant), words(2, 3), max_new_tokens=8, **settings)
    assert outputs.num_function_evaluations.tolist() == [evaluations] * 2
    assert not (outputs.sequences == MASK).any() or variant == "uniform"


def test_accepted_tokens_of_a_masked_model_stay() -> None:
    outputs = outputs_of(tiny_model(), words(3, 3), sampler="confidence", confidence_threshold=0.4)
    for states in outputs.trajectory:
        for before, after in pairwise(states):
            assert torch.equal(after[before != MASK], before[before != MASK])


def test_confidence_accepts_by_its_threshold() -> None:
    model, prompt = tiny_model(), words(1, 3)
    settings = dict(sampler="confidence", confidence_threshold=0.3, max_new_tokens=8)
    (states,) = outputs_of(model, prompt, **settings).trajectory
    logits = model(prompt, states[0], block_size=8, noisy_position_ids=torch.arange(3, 11)[None]).logits
    confidence = model.diffusion.log_probs(logits, states[0]).exp().amax(-1)[0]
    accepted = (states[1] != MASK)[0]
    expected = confidence >= 0.3
    expected[confidence.argmax()] = True
    assert accepted.tolist() == expected.tolist()


def test_first_hitting_reveals_a_token_a_pass() -> None:
    outputs = outputs_of(tiny_model(), words(2, 3), sampler="first_hitting", denoising_steps=2)
    assert outputs.num_function_evaluations.tolist() == [16, 16]
    assert [len(states) for states in outputs.trajectory] == [9, 9]


@pytest.mark.parametrize("prompt", [4, 6])
def test_first_hitting_takes_the_arg_max_for_the_last_token_of_a_block(prompt: int) -> None:
    """Also where tokens of the prompt stand in the block."""
    model, inputs = tiny_model("block_causal"), words(30, prompt)
    settings = dict(sampler="first_hitting", noise_removal="greedy", block_size=4, max_new_tokens=8 - prompt)
    (states,) = outputs_of(model, inputs, **settings).trajectory
    before = next(state for state in reversed(states) if (state == MASK).any())
    last = before == MASK
    positions = torch.arange(4, 8)[None]
    logits = model(inputs[:, :4], before, block_size=4, noisy_position_ids=positions).logits
    best = model.diffusion.log_probs(logits, before).argmax(-1)
    assert last.sum(-1).tolist() == [1] * 30 and torch.equal(states[-1][last], best[last])


def test_modulations_have_the_type_of_a_forward_pass() -> None:
    """Also where norms are kept in float32."""
    model = tiny_model().to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    expected = generate(model, words(2, 5), decoding="ar", max_new_tokens=4, do_sample=False)
    text = words(2, 5)
    for _ in range(4):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    assert expected.tolist() == text.tolist()


def test_samplers_are_refused_where_they_mean_nothing() -> None:
    with pytest.raises(ValueError, match="`sampler='first_hitting'` is for masked models"):
        outputs_of(tiny_model("uniform"), words(1, 3), sampler="first_hitting")
    with pytest.raises(ValueError, match="`nfe_per_block` \\(4\\) and `sampler='first_hitting'` contradict"):
        outputs_of(tiny_model(), words(1, 3), sampler="first_hitting", nfe_per_block=4)
    with pytest.raises(ValueError, match="does not go with `decoding='arpc'`"):
        outputs_of(tiny_model(), words(1, 3), decoding="arpc", sampler="confidence")
    with pytest.raises(ValueError, match="`confidence_threshold` must be a number from 0 to 1"):
        outputs_of(tiny_model(), words(1, 3), sampler="confidence", confidence_threshold=1.5)


# ---- drawing
@pytest.mark.parametrize(
    ("dtype", "draws"),
    [
        (torch.float32, 10_000),
        *(pytest.param(dtype, 50_000, marks=pytest.mark.slow) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_the_tail_of_a_long_tailed_distribution_is_drawn(dtype: torch.dtype, draws: int) -> None:
    """V = 50,258 by Zipf's law: the share of the rare half is right, and so are the ranks within it, by chi-square."""
    from scipy.stats import chisquare

    vocab_size = 50_258
    logits = -1.1 * torch.arange(1, vocab_size + 1).double().log()
    logits = logits[torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))].to(dtype)
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    uniform = uniform[torch.randperm(draws, generator=torch.Generator().manual_seed(1))]
    uniform = (uniform + torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(2))) % 1
    probs = logits.float().softmax(-1)
    tokens = torch.cat([sample_categorical(probs.expand(len(part), -1), part) for part in uniform.split(200)])
    exact = logits.double().softmax(-1).numpy()
    order = np.argsort(-exact, kind="stable")
    bins = np.array_split(order, draws // 500)
    counts = np.bincount(tokens.numpy(), minlength=vocab_size)
    observed = np.array([counts[part].sum() for part in bins])
    expected = np.array([exact[part].sum() for part in bins]) * draws
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


@pytest.mark.parametrize("masses", [[0.2, float("nan"), 0.1], [0.2, float("inf"), 0.1], [0.0, 0.0, 0.0]])
def test_masses_that_are_no_distribution_are_refused(masses: list[float]) -> None:
    """An overflow must not become a token."""
    probs = torch.tensor([[0.5, 0.25, 0.25], masses])
    with pytest.raises(RuntimeError, match="NaN, infinite or all zero"):
        sample_categorical(probs, torch.tensor([0.5, 0.5], dtype=torch.float64))
