"""Makes the broker enforce what the portal has decided."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime

from broker.acl import (
    GENERATION_TOPIC,
    PORTAL_USER,
    REFUSED_TOPIC,
    Acl,
)
from broker.files import CA_FILE, BrokerFiles
from broker.probe import Probe, ProbeCertificates, ProbeResult
from broker.session import (
    FAILURE,
    NOT_AUTHORISED,
    SUCCESS,
    Session,
    connect_unix,
    peer_process,
    run_reload_command,
    signal_broker,
)
from config import Settings
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from core.failpoints import failpoint
from core.topics import Topic, is_device_id

_DISCONNECTS_IN_FLIGHT = 8  # the broker's queue of connections on a unix socket is 10 long
_HEALTH_SECONDS = 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
_SIGNAL_AGAIN_SECONDS = 0.1  # a reload takes the broker 4 to 8 ms; a signal that arrives during one may be lost


def _now() -> datetime:
    return datetime.now(UTC)


def add_device_acl(acl: Acl, device_id: str, topics: Sequence[Topic] | None) -> None:
    """Grant the device ``topics``, or the default ones if ``None``, instead of those it had.

    If a topic is not allowed, or cannot be expressed in the ACL's style, the device is denied everything and is listed
    in ``acl.closed``. Raise ``ValueError`` if ``device_id`` is not a canonical UUID.
    """
    acl.grant(device_id, topics)


def remove_device_acl(acl: Acl, device_id: str, at: datetime | None = None) -> None:
    """Deny the device everything: no block in an allow-list, a deny block in an ACL with the pattern.

    With ``at``, the current time, the deny block may be removed once it is old (``Acl.prune``). Raise ``ValueError``
    if ``device_id`` is not a canonical UUID.
    """
    acl.deny(device_id, at)


class BrokerProvisioning:
    """One broker: its ``files``, and how the running process is made to enforce them.

    ``clock`` gives the time at which CRLs must be current. A ``deadline`` is a value of ``time.monotonic``. Methods may
    be called from several threads; ``files.install`` and ``enforce`` from one process at a time.
    """

    def __init__(self, settings: Settings, clock: Callable[[], datetime] = _now) -> None:
        self.files = BrokerFiles(settings, clock)
        self._settings = settings
        self._probe = Probe(settings.mqtt_host, settings.mqtt_port, settings.broker_file(CA_FILE))

    def enforce(self, generation: int, deadline: float, *, reload: bool = False) -> int:
        """Make the running broker load the installed files; return the generation that is then in force.

        That is ``generation``, or a newer one installed meanwhile. Return at once if the generation is in force
        already, unless ``reload`` demands a reload: after a repair that kept the generation, or with a new server
        certificate. Raise ``BrokerUnavailable`` if the broker does not answer or does not load the files by the
        deadline, ``BrokerNotEnforcing`` if it runs without its ACL.
        """
        answered, refused = False, SUCCESS
        while True:
            try:
                sock = connect_unix(self._settings.broker_socket, deadline)
                with Session(sock, deadline) as session:
                    # Any CONNACK, even a refusal, shows that the broker has started: a signal cannot kill it now.
                    reason = session.connect(_client_id(), PORTAL_USER, self.files.password())
                    answered, broker = True, peer_process(sock)
                    if reason == SUCCESS:
                        return self._await_generation(session, broker, generation, deadline, reload=reload)
                    if refused == SUCCESS:  # once: it may hold the password of an older file
                        self._reload(broker, deadline)
                    refused = reason
            except OSError as error:
                if refused != SUCCESS and isinstance(error, TimeoutError):
                    raise BrokerUnavailable(_password_refused(refused)) from error
                # Never answered: give up now. Disconnected after an answer: it may be restarting.
                if not answered or time.monotonic() >= deadline:
                    raise self._unavailable(error) from error
            time.sleep(_LONGEST_PAUSE)

    def disconnect(self, device_ids: Sequence[str], deadline: float) -> None:
        """End the devices' sessions: connections are closed, queues and subscriptions discarded.

        Take over each session with clean start (MQTT 5.0 section 3.1.4); a device without a session is not an error.
        Call it only after ``enforce``, or the broker accepts the device again. Raise ``BrokerUnavailable``.
        """
        for device_id in device_ids:
            if not is_device_id(device_id):
                raise ValueError("a device's id must be a UUID in lower case with hyphens")
        password = self.files.password()
        try:
            for start in range(0, len(device_ids), _DISCONNECTS_IN_FLIGHT):
                with ExitStack() as stack:
                    sessions = []
                    for device_id in device_ids[start : start + _DISCONNECTS_IN_FLIGHT]:
                        sock = connect_unix(self._settings.broker_socket, deadline)
                        session = stack.enter_context(Session(sock, deadline))
                        session.send_connect(device_id, PORTAL_USER, password)
                        sessions.append(session)
                    for session in sessions:
                        if (reason := session.receive_connack()) != SUCCESS:
                            raise BrokerUnavailable(_password_refused(reason))
        except OSError as error:
            raise self._unavailable(error) from error

    def probe(self, certificates: ProbeCertificates, deadline: float) -> ProbeResult:
        """Check that the broker refuses the revoked certificate as revoked, and accepts the good one.

        Raise ``BrokerNotEnforcing`` if it does not, ``BrokerUnavailable`` if it does not answer.
        """
        return self._probe.run(certificates, deadline)

    def reachable(self) -> bool:
        """Return whether the broker answers the portal on its internal listener within a second."""
        deadline = time.monotonic() + _HEALTH_SECONDS
        try:
            with Session(connect_unix(self._settings.broker_socket, deadline), deadline) as session:
                return session.connect(_client_id(), PORTAL_USER, self.files.password()) == SUCCESS
        except (OSError, BrokerUnavailable):
            return False

    def _await_generation(
        self, session: Session, broker: int, generation: int, deadline: float, *, reload: bool
    ) -> int:
        """Signal the broker, then query it repeatedly until the answers show that it has reloaded."""
        if reload:
            self._reload(broker, deadline)
            # The broker looks at its reload flag after each round of packets: at the second answer it has reloaded.
            for _ in range(2):
                session.publish(REFUSED_TOPIC)
        pause, signalled = _FIRST_PAUSE, time.monotonic() if reload else None
        while True:
            newest = max(generation, self.files.installed_generation() or 0)
            allowed = session.publish(f"{GENERATION_TOPIC}/{newest}") < FAILURE
            # A broker that could not read its ACL allows everything, this topic as well.
            open_to_all = allowed and session.publish(REFUSED_TOPIC) != NOT_AUTHORISED
            if allowed and not open_to_all:
                return newest
            if signalled is None or time.monotonic() - signalled >= _SIGNAL_AGAIN_SECONDS:
                self._reload(broker, deadline)
                signalled = time.monotonic()
            else:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            if time.monotonic() >= deadline:
                if open_to_all:
                    raise BrokerNotEnforcing("The broker runs without an ACL: stop it, then repair its ACL file.")
                raise BrokerUnavailable(
                    f"The broker did not load generation {newest} in time: see its log,"
                    " and that acl_file in its configuration names the portal's file."
                )

    def _reload(self, broker: int, deadline: float) -> None:
        failpoint("apply.before_reload")
        if self._settings.broker_reload:
            run_reload_command(self._settings.broker_reload, deadline)
        else:
            signal_broker(self._settings.broker_pid_file, broker)

    def _unavailable(self, error: OSError) -> BrokerUnavailable:
        said = error.strerror or str(error) or type(error).__name__
        return BrokerUnavailable(
            f"The broker's internal listener {self._settings.broker_socket} does not answer: {said};"
            " check that the broker runs with the portal's configuration."
        )


def _client_id() -> str:
    return f"portal-{os.getpid()}-{secrets.token_hex(4)}"


def _password_refused(reason: int) -> str:
    return (
        f"The broker refuses the portal on its internal listener with reason 0x{reason:02x}:"
        " password_file in its configuration must name the portal's file."
    )
