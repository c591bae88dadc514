"""The Space: its app on this machine, in a stranger's hands, and in a browser."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import EOS, framed_tokenizer, tiny_model, tiny_tokenizer

from blockgen_hf.cli import main
from blockgen_hf.cli.demo import space_app


KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mixture": ("masked", {}, ["arpc", "block_diffusion", "draft_revise", "speculative", "ar"]),
    "uniform": ("uniform", {}, ["arpc", "block_diffusion", "draft_revise", "speculative", "ar"]),
    "one block size": ("block_causal", {}, ["block_diffusion"]),
    "autoregressive": ("masked", {"block_sizes": [1]}, ["ar"]),
}
PARTS = ("frames", "remote", "replay", "writing")
HAS_GRADIO = find_spec("gradio") is not None  # asked here, as the fixture below puts something in its place


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names of the app; without Gradio, which only its page needs."""
    if not HAS_GRADIO:
        monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
        sys.modules["gradio"].Blocks = None  # type: ignore[attr-defined]
    with space_app() as names:
        yield names
    for name in [name for name in sys.modules if name.split(".")[0] in PARTS]:
        del sys.modules[name]


def app_of(space: dict[str, Any], kind: str = "mixture", tokenizer: Any = None, **overrides: Any) -> Any:
    variant, settings, _ = KINDS[kind]
    model = tiny_model(variant, **settings, **overrides)
    return space["App"](space["ModelWriter"](model, tokenizer or tiny_tokenizer()), "Letters")


