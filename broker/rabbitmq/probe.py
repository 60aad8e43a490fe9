"""Connects to a RabbitMQ node as a device does, and sees whom the node asks, and how long it believes what it was told.

The portal publishes to topics of its own by its good probe certificate, which ``answers.py`` allows to nobody else:
``portal/prove/N`` where the journal has generation N, ``portal/until/T`` before the time T (in ms of the epoch), and
``portal/late/N`` with an answer that comes later than the node may wait for one.
RabbitMQ 3.10 speaks MQTT 3.1.1, in which a message that is refused ends the connection.
"""

from __future__ import annotations

import secrets
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cryptography import x509

from broker.folder import CA_FILE
from broker.probe import Probe, ProbeCertificate
from broker.rabbitmq.answers import LATE, LATE_SECONDS, PROVE, UNTIL
from broker.session import SUCCESS, Session, SessionClosed, remaining
from config import Settings
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from core.rabbitmq_nodes import RabbitmqNode
from pki.client_certificates import common_name

UNTIL_SECONDS = 0.5  # for which what is to be forgotten is true
_PAUSE = 0.05
_ATTEMPT_SECONDS = 2.0  # of the time until a deadline


class NodeStopped(Exception):
    """Nothing listens at the node's address for devices."""


@dataclass(frozen=True, slots=True)
class Believed:
    """What a node was answered about a client id, which was true before ``ends`` (in ms of the epoch).

    The answer came before ``at``, by the monotonic clock. It is believed of this client id alone.
    """

    client_id: str
    ends: int
    at: float


class NodeProbe(Probe):
    """Probes one node."""

    _LEVEL = 4
    _ACCEPTS_REVOKED = (
        "The broker accepts a revoked certificate: see that crl_check and crl_cache of RabbitMQ are as the portal's"
        " advanced.config has them."
    )
    _REFUSES_GOOD = "see that RabbitMQ reaches PORTAL_RABBITMQ_URL, and its log"

    def __init__(self, node: RabbitmqNode, settings: Settings) -> None:
        super().__init__(settings.mqtt_host, (node.mqtt,), settings.broker_file(CA_FILE), settings.probe_ca_files)
        self.node = node

    def listens(self, deadline: float) -> bool:
        """Return whether anything listens at the node's address; raise ``OSError`` if that is not known."""
        try:
            socket.create_connection(self.node.mqtt, timeout=remaining(deadline)).close()
        except ConnectionRefusedError:
            return False
        return True

    def prove(self, good: ProbeCertificate, generation: int, deadline: float) -> Believed:
        """See that the node asks a portal that has ``generation``, and have it believe an answer that is true soon.

        Raise ``NodeStopped``; ``BrokerUnavailable`` if that was not seen by ``deadline``.
        """
        while True:
            own_id = self._client_id(good)
            try:
                with self._as_device(good, own_id, deadline) as session:
                    session.publish(f"{PROVE}/{generation}")
                    ends = _in_ms(UNTIL_SECONDS)
                    session.publish(f"{UNTIL}/{ends}")
                    return Believed(own_id, ends, time.monotonic())
            except OSError as error:
                self._pause(error, deadline)

    def see_forgotten(self, good: ProbeCertificate, believed: Believed, deadline: float) -> bool:
        """See that the node has forgotten an answer, and asks the portal again, which refuses what is true no more.

        Return whether it had at once. Raise ``BrokerNotEnforcing`` if it still believes it, else as ``prove`` does.
        """
        still_believed = False
        while True:
            try:
                with self._as_device(good, believed.client_id, deadline) as session:
                    session.publish(f"{UNTIL}/{_in_ms(UNTIL_SECONDS)}")  # else it might refuse for another reason
                    try:
                        session.publish(f"{UNTIL}/{believed.ends}")
                    except SessionClosed:
                        return not still_believed
                still_believed = True
                self._pause(TimeoutError("no answer in time"), deadline)
            except OSError as error:
                self._pause(error, deadline)
            except BrokerUnavailable as error:
                if not still_believed or isinstance(error, BrokerNotEnforcing):
                    raise
                raise BrokerNotEnforcing(
                    "The broker believes answers for longer than PORTAL_RABBITMQ_CACHE_SECONDS: correct"
                    " auth_cache.cache_ttl of RabbitMQ, and see that the clocks of all nodes of the portal agree."
                ) from error

    def takes_late_answers(self, good: ProbeCertificate, deadline: float) -> bool:
        """Return whether the node waits for an answer for longer than it may; raise as ``prove`` does."""
        while True:
            try:
                with self._as_device(good, self._client_id(good), deadline, LATE_SECONDS) as session:
                    session.publish(f"{UNTIL}/{_in_ms(UNTIL_SECONDS)}")  # else it might refuse for another reason
                    try:
                        session.publish(f"{LATE}/{secrets.randbelow(10**18)}")
                    except SessionClosed:
                        return False
                    return True
            except OSError as error:
                self._pause(error, deadline)

    def _pause(self, error: OSError, deadline: float) -> None:
        """Wait for the next attempt; raise ``BrokerUnavailable`` if there is no time for one."""
        if time.monotonic() + _PAUSE >= deadline:
            raise self._silent(error) from error
        time.sleep(_PAUSE)

    @contextmanager
    def _as_device(
        self, good: ProbeCertificate, client_id: str, deadline: float, more_seconds: float = 0.0
    ) -> Iterator[Session]:
        """Connect as a device; raise ``NodeStopped``, and ``OSError`` if the node does not answer, or refuses that."""
        until = min(deadline, time.monotonic() + _ATTEMPT_SECONDS + more_seconds)
        context = self._context(good)
        try:
            plain = socket.create_connection(self.node.mqtt, timeout=remaining(until))
        except ConnectionRefusedError as error:
            raise NodeStopped from error
        with plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Only the node itself can end the connection so that it counts as an answer.
            with (
                context.wrap_socket(plain, server_hostname=self._host, suppress_ragged_eofs=False) as secure,
                Session(secure, until, level=self._LEVEL) as session,
            ):
                if (reason := session.connect(client_id)) != SUCCESS:
                    raise ConnectionError(f"it refuses a good certificate with MQTT return code {reason}")
                yield session

    def _client_id(self, shown: ProbeCertificate) -> str:
        """Return a client id that only this session has: another one with the same would end it, at any node."""
        with suppress(OSError, ValueError):
            identity = common_name(x509.load_pem_x509_certificate(shown.certificate.read_bytes()))
            return f"{identity}-{secrets.token_hex(8)}"
        return ""

    def _silent(self, error: OSError) -> BrokerUnavailable:
        if isinstance(error, ssl.SSLError) and error.reason:
            said = error.reason
        else:
            said = error.strerror or str(error) or type(error).__name__
        return BrokerUnavailable(f"The broker does not answer at {self.node.mqtt}: {said}.")


def _in_ms(seconds: float) -> int:
    return int((time.time() + seconds) * 1000)
