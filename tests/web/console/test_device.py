"""A device's page: its life, what an operator may do to it there, and how a revocation is watched."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from datetime import datetime

import pytest
import sqlalchemy as sa
from flask import Flask
from markupsafe import escape

from app import portal_of
from broker.control import Step
from core.roles import Role
from core.states import PresenceState
from store.broker_tables import EnforcementSteps
from store.brokers import set_applied_generation
from store.presences import Sighting, record_presences
from store.tables import Token
from tests.support.browser import Browser, logged_in_as, text_of
from tests.support.harness import ON_SQLITE, Api, Clock
from tests.support.tenants import add_tenant
from tests.web.console.test_fleet import STORED
from workflows.enforcement import Progress

pytestmark = ON_SQLITE
STEP = re.compile(
    r'<li class="step([^"]*)">.*?<strong>(.*?)</strong>\s*<span class="step-time">(.*?)</span>', re.DOTALL
)


def path_of(device_id: str) -> str:
    return f"/ui/devices/{device_id}"


def steps_of(page: str) -> list[tuple[str, bool]]:
    """The steps that a page shows, each with whether it is pending."""
    return [(title, "step-pending" in kind) for kind, title, _ in STEP.findall(page)]


def hidden(page: str, name: str) -> str:
    found = re.search(rf'name="{name}" value="([^"]*)"', page)
    assert found is not None
    return html.unescape(found[1])


@pytest.fixture
def obeys(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that obeys at once, whatever it is told."""
    portal = portal_of(app)
    reconciler = portal.reconciler

    def run(progress: object, _deadline: float) -> None:
        target = progress.target = reconciler._prepare()  # type: ignore[attr-defined]
        generation = progress.enforced = target.state.generation  # type: ignore[attr-defined]
        steps = Progress(portal.database, 1, target.state.applied_generation, generation, portal.clock())
        steps.proven(*Step)
        with portal.database.transaction() as tx:
            steps.record(tx)
            set_applied_generation(tx, 1, generation, applied_at=portal.clock())
        target.draft.discard()

    monkeypatch.setattr(reconciler, "_run", run)


def test_a_revocation_is_shown_step_by_step_and_what_is_not_proven_is_pending_with_the_reason(
    api: Api, browser: Browser
) -> None:
    path = path_of(api.register()["device_id"])
    assert "step-time" not in browser.get(path).text
    answer = browser.post(f"{path}/revoke", {"reason": "key_compromise"})
    assert (answer.status_code, answer.headers["Location"]) == (303, path)
    page = browser.get(path).text
    assert [pending for _, pending in steps_of(page)] == [False, True, True, True, True]
    assert "does not answer" in text_of(page)
    assert 'hx-trigger="every 1s"' in page
    part = browser.get(f"{path}/enforcement", htmx=True).text
    assert steps_of(part) == steps_of(page)
    assert "<html" not in part
    assert browser.get(f"{path}/enforcement").headers["Location"] == path


@pytest.mark.usefixtures("obeys")
def test_a_revocation_that_is_enforced_shows_each_time_and_is_watched_no_longer(api: Api, browser: Browser) -> None:
    path = path_of(api.register()["device_id"])
    browser.post(f"{path}/revoke")
    part = browser.get(f"{path}/enforcement", htmx=True).text
    assert steps_of(part) == [(title, False) for title in ("Recorded", "Denied", "Refused", "Cut", "Enforced")]
    times = [time for *_, time in STEP.findall(part)]
    assert times[0] == "0 ms"
    assert all(re.fullmatch(r"[\d.]+ m?s", time) for time in times)
    assert "every 1s" not in part


def seen(app: Flask, device_id: str, state: PresenceState, since: datetime) -> None:
    """The broker has reported a device just now."""
    portal = portal_of(app)
    with portal.database.transaction() as tx:
        record_presences(tx, 1, {device_id: Sighting(state, since)})
    portal.follower.contact.made("x")


def badges_of(page: str) -> list[str]:
    """The badges below the name of a device."""
    states = re.search(r'<p class="lead states".*?</p>', page, re.DOTALL)
    assert states is not None
    return re.findall(r'<span class="badge[^>]*>(.*?)</span>', states[0])


@pytest.mark.usefixtures("obeys")
def test_a_revocation_is_watched_until_the_broker_has_reported_that_the_device_is_gone(
    app: Flask, api: Api, browser: Browser, clock: Clock
) -> None:
    device_id = api.register()["device_id"]
    path = path_of(device_id)
    seen(app, device_id, PresenceState.CONNECTED, clock())
    browser.post(f"{path}/revoke")
    part = browser.get(f"{path}/enforcement", htmx=True).text
    assert not [title for title, pending in steps_of(part) if pending]
    assert badges_of(part) == ["Revoked", "Connected"]  # as the last report says
    assert "every 1s" in part
    clock.advance(seconds=2)
    seen(app, device_id, PresenceState.OFFLINE, clock())
    part = browser.get(f"{path}/enforcement", htmx=True).text
    assert badges_of(part) == ["Revoked", "Offline"]
    assert "every 1s" not in part
    for id_ in ("states", "connection"):
        assert re.search(rf'id="{id_}" hx-swap-oob="outerMorph"', part), id_
        assert f'id="{id_}">' in browser.get(path).text


