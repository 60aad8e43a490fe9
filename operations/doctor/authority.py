"""Checks of the certificate authority: chain, CRLs, OCSP, the clock, what expires soon."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.ocsp import OCSPCertStatus, OCSPRequestBuilder, OCSPResponseStatus

from broker.crl import read_crls
from broker.folder import CA_FILE, CRL_FILE, SERVER_CERTIFICATE_FILE
from core.broker_control import ControlKind
from core.errors import IssuerUnusable, PortalError
from core.server_command import client_command, server_command
from core.states import ClientKind, IssuerKind
from operations.doctor.base import (
    Finding,
    Findings,
    Installation,
    certificate_of,
    combine,
    counted,
    problem,
    summarize,
    warning,
    well,
)
from operations.doctor.network import START_PORTAL, NotServed, https_date, served
from operations.outside_certificates import https_certificate, outside_certificates
from pki import ocsp as pki_ocsp
from pki.issuers import CLOCK_SKEW, Issuer
from pki.outer_chain import decode_above
from store import issuers as store_issuers
from store.counts import counts_of, total
from store.issuers import CrlRecord, IssuerRecord
from store.tables import AuditEntry, Crl
from workflows.authority.issuers import trusted_certificates, url_name

SOON = timedelta(days=30)
CA_SOON = timedelta(days=90)  # long enough to give all devices certificates of another CA
SLACK = timedelta(seconds=60)  # tolerated between two clocks, or a record and its check
TRIES = 4  # when two places are compared that change one after the other
_START_RESPONDER = "Start the portal, which issues a new one within a minute; otherwise see its log."
_RESPONDER_LATE = timedelta(hours=1)


def ca_chain(installation: Installation) -> Finding:
    """Check that root and issuing CAs verify (RFC 5280 section 6), and that the files of CAs are up to date."""
    now, issuers = installation.clock(), installation.issuers()
    roots = [x509.load_der_x509_certificate(issuer.der) for issuer in issuers if issuer.kind == IssuerKind.ROOT]
    roots_of = {root.subject: [root] for root in roots}
    found, ends = Findings(), []
    for record in issuers:
        certificate = x509.load_der_x509_certificate(record.der)
        above = decode_above(record.above) or roots_of.get(certificate.issuer, [])
        try:
            # Constraints, key usage and key identifier are checked, too.
            issuer = Issuer(record.name, certificate, above=decode_above(record.above))
            chain = (issuer.certificate, *issuer.above)
            if not all(map(_verifies, chain, chain[1:])) or not any(_verifies(chain[-1], root) for root in above):
                found.problem(f"{record.name} is not signed by the root.", "Restore a backup of the database.")
        except PortalError as error:
            found.problem(error.detail, "Restore a backup of the database.")
            continue
        ends.append(issuer.not_after)
        if not issuer.not_before <= now < issuer.not_after:
            found.problem(
                f"{record.name} is not valid now.",
                f"Set the clock, or create a new CA: {server_command('ca rollover')}.",
            )
    expected = set(trusted_certificates(issuers))
    settings = installation.settings
    paths = [settings.data_dir / "ca.pem", *([settings.broker_file(CA_FILE)] if settings.has_broker else [])]
    for path in paths:
        try:
            there = set(x509.load_pem_x509_certificates(path.read_bytes()))
        except (OSError, ValueError):
            there = set()
        if there != expected:
            found.problem(f"{path} does not contain exactly the CAs to trust.", "Restart the portal, which writes it.")
    names = summarize([issuer.name for issuer in issuers])
    return combine(found, f"{names} verify; the first expires {min(ends, default=now):%Y-%m-%d}.")


def _verifies(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


# --- CRLs ---------------------------------------------------------------------------------------------------------


def crl(installation: Installation) -> Finding:
    """Check that each CRL is renewed in time, and the same in the database and the broker's folder."""
    found = _settled(lambda: _crl(installation))
    same = ", and the same in the database and in the broker's folder" if installation.settings.has_broker else ""
    return combine(found, f"Every CRL is current{same}.")


