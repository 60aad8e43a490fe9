"""What the plain HTTP listener serves: CA certificates and CRLs, and no other route."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from flask import Flask

from app import ROUTES, create_app, portal_of
from config import Settings
from core.roles import Role
from pki.crl import sign_crl
from pki.issuers import CLOCK_SKEW
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, problem_of
from tests.support.ocsp import ask, get, issuing_of
from tests.workflows.test_registration import OPERATOR, PUMP
from workflows.authority import crls
from workflows.devices import Inventory

pytestmark = ON_SQLITE

PKI = ("/ca.pem", "/ca/root.cer", "/ca/issuing-1.cer", "/crl/root.crl", "/crl/issuing-1.crl")
CLEAR: dict[str, Any] = {"environ_overrides": {"portal.listener": "pki"}}


@pytest.fixture(scope="module")
def anyone(shared_app: Flask) -> Api:
    return api_as(shared_app, None)


@pytest.mark.parametrize("listener", [{}, CLEAR], ids=["HTTPS", "plain HTTP"])
@pytest.mark.parametrize(
    ("path", "media_type", "read"),
    [
        ("/ca/root.cer", "application/pkix-cert", x509.load_der_x509_certificate),
        ("/ca/issuing-1.cer", "application/pkix-cert", x509.load_der_x509_certificate),
        ("/crl/root.crl", "application/pkix-crl", x509.load_der_x509_crl),
        ("/crl/issuing-1.crl", "application/pkix-crl", x509.load_der_x509_crl),
        ("/ca.pem", "application/x-pem-file", x509.load_pem_x509_certificates),
    ],
)
def test_public_documents_are_served_on_both_listeners(
    anyone: Api, path: str, media_type: str, read: Callable[[bytes], object], listener: dict[str, Any]
) -> None:
    answer = anyone.get(path, **listener)
    assert (answer.status_code, answer.content_type) == (200, media_type)
    assert read(answer.data) is not None


def test_what_to_trust_of_the_broker_is_served_where_the_portal_has_shown_who_it_is(anyone: Api) -> None:
    answer = anyone.get("/broker-ca.pem")
    assert (answer.status_code, answer.data) == (200, anyone.get("/ca.pem").data)
    problem_of(anyone.get("/broker-ca.pem", **CLEAR), 404, "not_found")


@pytest.mark.both_stores
def test_the_urls_in_a_certificate_lead_to_its_issuer_and_its_crl(api: Api, app: Flask) -> None:
    registered = api.register()
    [certificate] = api.get(f"/devices/{registered['device_id']}/certificates").json["certificates"]
    leaf = x509.load_pem_x509_certificate(certificate["certificate"].encode())
    points = leaf.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    access = leaf.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
    base = portal_of(app).settings.pki_url
    crl_url = points[0].full_name[0].value
    issuer_url = access[0].access_location.value
    issuer = x509.load_der_x509_certificate(api_as(app, None).get(issuer_url.removeprefix(base), **CLEAR).data)
    crl = x509.load_der_x509_crl(api_as(app, None).get(crl_url.removeprefix(base), **CLEAR).data)
    leaf.verify_directly_issued_by(issuer)
    key = issuer.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert crl.is_signature_valid(key)


@pytest.mark.both_stores
def test_the_pem_is_issuing_ca_and_root(anyone: Api) -> None:
    issuing, root = x509.load_pem_x509_certificates(anyone.get("/ca.pem").data)
    issuing.verify_directly_issued_by(root)
    root.verify_directly_issued_by(root)


@pytest.mark.both_stores
def test_a_revocation_is_in_the_next_crl(api: Api, app: Flask) -> None:
    registered = api.register()
    before = api_as(app, None).get("/crl/issuing-1.crl")
    api.post(f"/revoke/{registered['device_id']}")
    after = api_as(app, None).get("/crl/issuing-1.crl", headers={"If-None-Match": before.headers["ETag"]})
    assert after.status_code == 200
    serial_number = int(registered["serial_number"], 16)
    assert x509.load_der_x509_crl(before.data).get_revoked_certificate_by_serial_number(serial_number) is None
    assert x509.load_der_x509_crl(after.data).get_revoked_certificate_by_serial_number(serial_number) is not None


# --- Caching ------------------------------------------------------------------------------------------------------


def test_a_crl_says_how_long_it_may_be_cached(anyone: Api) -> None:
    answer = anyone.get("/crl/issuing-1.crl", **CLEAR)
    crl = x509.load_der_x509_crl(answer.data)
    made = crl.last_update_utc + CLOCK_SKEW
    assert made <= parsedate_to_datetime(answer.headers["Last-Modified"]) <= made + timedelta(seconds=1)
    assert parsedate_to_datetime(answer.headers["Expires"]) == crl.next_update_utc
    assert answer.headers["Cache-Control"] == "public, max-age=60"
    assert re.fullmatch(r'"[0-9a-f]{32}"', answer.headers["ETag"])


@pytest.mark.both_stores
def test_an_expired_crl_is_not_cached(app: Flask, clock: Clock) -> None:
    clock.advance(days=400)
    assert api_as(app, None).get("/crl/issuing-1.crl").headers["Cache-Control"] == "public, max-age=0"


@pytest.mark.parametrize(
    ("tag", "status"),
    [("{}", 304), ("W/{}", 304), ('"other", {}', 304), ("*", 304), ('"other"', 200), ("", 200), ("{}x", 200)],
)
@pytest.mark.parametrize("path", PKI)
def test_a_client_with_the_current_version_gets_304(anyone: Api, path: str, tag: str, status: int) -> None:
    etag = anyone.get(path).headers["ETag"]
    answer = anyone.get(path, headers={"If-None-Match": tag.format(etag)}, **CLEAR)
    assert (answer.status_code, bool(answer.data)) == (status, status == 200)
    assert answer.headers["ETag"] == etag
    assert answer.headers["X-Request-Id"]


@pytest.mark.both_stores
def test_whoever_has_the_crl_from_before_a_revocation_is_sent_the_next_one(api: Api, app: Flask, clock: Clock) -> None:
    devices = [api.register()["device_id"] for _ in range(3)]
    public = api_as(app, None)
    clock.advance(hours=2)
    api.post(f"/revoke/{devices[0]}")
    for device_id in devices[1:]:  # in the same second
        before = public.get("/crl/issuing-1.crl")
        fetched = {"If-Modified-Since": format_datetime(clock(), usegmt=True)}
        assert parsedate_to_datetime(before.headers["Last-Modified"]) <= clock()
        api.post(f"/revoke/{device_id}")
        after = public.get("/crl/issuing-1.crl", headers=fetched)
        assert after.status_code == 200
        assert after.headers["ETag"] != before.headers["ETag"]
    clock.advance(minutes=1)
    later = {"If-Modified-Since": format_datetime(clock(), usegmt=True)}
    assert public.get("/crl/issuing-1.crl", headers=later).status_code == 304


@pytest.mark.both_stores
def test_a_crl_made_in_the_second_in_which_the_one_before_was_fetched_is_sent(
    make_settings: Callable[..., Settings],
) -> None:
    now = [(datetime.now(UTC) + timedelta(hours=2)).replace(microsecond=20_000)]
    app = create_app(make_settings(), background=False, clock=lambda: now[0])
    api, public = api_as(app, Role.ADMIN), api_as(app, None)
    device_id = api.register()["device_id"]
    before = public.get("/crl/issuing-1.crl")
    fetched = {"If-Modified-Since": format_datetime(now[0], usegmt=True)}
    now[0] += timedelta(milliseconds=30)
    api.post(f"/revoke/{device_id}")
    after = public.get("/crl/issuing-1.crl", headers=fetched)
    portal_of(app).close()
    assert (after.status_code, after.headers["ETag"] != before.headers["ETag"]) == (200, True)


def test_whoever_has_the_answer_from_before_a_revocation_is_sent_the_next_one(
    api: Api, app: Flask, clock: Clock
) -> None:
    anyone = api_as(app, None)
    device = api.register()
    request = ask(issuing_of(app), int(device["serial_number"], 16)).der()
    clock.advance(hours=2)
    get(anyone, request)
    fetched = {"If-Modified-Since": format_datetime(clock(), usegmt=True)}
    api.post(f"/revoke/{device['device_id']}")
    assert get(anyone, request, headers=fetched).status_code == 200  # in the same second
    clock.advance(minutes=1)
    later = {"If-Modified-Since": format_datetime(clock(), usegmt=True)}
    assert get(anyone, request, headers=later).status_code == 304


@pytest.mark.parametrize(("seconds", "status"), [(-1, 200), (0, 304), (1, 304)])
def test_a_crl_is_sent_if_modified_since(anyone: Api, seconds: int, status: int) -> None:
    modified = parsedate_to_datetime(anyone.get("/crl/issuing-1.crl").headers["Last-Modified"])
    since = format_datetime(modified + timedelta(seconds=seconds), usegmt=True)
    assert anyone.get("/crl/issuing-1.crl", headers={"If-Modified-Since": since}).status_code == status


@pytest.mark.parametrize(
    "since",
    ["", "yesterday", "Mon, 01 Jan 2035 00:00:00", "Mon, 01 Jan 99999 00:00:00 GMT", "Mon, 01 Jan 0001 00:00:00 +9999"],
)
def test_an_invalid_date_is_ignored(anyone: Api, since: str) -> None:
    assert anyone.get("/crl/issuing-1.crl", headers={"If-Modified-Since": since}).status_code == 200


def test_the_entity_tag_has_precedence_over_the_date(anyone: Api) -> None:
    later = {"If-None-Match": '"other"', "If-Modified-Since": "Mon, 01 Jan 2035 00:00:00 GMT"}
    assert anyone.get("/crl/issuing-1.crl", headers=later).status_code == 200


def test_head_is_get_without_the_content(anyone: Api) -> None:
    for path in PKI:
        got, looked = anyone.get(path, **CLEAR), anyone.call("HEAD", path, **CLEAR)
        assert looked.data == b""
        assert looked.headers["Content-Length"] == str(len(got.data))
        assert looked.headers["ETag"] == got.headers["ETag"]


# --- Nothing else -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [route for route in ROUTES if not route.on_pki_listener], ids=lambda r: r.path)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
def test_the_plain_listener_serves_no_other_route(shared_app: Flask, route: Any, method: str) -> None:
    path = re.sub(r"\{device_id\}", "00000000-0000-4000-8000-000000000000", route.path)
    answer = api_as(shared_app, None).call(method, re.sub(r"\{\w+\}", "0" * 16, path), **CLEAR)
    assert answer.status_code == 404
    if route.path.startswith("/.well-known/est/"):
        assert answer.mimetype == "text/plain"  # RFC 7030 section 4.2.3: an error that a person can read
    elif method != "HEAD":
        problem_of(answer, 404, "not_found")


def test_a_valid_token_is_useless_on_the_plain_listener(api: Api) -> None:
    problem_of(api.get("/devices", **CLEAR), 404, "not_found")


def test_the_routes_of_the_plain_listener_are_these(anyone: Api) -> None:
    assert {route.path for route in ROUTES if route.on_pki_listener} == {
        "/ca.pem",
        "/ca/{issuer}.cer",
        "/ca/{issuer}.pem",
        "/crl/{issuer}.crl",
        "/ocsp",
        "/ocsp/",
        "/ocsp/{request}",
    }
    answer = anyone.post("/ca.pem", **CLEAR)
    problem_of(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path",
    ["/ca/nobody.cer", "/crl/nobody.crl", "/ca/.cer", "/ca/root", "/ca/%2e%2e.cer", "/crl/root%00.crl", "/ca/ROOT.cer",
     "/ca/..%2froot.cer", "//ca.pem", "/ca.pem/", "/", "/ca", "/secrets/operator-token"],
)  # fmt: skip
def test_unknown_issuers_are_not_found(anyone: Api, path: str) -> None:
    nothing: dict[str, Any] = {}
    is_root = path in ("/", "//ca.pem")  # the second is, to the test's client, the root of a host
    for listener in (CLEAR,) if is_root else (nothing, CLEAR):  # over HTTPS it leads to the console
        problem_of(anyone.client.open(path, **listener), 404, "not_found")


def test_a_crl_that_many_ask_for_at_once_is_signed_once(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(make_settings(PORTAL_BROKER_CONTROL="guard"), background=False)
    portal = portal_of(app)
    signed: list[int] = []

    def counted(*arguments: Any, **named: Any) -> bytes:
        signed.append(named["number"])
        return sign_crl(*arguments, **named)

    monkeypatch.setattr(crls, "sign_crl", counted)
    portal.reconciler.install()
    device = portal.registrations.register(OPERATOR, PUMP)
    portal.revocations.revoke(OPERATOR, device.device_id, "superseded")
    assert not signed
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: app.test_client().get("/crl/issuing-1.crl", **CLEAR), range(8)))
    for answer in (app.test_client().head("/crl/issuing-1.crl", **CLEAR), *answers):
        assert answer.headers["ETag"] == answers[0].headers["ETag"]
    crl = x509.load_der_x509_crl(answers[0].data)
    assert crl.get_revoked_certificate_by_serial_number(int(device.serial_number, 16)) is not None
    assert len(signed) == 1
    portal.close()


@pytest.mark.both_stores
def test_a_crl_is_read_once_and_the_newest_is_served_by_every_worker(api: Api, app: Flask) -> None:
    portal = portal_of(app)
    worker = portal.inventory
    other = Inventory(
        portal.settings,
        portal.database,
        portal.tenant_terms,
        portal.reconciler.crls.sign_put_off,
        portal.contacts,
        portal.broker,
        portal.clock,
    )
    first = worker.crl(portal_of(app).authority.first.issuing.id)
    assert worker.crl(portal_of(app).authority.first.issuing.id) is first
    before = api_as(app, None).get("/crl/issuing-1.crl", **CLEAR)
    registered = api.register()
    api.post(f"/revoke/{registered['device_id']}")
    after = api_as(app, None).get("/crl/issuing-1.crl", **CLEAR)
    newest = other.crl(portal_of(app).authority.first.issuing.id)
    assert newest is not None
    assert after.data == newest.der != before.data
    assert after.headers["ETag"] != before.headers["ETag"]
    fresh = api_as(app, None).get("/crl/issuing-1.crl", headers={"If-None-Match": after.headers["ETag"]}, **CLEAR)
    assert (fresh.status_code, fresh.data) == (304, b"")


def test_a_certificate_that_clients_of_the_server_trust_is_there_under_its_fingerprint(api: Api, app: Flask) -> None:
    anyone = api_as(app, None)
    trusted = x509.load_pem_x509_certificates(portal_of(app).settings.https_ca_file.read_bytes())
    for one in trusted:
        der = one.public_bytes(Encoding.DER)
        answer = anyone.get(f"/ca/{hashlib.sha256(der).hexdigest()}.cer")
        assert (answer.status_code, answer.data, answer.content_type) == (200, der, "application/pkix-cert")
    problem_of(anyone.get(f"/ca/{'0' * 64}.cer"), 404, "not_found")
