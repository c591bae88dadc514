"""`evaluate_likelihood`: bounds against exhaustive enumeration, the figures made of them, and what they depend on."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MASK, VOCAB_SIZE, record_forwards, tiny_model, words
from transformers import DynamicCache, StaticCache

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.evaluation import evaluate_likelihood, likelihood, likelihood_metrics, sequence_nll
from blockgen_hf.evaluation.figures import mixture_weights
from blockgen_hf.evaluation.rows import pad_rows
from blockgen_hf.modeling import masking_blockgen
from blockgen_hf.modeling.evaluation_draws_blockgen import EvaluationRows, evaluation_rows
from blockgen_hf.modeling.sampling_blockgen import CounterGenerator


TEXT = torch.tensor([0, 2, 1, 1, 0])


def four_tokens(variant: str, **overrides: Any) -> BlockGenForDiffusionLM:
    """A tiny model with a vocabulary of four, the last being the mask token if there is one."""
    return tiny_model(variant, scale=1.0, vocab_size=4, pad_token_id=None, **overrides)


def rows_of(*lengths: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": words(length, seed=index)} for index, length in enumerate(lengths)]


def prompted_rows() -> list[dict[str, torch.Tensor]]:
    """Rows of several lengths, some with a prompt."""
    rows = rows_of(3, 17, 32, 8, 1, 25, 11, 30)
    for row in rows[::2]:
        labels = row["input_ids"].clone()
        labels[: len(labels) // 3] = -100
        row["labels"] = labels
    return rows


# ---- the expectation
def exact_nll(
    model: BlockGenForDiffusionLM,
    scored: torch.Tensor,
    block_size: int,
    smallest_time: float,
    document_ids: torch.Tensor | None = None,
) -> float:
    """
    The mean of Eq. 18 over t and z_t as the paper has it, one t for the sequence: all z_t are summed, and t is
    integrated by Gauss and Legendre's rule in sqrt(t), where the integrand is smooth.
    """
    diffusion = model.diffusion
    tokens = range(4) if model.config.diffusion_type == "uniform" else (0, 3)
    noise = torch.tensor(list(itertools.product(tokens, repeat=int(scored.sum()))))
    if model.config.diffusion_type == "masked":
        noise = torch.where(noise == 3, 3, TEXT[scored])  # the token or its mask
    z = TEXT.repeat(len(noise), 1)
    z[:, scored] = noise
    x = TEXT.expand(len(z), -1)
    documents = None if document_ids is None else document_ids.expand(len(z), -1)
    prior = 0.25 if model.config.diffusion_type == "uniform" else (z == 3).double()
    nodes, masses = np.polynomial.legendre.leggauss(40)
    total, logits = 0.0, None
    for root, mass in zip((nodes + 1) / 2, masses / 2, strict=True):
        t = torch.tensor([[smallest_time + (1 - smallest_time) * root**2]], dtype=torch.float64)
        alpha = torch.zeros_like(t) if block_size == 1 else diffusion.schedule.alpha(t)
        probability = (alpha * (z == x) + (1 - alpha) * prior)[:, scored].prod(-1)
        if logits is None or model.config.time_conditioning:
            with torch.no_grad():
                logits = model(x, z, block_size=block_size, noise_level=t, document_ids=documents).logits
        objective = "cross_entropy" if block_size == 1 else "elbo"
        losses = diffusion.loss(logits, x, z, alpha, diffusion.schedule.alpha_derivative(t), objective)
        total += mass * 2 * root * float((probability * (losses.double() * scored).sum(-1)).sum())
    return total


def other_keys(rows: EvaluationRows) -> EvaluationRows:
    """As if every row said something else: copies of a row get independent noise."""
    keys = CounterGenerator.from_seed(1, "cpu").fold_in(torch.arange(len(rows.tokens))[:, None])
    return EvaluationRows(rows.tokens, rows.scored, rows.valid, rows.positions, rows.places, keys)


ALL, SOME = [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]
FAST: list[tuple[str, dict[str, Any], int, float, list[int]]] = [
    ("masked", {}, 2, 1e-3, ALL),
    ("masked", {}, 4, 0.3, ALL),
    ("masked", {}, 4, 1e-3, SOME),
    ("masked", {"noise_schedule": "cosine", "noise_schedule_eps": 0.1}, 5, 0.1, ALL),
    ("time_conditional", {}, 4, 1e-3, ALL),
    ("block_causal", {}, 4, 0.0, ALL),
    ("uniform", {}, 1, 1e-3, ALL),
    ("uniform", {}, 2, 1e-3, SOME),
    ("uniform", {}, 4, 1e-3, ALL),
]
SLOW: list[tuple[str, dict[str, Any], int, float, list[int]]] = [
    ("masked", {}, 2, 1e-3, SOME),
    ("masked", {}, 5, 1e-3, ALL),
    ("time_conditional", {}, 4, 1e-3, SOME),
    ("block_causal", {}, 4, 0.0, SOME),
    ("uniform", {}, 1, 1e-3, SOME),
    ("uniform", {}, 2, 1e-3, ALL),
    ("uniform", {}, 4, 1e-3, SOME),
    ("uniform", {"noise_schedule": "cosine"}, 5, 0.0, ALL),
    ("uniform_time_conditional", {}, 4, 1e-3, ALL),
]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("variant", "overrides", "block_size", "smallest_time", "scored"), CASES)
def test_every_draw_has_the_expectation_of_one_noise_level_a_sequence(
    variant: str,
    overrides: dict[str, Any],
    block_size: int,
    smallest_time: float,
    scored: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eq. 18, 19: each of K draws, and their mean, against all z_t and the integral over t, by a z-test."""
    model, counts = four_tokens(variant, **overrides), torch.tensor(scored).bool()
    monkeypatch.setattr(likelihood, "evaluation_rows", lambda *args: other_keys(evaluation_rows(*args)))
    copies, num_draws = 2000, 3
    batch = {"input_ids": TEXT.expand(copies, -1), "labels": torch.where(counts, TEXT, -100).expand(copies, -1)}
    nll = sequence_nll(model, batch, [block_size], num_draws, smallest_time=smallest_time)[:, 0]
    expected = exact_nll(model, counts, block_size, smallest_time)
    for draws in (*nll.T, nll.mean(-1)):
        assert abs(draws.mean() - expected) < 4 * draws.std() / math.sqrt(copies) + 1e-5 * expected


