"""Where a text ends, and who hears of it: EOS, stop strings, clocks, own criteria, streamers."""

import time
from typing import Any

import pytest
import torch
from tiny import (
    EOS,
    MASK,
    NUM_WORDS,
    PAD,
    VOCAB_SIZE,
    generate,
    left_padded,
    num_rows,
    record_forwards,
    tiny_model,
    tiny_tokenizer,
    words,
)
from transformers import DynamicCache, StoppingCriteria, TextDiffusionStreamer, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer


AR: dict[str, Any] = dict(decoding="ar")
DIFFUSION: dict[str, Any] = dict(decoding="block_diffusion", block_size=4)
ARPC: dict[str, Any] = dict(decoding="arpc", block_size=4, denoising_steps=3)
DECODINGS = {"ar": AR, "block_diffusion": DIFFUSION, "arpc": ARPC, "seeded": {**DIFFUSION, "ar_seed_tokens": 3}}
every_decoding = pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.slow] if name == "seeded" else [])
        for name, settings in DECODINGS.items()
    ],
)
NEW_TOKENS = 11


def cut(row: list[int], end: int) -> list[int]:
    """Up to and with the first `end`."""
    return row[: row.index(end) + 1] if end in row else row


def padded(rows: list[list[int]]) -> list[list[int]]:
    width = max(len(row) for row in rows)
    return [row + [PAD] * (width - len(row)) for row in rows]


def frequent_token(rows: torch.Tensor) -> int:
    """A token that ends some rows early and others not at all, or late."""
    counts = [(len({row.index(t) for row in rows.tolist() if t in row}), t) for t in range(VOCAB_SIZE)]
    return max(counts)[1]


# ---- end of text
@every_decoding
@pytest.mark.parametrize("variant", ["masked", pytest.param("uniform", marks=pytest.mark.slow)])
def test_a_row_ends_at_its_own_eos_with_pads_behind(variant: str, settings: dict[str, Any]) -> None:
    """The text up to EOS is that of a run without EOS; the batch is as wide as its longest row."""
    model, prompts = tiny_model(variant), left_padded([words(n, seed=n) for n in (5, 4, 3, 2, 0)])
    free = generate(model, None, max_new_tokens=NEW_TOKENS, **prompts, **settings)[:, 5:]
    end = frequent_token(free)
    expected = padded([cut(row, end) for row in free.tolist()])
    assert any(PAD in row for row in expected)
    text = generate(model, None, max_new_tokens=NEW_TOKENS, eos_token_id=end, **prompts, **settings)
    assert text[:, :5].tolist() == prompts["input_ids"].tolist()
    assert text[:, 5:].tolist() == expected


@every_decoding
def test_several_end_tokens(settings: dict[str, Any]) -> None:
    """`eos_token_id` may be a list; the batch ends when its last row does."""
    model, prompts = tiny_model(), words(4, 3)
    free = generate(model, prompts, max_new_tokens=NEW_TOKENS, **settings)[:, 3:].tolist()
    ends = {row[2] for row in free}
    expected = padded([row[: next(i for i, t in enumerate(row) if t in ends) + 1] for row in free])
    text = generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=[*ends], **settings)
    assert text[:, 3:].tolist() == expected
    assert text.shape[1] <= 3 + 3


@every_decoding
def test_the_end_token_of_the_model_is_heeded(settings: dict[str, Any]) -> None:
    """`config.eos_token_id` reaches the generation config, as in every transformers model."""
    prompts = words(2, 3)
    free = generate(tiny_model(), prompts, max_new_tokens=NEW_TOKENS, **settings)
    end = int(free[0, 5])
    text = generate(tiny_model(eos_token_id=end), prompts, max_new_tokens=NEW_TOKENS, **settings)
    assert text[0, 3:].tolist()[: text.shape[1]] == padded([cut(row, end) for row in free[:, 3:].tolist()])[0]


