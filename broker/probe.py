"""Probes the broker on the devices' listener: it must refuse a revoked certificate and accept a good one."""

from __future__ import annotations

import contextlib
import errno
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from broker.ca_certificates import read_cas
from broker.session import Session, remaining
from core.errors import BrokerNotEnforcing, BrokerUnavailable, ProjectionInvalid
from core.setting_values import Address

CERTIFICATE_REVOKED = 44  # TLS alert (RFC 8446 section 6)
ACCEPTS_REVOKED = (
    "The broker accepts a revoked certificate: check that its configuration names crlfile and capath, and that it was"
    " restarted after a file was repaired."
)
_NAME_MISMATCHES = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH of OpenSSL
_OTHER_NAME = (
    "if the name was changed, restart the broker, which shows its new certificate only then; see that the name is"
    " right, which is PORTAL_MQTT_HOST beside the portal, and the host of portal broker update at an agent's broker"
)
_OTHER_CERTIFICATE = "see that it is one of the portal's"
_ALERTS = {
    "HANDSHAKE_FAILURE": 40,
    "BAD_CERTIFICATE": 42,
    "UNSUPPORTED_CERTIFICATE": 43,
    "CERTIFICATE_REVOKED": CERTIFICATE_REVOKED,
    "CERTIFICATE_EXPIRED": 45,
    "CERTIFICATE_UNKNOWN": 46,
    "UNKNOWN_CA": 48,
    "ACCESS_DENIED": 49,
    "DECRYPT_ERROR": 51,
    "CERTIFICATE_REQUIRED": 116,
}