def test_blocks_of_packed_documents_are_counted_from_their_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `document_ids` noise levels follow the blocks of the attention mask, which start with each document."""
    model, documents = four_tokens("masked"), torch.tensor([0, 0, 0, 1, 1])
    monkeypatch.setattr(likelihood, "evaluation_rows", lambda *args: other_keys(evaluation_rows(*args)))
    batch = {"input_ids": TEXT.expand(2000, -1), "document_ids": documents.expand(2000, -1)}
    nll = sequence_nll(model, batch, [2], 2)[:, 0].mean(-1)
    expected = exact_nll(model, torch.ones(5, dtype=torch.bool), 2, 1e-3, documents)
    assert abs(nll.mean() - expected) < 4 * nll.std() / math.sqrt(2000)


def test_block_size_one_of_a_masked_model_is_exact_in_one_forward_pass(model: BlockGenForDiffusionLM) -> None:
    """Eq. 14: the autoregressive likelihood, the same in all draws."""
    text = words(2, 12)
    with record_forwards(model) as calls:
        nll = sequence_nll(model, {"input_ids": text}, [1], 5)
    assert len(calls) == 1
    assert nll.dtype == torch.float64 and nll.shape == (2, 1, 5)
    first = model(input_ids=text[:, :0]).logits
    logits = torch.cat([first, model(input_ids=text).logits[:, :-1]], dim=1)
    expected = -logits.log_softmax(-1).gather(-1, text[..., None]).sum((1, 2)).double()
    torch.testing.assert_close(nll, expected[:, None, None].expand(2, 1, 5), rtol=1e-5, atol=1e-5)
    figure = evaluate_likelihood(model, text, [1], 5).block_sizes[1]
    assert figure.nll_standard_error == figure.perplexity_standard_error == 0


def test_documents_are_scored_as_if_alone(model: BlockGenForDiffusionLM) -> None:
    """Two documents in a row, apart in attention, have the likelihoods of two rows."""
    first, second = words(7, seed=1), words(9, seed=2)
    packed = {"input_ids": torch.cat([first, second]), "document_ids": torch.tensor([4] * 7 + [9] * 9)}
    together = evaluate_likelihood(model, [packed], [1])
    alone = evaluate_likelihood(model, [first, second], [1])
    assert together.block_sizes[1].nll == pytest.approx(alone.block_sizes[1].nll, rel=1e-6)


def test_padding_with_the_id_of_a_document_does_not_move_its_blocks(model: BlockGenForDiffusionLM) -> None:
    """Pads on the left that carry the id of the first document: blocks are cut as the attention mask cuts them."""
    text, documents = words(1, 9), torch.tensor([[0] * 6 + [1] * 3])
    pads = torch.zeros(1, 3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([pads, text], dim=1),
        "document_ids": torch.cat([pads, documents], dim=1),
        "attention_mask": torch.cat([pads, torch.ones_like(text)], dim=1),
    }
    expected = sequence_nll(model, {"input_ids": text, "document_ids": documents}, [1, 4], 3)
    torch.testing.assert_close(sequence_nll(model, padded, [1, 4], 3), expected, rtol=1e-4, atol=1e-4)


# ---- what the figures depend on
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_figures_do_not_depend_on_batch_size_order_and_padding(variant: str) -> None:
    """Section 7 of the design: noise is keyed by what a row says."""
    model, rows = tiny_model(variant), prompted_rows()
    one = evaluate_likelihood(model, rows, [1, 4, 8], 3, batch_size=1).metrics()
    for batch_size in (3, 8):
        assert evaluate_likelihood(model, rows, [1, 4, 8], 3, batch_size=batch_size).metrics() == pytest.approx(one)
    shuffled = [rows[index] for index in (5, 2, 7, 0, 1, 6, 4, 3)]
    assert evaluate_likelihood(model, shuffled, [1, 4, 8], 3, batch_size=3).metrics() == pytest.approx(one)

    def pad_left(rows: list[Any]) -> dict[str, torch.Tensor]:
        """Padding on both sides."""
        batch = pad_rows(rows)
        fills = {"input_ids": 5, "labels": 7, "attention_mask": 0}
        batch = {name: torch.nn.functional.pad(column, (0, 6), value=fills[name]) for name, column in batch.items()}
        shift = [60 - int(mask.sum()) for mask in batch["attention_mask"]]
        wide = {name: torch.nn.functional.pad(column, (0, 40), value=fills[name]) for name, column in batch.items()}
        return {
            name: torch.stack([row.roll(by) for row, by in zip(column, shift, strict=True)])
            for name, column in wide.items()
        }

    padded = evaluate_likelihood(model, rows, [1, 4, 8], 3, batch_size=8, data_collator=pad_left)
    assert padded.metrics() == pytest.approx(one)
    other_seed = evaluate_likelihood(model, rows, [1, 4, 8], 3, seed=1).metrics()
    assert other_seed["nll_block_size_8"] != pytest.approx(one["nll_block_size_8"])


def test_noise_depends_on_all_that_a_row_says(model: BlockGenForDiffusionLM) -> None:
    """Tokens, their places, which are scored, where documents start: another key each. Copies share theirs."""
    text = words(10)
    nothing = torch.zeros(10, dtype=torch.long)
    scored, documents = nothing.clone(), nothing.clone()
    scored[3], documents[6:] = -100, 1
    variants = [
        {"input_ids": text},
        {"input_ids": text.flip(0)},
        {"input_ids": text, "labels": torch.where(scored == 0, text, -100)},
        {"input_ids": text, "document_ids": documents},
        {"input_ids": text[:9]},
    ]

    def key(row: dict[str, torch.Tensor]) -> int:
        batch = pad_rows([row])
        rows = evaluation_rows(
            batch["input_ids"], batch["labels"], batch["attention_mask"], batch.get("document_ids"), 0
        )
        return int(rows.generator.keys)

    keys = [key(row) for row in variants]
    assert len(set(keys)) == len(keys)
    assert key({"input_ids": text, "document_ids": nothing + 8}) == keys[0]  # one document is none
    assert key({"input_ids": text, "labels": text}) == keys[0]


def test_global_random_numbers_gradients_and_the_mode_of_modules_are_left_alone() -> None:
    """Dropout does not act, and a module that was frozen in evaluation mode stays so."""
    model = tiny_model(hidden_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = evaluate_likelihood(model, rows_of(9, 5), monte_carlo_samples=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert first == evaluate_likelihood(model.eval(), rows_of(9, 5), monte_carlo_samples=2)
    with pytest.raises(ValueError, match="not finite"):
        torch.nn.init.constant_(model.train().lm_head.bias, math.nan)
        evaluate_likelihood(model, rows_of(3))
    assert model.training


def test_wrapped_heads_and_models_give_the_same_figures(model: BlockGenForDiffusionLM) -> None:
    """An output layer that is no plain linear layer, as with adapters; a model wrapped for several devices."""

    class Adapted(torch.nn.Linear):
        pass

    batch = pad_rows(rows_of(9, 5))
    expected = sequence_nll(model, batch, [1, 4], 2)
    assert torch.equal(sequence_nll(torch.nn.DataParallel(model), batch, [1, 4], 2), expected)
    model.lm_head.__class__ = Adapted
    torch.testing.assert_close(sequence_nll(model, batch, [1, 4], 2), expected, rtol=1e-5, atol=1e-5)


def test_every_form_of_a_data_set_gives_the_same_figures(model: BlockGenForDiffusionLM) -> None:
    """Rows, token ids, columns, tensors, torch's and Hugging Face's data sets, streams."""
    datasets = pytest.importorskip("datasets")
    rows = words(5, 12).tolist()

    class TorchDataset(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": torch.tensor(rows[index % len(rows)])}

    def stream() -> Iterator[dict[str, Any]]:
        yield from ({"input_ids": row, "text": "unused"} for row in rows)

    columns = {"input_ids": rows, "attention_mask": [[1] * 12] * 5}
    forms: list[Any] = [
        rows,
        torch.tensor(rows),
        columns,
        TorchDataset(),
        stream(),
        datasets.Dataset.from_dict(columns),
        datasets.Dataset.from_dict(columns).with_format("torch"),
        datasets.IterableDataset.from_generator(stream),
    ]
    expected = evaluate_likelihood(model, [{"input_ids": row, "labels": row} for row in rows], [2], 2)
    for form in forms:
        assert evaluate_likelihood(model, form, [2], 2, batch_size=2) == expected


# ---- the figures
def test_figures_are_those_of_the_paper() -> None:
    """Eq. 7, 13, 19, 20 by hand: log-sum-exp a sequence, sums over sequences, divided by all tokens."""
    nll = torch.tensor([[[3.0, 5.0], [4.0, 4.0]], [[9.0, 7.0], [6.0, 10.0]]], dtype=torch.float64)
    result = likelihood_metrics(nll, torch.tensor([2, 3]), [1, 4], [3.0, 1.0], num_skipped=2)
    assert result.block_sizes[1].nll == pytest.approx((4 + 8) / 5)
    assert result.block_sizes[1].perplexity == pytest.approx(math.exp(12 / 5))
    assert result.jensen is not None and result.log_sum_exp is not None
    assert result.jensen.nll == pytest.approx(12 / 5)
    by_sequence = [-math.log(0.75 * math.exp(-mean) + 0.25 * math.exp(-mean)) for mean in (4, 8)]
    assert result.log_sum_exp.nll == pytest.approx(sum(by_sequence) / 5)
    assert result.weights == {1: 0.75, 4: 0.25}
    assert (result.num_sequences, result.num_tokens, result.num_skipped, result.num_draws) == (2, 5, 2, 2)
    spread = math.sqrt((3 - 5) ** 2 + (9 - 7) ** 2) / 2 / 5
    assert result.block_sizes[1].nll_standard_error == pytest.approx(spread)
    assert result.block_sizes[1].perplexity_standard_error == pytest.approx(spread * math.exp(12 / 5))
    assert likelihood_metrics(nll.numpy(), np.array([2, 3]), [1, 4], [3, 1], num_skipped=2) == result
    assert result.to_dict()["block_sizes"][4]["nll"] == result.metrics()["nll_block_size_4"]
    assert result.metrics()["perplexity_jensen"] == pytest.approx(math.exp(12 / 5))


def test_the_bound_of_the_geometric_mean_is_that_of_jensen() -> None:
    """Eq. 33: the weighted mean of the bounds; and no better than log-sum-exp, which bounds the mixture."""
    nll = torch.tensor([[[10.0], [4.0]], [[6.0], [7.0]]])
    result = likelihood_metrics(nll, torch.tensor([2, 3]), [1, 2], [3.0, 1.0])
    assert result.geometric_mean.nll == pytest.approx((0.75 * 16 + 0.25 * 11) / 5)
    assert result.geometric_mean == result.jensen and result.log_sum_exp.nll < result.jensen.nll


def test_the_log_sum_exp_of_unequal_block_sizes_prefers_the_better() -> None:
    """Eq. 20 lies between the best block size and Jensen's mean, and is no less than the best one's."""
    nll = torch.tensor([[[10.0], [14.0]], [[22.0], [19.0]]], dtype=torch.float64)
    result = likelihood_metrics(nll, torch.tensor([1, 1]), [1, 2])
    expected = -sum(math.log((math.exp(-a) + math.exp(-b)) / 2) for a, b in ((10, 14), (22, 19))) / 2
    assert result.log_sum_exp is not None and result.jensen is not None
    assert result.log_sum_exp.nll == pytest.approx(expected)
    assert (10 + 19) / 2 < result.log_sum_exp.nll < result.jensen.nll
    assert result.log_sum_exp.nll_standard_error is None  # one draw
    assert result.log_sum_exp_corrected is result.log_sum_exp_upper is None
    assert "nll_standard_error_jensen" not in result.metrics()


@pytest.mark.parametrize("num_draws", [2, 3, 8])
def test_the_corrected_log_sum_exp_is_nearer_to_the_truth(num_draws: int) -> None:
    """Four equally good block sizes whose bounds err: Eq. 20 finds luck, of which the correction leaves little."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 4, num_draws, generator=generator, dtype=torch.float64)
    result = likelihood_metrics(50 + math.sqrt(num_draws) * 0.7 * noise, torch.ones(20_000), [1, 2, 4, 8])
    assert result.log_sum_exp is not None and result.log_sum_exp_corrected is not None
    assert result.log_sum_exp_upper is not None
    assert 49.7 < result.log_sum_exp.nll < 49.87
    assert abs(result.log_sum_exp_corrected.nll - 50) < 0.04
    assert 50 < result.log_sum_exp_upper.nll < 50.35