@every_decoding
def test_rows_that_are_done_cost_nothing(settings: dict[str, Any]) -> None:
    """They leave the batch. Seen in the rows of every forward pass and in the evaluations."""
    model, prompts = tiny_model(), words(6, 3)
    free = generate(model, prompts, max_new_tokens=NEW_TOKENS, **settings)[:, 3:]
    end = frequent_token(free)
    lengths = [len(cut(row, end)) for row in free.tolist()]
    assert len(set(lengths)) > 1
    with record_forwards(model) as calls:
        outputs = generate(
            model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=end, return_dict_in_generate=True, **settings
        )
    rows = [num_rows(call) for call in calls]
    assert rows[0] == 6 and rows == sorted(rows, reverse=True) and rows[-1] < 6
    assert outputs.num_function_evaluations.sum() <= sum(num_rows(call) for call in calls)
    alone = [
        generate(
            model,
            prompts[i : i + 1],
            max_new_tokens=NEW_TOKENS,
            eos_token_id=end,
            return_dict_in_generate=True,
            **settings,
        )
        for i in range(6)
    ]
    assert outputs.num_function_evaluations.tolist() == [int(o.num_function_evaluations) for o in alone]
    torch.testing.assert_close(outputs.tokens_per_forward, torch.cat([o.tokens_per_forward for o in alone]))
    expected = torch.tensor(lengths) / outputs.num_function_evaluations
    torch.testing.assert_close(outputs.tokens_per_forward, expected)


@pytest.mark.parametrize("cache", ["static", "none", "user's"])
@every_decoding
def test_rows_that_are_done_change_no_other(settings: dict[str, Any], cache: str) -> None:
    """Whatever holds the cache: a static one, none, or one of the caller, whose rows stay."""
    model, prompts = tiny_model(), words(5, 3)
    free = generate(model, prompts, max_new_tokens=NEW_TOKENS, **settings)[:, 3:]
    end = frequent_token(free)
    kwargs = {"static": dict(cache_implementation="static"), "none": dict(use_cache=False)}.get(
        cache, dict(cache=DynamicCache(config=model.config))
    )
    text = generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=end, **kwargs, **settings)
    assert text[:, 3:].tolist() == padded([cut(row, end) for row in free.tolist()])


def test_rows_that_may_end_apart_need_a_pad_token() -> None:
    """The error names it; a single row does without. (With an end token transformers takes that for a pad.)"""
    model = tiny_model(pad_token_id=None)
    settings = dict(max_new_tokens=6, stop_strings="c", tokenizer=tiny_tokenizer(), **DIFFUSION)
    with pytest.raises(ValueError, match="`pad_token_id`"):
        generate(model, words(2, 3), **settings)
    assert generate(model, words(1, 3), **settings).shape[0] == 1
    assert generate(model, words(2, 3), max_new_tokens=6, **DIFFUSION).shape == (2, 9)
    assert generate(model, words(2, 3), max_new_tokens=6, eos_token_id=EOS, **DIFFUSION).shape[0] == 2


# ---- other ends
@every_decoding
def test_stop_strings_end_the_text_where_they_are_complete(settings: dict[str, Any]) -> None:
    """A string of two tokens, wherever the blocks lie."""
    model, tokenizer, prompt = tiny_model(), tiny_tokenizer(), words(1, 3)
    model.generation_config.suppress_tokens = [PAD, EOS]
    free = generate(model, prompt, max_new_tokens=NEW_TOKENS, **settings)[0, 3:].tolist()
    for last in (3, 4, 6):
        pair = free[last - 1 : last + 1]
        stop = "".join(tokenizer.convert_ids_to_tokens(pair))
        first = next(i for i in range(1, len(free)) if free[i - 1 : i + 1] == pair)
        text = generate(model, prompt, max_new_tokens=NEW_TOKENS, stop_strings=[stop], tokenizer=tokenizer, **settings)
        assert text[0, 3:].tolist() == free[: first + 1]


