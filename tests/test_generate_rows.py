"""What belongs to a row goes with it, whoever else is in the batch, and whoever has left it."""

from typing import Any

import pytest
import torch
from tiny import EOS, PAD, generate, left_padded, tiny_model, words
from transformers import DynamicCache, LogitsProcessor


AR: dict[str, Any] = dict(decoding="ar")
DIFFUSION: dict[str, Any] = dict(decoding="block_diffusion", block_size=4)
ARPC: dict[str, Any] = dict(decoding="arpc", block_size=4, denoising_steps=3)
every_decoding = pytest.mark.parametrize("settings", [AR, DIFFUSION, ARPC], ids=["ar", "block_diffusion", "arpc"])
ENDS = [3, 4, EOS]


def assert_equal_to_each_alone(prompts: list[torch.Tensor], seed: int = 0, **settings: Any) -> set[int]:
    """Every row of the padded batch is what its prompt gives alone, with pads behind. Returns the lengths."""
    width = max(len(prompt) for prompt in prompts)
    model = settings.pop("model")
    together = generate(model, None, seed=seed, **left_padded(prompts), **settings)[:, width:].tolist()
    lengths = set()
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate(model, prompt[None], seed=seed, **settings)[0, len(prompt) :].tolist()
        assert row == alone + [PAD] * (len(row) - len(alone))
        lengths.add(len(alone))
    return lengths


@pytest.mark.parametrize("keeps_rows", [False, True])
def test_rows_of_a_grid_lose_nothing_when_the_one_furthest_behind_ends_first(keeps_rows: bool) -> None:
    model, lengths = tiny_model("block_causal"), set()
    for seed in range(6):
        prompts = [words(length, seed=7 * seed + length) for length in (3, 5, 2, 4)]
        settings: dict[str, Any] = dict(decoding="block_diffusion", max_new_tokens=14, eos_token_id=ENDS, model=model)
        if not keeps_rows:
            lengths |= assert_equal_to_each_alone(prompts, seed, **settings)
            continue
        del settings["model"]
        batch = left_padded(prompts)
        expected = generate(model, None, seed=seed, **batch, **settings)
        cache = DynamicCache(config=model.config)
        text = generate(model, None, seed=seed, cache=cache, **batch, **settings)
        assert text.tolist() == expected.tolist()
        lengths |= {int((row != PAD).sum()) for row in text}
    assert len(lengths) > 3


@pytest.mark.parametrize(
    ("variant", "settings"),
    [("masked", AR), ("masked", DIFFUSION), ("masked", ARPC), ("block_causal", DIFFUSION)],
    ids=lambda value: value if isinstance(value, str) else value["decoding"],
)
def test_static_cache_that_holds_nothing_follows_rows_that_stay(variant: str, settings: dict[str, Any]) -> None:
    """No prompt, or one shorter than the grid: rows end before the first token is cached."""
    model, length = tiny_model(variant), 2 if variant == "block_causal" else 0
    for seed in range(4):
        kwargs: dict[str, Any] = dict(seed=seed, max_new_tokens=12, eos_token_id=ENDS, pad_token_id=PAD, **settings)
        texts = [
            generate(model, words(4, length), cache_implementation=kind, **kwargs).tolist()
            for kind in ("dynamic", "static")
        ]
        assert texts[0] == texts[1]


class Grammar(LogitsProcessor):
    """Allows each row of the batch, by its place, three words of its own and the end, and notes what it is given."""

    def __init__(self) -> None:
        self.shapes: set[tuple[int, int]] = set()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.shapes.add((len(input_ids), len(scores)))
        allowed = torch.full_like(scores, -torch.inf)
        for row in range(len(scores)):
            kept = [3 * row, 3 * row + 1, 3 * row + 2, EOS]
            allowed[row, kept] = scores[row, kept]
        return allowed


@pytest.mark.parametrize(
    "settings", [AR, DIFFUSION, {**DIFFUSION, "block_size": 1}, ARPC, {**ARPC, "block_size": 1}], ids=str
)
def test_processor_with_a_state_for_each_row_sees_the_whole_batch_in_order(settings: dict[str, Any]) -> None:
    model, ended = tiny_model(), 0
    for seed in range(4):
        grammar = Grammar()
        kwargs: dict[str, Any] = dict(max_new_tokens=16, eos_token_id=EOS, pad_token_id=PAD, **settings)
        text = generate(model, words(3, 5), seed=seed, logits_processor=[grammar], **kwargs)[:, 5:]
        assert grammar.shapes == {(3, 3)}
        for row, tokens in enumerate(text.tolist()):
            assert set(tokens) <= {3 * row, 3 * row + 1, 3 * row + 2, EOS, PAD}
            ended += PAD in tokens
    assert ended


