"""What a control by the journal writes: lines for each change, or a whole new journal, and which of it is durable."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from broker.ca_certificates import issuing_cas
from broker.crl import Trust
from broker.guard import journal
from broker.guard.access import GuardAccess, NoJournal
from broker.guard.draft import GuardDraft
from broker.guard.folder import GuardFiles
from broker.guard.journal import JournalAppend, NewJournal, Position, make_durable, read_position, read_texts
from broker.guard.told import NamedIssuers, Told, ToldByJournal
from config import Settings
from core.errors import BrokerUnavailable

_MOST_ISSUERS = 200  # hashes of issuing CAs, retired ones too, of which a CA has up to three; the guard takes 256
_COMPACTED_AT = 4  # times its size when it was begun, or of 1 MiB


@dataclass(frozen=True, slots=True)
class _Issuers:
    """The hashes of issuing CAs, by the CAs' PEM and whose they are, and those of the first tenant's."""

    ca: bytes
    tenants: Mapping[str, str]
    hashes: NamedIssuers
    of_first: frozenset[str]


class JournalControl(ABC):
    """The part of a control that writes the journal; see ``broker.control.BrokerControl``."""

    asks_whom_it_refuses = True
    narrows_at_once = True

    def __init__(self, settings: Settings, files: GuardFiles, clock: Callable[[], datetime]) -> None:
        self.files = files
        self._settings = settings
        self._clock = clock
        self._distrusted = False  # whether the journal was found damaged, so that the next one is a new one
        self._told = ToldByJournal(self.files.journal)
        self._issuers = _Issuers(b"", {}, (), frozenset())
        self._hashes: dict[bytes, tuple[str, ...]] = {}  # of each CA, by its fingerprint

    @property
    @abstractmethod
    def publishes_crls(self) -> bool:
        """Whether drafts put off CRLs."""

    @abstractmethod
    def check_knows_tenants(self) -> None:
        """Raise ``BrokerNotEnforcing`` if the broker runs, and would take a tenant's line for damage.

        Raise ``BrokerUnavailable`` if it does not answer.
        """

    @abstractmethod
    def give_crls(
        self, trust: Trust, position: Position, before: Mapping[str, Any], *, urgent: bool
    ) -> tuple[bool, Mapping[str, Any]]:
        """Give the running broker the CRLs, if it is time or ``urgent``; return whether, and what the record says then.

        ``before`` is what it has said.
        """

    @abstractmethod
    def check_filter(self, text: str) -> None:
        """Raise ``TopicRefused`` if the broker cannot grant a topic filter as it is meant."""

    def lacks_change_of(self, changed_at: datetime) -> bool:
        """Return ``False``: topics do not wait for a restart."""
        return False

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
        before = max(position.epoch if position is not None else 0, whole_number(self.files.stated().get("epoch")))
        lines = journal.portal_line(self._password_hash()), journal.prefix_line(self._settings.topic_prefix)
        writer = self.files.begin(max(before + 1, int(self._clock().timestamp() * 1000)))
        for line in lines:
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
        begun_with = whole_number(stated.get("begun_with"))
        return (
            not self._distrusted
            and stated.get("epoch") == position.epoch
            and whole_number(stated.get("seq")) <= position.seq
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
        self.files.ends_at(writer.write(generation))

    def _sync(self) -> None:
        """Make the journal durable: each process has its own part of what was appended last."""
        try:
            make_durable(self.files.journal)
        except BrokerUnavailable:
            self._distrusted = True  # what is on the disk is not known
            raise

    def install(self, writer: JournalAppend | NewJournal, generation: int, trust: Trust, *, urgent: bool) -> bool:
        """Add what else has to be known, make the journal durable, and give the CRLs to the broker if it is time."""
        self.files.check(generation, trust)
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
        given, said = self.give_crls(trust, position, before, urgent=urgent or not known.issuperset(issuers))
        stated = {
            "style": self._settings.acl_style,
            "control": self._settings.broker_control,
            "epoch": position.epoch,
            "seq": position.seq,
            "begun_with": before.get("begun_with", position.size),
            "prefix": self._settings.topic_prefix,
            "more_prefixes": [*self._settings.topic_prefixes],
            "portal": self._password_hash(),
            "issuers": sorted(known.union(issuers)),
            **said,
        }
        self.files.install(generation, trust, stated)
        return given

    def access(self) -> GuardAccess:
        """Return what devices may do, as long as it is of none."""
        return GuardAccess(self._settings.application_prefixes, NoJournal(), whole=True, check=self.check_filter)

    def _now(self) -> int:
        return int(self._clock().timestamp())

    def _password_hash(self) -> str:
        return hashlib.sha256(self.files.password().encode("ascii")).hexdigest()


def whole_number(value: object) -> int:
    """Return a whole number that a record states, 0 for anything else."""
    return value if type(value) is int else 0