def test_a_device_that_connects_within_the_second_of_its_registration_was_registered_first(
    app: Flask, api: Api, browser: Browser, clock: Clock
) -> None:
    clock.advance(seconds=0.4)
    device_id = api.register()["device_id"]
    seen(app, device_id, PresenceState.CONNECTED, clock().replace(microsecond=0))  # the broker reports whole seconds
    life = browser.get(path_of(device_id)).text.partition('<ol class="life">')[2].partition("</ol>")[0]
    assert re.findall(r"<strong>(.*?)</strong>", life) == ["Registered", "Connected", "Certificate ends"]


@pytest.mark.usefixtures("obeys")
def test_steps_that_are_not_known_any_more_are_not_made_up(app: Flask, api: Api, browser: Browser) -> None:
    path = path_of(api.register()["device_id"])
    browser.post(f"{path}/revoke")
    with portal_of(app).database.transaction() as tx:
        tx.execute(sa.delete(EnforcementSteps))
    page = browser.get(path).text
    assert [title for title, _ in steps_of(page)] == ["Recorded", "Enforced"]
    assert "not known any more" in page


def test_a_device_is_suspended_and_resumed_and_its_life_says_so(api: Api, browser: Browser) -> None:
    path = path_of(api.register()["device_id"])
    assert browser.post(f"{path}/suspend").status_code == 303
    page = browser.get(path).text
    assert "Resume this device?" in page
    assert "Suspend this device?" not in page
    assert browser.post(f"{path}/resume").status_code == 303
    life = browser.get(path).text.partition('<ol class="life">')[2].partition("</ol>")[0]
    assert re.findall(r"<strong>(.*?)</strong>", life) == ["Registered", "Suspended", "Resumed", "Certificate ends"]


def test_who_may_not_read_the_record_sees_the_life_without_names(api: Api, browser_of: Callable[..., Browser]) -> None:
    path = path_of(api.register()["device_id"])
    api.post(f"/devices/{path.rpartition('/')[2]}/suspend", {})
    page = browser_of(Role.OPERATOR).get(path).text
    assert "<strong>Suspended</strong>" in page
    assert "From the audit record" not in page
    assert "From the audit record" in browser_of(Role.AUDITOR).get(path).text


def test_a_renewal_shows_link_and_password_once_and_is_done_once_however_often_it_is_sent(
    api: Api, browser: Browser
) -> None:
    device_id = api.register(name="pump")["device_id"]
    form = {"once": hidden(browser.get(path_of(device_id)).text, "once"), "revoke_previous": "when_used"}
    first = browser.post(f"{path_of(device_id)}/renew", form)
    assert first.status_code == 201
    assert first.headers["Cache-Control"] == "no-store"
    assert "/download/" in first.text
    again = browser.post(f"{path_of(device_id)}/renew", form)
    link = re.compile(r'<code id="link">(.*?)</code>')
    assert link.findall(again.text) == link.findall(first.text)
    assert len(api.get(f"/devices/{device_id}/certificates").json["certificates"]) == 2
    password = html.unescape(re.findall(r'<code id="password">(.*?)</code>', first.text)[0])
    assert password not in browser.get(path_of(device_id)).text


def test_what_is_known_of_a_device_is_changed_as_the_command_line_does(api: Api, browser: Browser) -> None:
    device_id = api.register(name="pump", metadata={"owner": "ops", "rack": 7, "a=b": "kept"})["device_id"]
    page = browser.get(f"{path_of(device_id)}/edit").text
    assert "owner=ops" in page
    known = api.get(f"/devices/{device_id}").json
    form = {name: known[name] for name in ("type", "location", "firmware")} | {"seen": hidden(page, "seen")}
    topics = "devices/{id}/# readwrite\n\ndevices/shared/# read\n"
    form |= {"name": "pump-2", "metadata": "rack=8\nnew=1=2", "topics": topics}
    answer = browser.post(f"{path_of(device_id)}/edit", form)
    assert answer.status_code == 303, text_of(answer.text)
    shown = api.get(f"/devices/{device_id}").json
    assert shown["name"] == "pump-2"
    assert shown["metadata"] == {"rack": 8, "new": "1=2", "a=b": "kept"}
    assert shown["topics"] == [
        {"filter": "devices/{id}/#", "access": "readwrite"}, {"filter": "devices/shared/#", "access": "read"},
    ]  # fmt: skip
    again = browser.post(f"{path_of(device_id)}/edit", form)
    assert again.status_code == 409
    assert "Somebody has changed this device" in again.text


