"""`pipeline("text-generation")` on a saved folder: settings, batches, chats, streams, no prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LETTERS, MASK, generate, tiny_model, tiny_tokenizer
from transformers import TextGenerationPipeline, TextStreamer, pipeline

from blockgen_hf import BlockGenGenerationConfig


DECODINGS: dict[str, dict[str, Any]] = {
    "ar": {"decoding": "ar"},
    "block_diffusion": {"decoding": "block_diffusion", "block_size": 4, "denoising_steps": 2},
    "arpc": {"decoding": "arpc", "block_size": 4, "nfe_per_block": 6},
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that samples at its own temperature, with a tokenizer that knows chats."""
    path = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model()
    model.generation_config.temperature = 1.0
    model.save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def text_generation(folder: Path, **settings: Any) -> TextGenerationPipeline:
    return pipeline("text-generation", model=str(folder), trust_remote_code=True, **settings)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_texts_are_those_of_generate(folder: Path, decoding: str) -> None:
    """The pipeline's own temperature, 0.7, gives way to the model's."""
    generator, settings = text_generation(folder), {"max_new_tokens": 9, **DECODINGS[decoding]}
    torch.manual_seed(3)
    (answer,) = generator("abc", return_full_text=False, **settings)
    sequences = generate(generator.model, torch.tensor([[0, 1, 2]]), seed=3, **settings)
    assert answer["generated_text"] == tiny_tokenizer().decode(sequences[0, 3:], skip_special_tokens=True)
    torch.manual_seed(3)
    (full,) = generator("abc", **settings)
    assert full["generated_text"] == "abc" + answer["generated_text"]


def test_without_a_temperature_of_the_model_the_pipeline_has_its_own(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    generator = text_generation(tmp_path)
    torch.manual_seed(0)
    (answer,) = generator("abc", max_new_tokens=20, decoding="ar", return_tensors=True)
    texts = {
        temperature: generate(
            generator.model, torch.tensor([[0, 1, 2]]), max_new_tokens=20, decoding="ar", temperature=temperature
        )[0].tolist()
        for temperature in (0.7, 1.0)
    }
    assert answer["generated_token_ids"] == texts[0.7] != texts[1.0]


@pytest.mark.parametrize("decoding", DECODINGS)
def test_prompts_in_a_batch_get_the_texts_that_they_get_alone(folder: Path, decoding: str) -> None:
    generator, prompts = text_generation(folder), ["abc", "d", "efghi"]
    settings = {"max_new_tokens": 6, "return_full_text": False, **DECODINGS[decoding]}
    torch.manual_seed(0)
    together = [answer["generated_text"] for (answer,) in generator(prompts, batch_size=3, **settings)]
    for prompt, text in zip(prompts, together, strict=True):
        torch.manual_seed(0)
        ((answer,),) = generator([prompt], **settings)  # a list, too: lists go through a data loader, which draws
        assert answer["generated_text"] == text
        assert text and set(text) <= set(LETTERS)


def test_several_texts_of_a_prompt_differ(folder: Path) -> None:
    answers = text_generation(folder)("abc", num_return_sequences=3, max_new_tokens=12)
    assert len({answer["generated_text"] for answer in answers}) == 3


def test_a_chat_is_answered(folder: Path) -> None:
    """The tokenizer's chat template makes the prompt; the answer is the last message."""
    generator, chat = text_generation(folder), [{"role": "user", "content": "abc"}]
    torch.manual_seed(0)
    (answer,) = generator(chat, max_new_tokens=6, decoding="arpc", block_size=4)
    messages = answer["generated_text"]
    assert messages[0] == chat[0] and messages[1]["role"] == "assistant"
    torch.manual_seed(0)
    (plain,) = generator("abc", max_new_tokens=6, decoding="arpc", block_size=4, return_full_text=False)
    assert messages[1]["content"] == plain["generated_text"]


def test_prompts_are_streamed_one_after_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = text_generation(folder)
    streamer = TextStreamer(generator.tokenizer, skip_prompt=True)
    prompts = (prompt for prompt in ["abc", "d"])
    answers = [*generator(prompts, max_new_tokens=6, block_size=4, streamer=streamer, return_full_text=False)]
    assert capsys.readouterr().out.split() == [answer["generated_text"] for (answer,) in answers]


def test_an_empty_prompt_starts_from_the_prior(folder: Path) -> None:
    generator = text_generation(folder)
    (answer,) = generator("", max_new_tokens=6, block_size=4, return_tensors=True)
    assert len(answer["generated_token_ids"]) == 6 and MASK not in answer["generated_token_ids"]


def test_settings_reach_generate_as_a_configuration_or_at_construction(folder: Path) -> None:
    generator = text_generation(folder, decoding="arpc", block_size=4, max_new_tokens=5)
    torch.manual_seed(0)
    (first,) = generator("abc")
    config = BlockGenGenerationConfig(decoding="arpc", block_size=4, max_new_tokens=5)
    torch.manual_seed(0)
    (second,) = text_generation(folder)("abc", generation_config=config)
    assert first == second and 3 < len(first["generated_text"]) <= 8
    with pytest.raises(ValueError, match="`decoding`"):
        generator("abc", decoding="diffusion")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_of_weights_and_attention_reach_the_model(folder: Path, dtype: str) -> None:
    generator = text_generation(folder, dtype=dtype, device_map="auto", model_kwargs={"attn_implementation": "eager"})
    assert generator.model.dtype == getattr(torch, dtype)
    assert generator.model.config._attn_implementation == "eager"
    (answer,) = generator("abc", max_new_tokens=6, decoding="arpc", block_size=4)
    assert answer["generated_text"].startswith("abc")
