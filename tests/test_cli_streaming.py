"""What `blockgen-hf generate --show-denoising` draws, on a small emulated terminal."""

import re
import sys
import time
from typing import Any

import pytest
import torch
from tiny import EOS, NUM_WORDS, PAD, VOCAB_SIZE, generate, spaced_tokenizer, tiny_model, words

from blockgen_hf.cli import streamers
from blockgen_hf.cli.streamers import MASK, DraftLog, SpeculationLog, StreamedText, TerminalDrafts
from blockgen_hf.cli.text_layout import printable, wrap


class Terminal:
    """So much of a terminal as is used: text, new lines, colours, and the cursor up and erasing below it."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self.rows: list[list[str]] = [[]]
        self.scrolled: list[str] = []
        self.row = self.column = 0
        self.color = ""
        self.colored = ""

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def write(self, text: str) -> None:
        for sequence, sign in re.findall(r"(\033\[\d*[AJm])|(.)", text, flags=re.DOTALL):
            if sequence:
                self._control(sequence[2:-1], sequence[-1])
            elif sign == "\r":
                self.column = 0
            elif sign == "\n":
                self._new_line()
            else:
                self._put(sign)

    def _control(self, argument: str, name: str) -> None:
        if name == "A":
            self.row = max(0, self.row - int(argument))
        elif name == "J":
            self.rows = self.rows[: self.row + 1]
            self.rows[self.row] = self.rows[self.row][: self.column]
        else:
            self.color = "" if argument == "0" else argument

    def _new_line(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append([])
        if len(self.rows) > self.lines:
            self.scrolled.append("".join(self.rows.pop(0)))
            self.row -= 1

    def _put(self, sign: str) -> None:
        assert self.column < self.columns - 1, "the last column is where terminals differ"
        row = self.rows[self.row]
        row += [" "] * (self.column - len(row))
        row[self.column : self.column + 1] = [sign]
        self.column += 1
        self.colored += sign if self.color else ""

    def text(self) -> list[str]:
        return [*self.scrolled, *("".join(row) for row in self.rows)]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal(columns=20, lines=6)
    monkeypatch.setattr(streamers, "DRAFT_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "6")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return terminal


def log_probs(*tokens: int, decided: tuple[int, ...] = ()) -> torch.Tensor:
    """A draft `[1, n, V]` with these likeliest tokens, sure at the places `decided`."""
    probs = torch.full((1, len(tokens), VOCAB_SIZE), 0.5 / VOCAB_SIZE)
    for place, token in enumerate(tokens):
        probs[0, place, token] += 0.5
        if place in decided:
            probs[0, place] = torch.nn.functional.one_hot(torch.tensor(token), VOCAB_SIZE)
    return probs.log()


def lines(sequence: torch.Tensor) -> list[str]:
    """The text as it must stand on the terminal: ten words have 19 columns."""
    text = spaced_tokenizer().decode(sequence[0], skip_special_tokens=True)
    return [*re.findall(r"\S(?: \S){0,9}", text), ""]


def test_drafts_replace_one_another(terminal: Terminal) -> None:
    streamer = TerminalDrafts(spaced_tokenizer(), terminal)
    streamer.put(torch.tensor([[0, 1]]))
    streamer.put_draft(logits=log_probs(2, 3, 4))
    assert terminal.text() == ["a b c d e"]
    assert terminal.colored == " c d e"
    terminal.colored = ""
    streamer.put_draft(logits=log_probs(2, 5, EOS, 6, decided=(0,)))
    assert terminal.text() == ["a b c f"]  # up to the end of the text
    assert terminal.colored == " f"
    streamer.put(torch.tensor([2, 7]))
    streamer.end()
    assert terminal.text() == ["a b c h", ""]


def test_a_mask_is_shown_as_a_mask(terminal: Terminal) -> None:
    streamer = TerminalDrafts(spaced_tokenizer(), terminal)
    streamer.put(torch.tensor([[0, 1]]))
    is_mask = torch.tensor([[True, False, True]])
    streamer.put_draft(logits=log_probs(2, 3, EOS, decided=(0, 1)), is_mask=is_mask)  # however sure the model is
    assert terminal.text() == [f"a b{MASK} d{MASK}"]
    assert terminal.colored == MASK * 2


def test_no_color(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    streamer = TerminalDrafts(spaced_tokenizer(), terminal)
    streamer.put_draft(logits=log_probs(2, 3, 4))
    assert terminal.text() == ["c d e"]
    assert terminal.colored == ""


@pytest.mark.parametrize(
    ("variant", "num_prompt_tokens"), [("masked", 0), ("masked", 9), ("masked", 30), ("uniform", 1), ("uniform", 10)]
)
def test_wrapping_and_scrolling(terminal: Terminal, variant: str, num_prompt_tokens: int) -> None:
    """Drafts that wrap, and that make the terminal scroll, leave the text behind and nothing else."""
    model, tokenizer = tiny_model(variant), spaced_tokenizer()
    prompt = words(1, num_prompt_tokens)
    sequence = generate(model, prompt, max_new_tokens=33, block_size=16, streamer=TerminalDrafts(tokenizer, terminal))
    assert terminal.text() == lines(sequence)
    assert terminal.colored != ""


def test_drafts_larger_than_the_terminal(terminal: Terminal) -> None:
    model, tokenizer = tiny_model("uniform", max_position_embeddings=256), spaced_tokenizer()
    sequence = generate(
        model,
        words(1, 5),
        max_new_tokens=150,
        block_size=150,
        denoising_steps=3,
        streamer=TerminalDrafts(tokenizer, terminal),
    )
    assert terminal.text() == lines(sequence)


def test_draft_log(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny_model(), spaced_tokenizer()
    settings: dict[str, Any] = dict(max_new_tokens=12, block_size=8, denoising_steps=3, ar_seed_tokens=1)
    settings["suppress_tokens"] = [PAD, EOS]
    sequence = generate(model, words(1, 3), streamer=DraftLog(tokenizer, sys.stdout, sys.stderr), **settings)
    printed = capsys.readouterr()
    drafts, text = printed.err.splitlines(), printed.out.removesuffix("\n")
    assert text == tokenizer.decode(sequence[0], skip_special_tokens=True)
    parsed = [re.fullmatch(r"block (\d), pass +(\d), +(\d)/(\d) decided \| (.*)", draft) for draft in drafts]
    assert all(parsed)
    columns = [match.groups() for match in parsed if match]
    passes = [[int(number) for block, number, *_ in columns if block == b] for b in "12"]
    assert all(numbers == list(range(1, len(numbers) + 1)) and len(numbers) <= 3 for numbers in passes)
    assert {(block, size) for block, _, _, size, _ in columns} == {("1", "8"), ("2", "3")}
    assert all(decided == "0" for _, number, decided, *_ in columns if number == "1")  # a block starts from noise
    # What is decided is placed in the text, and the rest are masks.
    for _, _, decided, size, draft in columns:
        assert draft.count(MASK) == int(size) - int(decided)
        assert len(draft.replace(MASK, " ").split()) == int(decided)
    assert any(0 < int(decided) < int(size) for _, _, decided, size, _ in columns)


SPECULATIVE: dict[str, Any] = {"decoding": "speculative", "block_size": 8, "suppress_tokens": [PAD, EOS]}


@pytest.mark.parametrize("draft", [{"fused_drafts": True}, {"fused_drafts": False}, {"draft_steps": 3}])
def test_the_log_of_speculation_tells_how_much_of_a_draft_is_kept(
    draft: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each draft, and the words that are accepted stand in the text."""
    model, tokenizer = tiny_model(), spaced_tokenizer()
    streamer = SpeculationLog(tokenizer, sys.stdout, sys.stderr)
    settings = {**SPECULATIVE, **draft, "max_new_tokens": 40, "temperature": 0.3, "return_dict_in_generate": True}
    outputs = generate(model, words(1, 3), streamer=streamer, **settings)
    printed = capsys.readouterr()
    text = tokenizer.decode(outputs.sequences[0], skip_special_tokens=True)
    assert printed.out == text + "\n"
    parsed = [re.fullmatch(r"draft +(\d+), +(\d+) kept \| (.*)", line) for line in printed.err.splitlines()]
    assert all(parsed)
    columns = [match.groups() for match in parsed if match]
    assert [int(number) for number, *_ in columns] == list(range(1, len(columns) + 1))
    kept, accepted = sum(int(count) for _, count, _ in columns), int(outputs.num_accepted_tokens)
    # Of fused drafts, which are longer than what is verified, the next token may agree too.
    assert 0 < accepted <= kept <= accepted + len(columns) * ("fused_drafts" in draft and draft["fused_drafts"])
    for _, count, drafted in columns:
        assert MASK not in drafted
        assert " ".join(drafted.split()[: int(count)]) in text


