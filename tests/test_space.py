"""The Space: its app on this machine, in a stranger's hands, and in a browser."""

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import EOS, framed_tokenizer, tiny_model, tiny_tokenizer, wait_for

from blockgen_hf.cli import main
from blockgen_hf.cli.demo import space_app


with suppress(ImportError):  # the extra `serve`; here, so that `fixed_costs` finds it
    import blockgen_hf.serving.generations  # noqa: F401

KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mixture": ("masked", {}, ["arpc", "block_diffusion", "draft_revise", "speculative", "ar"]),
    "uniform": ("uniform", {}, ["arpc", "block_diffusion", "draft_revise", "speculative", "ar"]),
    "one block size": ("block_causal", {}, ["block_diffusion"]),
    "autoregressive": ("masked", {"block_sizes": [1]}, ["ar"]),
}
PARTS = ("frames", "remote", "replay", "writing")
HAS_GRADIO = find_spec("gradio") is not None  # asked here, as the fixture below puts something in its place


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The names of the app; without Gradio, which takes seconds to import, unless its page is looked at."""
    pytest.importorskip("httpx", reason="comes with gradio")
    if not HAS_GRADIO or request.node.get_closest_marker("slow") is None:
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


# ---- a server that does the work
def test_a_server_writes_what_a_model_here_writes(space: dict[str, Any]) -> None:
    """Frames, texts and details, for every decoding; greedy too."""
    pytest.importorskip("fastapi", reason="the extra `serve` needs Python 3.11")
    from serving import running

    model, tokenizer = tiny_model().double(), tiny_tokenizer()
    here = space["ModelWriter"](model, tokenizer)
    with running(model, tokenizer, api_key="secret") as server:
        there = space["ServerWriter"](server.server.url.removesuffix("/v1"), api_key="secret")
        assert vars(there.facts) | {"settings": None} == vars(here.facts) | {"settings": None}
        assert space["Fields"].first(there.facts) == space["Fields"].first(here.facts)
        for number, decoding in enumerate(here.facts.decodings):
            wanted = space["Fields"](decoding, 4, "steps", 3, "ar_gap", 1, 8, float(number % 2), number)
            (*_, (run, _)), (*_, (served, _)) = (list(writer.write("abcd", wanted)) for writer in (here, there))
            assert served.document == run.document and served.details == run.details
            assert served.facts.keys() == run.facts.keys()
        page = space["App"](there, "Letters")
        *_, end = page.generate("a" * 63, "arpc", "nothing", *fields())
        assert 'role="alert"' in end and "The model has 64 positions." in end

        before = server.metric("blockgen_cancelled_requests_total")
        writing = page.generate("a", "ar", "nothing", *fields(length=60))
        next(writing)
        writing.close()
        wait_for(lambda: server.metric("blockgen_running") == 0)
        assert server.metric("blockgen_cancelled_requests_total") == before + 1
    *_, end = page.generate("a", "ar", "nothing", *fields())
    assert 'role="alert"' in end and "The connection to" in end


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["other", "--api-key", "secret"], "no model 'other', but ['tiny']"),
        ([], "The API key is missing or wrong"),
        (["--device", "cpu"], "--device loads a model here"),
    ],
)
def test_the_demo_says_what_is_wrong_with_a_server(
    arguments: list[str], message: str, space: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    pytest.importorskip("fastapi", reason="the extra `serve` needs Python 3.11")
    from serving import running

    monkeypatch.setattr("blockgen_hf.cli.demo.find_spec", lambda name: True)
    with running(tiny_model(), tiny_tokenizer(), api_key="secret") as server:
        assert main(["demo", "--server", server.server.url, *arguments]) == 1
        assert message in capsys.readouterr().err
    assert main(["demo", "--server", server.server.url]) == 1
    assert "does not answer" in capsys.readouterr().err


# ---- in a browser
@pytest.fixture
def open_app(space: dict[str, Any], tmp_path: Path) -> Iterator[Any]:
    """Opens the page of an app in a browser, with whatever a context of Playwright takes; also more than once."""
    if not HAS_GRADIO:
        pytest.skip("the page needs gradio")
    from browser import open_browser

    apps: dict[int, tuple[Any, str]] = {}
    with open_browser() as browser:

        def open_page(app: Any, **options: Any) -> Any:
            if id(app) not in apps:
                _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
                apps[id(app)] = (app, url)
            page = browser(**options)
            page.goto(apps[id(app)][1])
            page.get_by_role("button", name="Generate").wait_for()
            return page

        yield open_page
    space["gr"].close_all()


def compare_with(page: Any, decoding: str) -> None:
    """By the keyboard: a menu closes when the page scrolls below it."""
    field = page.get_by_label("Compare with")
    field.fill(decoding)
    field.press("Enter")


@pytest.mark.slow
def test_the_page_generates_replays_compares_and_explains(space: dict[str, Any], open_app: Any) -> None:
    """Type, generate, scrub, compare, and mistype, on a phone, by name and role."""
    page = open_app(app_of(space, eos_token_id=EOS), viewport={"width": 390, "height": 800}, has_touch=True)
    page.get_by_label("Prompt").fill("abc")
    page.get_by_role("button", name="Generate").tap()
    replay = page.frame_locator("iframe.replay-frame")
    replay.get_by_role("slider", name="Step").fill("1")
    assert "Block of noise" in replay.locator(".what").first.text_content()
    assert "arpc" in page.get_by_role("status").first.text_content()
    widths = "[document.documentElement.scrollWidth, document.querySelector('iframe.replay-frame').clientWidth]"
    assert page.evaluate(widths)[0] <= 390 and page.evaluate(widths)[1] > 330

    compare_with(page, "speculative")
    page.get_by_role("button", name="Generate").tap()
    replay.locator(".run").nth(1).wait_for()
    assert replay.locator(".run h2").all_text_contents() == ["arpc", "speculative"]

    page.get_by_label("Prompt").fill("a" * 70)
    page.get_by_role("button", name="Generate").tap()
    page.get_by_role("alert").filter(has_text="The prompt has 70 tokens").wait_for()
    assert page.errors == []


@pytest.mark.slow
def test_the_page_is_used_by_keyboard_in_the_dark_and_without_motion(space: dict[str, Any], open_app: Any) -> None:
    page = open_app(app_of(space), color_scheme="dark", reduced_motion="reduce")
    from playwright.sync_api import expect  # which waits until it is so

    focused = "document.activeElement.value || document.activeElement.textContent.trim()"

    def tab_to(wanted: str) -> None:
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.evaluate(focused) == wanted:
                return
        raise AssertionError(f"Tab does not lead to {wanted}, but to {page.evaluate(focused)}")

    page.get_by_label("Prompt").focus()
    tab_to("block_diffusion")
    page.keyboard.press("Space")
    tab_to("Generate")
    page.keyboard.press("Enter")
    replay = page.frame_locator("iframe.replay-frame")
    scrubber = replay.get_by_role("slider", name="Step")
    scrubber.wait_for()
    assert "block_diffusion: 32 new tokens" in page.get_by_role("status").first.text_content()
    tab_to("Stop")
    page.keyboard.press("Tab")  # the settings
    page.keyboard.press("Tab")  # into the replay: a token of the text
    page.keyboard.press("Home")
    expect(scrubber).to_have_attribute("aria-valuetext", re.compile("Step 1 of"))
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(scrubber).to_have_value("1")
    # What the page lies on is dark, and what it is written in is light; nothing is animated.
    brightness = """([text, ground]) => {
      const colors = [getComputedStyle(text).color, getComputedStyle(ground).backgroundColor];
      return colors.map((color) => Math.max(...color.match(/[0-9.]+/g).slice(0, 3)));
    }"""
    bodies = "[document.querySelector('.token') || document.body, document.body]"
    for frame in page.frames:
        ink, ground = frame.evaluate(f"() => ({brightness})({bodies})")
        assert ink > 120 > 60 > ground
    assert replay.locator(".token").first.evaluate("one => getComputedStyle(one).transitionDuration") == "0s"
    page.get_by_label("Prompt").fill("a" * 70)
    page.get_by_role("button", name="Generate").click()
    ink, ground = page.get_by_role("alert").evaluate(f"one => ({brightness})([one, one])")
    assert ink > 200 > 100 > ground
    assert page.errors == []


@pytest.mark.slow
def test_visitors_have_a_place_in_the_queue_and_stop_the_model(space: dict[str, Any], open_app: Any) -> None:
    """Also who leaves stops it."""
    app, calls = app_of(space, "autoregressive"), []
    goes_on, is_fast = threading.Event(), threading.Event()

    def count(*_: Any) -> None:
        calls.append(1)
        goes_on.wait(120)  # until all of them wait
        time.sleep(0 if is_fast.is_set() else 0.5)

    app.writer.model.register_forward_hook(count)
    first, second, third = (open_app(app) for _ in range(3))
    for page, shown in ((first, "function evaluation"), (second, "queue: 1/1"), (third, "queue: 2/2")):
        page.get_by_role("button", name="Generate").click()
        text = page.locator("#output").get_by_text(shown).first
        text.wait_for()
        box, around = text.bounding_box(), page.locator("#output").bounding_box()
        assert around["y"] <= box["y"] and box["y"] + box["height"] <= around["y"] + around["height"]  # not cut
    first.get_by_role("button", name="Stop").click()
    goes_on.set()
    second.locator("#output .run").wait_for()  # its turn
    third.locator("#output").get_by_text("queue: 1/1").wait_for()
    second.close()
    third.locator("#output .run").wait_for()
    third.get_by_role("button", name="Stop").click()
    wait_for(lambda: not any(thread.name.startswith("writing") for thread in threading.enumerate()))
    assert len(calls) < 90  # of three texts of 32 tokens
    is_fast.set()
    first.get_by_role("button", name="Generate").click()
    first.frame_locator("iframe.replay-frame").get_by_role("slider", name="Step").wait_for()
    assert first.errors == third.errors == []
