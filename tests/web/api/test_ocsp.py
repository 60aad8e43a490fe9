"""OCSP by GET and POST, on both listeners; cryptography parses the answers."""

from __future__ import annotations

import base64
import dataclasses
import random
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.x509.ocsp import OCSPCertStatus, OCSPResponseStatus
from flask import Flask

from app import portal_of
from operations.wiring import Portal
from pki import ocsp
from pki.issuers import CLOCK_SKEW
from store.tables import Certificate
from tests.support.exposition import samples_of, value_of
from tests.support.harness import ON_SQLITE, Api, api_as, problem_of
from tests.support.ocsp import (
    NONCE,
    Ocsp,
    ask,
    cert_id,
    extension,
    failure_of,
    get,
    integer,
    issuing_of,
    nonce,
    oid,
    post,
    read,
    said_of,
    sequence,
    tlv,
)

CLEAR: dict[str, Any] = {"environ_overrides": {"portal.listener": "pki"}}
MALFORMED, TRY_LATER = OCSPResponseStatus.MALFORMED_REQUEST, OCSPResponseStatus.TRY_LATER
UNAUTHORIZED = OCSPResponseStatus.UNAUTHORIZED


@pytest.fixture
def app(shared_app: Flask) -> Flask:
    return shared_app


@pytest.fixture
def anyone(app: Flask) -> Api:
    return api_as(app, None)


# --- What is said -------------------------------------------------------------------------------------------------


@pytest.mark.both_stores
def test_a_device_is_good_until_it_is_revoked_and_then_revoked_with_time_and_reason(
    api: Api, app: Flask, anyone: Api
) -> None:
    device = api.register()
    request = ask(issuing_of(app), int(device["serial_number"], 16), algorithm="sha256")
    for fetch in (get, post):
        assert read(fetch(anyone, request.der())).certificate_status is OCSPCertStatus.GOOD
    told = api.post(f"/revoke/{device['device_id']}", {"reason": "key_compromise"}).json
    for fetch in (get, post):
        answer = read(fetch(anyone, request.der(), **CLEAR))
        assert answer.certificate_status is OCSPCertStatus.REVOKED
        assert answer.revocation_reason is x509.ReasonFlags.key_compromise
        at = datetime.fromisoformat(told["revoked_at"]).replace(microsecond=0)
        assert answer.revocation_time_utc == at - CLOCK_SKEW
        assert answer.revocation_time_utc <= answer.this_update_utc


@pytest.mark.both_stores
def test_a_serial_number_that_was_never_issued_is_unknown_until_it_is(api: Api, app: Flask, anyone: Api) -> None:
    assert said_of(anyone, ask(issuing_of(app), 1, 1 << 158, 0, -1, 1 << 400)) == ["unknown"] * 5
    assert said_of(anyone, ask(issuing_of(app), 1)) == ["unknown"]


@pytest.mark.both_stores
def test_the_order_of_several_is_kept(api: Api, app: Flask, anyone: Api) -> None:
    stays, goes = api.register(), api.register()
    api.post(f"/revoke/{goes['device_id']}")
    numbers = [int(device["serial_number"], 16) for device in (goes, stays)]
    assert said_of(anyone, ask(issuing_of(app), numbers[0], 7, numbers[1], numbers[0])) == [
        "revoked", "unknown", "good", "revoked",
    ]  # fmt: skip


@pytest.mark.both_stores
def test_a_suspended_device_is_revoked_on_hold_until_it_is_resumed(api: Api, app: Flask, anyone: Api) -> None:
    device = api.register()
    request = ask(issuing_of(app), int(device["serial_number"], 16))
    assert said_of(anyone, request) == ["good"]
    api.post(f"/devices/{device['device_id']}/suspend")
    answer = read(get(anyone, request.der()))
    assert answer.certificate_status is OCSPCertStatus.REVOKED
    assert answer.revocation_reason is x509.ReasonFlags.certificate_hold
    api.post(f"/devices/{device['device_id']}/resume")
    assert read(get(anyone, request.der())).certificate_status is OCSPCertStatus.GOOD


@pytest.mark.both_stores
def test_a_certificate_that_was_replaced_is_good_until_it_is_revoked(api: Api, app: Flask, anyone: Api) -> None:
    number = api.register()["serial_number"]
    portal = portal_of(app)
    replaced = {"status": "replaced", "replaced_until": portal.clock() + timedelta(hours=1)}
    with portal.database.transaction() as tx:
        tx.execute(sa.update(Certificate).where(Certificate.serial_number == number).values(**replaced))
    assert said_of(anyone, ask(issuing_of(app), int(number, 16))) == ["good"]


