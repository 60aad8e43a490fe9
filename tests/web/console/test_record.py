"""The audit record and the webhooks in the console: found, verified, saved, and sent again."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from flask import Flask
from markupsafe import escape

from app import portal_of
from core.roles import Role
from store.tables import WebhookDelivery
from tests.support.browser import Browser, logged_in_as, text_of
from tests.support.harness import ON_SQLITE, Api
from tests.support.tenants import add_tenant
from tests.web.console.test_device import hidden
from tests.web.console.test_fleet import HIDDEN, STORED
from web.console import record

pytestmark = ON_SQLITE
PATH = "/ui/record"
WEBHOOKS = f"{PATH}/webhooks"
URL = "https://receiver.example/portal"
SECRET = re.compile(r'<code id="secret">(.*?)</code>')


def actions(page: str) -> list[str]:
    found = re.findall(r'<span class="cell-main"><bdi class="stored">(.*?)</bdi></span>', page)
    return [html.unescape(one) for one in found]


# --- The audit record ---------------------------------------------------------------------------------------------


def test_entries_are_found_by_device_actor_action_outcome_and_day(api: Api, browser: Browser) -> None:
    device_id = api.register(name="pump-7", external_id="line-4/17")["device_id"]
    api.post(f"/devices/{device_id}/suspend", {})
    api.register(name="valve")
    for about in ("pump-7", "line-4/17", device_id, device_id[:23], f"device:{device_id}"):
        page = browser.get(PATH, query_string={"about": about})
        assert actions(page.text) == ["device: suspend", "device: register"], about
    assert actions(browser.get(f"{PATH}?action=device:suspend").text) == ["device: suspend"]
    assert actions(browser.get(f"{PATH}?action=device:suspend&outcome=refused").text) == []
    assert len(actions(browser.get(f"{PATH}?actor=a test's admin&about=pump-7").text)) == 2
    assert actions(browser.get(f"{PATH}?actor=nobody").text) == []
    today = browser.get(f"{PATH}?since=2020-01-01&until=2099-12-31&about=pump-7&outcome=&cursor=").text
    assert len(actions(today)) == 2
    for period in ("until=2020-01-01", "since=2099-12-31"):
        page = browser.get(f"{PATH}?{period}").text
        assert actions(page) == []
        assert "No matching entries" in page


def test_filters_that_mean_nothing_are_refused(api: Api, browser: Browser) -> None:
    for _ in range(2):
        api.register(name="twin")
    for wrong in (
        "about=gone", "about=twin", "since=yesterday", "since=2026-13-01", "until=9999-12-31", "outcome=maybe",
        "cursor=x", "unknown=1", "action=" + "a" * 65,
    ):  # fmt: skip
        assert browser.get(f"{PATH}?{wrong}").status_code == 422, wrong


def test_the_record_is_shown_in_parts_that_lead_on_and_back(
    api: Api, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "PER_PAGE", 2)
    monkeypatch.setattr(record, "CSV_AT_ONCE", 2)
    for number in range(3):
        api.register(name=f"d{number}")
    path, seen = f"{PATH}?action=device:register", 0
    while True:
        page = browser.get(path, htmx=True).text
        assert "<html" not in page
        seen += len(actions(page))
        following = re.findall(r'href="([^"]*)"[^>]*>Next page', page)
        if not following:
            break
        path = html.unescape(following[0])
    assert seen == 3
    assert 'href="/ui/record?action=device%3Aregister"' in page  # the first page
    rows = list(csv.DictReader(io.StringIO(browser.get(f"{PATH}.csv?action=device:register").text)))
    assert len(rows) == 3
    assert rows[0]["action"] == "device:register"


def test_whether_the_record_is_what_was_signed_is_said(
    app: Flask, api: Api, browser: Browser, browser_of: Callable[..., Browser]
) -> None:
    log = portal_of(app).audit_logs.of("default")
    assert "no signed checkpoint yet" in browser.get(PATH).text
    log.make_key()
    assert log.make_checkpoint(at_once=True) is None
    assert "Intact" in text_of(browser.get(PATH).text)
    log.files.checkpoint_path().write_text("{}")
    page = text_of(browser_of(Role.AUDITOR).get(PATH).text)
    assert "cannot be used" in page
    assert "Intact" not in page


def test_what_a_stranger_has_stored_is_shown_and_never_run_and_is_no_formula(api: Api, browser: Browser) -> None:
    for name in [*STORED[:5], "=cmd()"]:
        api.post("/tokens", {"name": name, "role": "auditor"})
    page = browser.get(f"{PATH}?action=token:create").text
    for name in STORED[:5]:
        assert str(escape(name)) in page
    assert "<script>alert" not in page
    lines = browser.get(f"{PATH}.csv").text.splitlines()
    assert not [line for line in lines if re.search(r'(^|,)"?[=+@-]', line.rpartition(',"{')[0])]


def test_the_record_is_for_those_who_may_read_it(app: Flask, api: Api, browser_of: Callable[..., Browser]) -> None:
    api.register(name="ours")
    for path in (PATH, f"{PATH}.csv"):
        assert browser_of(Role.OPERATOR).get(path).status_code == 403
        assert browser_of(Role.AUDITOR).get(path).status_code == 200
    assert "Webhooks" not in text_of(browser_of(Role.AUDITOR).get(PATH).text)
    add_tenant(portal_of(app), "other")
    stranger = logged_in_as(app, Role.ADMIN, "other")
    assert "device: register" not in stranger.get(PATH).text
    assert stranger.get(f"{PATH}?about=ours").status_code == 422


# --- Webhooks -----------------------------------------------------------------------------------------------------


def made(browser: Browser, **fields: str) -> str:
    form = {"once": hidden(browser.get(f"{WEBHOOKS}/new").text, "once"), "name": "SIEM", "url": URL, **fields}
    answer = browser.post(f"{WEBHOOKS}/new", form)
    assert answer.status_code == 201, text_of(answer.text)
    return str(re.findall(rf'href="({WEBHOOKS}/[0-9a-f]{{16}})"', answer.text)[0])


def test_where_there_is_no_webhook_the_page_says_what_it_is_for(browser: Browser) -> None:
    page = browser.get(WEBHOOKS).text
    assert "No webhooks" in page
    assert f'href="{WEBHOOKS}/new"' in page


def test_a_webhook_is_made_once_with_a_secret_that_is_shown_once(api: Api, browser: Browser) -> None:
    once = hidden(browser.get(f"{WEBHOOKS}/new").text, "once")
    form: dict[str, object] = {"once": once, "name": "SIEM", "url": URL, "events": ["revoked", "expiring"]}
    first, again = (browser.post(f"{WEBHOOKS}/new", form) for _ in range(2))  # type: ignore[arg-type]
    assert (first.status_code, first.headers["Cache-Control"]) == (201, "no-store")
    secret = html.unescape(SECRET.findall(first.text)[0])
    assert SECRET.findall(again.text) == SECRET.findall(first.text)
    [webhook] = api.get("/webhooks").json["webhooks"]
    assert webhook["events"] == ["expiring", "revoked"]
    for path in (WEBHOOKS, f"{WEBHOOKS}/{webhook['webhook_id']}"):
        page = browser.get(path).text
        assert "SIEM" in page
        assert secret not in page


def test_deliveries_are_listed_and_those_that_were_given_up_are_sent_again(
    app: Flask, api: Api, browser: Browser
) -> None:
    path = made(browser)
    device_id = api.register()["device_id"]
    api.post(f"/devices/{device_id}/suspend", {})
    assert "Waiting" in text_of(browser.get(path).text)
    give_up(app)
    page = browser.get(f"{path}?status=dead", htmx=True).text
    assert "the receiver is gone" in page
    [one, *_] = re.findall(r'name="delivery" value="(\d+)"', page)
    for _ in range(2):
        assert browser.post(f"{path}/redeliver", {"delivery": one}).status_code == 303
    dead = len(re.findall(r'name="delivery"', browser.get(f"{path}?status=dead").text))
    assert browser.post(f"{path}/redeliver").status_code == 303
    assert re.findall(r'name="delivery"', browser.get(f"{path}?status=dead").text) == []
    told = [entry["detail"]["count"] for entry in api.get("/audit?action=webhook:redeliver").json["entries"]]
    assert told == [dead, 1]


def give_up(app: Flask) -> None:
    """Have all deliveries be such as were tried in vain too often."""
    portal = portal_of(app)
    with portal.database.transaction() as tx:
        tx.execute(
            sa.update(WebhookDelivery).values(
                status="dead", attempts=24, ended_at=portal.clock(), last_problem="the receiver is gone"
            )
        )


def test_a_test_says_what_the_receiver_answered(browser: Browser) -> None:
    path = made(browser, url="https://portal.invalid/x")
    answer = browser.post(f"{path}/test")
    assert answer.status_code == 200
    assert 'class="notice notice-bad"' in answer.text


def test_a_webhook_is_deleted_and_with_another_url_refused(api: Api, browser: Browser) -> None:
    path = made(browser)
    assert browser.post(f"{path}/delete").status_code == 303
    assert browser.get(path).status_code == 404
    assert browser.post(f"{path}/delete").status_code == 404
    for field, value in (("url", "ftp://x"), ("url", "https://127.0.0.1/"), ("name", HIDDEN)):
        form = {"once": "x" * 24, "name": "SIEM", "url": URL, field: value}
        answer = browser.post(f"{WEBHOOKS}/new", form)
        assert answer.status_code == 422, value
        assert f'id="field-{field}"' in answer.text
        assert 'aria-invalid="true"' in answer.text
    assert api.get("/webhooks").json["webhooks"] == []


def test_webhooks_of_another_tenant_and_for_lesser_roles_are_not_there(
    app: Flask, browser: Browser, browser_of: Callable[..., Browser]
) -> None:
    path = made(browser)
    add_tenant(portal_of(app), "other")
    stranger = logged_in_as(app, Role.ADMIN, "other")
    assert "No webhooks" in stranger.get(WEBHOOKS).text
    assert stranger.get(path).status_code == 404
    for action in ("redeliver", "test", "delete"):
        assert stranger.post(f"{path}/{action}").status_code == 404, action
        assert browser_of(Role.AUDITOR).post(f"{path}/{action}").status_code == 403, action
        assert browser.post(f"{path}/{action}", token=None).status_code == 403, action
    assert browser.get(path).status_code == 200
