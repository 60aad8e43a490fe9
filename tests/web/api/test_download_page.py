"""A link that a browser opens: a page that spends nothing, and a button that fetches the bundle."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from typing import Any
from unittest.mock import Mock

import pytest
import pyzipper
from flask import Flask

from app import portal_of
from tests.support.harness import Api, Clock, api_as, problem_of
from tests.web.api.test_downloads import path_of, state_of_delivery
from tests.web.api.test_spent_links import kept
from tests.workflows.test_events import recorded, subscribe

FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"
BROWSER = {"Accept": FIREFOX, "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Site": "none"}
PRESSED = BROWSER | {"Sec-Fetch-Site": "same-origin", "Origin": "null"}
FORM = "application/x-www-form-urlencoded"


@pytest.fixture
def anyone(app: Flask) -> Api:
    return api_as(app, None)


def page(answer: Any, status: int = 200) -> str:
    assert (answer.status_code, answer.content_type) == (status, "text/html; charset=utf-8"), answer.text
    return str(answer.text)


def key_in(text: str) -> str:
    found = re.search(r'name="idempotency_key" value="([^"]+)"', text)
    assert found is not None
    return found[1]


def press(anyone: Api, path: str, text: str, **headers: str) -> Any:
    """Press the button of the page."""
    body = {"idempotency_key": key_in(text)}
    return anyone.client.post(path, data=body, headers=PRESSED | headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"Accept": FIREFOX},
        {"Accept": CHROME},
        {"Accept": "text/html"},
        {"Accept": "TEXT/HTML;q=0.1, */*"},
        {"Accept": "text/html;charset=utf-8"},
        {"Accept": "application/zip, text/html"},
        {"Accept": "*/*", "Sec-Fetch-Dest": "image"},
        {"Accept": "*/*", "Sec-Purpose": "prefetch"},
        {"Accept": "*/*", "Sec-Purpose": "prefetch;prerender"},
        {"Accept": "application/zip", "Purpose": "prefetch"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_browser_or_a_scanner_that_asks_for_a_page_spends_nothing(
    api: Api, anyone: Api, app: Flask, headers: dict[str, str], method: str
) -> None:
    path = path_of(api.register())
    for _ in range(2):
        answer = anyone.call(method, path, headers=headers)
        assert (answer.status_code, answer.content_type) == (200, "text/html; charset=utf-8")
    assert state_of_delivery(app) == ("ready", True)
    assert anyone.get(path).content_type == "application/zip"


@pytest.mark.parametrize(
    "accept",
    [
        None,
        "*/*",
        "",
        "application/zip",
        "application/zip, text/html;q=0.5",
        "application/octet-stream, text/html;q=0.9",
        "text/html;q=0, */*",
        "text/*",
        "application/json",
        "nonsense",
    ],
)
def test_a_program_gets_the_bundle_as_before(api: Api, anyone: Api, app: Flask, accept: str | None) -> None:
    path = path_of(api.register())
    answer = anyone.get(path, headers={} if accept is None else {"Accept": accept})
    assert (answer.status_code, answer.content_type) == (200, "application/zip")
    assert state_of_delivery(app) == ("delivered", False)


def test_the_button_fetches_the_bundle_once(api: Api, anyone: Api, app: Flask) -> None:
    registered = api.register()
    path = path_of(registered)
    fetched = press(anyone, path, page(anyone.get(path, headers=BROWSER)))
    assert (fetched.status_code, fetched.content_type) == (200, "application/zip")
    assert fetched.headers["Content-Disposition"] == f'attachment; filename="{registered["device_id"]}.zip"'
    with pyzipper.AESZipFile(io.BytesIO(fetched.data)) as bundle:
        bundle.setpassword(registered["bundle_password"].encode())
        assert b"PRIVATE KEY" in bundle.read("device.key")
    assert state_of_delivery(app) == ("delivered", False)
    problem_of(anyone.get(path), 410, "link_used")
    problem_of(anyone.post(path), 410, "link_used")


def test_a_second_press_on_the_same_page_repeats_the_download_and_another_page_does_not(
    api: Api, anyone: Api, app: Flask, clock: Clock
) -> None:
    path = path_of(api.register())
    own, other = (page(anyone.get(path, headers=BROWSER)) for _ in range(2))
    assert key_in(own) != key_in(other)
    first = press(anyone, path, own)
    assert press(anyone, path, own).data == first.data  # a double click
    page(press(anyone, path, other), 410)
    clock.advance(seconds=301)
    page(press(anyone, path, own), 410)
    assert "within 5 minutes" in own


def test_a_program_may_post_without_a_body_or_with_the_key_in_the_header(api: Api, anyone: Api, app: Flask) -> None:
    assert anyone.post(path_of(api.register())).content_type == "application/zip"
    path, key = path_of(api.register()), {"Idempotency-Key": "of-the-first-client-only"}
    first = anyone.post(path, headers=key)
    assert anyone.get(path, headers=key).data == first.data
    assert kept(app) == 1


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        ("idempotency_key=short", FORM, 422, "invalid_input"),
        ("password=secret-secret-secret", FORM, 422, "invalid_input"),
        ("idempotency_key=" + 2 * ("a" * 16 + "&idempotency_key="), FORM, 422, "invalid_input"),
        ("idempotency_key", FORM, 400, "malformed_request"),
        ("idempotency_key=%ff%fe" + "a" * 16, FORM, 400, "malformed_request"),
        ("é", FORM, 400, "malformed_request"),
        ("{}", "application/json", 415, "unsupported_media_type"),
    ],
)
def test_a_form_that_the_page_does_not_send_is_refused_and_spends_nothing(
    api: Api, anyone: Api, app: Flask, body: str, kind: str, status: int, code: str
) -> None:
    path = path_of(api.register())
    problem_of(anyone.client.post(path, data=body.encode(), content_type=kind), status, code)
    page(anyone.client.post(path, data=body.encode(), content_type=kind, headers=PRESSED), status)
    assert state_of_delivery(app) == ("ready", True)


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "null"},
        {"Sec-Fetch-Site": "same-site", "Origin": "https://other.localhost"},
        {"Origin": "https://evil.example"},
        {"Origin": "https://localhost.evil.example"},
        {"Origin": "https://[localhost"},
    ],
)
def test_a_page_of_another_site_cannot_make_a_browser_spend_the_link(
    api: Api, anyone: Api, app: Flask, headers: dict[str, str]
) -> None:
    path = path_of(api.register())
    problem_of(anyone.post(path, headers=headers), 403, "foreign_origin")
    assert "Open the link itself" in page(anyone.post(path, headers=headers | {"Accept": FIREFOX}), 403)
    assert state_of_delivery(app) == ("ready", True)


@pytest.mark.parametrize("headers", [{}, {"Origin": "http://localhost"}, {"Origin": "null"}])
def test_an_older_browser_that_does_not_say_from_which_site_it_comes_may_press_the_button(
    api: Api, anyone: Api, headers: dict[str, str]
) -> None:
    assert anyone.post(path_of(api.register()), headers=headers).status_code == 200


def test_the_page_is_kept_nowhere_shown_nowhere_and_sends_the_link_nowhere(api: Api, anyone: Api) -> None:
    path = path_of(api.register())
    looked = anyone.get(path, headers=BROWSER)
    style = re.search(r"<style>(.*?)</style>", page(looked), re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert looked.headers["Content-Security-Policy"] == (
        f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    for answer in (looked, press(anyone, path, looked.text), anyone.get(path, headers=BROWSER)):
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "Accept" in answer.headers["Vary"]
    assert looked.headers["X-Frame-Options"] == "DENY"


def test_no_secret_is_in_the_page(api: Api, anyone: Api) -> None:
    registered = api.register()
    text = page(anyone.get(path_of(registered), headers=BROWSER))
    assert registered["bundle_password"] not in text
    assert path_of(registered).rpartition("/")[2] not in text
    assert "PRIVATE KEY" not in text


@pytest.mark.parametrize("name", ["<script>alert(1)</script>\"'&", "{{ 7 * 7 }}{% x %}", "</title><h1>"])
def test_a_name_with_html_is_text(api: Api, anyone: Api, name: str) -> None:
    text = page(anyone.get(path_of(api.register(name=name)), headers=BROWSER))
    assert name not in text.replace("{{ 7 * 7 }}{% x %}", "") or "{" in name
    assert "<script" not in text.lower()
    assert "49" not in re.sub(r"\d{2,}", "", text)
    read = Outline(text)
    assert read.of["h1"] == [f"Credentials of {name}"]


@pytest.mark.parametrize(
    ("bundle_format", "told"),
    [("zip", "7z x"), ("p12", "openssl pkcs12"), ("pem", "nothing else is")],
)
def test_the_page_says_how_to_open_this_format(api: Api, anyone: Api, bundle_format: str, told: str) -> None:
    text = page(anyone.get(path_of(api.register(bundle_format=bundle_format)), headers=BROWSER))
    assert told in text
    assert {"Linux", "Windows"} <= set(re.findall(r"\w+", text))


class Outline(HTMLParser):
    """What a screen reader finds: texts by element, and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.of: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self._open.append(tag)
            self.of.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.of[tag][-1] += data

    def close_check(self) -> None:
        assert self._open == []