def test_no_token_of_a_draft_is_decided_before_it_is_verified(terminal: Terminal) -> None:
    streamer = TerminalDrafts(spaced_tokenizer(), terminal, decides=False)
    sequence = generate(
        tiny_model(), words(1, 3), streamer=streamer, max_new_tokens=33, do_sample=False, **SPECULATIVE
    )
    assert terminal.text() == lines(sequence)
    streamer.put_draft(logits=log_probs(2, 3, decided=(0, 1)))
    assert terminal.colored.endswith("c d")


def test_time_of_drawing_is_known(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamers, "DRAFT_SECONDS", 0.05)
    streamer = TerminalDrafts(spaced_tokenizer(), terminal)
    logits = log_probs(1, 2)
    started = time.perf_counter()
    for _ in range(4):
        streamer.put_draft(logits=logits)
    assert 0.1 < streamer.seconds <= time.perf_counter() - started


def test_control_characters_do_not_reach_a_terminal(terminal: Terminal) -> None:
    assert printable("a\tb\r\nc\033[2J\x07é") == "a    b\nc�[2J�é"
    StreamedText(spaced_tokenizer(), terminal).on_finalized_text("x\033[3Ay")
    assert terminal.text() == ["x�[3Ay"]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", [""]),
        ("abc", ["abc"]),
        ("ab cd", ["ab cd"]),
        ("ab cde", ["ab", "cde"]),
        ("abcde fg", ["abcde", "fg"]),
        ("abcdefghijkl m", ["abcde", "fghij", "kl m"]),
        ("a\n\nb\n", ["a", "", "b", ""]),
        ("日本語 x", ["日本", "語 x"]),
        ("e\u0301e\u0301e\u0301e\u0301e\u0301", ["e\u0301" * 5]),
    ],
)
def test_wrap(text: str, rows: list[str]) -> None:
    assert [text[start:end] for start, end in wrap(text, 5)] == rows


def test_wrap_keeps_every_word() -> None:
    for seed in range(50):
        text = " ".join(
            "w" * int(n) for n in torch.randint(1, 9, (30,), generator=torch.Generator().manual_seed(seed))
        )
        for width in (4, 7, 20):
            rows = [text[start:end] for start, end in wrap(text, width)]
            assert max(map(len, rows)) <= width
            assert "".join(rows).replace(" ", "") == text.replace(" ", "")


def test_words_are_what_the_tokenizer_reads() -> None:
    assert spaced_tokenizer()("a t")["input_ids"] == [0, NUM_WORDS - 1]