def test_the_upper_log_sum_exp_is_no_less_than_the_truth_however_large_the_errors() -> None:
    """Eq. 20 by its variational form: halves of the draws that choose, and that are chosen from, are independent."""
    generator = torch.Generator().manual_seed(0)
    noise = 20 * torch.randn(20_000, 3, 2, generator=generator, dtype=torch.float64)
    mean = torch.tensor([50.0, 55.0, 90.0], dtype=torch.float64)
    weights = [0.2, 0.5, 0.3]
    result = likelihood_metrics(mean[:, None] + noise, torch.ones(20_000), [1, 2, 4], weights)
    truth = -math.log(sum(weight * math.exp(-value) for weight, value in zip(weights, mean.tolist(), strict=True)))
    assert result.log_sum_exp is not None and result.log_sum_exp_upper is not None
    assert result.log_sum_exp.nll < truth - 3 and truth < result.log_sum_exp_upper.nll < truth + 10
    exact = likelihood_metrics(mean[None, :, None].expand(1, 3, 2), torch.ones(1), [1, 2, 4], weights)
    for figure in (exact.log_sum_exp, exact.log_sum_exp_corrected, exact.log_sum_exp_upper):
        assert figure is not None and figure.nll == pytest.approx(truth)


@pytest.mark.parametrize("num_draws", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_standard_errors_are_the_spread_over_seeds(num_draws: int) -> None:
    """Of block sizes, and of the mixture's figures, with noise on grids."""
    model, rows = tiny_model(), words(24, 10)
    results = [evaluate_likelihood(model, rows, [1, 4], num_draws, batch_size=24, seed=seed) for seed in range(40)]
    for name in ("block_size_4", "log_sum_exp", "jensen"):
        figures = np.array([result.metrics()[f"nll_{name}"] for result in results])
        errors = np.array([result.metrics()[f"nll_standard_error_{name}"] for result in results])
        assert 0.7 < np.sqrt((errors**2).mean()) / figures.std(ddof=1) < 1.4
    assert all(result.block_sizes[1] == results[0].block_sizes[1] for result in results)


def test_the_mixture_is_that_of_the_configuration() -> None:
    """Sizes that it lacks are evaluated beside; of some of its sizes the weights are made to add up to 1."""
    model = tiny_model(block_sizes=[1, 2, 4], block_size_weights=[0.5, 0.3, 0.2])
    rows = rows_of(9, 5)
    assert evaluate_likelihood(model, rows, monte_carlo_samples=1).weights == pytest.approx({1: 0.5, 2: 0.3, 4: 0.2})
    some = evaluate_likelihood(model, rows, [1, 2, 3], 2)
    assert some.weights == pytest.approx({1: 0.625, 2: 0.375})
    nll = {size: figure.nll for size, figure in some.block_sizes.items()}
    assert some.jensen is not None and some.jensen.nll == pytest.approx(0.625 * nll[1] + 0.375 * nll[2])
    none = evaluate_likelihood(model, rows, [3], 1)
    assert none.weights == {} and none.log_sum_exp is none.log_sum_exp_upper is none.jensen is None
    given = evaluate_likelihood(model, rows, [1, 3], 1, weights={3: 2.0})
    assert given.weights == {3: 1.0} and given.jensen == given.block_sizes[3]
    assert evaluate_likelihood(model, rows, [1, 3], 1, weights=[1, 3]).weights == {1: 0.25, 3: 0.75}
    assert mixture_weights([1, 2], None, [2, 4]) == [1.0, 0.0]


def test_rows_without_scored_tokens_are_skipped_and_counted(model: BlockGenForDiffusionLM) -> None:
    """Prompts alone, padding alone, nothing at all."""
    rows: list[dict[str, Any]] = rows_of(9, 5)
    empty: list[dict[str, Any]] = [
        {"input_ids": [1, 2], "labels": [-100, -100]},
        {"input_ids": [1, 2], "attention_mask": [0, 0]},
        {"input_ids": []},
    ]
    result = evaluate_likelihood(model, [empty[0], rows[0], *empty[1:], rows[1]], [2], 2, batch_size=2)
    assert result.metrics() == pytest.approx(evaluate_likelihood(model, rows, [2], 2).metrics())
    assert (result.num_sequences, result.num_tokens, result.num_skipped) == (2, 14, 3)


# ---- bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": []}, "`dataset` must have rows with scored tokens"),
        ({"dataset": [{"input_ids": [1], "labels": [-100]}]}, "none of its 1 rows"),
        ({"dataset": {"train": [], "test": []}}, "['train', 'test']"),
        ({"dataset": [[1], {"text": "a"}]}, "Row 1 of `dataset` has no `input_ids`, but only ['text']"),
        ({"dataset": [[1], {"input_ids": [1, 2], "labels": [1]}]}, "`labels` of the shape [1]: every token needs one"),
        ({"dataset": [[[1, 2]]]}, "Row 0 of `dataset` must have columns of one dimension"),
        ({"dataset": [[1], [2] * 65]}, "Row 1 of `dataset` has 65 tokens, but the model has 64 positions"),
        ({"dataset": [[1], [VOCAB_SIZE]]}, "Row 1 of `dataset` has the token 23"),
        ({"dataset": [[1], [-1]]}, "Row 1 of `dataset` has the token -1"),
        ({"dataset": [[1], [MASK]]}, "Row 1 of `dataset` has the mask token 22"),
        ({"monte_carlo_samples": 0}, "`monte_carlo_samples` must be a positive integer, but is 0"),
        ({"monte_carlo_samples": 2.0}, "`monte_carlo_samples` must be a positive integer, but is 2.0"),
        ({"block_sizes": [4, 0]}, "`block_sizes` must be positive integers, but are [4, 0]"),
        ({"block_sizes": []}, "`block_sizes` must be at least one size"),
        ({"block_sizes": [4, 4]}, "each once, but are [4, 4]"),
        ({"batch_size": 0}, "`batch_size` must be positive, but is 0"),
        ({"smallest_time": 1}, "`smallest_time` must be in [0, 1), but is 1"),
        ({"weights": [1.0]}, "`weights` must be 2, one a block size, but are [1.0]"),
        ({"weights": {8: 1.0}}, "`weights` must be of the block sizes [1, 4]"),
        ({"weights": [1.0, -1.0]}, "none negative"),
        ({"data_collator": lambda rows: {"ids": rows}}, "`data_collator` must return a batch with `input_ids`"),
        ({"data_collator": lambda rows: {"input_ids": torch.ones(1)}}, "`data_collator` must return tensors"),
    ],
)
def test_bad_input_is_refused_by_name(model: BlockGenForDiffusionLM, arguments: dict[str, Any], message: str) -> None:
    """A ValueError that says what was given, and what is accepted."""
    with pytest.raises(ValueError) as error:
        evaluate_likelihood(model, **{"dataset": [[1, 2]], "block_sizes": [1, 4], **arguments})
    assert message in str(error.value)