class StopsAt(StoppingCriteria):
    """Ends a row that has a token, and notes every text it sees."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        self.seen.append(input_ids)
        return input_ids[:, -1] == self.token


@every_decoding
def test_own_stopping_criteria_see_the_text_token_by_token(settings: dict[str, Any]) -> None:
    """Every prefix once, as in autoregressive decoding; rows end one by one."""
    model, prompts = tiny_model(), words(3, 3)
    free = generate(model, prompts, max_new_tokens=NEW_TOKENS, **settings)[:, 3:]
    criterion = StopsAt(frequent_token(free))
    text = generate(model, prompts, max_new_tokens=NEW_TOKENS, stopping_criteria=[criterion], **settings)
    assert text[:, 3:].tolist() == padded([cut(row, criterion.token) for row in free.tolist()])
    lengths = [ids.shape[1] for ids in criterion.seen]
    assert lengths == sorted(set(lengths)) and lengths[0] == 4


class RowsOfTheBatch(StoppingCriteria):
    """Ends row i at its own length, as a criterion that keeps something for each row does."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return input_ids.shape[1] >= torch.tensor([4, 6, 9])


class SimpleTruth(StoppingCriteria):
    """Answers for all rows at once."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> bool:
        return input_ids.shape[1] >= 6


@every_decoding
def test_own_stopping_criteria_see_the_rows_of_the_batch(settings: dict[str, Any]) -> None:
    """transformers' contract: `[batch, length]` with every row, done or not; a plain bool is for all of them."""
    model, prompts = tiny_model(), words(3, 3)
    free = generate(model, prompts, max_new_tokens=NEW_TOKENS, **settings)[:, 3:].tolist()
    text = generate(model, prompts, max_new_tokens=NEW_TOKENS, stopping_criteria=[RowsOfTheBatch()], **settings)
    assert text[:, 3:].tolist() == padded([free[0][:1], free[1][:3], free[2][:6]])
    text = generate(model, prompts, max_new_tokens=NEW_TOKENS, stopping_criteria=[SimpleTruth()], **settings)
    assert text[:, 3:].tolist() == [row[:3] for row in free]


@every_decoding
def test_max_time_stops_after_the_step_that_is_under_way(settings: dict[str, Any]) -> None:
    """No finished block is thrown away, and no row is cut."""
    model, prompts = tiny_model(), words(2, 3)
    free = generate(model, prompts, max_new_tokens=NEW_TOKENS, **settings)
    text = generate(model, prompts, max_new_tokens=NEW_TOKENS, max_time=1e-9, **settings)
    done = 1 if settings is AR or settings.get("ar_seed_tokens") else 4
    assert torch.equal(text, free[:, : 3 + done])
    begin = time.monotonic()
    assert torch.equal(generate(model, prompts, max_new_tokens=NEW_TOKENS, max_time=60.0, **settings), free)
    assert time.monotonic() - begin < 60


# ---- streamers
class Recorder(BaseStreamer):
    """What a streamer is told, in order."""

    def __init__(self) -> None:
        self.prompt: torch.Tensor | None = None
        self.chunks: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert self.ended == 0
        if self.prompt is None:
            self.prompt = value
        else:
            self.chunks.append(value)

    def end(self) -> None:
        self.ended += 1


class DraftRecorder(Recorder):
    """One that shows drafts too."""

    def __init__(self) -> None:
        super().__init__()
        self.drafts: list[list[torch.Tensor]] = [[]]

    def put(self, value: torch.Tensor) -> None:
        if self.prompt is not None:
            self.drafts.append([])
        super().put(value)

    def put_draft(self, value: torch.Tensor, **kwargs: Any) -> None:
        self.drafts[-1].append(value)


class LogitsRecorder(DraftRecorder):
    """One that asks for the logits of a draft."""

    _takes_logits = True

    def put_draft(self, logits: torch.Tensor, **kwargs: Any) -> None:  # type: ignore[override]
        self.drafts[-1].append(logits)


