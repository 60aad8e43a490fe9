"""Checks of the certificate authority: keys, chain, CRLs, what ends soon, the clock."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from broker.crl import read_crls
from broker.files import CA_FILE, CRL_FILE, SERVER_CERTIFICATE_FILE
from core.errors import PortalError
from core.states import CertificateStatus, IssuerKind
from operations.doctor.findings import Verdict, problem, some, together, warning
from operations.doctor.network import https_date, served_crl
from operations.doctor.subject import Subject, certificate_of
from pki.issuers import Issuer
from pki.keystore import KeyFiles, passphrase
from store import issuers as store_issuers
from store.issuers import CrlRecord, IssuerRecord
from store.tables import AuditEntry, Certificate, Crl

SOON = timedelta(days=30)
CA_SOON = timedelta(days=90)  # long enough to give all devices certificates of another
SLACK = timedelta(seconds=60)  # between two clocks, or a record and the look at it
TRIES = 4  # where two places are compared that change one after the other


def ca_keys(subject: Subject) -> Verdict:
    """Whether the keys open with the passphrase and belong to the certificates."""
    settings = subject.settings
    keys = KeyFiles(
        settings.ca_dir, passphrase(settings.ca_passphrase, settings.secrets_dir / "ca-passphrase", make=False)
    )
    found, root = [], "is kept elsewhere"
    for issuer in subject.issuers():
        if issuer.kind == IssuerKind.ROOT:
            if not keys.exists(issuer.name):
                continue
            root = "is here: better move it away"
        try:
            key = keys.load(issuer.name)
        except PortalError as error:
            found.append(problem(error.detail, ""))
            continue
        if key.public_key() != x509.load_der_x509_certificate(issuer.der).public_key():
            found.append(
                problem(f"The key of {issuer.name} is not that of its certificate.", "Restore the right key file.")
            )
    return together(found, f"The issuing keys open with the passphrase; the root's {root}.")


def ca_chain(subject: Subject) -> Verdict:
    """Whether root and issuing CAs verify and are in time, and whether the files hold them (RFC 5280 section 6)."""
    now, issuers = subject.clock(), subject.issuers()
    certificates = {issuer.name: x509.load_der_x509_certificate(issuer.der) for issuer in issuers}
    roots = [certificates[issuer.name] for issuer in issuers if issuer.kind == IssuerKind.ROOT]
    found = []
    for name, certificate in certificates.items():
        try:
            Issuer(name, certificate)  # basic constraints, key usage, key identifier
            if not any(_verifies(certificate, root) for root in roots):
                found.append(problem(f"{name} is not signed by the root.", "Restore a backup of the database."))
        except PortalError as error:
            found.append(problem(error.detail, "Restore a backup of the database."))
        if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
            found.append(problem(f"{name} is not valid now.", "Set the clock right, or make a new CA."))
    wanted = set(certificates.values())
    for path in (subject.settings.data_dir / "ca.pem", subject.settings.broker_file(CA_FILE)):
        try:
            there = set(x509.load_pem_x509_certificates(path.read_bytes()))
        except (OSError, ValueError):
            there = set()
        if there != wanted:
            found.append(
                problem(f"{path} does not hold exactly the portal's CAs.", "Restart the portal, which writes it.")
            )
    ends = min(certificate.not_valid_after_utc for certificate in certificates.values())
    return together(found, f"{some(list(certificates))} verify; the first of them ends {ends:%Y-%m-%d}.")


def _verifies(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


# --- CRLs ---------------------------------------------------------------------------------------------------------


def crl(subject: Subject) -> Verdict:
    """Whether each CRL is current, well before its end, and the same in the database and the broker's folder."""
    found: list[Verdict] = []
    for attempt in range(TRIES):
        found = _crl(subject)
        if not found or attempt == TRIES - 1:
            break
        time.sleep(0.3)  # a pass may be under way between the two
    return together(found, "Every CRL is current, the same in the database and in the broker's folder.")


def _crl(subject: Subject) -> list[Verdict]:
    now, path = subject.clock(), subject.settings.broker_file(CRL_FILE)
    found: list[Verdict] = []
    with subject.snapshot() as tx:
        newest = {issuer.name: store_issuers.get_crl(tx, issuer.id) for issuer in store_issuers.list_issuers(tx)}
        kinds = {issuer.name: issuer.kind for issuer in store_issuers.list_issuers(tx)}
    try:
        in_folder = {item.public_bytes(Encoding.DER) for item in read_crls(path.read_bytes())}
    except (OSError, PortalError) as error:
        said = error.detail if isinstance(error, PortalError) else f"{path} cannot be read: {error.strerror}."
        return [problem(said, "Start the portal, which writes it, then restart the broker.")]
    for name, record in newest.items():
        if record is None:
            found.append(problem(f"{name} has no CRL.", "Start the portal, which makes one."))
            continue
        found += _freshness(name, kinds[name], record, now)
        if kinds[name] == IssuerKind.ISSUING and record.der not in in_folder:
            found.append(
                problem(f"{path} does not hold the newest CRL of {name}, number {record.number}.", "Start the portal.")
            )
    return found


