"""One CA following another and the CRLs of all, tried with a clock that is moved; the broker does not run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.errors import CaKeyUnavailable, StateConflict
from operations import authority as operations_authority
from operations import jobs
from operations.wiring import Portal
from pki.csr import read_csr
from store import issuers
from store.issuers import CrlRecord
from tests.pki.test_conformance import RUN_PKILINT
from tests.support.harness import ON_SQLITE, Clock, csr_pem, key_path
from tests.workflows.test_registration import OPERATOR, PUMP, with_fields
from workflows.authority import issuers as authority_issuers
from workflows.authority import rollover
from workflows.renewal import RenewalRequest

pytestmark = pytest.mark.both_stores


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority_issuers, "SECONDS_BETWEEN_LOOKS", 0.0)


def crl_of(portal: Portal, name: str) -> CrlRecord:
    with portal.database.snapshot() as tx:
        ids = {record.name: record.id for record in issuers.list_issuers(tx, retired=True)}
        crl = issuers.get_crl(tx, ids[name])
    assert crl is not None
    return crl


def roll_over(portal: Portal, **options: bool) -> str:
    return operations_authority.roll_over(portal, OPERATOR, lambda _: None, **options)


def signer_of(path: Path) -> str:
    return x509.load_pem_x509_certificate(path.read_bytes()).issuer.rfc4514_string()


def own_files(portal: Portal) -> list[Path]:
    settings = portal.settings
    probes = settings.data_dir / "canaries"
    return [settings.tls_dir / "server.pem", settings.broker_file("server.pem"), probes / "good.pem",
            probes / "revoked.pem"]  # fmt: skip


def trusted(path: Path) -> int:
    return len(x509.load_pem_x509_certificates(path.read_bytes()))


# --- A rollover ---------------------------------------------------------------------------------------------------


def test_after_a_rollover_both_are_trusted_and_the_new_one_issues(portal: Portal) -> None:
    older = portal.registrations.register(OPERATOR, with_fields(csr=csr_pem()))
    assert roll_over(portal) == "issuing-2"
    newer = portal.registrations.register(OPERATOR, with_fields(csr=csr_pem()))
    assert older.chain is not None
    assert newer.chain is not None
    names = [x509.load_pem_x509_certificates(chain.encode())[1].subject for chain in (older.chain, newer.chain)]
    assert [name.rfc4514_string()[-1] for name in names] == ["1", "2"]
    assert {signer_of(path) for path in own_files(portal)} == {"CN=Device Onboarding Issuing CA 2"}
    for path in (portal.settings.data_dir / "ca.pem", portal.settings.broker_file("ca.pem")):
        assert trusted(path) == 3
    assert portal.settings.broker_file("crl.pem").read_text().count("BEGIN X509 CRL") == 2
    for device in (older, newer):
        portal.revocations.revoke(OPERATOR, device.device_id, "key_compromise")
    crls = [x509.load_der_x509_crl(crl_of(portal, name).der) for name in ("issuing-1", "issuing-2")]
    for crl, device in zip(crls, (older, newer), strict=True):
        assert crl.get_revoked_certificate_by_serial_number(int(device.serial_number, 16))
    actions = {entry.action for entry in portal.operators.audit("default", limit=50, before=None, filters={})[0]}
    assert {"ca:create", "ca:issue"} <= actions


STEPS = ("apply_everywhere", "renew", "move_to", "renew_certificates")


@pytest.mark.parametrize("step", STEPS)
def test_a_rollover_that_was_cut_off_is_gone_on_with(
    portal: Portal, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def cut_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    places = {
        "apply_everywhere": portal.reconciler,
        "renew": portal.responder.certificates,
        "move_to": rollover,
        "renew_certificates": operations_authority,
    }
    with monkeypatch.context() as patch:
        patch.setattr(places[step], step, cut_off)
        with pytest.raises(KeyboardInterrupt):
            roll_over(portal)
    if step == "renew_certificates":
        with pytest.raises(StateConflict, match="rollover is complete"):
            roll_over(portal)
    else:
        assert portal.authority.first.issuing.issuer.name == "issuing-1"
        assert roll_over(portal) == "issuing-2"
    assert portal.authority.first.issuing.issuer.name == "issuing-2"
    assert {signer_of(path) for path in own_files(portal)} == {"CN=Device Onboarding Issuing CA 2"}
    assert trusted(portal.settings.data_dir / "ca.pem") == 3


@ON_SQLITE
def test_a_second_rollover_on_one_day_must_be_meant(portal: Portal) -> None:
    roll_over(portal)
    with pytest.raises(StateConflict, match="use --again for one more"):
        roll_over(portal)
    assert roll_over(portal, again=True) == "issuing-3"


@ON_SQLITE
def test_without_the_roots_key_nothing_changes(portal: Portal) -> None:
    key_path(portal.settings, "root").unlink()
    before = sorted(portal.settings.ca_dir.iterdir())
    with pytest.raises(CaKeyUnavailable, match="bring the key back"):
        roll_over(portal)
    assert sorted(portal.settings.ca_dir.iterdir()) == before


def test_a_ca_retires_by_itself_when_its_devices_have_certificates_of_the_next(portal: Portal, clock: Clock) -> None:
    device = portal.registrations.register(OPERATOR, with_fields(csr=csr_pem()))
    roll_over(portal)
    clock.advance(hours=2)
    operations_authority.retire_unneeded(portal)
    assert len(portal.authority.with_crl()) == 2
    portal.renewals.renew(OPERATOR, device.device_id, RenewalRequest(csr=read_csr(csr_pem()), overlap_hours=1))
    clock.advance(hours=2)
    jobs.expire(portal)
    operations_authority.retire_unneeded(portal)
    assert [recorded.issuer.name for recorded in portal.authority.with_crl()] == ["issuing-2"]
    for path in (portal.settings.data_dir / "ca.pem", portal.settings.broker_file("ca.pem")):
        assert trusted(path) == 2
    assert portal.settings.broker_file("crl.pem").read_text().count("BEGIN X509 CRL") == 1
    before = crl_of(portal, "issuing-1")
    clock.advance(days=5)
    operations_authority.renew_crls(portal)
    after = crl_of(portal, "issuing-1")
    assert after.number == before.number + 1, "its CRL is still published"
    assert len(x509.load_der_x509_crl(after.der)) == len(x509.load_der_x509_crl(before.der)) > 0
    assert portal.broker.files.damage() == []


# --- The root's CRL -----------------------------------------------------------------------------------------------


@ON_SQLITE
def test_the_roots_crl_is_renewed_while_its_key_is_here_even_if_that_came_late(portal: Portal, clock: Clock) -> None:
    key = key_path(portal.settings, "root")
    away = key.rename(key.with_name("elsewhere"))
    first = crl_of(portal, "root")
    clock.advance(days=200)
    operations_authority.renew_crls(portal)
    assert crl_of(portal, "root") == first
    away.rename(key)
    operations_authority.renew_crls(portal)
    assert crl_of(portal, "root").number == first.number + 1
    assert crl_of(portal, "root").next_update > clock() + timedelta(days=360)


@ON_SQLITE
def test_a_root_crl_that_nobody_can_renew_is_loud_in_time(
    portal: Portal, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    key_path(portal.settings, "root").unlink()

    def said() -> int:
        operations_authority.renew_crls(portal)
        return sum("the root's CRL expires soon" in record.message for record in caplog.records)

    def not_ready() -> str:
        return " ".join(check.problem or "" for check in portal.readiness.checks() if check.name == "crl")

    clock.advance(days=330)
    assert (said(), not_ready()) == (0, "")
    clock.advance(days=10)
    assert (said(), said(), not_ready()) == (1, 1, "")
    clock.advance(days=20)
    assert said() == 2
    assert "put the root's key back" in not_ready()


# --- As others judge it -------------------------------------------------------------------------------------------


@ON_SQLITE
def test_openssl_and_pkilint_accept_what_is_served_of_every_ca(
    make_settings: Callable[..., Settings], clock: Clock, tmp_path: Path
) -> None:
    app: Flask = create_app(make_settings(), background=False, clock=clock)
    portal, client = portal_of(app), app.test_client()
    devices = [portal.registrations.register(OPERATOR, with_fields(csr=csr_pem()))]
    portal.revocations.suspend(OPERATOR, portal.registrations.register(OPERATOR, PUMP).device_id)
    roll_over(portal)
    devices.append(portal.registrations.register(OPERATOR, with_fields(csr=csr_pem())))
    gone = portal.registrations.register(OPERATOR, with_fields(csr=csr_pem()))
    portal.revocations.revoke(OPERATOR, gone.device_id, "unspecified")
    (tmp_path / "ca.pem").write_bytes(client.get("/ca.pem").data)
    crls = []
    for name in ("root", "issuing-1", "issuing-2"):
        answer = client.get(f"/crl/{name}.crl")
        assert (answer.status_code, answer.content_type) == (200, "application/pkix-crl")
        (tmp_path / f"{name}.crl").write_bytes(answer.data)
        crls += ["-CRLfile", f"{name}.crl"]
    command = [sys.executable, "-c", RUN_PKILINT, *crls[1::2]]
    reports = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()
    found = [result["finding_descriptions"] for report in reports for result in json.loads(report)["results"]]
    assert (len(reports), [findings for findings in found if findings]) == (3, [])

    def verify(pem: str | None) -> str:
        assert pem is not None
        (tmp_path / "device.pem").write_text(pem)
        command = ["openssl", "verify", "-x509_strict", "-crl_check_all", "-CAfile", "ca.pem", *crls, "device.pem"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    for device in devices:
        assert verify(device.certificate).endswith(": OK\n")
    assert "certificate revoked" in verify(gone.certificate)
    portal.close()