def _settled(look: Callable[[], list[Finding]]) -> list[Finding]:
    """Look again for a while as long as there are findings: a reconciliation may be running between two places."""
    for _ in range(TRIES - 1):
        if not (found := look()):
            return found
        time.sleep(0.3)
    return look()


def _crl(installation: Installation) -> list[Finding]:
    now, settings = installation.clock(), installation.settings
    path, has_broker = settings.broker_file(CRL_FILE), settings.has_broker
    found = Findings()
    with installation.snapshot() as tx:
        newest = {issuer.name: store_issuers.get_crl(tx, issuer.id) for issuer in store_issuers.list_issuers(tx)}
        kinds = {issuer.name: issuer.kind for issuer in store_issuers.list_issuers(tx)}
    try:
        in_folder = {item.der for item in read_crls(path.read_bytes())} if has_broker else set()
    except (OSError, PortalError) as error:
        said = error.detail if isinstance(error, PortalError) else f"{path} cannot be read: {error.strerror}."
        return [problem(said, "Start the portal, which writes it, then restart the broker.")]
    for name, record in newest.items():
        if record is None:
            found.problem(f"{name} has no CRL.", "Start the portal, which signs one.")
            continue
        found += _freshness(name, kinds[name], record, now)
        is_missing = has_broker and kinds[name] == IssuerKind.ISSUING and record.der not in in_folder
        if is_missing and not _follows(installation, record):
            found.problem(
                f"{path} does not contain the newest CRL of {name}, number {record.number}.", "Start the portal."
            )
    return found


def _follows(installation: Installation, record: CrlRecord) -> bool:
    """Return whether a CRL that was just signed may not be in the folder yet: under the guard it waits for others."""
    guarded = installation.settings.broker_control is ControlKind.GUARD
    return guarded and installation.clock() - (record.this_update + CLOCK_SKEW) < SLACK


def _freshness(name: str, kind: str, record: CrlRecord, now: datetime) -> list[Finding]:
    ends = f"expires {record.next_update:%Y-%m-%d %H:%M} UTC"
    left = (record.next_update - now) / (record.next_update - record.this_update)
    if now < record.this_update:
        return [problem(f"The CRL of {name} is not valid yet.", "Set the clock (NTP).")]
    if kind == IssuerKind.ROOT:
        advice = "Put the root's key back into the CA folder until the portal has signed a new CRL."
        if left <= 0:
            return [problem(f"The CRL of {name} has expired: it {ends}.", advice)]
        return [warning(f"The CRL of {name} {ends}.", advice)] if record.next_update - now < SOON else []
    advice = "A running portal renews it at half its lifetime: see its log."
    if left < 1 / 3:
        return [problem(f"The CRL of {name} {ends}, and was not renewed.", advice)]
    return [warning(f"The CRL of {name} {ends}, and should have been renewed.", advice)] if left < 0.45 else []


def crl_served(installation: Installation) -> Finding:
    """Check that the plain HTTP listener serves the newest CRLs of the database."""
    try:
        found = _settled(lambda: _crl_served(installation))
    except NotServed as error:
        return problem(str(error), START_PORTAL)
    return combine(found, f"http://{installation.settings.pki_bind} serves the newest CRLs.")


def _crl_served(installation: Installation) -> list[Finding]:
    with installation.snapshot() as tx:
        newest = [(issuer, store_issuers.get_crl(tx, issuer.id)) for issuer in store_issuers.list_issuers(tx)]
    return [
        problem(
            f"The CRL of {issuer.name} that the portal serves is not the newest.", "Restart the portal; see its log."
        )
        for issuer, record in newest
        if record is not None and served(installation, f"/crl/{url_name(issuer)}.crl") != record.der
    ]


# --- OCSP -------------------------------------------------------------------------------------------------------------


