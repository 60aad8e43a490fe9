"""The control by the guard: a plugin in the broker that follows the portal's journal, and proves how far it has."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

from broker.control import PresenceReports, RestartReason
from broker.crl import Trust
from broker.folder import CRLS_READ
from broker.guard.ended import EndedSessions
from broker.guard.folder import GuardFiles
from broker.guard.journal import Position, read_position
from broker.guard.presence import GuardReports
from broker.guard.writing import JournalControl, whole_number
from broker.mosquitto import Mosquitto
from broker.probe import ProbeCertificate, Resumption
from broker.process import started_at
from broker.session import (
    FAILURE,
    NOT_AUTHORISED,
    PORTAL_USER,
    SUCCESS,
    Session,
    client_id,
    connect_unix,
    unavailable,
)
from config import Settings
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from core.failpoints import failpoint

TOPIC = "portal/guard"  # below it the portal asks the guard; the answer is the reason code of PUBACK
GUARD_VERSION = 2  # of the protocol with the plugin, which may speak a later one, too
TENANTS_VERSION = 3  # that of a plugin which knows tenants
NEWS_VERSION = 4  # that of a plugin which reads what is new in the journal before it refuses somebody

# Each CRL that the broker takes in stays in its memory until it ends, 0.2 MB for 1,000 entries, and the guard refuses
# revoked certificates anyway: so they come in batches, a long one every few minutes, a short one after seconds, or
# after many changes, but not before a long one has become a tenth longer (72 bytes and two changes a revocation).
CRL_SECONDS = 180.0
CRL_BYTES_A_SECOND = 300
CRL_CHANGES, CRL_BYTES_A_CHANGE = 100, 360
# It takes four times their size in PEM. The more it has, the longer are the pauses, and at last it has to be restarted.
SOME_CRL_BYTES, MORE_CRL_BYTES_A_SECOND, MAX_CRL_BYTES = 25 << 20, 1000, 150 << 20

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
_REASON_SECONDS = 0.5  # to ask, after the deadline, why there is no proof
_MANY_SESSIONS = 1000  # more of them may take longer than a pass has time
_LOOK_SECONDS = 1.0  # to ask whether the guard knows tenants


@dataclass(frozen=True, slots=True)
class _Guard:
    """The guard of the broker that was started then, and the newest version that it is known to speak."""

    started: float
    version: int


class GuardControl(JournalControl, Mosquitto):
    """Appends changes to the journal, and asks the guard over the internal listener whether they are in force."""

    def __init__(self, settings: Settings, clock: Callable[[], datetime]) -> None:
        JournalControl.__init__(self, settings, GuardFiles(settings, clock), clock)
        Mosquitto.__init__(self, settings, self.files)
        # What this process has seen of the guard by itself, and the epoch in which that has proven something last.
        self._seen = _Guard(0.0, 0)
        self._epoch_in_force = 0
        self._ended, self._ended_at = EndedSessions(self.files.journal), 0.0

    # --- CRLs

    def give_crls(
        self, trust: Trust, position: Position, before: Mapping[str, Any], *, urgent: bool
    ) -> tuple[bool, Mapping[str, Any]]:
        """Publish the CRLs if it is time; see ``JournalControl``."""
        due = urgent or self._is_crl_due(position, before, len(trust.crl))
        published = due and self.files.publish(trust)
        failpoint("guard.crl_published")
        return published, {
            "crl_seq": position.seq if due else before.get("crl_seq", 0),
            "crl_at": self._now() if due else before.get("crl_at", 0),
            **(self.files.with_crls_read(trust) if published else {CRLS_READ: self.files.stated().get(CRLS_READ)}),
        }

    @property
    def crls_are_due(self) -> bool:
        """Whether CRLs were put off, and their pause is over; see ``broker.control.BrokerControl``."""
        stated, position = self.files.stated(), self.files.position()
        if position is None or position.seq <= whole_number(stated.get("crl_seq")):
            return False
        return self._is_crl_due(position, stated, self.files.crl_size())

    def _is_crl_due(self, position: Position, before: Mapping[str, Any], size: int) -> bool:
        since = self._now() - whole_number(before.get("crl_at"))
        pause = min(CRL_SECONDS, size / CRL_BYTES_A_SECOND)
        pause = max(pause, (self.files.crl_bytes() - SOME_CRL_BYTES) / MORE_CRL_BYTES_A_SECOND)
        changes = max(CRL_CHANGES, size / CRL_BYTES_A_CHANGE)
        return not 0 <= since < pause or position.seq - whole_number(before.get("crl_seq")) >= changes

    def knows_tenants(self, deadline: float) -> bool:
        """Return whether the guard in the broker knows tenants; see ``broker.control.BrokerControl``."""
        guard = self._guard()
        if guard.version < TENANTS_VERSION:
            with self._session(deadline) as session:
                if session.publish(f"{TOPIC}/version/{TENANTS_VERSION}") < FAILURE:
                    self._seen = guard = replace(guard, version=TENANTS_VERSION)
        return guard.version >= TENANTS_VERSION

    def _guard(self) -> _Guard:
        """Return what was seen of the guard in the broker that runs: one that was started since may have another."""
        started = started_at(self._settings)
        return self._seen if self._seen.started == started else _Guard(started, 0)

    def _forget_guard(self) -> None:
        """Believe nothing of the guard until it has proven something again."""
        self._seen, self._epoch_in_force = _Guard(0.0, 0), 0

    def grants_up_to(self) -> int | None:
        """Return the generation of the journal, if the guard reads what is new there before it refuses anybody.

        It follows a journal of a new epoch once it has proven that.
        """
        if self._guard().version < NEWS_VERSION:
            return None
        position = self.files.position()
        return position.generation if position is not None and position.epoch == self._epoch_in_force else None

    def check_knows_tenants(self) -> None:
        """Raise ``BrokerNotEnforcing`` if the broker runs with a guard that would take a tenant's line for damage.

        One that does not run reads the journal at its start. Raise ``BrokerUnavailable`` if it does not answer.
        """
        try:
            connect_unix(self._settings.broker_socket, time.monotonic() + _LOOK_SECONDS).close()
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except OSError as error:
            raise unavailable(self._settings, error) from error
        if not self.knows_tenants(time.monotonic() + _LOOK_SECONDS):
            raise _other_version(TENANTS_VERSION)

    publishes_crls = True
    clears_retained = True

    def end_sessions(
        self,
        device_ids: Sequence[str],
        deadline: float,
        *,
        revoked: Mapping[str, str] = MappingProxyType({}),
        narrowed: Set[str] = frozenset(),
    ) -> None:
        """End sessions; of very many, a pass ends those that the one before had no time for.

        See ``broker.control.BrokerControl``.
        """
        if len(device_ids) <= _MANY_SESSIONS:
            self._end_each(device_ids, deadline, revoked, lambda _: None)
            return
        started = started_at(self._settings)
        if started != self._ended_at:  # one that ended badly may have read older sessions from its disk
            self._ended, self._ended_at = EndedSessions(self.files.journal), started
        left, done = self._ended.left(device_ids), 0

        def ended(device_id: str) -> None:
            nonlocal done
            self._ended.add(device_id)
            done += 1

        try:
            self._end_each(left, deadline, revoked, ended)
        except BrokerUnavailable as error:
            if done == 0:
                raise
            raise BrokerUnavailable(
                f"{len(left) - done} sessions of {len(device_ids)} are still to be ended."
            ) from error

    def check_filter(self, text: str) -> None:
        """Do nothing: the guard grants every one."""

    def publish_crls(self, trust: Trust, *, at_once: bool = False) -> bool:
        """Write the CRLs for the next start, and publish them if it is time; see ``broker.control.BrokerControl``."""
        stated, position = self.files.stated(), self.files.position()
        if position is None or position.epoch != stated.get("epoch") or self.files.damage():
            return False  # it is repaired by an installation
        if position.generation < whole_number(stated.get("generation")):
            return False
        self.files.check_trust(position.generation, trust)
        due = at_once or self._is_crl_due(position, stated, len(trust.crl))
        if due:
            stated = {**stated, "crl_at": self._now(), "crl_seq": position.seq}
        if published := due and self.files.publish(trust):
            stated = {**stated, **self.files.with_crls_read(trust)}
        self.files.install(position.generation, trust, {**stated, "seq": position.seq})
        return published

    # --- Asking

    def enforce(
        self, generation: int, deadline: float, *, refused: str | None = None, shows: ProbeCertificate | None = None
    ) -> int:
        """Return once the guard has proven that the journal is in force; see ``broker.control.BrokerControl``."""
        position = self.files.position()
        if position is None or position.generation < generation:
            self._distrusted = True
            raise BrokerUnavailable(f"{self.files.journal} is not what the portal wrote; it is written again.")
        try:
            try:
                self._ask(position, refused, deadline)
            except ConnectionResetError:  # seen once in some thousand new connections of a Mosquitto that went on
                self._ask(position, refused, deadline)
        except OSError as error:
            self._forget_guard()
            raise unavailable(self._settings, error) from error
        except BrokerUnavailable:
            self._forget_guard()
            raise
        self._epoch_in_force = position.epoch
        return position.generation

    def waits(self, deadline: float) -> RestartReason | None:
        """Return whether the broker has been given too many CRLs; all else the guard reads by itself."""
        return RestartReason.CRLS if self.files.crl_bytes() > MAX_CRL_BYTES else None

    def check_resumption(self, generation: int, how: Callable[[], Resumption]) -> None:
        """Do nothing: the guard sees the certificate of a resumed session, too."""

    def _ask(self, position: Position, refused: str | None, deadline: float) -> None:
        guard = self._guard()  # before it is connected to, so that a start after this is seen
        with Session(connect_unix(self._settings.broker_socket, deadline), deadline + _REASON_SECONDS) as session:
            self._seen = self._prove(session, guard, position, refused, deadline)

    def _prove(
        self, session: Session, guard: _Guard, position: Position, refused: str | None, deadline: float
    ) -> _Guard:
        """Ask all at once, and make the journal durable meanwhile; return what is known of the guard then.

        If the guard is not so far yet, wait for it, and ask for the ``refused`` identity again.
        """
        identify = [f"{TOPIC}/identify/{refused}"] if refused is not None else []
        session.send_connect(client_id(), PORTAL_USER, self.files.password())
        asked = [f"{TOPIC}/refused", f"{TOPIC}/prove/{position.epoch}/{position.seq}", *identify]
        versions = [version for version in (GUARD_VERSION, NEWS_VERSION) if version > guard.version]
        asked.extend(f"{TOPIC}/version/{version}" for version in versions)
        sent: list[bytes] = []
        with contextlib.suppress(ConnectionError):  # if the broker has refused CONNECT, its answer is still there
            sent = [session.send_publish(topic) for topic in asked]
        self._sync()
        self._check_login(session.receive_connack())
        if not sent:
            raise ConnectionError("the broker closed the connection")
        loaded, proven, *answers = map(session.receive_puback, sent)
        _check_loaded(loaded)
        allowed, spoken = answers[: len(identify)], answers[len(identify) :]
        for version, answer in zip(versions, spoken, strict=True):
            if answer < FAILURE:
                guard = replace(guard, version=version)
        if guard.version < GUARD_VERSION:
            raise _other_version()
        if proven >= FAILURE:
            self._forget_guard()  # it reads the journal when it is asked, so it does not follow this one
            self._await(session, position, deadline)
            allowed = [session.publish(topic) for topic in identify]
        if any(answer != NOT_AUTHORISED for answer in allowed):
            raise BrokerNotEnforcing(
                f"The guard in the broker allows {refused}, the portal's probe, which is denied: see its log."
            )
        return guard

    def check(self, deadline: float) -> int:
        """Return the generation that the guard proves to be in force; it changes nothing.

        Raise ``BrokerNotEnforcing`` if there is no proof, ``BrokerUnavailable`` if the broker does not answer.
        """
        position = read_position(self.files.journal)
        with self._session(deadline) as session:
            wanted = self._wanted_version(position)
            if session.publish(f"{TOPIC}/version/{wanted}") >= FAILURE:
                raise _other_version(wanted)
            if session.publish(f"{TOPIC}/prove/{position.epoch}/{position.seq}") >= FAILURE:
                raise BrokerNotEnforcing(
                    f"The guard in the broker does not follow {self.files.journal}: see the broker's log."
                )
        return position.generation

    @contextlib.contextmanager
    def _session(self, deadline: float) -> Iterator[Session]:
        """Connect to a broker with the guard; raise ``BrokerNotEnforcing`` if it has none, ``BrokerUnavailable``."""
        try:
            with Session(connect_unix(self._settings.broker_socket, deadline), deadline) as session:
                self._check_login(session.connect(client_id(), PORTAL_USER, self.files.password()))
                _check_loaded(session.publish(f"{TOPIC}/refused"))
                yield session
        except OSError as error:
            raise unavailable(self._settings, error) from error

    def follow_presence(self, deadline: float) -> PresenceReports | None:
        """Ask the guard to report who is connected; see ``broker.control.BrokerControl``."""
        try:
            session = Session(connect_unix(self._settings.broker_socket, deadline), deadline)
            with ExitStack() as stack:
                stack.enter_context(session)
                self._check_login(session.connect(client_id(), PORTAL_USER, self.files.password()))
                _check_loaded(session.publish(f"{TOPIC}/refused"))
                if session.publish(f"{TOPIC}/report") >= FAILURE:
                    raise _other_version()
                stack.pop_all()
        except OSError as error:
            raise unavailable(self._settings, error) from error
        return GuardReports(session)

    def _check_login(self, reason: int) -> None:
        if reason != SUCCESS:
            raise BrokerNotEnforcing(
                f"The broker refuses the portal on its internal listener with reason 0x{reason:02x}: it runs without"
                f" the portal's guard, or plugin_opt_journal in its configuration is not {self.files.journal}."
            )

    def _await(self, session: Session, position: Position, deadline: float) -> None:
        pause = _FIRST_PAUSE
        while session.publish(f"{TOPIC}/prove/{position.epoch}/{position.seq}") >= FAILURE:
            # Not in force if it is of a new epoch, which the guard takes over when the portal confirms it.
            session.publish(f"{TOPIC}/epoch/{position.epoch}")
            if time.monotonic() + pause >= deadline:
                raise self._not_proven(session, position)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _wanted_version(self, position: Position) -> int:
        """Return which version of the protocol the guard must speak to read the journal."""
        return TENANTS_VERSION if self._told.at(position).tenants else GUARD_VERSION

    def _not_proven(self, session: Session, position: Position) -> BrokerUnavailable:
        self._distrusted = True  # a new epoch repairs whatever the guard has against this one
        wanted = self._wanted_version(position)
        if session.publish(f"{TOPIC}/version/{wanted}") >= FAILURE:
            return _other_version(wanted)
        if problem := self.files.verify():
            return BrokerNotEnforcing(f"{problem} The portal writes it again.")
        return BrokerUnavailable(
            f"The guard in the broker has not taken over {self.files.journal} in time: see the broker's log, and that"
            " plugin_opt_journal in its configuration names this file."
        )


def _other_version(wanted: int = GUARD_VERSION) -> BrokerNotEnforcing:
    return BrokerNotEnforcing(
        f"The guard in the broker is not of the portal's version, {wanted}: install the plugin again,"
        " then restart the broker."
    )


def _check_loaded(answer: int) -> None:
    if answer != NOT_AUTHORISED:
        raise BrokerNotEnforcing(
            "The broker runs without the portal's guard: load the plugin as mosquitto/README.md says."
        )