@dataclass(frozen=True, slots=True)
class ProbeCertificate:
    """Paths of a client certificate (PEM, with its chain or not) and its clear private key (PEM, mode 0600)."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class ProbeCertificates:
    """Two certificates of the portal's own: one that the broker must accept, one revoked that it must refuse."""

    good: ProbeCertificate
    revoked: ProbeCertificate


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The TLS alert for the revoked certificate and the CONNACK reason for the good one, each with its seconds."""

    revoked_alert: int
    revoked_seconds: float
    good_reason: int
    good_seconds: float


class Resumption(Enum):
    """By what a client can resume a TLS session with the broker, which then looks into no CRL."""

    NONE = "nothing"
    SESSION_IDS = "session ids of TLS 1.2, for two hours"
    TICKETS = "tickets"


@dataclass(frozen=True, slots=True)
class _Answer:
    """Either a TLS alert (0: one without a known number) or the reason code of CONNACK."""

    alert: int | None
    reason: int | None
    seconds: float


def connect(addresses: Sequence[Address], seconds: float) -> socket.socket:
    """Connect to the first address at which anything listens; raise ``OSError`` of the last one if there is none."""
    for address in addresses[:-1]:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(address, timeout=seconds)
    return socket.create_connection(addresses[-1], timeout=seconds)


class Probe:
    """Asks the broker at the first of ``addresses`` at which anything listens.

    Its certificate must verify under the roots in ``ca_file``, or what those of ``further`` that exist have, for
    ``host``, the name by which devices reach it.
    """

    _LEVEL = 5  # of MQTT
    _ACCEPTS_REVOKED = ACCEPTS_REVOKED
    _REFUSES_GOOD = "check use_identity_as_username in its configuration"

    def __init__(self, host: str, addresses: Sequence[Address], ca_file: Path, further: Sequence[Path] = ()) -> None:
        self._host = host
        self._addresses = addresses
        self._ca_file = ca_file
        self._further = further
        self._contexts: dict[ProbeCertificate, tuple[object, ssl.SSLContext]] = {}
        self._files: dict[Path, tuple[tuple[int, ...], str]] = {}  # what is trusted of each, as it was when last read
        self._lock = threading.Lock()

    def run(self, certificates: ProbeCertificates, deadline: float) -> ProbeResult:
        """Connect with both certificates by ``deadline``; raise ``BrokerNotEnforcing`` or ``BrokerUnavailable``."""
        revoked = self._ask(certificates.revoked, deadline, share=0.5)
        if revoked.alert is None:
            raise BrokerNotEnforcing(self._ACCEPTS_REVOKED)
        if revoked.alert != CERTIFICATE_REVOKED:
            raise BrokerNotEnforcing(
                f"The broker refuses the revoked probe certificate with TLS alert {revoked.alert}, not"
                f" {CERTIFICATE_REVOKED}: its CRL or CA file is not the current one, so it may refuse every device."
            )
        good = self._ask_good(certificates.good, deadline)
        if good.alert is not None or good.reason is None:
            raise BrokerNotEnforcing(
                f"The broker refuses a good certificate with TLS alert {good.alert}: its CRL or CA file is not current."
            )
        if good.reason != 0:
            raise BrokerNotEnforcing(
                f"The broker refuses a good certificate with MQTT reason 0x{good.reason:02x}: {self._REFUSES_GOOD}."
            )
        return ProbeResult(revoked.alert, revoked.seconds, good.reason, good.seconds)

    def server_certificate(self, good: ProbeCertificate, deadline: float) -> bytes:
        """Return the certificate that the broker shows, DER, valid or not; raise ``BrokerUnavailable``."""
        try:
            context = self._new_context(good)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with (
                connect(self._addresses, remaining(deadline)) as plain,
                context.wrap_socket(plain, server_hostname=self._host) as secure,
            ):
                return secure.getpeercert(binary_form=True) or b""
        except OSError as error:
            raise self._silent(error) from error

    def resumption(self, good: ProbeCertificate, deadline: float) -> Resumption:
        """Look by what a client with a good certificate could resume its session; raise ``BrokerUnavailable``."""
        found = Resumption.NONE
        for version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            context = self._new_context(good)
            context.minimum_version = context.maximum_version = version
            session = self._session(context, deadline)
            if session is not None and session.has_ticket:
                return Resumption.TICKETS
            if session is not None and version is ssl.TLSVersion.TLSv1_2 and session.id:
                found = Resumption.SESSION_IDS
        return found

    def _session(self, context: ssl.SSLContext, deadline: float) -> ssl.SSLSession | None:
        """Return what the broker lets a client resume, ``None`` if it does not speak the version of TLS."""
        try:
            with (
                connect(self._addresses, remaining(deadline)) as plain,
                context.wrap_socket(plain, server_hostname=self._host) as secure,
                Session(secure, deadline) as session,
            ):
                session.connect("")  # tickets come before the answer
                return secure.session
        except ssl.SSLError as error:
            if error.reason == "TLSV1_ALERT_PROTOCOL_VERSION":
                return None
            raise BrokerUnavailable(f"The broker refuses a good certificate: {error.reason}.") from error
        except OSError as error:
            raise self._silent(error) from error

    def _silent(self, error: OSError) -> BrokerUnavailable:
        where = " or ".join(map(str, self._addresses))
        return BrokerUnavailable(
            f"The broker does not answer at {where}: {_said(error)}; if it is reached elsewhere from here, set"
            " PORTAL_BROKER_PROBE_ADDRESS."
        )

    def _ask_good(self, good: ProbeCertificate, deadline: float) -> _Answer:
        """Ask at once; only if that fails wait for an alert, which a broker that sends no tickets makes take long."""
        try:
            return self._ask(good, deadline, share=0.0)
        except BrokerUnavailable:
            return self._ask(good, deadline, share=0.1)

    def _ask(self, shown: ProbeCertificate, deadline: float, *, share: float) -> _Answer:
        started = time.monotonic()
        alert = reason = None
        context = self._context(shown)
        try:
            with connect(self._addresses, remaining(deadline)) as plain:
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                plain.settimeout(remaining(deadline))
                try:
                    # A new connection offers no session to resume unless one is passed in; none is.
                    with context.wrap_socket(plain, server_hostname=self._host) as secure:
                        _await_verdict(secure, remaining(deadline) * share)
                        with Session(secure, deadline, level=self._LEVEL) as session:
                            reason = session.connect(self._client_id(shown))
                except ssl.SSLCertVerificationError as error:
                    raise BrokerUnavailable(
                        f"The broker's certificate is refused: {error.verify_message.rstrip('.')};"
                        f" {_OTHER_NAME if error.verify_code in _NAME_MISMATCHES else _OTHER_CERTIFICATE}, and that"
                        " PORTAL_BROKER_PROBE_ADDRESS is the broker's."
                    ) from error
                except ssl.SSLError as error:
                    alert = _alert(error)
                    if alert is None:
                        raise
        except OSError as error:
            raise self._silent(error) from error
        return _Answer(alert, reason, time.monotonic() - started)

    def _client_id(self, shown: ProbeCertificate) -> str:
        """Return the client id of a session by a certificate; empty if the broker is to choose one."""
        return ""

    def _context(self, shown: ProbeCertificate) -> ssl.SSLContext:
        """Return the TLS context for the certificate, kept until its files or the roots change.

        Making one costs a millisecond, and reading a thousand CAs of tenants, which the broker shows none of, many.
        """
        try:
            with self._lock:
                inputs = (_signature(shown.certificate), _signature(shown.key), self._trusted())
                known = self._contexts.get(shown)
                if known is None or known[0] != inputs:
                    known = self._contexts[shown] = (inputs, self._new_context(shown))
                return known[1]
        except OSError as error:
            raise BrokerUnavailable(
                f"The probe certificate {shown.certificate}, its key or {self._ca_file} cannot be read: {_said(error)}."
            ) from error

    def _trusted(self) -> str:
        """Return what the broker's certificate may be verified by, PEM: roots, and all that is in the further files."""
        further = (path for path in self._further if path.exists())
        return "".join([self._read(self._ca_file, _roots), *(self._read(path, bytes.decode) for path in further)])

    def _read(self, path: Path, part: Callable[[bytes], str]) -> str:
        """Return a part of a file; read it only if it has changed."""
        signature = _signature(path)
        seen = self._files.get(path)
        if seen is None or seen[0] != signature:
            seen = self._files[path] = (signature, part(path.read_bytes()))
        return seen[1]

    def _new_context(self, shown: ProbeCertificate) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=self._trusted())
        context.load_cert_chain(shown.certificate, shown.key)
        return context