def ocsp_responders(installation: Installation) -> Finding:
    """Check that each issuing CA has an OCSP responder certificate that is renewed in time (RFC 6960).

    Those of other tenants than the first are issued when somebody asks.
    """
    now, found = installation.clock(), Findings()
    for record in installation.issuers():
        if record.kind == IssuerKind.ROOT or record.tenant_id != installation.first_tenant:
            continue
        path = installation.settings.ocsp_dir / f"{record.name}.pem"
        try:
            issuer = Issuer(record.name, x509.load_der_x509_certificate(record.der))
            signer = pki_ocsp.open_signer(path.read_bytes(), issuer)
        except OSError as error:
            found.problem(f"{path} cannot be read ({error.strerror}).", _START_RESPONDER)
            continue
        except IssuerUnusable as error:
            found.problem(error.detail, _START_RESPONDER)
            continue
        said = f"The OCSP responder of {record.name} expires {signer.not_after:%Y-%m-%d %H:%M} UTC"
        if not signer.not_before <= now < signer.not_after:
            found.problem(f"{said}, so it is not valid now.", _START_RESPONDER)
        elif now > signer.not_before + (signer.not_after - signer.not_before) * 2 / 3 + _RESPONDER_LATE:
            found.warning(f"{said}, and should have been renewed.", "A running portal renews it: see its log.")
    return combine(found, "Each issuing CA has an OCSP responder that is renewed in time.")


def ocsp_served(installation: Installation) -> Finding:
    """Check the signed OCSP responses of the plain HTTP listener about the two probe certificates (RFC 6960).

    A portal without a broker beside it has none, and is asked about its own certificate.
    """
    found = Findings()
    settings = installation.settings
    asked = [(settings.tls_dir / "server.pem", "portal's certificate", OCSPCertStatus.GOOD)]
    if settings.has_broker:
        probes = installation.probe_certificates
        asked = [
            (probes.good.certificate, "good probe certificate", OCSPCertStatus.GOOD),
            (probes.revoked.certificate, "revoked probe certificate", OCSPCertStatus.REVOKED),
        ]
    elif https_certificate(settings) is not None:
        return well("The portal has no certificate of its own CA to ask about.")
    for path, name, expected in asked:
        certificate, issuer = x509.load_pem_x509_certificates(path.read_bytes())[:2]
        request = OCSPRequestBuilder().add_certificate(certificate, issuer, SHA256()).build()
        text = quote(base64.b64encode(request.public_bytes(Encoding.DER)).decode(), safe="")
        try:
            response = served(installation, f"/ocsp/{text}")
        except NotServed as error:
            return problem(str(error), START_PORTAL)
        problem_seen = _problem_of_response(response, certificate, issuer, expected, installation)
        if problem_seen is not None:
            found.problem(f"Asked about the {name}, {problem_seen}.", "Restart the portal; see its log.")
    url = f"http://{settings.pki_bind}/ocsp"
    if not settings.has_broker:
        return combine(found, f"{url} says that the portal's certificate is good.")
    return combine(found, f"{url} tells the good probe certificate from the revoked one.")


def _problem_of_response(
    der: bytes,
    certificate: x509.Certificate,
    issuer: x509.Certificate,
    expected: OCSPCertStatus,
    installation: Installation,
) -> str | None:
    try:
        answer = ocsp.load_der_ocsp_response(der)
    except ValueError:
        return "the portal does not send an OCSP response"
    if answer.response_status is not OCSPResponseStatus.SUCCESSFUL:
        return f"the portal answers {answer.response_status.name.lower()}"
    try:
        responder = answer.certificates[0]
        responder.verify_directly_issued_by(issuer)
        key = responder.public_key()
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(answer.signature, answer.tbs_response_bytes, ec.ECDSA(SHA256()))
    except (IndexError, ValueError, TypeError, InvalidSignature):
        return "the response is not signed by a responder of the CA"
    if answer.serial_number != certificate.serial_number or answer.certificate_status is not expected:
        return f"the portal says {answer.certificate_status.name.lower()}, not {expected.name.lower()}"
    if answer.next_update_utc is None or answer.next_update_utc <= installation.clock():
        return "the response has expired"
    return None


# --- Time ---------------------------------------------------------------------------------------------------------


