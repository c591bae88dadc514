"""The paper's AR baseline, a dense causal transformer, as the same model class: `next_token_prediction=True`."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EOS, NUM_WORDS, PAD, VOCAB_SIZE, generate, left_padded, randomize, tiny_config, tiny_tokenizer, words
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache

from blockgen_hf import BlockGenConfig, BlockGenForDiffusionLM
from blockgen_hf.evaluation import evaluate_likelihood


def next_token_model(**overrides: Any) -> BlockGenForDiffusionLM:
    settings = {"next_token_prediction": True, "adaptive_layer_norm": False, "block_sizes": None, **overrides}
    model = BlockGenForDiffusionLM(tiny_config(**settings)).eval()
    randomize(model)
    return model


@pytest.fixture(scope="module")
def model() -> BlockGenForDiffusionLM:
    return next_token_model()


def test_the_configuration_has_no_mask_and_one_block_size() -> None:
    config = BlockGenConfig(next_token_prediction=True)
    assert config.block_sizes == [1] and config.mask_token_id is None
    assert (config.diffusion_type, config.training_objective) == ("uniform", "cross_entropy")
    assert BlockGenConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_sizes", [1, 4]),
        ("clean_attention", "block_causal"),
        ("training_objective", "elbo"),
        ("time_conditioning", True),
        ("mask_token_id", 3),
        ("next_token_prediction", "yes"),
    ],
)
def test_what_means_noise_is_refused_in_the_configuration(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        tiny_config(**{"next_token_prediction": True, "block_sizes": None, name: value})


def test_logits_depend_on_the_tokens_up_to_their_own_and_on_it(model: BlockGenForDiffusionLM) -> None:
    text = words(1, 10)
    logits = model(text).logits
    assert logits.shape == (1, 10, VOCAB_SIZE)
    changed = text.clone()
    changed[0, 6] = (changed[0, 6] + 1) % NUM_WORDS
    difference = (model(changed).logits - logits).abs().amax(-1)[0]
    assert (difference[:6] == 0).all() and (difference[6:] > 1e-3).all()


@pytest.mark.parametrize("static", [False, True])
def test_cached_logits_are_those_of_the_whole_text(model: BlockGenForDiffusionLM, static: bool) -> None:
    text = words(2, 12)
    cache = StaticCache(config=model.config, max_cache_len=16) if static else None
    first = model(text[:, :7], cache=cache, use_cache=True)
    one = model(text[:, 7:8], cache=first.cache, use_cache=True)
    rest = model(text[:, 8:], cache=one.cache, use_cache=True)
    cached = torch.cat([first.logits, one.logits, rest.logits], dim=1)
    torch.testing.assert_close(cached, model(text).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_changes_no_logits(attention: str) -> None:
    model = next_token_model()
    model.set_attn_implementation(attention)
    prompts = [words(9), words(4, seed=1)]
    batch = model(**left_padded(prompts)).logits
    for row, prompt in zip(batch, prompts, strict=True):
        torch.testing.assert_close(row[-len(prompt) :], model(prompt[None]).logits[0], atol=1e-5, rtol=1e-5)


def test_documents_in_a_row_are_those_alone(model: BlockGenForDiffusionLM) -> None:
    first, second = words(1, 6), words(1, 5, seed=1)
    packed = torch.cat([first, second], dim=1)
    documents = torch.tensor([[0] * 6 + [1] * 5])
    logits = model(packed, document_ids=documents).logits
    alone = torch.cat([model(first).logits, model(second).logits], dim=1)
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
    losses = model(packed, labels=packed, document_ids=documents).token_losses[0]
    assert losses[0] == losses[6] == 0 and (losses[[*range(1, 6), *range(7, 11)]] > 0).all()


def test_the_loss_is_that_of_shifted_labels(model: BlockGenForDiffusionLM) -> None:
    text = words(3, 12)
    labels = text.clone()
    labels[0, :5] = labels[2, 9:] = -100
    outputs = model(text, labels=labels)
    expected = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(outputs.logits, model(text).logits)
    summed = model(text, labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(summed, expected * (labels[:, 1:] != -100).sum() / 7)


def test_the_loss_in_chunks_has_the_same_gradients() -> None:
    model = next_token_model().train()
    text = words(2, 12)
    gradients = []
    for skip_logits in (True, False):
        model.zero_grad()
        outputs = model(text, labels=text, skip_logits=skip_logits)
        assert (outputs.logits is None) == skip_logits
        outputs.loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


def test_greedy_text_is_that_of_repeated_forward_passes(model: BlockGenForDiffusionLM) -> None:
    text = words(1, 3)
    generated = generate(model, text, max_new_tokens=10, do_sample=False)
    for _ in range(10):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    assert generated.tolist() == text.tolist()
    beams = generate(model, text[:, :3], max_new_tokens=10, do_sample=False, num_beams=3)
    assert beams.shape == (1, 13)


def test_batches_give_the_texts_of_single_rows(model: BlockGenForDiffusionLM) -> None:
    prompts = [words(7), words(2, seed=1)]
    together = generate(model, None, **left_padded(prompts), max_new_tokens=8, do_sample=True)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate(model, prompt[None], max_new_tokens=8, do_sample=True)
        assert row[-8:].tolist() == alone[0, -8:].tolist()


def test_a_pass_a_token_is_counted(model: BlockGenForDiffusionLM) -> None:
    outputs = generate(model, words(2, 3), max_new_tokens=6, return_dict_in_generate=True)
    assert outputs.num_function_evaluations.tolist() == [6, 6]


def test_text_is_drawn_by_the_model_probabilities(model: BlockGenForDiffusionLM) -> None:
    prompt = words(1, 4)
    draws = generate(model, prompt, max_new_tokens=1, num_return_sequences=4000)[:, -1]
    frequencies = torch.bincount(draws, minlength=VOCAB_SIZE) / 4000
    probabilities = model(prompt).logits[0, -1].softmax(-1)
    assert (frequencies - probabilities).abs().max() < 5 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    "arguments",
    [
        {"noisy_input_ids": words(1, 4)},
        {"query_input_ids": words(1, 1)},
        {"block_size": 4},
        {"noise_level": 0.5},
        {"objective": "elbo"},
    ],
)
def test_forward_refuses_noise(model: BlockGenForDiffusionLM, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` has no meaning"):
        model(words(1, 4), **arguments)


def test_generate_refuses_diffusion_and_empty_prompts(model: BlockGenForDiffusionLM) -> None:
    with pytest.raises(ValueError, match="`decoding='arpc'` needs a diffusion model"):
        model.generate(words(1, 4), decoding="arpc", block_size=4, max_new_tokens=4)
    with pytest.raises(ValueError, match="begin with the BOS token"):
        model.generate(words(1, 0), max_new_tokens=4)
    with pytest.raises(ValueError, match="begin with the BOS token"):
        model.generate(**left_padded([words(3), words(0)]), max_new_tokens=4)
    with pytest.raises(ValueError, match="at least"):
        model(words(1, 0))


def test_without_a_prompt_text_begins_with_bos(model: BlockGenForDiffusionLM) -> None:
    text = generate(model, None, bos_token_id=EOS, max_new_tokens=5)
    assert text.shape == (1, 6) and text[0, 0] == EOS


def test_the_likelihood_is_exact_and_leaves_out_the_first_token(model: BlockGenForDiffusionLM) -> None:
    rows = [words(12).tolist(), words(7, seed=1).tolist()]
    result = evaluate_likelihood(model, rows, monte_carlo_samples=2)
    expected = 0.0
    for row in rows:
        log_probs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected -= log_probs[range(len(row) - 1), row[1:]].double().sum().item()
    assert result.num_tokens == 17
    assert result.metrics()["nll_block_size_1"] == pytest.approx(expected / 17, rel=1e-5)
    with pytest.raises(ValueError, match=r"`block_sizes` must be \[1\]"):
        evaluate_likelihood(model, rows, block_sizes=[4])


def test_a_saved_model_loads_with_its_own_code(model: BlockGenForDiffusionLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    text = words(2, 9)
    torch.testing.assert_close(loaded(text).logits, model(text).logits)


@pytest.mark.parametrize("unit", ["micro_batch", "sequence"])
def test_the_trainer_learns_without_drawing_noise(tmp_path: Path, unit: str) -> None:
    from blockgen_hf.training import BlockGenTrainer, BlockGenTrainingArguments

    model = BlockGenForDiffusionLM(next_token_model().config)
    rows = [{"input_ids": [(start + i) % 6 for i in range(12)]} for start in range(6)]
    args = BlockGenTrainingArguments(
        output_dir=tmp_path,
        max_steps=60,
        per_device_train_batch_size=6,
        learning_rate=2e-2,
        warmup_steps=0,
        ema_decay=0,
        logging_steps=60,
        block_size_unit=unit,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = BlockGenTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss_block_size_1" in entry)
    assert logged["loss"] == pytest.approx(logged["loss_block_size_1"], rel=1e-3)
    assert before["eval_loss"] > 2.5 and trainer.evaluate()["eval_loss"] < 0.5
    assert PAD not in model.eval()(torch.tensor([[0, 1, 2]])).logits.argmax(-1)
