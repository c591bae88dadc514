"""What is measured of a trained model: likelihood, texts, answers, and how much the loss of training varies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.evaluation import evaluate_lengths, evaluate_likelihood
from blockgen_hf.evaluation.rows import collated
from blockgen_hf.evaluation.samples import SampleScorer, sample_cells
from blockgen_hf.evaluation.samples_drawing import draw_texts
from blockgen_hf.training.draws import StepDraws, corrupt_batch
from blockgen_hf.training.noise_intervals import noise_variance

from .tasks import Task, long_rows, share_of_right_equations


if TYPE_CHECKING:
    from .runs import Bench

MIXTURE_SIZES = (1, 2, 4, 8, 16)
LENGTHS = (1, 2, 4, 8)
_BATCH_SIZE = 64


def likelihood(bench: "Bench", task: Task, model: BlockGenForDiffusionLM, key: str) -> dict[str, Any]:
    """Of the block sizes that a model was trained on, of a mixture also of those between them."""
    sizes = model.config.block_sizes
    if len(sizes) > 1 and max(sizes) == max(MIXTURE_SIZES):
        sizes = list(MIXTURE_SIZES)
    draws = bench.settings.eval_draws
    return evaluate_likelihood(model, task.validation, sizes, draws, batch_size=_BATCH_SIZE).metrics()


def lengths(bench: "Bench", task: Task, model: BlockGenForDiffusionLM, key: str) -> dict[str, Any]:
    """Of tokens by their position in trained lengths; `key` is the block size and the window, 0 for none."""
    block_size, window = map(int, key.split())
    found = evaluate_lengths(
        model,
        long_rows(task, bench.settings, max(LENGTHS)),
        LENGTHS,
        [block_size],
        bench.settings.eval_draws,
        cache_window=window or None,
        batch_size=_BATCH_SIZE,
    )
    return {
        f"perplexity_{n}": part.at_positions[block_size].perplexity
        for n, part in zip(LENGTHS, found.lengths, strict=True)
    }


def samples(bench: "Bench", task: Task, model: BlockGenForDiffusionLM, key: str) -> dict[str, Any]:
    """Texts that are drawn from nothing by the decoding `key`: what they cost and what they are worth."""
    cells, _ = sample_cells(model, [key.format(length=task.length)], max_new_tokens=task.length)
    texts, _ = draw_texts(
        model,
        task.tokenizer,
        cells[0],
        range(bench.settings.texts),
        max_new_tokens=task.length,
        batch_size=_BATCH_SIZE,
    )
    evaluations = sum(text.num_function_evaluations for text in texts) / sum(len(text.token_ids) for text in texts)
    judge = bench.judge if task.name == "tinystories" else None
    scores = SampleScorer(task.tokenizer, judge, batch_size=_BATCH_SIZE).score(texts)
    kept: dict[str, Any] = {name: scores[name] for name in ("perplexity", "entropy", "distinct_2") if name in scores}
    if task.name == "arithmetic":
        kept["right"] = 100 * share_of_right_equations([text.text for text in texts])
    return {**kept, "evaluations_per_token": evaluations}


def noise(bench: "Bench", task: Task, model: BlockGenForDiffusionLM, key: str) -> dict[str, Any]:
    """Variance of the ELBO and its gradient with noise levels on an interval; `key` is its ends."""
    low, high = map(float, key.split())
    with _objective(model, "elbo"):
        found = noise_variance(
            model,
            task.validation,
            max(model.config.block_sizes),
            (low, high),
            draws=bench.settings.variance_draws,
            batch_size=bench.settings.batch_size,
            gradient=True,
        )
    return {"mean": found.mean, "loss": found.loss, "gradient": found.gradient}


def block_sizes(bench: "Bench", task: Task, model: BlockGenForDiffusionLM, key: str) -> dict[str, Any]:
    """Variance of the loss and the gradient of a training step; `key` says how its block sizes are drawn."""
    config, batch_size = model.config, bench.settings.batch_size
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    losses, gradients = [], []
    rows = list(islice(task.train, bench.settings.eval_rows))
    for draw in range(bench.settings.variance_draws):
        for number, (_, batch) in enumerate(collated(rows, batch_size, None)):
            tensors = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
            step = StepDraws(draw, number, len(batch["input_ids"]))
            places = torch.arange(len(batch["input_ids"]))
            sizes = tuple(step.block_sizes(config.block_sizes, config.block_size_weights, len(places), key))
            drawn = corrupt_batch(tensors, model.diffusion, step, places, sizes, "sequence")
            loss = model(**tensors, **drawn, block_size=sizes, skip_logits=True).loss
            losses.append(loss.detach())
            gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]))
    return {
        "loss": torch.stack(losses).var().item(),
        "gradient": torch.stack(gradients).var(0).sum().item(),
    }


@contextmanager
def _objective(model: BlockGenForDiffusionLM, objective: str) -> Iterator[None]:
    before, model.config.training_objective = model.config.training_objective, objective
    try:
        yield
    finally:
        model.config.training_objective = before


Measure = Callable[["Bench", Task, BlockGenForDiffusionLM, str], dict[str, Any]]
MEASURES: dict[str, Measure] = {
    "likelihood": likelihood,
    "lengths": lengths,
    "samples": samples,
    "noise": noise,
    "block sizes": block_sizes,
}