def clock(installation: Installation) -> Finding:
    """Check that the clock agrees with the running portal's, and is not behind a recorded time."""
    found = Findings()
    with installation.snapshot() as tx:
        entry = tx.execute(sa.select(sa.func.max(AuditEntry.at))).scalar_one()
        this_update = tx.execute(sa.select(sa.func.max(Crl.this_update))).scalar_one()
    now = installation.clock()
    for what, recorded in (("An audit entry", entry), ("The newest CRL", this_update)):
        if recorded is not None and recorded > now + SLACK:
            found.problem(
                f"{what} is dated {recorded:%Y-%m-%d %H:%M:%S} UTC, in the future: the clock was set back.",
                "Set the clock (NTP); the validity of CRLs and certificates depends on it.",
            )
    compared = "the portal does not answer, so its clock was not compared"
    try:
        served_date = https_date(installation)
    except (OSError, ValueError):
        served_date = None
    if served_date is not None:
        compared = "the portal's clock agrees"
        if abs(served_date - installation.clock()) > SLACK:
            found.problem(f"The portal says that it is {served_date:%Y-%m-%d %H:%M:%S} UTC.", "Set both clocks (NTP).")
    return combine(found, f"It is {now:%Y-%m-%d %H:%M:%S} UTC; {compared}.")


def expiry(installation: Installation) -> Finding:
    """Find what expires soon: CAs within 90 days, everything else within 30."""
    now, found = installation.clock(), Findings()
    for issuer in installation.issuers():
        found += _ca_expiry(issuer, now)
    settings, probes = installation.settings, installation.probe_certificates
    own = {"The portal's certificate": settings.tls_dir / "server.pem"}
    own |= (
        {}
        if not settings.has_broker
        else {
            "The broker's certificate": settings.broker_file(SERVER_CERTIFICATE_FILE),
            "The good probe certificate": probes.good.certificate,
            "The revoked probe certificate": probes.revoked.certificate,
        }
    )
    outside = [path for one in outside_certificates(settings) for path in one.installed]
    for what, path in own.items():
        found += _own_expiry(what, path, now, by_portal=path not in outside)
    with installation.snapshot() as tx:
        soon = total(counts_of(tx, now=now, within=[SOON]).values()).expiring
    for kind, words in (ClientKind.DEVICE, "list"), (ClientKind.APPLICATION, "application list"):
        if (count := soon[kind, SOON]) > 0:
            found.warning(
                f"{counted(count, f'{kind} certificate expires', f'{kind} certificates expire')} within 30 days.",
                f"List them: {client_command(f'{words} --expires-before 30d')}.",
            )
    return combine(found, "Nothing expires within 30 days, no CA within 90.")


def _ca_expiry(issuer: IssuerRecord, now: datetime) -> list[Finding]:
    said = f"The CA {issuer.name} expires {issuer.not_after:%Y-%m-%d}."
    if issuer.not_after <= now:
        return [
            problem(
                said, f"Nothing that it signed is valid any more: create a new CA ({server_command('ca rollover')})."
            )
        ]
    if issuer.not_after - now < CA_SOON:
        return [
            warning(
                said, f"Plan a new CA ({server_command('ca rollover')}): certificates of its devices expire with it."
            )
        ]
    return []


def _own_expiry(what: str, path: Path, now: datetime, *, by_portal: bool) -> list[Finding]:
    again = "Start the portal, which issues a new one." if by_portal else "Renew it; the portal then takes it."
    try:
        certificate = certificate_of(path)
    except (OSError, ValueError, IndexError):
        return [problem(f"{what} ({path}) cannot be read.", again)]
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if end <= now:
        return [problem(f"{what} expired {end:%Y-%m-%d}.", again)]
    # The portal renews at two thirds of their lifetime, within ten minutes; short ones always expire soon. Others are
    # given half of what is left then.
    late = (end - start) * 2 / 3 + timedelta(hours=1) if by_portal else (end - start) * 5 / 6
    if end - now < SOON and now > start + late:
        return [
            warning(
                f"{what} expires {end:%Y-%m-%d}.", "A running portal renews it: see its log." if by_portal else again
            )
        ]
    return []
