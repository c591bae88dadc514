"""ARPC's correctors: the worst tokens by each score go back to noise, and nothing else (Sec. 4.1, Suppl. B.1)."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import MASK, generate, tiny_model, words

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.generation.correctors_blockgen import penalties, worst_positions
from blockgen_hf.generation.denoising_blockgen import _accepted
from blockgen_hf.generation.logits_blockgen import Prediction
from blockgen_hf.modeling.sampling_blockgen import CounterGenerator


AR_CORRECTORS = ["ar_surprisal", "ar_gap", "ar_entropy", "ar_kl", "ar_reverse_kl", "ar_tv"]
DIFFUSION_CORRECTORS = ["entropy", "confidence", "margin"]
SIZE = 8


def few_of(correctors: list[str]) -> list[Any]:
    """One of each kind runs always, the others among the slow tests."""
    fast = ("ar_surprisal", "ar_kl", "entropy", "random")
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in correctors]


def first_informed_step(model: BlockGenForDiffusionLM, corrector: str) -> tuple[torch.Tensor, torch.Tensor]:
    """z_1 and z_{1/2} of the first block, its proposals being arg-maxes; half of the positions are re-noised."""
    outputs = generate(
        model,
        words(6, 3),
        decoding="arpc",
        corrector=corrector,
        block_size=SIZE,
        denoising_steps=2,
        max_new_tokens=SIZE,
        do_sample=False,
        return_dict_in_generate=True,
        output_trajectory=True,
    )
    ((start, middle, _),) = outputs.trajectory
    return start, middle


def diffusion_probabilities(model: BlockGenForDiffusionLM, z_t: torch.Tensor) -> np.ndarray:
    """p_D after the prompt, in float64, without the mask token of a masked model."""
    with torch.no_grad():
        logits = model(
            words(6, 3), z_t, block_size=SIZE, noisy_position_ids=torch.arange(3, 3 + SIZE)[None]
        ).logits.double()
    if model.config.diffusion_type == "masked":
        logits = logits[..., :MASK]
    return logits.softmax(-1).numpy()


def ar_probabilities(model: BlockGenForDiffusionLM, proposal: torch.Tensor) -> np.ndarray:
    """p_AR of every position of the proposal, by the causal language model."""
    with torch.no_grad():
        logits = model(torch.cat([words(6, 3), proposal], dim=1)).logits[:, 2:-1, :MASK].double()
    return logits.softmax(-1).numpy()


def score_by_hand(name: str, p_d: np.ndarray, p_ar: np.ndarray | None, proposal: np.ndarray) -> np.ndarray:
    """Suppl. B.1, higher is worse."""
    if name == "entropy":
        return -(p_d * np.log(p_d)).sum(-1)
    ordered = np.sort(p_d, axis=-1)
    if name == "confidence":
        return -ordered[..., -1]
    if name == "margin":
        return -(ordered[..., -1] - ordered[..., -2])
    assert p_ar is not None
    token = np.take_along_axis(p_ar, proposal[..., None], axis=-1)[..., 0]
    return {
        "ar_surprisal": -np.log(token),
        "ar_gap": np.log(p_ar.max(-1)) - np.log(token),
        "ar_entropy": -(p_ar * np.log(p_ar)).sum(-1),
        "ar_kl": (p_ar * np.log(p_ar / p_d)).sum(-1),
        "ar_reverse_kl": (p_d * np.log(p_d / p_ar)).sum(-1),
        "ar_tv": np.abs(p_ar - p_d).sum(-1) / 2,
    }[name]


@pytest.mark.parametrize("corrector", AR_CORRECTORS)
def test_masked_model_renoises_what_autoregression_finds_worst(corrector: str) -> None:
    """Algorithm 1 from the first step on: propose, verify, and mask the k positions of highest score."""
    model = tiny_model()
    start, middle = first_informed_step(model, corrector)
    p_d = diffusion_probabilities(model, start)
    proposal = torch.from_numpy(p_d.argmax(-1))
    score = score_by_hand(corrector, p_d, ar_probabilities(model, proposal), proposal.numpy())
    renoised = middle.numpy() == MASK
    assert (renoised.sum(-1) == SIZE // 2).all()  # of equal scores any may be among them
    assert (middle.numpy() == proposal.numpy())[~renoised].all()
    least = np.where(renoised, score, np.inf).min(-1)
    largest_kept = np.where(renoised, -np.inf, score).max(-1)
    assert (least >= largest_kept - 1e-9).all()


@pytest.mark.parametrize("corrector", DIFFUSION_CORRECTORS)
def test_uniform_model_renoises_what_diffusion_finds_worst(corrector: str) -> None:
    """Algorithm 4: no AR pass; the rest is the proposal, and the worst are random tokens."""
    model = tiny_model("uniform")
    start, middle = first_informed_step(model, corrector)
    p_d = diffusion_probabilities(model, start)
    proposal = p_d.argmax(-1)
    worst = np.argsort(-score_by_hand(corrector, p_d, None, proposal), axis=-1)[:, : SIZE // 2]
    renoised = np.zeros_like(proposal, dtype=bool)
    np.put_along_axis(renoised, worst, True, axis=-1)
    assert (middle.numpy() == proposal)[~renoised].all()
    assert (middle.numpy() != proposal)[renoised].mean() > 0.7
    assert len(np.unique(middle.numpy()[renoised])) > 8


@pytest.mark.parametrize("corrector", AR_CORRECTORS)
def test_uniform_model_keeps_half_of_its_proposal(corrector: str) -> None:
    """Its AR scores depend on random queries; the number of kept tokens does not."""
    model = tiny_model("uniform")
    start, middle = first_informed_step(model, corrector)
    kept = (middle.numpy() == diffusion_probabilities(model, start).argmax(-1)).sum(-1)
    assert (kept >= SIZE // 2).all() and kept.mean() < SIZE * 0.75


@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_random_corrector_takes_every_position_alike(variant: str) -> None:
    """Algorithm 3: k positions, uniformly."""
    outputs = generate(
        tiny_model(variant),
        torch.zeros(400, 0, dtype=torch.long),
        decoding="arpc",
        corrector="random",
        block_size=SIZE,
        denoising_steps=2,
        max_new_tokens=SIZE,
        do_sample=False,
        return_dict_in_generate=True,
        output_trajectory=True,
    )
    ((_, middle, _),) = outputs.trajectory
    if variant == "masked":
        share = (middle == MASK).float().mean(0)
        assert ((share - 0.5).abs() < 0.1).all()
        assert ((middle == MASK).sum(-1) == SIZE // 2).all()
    else:
        assert len(middle.unique()) == 23


@pytest.mark.parametrize("corrector", few_of([*AR_CORRECTORS, *DIFFUSION_CORRECTORS, "random"]))
def test_every_corrector_runs_on_a_uniform_model(corrector: str) -> None:
    """From prompt to text, by every schedule, blocks of any length."""
    for more in ({}, dict(denoising_steps=5, corrector_start=1, corrector_period=2, ar_seed_tokens=2)):
        text = generate(
            tiny_model("uniform"),
            words(2, 3),
            decoding="arpc",
            corrector=corrector,
            block_size=4,
            max_new_tokens=6,
            **more,
        )
        assert text.shape == (2, 9)


@pytest.mark.parametrize("corrector", few_of([*AR_CORRECTORS, "random"]))
def test_allowed_correctors_run_on_a_masked_model(corrector: str) -> None:
    """No mask token is left, and tokens that were fixed may be re-noised: one-hot predictions give finite scores."""
    text = generate(
        tiny_model(),
        words(2, 3),
        decoding="arpc",
        corrector=corrector,
        block_size=4,
        denoising_steps=7,
        max_new_tokens=10,
    )
    assert text.shape == (2, 13) and not (text == MASK).any()


@pytest.mark.parametrize("corrector", DIFFUSION_CORRECTORS)
def test_masked_models_refuse_scores_that_they_never_learnt(corrector: str) -> None:
    """Suppl. B.1: predictions at visible tokens get no training signal. Elsewhere the setting is idle."""
    model = tiny_model()
    with pytest.raises(ValueError, match=f"`corrector='{corrector}'`"):
        generate(model, words(1, 3), max_new_tokens=4, decoding="arpc", corrector=corrector)
    assert generate(model, words(1, 3), max_new_tokens=4, decoding="ar", corrector=corrector).shape == (1, 7)


def test_arpc_without_an_informed_step_is_block_diffusion() -> None:
    """A start behind the last step: the same draws, the same text."""
    model, settings = tiny_model(), dict(block_size=4, denoising_steps=4, max_new_tokens=8)
    expected = generate(model, words(2, 3), decoding="block_diffusion", **settings)
    text = generate(model, words(2, 3), decoding="arpc", corrector_start=3, **settings)
    assert torch.equal(text, expected)


def test_greedy_noise_removal_takes_the_arg_max_at_the_last_step() -> None:
    """DESIGN section 6: from the state before it."""
    for variant in ("masked", "uniform"):
        model = tiny_model(variant)
        outputs = generate(
            model,
            words(6, 3),
            decoding="block_diffusion",
            block_size=SIZE,
            denoising_steps=3,
            max_new_tokens=SIZE,
            noise_removal="greedy",
            return_dict_in_generate=True,
            output_trajectory=True,
        )
        ((*_, before, after),) = outputs.trajectory
        expected = torch.from_numpy(diffusion_probabilities(model, before).argmax(-1))
        if variant == "masked":
            expected = torch.where(before == MASK, expected, before)
        assert torch.equal(after, expected)


# ---- the scores themselves
def log_probabilities(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("corrector", [*AR_CORRECTORS, *DIFFUSION_CORRECTORS])
def test_scores_are_those_of_the_paper(corrector: str) -> None:
    """Suppl. B.1, by numpy."""
    log_d, log_ar = log_probabilities(2, 5, 7), log_probabilities(2, 5, 7, seed=1)
    proposal = torch.randint(7, (2, 5))
    verification = Prediction(log_ar.flatten(0, 1), do_sample=True) if corrector in AR_CORRECTORS else None
    score = penalties(corrector, proposal, log_d, verification, torch.zeros(2, 5))
    expected = score_by_hand(corrector, log_d.exp().numpy(), log_ar.exp().numpy(), proposal.numpy())
    np.testing.assert_allclose(score.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("corrector", AR_CORRECTORS)
def test_scores_of_one_hot_predictions_are_finite_and_ordered(corrector: str) -> None:
    """Carried-over tokens of a masked model: -inf log-probabilities; the less likely under AR, the worse."""
    log_ar = log_probabilities(1, 4, 5)
    tokens = log_ar.argsort(-1)[..., -1].clone()  # the likeliest ...
    tokens[0, 2] = log_ar[0, 2].argmin()  # ... but for one
    log_d = torch.full((1, 4, 5), -torch.inf, dtype=torch.float64).scatter_(-1, tokens[..., None], 0.0)
    score = penalties(corrector, tokens, log_d, Prediction(log_ar.flatten(0, 1), do_sample=True), torch.zeros(1, 4))
    assert score.isfinite().all()
    if corrector != "ar_entropy":
        assert score.argmax() == 2


def test_fixed_positions_stay() -> None:
    """`worst_positions`: exactly k, unless more are fixed."""
    penalty, uniform = torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0]]), torch.zeros(1, 5)
    assert worst_positions(penalty, 2, None, uniform).tolist() == [[False, True, True, False, False]]
    fixed = torch.tensor([[False, True, False, False, True]])
    assert worst_positions(penalty, 2, fixed, uniform).tolist() == [[False, False, True, True, False]]
    assert worst_positions(penalty, 4, fixed, uniform).tolist() == [[True, False, True, True, False]]
    assert worst_positions(penalty, 5, fixed, uniform).sum() == 3


def test_equal_penalties_are_ranked_at_random_and_not_by_position() -> None:
    """Of 5 equal ones each is among the 2 worst in 2 of 5 draws, whatever is larger stays first, draws repeat."""
    rows = 4000
    uniform = CounterGenerator.from_seed(0, "cpu").fold_in(torch.arange(rows * 6).view(rows, 6)).uniform()
    penalty = torch.zeros(rows, 6)
    penalty[:, 3] = 1.0
    worst = worst_positions(penalty, 3, None, uniform)
    assert worst[:, 3].all() and (worst.sum(-1) == 3).all()
    shares = worst[:, [0, 1, 2, 4, 5]].double().mean(0)
    torch.testing.assert_close(shares, torch.full((5,), 0.4, dtype=torch.float64), atol=0.04, rtol=0)
    assert torch.equal(worst, worst_positions(penalty, 3, None, uniform))


def test_tokens_that_a_model_is_equally_sure_of_are_accepted_in_random_order() -> None:
    """A block of equal predictions, one accepted a step: over many rows the first to be accepted is any of them."""
    rows, length = 400, 4
    prediction = Prediction(torch.zeros(rows * length, 7), True)
    uniform = CounterGenerator.from_seed(1, "cpu").fold_in(torch.arange(rows * length).view(rows, length)).uniform()
    accepted = _accepted(prediction, torch.ones(rows, length, dtype=torch.bool), "confidence", 0.9, uniform)
    assert (accepted.sum(-1) == 1).all()
    shares = accepted.double().mean(0)
    torch.testing.assert_close(shares, torch.full((length,), 0.25, dtype=torch.float64), atol=0.08, rtol=0)