@pytest.mark.parametrize("accept", [FIREFOX, "text/html"])
def test_the_pages_can_be_read_without_eyes_and_used_without_a_mouse_or_script(
    api: Api, anyone: Api, accept: str
) -> None:
    path = path_of(api.register())
    pages = [page(anyone.get(path, headers={"Accept": accept}))]
    anyone.get(path)
    pages.append(page(anyone.get(path, headers={"Accept": accept}), 410))
    for text in pages:
        read = Outline(text)
        read.close_check()
        assert dict(read.attributes)["html"] == {"lang": "en"}
        assert len(read.of["h1"]) == len(read.of["title"]) == len(read.of["main"]) == 1
        headings = [tag for tag, _ in read.attributes if re.fullmatch("h[1-6]", tag)]
        assert headings[0] == "h1"
        assert set(headings[1:]) <= {"h2"}
        assert "script" not in read.of
        assert not [name for _, attributes in read.attributes for name in attributes if name.startswith("on")]
        assert not [tag for tag, attributes in read.attributes if "style" in attributes]
        assert all(button.strip() for button in read.of.get("button", ()))


def used(api: Api, anyone: Api, clock: Clock) -> str:
    path = path_of(api.register())
    anyone.get(path)
    return path


def expired(api: Api, anyone: Api, clock: Clock) -> str:
    path = path_of(api.register())
    clock.advance(hours=24, seconds=1)
    return path


