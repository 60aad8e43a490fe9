"""The static files of the console: ours, one of others as it was published, and all of them in the wheel."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

from flask import Flask

from tests.support.browser import Browser
from tests.support.chromium import AXE
from web.console import static_files

ROOT = Path(__file__).parents[3]
# The file dist/htmx.min.js of htmx.org 4.0.1, from npm.
HTMX = "a0abb04f2f45a1f89d1d4844023245537e5e6014c87b144553e0607b4cc32130"

# The file axe.min.js of axe-core 4.12.1, from npm.
AXE_CORE = "66a8aaa95a8b044a7fd74a5435873bf04ff65a1ca75567c921b7509742085a14"


def test_htmx_is_the_file_that_was_published() -> None:
    assert hashlib.sha256((static_files.FOLDER / "htmx.min.js").read_bytes()).hexdigest() == HTMX


def test_what_judges_the_accessibility_of_pages_is_the_file_that_was_published() -> None:
    """The package that brings it adds the end of its last line."""
    assert hashlib.sha256(AXE.removesuffix("\n").encode()).hexdigest() == AXE_CORE


def test_a_file_is_kept_for_good_under_the_path_that_names_its_content(shared_app: Flask) -> None:
    browser = Browser(shared_app)
    for name, file in static_files.FILES.items():
        answer = browser.get(static_files.url_of(name))
        assert (answer.status_code, answer.data) == (200, file.content)
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        assert answer.headers["Content-Type"] == file.media_type


def test_other_files_are_not_served(shared_app: Flask) -> None:
    for name in ("nothing.css", "..%2fpages.py", "%2e%2e", "console.css%00", "static_files.py"):
        answer = Browser(shared_app).get(f"/ui/static/{static_files.VERSION}/{name}")
        assert answer.status_code in (404, 303)  # or the way to the login, if it is no path of a static file
        assert "import" not in answer.text
    assert Browser(shared_app).get("/ui/static/0000000000000000/console.css").status_code == 404


def test_the_wheel_has_the_folders_of_templates_and_static_files() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {"web", "templates"} <= set(wheel["only-include"])
    ignored = (ROOT / ".gitignore").read_text()
    assert not any(word in ignored for word in ("static", "*.js", "*.css", "*.svg"))
