"""What clients see while the token with the CAs' keys fails: never a wrong answer, a 500, or a wait without end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from flask import Flask

from app import create_app, portal_of
from core.roles import Role
from operations.wiring import Portal, open_portal, prepare
from pki.keys.contract import Origin
from tests.support.harness import Api, api_as, first_start, problem_of, settings_for
from tests.support.mosquitto import short_folder
from tests.support.tokens import SoftTokens, TokenServer, client_module, wait_until


@pytest.fixture
def app(soft_tokens: SoftTokens, token_server: TokenServer) -> Iterator[Flask]:
    """An application whose root and issuing CA were born in a token behind a server."""
    folder = short_folder(in_memory=True)
    uri = replace(soft_tokens.create(), module=client_module())
    settings = settings_for(folder, PORTAL_CA_KEYS=str(uri), PORTAL_TOKEN_TIMEOUT="30")
    first_start(settings)
    built = create_app(settings, background=False)
    yield built
    portal_of(built).close()
    shutil.rmtree(folder)


@pytest.fixture
def portal(app: Flask) -> Portal:
    return portal_of(app)


@pytest.fixture
def api(app: Flask) -> Api:
    return api_as(app, Role.ADMIN)


def failing(api: Api) -> set[str]:
    return {check["name"] for check in api.get("/readyz").json["checks"] if not check["ok"]}


def test_keys_are_born_in_the_token_and_certificates_verify(portal: Portal, api: Api) -> None:
    registered = api.register()
    assert [portal.keys.describe(name).origin for name in ("root", "issuing-1")] == [Origin.BORN_IN_TOKEN] * 2
    assert not list(portal.settings.ca_dir.glob("*.key.pem"))
    root, issuing = portal.authority.root.issuer.certificate, portal.authority.first.issuing.issuer.certificate
    root.verify_directly_issued_by(root)
    issuing.verify_directly_issued_by(root)
    shown = api.get(f"/devices/{registered['device_id']}/certificates").json
    assert shown
    assert failing(api) == {"broker"}


def test_while_the_token_is_away_nothing_is_signed_and_the_rest_is_answered(
    api: Api, portal: Portal, app: Flask, token_server: TokenServer
) -> None:
    first, second = api.register(), api.register()
    before = x509.load_der_x509_crl(api.get("/crl/issuing-1.crl").data)
    token_server.kill()
    answer = api.post("/register", {"name": "pump-2", "type": "pump", "location": "hall 1", "firmware": "1.0"})
    problem = problem_of(answer, 503, "token_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert str(portal.settings.ca_keys[0]) not in problem["detail"]
    assert "pkcs11:" not in problem["detail"]
    assert failing(api) == {"broker", "token", "ca"}
    assert failing(api_as(app, None)) == {"broker", "token", "ca"}
    told = {check["name"]: check.get("problem", "") for check in api.get("/readyz").json["checks"]}
    assert "The token pkcs11:token=" in told["token"]
    assert api.get("/devices").status_code == 200
    assert api.post(f"/revoke/{first['device_id']}").json["broker"] == "pending"  # it has no CRL yet
    assert x509.load_der_x509_crl(api.get("/crl/issuing-1.crl").data) == before
    token_server.start()
    wait_until(lambda: "token" not in failing(api))
    api.register()
    portal.reconciler.install()
    after = x509.load_der_x509_crl(api.get("/crl/issuing-1.crl").data)
    serial_number = int(first["serial_number"], 16)
    assert before.get_revoked_certificate_by_serial_number(serial_number) is None
    assert after.get_revoked_certificate_by_serial_number(serial_number) is not None
    assert after.is_signature_valid(portal.authority.first.issuing.issuer.certificate.public_key())  # type: ignore[arg-type]
    assert api.get(f"/devices/{second['device_id']}").json["status"] == "active"


def test_a_portal_starts_while_its_token_is_away_and_a_crl_is_due(
    api: Api, portal: Portal, token_server: TokenServer
) -> None:
    device = api.register()
    token_server.kill()
    assert api.post(f"/revoke/{device['device_id']}").json["broker"] == "pending"
    other = open_portal(portal.settings)
    try:
        prepare(other)
        assert other.authority.first.issuing.issuer.name == "issuing-1"
    finally:
        other.close()


def test_the_settings_do_not_hold_the_pin(portal: Portal) -> None:
    uri = portal.settings.ca_keys[0]
    assert uri is not None
    assert Path(uri.pin_file).read_text().strip() not in repr(portal.settings)
