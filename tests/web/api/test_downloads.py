"""The download of a bundle: once, with the signed link as the only permission."""

from __future__ import annotations

import io
from typing import Any

import pytest
import pyzipper
import sqlalchemy as sa
from flask import Flask

from app import portal_of
from core.roles import Role
from store.tables import Delivery
from tests.support.harness import Api, Clock, api_as, problem_of


def path_of(registered: dict[str, Any]) -> str:
    """The path of a download link."""
    return "/download/" + str(registered["download_url"]).rpartition("/")[2]


def state_of_delivery(app: Flask) -> tuple[str, bool]:
    """The one delivery's status, and whether its bundle is still kept."""
    with portal_of(app).database.snapshot() as tx:
        row = tx.execute(sa.select(Delivery.status, Delivery.bundle)).one()
    return row.status, row.bundle is not None


def fetch(anyone: Api, path: str) -> Any:
    """Download a bundle completely."""
    answer = anyone.get(path)
    assert answer.data
    return answer


@pytest.fixture
def anyone(app: Flask) -> Api:
    return api_as(app, None)


def test_the_link_gives_a_bundle_that_opens_with_the_password(api: Api, anyone: Api, app: Flask) -> None:
    registered = api.register()
    answer = anyone.get(path_of(registered))
    assert (answer.status_code, answer.content_type) == (200, "application/zip")
    assert answer.headers["Content-Disposition"] == f'attachment; filename="{registered["device_id"]}.zip"'
    assert int(answer.headers["Content-Length"]) == len(answer.data)
    assert answer.headers["Cache-Control"] == "no-store"
    with pyzipper.AESZipFile(io.BytesIO(answer.data)) as bundle:
        bundle.setpassword(registered["bundle_password"].encode())
        assert b"PRIVATE KEY" in bundle.read("device.key")
    assert state_of_delivery(app) == ("delivered", False)


def test_the_link_is_on_the_portals_public_address(api: Api, app: Flask) -> None:
    assert api.register()["download_url"].startswith(portal_of(app).settings.public_url + "/download/")


def test_head_does_not_use_the_link_and_says_no_length_of_what_is_not_made_yet(api: Api, anyone: Api) -> None:
    path = path_of(api.register())
    looked = [anyone.call("HEAD", path) for _ in range(3)]
    assert {(answer.status_code, answer.data) for answer in looked} == {(200, b"")}
    assert "Content-Length" not in looked[0].headers
    assert anyone.get(path).data


def test_head_returns_the_length_of_a_bundle_that_is_made(api: Api, anyone: Api) -> None:
    path = path_of(api.register(bundle_password="a password of one's own"))
    assert int(anyone.call("HEAD", path).headers["Content-Length"]) == len(anyone.get(path).data)


@pytest.mark.parametrize("wanted", ["zip", "p12", "pem"])
def test_a_bundle_is_had_in_the_format_that_the_link_asks_for(api: Api, anyone: Api, wanted: str) -> None:
    registered = api.register(bundle_format="pem")
    path = f"{path_of(registered)}?format={wanted}"
    looked, answer = anyone.call("HEAD", path), anyone.get(path)
    kind = "application/x-pkcs12" if wanted == "p12" else "application/zip"
    extension = "p12" if wanted == "p12" else "zip"
    name = f'attachment; filename="{registered["device_id"]}.{extension}"'
    for each in (looked, answer):
        assert (each.status_code, each.content_type, each.headers["Content-Disposition"]) == (200, kind, name)


def test_the_button_of_the_page_gives_the_format_that_the_link_asks_for(api: Api, anyone: Api) -> None:
    path = f"{path_of(api.register())}?format=p12"
    page = anyone.client.get(path, headers={"Accept": "text/html"})
    assert (page.status_code, page.content_type) == (200, "text/html; charset=utf-8")
    assert ".p12" in page.text
    assert anyone.client.post(path, data={}).content_type == "application/x-pkcs12"


