"""A headless Chromium for tests of pages; they are skipped where there is none."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


_ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@contextmanager
def open_browser() -> Iterator[Callable[..., Any]]:
    """Opens pages of Playwright, each in a context of its own, with the errors of its scripts in `errors`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pages are tested with playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("pages are tested in chromium, which is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=_ARGUMENTS, timeout=60_000)

        def open_page(**options: Any) -> Any:
            page = browser.new_context(**options).new_page()
            page.set_default_timeout(60_000)  # of a busy machine
            page.errors = []
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.on("console", lambda message: message.type == "error" and page.errors.append(message.text))
            return page

        yield open_page
        browser.close()
