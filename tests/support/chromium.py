"""Debian's Chromium as people have it: pages that say what they asked for and complained of, and what axe finds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from playwright.sync_api import Browser, Page, StorageState, expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
AXE = (files("axe_playwright_python") / "axe.min.js").read_text()
PHONE, TABLET, DESKTOP = 390, 768, 1440
# What axe says of one page: the rule, and the elements.
_RUN_AXE = """async () => {
  const found = await axe.run(document, {resultTypes: ["violations"]});
  return found.violations.map((one) => `${one.id}: ${one.nodes.map((node) => node.html.slice(0, 200)).join(" ; ")}`);
}"""
_TOO_WIDE = """() => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return [];
  return [...document.querySelectorAll("body *")]
    .filter((one) => one.getBoundingClientRect().right > width + 1).map((one) => one.outerHTML.slice(0, 120));
}"""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser for the body of a ``with``."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass(frozen=True, slots=True)
class View:
    """How a page is looked at."""

    width: int = DESKTOP
    theme: str = "light"

    def __str__(self) -> str:
        return f"{self.width}-{self.theme}"


VIEWS = tuple(View(width, theme) for width in (PHONE, TABLET, DESKTOP) for theme in ("light", "dark"))


@dataclass
class Watched:
    """A page of a profile of its own, with what it has complained of and asked for since it was opened."""

    page: Page
    base: str
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self._note("error", str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def open(self, path: str) -> Page:
        """Open a path of the console; fails if it leads elsewhere."""
        answer = self.page.goto(path)
        assert answer is not None
        assert answer.status == 200, path
        expect(self.page.locator("html")).to_have_attribute("data-script", "")
        assert self.page.url == f"{self.base}{path}"
        return self.page

    def log_in(self, token: str) -> None:
        """Log in by an operator token."""
        self.page.goto("/ui/login")
        self.page.get_by_label("Operator token").fill(token)
        self.page.get_by_role("button", name="Log in", exact=True).click()
        expect(self.page.get_by_role("navigation", name="Main")).to_be_attached()

    @property
    def elsewhere(self) -> list[str]:
        """What was asked of other hosts."""
        return [url for url in self.asked if not url.startswith((f"{self.base}/", "data:", "blob:"))]

    def faults(self) -> list[str]:
        """What is wrong with the page as it is now: complaints, foreign hosts, overflow, what axe finds."""
        found = [f"console: {text}" for text in self.complaints] + [f"asked for {url}" for url in self.elsewhere]
        found += [f"too wide: {html}" for html in self.page.evaluate(_TOO_WIDE)]
        self.page.evaluate(AXE)
        found += self.page.evaluate(_RUN_AXE)
        return found


@contextlib.contextmanager
def opened(
    browser: Browser, base: str, view: View | None = None, *, state: StorageState | None = None
) -> Iterator[Watched]:
    """A page of a fresh profile, or of one with the cookies of ``state``."""
    view = view or View()
    options: dict[str, Any] = {
        "viewport": {"width": view.width, "height": 900},
        "color_scheme": view.theme,
        "reduced_motion": "reduce",
        "bypass_csp": False,
        "timezone_id": "Europe/Vienna",
        "locale": "en-GB",
    }
    with browser.new_context(ignore_https_errors=True, base_url=base, storage_state=state, **options) as context:
        yield Watched(context.new_page(), base)
