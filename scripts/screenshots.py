"""
Pictures of the Space and of the replay in every state, to be looked at after a change of either.

    python3 scripts/screenshots.py /tmp/screenshots

Needs playwright, gradio and a Chromium of the system, as the tests of the pages do. The pages show the checkpoint of
the package, with a fixed seed.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright
from transformers import AutoModelForCausalLM

from blockgen_hf.checkpoints import shipped_checkpoint
from blockgen_hf.cli import main as command
from blockgen_hf.cli.demo import space_app
from blockgen_hf.cli.loading import quiet_transformers
from blockgen_hf.tokenizer_loading import pretrained_tokenizer


PROMPT = "Once upon a time"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# What a picture's name ends with, and how its page is opened.
LOOKS: dict[str, dict[str, Any]] = {
    "": {"viewport": DESKTOP},
    "dark": {"viewport": DESKTOP, "color_scheme": "dark"},
    "phone": {"viewport": PHONE, "has_touch": True},
    "phone-dark": {"viewport": PHONE, "has_touch": True, "color_scheme": "dark"},
}
Shoot = Callable[[Page, str], None]


@contextmanager
def browser() -> Iterator[Callable[..., Page]]:
    """Opens pages, each in a context of its own."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("There is no chromium on this machine: install it.")
    with sync_playwright() as running:
        opened = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield lambda **options: opened.new_context(**options).new_page()
        opened.close()


def shoot_replay(page: Page, file: Path, shoot: Shoot) -> None:
    """At its beginning, half way and at its end, with what is told of a token."""
    page.goto(file.as_uri())
    scrubber = page.get_by_role("slider", name="Step")
    last = int(scrubber.get_attribute("max") or 0)
    for state, step in (("start", 0), ("scrubbed", last // 2), ("end", last)):
        scrubber.fill(str(step))
        if state == "end":
            page.locator(".text .token").last.click()
        shoot(page, f"{file.stem}-{state}")


def shoot_space(page: Page, url: str, model: Any, shoot: Shoot) -> None:
    """From the empty page over a text that is written to a comparison, and a prompt that does not fit."""
    page.goto(url)
    generate = page.get_by_role("button", name="Generate")
    generate.wait_for()
    shoot(page, "space-start")
    page.get_by_label("Prompt").fill(PROMPT)
    slow = model.register_forward_hook(lambda *_: time.sleep(0.2))  # so that there is time for a picture
    generate.click()
    page.locator(".replay.live[aria-busy] .token").nth(12).wait_for()
    shoot(page, "space-denoising")
    slow.remove()
    replay = page.frame_locator("iframe.replay-frame")
    scrubber = replay.get_by_role("slider", name="Step")
    scrubber.fill(str(int(scrubber.get_attribute("max") or 0) // 2))
    shoot(page, "space-scrubbed")
    other = page.get_by_label("Compare with")
    other.fill("speculative")
    other.press("Enter")
    generate.click()
    replay.locator(".run").nth(1).wait_for()
    shoot(page, "space-comparison")
    page.get_by_label("Prompt").fill("so " * 400)
    generate.click()
    page.get_by_role("alert").wait_for()
    shoot(page, "space-error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers(), space_app() as names, browser() as open_page, tempfile.TemporaryDirectory() as pages:
        files = {Path(pages) / "replay.html": ["--decoding", "arpc"], Path(pages) / "comparison.html": ["--compare"]}
        for file, options in files.items():
            command(["generate", PROMPT, "--seed", "1", "--max-new-tokens", "48", *options, "--save-html", str(file)])
        model = AutoModelForCausalLM.from_pretrained(shipped_checkpoint()).eval()
        tokenizer = pretrained_tokenizer(str(shipped_checkpoint()))
        app = names["App"](names["ModelWriter"](model, tokenizer), "tinystories-masked")
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        for look, context in LOOKS.items():

            def shoot(page: Page, name: str, look: str = look, size: Any = context["viewport"]) -> None:
                # The whole page in sight: what a frame has not shown yet would be left out.
                height = page.evaluate("document.documentElement.scrollHeight")
                page.set_viewport_size({"width": size["width"], "height": max(size["height"], height)})
                page.wait_for_timeout(400)  # frames tell their height, and menus close
                page.screenshot(path=folder / f"{name}{'-' * bool(look)}{look}.png")
                page.set_viewport_size(size)

            for file in files:
                shoot_replay(open_page(**context), file, shoot)
            shoot_space(open_page(**context), url, model, shoot)
        names["gr"].close_all()
    print(f"{len(list(folder.glob('*.png')))} pictures: {folder}")


if __name__ == "__main__":
    main()
