"""Checks over the network: the answers and certificates of the portal's two listeners and the broker's TLS port."""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509

from broker.folder import CA_FILE, SERVER_CERTIFICATE_FILE
from broker.probe import Probe, connect
from broker.rabbitmq.probe import NodeProbe
from config import Settings
from core.broker_control import ControlKind
from core.errors import PortalError
from core.setting_values import Address, is_loopback
from operations.doctor.base import (
    SECONDS,
    Finding,
    Findings,
    Installation,
    certificate_of,
    combine,
    counted,
    problem,
    warning,
    well,
)
from operations.outside_certificates import broker_certificate, https_certificate

_MAX_BYTES = 64 << 20  # a CRL of a million entries has about 40 MB
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - the addresses to connect to for a listener on every address
START_PORTAL = "Start the portal, or see its log."
_RENEW = "Correct the files, or have the certificate issued again; the portal takes it within a minute."
_START_BROKER = "Start the broker, or see its log."


class NotServed(Exception):
    """The plain HTTP listener does not answer; its text is a sentence."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    date: str
    body: bytes


def portal(installation: Installation) -> Finding:
    """Check that the portal is ready (``/readyz``)."""
    try:
        answer = _ask_https(installation, "/readyz")
    except OSError as error:
        return problem(
            f"The portal does not answer at {_listener(installation.settings)}: {_said(error)}.", START_PORTAL
        )
    if answer.status == http.client.OK:
        return well("The portal answers and is ready.")
    try:
        checks = json.loads(answer.body)["checks"]
        failing = ", ".join(f"{check['name']} ({check['code']})" for check in checks if not check["ok"])
    except (ValueError, KeyError, TypeError):
        failing = f"/readyz answers with status {answer.status}"
    return problem(f"The portal is not ready: {failing}.", "The other lines say what to do.")


def front_server(installation: Installation) -> Finding:
    """Check that slow clients on the network meet a front server, which can wait for them."""
    settings = installation.settings
    if settings.faces_network:
        return warning(
            f"Clients on the network reach the portal itself at {settings.bind}, where slow ones hold up all others.",
            "Put nginx in front; see deploy/README.md. Or name the front server in PORTAL_TRUSTED_PROXIES.",
        )
    return well(f"The portal's address is {settings.bind}, where slow clients on the network do not reach it.")


def broker_address(installation: Installation) -> Finding:
    """Check that devices are told an address of the broker that other machines can reach, if they reach the portal."""
    settings = installation.settings
    told, own = settings.broker_addresses[0], urlsplit(settings.public_url).hostname or ""
    if is_loopback(told.host) and not is_loopback(own):
        return warning(
            f"Devices reach the portal at {own}, but are told that the broker is at {told}, their own machine.",
            "Set PORTAL_MQTT_HOST to the broker's name or address, as devices reach it.",
        )
    return well(f"Devices are told that the broker is at {told}.")


def portal_certificate(installation: Installation) -> Finding:
    """Check the portal's server certificate: chain, names, days left, and that it is the one on disk."""
    settings = installation.settings
    outside = https_certificate(settings)
    if outside is not None and (refused := outside.refused()):
        return problem(f"The newest certificate is not in use: {refused}", _RENEW)
    try:
        with _https(installation) as secure:
            der = secure.getpeercert(binary_form=True) or b""
    except ssl.SSLCertVerificationError as error:
        return problem(
            f"The portal's certificate does not verify: {error.verify_message.rstrip('.')}.",
            "Restart the portal; check PORTAL_SERVER_NAMES.",
        )
    except OSError as error:
        return problem(f"The portal does not answer at {_secured(settings)}: {_said(error)}.", START_PORTAL)
    # Those of another issuer may name all hosts of a domain; whether they verify has been seen just now.
    names = settings.server_names if outside is None else ()
    return _check_certificate(installation, der, settings.tls_dir / "server.pem", names, "Restart the portal.")


def certificate_of_broker(installation: Installation) -> Finding:
    """Check the broker's server certificate: chain, names, days left, and that it is the one on disk."""
    settings = installation.settings
    outside = broker_certificate(settings)
    if outside is not None and (refused := outside.refused()):
        return problem(f"The newest certificate is not in use: {refused}", _RENEW)
    context = _context(settings.broker_file(CA_FILE))
    for ca_file in settings.probe_ca_files:
        if ca_file.exists():
            context.load_verify_locations(ca_file)
    shown = installation.probe_certificates.good
    context.load_cert_chain(_readable(shown.certificate), _readable(shown.key))
    where = " or ".join(map(str, settings.probe_addresses))
    try:
        with (
            connect(settings.probe_addresses, SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=settings.mqtt_host) as secure,
        ):
            der = secure.getpeercert(binary_form=True) or b""
    except ssl.SSLCertVerificationError as error:
        return problem(
            f"The broker's certificate does not verify: {error.verify_message.rstrip('.')}.",
            "Set certfile in its configuration to the portal's file; check PORTAL_BROKER_NAMES.",
        )
    except OSError as error:
        return problem(f"The broker does not answer at {where}: {_said(error)}.", _START_BROKER)
    path = settings.broker_file(SERVER_CERTIFICATE_FILE)
    return _check_certificate(
        installation,
        der,
        path,
        settings.broker_names if outside is None else (),
        "Restart the broker at a quiet time before that; check certfile in its configuration.",
    )