def fields(**changed: Any) -> list[Any]:
    """Those behind prompt and decodings, as the page has them."""
    values = dict(block_size=4, kind="steps", budget=3, corrector="ar_surprisal", seeded=0, length=8, temperature=1.0)
    return [*{**values, "seed": 0, **changed}.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_app_writes_with_every_decoding_that_a_model_knows(kind: str, space: dict[str, Any]) -> None:
    app = app_of(space, kind)
    assert app.writer.facts.decodings == KINDS[kind][2]
    for decoding in app.writer.facts.decodings:
        *drafts, end = app.generate("abcd", decoding, "nothing", *fields())
        assert drafts and all('aria-busy="true"' in draft and "replay live" in draft for draft in drafts)
        assert 'sandbox="allow-scripts"' in end and f"{decoding}: 8 new tokens" in end
        assert "tokens per second" in end


def test_two_decodings_stand_side_by_side(space: dict[str, Any]) -> None:
    *drafts, end = app_of(space).generate("abcd", "arpc", "ar", *fields())
    assert drafts[0].count('class="run"') == 1 and drafts[-1].count('class="run"') == 2
    assert "arpc: 8 new tokens" in end and "ar: 8 new tokens" in end
    assert end.count("iframe class") == 1


def test_a_seed_gives_the_same_text(space: dict[str, Any]) -> None:
    app = app_of(space)

    def text(seed: int) -> str:
        wanted = space["Fields"]("arpc", 4, "evaluations", 4, "ar_gap", 1, 8, 1.0, seed)
        *_, (run, _) = app.writer.write("ab", wanted)
        return "".join(position["text"] for position in run.frames[-1]["positions"])

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize(
    "prompt, changed, message",
    [
        ("a" * 60, {}, "The prompt has 60 tokens and 8 new ones are asked for, but the model takes 64 in all."),
        ("a", {"seed": None}, "Seed must be a number of at least 0."),
        ("a", {"seed": 2**32}, "Seed must be below 4,294,967,296."),
        ("a", {"temperature": -1}, "Temperature must be a number of at least 0."),
        ("a", {"kind": "evaluations", "budget": 1}, "nfe_per_block"),
        ("a", {"corrector": "entropy"}, "is not for masked models"),
    ],
)
def test_bad_input_gets_a_message(prompt: str, changed: dict[str, Any], message: str, space: dict[str, Any]) -> None:
    *_, end = app_of(space).generate(prompt, "arpc", "nothing", *fields(**changed))
    assert 'role="alert"' in end and message in end.replace("&#x27;", "'")


def test_who_stops_listening_stops_the_model(space: dict[str, Any]) -> None:
    app = app_of(space)
    calls: list[int] = []
    app.writer.model.register_forward_hook(lambda *args: calls.append(1))
    writing = app.generate("a", "ar", "nothing", *fields(length=60))
    next(writing)
    writing.close()
    assert len(calls) < 60
    count = len(calls)
    assert app.writer.model(torch.zeros(1, 1, dtype=torch.long)) and len(calls) == count + 1  # nothing runs on


def test_special_tokens_of_the_tokenizer_are_left_out_of_a_prompt(space: dict[str, Any]) -> None:
    writer = app_of(space, tokenizer=framed_tokenizer()).writer
    *_, (run, _) = writer.write("abcd", space["Fields"]("ar", 1, "steps", 1, "random", 0, 2, 0.0, 0))
    assert [position["token"] for position in run.frames[0]["positions"]] == tiny_tokenizer()("abcd")["input_ids"]


def test_hostile_prompts_and_tokens_are_no_markup(space: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    hostile = "<script>alert(1)</script>"
    tokenizer.add_tokens([hostile])
    app = app_of(space, vocab_size=24, tokenizer=tokenizer, mask_token_id=22)
    *drafts, end = app.generate(hostile, "ar", "nothing", *fields())
    for page in [*drafts, end]:
        assert "<script" not in page and "alert(1)" in page


def test_the_demo_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockgen_hf.cli.demo.find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "pip install 'blockgen-hf[demo]'" in capsys.readouterr().err


def test_the_page_begins_with_the_models_own_settings(space: dict[str, Any]) -> None:
    facts = space["ModelFacts"]([1, 2, 4], 64, "masked", 20, {})
    own = dict(
        decoding="block_diffusion",
        block_size=2,
        corrector="random",
        ar_seed_tokens=3,
        max_new_tokens=9,
        temperature=0.3,
    )

    def first(**settings: Any) -> dict[str, Any]:
        return vars(space["Fields"].first(replace(facts, settings=settings)))

    budget = dict(budget_kind="steps", budget=12, seed=0)
    assert first(**own, denoising_steps=12) == {**own, **budget}
    assert first(nfe_per_block=7)["budget_kind"] == "evaluations" and first(nfe_per_block=7)["budget"] == 7
    assert first(do_sample=False)["temperature"] == 0 and first(temperature=None)["temperature"] == 1
    assert first(decoding="contrastive", block_size=3, max_new_tokens=500) == {**first(), "max_new_tokens": 32}
    app = app_of(space)
    app.writer.model.generation_config.temperature = 0.25
    assert space["Fields"].first(space["ModelWriter"](app.writer.model, tiny_tokenizer()).facts).temperature == 0.25


@pytest.mark.slow
@pytest.mark.skipif(not HAS_GRADIO, reason="the page needs gradio")
def test_the_page_generates_replays_compares_and_explains(space: dict[str, Any], tmp_path: Path) -> None:
    """Type, generate, watch, scrub, compare, and mistype, in a browser and by name and role."""
    from browser import open_page

    app = app_of(space, eos_token_id=EOS)
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    with open_page(tmp_path / "profile") as page:
        page.set_default_timeout(60_000)
        page.set_viewport_size({"width": 390, "height": 800})
        page.goto(url)
        page.get_by_label("Prompt").fill("abc")
        page.get_by_role("button", name="Generate").click()
        replay = page.frame_locator("iframe.replay-frame")
        scrubber = replay.get_by_role("slider", name="Step")
        scrubber.fill("1")
        assert "Block of noise" in replay.locator(".what").first.text_content()
        assert "arpc" in page.get_by_role("status").first.text_content()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390

        page.get_by_label("Compare with").click()
        page.get_by_role("option", name="ar", exact=True).click()
        page.get_by_role("button", name="Generate").click()
        replay.locator(".run").nth(1).wait_for()
        assert replay.locator(".run h2").all_text_contents() == ["arpc", "ar"]

        page.get_by_label("Prompt").fill("a" * 70)
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("alert").filter(has_text="The prompt has 70 tokens").wait_for()