def revoked(api: Api, anyone: Api, clock: Clock) -> str:
    registered = api.register()
    api.post(f"/revoke/{registered['device_id']}")
    return path_of(registered)


def suspended(api: Api, anyone: Api, clock: Clock) -> str:
    registered = api.register()
    api.post(f"/devices/{registered['device_id']}/suspend")
    return path_of(registered)


@pytest.mark.parametrize(
    ("prepare", "status", "title"),
    [
        (used, 410, "This link has been used"),
        (expired, 410, "This link has expired"),
        (revoked, 410, "This link has been withdrawn"),
        (suspended, 409, "The device is suspended"),
        (lambda *_: "/download/a.b.c", 404, "This link is not known here"),
        (lambda *_: "/download/" + "é" * 9, 404, "This link is not known here"),
    ],
)
def test_a_link_that_does_not_work_says_what_to_do_next(
    api: Api, anyone: Api, clock: Clock, prepare: Any, status: int, title: str
) -> None:
    path = prepare(api, anyone, clock)
    for answer in (anyone.get(path, headers=BROWSER), anyone.post(path, headers=PRESSED)):
        read = Outline(page(answer, status))
        assert read.of["h1"] == [title]
        assert read.of["h2"] == ["What to do next"]
        assert answer.headers["X-Request-Id"] in read.of["code"]
    assert anyone.get(path).content_type == "application/problem+json"


def test_a_path_elsewhere_has_no_pages_for_errors(anyone: Api) -> None:
    assert anyone.get("/devices/x", headers=BROWSER).content_type == "application/problem+json"


def test_opening_a_spent_link_in_a_browser_is_recorded_and_tells_the_subscribers(
    api: Api, anyone: Api, app: Flask
) -> None:
    subscribe(portal_of(app))
    path = path_of(api.register())
    page(anyone.get(path, headers=BROWSER))
    anyone.get(path)
    assert [event["type"] for event in recorded(portal_of(app))] == ["registered", "delivered"]
    page(anyone.get(path, headers=BROWSER), 410)
    entries = portal_of(app).operators.audit("default", limit=1, before=None, filters={})[0]
    assert (entries[0].action, entries[0].detail["code"]) == ("bundle:fetch", "link_used")
    assert [event["type"] for event in recorded(portal_of(app))] == ["registered", "delivered", "link_reused"]


def test_colours_can_be_told_apart_in_the_light_and_in_the_dark(api: Api, anyone: Api) -> None:
    text = page(anyone.get(path_of(api.register()), headers=BROWSER))
    for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL):
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+);", block))
        for front, ground in (
            ("text", "card"), ("text", "code"), ("text", "ground"), ("quiet", "card"), ("quiet", "ground"),
            ("accent", "card"), ("on-accent", "accent"), ("on-accent", "accent-strong"),
        ):  # fmt: skip
            assert contrast(colours[front], colours[ground]) >= 4.5, (front, ground)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours (WCAG 2.2, 1.4.3)."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_guessing_links_by_pages_is_slowed_down_as_by_programs(api: Api, anyone: Api, app: Flask, method: str) -> None:
    headers = BROWSER if method == "GET" else PRESSED
    with pytest.MonkeyPatch.context() as patch:
        counted = Mock(wraps=portal_of(app).operators.login_failed)
        patch.setattr(portal_of(app).operators, "login_failed", counted)
        page(anyone.call(method, "/download/a.b.c", headers=headers), 404)
    assert [call.args[1:] for call in counted.call_args_list] == [("bundle:fetch", "link", "link_unknown")]
