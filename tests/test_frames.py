"""Frames: what `output_trajectory=True` shows of every decoding, and their texts."""

import itertools
import json
from typing import Any

import pytest
import torch
from tiny import EOS, LETTERS, MASK, generate, left_padded, tiny_model, tiny_tokenizer, words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blockgen_hf.generation.frames import FrameTexts, frames, since
from blockgen_hf.generation.frames_blockgen import EVENTS, MARKS, STATES, RowFrames


DECODINGS: dict[str, dict[str, Any]] = {
    "ar": dict(decoding="ar"),
    "block_diffusion": dict(decoding="block_diffusion", block_size=4, ar_seed_tokens=1),
    "confidence": dict(decoding="block_diffusion", block_size=4, sampler="confidence", confidence_threshold=0.2),
    "arpc": dict(decoding="arpc", block_size=4),
    "speculative": dict(decoding="speculative", block_size=4, acceptance="rejection"),
    "drafts of steps": dict(decoding="speculative", block_size=4, draft_steps=2, do_sample=False),
    "fused": dict(decoding="speculative", block_size=4, acceptance="rejection", fused_drafts=True),
    "draft_revise": dict(decoding="draft_revise", block_size=2, revise_ratio=0.5, revise_block_size=4),
}


def outputs_of(variant: str = "masked", inputs: Any = None, **settings: Any) -> Any:
    eos = settings.pop("eos_token_id", None)
    model = tiny_model(variant, eos_token_id=eos)
    settings = {"max_new_tokens": 10, "output_trajectory": True, "return_dict_in_generate": True, **settings}
    torch.manual_seed(0)
    return model.generate(**(inputs or {"input_ids": words(1, 3)}), **settings)


def positions(outputs: Any, row: int = 0) -> list[list[dict[str, Any]]]:
    return [frame["positions"] for frame in outputs.frames[row]["frames"]]


@pytest.mark.parametrize("variant", ["masked", "uniform"])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_frames_run_from_the_prompt_to_the_text_and_cost_what_it_cost(decoding: str, variant: str) -> None:
    """In a batch of unequal prompts and ends; and who looks on changes nothing."""
    inputs = left_padded([words(2), words(5, seed=1), words(3, seed=2)])
    settings = {**DECODINGS[decoding], "eos_token_id": 3}
    outputs = outputs_of(variant, inputs, **settings, trajectory_top_k=2)
    unseen = outputs_of(variant, inputs, **settings, output_trajectory=False)
    assert torch.equal(outputs.sequences, unseen.sequences)
    assert unseen.frames is None
    json.dumps(outputs.frames, allow_nan=False)
    for row, document in enumerate(outputs.frames):
        first, last = document["frames"][0], document["frames"][-1]
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        new = outputs.sequences[row, 5:][: outputs.num_new_tokens[row]].tolist()
        assert (first["event"], [position["token"] for position in first["positions"]]) == ("prompt", prompt)
        assert [position["token"] for position in last["positions"]] == prompt + new
        assert {position["state"] for position in last["positions"][len(prompt) :]} <= {"ar", "committed"}
        assert not any("noise" in position for position in last["positions"])
        assert last["function_evaluations"] == outputs.num_function_evaluations[row]
        assert last["new_tokens"] == len(new)
        costs = [frame["function_evaluations"] for frame in document["frames"]]
        assert costs == sorted(costs)
        for frame in document["frames"]:
            assert frame["event"] in EVENTS
            assert all(position["state"] in STATES for position in frame["positions"])
            assert {position["mark"] for position in frame["positions"] if "mark" in position} <= set(MARKS)


def test_a_document_says_what_it_is() -> None:
    (document,) = outputs_of(decoding="speculative", block_size=4).frames
    assert {name: value for name, value in document.items() if name != "frames"} == {
        "format": "blockgen-frames",
        "version": 1,
        "decoding": "speculative",
        "block_size": 4,
        "mask_token": MASK,
        "prompt_tokens": 3,
    }


