"""What every control of a Mosquitto does alike: it ends sessions at the internal listener, and probes the devices'."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from types import MappingProxyType

from broker.folder import CA_FILE, BrokerFolder
from broker.probe import Probe, ProbeCertificates, ProbeResult, Resumption
from broker.session import (
    FAILURE,
    PORTAL_USER,
    SUCCESS,
    Session,
    client_id,
    connect_unix,
    password_refused,
    unavailable,
)
from config import Settings
from core.errors import BrokerUnavailable

log = logging.getLogger("portal.broker")

_DISCONNECTS_IN_FLIGHT = 8  # the broker's queue of connections on a unix socket is 10 long
HEALTH_SECONDS = 1.0


class Mosquitto:
    """One Mosquitto beside the portal; see ``broker.control.BrokerControl``, of which this is the part without files.

    Its ``files`` have the portal's password on the internal listener.
    """

    clears_retained = False
    reads_certificate_at_start = True

    def __init__(self, settings: Settings, files: BrokerFolder) -> None:
        self._settings = settings
        self._folder = files
        ca_file, further = settings.broker_file(CA_FILE), settings.probe_ca_files
        self._probe = Probe(settings.mqtt_host, settings.probe_addresses, ca_file, further)

    def end_sessions(
        self,
        device_ids: Sequence[str],
        deadline: float,
        *,
        revoked: Mapping[str, str] = MappingProxyType({}),
        narrowed: Set[str] = frozenset(),
    ) -> None:
        """Take over each session with clean start (MQTT 5.0 section 3.1.4); see ``broker.control.BrokerControl``."""
        self._end_each(device_ids, deadline, revoked, lambda _: None)

    def _end_each(
        self, device_ids: Sequence[str], deadline: float, revoked: Mapping[str, str], ended: Callable[[str], None]
    ) -> None:
        """End each session; ``ended`` is told of those that are."""
        password = self._folder.password()
        try:
            for start in range(0, len(device_ids), _DISCONNECTS_IN_FLIGHT):
                with ExitStack() as stack:
                    sessions = []
                    for device_id in device_ids[start : start + _DISCONNECTS_IN_FLIGHT]:
                        sock = connect_unix(self._settings.broker_socket, deadline)
                        session = stack.enter_context(Session(sock, deadline))
                        session.send_connect(device_id, PORTAL_USER, password)
                        clears = self.clears_retained and device_id in revoked
                        if clears:
                            session.send_subscribe(f"{revoked[device_id]}/{device_id}/#")
                        sessions.append((session, clears))
                    for session, clears in sessions:
                        if (reason := session.receive_connack()) != SUCCESS:
                            raise BrokerUnavailable(password_refused(reason))
                        if clears and session.receive_suback() >= FAILURE:
                            log.error(
                                "the broker did not clear a revoked device's retained messages: is its guard old?"
                            )
                for device_id in device_ids[start : start + _DISCONNECTS_IN_FLIGHT]:
                    ended(device_id)
        except OSError as error:
            raise unavailable(self._settings, error) from error

    def probe(self, certificates: ProbeCertificates, deadline: float) -> ProbeResult:
        """Check that the broker refuses the revoked certificate; see ``broker.control.BrokerControl``."""
        return self._probe.run(certificates, deadline)

    def server_certificate(self, certificates: ProbeCertificates, deadline: float) -> bytes:
        """Return the certificate that the broker shows, DER, valid or not; raise ``BrokerUnavailable``."""
        return self._probe.server_certificate(certificates.good, deadline)

    def resumption(self, certificates: ProbeCertificates, deadline: float) -> Resumption:
        """Look by what the broker lets a TLS session be resumed; raise ``BrokerUnavailable``."""
        return self._probe.resumption(certificates.good, deadline)

    def forget_tenant(self, name: str, deadline: float) -> None:
        """Do nothing: the sessions of its clients were ended, and nothing else is kept."""

    def nodes(self) -> Mapping[str, bool]:
        """Return none: it is one program."""
        return {}

    def reachable(self) -> bool:
        """Return whether the broker answers the portal on its internal listener within a second."""
        deadline = time.monotonic() + HEALTH_SECONDS
        try:
            with Session(connect_unix(self._settings.broker_socket, deadline), deadline) as session:
                return session.connect(client_id(), PORTAL_USER, self._folder.password()) == SUCCESS
        except (OSError, BrokerUnavailable):
            return False

    def is_stopped(self) -> bool:
        """Return whether certainly no broker runs, and not only one that is slow to answer."""
        try:
            connect_unix(self._settings.broker_socket, time.monotonic() + HEALTH_SECONDS).close()
        except (FileNotFoundError, ConnectionRefusedError):
            return True
        except OSError:
            pass
        return False