@pytest.mark.both_stores
def test_the_status_of_the_portals_own_certificates_is_known(app: Flask, anyone: Api) -> None:
    portal = portal_of(app)
    folder = portal.settings.data_dir
    own = [folder / "tls" / "server.pem", folder / "canaries" / "good.pem", folder / "canaries" / "revoked.pem",
           portal.responder.certificates.path("issuing-1")]  # fmt: skip
    numbers = [x509.load_pem_x509_certificate(path.read_bytes()).serial_number for path in own]
    assert said_of(anyone, ask(issuing_of(app), *numbers)) == ["good", "good", "revoked", "good"]


@pytest.mark.both_stores
def test_the_root_answers_for_the_issuing_ca_and_not_for_its_devices(api: Api, app: Flask, anyone: Api) -> None:
    root = portal_of(app).authority.root.issuer.certificate
    device = int(api.register()["serial_number"], 16)
    answer = read(post(anyone, ask(root, issuing_of(app).serial_number).der()))
    assert answer.certificate_status is OCSPCertStatus.GOOD
    answer.certificates[0].verify_directly_issued_by(root)
    assert said_of(anyone, ask(root, root.serial_number, device, 5)) == ["good", "unknown", "unknown"]
    assert said_of(anyone, ask(issuing_of(app), issuing_of(app).serial_number)) == ["unknown"]


@pytest.mark.both_stores
def test_a_chain_in_one_request_is_answered_by_the_first_ones_ca(api: Api, app: Flask, anyone: Api) -> None:
    root, issuing = portal_of(app).authority.root.issuer.certificate, issuing_of(app)
    chain = [cert_id(issuing, int(api.register()["serial_number"], 16)), cert_id(root, issuing.serial_number)]
    assert said_of(anyone, Ocsp(chain)) == ["good", "unknown"]
    assert said_of(anyone, Ocsp(chain[::-1])) == ["good", "unknown"]


def test_requests_about_other_cas_are_unauthorized(app: Flask, anyone: Api) -> None:
    portal = portal_of(app)
    root, issuing = portal.authority.root.issuer.certificate, issuing_of(app)
    stranger = x509.load_pem_x509_certificate((portal.settings.data_dir / "canaries" / "good.pem").read_bytes())
    foreign = [
        cert_id(issuing, 1, name_of=root),
        cert_id(issuing, 1, key_of=root),
        cert_id(stranger, 1),
        cert_id(issuing, 1, algorithm="md5"),
    ]
    for each in (*([one] for one in foreign), foreign):
        assert failure_of(post(anyone, Ocsp(each).der())) is UNAUTHORIZED
    known = cert_id(issuing, stranger.serial_number)
    assert said_of(anyone, Ocsp([*foreign, known])) == ["unknown"] * 4 + ["good"]


def test_an_id_that_cryptography_would_not_read_is_repeated_as_unknown(app: Flask, anyone: Api) -> None:
    issuing = issuing_of(app)
    # Ed25519 is no hash, and has no parameters; pyasn1 writes this number in one byte more than is needed.
    odd = sequence(sequence(oid("2b6570"), b"\x05\x00"), tlv(4, b"name"), tlv(4, b"key"), integer(1))
    for request in (ask(issuing, -(1 << 159)), Ocsp([cert_id(issuing, 1), odd])):
        answer = post(anyone, request.der())
        assert (answer.status_code, answer.content_type) == (200, "application/ocsp-response")
        assert answer.data[4:7] == b"\x0a\x01\x00"  # successful


# --- How it is asked ----------------------------------------------------------------------------------------------


def with_slash_and_plus(app: Flask) -> bytes:
    """A request whose base64 contains a plus and two slashes in a row."""
    for number in range(1, 1 << 40):
        der = ask(issuing_of(app), number << 200 | 0xFFFFFF).der()
        text = base64.b64encode(der).decode()
        if "+" in text and "//" in text and text.endswith("="):
            return der
    raise AssertionError("there is one")


