"""Pages and pictures that replay frames."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import generate, tiny_model, tiny_tokenizer, words

from blockgen_hf.cli import main
from blockgen_hf.generation.frames import frames
from blockgen_hf.replay import Run, replay_gif, replay_html, replay_svg
from blockgen_hf.replay.page import script_json
from blockgen_hf.replay.runs import timeline


HOSTILE = [
    "</script><script>document.title='broken'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='broken'\">",
    "@@DATA@@",
    "&lt;'\"",
    "\u2028\u2029\x00\x1b\ud800"[:4],
    "]]>",
    "\n",
    "",
]


def run_of(label: str = "", **settings: Any) -> Run:
    outputs = generate(
        tiny_model(),
        words(1, 3),
        return_dict_in_generate=True,
        output_trajectory=True,
        max_new_tokens=8,
        trajectory_top_k=2,
        **settings,
    )
    return Run(frames(outputs, tiny_tokenizer())[0], label, "details")


def hostile_run() -> Run:
    """A prompt of hostile tokens, and one that is drafted, rejected and replaced."""
    given = [{"token": index, "text": text, "state": "given", "renoised": 0} for index, text in enumerate(HOSTILE)]
    draft = {"token": 0, "text": HOSTILE[0], "state": "draft", "renoised": 1}
    likely = [{"token": 0, "text": HOSTILE[0], "probability": 0.5}]
    end = {**draft, "state": "ar", "mark": "rejected", "was": {"token": 2, "text": HOSTILE[2]}, "surprisal": 1.5}
    found = [
        {"event": event, "block": 0, "step": step, "function_evaluations": step, "new_tokens": 0, "positions": cells}
        for step, (event, cells) in enumerate(
            [("prompt", given), ("draft", [*given, draft]), ("verify", [*given, {**end, "ar": likely}])]
        )
    ]
    document = {"decoding": "ar", "block_size": 1, "mask_token": None, "prompt_tokens": len(HOSTILE), "frames": found}
    return Run(document, HOSTILE[0], HOSTILE[2])


def data_of(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="replay-data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(found)


# ---- the page
def test_the_page_has_every_frame() -> None:
    run = run_of(decoding="arpc", block_size=4)
    (packed,) = data_of(replay_html(run, "A title"))["runs"]
    unpacked = [
        {**frame, "positions": [packed["cells"][number] for number in frame["positions"]]}
        for frame in packed["frames"]
    ]
    assert unpacked == run.frames
    assert len(packed["cells"]) < sum(len(frame["positions"]) for frame in run.frames) / 2


def test_the_page_loads_nothing() -> None:
    page = replay_html(run_of(decoding="ar"))
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


@pytest.mark.parametrize("title", ["A title", HOSTILE[0]])
def test_no_token_is_markup(title: str) -> None:
    """The data come back as they were, and the page has the scripts that it has for harmless tokens."""
    page = replay_html(hostile_run(), title)
    harmless = replay_html(run_of(decoding="ar"))
    for tag in ("<script", "</script", "<img", "<!--"):
        assert page.count(tag) == harmless.count(tag)
    data = data_of(page)
    assert [cell["text"] for cell in data["runs"][0]["cells"][: len(HOSTILE)]] == HOSTILE
    assert data["title"] == title


def test_json_in_a_script_is_json() -> None:
    assert json.loads(script_json({"a": HOSTILE})) == {"a": HOSTILE}
    assert not set(script_json(HOSTILE)) & set("<>&\u2028\u2029")


def test_frames_without_texts_are_refused() -> None:
    document = {**run_of(decoding="ar").document, "frames": [{"positions": [{"token": 1}]}]}
    with pytest.raises(ValueError, match="frames with the texts of their tokens"):
        replay_html(Run(document))
    with pytest.raises(ValueError, match="`runs` must hold a run at least"):
        replay_svg([])


# ---- pictures
def test_two_decodings_are_aligned_by_cost() -> None:
    """At each moment both have cost the same, or one is at its end or between two passes."""
    first, second = run_of(decoding="ar"), run_of(decoding="arpc", block_size=4)
    moments = timeline([first, second])
    shown = [(first.frames[a]["function_evaluations"], second.frames[b]["function_evaluations"]) for a, b in moments]
    assert [max(pair) for pair in shown] == sorted(max(pair) for pair in shown)
    ends = (first.frames[-1]["function_evaluations"], second.frames[-1]["function_evaluations"])
    for pair in shown:
        assert pair[0] == pair[1] or min(pair) == min(ends)
    assert moments[-1] == [len(first.frames) - 1, len(second.frames) - 1]
    assert timeline([first]) == [[index] for index in range(len(first.frames))]


def test_the_svg_is_xml_and_shows_every_text() -> None:
    run = hostile_run()
    picture = replay_svg([run, run_of(decoding="draft_revise", block_size=2, revise_block_size=4)], title=HOSTILE[0])
    root = ElementTree.fromstring(picture)
    assert {element.tag.split("}")[1] for element in root.iter()} <= {
        *("svg", "title", "desc", "style", "rect", "text", "tspan", "g", "path", "circle")
    }
    texts = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {HOSTILE[0], HOSTILE[2], "@@DATA@@", "⏎", "·", "░"} <= texts
    assert "prefers-reduced-motion" in picture and "prefers-color-scheme: dark" in picture


def test_the_svg_ends_with_the_text() -> None:
    """Where motion is unwanted, what is left visible is the last frame."""
    run = run_of(decoding="arpc", block_size=4)
    picture = replay_svg(run)
    (rule,) = re.findall(r"([^\n]*) { visibility: hidden; }\n", picture)
    hidden = set(re.findall(r"\.(p\d+)", rule))
    pattern = r'^  (?:<g class="(p\d+)">)?<(?:rect class="(?!page)|text class="t)[^\n]*>([^<]*)</text>'
    left = [text for name, text in re.findall(pattern, picture, flags=re.MULTILINE) if name not in hidden]
    assert left == [position["text"] for position in run.frames[-1]["positions"]]


def test_the_gif_has_a_picture_for_every_moment(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    run = run_of(decoding="speculative", block_size=4)
    replay_gif([run, hostile_run()], tmp_path / "replay.gif", width=400, step=0.2, pause=1.0)
    with image.open(tmp_path / "replay.gif") as picture:
        assert picture.width == 400
        assert picture.n_frames == len(timeline([run, hostile_run()]))
        assert picture.info["loop"] == 0 and picture.info["duration"] == 200


# ---- the command
def generate_command(*options: str) -> int:
    return main(["generate", "One day", "--seed", "1", "--max-new-tokens", "4", *options])


def test_generate_saves_a_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, svg = tmp_path / "replay.html", tmp_path / "replay.svg"
    assert generate_command("--decoding", "arpc", "--save-html", str(page), "--save-svg", str(svg)) == 0
    shown = capsys.readouterr()
    assert f"Replay: {page}\nReplay: {svg}" in shown.err and "Replay" not in shown.out
    data = data_of(page.read_text())
    assert data["title"] == "One day"
    assert [run["label"] for run in data["runs"]] == ["arpc"]
    text = "".join(data["runs"][0]["cells"][number]["text"] for number in data["runs"][0]["frames"][-1]["positions"])
    assert text.startswith("One day") and text in shown.out
    assert any(len(cell.get("diffusion", [])) == 5 for cell in data["runs"][0]["cells"])
    ElementTree.fromstring(svg.read_text())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--save-html", "missing/replay.html"], "must be a file in a folder that exists"),
        (["--save-svg", "x.svg", "--compare"], "--save-svg shows a single decoding"),
        (["--save-html", "x.html", "--num-samples", "2"], "--save-html replays a single text"),
    ],
)
def test_replays_that_cannot_be_are_refused(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate_command(*options) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_replay_is_of_one_prompt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["generate", "One day", "Once", "--save-html", str(tmp_path / "x.html")]) == 1
    assert "give one prompt" in capsys.readouterr().err


# ---- in a browser
@pytest.fixture
def browser_page() -> Iterator[Any]:
    from browser import open_browser

    with open_browser() as open_page:
        yield open_page()


def seen(page: Any, run: int = 0) -> list[str]:
    return (
        page.locator(".run")
        .nth(run)
        .locator(".text .token")
        .evaluate_all("all => all.map(one => one.firstChild.textContent)")
    )


@pytest.mark.slow
def test_the_page_plays_steps_and_scrubs(browser_page: Any, tmp_path: Path) -> None:
    page, run = browser_page, run_of(decoding="arpc", block_size=4)
    (tmp_path / "replay.html").write_text(replay_html(run))
    page.goto((tmp_path / "replay.html").as_uri())
    last = len(run.frames) - 1
    text = [position["text"] for position in run.frames[-1]["positions"]]
    scrubber = page.get_by_role("slider", name="Step")
    assert seen(page) == text and scrubber.input_value() == str(last)
    page.keyboard.press("Home")
    assert seen(page) == text[:3]
    page.keyboard.press("ArrowRight")
    assert seen(page) == [*text[:3], "░", "░", "░", "░"]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert "Block of noise" in page.get_by_role("status").text_content()
    assert "Block of noise" in scrubber.get_attribute("aria-valuetext")
    scrubber.fill(str(last))
    assert seen(page) == text
    page.get_by_label("Speed").select_option("4")
    page.get_by_role("button", name="Play (space)").click()
    assert page.get_by_role("button", name="Pause (space)").is_visible()
    page.get_by_role("button", name="Play (space)").wait_for()
    assert scrubber.input_value() == str(last)
    token = page.locator(".text .token").nth(4)
    token.focus()
    page.keyboard.press("ArrowLeft")
    about = page.get_by_label("Token", exact=True).text_content()
    assert "Diffusion" in about and "Autoregressive" in about and f"“{text[3]}”" in about
    assert page.errors == []


@pytest.mark.slow
def test_the_page_compares_two_of_several_decodings(browser_page: Any, tmp_path: Path) -> None:
    page = browser_page
    runs = [run_of(f"run {size}", decoding="block_diffusion", block_size=size) for size in (1, 2, 8)]
    (tmp_path / "replay.html").write_text(replay_html(runs))
    page.goto((tmp_path / "replay.html").as_uri())
    assert page.locator(".run h2").all_text_contents() == ["run 1", "run 2"]
    page.get_by_label("with").select_option("2")
    assert page.locator(".run h2").all_text_contents() == ["run 1", "run 8"]
    page.keyboard.press("Home")
    for _ in range(12):
        page.keyboard.press("ArrowRight")
        costs = page.locator(".cost b:first-child").all_text_contents()
        finished = [str(run.frames[-1]["function_evaluations"]) for run in (runs[0], runs[2])]
        assert costs[0] == costs[1] or any(cost == end for cost, end in zip(costs, finished, strict=True))
    page.get_by_label("with").select_option("0")
    assert page.locator(".run h2").all_text_contents() == ["run 1"]
    assert page.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1000])
def test_hostile_tokens_are_shown_as_they_are(browser_page: Any, tmp_path: Path, width: int) -> None:
    page = browser_page
    page.set_viewport_size({"width": width, "height": 700})
    (tmp_path / "replay.html").write_text(replay_html(hostile_run(), "A title"), encoding="utf-8")
    page.goto((tmp_path / "replay.html").as_uri())
    page.locator(".text .token").last.click()
    assert page.title() == "A title"
    assert seen(page)[0] == HOSTILE[0].replace(" ", "␣")
    assert HOSTILE[2] in page.get_by_label("Token", exact=True).text_content()
    assert page.locator("img, main script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing is cut at phone width
    assert page.errors == []
