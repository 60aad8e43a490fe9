"""A root whose key is in a token that is locked away, as it should be most of the time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from datetime import timedelta

import pytest
from cryptography import x509

from core.errors import TokenUnavailable
from operations.authority import renew_crls, roll_over
from operations.wiring import Portal, open_portal
from pki.keys.contract import Origin
from store import audit
from store import issuers as store_issuers
from tests.support.harness import Clock, first_start, settings_for
from tests.support.mosquitto import short_folder
from tests.support.tokens import SoftTokens


@pytest.fixture
def portal(soft_tokens: SoftTokens, clock: Clock) -> Iterator[Portal]:
    """A portal whose root is in a token, which is taken away after the first start; issuing keys are files."""
    folder, token_folders = short_folder(in_memory=True), soft_tokens.folder / "tokens"
    before = set(token_folders.iterdir())
    settings = settings_for(folder, PORTAL_ROOT_KEYS=str(soft_tokens.create()), PORTAL_TOKEN_TIMEOUT="60")
    first_start(settings)
    (token,) = set(token_folders.iterdir()) - before
    away = token.rename(soft_tokens.folder / "locked away")
    opened = open_portal(settings, clock)
    yield opened
    opened.close()
    if away.exists():
        away.rename(token)
    shutil.rmtree(folder)


def roots_crl(portal: Portal) -> x509.CertificateRevocationList:
    with portal.database.snapshot() as tx:
        record = store_issuers.get_crl(tx, portal.authority.root.id)
    assert record is not None
    return x509.load_der_x509_crl(record.der)


def test_the_portal_works_without_it_and_uses_it_while_it_is_there(
    portal: Portal, soft_tokens: SoftTokens, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    actor = audit.system_actor(portal.first_tenant)
    assert portal.keys.describe("root").origin is Origin.BORN_IN_TOKEN
    assert portal.keys.describe("issuing-1").origin is Origin.FILE
    assert not {"token", "ca"} & {check.name for check in portal.readiness.checks() if check.problem}
    with pytest.raises(TokenUnavailable, match="is not there; put it in"):
        roll_over(portal, actor, lambda _: None)
    assert not portal.keys.exists("issuing-2")
    clock.advance(days=340)
    before = roots_crl(portal)
    with caplog.at_level(logging.INFO):
        renew_crls(portal)
        portal.responder.certificates.renew()
    said = [record.getMessage() for record in caplog.records]
    assert sum("root's CRL expires soon" in line for line in said) == 1
    assert not [line for line in said if "token" in line or "OCSP responder is not" in line]
    assert roots_crl(portal) == before
    (soft_tokens.folder / "locked away").rename(soft_tokens.folder / "tokens" / "back")
    renew_crls(portal)
    after = roots_crl(portal)
    assert after.last_update_utc - before.last_update_utc >= timedelta(days=340)
    root = portal.authority.root.issuer.certificate.public_key()
    assert after.is_signature_valid(root)  # type: ignore[arg-type]  # of a kind that signs