def test_block_causal_models_are_evaluated_on_their_grid() -> None:
    """Other blocks would see what they predict."""
    model = tiny_model("block_causal")
    assert set(evaluate_likelihood(model, rows_of(9), monte_carlo_samples=1).block_sizes) == {4}
    with pytest.raises(ValueError, match="`block_sizes` must be multiples of 4"):
        evaluate_likelihood(model, rows_of(9), [1, 4])


def test_figures_that_are_not_finite_name_the_row(model: BlockGenForDiffusionLM) -> None:
    """Rows are numbered as in the data set, with those that are skipped."""
    torch.nn.init.constant_(model.model.embed_tokens.weight[7].data, math.nan)
    rows = [{"input_ids": [1, 2], "labels": [-100, -100]}, [1, 2], [3, 7]]
    with pytest.raises(ValueError, match="row 2 of `dataset` at block size 4 is not finite"):
        evaluate_likelihood(model, rows, [4], 2, batch_size=2)


def test_figures_of_bad_arrays_are_refused() -> None:
    """`likelihood_metrics` names the shapes; what is not finite goes through it, for a training run to log."""
    with pytest.raises(ValueError, match="1 block sizes"):
        likelihood_metrics(torch.zeros(2, 3, 4), torch.ones(2), [1])
    with pytest.raises(ValueError, match="no sequence with a scored token"):
        likelihood_metrics(torch.zeros(2, 1, 4), torch.zeros(2), [1])
    assert math.isnan(likelihood_metrics(torch.full((1, 1, 2), math.nan), torch.ones(1), [1]).block_sizes[1].nll)
    assert likelihood_metrics(torch.full((1, 1, 2), 1e4), torch.ones(1), [1]).block_sizes[1].perplexity == math.inf