def test_a_form_that_is_saved_as_it_was_shown_changes_nothing_whatever_the_metadata_has(
    api: Api, browser: Browser
) -> None:
    """Such as characters that end a line elsewhere, behind which a key of another name could stand."""
    metadata = {"note": "fine\u2028role=gateway", "other": "x\x85y=1", "\u2029": "z", "n": [1, {"a": None}], "e": ""}
    device_id = api.register(metadata=metadata)["device_id"]
    path = f"{path_of(device_id)}/edit"
    page, known = browser.get(path).text, api.get(f"/devices/{device_id}").json
    form = {name: known[name] for name in ("name", "type", "location", "firmware")} | {"seen": hidden(page, "seen")}
    shown = re.search(r'<textarea[^>]*name="metadata"[^>]*>(.*?)</textarea>', page, re.DOTALL)
    assert shown is not None
    answer = browser.post(path, form | {"metadata": html.unescape(shown[1]).replace("\n", "\r\n")})
    assert answer.status_code == 303, text_of(answer.text)
    assert api.get(f"/devices/{device_id}").json == known


def test_a_form_with_something_wrong_comes_back_with_what_was_entered(api: Api, browser: Browser) -> None:
    device_id = api.register(metadata={"rack": 7})["device_id"]
    path = f"{path_of(device_id)}/edit"
    known = api.get(f"/devices/{device_id}").json
    form = {name: known[name] for name in ("name", "type", "location", "firmware")}
    form["seen"] = hidden(browser.get(path).text, "seen")
    for field, value, text in (
        ("name", "", "required"), ("name", "a\u202eb", "invisible"), ("metadata", "no mark", "KEY=VALUE"),
        ("topics", "devices/x everything", "read, write or readwrite"), ("topics", "a/#/b read", "#"),
        ("location", "x" * 200, "128"), ("metadata", "rack=" + "[" * 30000, "bytes"),
    ):  # fmt: skip
        answer = browser.post(path, form | {field: value})
        assert answer.status_code == 422, (field, value)
        assert 'aria-invalid="true"' in answer.text, (field, value)
        assert text in answer.text, (field, value)
        assert str(escape(value)) in answer.text
    assert api.get(f"/devices/{device_id}").json == known


def test_a_device_that_is_revoked_meanwhile_is_not_changed_and_the_page_says_why(api: Api, browser: Browser) -> None:
    device_id = api.register()["device_id"]
    path = path_of(device_id)
    once = hidden(browser.get(path).text, "once")
    api.post(f"/revoke/{device_id}", {})
    for action, form in (("suspend", {}), ("resume", {}), ("renew", {"once": once})):
        answer = browser.post(f"{path}/{action}", form)
        assert answer.status_code == 409, action
        assert "revoked" in text_of(answer.text), action
    assert browser.post(f"{path}/revoke").status_code == 303  # which changes nothing
    page = browser.get(path).text
    for way in ("/suspend", "/renew", "/edit", "/revoke"):
        assert f'{path}{way}"' not in page


def test_a_role_that_is_taken_away_while_the_page_is_open_counts_at_once(
    app: Flask, api: Api, browser_of: Callable[..., Browser]
) -> None:
    path = path_of(api.register()["device_id"])
    browser = browser_of(Role.OPERATOR)
    assert f'action="{path}/revoke"' in browser.get(path).text
    with portal_of(app).database.transaction() as tx:
        tx.execute(sa.update(Token).where(Token.role == "operator").values(role="auditor"))
    for action in ("revoke", "suspend", "resume", "renew", "edit"):
        assert browser.post(f"{path}/{action}", {"reason": "unspecified"}).status_code == 403, action
    page = browser.get(path)
    assert page.status_code == 200
    assert f'action="{path}/revoke"' not in page.text
    assert browser.get(f"{path}/edit").status_code == 403
    assert api.get(f"/devices/{path.rpartition('/')[2]}").json["status"] == "active"


def test_a_change_needs_the_form_s_token_and_no_htmx_request_gets_around_it(api: Api, browser: Browser) -> None:
    path = path_of(api.register()["device_id"])
    for action in ("revoke", "suspend", "renew", "edit"):
        assert browser.post(f"{path}/{action}", token=None).status_code == 403
        assert browser.post(f"{path}/{action}", token="0" * 64, headers={"HX-Request": "true"}).status_code == 403
    assert "Active" in text_of(browser.get(path).text)


def test_a_device_of_another_tenant_is_not_there(app: Flask, api: Api) -> None:
    path = path_of(api.register()["device_id"])
    add_tenant(portal_of(app), "other")
    stranger = logged_in_as(app, Role.ADMIN, "other")
    assert stranger.get(path).status_code == 404
    assert stranger.get(f"{path}/edit").status_code == 404
    assert stranger.get(f"{path}/enforcement", htmx=True).status_code == 404
    for action in ("revoke", "suspend", "resume"):
        assert stranger.post(f"{path}/{action}").status_code == 404, action
    assert stranger.post(f"{path}/renew", {"once": "x" * 24}).status_code == 404


def test_stored_texts_are_shown_and_never_run_on_each_page_of_a_device(api: Api, browser: Browser) -> None:
    for name in STORED:
        path = path_of(api.register(name=name, metadata={"x": name})["device_id"])
        for page in (browser.get(path).text, browser.get(f"{path}/edit").text):
            assert str(escape(name)) in page
            assert "<script>alert" not in page
            assert 'onmouseover="alert' not in page.replace("&#34; onmouseover=&#34;", "")
