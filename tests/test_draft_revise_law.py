"""`decoding="draft_revise"` has the law of its definition, which is computed by brute force."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from enumeration import Array, Oracle, Process, Tokens, chi_square_p_value, factorized, prior, states
from test_generate_law import LENGTH, SIGNIFICANCE, VOCAB_SIZE, case, law_model, oracle_of
from tiny import generate

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.generation.denoising_blockgen import Block


# Equal tokens behind nothing else, or behind their like, would have equal predictions, and tie.
PROMPT = (1, 2)
NUM_SAMPLES = 10_000


# Drafts have blocks of 2, in two steps.
def p_value(model: BlockGenForDiffusionLM, law: Array, **settings: Any) -> float:
    samples = generate(model, torch.tensor([PROMPT] * NUM_SAMPLES), seed=11, max_new_tokens=LENGTH, **settings)
    return chi_square_p_value(samples[:, len(PROMPT) :].numpy(), law)


def block_draft(oracle: Oracle, prefix: Tokens) -> tuple[Array, Array, Array]:
    """
    Every way of two steps to a block of two tokens: the tokens `[M, 2]`, the probability x_hat of each as it was
    committed, `[M, 2]`, and the probability of the way, `[M]`.

    A masked token is committed when it is revealed, a uniform one in the last step.
    """
    z = states(VOCAB_SIZE, 2)
    x_hat = oracle.x_hat_of_all_states(prefix, 2, 2)
    kernels = [factorized(oracle.posterior(x_hat, z, alpha_s, alpha_t)) for alpha_t, alpha_s in oracle.alphas(2)]
    first = factorized(np.broadcast_to(oracle.prior, (1, 2, VOCAB_SIZE)))[0] @ kernels[0]
    ways = first[:, None] * kernels[1]  # [z_1, x]
    middle, end = np.nonzero(ways)
    last = np.take_along_axis(x_hat[middle], z[end][..., None], -1)[..., 0]
    if oracle.process == "masked":
        mask = VOCAB_SIZE - 1
        all_masked = x_hat[-1]  # of the last state, of mask tokens only
        early = np.stack([all_masked[position][z[end][:, position]] for position in range(2)], axis=-1)
        last = np.where(z[middle] == mask, last, early)
    return z[end], last, ways[middle, end]


def draft_with_confidence(oracle: Oracle) -> tuple[Array, Array, Array]:
    """Drafts of two blocks: tokens `[M, 4]`, confidence `[M, 4]`, probability `[M]`."""
    columns = []
    for tokens, confidence, weight in zip(*block_draft(oracle, PROMPT), strict=True):
        more_tokens, more_confidence, more_weight = block_draft(oracle, PROMPT + tuple(tokens.tolist()))
        rows = len(more_weight)
        columns.append(
            (
                np.concatenate([np.broadcast_to(tokens, (rows, 2)), more_tokens], axis=1),
                np.concatenate([np.broadcast_to(confidence, (rows, 2)), more_confidence], axis=1),
                weight * more_weight,
            )
        )
    tokens, confidence, weight = (np.concatenate(column) for column in zip(*columns, strict=True))
    return tokens, confidence, weight


def revise(oracle: Oracle, law: Array, positions: Array, block_size: int, steps: int) -> Array:
    """The law of texts, `[V ** 4]`, whose tokens at some positions `[4]` are put to noise and denoised in blocks."""
    for begin in range(0, LENGTH, block_size):
        revised = positions[begin : begin + block_size]
        n = len(revised)
        z = states(VOCAB_SIZE, n)
        clean = np.eye(VOCAB_SIZE)[z]
        noise = factorized(np.where(revised[:, None], prior(oracle.process, VOCAB_SIZE), clean))
        law = law.reshape(VOCAB_SIZE**begin, VOCAB_SIZE**n, -1)
        new = np.zeros_like(law)
        for index, prefix in enumerate(itertools.product(range(VOCAB_SIZE), repeat=begin)):
            if not law[index].any():
                continue
            x_hat = oracle.x_hat_of_all_states(PROMPT + prefix, n, block_size)
            kernel = noise
            for alpha_t, alpha_s in oracle.alphas(steps):
                moves = oracle.posterior(x_hat, z, alpha_s, alpha_t)
                kernel = kernel @ factorized(np.where(revised[:, None], moves, clean))
            new[index] = kernel.T @ law[index]
        law = new.ravel()
    return law


def revised_law(process_oracle: Oracle, count: int, block_size: int, steps: int) -> Array:
    """Draft, `count` tokens of lowest confidence back to the prior, revision."""
    tokens, confidence, weight = draft_with_confidence(process_oracle)
    lowest = np.argsort(confidence, axis=-1)[:, :count]
    chosen = (2**lowest).sum(-1)
    law = np.zeros(VOCAB_SIZE**LENGTH)
    for subset in np.unique(chosen):
        here = chosen == subset
        index = np.ravel_multi_index(tuple(tokens[here].T), (VOCAB_SIZE,) * LENGTH)
        drafts = np.bincount(index, weights=weight[here], minlength=VOCAB_SIZE**LENGTH)
        positions = (subset >> np.arange(LENGTH) & 1).astype(bool)
        law += revise(process_oracle, drafts, positions, block_size, steps)
    return law.reshape((VOCAB_SIZE,) * LENGTH)


def settings_of(ratio: float, block_size: int, steps: int, **others: Any) -> dict[str, Any]:
    return dict(
        decoding="draft_revise",
        block_size=2,
        denoising_steps=2,
        revise_block_size=block_size,
        revise_ratio=ratio,
        revise_steps=steps,
        **others,
    )


@pytest.mark.parametrize("process", ["masked", "uniform"])
def test_the_oracle_of_revisions_agrees_with_that_of_block_diffusion(process: Process) -> None:
    """No token revised: the draft. Every token in one block: block diffusion with that block. A law in between."""
    oracle = oracle_of(law_model(process))
    draft, whole = (oracle.block_diffusion_law(LENGTH, *how, prompt=PROMPT) for how in ((2, 2), (4, 3)))
    np.testing.assert_allclose(revised_law(oracle, 0, 4, 3), draft, atol=1e-12)
    np.testing.assert_allclose(revised_law(oracle, 4, 4, 3), whole, atol=1e-12)
    between = revised_law(oracle, 2, 4, 3)
    assert np.abs(between - draft).sum() > 0.1
    assert np.abs(between - whole).sum() > 0.1


@pytest.mark.parametrize("process", [case("masked", slow=True), "uniform"])
def test_a_whole_revision_has_the_law_of_block_diffusion(process: Process) -> None:
    model = law_model(process)
    law = oracle_of(model).block_diffusion_law(LENGTH, 4, 3, prompt=PROMPT)
    assert p_value(model, law, **settings_of(1.0, 4, 3)) > SIGNIFICANCE


@pytest.mark.parametrize(
    "process, count, block_size, steps",
    [
        case("masked", 2, 4, 2),
        case("masked", 2, 3, 2, slow=True),  # a window that is shorter
        case("masked", 1, 4, 1, slow=True),
        case("masked", 3, 4, 3, slow=True),
        case("uniform", 2, 4, 2),
        case("uniform", 3, 3, 2, slow=True),
        case("uniform", 1, 4, 3, slow=True),
    ],
)
def test_a_revision_in_part_has_its_exact_law(process: Process, count: int, block_size: int, steps: int) -> None:
    """Against brute force: draft with the confidence of each token as it was committed, remask, infill."""
    model = law_model(process)
    law = revised_law(oracle_of(model), count, block_size, steps)
    assert p_value(model, law, **settings_of(count / LENGTH, block_size, steps)) > SIGNIFICANCE


@pytest.mark.parametrize("process", ["masked", case("uniform", slow=True)])
def test_a_wrong_snapshot_is_noticed(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """The confidence of the likeliest token in place of that of the drawn one."""
    model = law_model(process)
    law = revised_law(oracle_of(model), 2, 4, 2)
    right = Block.keep_confidence

    def wrong(self: Block, where: torch.Tensor, prediction: Any, tokens: torch.Tensor) -> None:
        right(self, where, prediction, prediction.best())

    monkeypatch.setattr(Block, "keep_confidence", wrong)
    assert p_value(model, law, **settings_of(0.5, 4, 2)) < SIGNIFICANCE


@pytest.mark.slow
@pytest.mark.parametrize("process", ["masked", "uniform"])
@pytest.mark.parametrize("score", ["random", "posthoc", "ar_surprisal"])
def test_other_scores_have_other_laws(process: Process, score: str) -> None:
    model = law_model(process)
    law = revised_law(oracle_of(model), 2, 4, 2)
    assert p_value(model, law, **settings_of(0.5, 4, 2, revise_score=score)) < SIGNIFICANCE
