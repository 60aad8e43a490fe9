"""The control by the guard: a plugin in the broker that follows the portal's journal, and proves how far it has."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from broker.ca_certificates import issuing_cas
from broker.control import PresenceReports, RestartReason
from broker.crl import Trust
from broker.folder import CRLS_READ
from broker.guard import journal
from broker.guard.access import GuardAccess, NoJournal
from broker.guard.draft import GuardDraft
from broker.guard.folder import GuardFiles
from broker.guard.journal import JournalAppend, NewJournal, Position, Unsynced, read_position, read_texts
from broker.guard.presence import GuardReports
from broker.guard.told import NamedIssuers, Told, ToldByJournal
from broker.probe import Resumption
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
from core.broker_control import ControlKind
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from core.failpoints import failpoint

TOPIC = "portal/guard"  # below it the portal asks the guard; the answer is the reason code of PUBACK
GUARD_VERSION = 2  # of the protocol with the plugin, which may speak a later one, too
TENANTS_VERSION = 3  # that of a plugin which knows tenants

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
_MOST_ISSUERS = 200  # hashes of issuing CAs, retired ones too, of which a CA has up to three; the guard takes 256
_LOOK_SECONDS = 1.0  # to ask whether the guard knows tenants
_COMPACTED_AT = 4  # times its size when it was begun, or of 1 MiB


@dataclass(frozen=True, slots=True)
class _Issuers:
    """The hashes of issuing CAs, by the CAs' PEM and whose they are, and those of the first tenant's."""

    ca: bytes
    tenants: Mapping[str, str]
    hashes: NamedIssuers
    of_first: frozenset[str]


class GuardControl:
    """Appends changes to the journal, and asks the guard over the internal listener whether they are in force."""

    def __init__(self, settings: Settings, clock: Callable[[], datetime]) -> None:
        self.files = GuardFiles(settings, clock)
        self._settings = settings
        self._clock = clock
        self._distrusted = False  # whether the journal was found damaged, so that the next one is a new one
        self._told = ToldByJournal(self.files.journal)
        self._issuers = _Issuers(b"", {}, (), frozenset())
        self._hashes: dict[bytes, tuple[str, ...]] = {}  # of each CA, by its fingerprint
        self._unsynced: Unsynced | None = None  # what was appended last
        self._known_version = 0  # of the guard, which each process of the portal asks for once

    # --- Writing

    def draft(self, enforced: int = 0) -> GuardDraft:
        """Begin the next generation: a delta, or all in a new epoch if the journal does not continue what was written.

        It does not if it is missing, damaged, not readable or older than ``enforced``, after a restore, with other
        topic prefixes, or if it has grown long or names many issuing CAs.
        """
        stated, position = self.files.stated(), self.files.position()
        if position is not None and position.generation >= enforced and self._continues(position, stated):
            return self._draft(JournalAppend(self.files.journal, position), position.generation)
        return self._draft(self._new_journal(position), 0)

    def _new_journal(self, position: Position | None) -> NewJournal:
        """Begin a journal with what each begins with: nobody but the portal is admitted by it."""
        before = max(position.epoch if position is not None else 0, _whole(self.files.stated().get("epoch")))
        writer = self.files.begin(max(before + 1, int(self._clock().timestamp() * 1000)))
        for line in (journal.portal_line(self._password_hash()), journal.prefix_line(self._settings.topic_prefix)):
            writer.add(line)
        return writer

    def deny_everybody(self) -> int:
        """Replace the journal by one that knows tenants and CAs, and allows no client; return its generation.

        The CAs must stay: the guard leaves certificates of others to what else the broker has. ``enforce`` makes it
        effective, and the next draft begins a new one. The caller holds the lock. Raise ``ProjectionInvalid`` if the
        journal is damaged, by which the guard denies everybody already, ``BrokerUnavailable`` if it cannot be written.
        """
        position = read_position(self.files.journal)
        with self._new_journal(position) as writer:
            for text in read_texts(self.files.journal):
                if text.startswith(("tenant ", "suspend ", "issuer ")):
                    writer.add(text)
            self._distrusted = True
            return writer.commit(position.generation).generation

    def _draft(self, writer: JournalAppend | NewJournal, since: int) -> GuardDraft:
        return GuardDraft(self, self._settings.application_prefixes, writer, since)

    def issuers(self, ca: bytes, tenants: Mapping[str, str]) -> NamedIssuers:
        """Return the hashes that name the issuing CAs to the guard, in the order in which it is to read them."""
        return self._named(ca, tenants).hashes

    def _named(self, ca: bytes, tenants: Mapping[str, str]) -> _Issuers:
        known = self._issuers
        if known.ca != ca or (known.tenants is not tenants and known.tenants != tenants):
            before, self._hashes = self._hashes, {}
            for each in issuing_cas(ca):
                own = before.get(each.fingerprint) or tuple(journal.issuer_hashes(each.certificate))
                self._hashes[each.fingerprint] = own
            hashes = tuple(
                (issuer_hash, tenants.get(fingerprint.hex()))
                for fingerprint, own in self._hashes.items()
                for issuer_hash in own
            )
            of_first = frozenset(issuer_hash for issuer_hash, tenant in hashes if tenant is None)
            self._issuers = known = _Issuers(ca, tenants, hashes, of_first)
        return known

    def told_by(self, writer: JournalAppend | NewJournal) -> Told:
        """Return what a journal has told that is continued, nothing if it is a new one."""
        return self._told.at(writer.position) if isinstance(writer, JournalAppend) else Told()

    def has_told(self, ca: bytes, tenants: Mapping[str, str], draft: GuardDraft) -> bool:
        """Return whether the guard knows all of the issuing CAs (PEM), and the portal's password."""
        stated, named = self.files.stated(), self._named(ca, tenants)
        return (
            named.of_first.issubset(stated.get("issuers", ()))
            and stated.get("portal") == self._password_hash()
            and (not tenants or draft.told.has(named.hashes))
        )

    def distrust(self) -> None:
        """Have the next draft begin a new journal."""
        self._distrusted = True

    @property
    def is_distrusted(self) -> bool:
        """Whether the next draft begins a new journal."""
        return self._distrusted

    def is_whole(self) -> bool:
        """Return whether the files for the broker are as they were written, with CRLs that are current."""
        return not self.files.damage()

    def _continues(self, position: Position, stated: Mapping[str, Any]) -> bool:
        begun_with = _whole(stated.get("begun_with"))
        return (
            not self._distrusted
            and stated.get("epoch") == position.epoch
            and _whole(stated.get("seq")) <= position.seq
            and stated.get("prefix") == self._settings.topic_prefix
            and stated.get("more_prefixes", []) == [*self._settings.topic_prefixes]
            and position.generation > 0
            and position.size <= _COMPACTED_AT * max(begun_with, 1 << 20)
            and len(stated.get("issuers", ())) <= _MOST_ISSUERS
            and self.files.is_readable()
        )

    def append(self, writer: JournalAppend, generation: int) -> None:
        """Append to the journal; ``enforce`` makes it durable. The record follows with the CRLs."""
        self.files.check_follows(generation)
        self._sync()
        _, self._unsynced = writer.write(generation)

    def _sync(self) -> None:
        """Make durable what was appended last."""
        unsynced, self._unsynced = self._unsynced, None
        if unsynced is not None:
            try:
                unsynced.sync()
            except BrokerUnavailable:
                self._distrusted = True  # what is on the disk is not known
                raise

    def install(self, writer: JournalAppend | NewJournal, generation: int, trust: Trust, *, urgent: bool) -> bool:
        """Add what else the guard has to know, make the journal durable, and publish the CRLs if it is time."""
        self.files.check(generation, trust)
        self._sync()
        before = self.files.stated() if isinstance(writer, JournalAppend) else {}
        named = self._named(trust.ca, trust.tenants)
        known = set(before.get("issuers", ()))
        issuers = [issuer for issuer, tenant in named.hashes if tenant is None]  # in this order
        for issuer in issuers:
            if issuer not in known:
                writer.add(journal.issuer_line(issuer))
        if before and before.get("portal") != self._password_hash():
            writer.add(journal.portal_line(self._password_hash()))
        position = writer.commit(generation)
        self._distrusted = False
        due = urgent or not known.issuperset(issuers) or self._is_crl_due(position, before, len(trust.crl))
        published = due and self.files.publish(trust)
        stated = {
            "style": self._settings.acl_style,
            "control": ControlKind.GUARD,
            "epoch": position.epoch,
            "seq": position.seq,
            "begun_with": before.get("begun_with", position.size),
            "prefix": self._settings.topic_prefix,
            "more_prefixes": [*self._settings.topic_prefixes],
            "portal": self._password_hash(),
            "issuers": sorted(known.union(issuers)),
            "crl_seq": position.seq if due else before.get("crl_seq", 0),
            "crl_at": self._now() if due else before.get("crl_at", 0),
            **(self.files.with_crls_read(trust) if published else {CRLS_READ: self.files.stated().get(CRLS_READ)}),
        }
        self.files.install(generation, trust, stated)
        return published

    @property
    def crls_are_due(self) -> bool:
        """Whether CRLs were put off, and their pause is over; see ``broker.control.BrokerControl``."""
        stated, position = self.files.stated(), self.files.position()
        if position is None or position.seq <= _whole(stated.get("crl_seq")):
            return False
        return self._is_crl_due(position, stated, self.files.crl_size())

    def _is_crl_due(self, position: Position, before: Mapping[str, Any], size: int) -> bool:
        since = self._now() - _whole(before.get("crl_at"))
        pause = min(CRL_SECONDS, size / CRL_BYTES_A_SECOND)
        pause = max(pause, (self.files.crl_bytes() - SOME_CRL_BYTES) / MORE_CRL_BYTES_A_SECOND)
        changes = max(CRL_CHANGES, size / CRL_BYTES_A_CHANGE)
        return not 0 <= since < pause or position.seq - _whole(before.get("crl_seq")) >= changes

    def access(self) -> GuardAccess:
        """Return what devices may do, as long as it is of none."""
        return GuardAccess(self._settings.application_prefixes, NoJournal(), whole=True)

    def knows_tenants(self, deadline: float) -> bool:
        """Return whether the guard in the broker knows tenants; see ``broker.control.BrokerControl``."""
        if self._known_version < TENANTS_VERSION:
            with self._session(deadline) as session:
                if session.publish(f"{TOPIC}/version/{TENANTS_VERSION}") < FAILURE:
                    self._known_version = TENANTS_VERSION
        return self._known_version >= TENANTS_VERSION

    def check_guard_knows_tenants(self) -> None:
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
    asks_whom_it_refuses = True
    narrows_at_once = True
    clears_retained = True

    def publish_crls(self, trust: Trust, *, at_once: bool = False) -> bool:
        """Write the CRLs for the next start, and publish them if it is time; see ``broker.control.BrokerControl``."""
        stated, position = self.files.stated(), self.files.position()
        if position is None or position.epoch != stated.get("epoch") or self.files.damage():
            return False  # it is repaired by an installation
        if position.generation < _whole(stated.get("generation")):
            return False
        self.files.check_trust(position.generation, trust)
        due = at_once or self._is_crl_due(position, stated, len(trust.crl))
        if due:
            stated = {**stated, "crl_at": self._now(), "crl_seq": position.seq}
        if published := due and self.files.publish(trust):
            stated |= self.files.with_crls_read(trust)
        self.files.install(position.generation, trust, {**stated, "seq": position.seq})
        return published

    def _now(self) -> int:
        return int(self._clock().timestamp())

    def _password_hash(self) -> str:
        return hashlib.sha256(self.files.password().encode("ascii")).hexdigest()

    # --- Asking

    def enforce(self, generation: int, deadline: float, *, refused: str | None = None) -> int:
        """Return once the guard has proven that the journal is in force; see ``broker.control.BrokerControl``."""
        failpoint("apply.before_proof")
        position = self.files.position()
        if position is None or position.generation < generation:
            self._distrusted = True
            raise BrokerUnavailable(f"{self.files.journal} is not what the portal wrote; it is written again.")
        try:
            with Session(connect_unix(self._settings.broker_socket, deadline), deadline + _REASON_SECONDS) as session:
                self._prove(session, position, refused, deadline)
        except OSError as error:
            raise unavailable(self._settings, error) from error
        return position.generation

    def waits(self, deadline: float) -> RestartReason | None:
        """Return whether the broker has been given too many CRLs; all else the guard reads by itself."""
        return RestartReason.CRLS if self.files.crl_bytes() > MAX_CRL_BYTES else None

    def check_resumption(self, generation: int, how: Callable[[], Resumption]) -> None:
        """Do nothing: the guard sees the certificate of a resumed session, too."""

    def _prove(self, session: Session, position: Position, refused: str | None, deadline: float) -> None:
        """Ask all at once, and make the journal durable meanwhile.

        If the guard is not so far yet, wait for it, and ask for the ``refused`` identity again.
        """
        identify = [f"{TOPIC}/identify/{refused}"] if refused is not None else []
        session.send_connect(client_id(), PORTAL_USER, self.files.password())
        asked = [f"{TOPIC}/refused", f"{TOPIC}/prove/{position.epoch}/{position.seq}", *identify]
        if self._known_version < GUARD_VERSION:
            asked.append(f"{TOPIC}/version/{GUARD_VERSION}")
        sent: list[bytes] = []
        with contextlib.suppress(ConnectionError):  # if the broker has refused CONNECT, its answer is still there
            sent = [session.send_publish(topic) for topic in asked]
        self._sync()
        self._check_login(session.receive_connack())
        if not sent:
            raise ConnectionError("the broker closed the connection")
        loaded, proven, *allowed = map(session.receive_puback, sent)
        _check_loaded(loaded)
        if self._known_version < GUARD_VERSION:
            if allowed.pop() >= FAILURE:
                raise _other_version()
            self._known_version = GUARD_VERSION
        if proven >= FAILURE:
            self._await(session, position, deadline)
            allowed = [session.publish(topic) for topic in identify]
        if any(answer != NOT_AUTHORISED for answer in allowed):
            raise BrokerNotEnforcing(
                f"The guard in the broker allows {refused}, the portal's probe, which is denied: see its log."
            )

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
        self._known_version = 0
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


def _whole(value: object) -> int:
    """Return a whole number that a record states, 0 for anything else."""
    return value if type(value) is int else 0