def _freshness(name: str, kind: str, record: CrlRecord, now: datetime) -> list[Verdict]:
    ends = f"ends {record.next_update:%Y-%m-%d %H:%M} UTC"
    left = (record.next_update - now) / (record.next_update - record.this_update)
    if now < record.this_update:
        return [problem(f"The CRL of {name} is not valid yet.", "Set the clock right.")]
    if kind == IssuerKind.ROOT:
        advice = "Bring the root's key back for as long as the portal needs to sign a new one."
        if left <= 0:
            return [problem(f"The CRL of {name} is over: it {ends}.", advice)]
        return [warning(f"The CRL of {name} {ends}.", advice)] if record.next_update - now < SOON else []
    advice = "The portal renews it at half its life while it runs: see its log."
    if left < 1 / 3:
        return [problem(f"The CRL of {name} {ends}, and was not renewed.", advice)]
    return [warning(f"The CRL of {name} {ends}, and should have been renewed.", advice)] if left < 0.45 else []


def crl_served(subject: Subject) -> Verdict:
    """Whether the plain HTTP listener serves the CRLs that the database has."""
    found: list[Verdict] = []
    for attempt in range(TRIES):
        with subject.snapshot() as tx:
            newest = {issuer.name: store_issuers.get_crl(tx, issuer.id) for issuer in store_issuers.list_issuers(tx)}
        found = [
            problem(f"The CRL of {name} that is served is not the newest.", "Restart the portal; see its log.")
            for name, record in newest.items()
            if record is not None and served_crl(subject, name) != record.der
        ]
        if not found or attempt == TRIES - 1:
            break
        time.sleep(0.3)
    return together(found, f"http://{subject.settings.pki_bind} serves the newest.")


# --- Time ---------------------------------------------------------------------------------------------------------


def clock(subject: Subject) -> Verdict:
    """Whether the clock agrees with the portal's, and lies behind nothing that was recorded."""
    found: list[Verdict] = []
    with subject.snapshot() as tx:
        entry = tx.execute(sa.select(sa.func.max(AuditEntry.at))).scalar_one()
        this_update = tx.execute(sa.select(sa.func.max(Crl.this_update))).scalar_one()
    now = subject.clock()
    for what, recorded in (("An audit entry", entry), ("The newest CRL", this_update)):
        if recorded is not None and recorded > now + SLACK:
            found.append(
                problem(
                    f"{what} is of {recorded:%Y-%m-%d %H:%M:%S} UTC, which is yet to come: the clock was set back.",
                    "Set the clock right (NTP); CRLs and certificates are judged by it.",
                )
            )
    compared = "the portal was not asked, it does not answer"
    try:
        served = https_date(subject)
    except (OSError, ValueError):
        served = None
    if served is not None:
        compared = "the portal's clock agrees"
        if abs(served - subject.clock()) > SLACK:
            found.append(
                problem(f"The portal says that it is {served:%Y-%m-%d %H:%M:%S} UTC.", "See why two clocks differ.")
            )
    return together(found, f"It is {now:%Y-%m-%d %H:%M:%S} UTC; {compared}.")


def expiry(subject: Subject) -> Verdict:
    """What ends soon: CAs within 90 days, everything else within 30."""
    now, found = subject.clock(), []
    for issuer in subject.issuers():
        found += _ca_end(issuer, now)
    settings, probes = subject.settings, subject.probe_certificates
    own = {
        "The portal's certificate": settings.tls_dir / "server.pem",
        "The broker's certificate": settings.broker_file(SERVER_CERTIFICATE_FILE),
        "The good probe certificate": probes.good.certificate,
        "The revoked probe certificate": probes.revoked.certificate,
    }
    for what, path in own.items():
        found += _own_end(what, path, now)
    with subject.snapshot() as tx:
        living = (
            Certificate.purpose == "device",
            Certificate.status == CertificateStatus.ACTIVE,
            Certificate.not_after > now,
        )
        soon = tx.execute(
            sa.select(sa.func.count()).select_from(Certificate).where(*living, Certificate.not_after <= now + SOON)
        ).scalar_one()
    if soon:
        found.append(
            warning(f"{soon} device certificates end within 30 days.", "Find them: GET /devices?expires_before=….")
        )
    return together(found, "Nothing ends within 30 days, no CA within 90.")


def _ca_end(issuer: IssuerRecord, now: datetime) -> list[Verdict]:
    said = f"The CA {issuer.name} ends {issuer.not_after:%Y-%m-%d}."
    if issuer.not_after <= now:
        return [problem(said, "Nothing that it has signed is valid any more: make a new CA.")]
    if issuer.not_after - now < CA_SOON:
        return [warning(said, "Plan a new CA (flask --app app ca rollover): its devices' certificates end with it.")]
    return []


def _own_end(what: str, path: Path, now: datetime) -> list[Verdict]:
    try:
        certificate = certificate_of(path)
    except (OSError, ValueError, IndexError):
        return [problem(f"{what} ({path}) cannot be read.", "Start the portal, which makes a new one.")]
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if end <= now:
        return [problem(f"{what} ended {end:%Y-%m-%d}.", "Start the portal, which makes a new one.")]
    # They are renewed at two thirds of their life, within ten minutes; short ones end soon at any time.
    if end - now < SOON and now > start + (end - start) * 2 / 3 + timedelta(hours=1):
        return [warning(f"{what} ends {end:%Y-%m-%d}.", "The portal renews it while it runs: see its log.")]
    return []