@every_decoding
def test_streamer_gets_the_prompt_then_each_finished_block(settings: dict[str, Any]) -> None:
    """1-D chunks that add up to the text, then one end; the text does not change by being watched."""
    model, prompt, streamer = tiny_model(), words(1, 3), Recorder()
    text = generate(model, prompt, max_new_tokens=NEW_TOKENS, streamer=streamer, **settings)
    assert torch.equal(text, generate(model, prompt, max_new_tokens=NEW_TOKENS, **settings))
    assert torch.equal(streamer.prompt, prompt)
    assert all(chunk.ndim == 1 for chunk in streamer.chunks)
    assert torch.equal(torch.cat(streamer.chunks), text[0, 3:])
    seeds = {"ar": NEW_TOKENS, "seeded": 3}.get(next(k for k, v in DECODINGS.items() if v is settings), 0)
    rest = NEW_TOKENS - seeds
    assert [len(chunk) for chunk in streamer.chunks] == [1] * seeds + [4] * (rest // 4) + [rest % 4] * (rest % 4 > 0)
    assert streamer.ended == 1


@every_decoding
def test_streamer_gets_nothing_behind_the_end_of_the_text(settings: dict[str, Any]) -> None:
    """The last chunk goes up to EOS, whatever else stood in its block."""
    model, prompt, streamer = tiny_model(), words(1, 3), Recorder()
    free = generate(model, prompt, max_new_tokens=NEW_TOKENS, **settings)[0, 3:].tolist()
    end = free[5]
    generate(model, prompt, max_new_tokens=NEW_TOKENS, eos_token_id=end, streamer=streamer, **settings)
    assert torch.cat(streamer.chunks).tolist() == cut(free, end)
    assert streamer.ended == 1


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("variant", ["masked", "uniform"])
def test_drafts_are_shown_at_every_denoising_step(variant: str, steps: int) -> None:
    """T drafts a block, without mask token, each as long as the block."""
    model, streamer = tiny_model(variant), DraftRecorder()
    settings = {**ARPC, "denoising_steps": steps}
    text = generate(model, words(1, 3), max_new_tokens=NEW_TOKENS, streamer=streamer, **settings)
    assert [len(drafts) for drafts in streamer.drafts] == [steps, steps, steps, 0]
    for drafts, length in zip(streamer.drafts, (4, 4, 3), strict=False):
        for draft in drafts:
            assert draft.shape in [(length,), (1, length)] and draft.device.type == "cpu"
            assert not (draft == MASK).any() or variant == "uniform"
    assert text.shape == (1, 3 + NEW_TOKENS)


def test_drafts_of_logits_are_given_to_those_who_ask() -> None:
    """transformers' `_takes_logits`."""
    model, streamer = tiny_model(), LogitsRecorder()
    generate(model, words(1, 3), max_new_tokens=8, streamer=streamer, **DIFFUSION)
    drafts = [len(drafts) for drafts in streamer.drafts]
    assert all(1 <= count <= 4 for count in drafts[:2]) and drafts[2:] == [0]  # one a pass
    assert streamer.drafts[0][0].shape == (1, 4, VOCAB_SIZE)


@every_decoding
def test_text_streamers_print_the_decoded_text(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Stock streamers, the one for diffusion included: what remains on the screen is the text."""
    model, tokenizer, prompt = tiny_model(), tiny_tokenizer(), words(1, 3)
    kwargs = dict(max_new_tokens=NEW_TOKENS, suppress_tokens=[PAD, EOS], **settings)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    text = tokenizer.decode(generate(model, prompt, streamer=streamer, **kwargs)[0, 3:])
    assert capsys.readouterr().out.split() == text.split()
    iterator = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
    generate(model, prompt, streamer=iterator, **kwargs)
    assert "".join(iterator).split() == text.split()
    generate(model, prompt, streamer=TextDiffusionStreamer(tokenizer, skip_prompt=True), **kwargs)
    screen = capsys.readouterr().out
    lasting = "".join(part.rsplit("\0337", 1)[0] for part in screen.split("\0338\033[J"))
    assert lasting.split() == text.split()


def test_words_are_all_that_is_written() -> None:
    """The helper of these tests: suppressed tokens are not in the text."""
    text = generate(tiny_model(), words(4, 3), max_new_tokens=9, suppress_tokens=[PAD, EOS], **DIFFUSION)
    assert (text < NUM_WORDS).all()
