"""Checks over the network: what the portal's two listeners and the broker's TLS port show to a client."""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import time
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509

from broker.files import CA_FILE, SERVER_CERTIFICATE_FILE
from broker.probe import Probe
from config import Address
from core.errors import PortalError
from operations.doctor.findings import Verdict, problem, well
from operations.doctor.subject import SECONDS, Subject, certificate_of

_MOST_BYTES = 64 << 20  # a CRL of a million entries has some 40 MB
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where to ask who listens on every address
_START_PORTAL = "Start the portal, or see its log."
_START_BROKER = "Start the broker, or see its log."


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    date: str
    body: bytes


def portal(subject: Subject) -> Verdict:
    """What the portal says of itself at ``/readyz``."""
    try:
        answer = _ask_https(subject, "/readyz")
    except OSError as error:
        return problem(f"The portal does not answer at https://{subject.settings.bind}: {_said(error)}.", _START_PORTAL)
    if answer.status == http.client.OK:
        return well("It answers and says that it is ready.")
    try:
        checks = json.loads(answer.body)["checks"]
        failing = ", ".join(f"{check['name']} ({check['code']})" for check in checks if not check["ok"])
    except (ValueError, KeyError, TypeError):
        failing = f"it answers with status {answer.status}"
    return problem(f"It is not ready: {failing}.", "The other checks say what to do.")


def portal_certificate(subject: Subject) -> Verdict:
    """The certificate that the portal shows: chain, names, days left, and whether it is the one on disk."""
    settings = subject.settings
    try:
        with _https(subject) as secure:
            der = secure.getpeercert(binary_form=True) or b""
    except ssl.SSLCertVerificationError as error:
        return problem(
            f"The portal's certificate is refused: {error.verify_message}.",
            "Restart the portal; see PORTAL_SERVER_NAMES.",
        )
    except OSError as error:
        return problem(f"The portal does not answer at https://{settings.bind}: {_said(error)}.", _START_PORTAL)
    return _judge(subject, der, settings.tls_dir / "server.pem", settings.server_names, "Restart the portal.")


def broker_certificate(subject: Subject) -> Verdict:
    """The certificate that the broker shows: chain, names, days left, and whether it is the one on disk."""
    settings = subject.settings
    context = _context(settings.broker_file(CA_FILE))
    context.load_cert_chain(subject.probe_certificates.good.certificate, subject.probe_certificates.good.key)
    where = f"{settings.mqtt_host}:{settings.mqtt_port}"
    try:
        with (
            socket.create_connection((settings.mqtt_host, settings.mqtt_port), timeout=SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=settings.mqtt_host) as secure,
        ):
            der = secure.getpeercert(binary_form=True) or b""
    except ssl.SSLCertVerificationError as error:
        return problem(
            f"The broker's certificate is refused: {error.verify_message}.",
            "See that certfile in its configuration names the portal's file, and PORTAL_BROKER_NAMES.",
        )
    except OSError as error:
        return problem(f"The broker does not answer at {where}: {_said(error)}.", _START_BROKER)
    path = settings.broker_file(SERVER_CERTIFICATE_FILE)
    return _judge(subject, der, path, settings.broker_names, "Reload the broker; see certfile in its configuration.")


def canaries(subject: Subject) -> Verdict:
    """Whether the broker refuses the revoked test certificate and lets the good one in."""
    settings = subject.settings
    probe = Probe(settings.mqtt_host, settings.mqtt_port, settings.broker_file(CA_FILE))
    try:
        seen = probe.run(subject.probe_certificates, time.monotonic() + max(SECONDS, settings.enforce_timeout))
    except PortalError as error:
        return problem(error.detail, "")
    return well(
        f"The broker refuses a revoked certificate with TLS alert {seen.revoked_alert}, and lets a good one in."
    )


def https_date(subject: Subject) -> datetime:
    """The portal's own time; raises ``OSError`` where it does not answer, ``ValueError`` where it says none."""
    return parsedate_to_datetime(_ask_https(subject, "/healthz").date)


def served_crl(subject: Subject, name: str) -> bytes:
    """A CRL as the plain HTTP listener serves it; raises ``OSError``."""
    return served(subject, f"/crl/{name}.crl")


def served(subject: Subject, path: str) -> bytes:
    """What the plain HTTP listener serves at a path; raises ``OSError``."""
    host, port = _reached(subject.settings.pki_bind)
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    try:
        return _get(connection, path).body
    finally:
        connection.close()


# --- How it is asked ----------------------------------------------------------------------------------------------


def _ask_https(subject: Subject, path: str) -> _Answer:
    with _https(subject) as secure:
        connection = http.client.HTTPConnection(str(subject.settings.bind), timeout=SECONDS)
        connection.sock = secure
        return _get(connection, path)


def _https(subject: Subject) -> ssl.SSLSocket:
    settings = subject.settings
    name = urlsplit(settings.public_url).hostname or settings.bind.host
    context = _context(settings.data_dir / "ca.pem")
    plain = socket.create_connection(_reached(settings.bind), timeout=SECONDS)
    try:
        return context.wrap_socket(plain, server_hostname=name)
    except BaseException:
        plain.close()
        raise


def _get(connection: http.client.HTTPConnection, path: str) -> _Answer:
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        return _Answer(response.status, response.headers.get("Date", ""), response.read(_MOST_BYTES))
    except http.client.HTTPException as error:
        raise ConnectionError(f"no answer in HTTP ({type(error).__name__})") from error


def _context(ca_file: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(ca_file)
    return context


def _reached(address: Address) -> tuple[str, int]:
    return _ANY.get(address.host, address.host), address.port


def _judge(subject: Subject, der: bytes, path: Path, names: tuple[str, ...], advice: str) -> Verdict:
    certificate = x509.load_der_x509_certificate(der)
    present = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    missing = sorted(set(names) - {str(name.value) for name in present})
    left = certificate.not_valid_after_utc - subject.clock()
    if missing:
        return problem(f"The certificate does not name {', '.join(missing)}.", advice)
    if certificate != certificate_of(path):
        return problem(f"The certificate shown is not the one in {path}.", advice)
    return well(f"It verifies, names {', '.join(names)}, and has {left.days} days left.")


def _said(error: OSError) -> str:
    text = re.sub(r"\s*\(_ssl\.c:\d+\)", "", error.strerror or str(error))
    return text or type(error).__name__
