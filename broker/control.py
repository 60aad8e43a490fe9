"""The contract of what makes a broker enforce the portal's decisions: a sub-package for each control."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Protocol

from broker.crl import NO_TENANTS, Trust
from broker.folder import BrokerFolder
from broker.probe import ProbeCertificate, ProbeCertificates, ProbeResult, Resumption
from core.tenants import TenantOnBroker
from core.topics import Topic


class RestartReason(StrEnum):
    """Why a broker that runs has to be started again, as a clause."""

    PASSWORD = "it holds an older password of the portal's"  # noqa: S105 - says so, and is none
    NO_ACL = "it runs without its ACL"
    NO_CRL = "it accepts a revoked certificate"
    TOPICS = "it does not have the topics of some devices yet"
    CRLS = "it has read many CRLs, and keeps them all in memory"
    SESSIONS = "TLS sessions that began before a revocation can be resumed"
    CERTIFICATE = "it has a new server certificate"


class Step(StrEnum):
    """What is proven of a change one after the other, after it was recorded."""

    DENIED = "denied"  # the broker has proven that it has the change
    REFUSED = "refused"  # somebody else's revoked certificate was seen to be refused
    CUT = "cut"  # the connections of the devices were ended
    ENFORCED = "enforced"  # all of it, and recorded


@dataclass(frozen=True, slots=True)
class Changes:
    """What a broker must be seen to obey once the draft of ``generation`` is installed.

    ``disconnected`` are ids of clients whose sessions must end, ``revoked`` those of them that were revoked for good,
    each with the prefix of its topics, ``narrowed`` those that have lost topics, be they disconnected or not.
    ``in_doubt`` if it must be seen to refuse a revoked certificate even if nobody is disconnected: it has new CRLs, or
    others may have damaged some.
    """

    generation: int
    disconnected: Sequence[str]
    revoked: Mapping[str, str]
    narrowed: Sequence[str]
    in_doubt: bool

    @property
    def sessions_to_end(self) -> Sequence[str]:
        """The ids of clients whose sessions must end, for whatever reason."""
        return [*dict.fromkeys([*self.disconnected, *self.narrowed])]


class DeviceAccess(Protocol):
    """What devices, and applications, may do on the broker.

    ``tenant`` is whose they are, ``None`` for the first tenant.
    """

    @property
    def keeps_suspended(self) -> bool:
        """Whether who is suspended keeps its topics, because its certificates, which are on hold, are not accepted."""

    def grant(self, device_id: str, topics: Sequence[Topic] | None, tenant: TenantOnBroker | None = None) -> None:
        """Grant ``topics``; see ``broker_provisioning.add_device_acl``."""

    def grant_application(
        self, application_id: str, topics: Sequence[Topic], tenant: TenantOnBroker | None = None
    ) -> None:
        """Grant an application ``topics``, which may cover those of all devices; it has no default ones.

        Where that is not allowed, or cannot be enforced, it is denied everything and is listed in ``Draft.closed``.
        """

    def deny(self, device_id: str, tenant: TenantOnBroker | None = None) -> None:
        """Take in that a device is revoked; see ``broker_provisioning.remove_device_acl``."""

    def forget(self, device_id: str) -> None:
        """Remove a device that has no certificate, or only expired ones, so it cannot connect."""


class CheckedAccess(DeviceAccess, Protocol):
    """Also names those whose topics cannot be granted."""

    @property
    def closed(self) -> Mapping[str, str]:
        """Clients that are denied everything because their topics cannot be granted, each with the reason."""


class Draft(CheckedAccess, Protocol):
    """The next generation of what the broker must enforce, until it is installed or dropped.

    It lacks what changed in the database after generation ``since``, 0 if it lacks everything; the caller adds that.
    """

    @property
    def since(self) -> int:
        """The generation whose changes, and those before, are in it already."""

    @property
    def lists_every_device(self) -> bool:
        """Whether it has to be told of every device.

        Otherwise one rule covers the devices with the default topics.
        """

    @property
    def lists_certificates(self) -> bool:
        """Whether it has to be told of revoked certificates, too."""

    @property
    def lists_tenants(self) -> bool:
        """Whether it has to be told of tenants, by ``tell_tenant``."""

    def tell_tenant(self, tenant: TenantOnBroker) -> None:
        """Take in a tenant that is not the first one, or that it is suspended or is not any more.

        Raise ``ProjectionInvalid`` if its topics are not apart from those of another tenant, ``BrokerNotEnforcing`` if
        the broker's guard is too old to know tenants.
        """

    def unknown_tenants(self, names: Iterable[str]) -> Set[str]:
        """Return which tenants it has to be told of before an identity or a CA of theirs."""

    def revoke_certificate(self, issuer: bytes, serial_number: str, identity: str | None, *, is_probe: bool) -> None:
        """Refuse a certificate by its issuer's name (DER) and serial number (lower-case hex), for whoever shows it.

        ``identity`` is the one in it, ``None`` if it is not known. The portal's own probe certificate must be refused
        by TLS at once.
        """

    def puts_off_crls(self, ca: bytes, tenants: Mapping[str, str] = NO_TENANTS) -> bool:
        """Return whether it can be in force before the broker has new CRLs, with the CAs of ``ca`` (PEM).

        ``tenants`` are as in ``broker.crl.Trust``.

        Then it is installed without them, and they follow by ``BrokerControl.publish_crls``.
        """

    def grants_ahead(self, ca: bytes, tenants: Mapping[str, str] = NO_TENANTS) -> bool:
        """Return whether it may be installed while what was installed before is still being proven.

        It is asked while ``BrokerControl.grants_up_to`` is a generation. Then it is installed without CRLs, and those
        whom it grants something can connect. What it takes away a later reconciliation proves. The arguments are those
        of ``puts_off_crls``.
        """

    def install(self, generation: int, trust: Trust | None) -> bool:
        """Write it for the broker as ``generation``, which need not be in force then: see ``BrokerControl.enforce``.

        Return whether the broker is given the CRLs of ``trust`` now; if not, it has them within minutes. With ``None``
        CRLs and CAs stay as they are, for a draft that ``puts_off_crls`` or ``grants_ahead``, and
        ``BrokerControl.enforce`` makes the rest durable. Raise ``ProjectionInvalid`` if a check fails or a newer
        generation is installed, ``BrokerUnavailable`` if it cannot be written; then nothing has changed for the broker.
        One process at a time: the caller holds the lock.
        """

    def discard(self) -> None:
        """Drop what was not installed."""


@dataclass(frozen=True, slots=True)
class PresenceReport:
    """Identities that are connected, each since when, and identities that are no longer, each with when it ended.

    ``is_whole`` if everybody else is not connected.
    """

    connected: Mapping[str, datetime]
    disconnected: Mapping[str, datetime]
    is_whole: bool


class PresenceReports(Protocol):
    """Reports of one broker since it was asked; the first one is whole."""

    def receive(self, deadline: float) -> Iterator[PresenceReport]:
        """Yield the reports that there are, in their order, and return once the broker was seen to have no more.

        Raise ``OSError`` if the broker does not answer until ``deadline`` (of ``time.monotonic``), or sends what cannot
        be read: then there will be none any more.
        """

    @property
    def is_incomplete(self) -> bool:
        """Whether the first report was not received yet."""

    def close(self) -> None:
        """Ask for no more."""


class BrokerControl(Protocol):
    """How one broker is made to enforce what the portal has decided, and to prove that it does."""

    @property
    def files(self) -> BrokerFolder:
        """The files that it writes for the broker, with the generation that they are of, and their damage."""

    def draft(self, enforced: int = 0) -> Draft:
        """Begin the next generation; the caller holds the lock until it is installed.

        ``enforced`` is one that the broker was seen to enforce: files of an older one are not continued.
        """

    def enforce(
        self, generation: int, deadline: float, *, refused: str | None = None, shows: ProbeCertificate | None = None
    ) -> int:
        """Make the installed generation effective; return the generation that is then proven to be in force.

        That is ``generation``, or a newer one installed meanwhile, but for what ``waits``. ``refused`` is an identity
        that the broker must refuse then, as far as it can be asked. ``shows`` is given if sessions are ended next: the
        certificate by which the portal can connect as a device. Raise ``BrokerUnavailable`` if the broker does not
        answer or does not prove it by ``deadline`` (of ``time.monotonic``), ``BrokerNotEnforcing`` if it does not
        enforce what the portal decides.
        """

    def end_sessions(
        self,
        device_ids: Sequence[str],
        deadline: float,
        *,
        revoked: Mapping[str, str] = MappingProxyType({}),
        narrowed: Set[str] = frozenset(),
    ) -> None:
        """End the devices' sessions: connections are closed, queues and subscriptions discarded.

        A device without a session is not an error. Call it only after ``enforce``, or the broker accepts the device
        again. If it ``clears_retained``, the retained messages below the default topics of those in ``revoked`` are
        cleared, which has the prefix of each one's topics. Those ``narrowed`` come back, and must not find what they
        may not read any more. Raise ``BrokerUnavailable``.
        """

    def probe(self, certificates: ProbeCertificates, deadline: float) -> ProbeResult:
        """Check that the broker refuses the revoked certificate as revoked, and accepts the good one.

        Raise ``BrokerNotEnforcing`` if it does not, ``BrokerUnavailable`` if it does not answer.
        """

    def server_certificate(self, certificates: ProbeCertificates, deadline: float) -> bytes:
        """Return the certificate that the broker shows, DER, valid or not; raise ``BrokerUnavailable``."""

    def resumption(self, certificates: ProbeCertificates, deadline: float) -> Resumption:
        """Look by what the broker lets a TLS session be resumed; raise ``BrokerUnavailable``."""

    def reachable(self) -> bool:
        """Return whether the broker answers the portal within a second."""

    def is_stopped(self) -> bool:
        """Return whether certainly no broker runs, and not only one that is slow to answer."""

    def distrust(self) -> None:
        """Have the next draft tell the broker all, without what no longer is in the database."""

    @property
    def is_distrusted(self) -> bool:
        """Whether the next draft tells the broker all because of ``distrust``, or of what was found damaged."""

    def lacks_change_of(self, changed_at: datetime) -> bool:
        """Return whether topics that were changed then may wait for a restart of the running broker."""

    def grants_up_to(self) -> int | None:
        """Return the generation up to which clients can connect that were admitted, because that is written.

        ``None`` if each has to be proven first: the broker may refuse them a moment longer. That can change whenever a
        draft is installed or something is proven.
        """

    @property
    def reads_certificate_at_start(self) -> bool:
        """Whether a new server certificate is shown after a restart of the broker only."""

    def waits(self, deadline: float) -> RestartReason | None:
        """Return why a part of what was installed waits for a restart of the broker, ``None`` if none does.

        Raise ``BrokerUnavailable`` if the broker does not answer.
        """

    def knows_tenants(self, deadline: float) -> bool:
        """Return whether the broker can keep a second tenant apart, which must not be added otherwise.

        Raise ``BrokerUnavailable`` if it does not answer.
        """

    def forget_tenant(self, name: str, deadline: float) -> None:
        """Remove what the broker keeps for a tenant that was removed, and of which a new journal does not speak.

        Raise ``BrokerUnavailable`` if that fails.
        """

    def nodes(self) -> Mapping[str, bool]:
        """Return the nodes of a cluster, each with whether clients reach it; empty for a broker that is one program."""

    def check_resumption(self, generation: int, how: Callable[[], Resumption]) -> None:
        """Raise ``BrokerUnavailable`` while a device denied at ``generation`` might resume a TLS session.

        ``how`` looks by what the broker lets a session be resumed.
        """

    @property
    def clears_retained(self) -> bool:
        """Whether a broker under it drops retained messages if the portal subscribes to topics of a denied device."""

    def access(self) -> CheckedAccess:
        """Return what devices may do, as long as it is of none: to find out what can be granted."""

    @property
    def narrows_at_once(self) -> bool:
        """Whether topics that a device has lost are out of its reach once ``enforce`` has returned.

        Otherwise they may be until the broker's next restart.
        """

    @property
    def asks_whom_it_refuses(self) -> bool:
        """Whether ``enforce`` asks the broker about an identity that it must refuse."""

    @property
    def publishes_crls(self) -> bool:
        """Whether drafts put off CRLs, which ``publish_crls`` gives to the broker."""

    @property
    def crls_are_due(self) -> bool:
        """Whether CRLs were put off that the running broker should have by now."""

    def publish_crls(self, trust: Trust, *, at_once: bool = False) -> bool:
        """Write the newest CRLs for the broker's next start; return whether the running one has them now, too.

        ``at_once``: it must have them, because a certificate was taken off.
        One process at a time, and none that installs a draft: the caller holds the lock of the CRLs.
        """

    def follow_presence(self, deadline: float) -> PresenceReports | None:
        """Ask the broker to report who is connected; ``None`` if this control can never know.

        The broker reports to the last one who has asked. Raise ``BrokerUnavailable``.
        """
