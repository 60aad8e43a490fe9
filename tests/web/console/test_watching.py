"""A change is answered before the broker obeys, and the page watches it take hold, step by step."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask import Flask

import db
from app import portal_of
from core.roles import Role
from operations.wiring import utc_now
from store.scope import ALL_TENANTS
from tests.support.brokers import enforce_all
from tests.support.browser import Browser, text_of
from tests.support.harness import ON_SQLITE, Api
from tests.support.tenants import add_tenant
from tests.web.console.test_actions import confirm, preview, registered
from workflows import prompt
from workflows.prompt import Outcome

pytestmark = ON_SQLITE
STYLES = Path(__file__).parents[3] / "web" / "console" / "static" / "console.css"
TAKING_HOLD = "Recorded, and taking hold at the broker"


@pytest.fixture
def hanging(app: Flask, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A broker that answers nothing until the event is set, and obeys nothing then."""
    released = threading.Event()

    def apply(generation: int, *, timeout: float | None = None) -> Outcome:
        assert released.wait(30)
        return Outcome(generation, 0, "The broker does not answer in time.")

    monkeypatch.setattr(prompt, "PROMPT_SECONDS", 0.01)
    monkeypatch.setattr(portal_of(app).reconciler, "apply", apply)
    yield released
    released.set()
    for thread in threading.enumerate():
        if thread.name == "prompt":
            thread.join(30)


@pytest.fixture
def devices(api: Api) -> list[str]:
    return registered(api, "a", "b")


@pytest.mark.parametrize(
    ("action", "said"), [("revoke", "Revoked: taking hold"), ("suspend", "Suspended: taking hold")]
)
def test_a_device_is_revoked_or_suspended_at_once_and_its_page_watches_the_broker(
    devices: list[str], browser: Browser, hanging: threading.Event, action: str, said: str
) -> None:
    here = f"/ui/devices/{devices[0]}"
    answer = browser.post(f"{here}/{action}")
    assert (answer.status_code, answer.headers["Location"]) == (303, here)
    assert not hanging.is_set()
    assert said in text_of(browser.get(here).text)


def test_many_are_revoked_at_once_and_the_page_watches_the_broker(
    devices: list[str], browser: Browser, hanging: threading.Event
) -> None:
    done = confirm(browser, preview(browser, "revoke", devices).text, count="2").text
    assert not hanging.is_set()
    assert "2 devices revoked" in text_of(done)
    assert TAKING_HOLD in done
    assert 'hx-get="/ui/broker?generation=' in done


@pytest.mark.usefixtures("hanging")
def test_the_list_of_tenants_says_which_of_them_wait_for_the_broker(
    app: Flask, browser_of: Callable[..., Browser]
) -> None:
    add_tenant(portal_of(app), "acme")
    browser = browser_of(Role.SYSTEM)
    assert "Waits for the broker" not in browser.get("/ui/access/tenants").text
    assert browser.post("/ui/access/tenants/acme/suspend").status_code == 303
    page = browser.get("/ui/access/tenants").text
    assert re.search('<span class="waits">.*Waits for the broker', page)
    assert TAKING_HOLD in page
    assert browser.post("/ui/access/tenants/acme/remove", {"confirm": "acme"}).status_code == 303
    assert "Waits for the broker" in browser.get("/ui/access/tenants").text


def test_a_change_that_the_broker_enforces_is_shown_so_and_not_asked_for_again(app: Flask, browser: Browser) -> None:
    with portal_of(app).database.transaction(sees=ALL_TENANTS) as tx:
        generation = db.next_generation(tx, at=utc_now())
        enforce_all(tx)
    part = browser.get(f"/ui/broker?generation={generation}", htmx=True).text
    assert "The broker enforces it" in part
    assert "hx-get" not in part
    assert "data-enforced" in part  # by which the style sheet hides what waits for it in a list
    assert "#broker-watch[data-enforced] ~ * .waits { display: none; }" in STYLES.read_text()
    later = browser.get(f"/ui/broker?generation={generation + 1}", htmx=True).text
    assert TAKING_HOLD in later
    assert "Denied" in text_of(later)
    assert f'hx-get="/ui/broker?generation={generation + 1}"' in later
    assert "data-enforced" not in later


def test_what_is_watched_is_a_part_of_a_page_for_those_who_are_logged_in(app: Flask, browser: Browser) -> None:
    assert browser.get("/ui/broker?generation=1").headers["Location"] == "/ui"
    for wrong in ("", "?generation=0", "?generation=-1", "?generation=x", "?generation=1&generation=2", "?all=yes"):
        assert browser.get(f"/ui/broker{wrong}", htmx=True).status_code == 422, wrong
    assert Browser(app).get("/ui/broker?generation=1", htmx=True).status_code == 401