@pytest.mark.parametrize("listener", [{}, CLEAR], ids=["HTTPS", "plain HTTP"])
@pytest.mark.parametrize(
    "form",
    [
        lambda text: quote(text, safe=""),
        lambda text: text,
        lambda text: quote(text, safe="/"),
        lambda text: text.rstrip("="),
        lambda text: quote(text.replace("+", " ")),
        lambda text: text.translate(str.maketrans("+/", "-_")),
        lambda text: text.translate(str.maketrans("+/", "-_")).rstrip("="),
        lambda text: "/" + quote(text, safe=""),
        lambda text: "///" + text,
        lambda text: quote("\r\n".join(text[start : start + 64] for start in range(0, len(text), 64)), safe=""),
    ],
    ids=[
        "URL-encoded",
        "raw",
        "slashes raw",
        "no padding",
        "spaces for plus",
        "base64url",
        "base64url without padding",
        "a slash before it",
        "slashes before it",
        "in lines",
    ],
)
def test_get_accepts_every_encoding_of_base64_in_the_url(
    app: Flask, anyone: Api, form: Callable[[str], str], listener: dict[str, Any]
) -> None:
    der = with_slash_and_plus(app)
    text = base64.b64encode(der).decode()
    answer = read(anyone.get("/ocsp/" + form(text), **listener))
    assert answer.certificate_status is OCSPCertStatus.UNKNOWN


@pytest.mark.parametrize(
    "path",
    [
        "/ocsp/AAAA",
        "/ocsp/A",
        "/ocsp/MA==MA==",
        "/ocsp/====",
        "/ocsp//",
        "/ocsp/ ",
        "/ocsp/%00",
        "/ocsp/a-b",
        "/ocsp/%F0%9F%98%80",
    ],
)
def test_get_of_another_der_structure_is_malformed(anyone: Api, path: str) -> None:
    assert failure_of(anyone.get(path)) is MALFORMED


def test_get_of_invalid_base64_is_refused(anyone: Api) -> None:
    assert failure_of(anyone.get("/ocsp/../ca.pem")) is MALFORMED
    problem_of(anyone.get("/ocsp/" + "A" * 8193), 404, "not_found")
    for path in ("/ocsp", "/ocsp/"):
        problem_of(anyone.get(path), 405, "method_not_allowed")


def test_a_post_to_a_url_that_ends_in_a_slash_is_answered(app: Flask, anyone: Api) -> None:
    request = ask(issuing_of(app), 1).der()
    answer = anyone.post("/ocsp/", data=request, content_type="application/ocsp-request", **CLEAR)
    assert read(answer).certificate_status is OCSPCertStatus.UNKNOWN


@pytest.mark.parametrize("body", [b"", b"0", b"\x30\x03\x02\x01\x01", b"GET / HTTP/1.1", b"\x30\x84\xff\xff\xff\xff"])
def test_post_of_another_body_is_malformed(anyone: Api, body: bytes) -> None:
    assert failure_of(post(anyone, body)) is MALFORMED


def test_post_accepts_only_the_media_type_of_ocsp_requests(app: Flask, anyone: Api) -> None:
    der = ask(issuing_of(app), 1).der()
    for media_type in ("application/json", "application/x-www-form-urlencoded", "", "application/ocsp-response"):
        problem_of(anyone.call("POST", "/ocsp", data=der, content_type=media_type), 415, "unsupported_media_type")


def test_a_request_of_64_kilobytes_is_too_large(anyone: Api) -> None:
    problem_of(post(anyone, b"\x30" * 65536), 413, "body_too_large")
    problem_of(post(anyone, b"\x30" * (ocsp.MAX_BYTES + 1), **CLEAR), 413, "body_too_large")


def test_a_request_for_500_certificates_is_refused(app: Flask, anyone: Api) -> None:
    long = range(1 << 158, (1 << 158) + 500)
    problem_of(post(anyone, ask(issuing_of(app), *long).der()), 413, "body_too_large")
    assert failure_of(post(anyone, ask(issuing_of(app), *range(500)).der())) is MALFORMED
    assert failure_of(post(anyone, ask(issuing_of(app), *range(101)).der())) is MALFORMED
    assert said_of(anyone, ask(issuing_of(app), *range(100), algorithm="sha512")) == ["unknown"] * 100


@pytest.mark.both_stores
@pytest.mark.parametrize("length", [1, 16, 32, 128])
def test_a_nonce_is_returned_in_an_answer_that_is_not_cached(app: Flask, anyone: Api, length: int) -> None:
    value = secrets.token_bytes(length)
    request = dataclasses.replace(ask(issuing_of(app), 1), extensions=[nonce(value)]).der()
    for fetch in (get, post):
        answer = fetch(anyone, request)
        assert read(answer).extensions.get_extension_for_class(x509.OCSPNonce).value.nonce == value
        assert answer.headers["Cache-Control"] == "private, max-age=0, must-revalidate"
        assert "ETag" not in answer.headers