def test_the_first_figure_of_the_mixture_is_a_bound() -> None:
    """Jensen's, in metrics and JSON: the log-sum-exp of few noisy draws is below the best of its parts."""
    nll = torch.tensor([[[100.0, 140.0], [140.0, 100.0]], [[150.0, 110.0], [110.0, 150.0]]])
    result = likelihood_metrics(nll[..., :1], torch.tensor([40, 40]), [1, 4])
    names = [name for name in result.metrics() if name.startswith("perplexity_") and "block_size" not in name]
    assert names[0] == "perplexity_jensen"
    assert next(name for name in result.to_dict() if name != "block_sizes") == "jensen"
    assert result.jensen is not None and result.log_sum_exp is not None
    assert result.log_sum_exp.nll < min(figure.nll for figure in result.block_sizes.values()) <= result.jensen.nll


# ---- the clean half, computed once
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", ["masked", "uniform_time_conditional", "block_causal"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_draws_share_the_clean_half(
    variant: str, padded: bool, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are those of a pass over both halves for each draw; chunks of queries included."""
    monkeypatch.setattr(masking_blockgen, "CHUNK_SIZE", 8)
    masking_blockgen._plain_training_mask.cache_clear()
    model = tiny_model(variant)
    model.set_attn_implementation(attention)
    batch = {"input_ids": words(2, 19)}
    if padded:
        batch["attention_mask"] = torch.ones(2, 19, dtype=torch.long)
        batch["attention_mask"][0, 12:] = batch["attention_mask"][1, :4] = 0
    sizes = [4, 8, 32] if variant == "block_causal" else [1, 4, 5, 32]
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = sequence_nll(model, batch, sizes, 2)
    assert lengths[0] == 19 and not any(lengths[1:])
    with monkeypatch.context() as patch:
        patch.setattr(likelihood, "DynamicCache", lambda config: None)
        expected = sequence_nll(model, batch, sizes, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    masking_blockgen._plain_training_mask.cache_clear()


def test_the_loss_in_evaluation_mode_shares_it_too() -> None:
    model, text = tiny_model(), words(2, 16)
    expected = model(text, labels=text)  # with gradients, every pass for itself
    with torch.no_grad():
        found = model(text, labels=text)
    assert found.cache is None
    torch.testing.assert_close(found.token_losses, expected.token_losses, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.logits, expected.logits)


@torch.no_grad()
def test_a_cache_that_cannot_hold_the_clean_half_is_refused() -> None:
    model, text = tiny_model(), words(2, 16)
    noise = dict(labels=text, noisy_input_ids=text, noise_level=0.5)
    other = DynamicCache(config=model.config)
    model(words(2, 4), cache=other, use_cache=True)
    for cache in (other, StaticCache(config=model.config, max_cache_len=16)):
        with pytest.raises(ValueError, match="must be a DynamicCache that is empty"):
            model(text, **noise, cache=cache)
    with pytest.raises(ValueError, match="with `document_ids`"):
        model(text, **noise, cache=DynamicCache(config=model.config), document_ids=torch.zeros_like(text))
    with pytest.raises(ValueError, match="training has no cache"):
        model(text, labels=text, cache=other)
