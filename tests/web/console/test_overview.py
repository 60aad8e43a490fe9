"""The overview: whether all is well, what expires, what happened, what needs somebody."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.roles import Role
from store import overview as figures
from tests.support.browser import Browser, logged_in_as, text_of
from tests.support.harness import ON_SQLITE, Api, Clock
from tests.support.tenants import add_tenant
from web.console import charts

pytestmark = ON_SQLITE


def counts_of(page: str) -> dict[str, str]:
    return {name: count for count, name in re.findall(r"<dd>([^<]*)</dd><dt>([^<]*)</dt>", page)}


def to_do(page: str) -> list[str]:
    found = re.search(r'<ul class="todo">(.*?)</ul>', page, re.DOTALL)
    return [text_of(one).strip() for one in re.findall("<li>(.*?)</li>", found[1])] if found else []


def test_the_console_begins_with_the_overview_whatever_the_role(api: Api, browser_of: Callable[..., Browser]) -> None:
    api.register()
    for role in (Role.ADMIN, Role.OPERATOR, Role.AUDITOR):
        page = browser_of(role).get("/ui")
        assert page.status_code == 200
        assert "<h1>Overview</h1>" in page.text
        assert ('href="/ui/devices/register"' in page.text) == (role is not Role.AUDITOR)


def test_what_is_wrong_is_said_and_what_is_pending_needs_somebody(api: Api, browser: Browser) -> None:
    device_id = api.register()["device_id"]
    assert to_do(browser.get("/ui").text) == []
    api.post(f"/revoke/{device_id}", {})
    page = browser.get("/ui").text
    assert "wrong" in page
    assert "The broker does not answer on its internal listener" in text_of(page)
    assert "Behind" in page
    assert any("1 revoked or suspended, not enforced yet" in text for text in to_do(page))


def test_a_portal_without_a_broker_beside_it_speaks_of_those_elsewhere(make_settings: Callable[..., Settings]) -> None:
    app = create_app(make_settings(PORTAL_BROKER_CONTROL="none"), background=False)
    page = text_of(logged_in_as(app, Role.ADMIN).get("/ui").text)
    assert "Brokers elsewhere" in page
    assert "under files" not in page
    assert "guard" not in page
    portal_of(app).close()


def test_what_happened_in_the_last_day_is_counted_and_no_older_thing(api: Api, browser: Browser, clock: Clock) -> None:
    api.register()
    clock.advance(hours=7)  # sessions last eight hours
    device_id = api.register()["device_id"]
    api.post(f"/devices/{device_id}/suspend", {})
    counts = counts_of(browser.get("/ui").text)
    assert (counts["Registered"], counts["Suspended"], counts["Revoked"]) == ("2", "1", "0")


def test_certificates_that_end_are_drawn_by_week_with_the_numbers_as_text(api: Api, browser: Browser) -> None:
    for days in (3, 10, 11, 400):
        api.register(validity_days=days)
    page = browser.get("/ui").text
    chart = re.search(r'<svg class="chart".*?</svg>', page, re.DOTALL)
    assert chart is not None
    assert chart[0].count("<rect") == 2
    described = re.search(r"<desc[^>]*>(.*?)</desc>", chart[0])
    assert described is not None
    assert [part.split()[0] for part in html.unescape(described[1]).split("; ")] == ["1", "2"]
    assert "style=" not in chart[0]
    assert any("1 with a certificate that ends within 7 days" in text for text in to_do(page))


def test_a_part_of_the_page_is_asked_for_again_and_has_no_frame(browser: Browser) -> None:
    part = browser.get("/ui", htmx=True).text
    assert part.lstrip().startswith('<div id="overview"')
    assert 'hx-trigger="every 30s"' in part
    assert "<html" not in part


def test_another_tenant_sees_its_own_figures_alone_and_no_reasons_of_the_installation(app: Flask, api: Api) -> None:
    api.post(f"/revoke/{api.register()['device_id']}", {})
    add_tenant(portal_of(app), "other")
    page = logged_in_as(app, Role.ADMIN, "other").get("/ui").text
    assert to_do(page) == []
    assert counts_of(page)["Registered"] == "0"
    assert "internal listener" not in page
    assert str(portal_of(app).settings.data_dir) not in page


def test_counts_stop_at_their_limit(api: Api, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "MAX_OF_WEEK", 2)
    monkeypatch.setattr("web.console.overview.MAX_OF_WEEK", 2)
    for _ in range(3):
        api.register(validity_days=3)
    assert any("2+ with a certificate that ends" in text for text in to_do(browser.get("/ui").text))
    assert charts.at_most(1_999, 2_000) == "1,999"


def test_the_overview_takes_few_statements_however_many_devices_there_are(
    app: Flask, api: Api, browser: Browser
) -> None:
    engine = portal_of(app).database.engine
    sent: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(_c: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    numbers = []
    for _ in range(2):
        sent.clear()
        browser.get("/ui")
        numbers.append(len(sent))
        for _ in range(5):
            api.register()
    sa.event.remove(engine, "before_cursor_execute", note)
    assert max(numbers) <= 30