@pytest.mark.parametrize(
    "bad", [nonce(b""), nonce(b"n" * 129), extension(NONCE, b"bare"), extension("2a03", b"", critical=True)]
)
def test_a_nonce_of_another_length_and_unknown_critical_extensions_are_malformed(
    app: Flask, anyone: Api, bad: bytes
) -> None:
    request = dataclasses.replace(ask(issuing_of(app), 1), extensions=[bad]).der()
    assert failure_of(post(anyone, request)) is MALFORMED


# --- Caching ------------------------------------------------------------------------------------------------------


@pytest.mark.both_stores
def test_an_answer_says_how_long_it_may_be_cached(api: Api, app: Flask, anyone: Api) -> None:
    request = ask(issuing_of(app), int(api.register()["serial_number"], 16)).der()
    got, posted = get(anyone, request, **CLEAR), post(anyone, request)
    for answer in (got, posted):
        told = read(answer)
        assert answer.headers["Cache-Control"] == "public, max-age=60, no-transform, must-revalidate"
        made_at = told.this_update_utc + CLOCK_SKEW
        assert made_at <= parsedate_to_datetime(answer.headers["Last-Modified"]) <= made_at + timedelta(seconds=1)
        assert parsedate_to_datetime(answer.headers["Expires"]) == told.next_update_utc
    again = get(anyone, request, headers={"If-None-Match": got.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert anyone.call("HEAD", "/ocsp/" + base64.b64encode(request).decode()).headers["ETag"] == got.headers["ETag"]
    assert post(anyone, request, headers={"If-None-Match": got.headers["ETag"]}).status_code == 200


# --- Whatever is sent ---------------------------------------------------------------------------------------------


def test_every_certificate_answered_for_is_counted(api: Api, app: Flask, anyone: Api) -> None:
    device = api.register()
    request = ask(issuing_of(app), int(device["serial_number"], 16))
    before = samples_of(api.get("/metrics").text)
    for _ in range(3):
        post(anyone, request.der())
    post(anyone, ask(issuing_of(app), 1, 2).der())
    post(anyone, b"")
    after = samples_of(api.get("/metrics").text)

    def counted(answer: str, kept: str) -> float:
        labels = {"answer": answer, "kept": kept}
        name = "portal_ocsp_answers_total"
        return value_of(after, name, **labels) - (value_of(before, name, **labels) or 0)

    assert (counted("good", "no"), counted("good", "yes")) == (1, 2)
    assert (counted("unknown", "no"), counted("malformed_request", "no")) == (2, 1)


def mutated(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.choice((0, 1, 4, 5, 0x30, 0x7F, 0x80, 0x82, 0xA0, 0xA2, 0xFF))
            case 2:
                del data[at : at + rng.randint(1, 16)]
            case 3:
                data[at:at] = data[at : at + rng.randint(1, 64)]
            case _:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
    return bytes(data)


@ON_SQLITE
def test_mutated_requests_are_answered_and_never_good(shared_app: Flask) -> None:
    """Each of 2,000 mutated requests gets an OCSP answer, and good only if it is about the good certificate."""
    issuing, anyone = issuing_of(shared_app), api_as(shared_app, None)
    portal = portal_of(shared_app)
    good = x509.load_pem_x509_certificate((portal.settings.data_dir / "canaries" / "good.pem").read_bytes())
    plain = ask(issuing, good.serial_number)
    seeds = [
        plain.der(),
        ask(issuing, good.serial_number, 5, algorithm="sha256").der(),
        dataclasses.replace(plain, extensions=[nonce(b"n" * 32)], version=tlv(0xA0, b"\x02\x01\x00")).der(),
    ]
    rng = random.Random(1)  # noqa: S311 - the same ones each time
    statuses = set()
    for number in range(2000):
        der = mutated(rng, seeds[number % 3])
        answer = read((get if number % 2 and len(der) < 500 and der else post)(anyone, der))
        statuses.add(answer.response_status)
        if answer.response_status is OCSPResponseStatus.SUCCESSFUL:
            for single in answer.responses:
                assert single.certificate_status is not OCSPCertStatus.GOOD or single.serial_number in own_numbers(
                    portal
                )
    assert statuses == {OCSPResponseStatus.SUCCESSFUL, MALFORMED, UNAUTHORIZED}


def own_numbers(portal: Portal) -> set[int]:
    with portal.database.snapshot() as tx:
        return {int(number, 16) for number in tx.execute(sa.select(Certificate.serial_number)).scalars()}
