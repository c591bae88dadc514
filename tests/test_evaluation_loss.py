"""`forward(labels=...)` in evaluation mode: the bound itself, the same every time, and what it costs."""

from typing import Any

import pytest
import torch
from tiny import PAD, tiny_model, words
from transformers import Trainer, TrainingArguments

from blockgen_hf.evaluation import evaluate_likelihood
from blockgen_hf.modeling.evaluation_draws_blockgen import NUM_DRAWS


VARIANTS = ("masked", "uniform", "time_conditional", "uniform_time_conditional", "block_causal")


def batch() -> dict[str, torch.Tensor]:
    """Three rows of 14, 14 and 9 tokens, with a prompt, a token that is not scored, and documents."""
    text = words(3, 14)
    text[2, 9:] = PAD
    labels = text.clone()
    labels[0, :5] = labels[1, 6] = labels[2, 9:] = -100
    mask = torch.ones_like(text)
    mask[2, 9:] = 0
    documents = torch.zeros_like(text)
    documents[1, 6:] = 1
    return {"input_ids": text, "labels": labels, "attention_mask": mask, "document_ids": documents}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_jensen_bound(variant: str) -> None:
    """Of `evaluate_likelihood` with as many draws, weights of the mixture and zero weights among them."""
    mixture = {"block_sizes": [1, 2, 4, 8], "block_size_weights": [0.5, 0.3, 0.0, 0.2]}
    model = tiny_model(variant, **({} if variant == "block_causal" else mixture))
    expected = evaluate_likelihood(model, batch(), monte_carlo_samples=NUM_DRAWS)
    assert expected.jensen is not None
    with torch.no_grad():
        outputs = model(**batch())
    assert outputs.loss.item() == pytest.approx(expected.jensen.nll, rel=1e-5)
    assert outputs.token_losses.sum().item() == pytest.approx(expected.jensen.nll * expected.num_tokens, rel=1e-5)
    assert (outputs.token_losses[batch()["labels"] == -100] == 0).all()


def test_the_loss_of_a_block_size_is_its_bound() -> None:
    model = tiny_model()
    expected = evaluate_likelihood(model, batch(), [4], NUM_DRAWS)
    assert model(**batch(), block_size=4).loss.item() == pytest.approx(expected.block_sizes[4].nll, rel=1e-5)


def test_the_loss_does_not_depend_on_random_numbers_or_the_batch() -> None:
    model, text = tiny_model(), words(4, 12)
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        losses.append(model(text, labels=text).loss.item())
    assert losses[0] == losses[1] == losses[2]
    alone = [model(row[None], labels=row[None]).loss.item() for row in text]
    assert sum(alone) / 4 == pytest.approx(losses[0], rel=1e-5)
    model.train()
    assert len({model(text, labels=text).loss.item() for _ in range(4)}) == 4


@pytest.mark.parametrize(("variant", "passes"), [("masked", 1 + 2 * NUM_DRAWS), ("uniform", 3 * NUM_DRAWS)])
def test_what_the_loss_costs(variant: str, passes: int) -> None:
    """Passes of the trunk; a block size without weight costs none, and the AR baseline has one pass."""
    for model, expected in (
        (tiny_model(variant, block_sizes=[1, 2, 4, 8], block_size_weights=[0.4, 0.3, 0.0, 0.3]), passes),
        (tiny_model(next_token_prediction=True, block_sizes=[1], adaptive_layer_norm=False), 1),
    ):
        calls: list[int] = []
        handle = model.model.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        model(words(2, 8), labels=words(2, 8))
        handle.remove()
        assert len(calls) == expected


def test_logits_are_those_of_the_first_pass() -> None:
    """Of block size 1, which predict every token from those before it; or none, with the same loss."""
    model, text = tiny_model(), words(2, 8)
    outputs = model(text, labels=text)
    causal = torch.cat([model(text[:, :0]).logits, model(text[:, :-1]).logits], dim=1)
    torch.testing.assert_close(outputs.logits[..., :20], causal[..., :20], atol=1e-5, rtol=1e-5)
    without = model(text, labels=text, skip_logits=True)
    assert without.logits is None
    torch.testing.assert_close(without.loss, outputs.loss)


def test_gradients_are_the_same_with_and_without_logits() -> None:
    gradients = []
    for skip_logits in (False, True):
        model = tiny_model("uniform")
        model(**batch(), skip_logits=skip_logits).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_the_sum_is_divided_by_the_number_of_items() -> None:
    model, text = tiny_model(), words(2, 8)
    mean = model(text, labels=text).loss
    torch.testing.assert_close(model(text, labels=text, num_items_in_batch=32).loss, mean / 2)


@pytest.mark.parametrize("given", [{"noise_level": 0.5}, {"objective": "elbo"}, {"block_size": [2, 4]}])
def test_what_is_given_is_used_as_it_is(given: dict[str, Any]) -> None:
    """One pass, as in training: the rest is drawn."""
    model, text = tiny_model(), words(2, 8)
    calls: list[dict[str, Any]] = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    model(text, labels=text, **given)
    assert len(calls) == 1
    if "noise_level" in given and calls[0]["block_size"] != 1:
        assert (calls[0]["noise_level"] == 0.5).all()


@pytest.mark.parametrize("offset", [0, 3])
def test_positions_that_are_given_cut_the_same_blocks(offset: int) -> None:
    """Blocks are counted from the first position, so that the bound is that of the row."""
    model, text = tiny_model(max_position_embeddings=64), words(2, 10)
    loss = model(text, labels=text, position_ids=torch.arange(10)[None] + offset).loss
    # Rotary positions are relative: an offset changes nothing.
    torch.testing.assert_close(loss, model(text, labels=text).loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["attention_mask", "document_ids"])
def test_columns_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must have the shape of `input_ids`"):
        tiny_model()(words(2, 8), labels=words(2, 8), **{name: torch.ones(2, 7, dtype=torch.long)})


def test_plain_trainer_s_figure_is_reproducible(tmp_path: Any) -> None:
    """Also in another batch size, and whatever was drawn before."""
    rows = [{"input_ids": row, "labels": row} for row in words(8, 12)]
    model, figures = tiny_model(), []
    for batch_size in (2, 4):
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=batch_size
        )
        figures.append(Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"])
        torch.rand(3)
    expected = evaluate_likelihood(model, rows, monte_carlo_samples=NUM_DRAWS).jensen
    assert expected is not None
    assert figures == pytest.approx([expected.nll] * 2, rel=1e-5)
