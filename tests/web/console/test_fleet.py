"""The fleet and a device in the console: found, listed in parts, saved, and shown as they were stored."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from markupsafe import escape

from app import portal_of
from core.roles import Role
from store.tables import Device
from tests.support.browser import Browser, text_of
from tests.support.harness import ON_SQLITE, Api
from web.api.groups import SavedFilter
from web.console import fleet
from workflows.devices import Inventory, Page

pytestmark = ON_SQLITE
STORED = [
    "<script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' or 1=1 --",
    "{{ 7 * 7 }}",
    "&lt;b&gt;",
    "漢" * 128,
]
HIDDEN = "abc\u202egnp.exe\u2066\u200f"
EMPTY = dict.fromkeys(SavedFilter.model_fields)


def names(page: str) -> list[str]:
    found = re.findall(r'<a class="cell-main"[^>]*><bdi class="stored">(.*?)</bdi></a>', page, re.DOTALL)
    return [html.unescape(name) for name in found]


def test_an_empty_fleet_says_what_to_do_next(browser: Browser) -> None:
    page = browser.get("/ui/devices")
    assert page.status_code == 200
    assert "No devices yet" in page.text
    assert "portal register" in page.text


def test_a_search_finds_parts_of_names_and_ids_and_answers_htmx_with_the_rows_alone(api: Api, browser: Browser) -> None:
    device_id = api.register(name="north-pump")["device_id"]
    api.register(name="south-valve", external_id="line-4/17")
    for text, found in (
        ("pump", ["north-pump"]), ("line-4", ["south-valve"]), (device_id, ["north-pump"]), ("nothing", []),
        (device_id[:18], ["north-pump"]), ("SOUTH", ["south-valve"]),
    ):  # fmt: skip
        page = browser.get("/ui/devices", htmx=True, query_string={"q": text})
        assert page.status_code == 200
        assert "<html" not in page.text
        assert names(page.text) == found, text
    assert "No matching devices" in browser.get("/ui/devices?q=nothing").text


def test_filters_and_orders_are_those_of_the_list(api: Api, browser: Browser) -> None:
    first = api.register(name="b")["device_id"]
    api.register(name="a", type="valve")
    api.post(f"/devices/{first}/suspend", {})
    assert names(browser.get("/ui/devices").text) == ["a", "b"]
    assert names(browser.get("/ui/devices?sort=-name").text) == ["b", "a"]
    assert names(browser.get("/ui/devices?status=suspended&q=&sort=").text) == ["b"]
    page = browser.get("/ui/devices?type=valve").text
    assert names(page) == ["a"]
    assert "Clear the filters" in page
    assert names(browser.get("/ui/devices?expires_within=7").text) == []
    for wrong in ("status=gone", "cursor=x", "expires_within=8", "unknown=1", "q=a&q=b", "q=" + "x" * 129):
        assert browser.get(f"/ui/devices?{wrong}").status_code == 422, wrong


def test_a_long_list_is_shown_in_parts_that_lead_on_and_back(
    api: Api, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "PER_PAGE", 2)
    for number in range(5):
        api.register(name=f"pump-{number}")
    seen, path = [], "/ui/devices?type=pump"
    while path:
        page = browser.get(path).text
        seen.append(names(page))
        found = re.search(r'href="([^"]*)"[^>]*>Next page', page)
        path = found[1].replace("&amp;", "&") if found else ""
    assert seen == [["pump-4", "pump-3"], ["pump-2", "pump-1"], ["pump-0"]]
    assert 'href="/ui/devices?type=pump"' in page


def test_a_search_that_has_looked_for_long_leads_on(
    api: Api, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.devices.LOOKED_AT", 1)
    monkeypatch.setattr(fleet, "SEARCH_SECONDS", 0.0)
    for name in ("wanted", "other", "other"):
        api.register(name=name)
    page = browser.get("/ui/devices?q=ante").text
    assert "Nothing found yet" in page
    assert "Look further" in page
    monkeypatch.setattr(fleet, "SEARCH_SECONDS", 60.0)
    assert names(browser.get("/ui/devices?q=ante").text) == ["wanted"]


def test_names_that_begin_with_the_text_are_found_first_however_old_the_devices_are(
    api: Api, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.devices.LOOKED_AT", 2)
    monkeypatch.setattr(fleet, "SEARCH_SECONDS", 0.0)
    for name in ("pump-2", "pump-1", "pump-3", "a pump", "other", "other"):
        api.register(name=name)
    assert names(browser.get("/ui/devices?q=pump-").text) == ["pump-1", "pump-2"]
    assert names(browser.get("/ui/devices?q=pump-3").text) == ["pump-3"]
    monkeypatch.setattr(fleet, "SEARCH_SECONDS", 60.0)
    assert names(browser.get("/ui/devices?q=pump").text) == ["pump-1", "pump-2", "a pump", "pump-3"]
    assert names(browser.get("/ui/devices?q=pump-&type=valve").text) == []


def test_the_first_page_counts_no_devices(app: Flask, api: Api, browser: Browser) -> None:
    api.register()
    statements: list[str] = []
    engine = portal_of(app).database.engine

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(_c: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    browser.get("/ui/devices")
    sa.event.remove(engine, "before_cursor_execute", note)
    assert any("FROM devices" in statement for statement in statements)
    assert not [statement for statement in statements if "count(" in statement.lower()]


def test_a_stored_text_is_shown_and_never_run(api: Api, browser: Browser) -> None:
    for name in STORED:
        device_id = api.register(name=name, location=name, metadata={name[:30]: name})["device_id"]
        for path in (f"/ui/devices/{device_id}", f"/ui/devices?q={device_id}"):
            page = browser.get(path).text
            assert f'<bdi class="stored">{escape(name)}</bdi>' in page, path
            assert "<script>alert" not in page
            assert 'onmouseover="alert' not in page
    assert names(browser.get("/ui/devices").text) == STORED[::-1]


def test_a_name_with_direction_marks_that_an_older_version_stored_stays_within_its_place(
    app: Flask, api: Api, browser: Browser
) -> None:
    device_id = api.register()["device_id"]
    with portal_of(app).database.transaction() as tx:
        tx.execute(sa.update(Device).where(Device.id == device_id).values(name=HIDDEN))
    for path in ("/ui/devices", f"/ui/devices/{device_id}"):
        assert f'<bdi class="stored">{HIDDEN}</bdi>' in browser.get(path).text


def test_a_device_is_shown_with_its_certificates_and_topics(api: Api, browser: Browser) -> None:
    registered = api.register(name="pump", metadata={"owner": "ops", "rack": 7})
    page = text_of(browser.get(f"/ui/devices/{registered['device_id']}").text)
    for shown in (registered["serial_number"], f"devices/{registered['device_id']}/#", "owner ops", "rack 7", "Active"):
        assert shown in page
    assert api.post(f"/revoke/{registered['device_id']}", {"reason": "key_compromise"}).status_code in (200, 202)
    page = text_of(browser.get(f"/ui/devices/{registered['device_id']}").text)
    assert "Revoked" in page
    assert "key compromise" in page
    assert browser.get("/ui/devices/nonsense").status_code == 404


def test_all_that_match_are_saved_as_csv_and_no_cell_is_a_formula(
    api: Api, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "CSV_AT_ONCE", 2)
    for name in ("=cmd|' /C calc'!A0", "+1", "-1", "@x", 'a "quoted", name'):
        api.register(name=name)
    api.register(name="other", type="valve")
    assert "Save 6 rows as CSV" in text_of(browser.get("/ui/devices").text)
    assert "Save the row as CSV" in text_of(browser.get("/ui/devices?type=valve").text)
    answer = browser.get("/ui/devices.csv?type=pump&sort=created")
    assert answer.headers["Content-Disposition"] == 'attachment; filename="devices.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["name"] for row in rows] == ["'=cmd|' /C calc'!A0", "'+1", "'-1", "'@x", 'a "quoted", name']
    assert rows[0].keys() >= {"device_id", "status", "expires_at", "last_seen"}
    assert browser.get("/ui/devices.csv?status=nonsense").status_code == 422


def test_the_csv_of_a_fleet_is_read_as_it_is_sent_and_never_more_than_a_part_of_it(
    app: Flask, api: Api, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "CSV_AT_ONCE", 2)
    for number in range(7):
        api.register(name=f"pump-{number}")
    read: list[int] = []
    listed = Inventory.devices

    def noted(inventory: Inventory, *given: Any, **named: Any) -> Page:
        page = listed(inventory, *given, **named)
        read.append(len(page.devices))
        return page

    monkeypatch.setattr(Inventory, "devices", noted)
    answer = browser.get("/ui/devices.csv", buffered=False)
    assert read == [2]  # so that what is refused is refused before anything is sent
    sent = [(part.count(b"\r\n"), sum(read)) for part in answer.iter_encoded()]
    # Lines of each part, and how many devices were read when it was sent: those of the parts before it, and its own.
    assert sent == [(1, 2), (2, 2), (2, 4), (2, 6), (1, 7)]
    answer.close()


def test_every_operator_reads_the_fleet(api: Api, browser_of: Callable[..., Browser]) -> None:
    api.register(name="pump")
    for role in (Role.ADMIN, Role.OPERATOR, Role.AUDITOR):
        assert names(browser_of(role).get("/ui/devices").text) == ["pump"]


def test_a_filter_is_saved_under_a_name_found_by_it_and_removed(api: Api, browser: Browser) -> None:
    api.register(name="a", type="pump", location="hall 1")
    api.register(name="b", type="valve", location="hall 1")
    assert "Save this filter" not in browser.get("/ui/devices").text
    assert "Save this filter" in browser.get("/ui/devices?type=pump").text
    form = {"name": "pumps", "description": "all <b>", "filter_type": "pump", "filter_location": "hall 1"}
    answer = browser.post("/ui/devices/filters", form)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/ui/devices?group=pumps")
    page = browser.get("/ui/devices?group=pumps").text
    assert names(page) == ["a"]
    assert "pumps (saved filter)" in page
    assert "all &lt;b&gt;" in page
    assert browser.post("/ui/devices/filters", form).status_code == 409
    for wrong in ({"name": "Not a name"}, {"filter_connected": "yes"}, {"filter_sort": "colour"}):
        assert browser.post("/ui/devices/filters", form | {"name": "other"} | wrong).status_code == 422, wrong
    assert browser.post("/ui/devices/filters", {"name": "all"}).status_code == 422
    assert browser.post("/ui/devices/filters/remove", {"group": "pumps"}).status_code == 303
    assert browser.get("/ui/devices?group=pumps").status_code == 404


def test_all_that_the_list_is_filtered_by_is_saved(api: Api, browser: Browser) -> None:
    soon, late = (api.register(type="pump", validity_days=days)["device_id"] for days in (20, 300))
    page = browser.get("/ui/devices?expires_within=30&type=pump").text
    form = dict(re.findall(r'name="(filter_\w+)" value="([^"]*)"', page))
    assert form == {"filter_expires_within": "30", "filter_type": "pump"}
    assert browser.post("/ui/devices/filters", {"name": "soon", **form}).status_code == 303
    assert api.get("/groups/soon").json["filter"] == EMPTY | {"expires_within_days": 30, "type": "pump"}
    shown = browser.get("/ui/devices?group=soon").text
    assert f"/ui/devices/{soon}" in shown
    assert f"/ui/devices/{late}" not in shown
    assert "expires within days" in text_of(shown)
    connected = {"name": "gone", "filter_connected": "false", "filter_attested": "none", "filter_q": "pump"}
    assert browser.post("/ui/devices/filters", connected).status_code == 303
    assert api.get("/groups/gone").json["filter"] == EMPTY | {"connected": "false", "attested": "none", "q": "pump"}


def test_a_saved_filter_that_is_narrowed_is_saved_with_its_conditions_and_a_group_with_members_is_not(
    api: Api, browser: Browser
) -> None:
    api.post("/groups", {"name": "pumps", "filter": {"type": "pump"}})
    api.post("/groups", {"name": "north"})
    narrowed = {"name": "pumps-soon", "filter_group": "pumps", "filter_expires_within": "7"}
    assert browser.post("/ui/devices/filters", narrowed).status_code == 303
    assert api.get("/groups/pumps-soon").json["filter"] == EMPTY | {"type": "pump", "expires_within_days": 7}
    page = browser.get("/ui/devices?group=north&type=pump").text
    assert "Save this filter" not in page
    assert "north has members" in text_of(page)
    refused = browser.post("/ui/devices/filters", {"name": "x", "filter_group": "north", "filter_type": "pump"})
    assert refused.status_code == 422
    assert "add the devices to a group" in refused.text
    assert browser.post("/ui/devices/filters", {"name": "x", "filter_group": "nowhere"}).status_code == 404


def test_a_group_with_members_is_a_filter_and_none_that_is_removed_as_a_saved_one(api: Api, browser: Browser) -> None:
    first, _ = (api.register(name=name)["device_id"] for name in ("a", "b"))
    assert api.post("/groups", {"name": "north"}).status_code == 201
    assert api.post("/groups/north/members", {"add": [first]}).status_code == 200
    page = browser.get("/ui/devices?group=north").text
    assert names(page) == ["a"]
    assert "north (1)" in page
    assert "Remove this filter" not in page
    assert browser.post("/ui/devices/filters/remove", {"group": "north"}).status_code == 409
    assert 'href="/ui/devices?group=north"' in browser.get(f"/ui/devices/{first}").text


def test_who_may_not_change_anything_saves_no_filter(api: Api, browser_of: Callable[..., Browser]) -> None:
    api.register()
    auditor = browser_of(Role.AUDITOR)
    assert "Save this filter" not in auditor.get("/ui/devices?type=pump").text
    assert auditor.post("/ui/devices/filters", {"name": "x", "filter_type": "pump"}).status_code == 403


def test_no_page_has_an_id_twice_and_each_label_is_of_a_field(api: Api, browser: Browser) -> None:
    device_id = api.register(type="pump")["device_id"]
    paths = ("/ui", "/ui/devices?type=pump", f"/ui/devices/{device_id}", f"/ui/devices/{device_id}/edit")
    for path in (*paths, "/ui/devices/register", "/ui/sessions"):
        page = browser.get(path).text
        ids = re.findall(r'\sid="([^"]+)"', page)
        assert len(ids) == len({*ids}), path
        for named in re.findall(r'(?:\sfor|aria-describedby|aria-labelledby|commandfor)="([^"]+)"', page):
            assert {*named.split()} <= {*ids}, (path, named)