def test_every_pass_of_block_diffusion_has_a_frame() -> None:
    """A step without a pass changes nothing, and has none; every pass reveals a token."""
    outputs = outputs_of(decoding="block_diffusion", block_size=8, denoising_steps=16, max_new_tokens=8)
    found = outputs.frames[0]["frames"]
    assert [frame["event"] for frame in found[:2]] == ["prompt", "noise"]
    assert found[-1]["event"] == "commit"
    steps = found[2:-1]
    assert [frame["function_evaluations"] for frame in steps] == list(range(1, len(steps) + 1))
    masks = [sum("noise" in position for position in frame["positions"]) for frame in found[1:-1]]
    assert masks[0] == 8 and masks[-1] == 0
    assert all(before > after for before, after in itertools.pairwise(masks))
    assert all(1 <= frame["step"] <= 16 for frame in steps)


def test_arpc_shows_what_it_proposes_and_what_returns_to_noise() -> None:
    """The number of tokens is that of Algorithm 1; the surprisal of what stays is at most that of what goes."""
    outputs = outputs_of(decoding="arpc", block_size=8, denoising_steps=4, max_new_tokens=8)
    found = outputs.frames[0]["frames"]
    corrections = [frame for frame in found if frame["event"] == "correct"]
    assert len(corrections) == 3
    for before, frame in itertools.pairwise(found):
        if frame["event"] != "correct":
            continue
        assert before["event"] == "propose"
        assert frame["function_evaluations"] == before["function_evaluations"] + 1
        went = [position for position in frame["positions"] if position.get("mark") == "renoised"]
        kept = [position for position in frame["positions"] if position["state"] == "draft" and "mark" not in position]
        assert [position["was"]["token"] for position in went] == [
            old["token"] for old, new in zip(before["positions"], frame["positions"], strict=True) if "mark" in new
        ]
        assert max(p["surprisal"] for p in kept) <= min(p["was"]["surprisal"] for p in went)
    marks = sum("mark" in position for frame in corrections for position in frame["positions"])
    assert sum(position["renoised"] for position in found[-1]["positions"]) == marks


def test_speculation_shows_what_is_accepted_and_rejected() -> None:
    outputs = outputs_of("uniform", decoding="speculative", block_size=4, acceptance="rejection", max_new_tokens=24)
    found = positions(outputs)
    marks = [position["mark"] for frame in found for position in frame if "mark" in position]
    assert marks.count("accepted") == outputs.num_accepted_tokens[0] > 0
    assert len(marks) == outputs.num_drafted_tokens[0] > marks.count("accepted")
    for before, frame in itertools.pairwise(found):
        for old, new in zip(before, frame, strict=False):
            if new.get("mark") == "accepted":
                assert (new["state"], new["token"]) == ("committed", old["token"])
            if "was" in new:  # rejected, and replaced by the autoregressive token
                assert (new["state"], new["mark"], new["was"]["token"]) == ("ar", "rejected", old["token"])


def test_no_more_is_accepted_than_was_drafted() -> None:
    """The last token of a row is not drafted, even where the draft of a longer row has the same there."""
    inputs = left_padded([words(2), words(5, seed=1)])
    outputs = outputs_of("uniform", inputs, decoding="speculative", block_size=4, do_sample=False, max_new_tokens=12)
    assert (outputs.num_accepted_tokens <= outputs.num_drafted_tokens).all()
    for row in range(2):
        marks = [position.get("mark") for frame in positions(outputs, row) for position in frame]
        assert marks.count("accepted") == outputs.num_accepted_tokens[row]


def test_draft_revise_shows_what_is_revised() -> None:
    outputs = outputs_of(**DECODINGS["draft_revise"])
    (revise,) = [frame for frame in outputs.frames[0]["frames"] if frame["event"] == "revise"]
    new = revise["positions"][3:]
    assert [position.get("mark") == "revised" for position in new] == outputs.revised[0][0].tolist()
    assert [position.get("was", position)["token"] for position in new] == outputs.drafts[0][0].tolist()
    assert all(position["noise"] for position in new if "mark" in position)
    end = positions(outputs)[-1][3:]
    assert [position["renoised"] for position in end] == outputs.revised[0][0].long().tolist()