def test_a_format_that_there_is_not_spends_no_link(api: Api, anyone: Api) -> None:
    path = path_of(api.register())
    problem_of(anyone.get(f"{path}?format=rar"), 422, "invalid_input")
    problem_of(anyone.get(f"{path}?form=zip"), 422, "invalid_input")
    assert anyone.get(path).status_code == 200


def test_a_bundle_with_a_chosen_password_is_had_in_its_own_format_alone(api: Api, anyone: Api) -> None:
    path = path_of(api.register(bundle_password="a password of one's own"))
    for method in ("HEAD", "GET"):
        assert anyone.call(method, f"{path}?format=p12").status_code == 409
    assert anyone.get(f"{path}?format=zip").status_code == 200


def test_a_link_works_once(api: Api, anyone: Api) -> None:
    path = path_of(api.register())
    fetch(anyone, path)
    problem_of(anyone.get(path), 410, "link_used")
    assert anyone.call("HEAD", path).status_code == 410


def test_a_link_is_used_before_the_first_byte_leaves(api: Api, anyone: Api, app: Flask) -> None:
    path = path_of(api.register())
    broken = anyone.client.open(path)  # the answer begins, and nobody reads it
    assert state_of_delivery(app) == ("delivered", False)
    problem_of(anyone.get(path), 410, "link_used")
    broken.close()
    problem_of(anyone.get(path), 410, "link_used")


def test_an_expired_link_is_gone(api: Api, anyone: Api, clock: Clock) -> None:
    path = path_of(api.register())
    clock.advance(hours=24, seconds=1)
    problem_of(anyone.get(path), 410, "link_expired")
    clock.advance(days=365)
    problem_of(anyone.get(path), 410, "link_expired")


def test_the_link_of_a_revoked_device_is_gone_with_its_bundle(api: Api, anyone: Api, app: Flask) -> None:
    registered = api.register()
    api.post(f"/revoke/{registered['device_id']}")
    problem_of(anyone.get(path_of(registered)), 410, "link_revoked")
    assert state_of_delivery(app) == ("revoked", False)


@pytest.mark.parametrize(
    "alter",
    [
        lambda token: token[:-1],
        lambda token: token[:-1] + ("A" if token[-1] != "A" else "Q"),
        lambda token: "A" + token[1:],
        lambda token: token + ".x",
        lambda token: token.split(".")[0],
        lambda token: "..".join(token.split(".")),
        lambda token: "%00" + token,
        lambda token: "%C3%A9" * 40,
        lambda token: "a" * 512,
        lambda token: "a.b.c",
    ],
)
def test_an_altered_link_is_unknown_and_uses_no_link(api: Api, anyone: Api, alter: Any) -> None:
    path = path_of(api.register())
    altered = "/download/" + alter(path.rpartition("/")[2])
    problem_of(anyone.get(altered), 404, "link_unknown")
    assert anyone.get(path).status_code == 200


def test_an_operator_token_opens_no_link(api: Api) -> None:
    problem_of(api.get("/download/a.b.c"), 404, "link_unknown")


def test_downloads_and_refused_downloads_are_recorded_without_the_link(api: Api, anyone: Api, app: Flask) -> None:
    registered = api.register()
    path = path_of(registered)
    asked = [fetch(anyone, path), anyone.get(path), anyone.get("/download/a.b.c")]
    found = portal_of(app).operators.audit("default", limit=4, before=None, filters={})[0]
    request_ids = [answer.headers["X-Request-Id"] for answer in asked]
    device = f"device:{registered['device_id']}"
    assert [(e.action, e.object, e.outcome, e.detail.get("code"), e.request_id) for e in reversed(found)] == [
        ("bundle:fetch", device, "done", None, request_ids[0]),
        ("bundle:deliver", device, "done", None, request_ids[0]),
        ("bundle:fetch", device, "refused", "link_used", request_ids[1]),
        ("bundle:fetch", "link", "refused", "link_unknown", request_ids[2]),
    ]
    assert path.rpartition("/")[2] not in str(found)


@pytest.mark.parametrize("role", [Role.AUDITOR, None])
def test_the_link_is_enough_without_any_role(api: Api, app: Flask, role: Role | None) -> None:
    assert api_as(app, role).get(path_of(api.register())).status_code == 200