def probe(installation: Installation) -> Finding:
    """Check that the broker refuses the revoked probe certificate and accepts the good one; of a cluster each node."""
    settings, found = installation.settings, Findings()
    until = time.monotonic() + max(SECONDS, settings.enforce_timeout)
    alerts = dict[int, None]()
    for one in _probes(settings):
        try:
            alerts[one.run(installation.probe_certificates, until).revoked_alert] = None
        except PortalError as error:
            found.problem(error.detail, "Start the broker, or correct its configuration and restart it.")
    shown = ", ".join(map(str, alerts))
    return combine(found, f"The broker refuses a revoked certificate with TLS alert {shown}, and accepts a good one.")


def _probes(settings: Settings) -> Sequence[Probe]:
    if settings.broker_control is ControlKind.RABBITMQ:
        return [NodeProbe(node, settings) for node in settings.rabbitmq_nodes]
    ca_file, further = settings.broker_file(CA_FILE), settings.probe_ca_files
    return [Probe(settings.mqtt_host, settings.probe_addresses, ca_file, further)]


def https_date(installation: Installation) -> datetime:
    """Return the running portal's time; raise ``OSError`` if it does not answer, ``ValueError`` without a date."""
    return parsedate_to_datetime(_ask_https(installation, "/healthz").date)


def served(installation: Installation, path: str) -> bytes:
    """Return what the plain HTTP listener serves at a path; raise ``NotServed``."""
    bind = installation.settings.pki_bind
    host, port = _target(bind)
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    try:
        return _get(connection, path).body
    except OSError as error:
        raise NotServed(f"The portal does not answer at http://{bind}: {_said(error)}.") from error
    finally:
        connection.close()


# --- Connections ----------------------------------------------------------------------------------------------


def _ask_https(installation: Installation, path: str) -> _Answer:
    """Ask the HTTPS listener; on a Unix socket, where the front server would, in plain HTTP."""
    bind = installation.settings.bind
    with _unix(bind.host) if bind.is_unix else _https(installation) as connected:
        connection = http.client.HTTPConnection("localhost" if bind.is_unix else str(bind), timeout=SECONDS)
        connection.sock = connected
        return _get(connection, path)


def _unix(path: str) -> socket.socket:
    plain = socket.socket(socket.AF_UNIX)
    try:
        plain.settimeout(SECONDS)
        plain.connect(path)
    except BaseException:
        plain.close()
        raise
    return plain


def _listener(settings: Settings) -> str:
    return str(settings.bind) if settings.bind.is_unix else f"https://{settings.bind}"


def _secured(settings: Settings) -> str:
    """Return where TLS ends: at the HTTPS listener, or at the front server of a Unix socket."""
    return settings.public_url if settings.bind.is_unix else f"https://{settings.bind}"


def _https(installation: Installation) -> ssl.SSLSocket:
    settings = installation.settings
    name = urlsplit(settings.public_url).hostname or settings.bind.host
    context = _context(settings.https_ca_file)
    front = urlsplit(settings.public_url)
    target = (front.hostname or "", front.port or 443) if settings.bind.is_unix else _target(settings.bind)
    plain = socket.create_connection(target, timeout=SECONDS)
    try:
        return context.wrap_socket(plain, server_hostname=name)
    except BaseException:
        plain.close()
        raise


def _get(connection: http.client.HTTPConnection, path: str) -> _Answer:
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        return _Answer(response.status, response.headers.get("Date", ""), response.read(_MAX_BYTES))
    except http.client.HTTPException as error:
        raise ConnectionError(f"not an HTTP response ({type(error).__name__})") from error


def _context(ca_file: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(_readable(ca_file))
    return context


def _readable(path: Path) -> Path:
    """Return the path of a file that can be read; else raise ``OSError``, which names it, as those of ssl do not."""
    with path.open("rb"):
        return path


def _target(address: Address) -> tuple[str, int]:
    return _ANY.get(address.host, address.host), address.port


def _check_certificate(
    installation: Installation, der: bytes, path: Path, names: tuple[str, ...], advice: str
) -> Finding:
    certificate = x509.load_der_x509_certificate(der)
    present = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    missing = sorted(set(names) - {str(name.value) for name in present})
    left = certificate.not_valid_after_utc - installation.clock()
    if missing:
        return problem(f"The certificate does not name {', '.join(missing)}.", advice)
    if certificate != certificate_of(path):
        ends = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        return problem(f"The certificate that is served ends at {ends}, and is not the one in {path}.", advice)
    named = f", names {', '.join(names)}," if names else ""
    return well(f"The certificate verifies{named} and has {counted(left.days, 'day', 'days')} left.")


def _said(error: OSError) -> str:
    text = re.sub(r"\s*\(_ssl\.c:\d+\)", "", error.strerror or str(error))
    return text or type(error).__name__