def test_surprisal_is_that_of_the_autoregressive_model() -> None:
    outputs = outputs_of(decoding="ar", do_sample=False)
    model = tiny_model()
    log_probs = model(outputs.sequences[:, :-1]).logits.double()
    log_probs[..., MASK] = -torch.inf
    expected = -log_probs.log_softmax(-1).gather(-1, outputs.sequences[:, 1:, None])[0, 2:, 0]
    found = [position["surprisal"] for position in positions(outputs)[-1][3:]]
    assert found == pytest.approx(expected.tolist(), abs=1e-3)


def test_likely_tokens_are_told_where_they_are_asked_for() -> None:
    """Of diffusion for masked tokens, of AR where a pass verifies; both are there side by side in ARPC."""
    outputs = outputs_of(decoding="arpc", block_size=4, max_new_tokens=4, trajectory_top_k=3)
    for position in positions(outputs)[-1][3:]:
        for source in ("diffusion", "ar"):
            chances = [likely["probability"] for likely in position[source]]
            assert len(chances) == 3 and chances == sorted(chances, reverse=True) and sum(chances) <= 1.001
    plain = positions(outputs_of(decoding="arpc", block_size=4, max_new_tokens=4))
    assert not any("ar" in position or "diffusion" in position for frame in plain for position in frame)


def test_a_streamer_with_put_frame_gets_every_frame_when_it_is_made() -> None:
    class Listener:
        def __init__(self) -> None:
            self.frames: list[tuple[int, Any]] = []
            self.num_ends: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            pass

        def put_frame(self, row: int, frame: dict[str, Any]) -> None:
            self.frames.append((row, frame))

        def end(self) -> None:
            self.num_ends.append(len(self.frames))

    listener = Listener()
    settings = {**DECODINGS["fused"], "max_new_tokens": 8}
    found = outputs_of("uniform", {"input_ids": words(1, 3)}, **settings)
    generate(tiny_model("uniform"), words(1, 3), **settings, streamer=listener)
    assert [frame for _, frame in listener.frames] == found.frames[0]["frames"]
    assert listener.num_ends == [len(listener.frames)]


# ---- texts
def test_frames_have_the_texts_of_their_tokens() -> None:
    outputs = outputs_of(decoding="arpc", block_size=4, trajectory_top_k=2)
    (document,) = frames(outputs, tiny_tokenizer())
    assert document["frames"][-1]["positions"][0]["text"] == LETTERS[words(1, 3)[0, 0]]
    text = "".join(position["text"] for position in document["frames"][-1]["positions"])
    assert text == tiny_tokenizer().decode(outputs.sequences[0])
    everything = [position for frame in document["frames"] for position in frame["positions"]]
    assert all("text" in position for position in everything)
    assert all("text" in position["was"] for position in everything if "was" in position)
    assert all("text" in likely for position in everything for likely in position.get("ar", []))
    assert "text" not in outputs.frames[0]["frames"][-1]["positions"][0]  # the outputs stay as they are


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: index for index, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_character_of_several_tokens_is_shown_once() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode("a 🐶!")
    frame = {"positions": [{"token": token, "state": "given", "renoised": 0} for token in tokens]}
    found = [position["text"] for position in FrameTexts(tokenizer).add(frame)["positions"]]
    assert found == ["a", " ", "🐶", "", "", "", "!"]


def test_a_stream_leaves_out_what_is_as_before() -> None:
    whole: list[Any] = []
    found = outputs_of(decoding="arpc", block_size=4, eos_token_id=EOS).frames[0]["frames"]
    for previous, frame in zip([None, *found], found, strict=False):
        sent = since(frame, previous)
        whole = whole[: sent["offset"]] + sent["positions"]
        assert whole == frame["positions"]
    assert sent["offset"] > 3


def test_outputs_without_frames_are_refused() -> None:
    outputs = generate(tiny_model(), words(1, 3), max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="output_trajectory=True"):
        frames(outputs, tiny_tokenizer())


def test_frames_that_are_only_listened_to_are_not_kept() -> None:
    kept, told = RowFrames([1, 2]), []
    heard = RowFrames([1, 2], told.append, keeps_all=False)
    for row in (kept, heard):
        for step in range(5):
            row.show("denoise", 0, step, step + 1, {0: {"token": step, "state": "draft"}})
    assert told == kept.frames and len(told) == 6
    assert heard.frames == told[-1:]