def _signature(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def _roots(ca_bundle: bytes) -> str:
    try:
        return b"".join(one.pem for one in read_cas(ca_bundle) if one.names_itself).decode()
    except ProjectionInvalid as error:
        raise OSError(errno.EINVAL, error.detail.rstrip(".")) from error


def _await_verdict(secure: ssl.SSLSocket, seconds: float) -> None:
    """Wait until the server has accepted or refused our certificate; raise ``ssl.SSLError`` with its alert.

    In TLS 1.3 the client's handshake ends before the server has checked the client certificate; the next record is
    an alert or session tickets (RFC 8446 section 4.4). Nothing may be sent before: data sent to a closed socket is
    answered with a reset, which destroys the alert. A server that sends no tickets is waited for ``seconds``.
    """
    if secure.version() != "TLSv1.3":
        return
    arrival = select.poll()
    arrival.register(secure, select.POLLIN)
    arrival.poll(seconds * 1000)
    secure.setblocking(False)
    with contextlib.suppress(ssl.SSLWantReadError):  # tickets only
        secure.recv(1)


def _alert(error: ssl.SSLError) -> int | None:
    """Return the number of the TLS alert received, 0 for one not in the table, ``None`` if it was not an alert."""
    name = re.search(r"ALERT_(\w+)", error.reason or "")
    return _ALERTS.get(name[1], 0) if name else None


def _said(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