@pytest.mark.parametrize(
    ("penalty", "settings"),
    [
        (dict(encoder_repetition_penalty=3.0), AR),
        (dict(encoder_repetition_penalty=3.0), DIFFUSION),
        (dict(encoder_no_repeat_ngram_size=1), ARPC),
        (dict(repetition_penalty=3.0), DIFFUSION),
        (dict(repetition_penalty=3.0), ARPC),
        (dict(presence_penalty=1.0, frequency_penalty=0.8), DIFFUSION),
    ],
    ids=str,
)
def test_penalties_of_a_prompt_are_those_of_the_row_alone(penalty: dict[str, Any], settings: dict[str, Any]) -> None:
    """In padded batches with an empty row, whose padding is an end of text, and of which some rows end early."""
    model, prompts = tiny_model(), [words(n, seed=n) for n in (3, 5, 2, 0)]
    kwargs: dict[str, Any] = dict(max_new_tokens=12, eos_token_id=[3, 4, PAD], **penalty, **settings)
    lengths = [assert_equal_to_each_alone(prompts, seed, model=model, **kwargs) for seed in range(3)]
    assert len(set().union(*lengths)) > 1


def test_ngrams_and_biased_sequences_take_no_padding_for_text() -> None:
    """Padding whose token is a word of the texts, or their end."""
    model, prompts = tiny_model(scale=3.0), [words(n, seed=n) for n in (2, 6, 3)]
    pad = torch.tensor(1)
    batch = left_padded(prompts)
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], pad)
    first = int(prompts[0][0])
    for setting in (
        dict(no_repeat_ngram_size=1),
        dict(no_repeat_ngram_size=2),
        dict(sequence_bias=[[[1, 1, *prompts[0].tolist(), 7], 50.0]]),
        dict(bad_words_ids=[[1, first]]),
    ):
        kwargs: dict[str, Any] = dict(max_new_tokens=8, decoding="ar", **setting)
        text = generate(model, None, **batch, **kwargs)[:, 6:].tolist()
        for row, prompt in zip(text, prompts, strict=True):
            assert row == generate(model, prompt[None], **kwargs)[0, len(prompt) :].tolist()


def test_encoder_ngrams_within_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="EncoderNoRepeatNGram"):
        generate(tiny_model(), words(2, 4), max_new_tokens=4, encoder_no_repeat_ngram_size=2, **DIFFUSION)


@every_decoding
def test_rows_keep_the_adapters_of_a_mixed_batch(settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(model, lora, adapter_name="a")
    adapted.add_adapter("b", lora)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    names, lengths = ["a", "b", "__base__", "b"], set()
    kwargs: dict[str, Any] = dict(max_new_tokens=12, eos_token_id=[*range(2, 8)], pad_token_id=PAD, **settings)
    prompts = words(4, 4)
    torch.manual_seed(0)
    together = adapted.eval().generate(input_ids=prompts, adapter_names=names, **kwargs)[:, 4:].tolist()
    for row, (prompt, name) in zip(together, zip(prompts, names, strict=True), strict=True):
        torch.manual_seed(0)
        alone = adapted.generate(input_ids=prompt[None], adapter_names=[name], **kwargs)[0, 4:].tolist()
        assert row == alone + [PAD] * (len(row) - len(alone))
        lengths.add(len(alone))
    assert len(lengths) > 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("settings", [AR, DIFFUSION], ids=["ar", "block_diffusion"])
def test_the_integer_type_of_the_ids_does_not_change_the_text(settings: dict[str, Any], dtype: torch.dtype) -> None:
    model, prompts = tiny_model("uniform"), words(3, 6)
    expected = generate(model, prompts, max_new_tokens=8, **settings).tolist()
    assert generate(model, prompts.to(dtype), max_new_tokens=8, **settings).tolist() == expected
    strided = prompts.t().contiguous().t()
    assert generate(model, strided, max_new_tokens=8, **settings).tolist() == expected
