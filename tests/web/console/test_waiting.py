"""Requests that wait for an operator, in the console: what is known of each, approved and rejected, one or many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask import Flask
from markupsafe import escape

from app import portal_of
from core.roles import Role
from tests.support.browser import Browser, logged_in_as, text_of
from tests.support.est import Device, certificates_of, csr_der, device
from tests.support.harness import ON_SQLITE, Api
from tests.support.tenants import add_tenant
from tests.web.console.test_device import hidden
from tests.web.console.test_fleet import STORED
from web.console import waiting

pytestmark = ON_SQLITE
PATH = "/ui/waiting"
DECIDE = f"{PATH}/decide"


@pytest.fixture
def asking(api: Api) -> Device:
    """A device whose enrolment token needs the approval of an operator."""
    return device(api, count=9, approval="operator")


def ticked(browser: Browser) -> list[str]:
    return [
        part.partition('"')[0] for part in browser.get(PATH).text.split('<input type="checkbox" name="ids" value="')[1:]
    ]


def decide(browser: Browser, decision: str, *ids: str, **fields: str) -> int:
    sent = {"decision": decision, "ids": list(ids), **fields}
    return int(browser.post(DECIDE, sent).status_code)  # type: ignore[arg-type]


def statuses(api: Api) -> list[str]:
    return sorted(one["status"] for one in api.get("/devices").json["devices"])


def test_where_nobody_waits_the_page_says_who_would(browser: Browser) -> None:
    page = browser.get(PATH)
    assert page.status_code == 200
    assert "Nobody waits" in page.text
    assert 'href="/ui/access/enrolment/new"' in page.text


def test_what_is_known_of_a_request_is_shown_in_the_list_and_on_its_page(
    api: Api, asking: Device, browser: Browser
) -> None:
    assert asking.enrol(csr_der(None, "SN-17")).status_code == 202
    [waits] = api.get("/enrolments").json["enrolments"]
    page = browser.get(PATH).text
    one = browser.get(f"{PATH}/{waits['device_id']}").text
    for shown in (page, one):
        assert "SN-17" in text_of(shown)
        assert waits["key_fingerprint"] in shown
        assert "127.0.0.1" in text_of(shown)
        assert "New device" in text_of(shown)
    assert "<html" not in browser.get(PATH, htmx=True).text


def test_a_request_is_approved_for_the_key_that_was_shown(api: Api, asking: Device, browser: Browser) -> None:
    request = csr_der(None, "SN-1")
    asking.enrol(request)
    device_id = api.get("/enrolments").json["enrolments"][0]["device_id"]
    shown = hidden(browser.get(f"{PATH}/{device_id}").text, "ids")
    assert decide(browser, "approve", f"{device_id}.{'0' * 64}") == 409
    assert asking.enrol(request).status_code == 202
    for _ in range(2):  # sent twice it is approved once
        assert decide(browser, "approve", shown) == 303
    certificates_of(asking.enrol(request))
    assert statuses(api) == ["active"]
    assert len(api.get("/audit?action=device:approve").json["entries"]) == 1
    moved = browser.get(f"{PATH}/{device_id}")
    assert (moved.status_code, moved.headers["Location"]) == (303, f"/ui/devices/{device_id}")


def test_many_are_approved_or_rejected_at_once_and_why_is_recorded(api: Api, asking: Device, browser: Browser) -> None:
    requests = [csr_der(None, f"SN-{number}") for number in range(4)]
    for request in requests:
        asking.enrol(request)
    ids = ticked(browser)
    assert len(ids) == 4
    assert decide(browser, "approve", *ids[:2]) == 303
    assert decide(browser, "reject", ids[2], ids[3], why="not ours") == 303
    assert decide(browser, "reject", ids[2]) == 303  # a repeat
    assert ticked(browser) == []
    assert [asking.enrol(request).status_code for request in requests] == [200, 200, 403, 403]
    rejected = api.get("/audit?action=device:reject").json["entries"]
    assert [one["detail"].get("why") for one in rejected] == ["not ours", "not ours"]


def test_what_cannot_be_decided_any_more_is_told_and_the_rest_is_done(
    api: Api, asking: Device, browser: Browser
) -> None:
    for number in range(2):
        asking.enrol(csr_der(None, f"SN-{number}"))
    first, second = ticked(browser)
    assert decide(browser, "reject", first) == 303
    answer = browser.post(DECIDE, {"decision": "approve", "ids": [first, second]})  # type: ignore[dict-item]
    assert answer.status_code == 409
    assert "Approved 1." in text_of(answer.text)
    assert "SN-0: The device is revoked" in text_of(answer.text)


def test_another_key_of_an_active_device_is_rejected_alone(api: Api, browser: Browser) -> None:
    one = device(api, count=9)
    certificates_of(one.enrol(csr_der(None, "SN-1")))
    asking_again = csr_der(None, "SN-1")
    assert one.enrol(asking_again).status_code == 202
    [tick] = ticked(browser)
    page = browser.get(f"{PATH}/{tick.partition('.')[0]}").text
    assert "Another key" in text_of(page)
    assert decide(browser, "reject", tick.partition(".")[0] + "." + "0" * 64) == 409
    assert decide(browser, "reject", tick, why="stolen?") == 303
    assert statuses(api) == ["active"]
    assert one.enrol(asking_again).status_code == 403
    [entry] = api.get("/audit?action=device:reject").json["entries"]
    assert (entry["detail"]["why"], entry["detail"]["again"]) == ("stolen?", True)


def test_a_form_that_means_nothing_changes_nothing(asking: Device, browser: Browser) -> None:
    asking.enrol(csr_der())
    [tick] = ticked(browser)
    assert decide(browser, "approve") == 422
    assert decide(browser, "delete", tick) == 422
    assert decide(browser, "approve", "1.2") == 422
    assert decide(browser, "reject", tick, why="a\u202eb") == 422
    assert browser.post(DECIDE, {"decision": "approve", "ids": tick}, token=None).status_code == 403
    assert ticked(browser) == [tick]


def test_who_may_only_read_sees_requests_and_no_way_to_decide(
    asking: Device, browser: Browser, browser_of: Callable[..., Browser]
) -> None:
    asking.enrol(csr_der(None, "SN-1"))
    [tick] = ticked(browser)
    auditor = browser_of(Role.AUDITOR)
    for path in (PATH, f"{PATH}/{tick.partition('.')[0]}"):
        page = auditor.get(path)
        assert page.status_code == 200
        assert "SN-1" in page.text
        assert DECIDE not in page.text
    assert decide(auditor, "approve", tick) == 403
    assert decide(browser_of(Role.OPERATOR), "approve", tick) == 303


def test_requests_of_another_tenant_are_not_there(app: Flask, asking: Device, browser: Browser) -> None:
    asking.enrol(csr_der(None, "SN-1"))
    [tick] = ticked(browser)
    add_tenant(portal_of(app), "other")
    stranger = logged_in_as(app, Role.ADMIN, "other")
    assert "Nobody waits" in stranger.get(PATH).text
    assert stranger.get(f"{PATH}/{tick.partition('.')[0]}").status_code == 404
    for decision in ("approve", "reject"):
        assert decide(stranger, decision, tick) == 404
    answer = stranger.post(DECIDE, {"decision": "approve", "ids": [tick, tick.replace("a", "b")]})  # type: ignore[dict-item]
    assert "SN-1" not in answer.text
    assert ticked(browser) == [tick]


def test_stored_texts_are_shown_and_never_run(api: Api, browser: Browser) -> None:
    for name in STORED[:5]:
        device(api, name=name[:64], approval="operator", name_template=name).enrol(csr_der(None, "SN"))
    page = browser.get(PATH).text
    for name in STORED[:5]:
        assert str(escape(name)) in page
    assert "<script>alert" not in page


def test_a_long_list_leads_on_and_back(asking: Device, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PER_PAGE", 2)
    for number in range(3):
        asking.enrol(csr_der(None, f"SN-{number}"))
    assert len(ticked(browser)) == 2
    assert f'href="{PATH}?page=2"' in browser.get(PATH).text
    last = browser.get(f"{PATH}?page=2").text
    assert "SN-2" in last
    assert f'href="{PATH}"' in last
    assert "First page" in browser.get(f"{PATH}?page=9").text
    assert browser.get(f"{PATH}?page=0").status_code == 422


def test_the_key_enter_decides_nothing_by_itself(asking: Device, browser: Browser) -> None:
    asking.enrol(csr_der())
    form = browser.get(PATH).text.partition(f'action="{DECIDE}"')[2]
    assert form[form.index("<button") :].startswith('<button name="decision" value="none" hidden>')
    [tick] = ticked(browser)
    assert decide(browser, "none", tick) == 422
    assert ticked(browser) == [tick]
