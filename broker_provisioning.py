"""Makes the broker enforce what the portal has decided."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import UTC, datetime
from types import MappingProxyType

from cryptography import x509

from broker.control import BrokerControl, Changes, DeviceAccess, Draft, PresenceReports, RestartReason, Step
from broker.files.control import FilesControl
from broker.folder import BrokerFolder
from broker.guard.control import GuardControl
from broker.guard.elsewhere import GuardElsewhere
from broker.probe import ACCEPTS_REVOKED, ProbeCertificate, ProbeCertificates, ProbeResult
from config import Settings
from core.broker_control import ControlKind
from core.errors import BrokerUnavailable
from core.failpoints import failpoint
from core.files import replace_file
from core.states import ClientKind
from core.tenants import TenantOnBroker
from core.topics import Topic, check_device_id
from pki.client_certificates import common_name

PROBE_PROBLEM = ".probe.problem"


def _now() -> datetime:
    return datetime.now(UTC)


def add_device_acl(
    acl: DeviceAccess, device_id: str, topics: Sequence[Topic] | None, tenant: TenantOnBroker | None = None
) -> None:
    """Grant the device ``topics``, or the default ones if ``None``, instead of those it had.

    ``tenant`` is whose it is, ``None`` for the first one. If a topic is not allowed, or cannot be expressed in the
    ACL's style, the device is denied everything and is listed in ``acl.closed``. Raise ``ValueError`` if ``device_id``
    is not a canonical UUID.
    """
    acl.grant(device_id, topics, tenant)


def remove_device_acl(acl: DeviceAccess, device_id: str, tenant: TenantOnBroker | None = None) -> None:
    """Take a device out: the guard denies it everything, an ACL has no block of it and leaves the rest to the CRL.

    Raise ``ValueError`` if ``device_id`` is not a canonical UUID.
    """
    acl.deny(device_id, tenant)


class BrokerProvisioning:
    """One broker: what it is to enforce, under the control that the settings name, and its sessions.

    ``clock`` gives the time at which CRLs must be current. A ``deadline`` is a value of ``time.monotonic``. Methods may
    be called from several threads; ``draft``, its ``install`` and ``enforce`` from one process at a time.
    """

    def __init__(self, settings: Settings, clock: Callable[[], datetime] = _now) -> None:
        self.control = _control(settings, clock)
        self._probe_file = settings.data_dir / PROBE_PROBLEM

    @property
    def files(self) -> BrokerFolder:
        """The files that the portal writes for the broker."""
        return self.control.files

    def draft(self, enforced: int = 0) -> Draft:
        """Begin the next generation of what the broker must enforce; see ``broker.control.Draft``."""
        return self.control.draft(enforced)

    def enforce(self, generation: int, deadline: float) -> int:
        """Make the installed generation effective and see that it is; see ``broker.control.BrokerControl``."""
        return self.control.enforce(generation, deadline)

    def bring_into_force(
        self,
        changes: Changes,
        certificates: ProbeCertificates,
        deadline: float,
        proven: Callable[..., None],
        *,
        has_crls: bool,
    ) -> None:
        """Make what was installed effective, step by step, each of which ``proven`` is given once it was seen.

        The broker must prove the generation, and with ``has_crls``, if it was given CRLs, refuse the revoked one of
        ``certificates``; sessions are ended in between. Raise as ``enforce``, ``disconnect`` and ``probe`` do.
        """
        shown = certificates if changes.disconnected or changes.in_doubt else None
        failpoint("apply.before_proof")
        self.control.enforce(
            changes.generation,
            deadline,
            refused=None if shown is None else _identity_of(shown.revoked),
            shows=certificates.good if changes.sessions_to_end else None,
        )
        asked = shown is not None and self.control.asks_whom_it_refuses
        proven(Step.DENIED, *([Step.REFUSED] if asked else []))
        failpoint("apply.after_reload")
        if changes.sessions_to_end:
            narrowed = frozenset(changes.narrowed)
            self.disconnect(changes.sessions_to_end, deadline, revoked=changes.revoked, narrowed=narrowed)
        proven(Step.CUT)
        failpoint("apply.after_cut")
        if has_crls and (shown is not None or self.control.publishes_crls):
            self.probe(certificates, deadline)
            proven(Step.REFUSED)
        if changes.disconnected:
            self.check_resumption(changes.generation, certificates, deadline)
        failpoint("apply.after_probe")

    def topics_problem(
        self, client_id: str, topics: Sequence[Topic], kind: ClientKind, tenant: TenantOnBroker | None = None
    ) -> str | None:
        """Return why a client with these own topics is denied everything, by the settings; ``None`` if it is not."""
        access = self.control.access()
        grant = access.grant_application if kind is ClientKind.APPLICATION else access.grant
        grant(client_id, topics, tenant)
        return access.closed.get(client_id)

    def begin_again(self) -> None:
        """Have the next draft of this process tell the broker all, without what no longer is in the database."""
        self.control.distrust()

    @property
    def begins_again(self) -> bool:
        """Whether the next draft of this process tells the broker all."""
        return self.control.is_distrusted

    def knows_tenants(self, deadline: float) -> bool:
        """Return whether the broker can keep a second tenant apart; see ``broker.control.BrokerControl``."""
        return self.control.knows_tenants(deadline)

    def nodes(self) -> Mapping[str, bool]:
        """Return the nodes of a cluster, each with whether clients reach it; see ``broker.control.BrokerControl``."""
        return self.control.nodes()

    def forget_tenant(self, name: str, deadline: float) -> None:
        """Remove what the broker keeps for a tenant; see ``broker.control.BrokerControl``."""
        self.control.forget_tenant(name, deadline)

    def disconnect(
        self,
        device_ids: Sequence[str],
        deadline: float,
        *,
        revoked: Mapping[str, str] = MappingProxyType({}),
        narrowed: Set[str] = frozenset(),
    ) -> None:
        """End the devices' sessions; see ``broker.control.BrokerControl``. Raise ``ValueError`` for another id."""
        for device_id in device_ids:
            check_device_id(device_id)
        self.control.end_sessions(device_ids, deadline, revoked=revoked, narrowed=narrowed)

    def probe(self, certificates: ProbeCertificates, deadline: float) -> ProbeResult:
        """Check that the broker refuses the revoked certificate as revoked, and accepts the good one.

        Raise ``BrokerNotEnforcing`` if it does not, ``BrokerUnavailable`` if it does not answer. How the last probe of
        any process ended is remembered for ``probe_problem``.
        """
        try:
            result = self.control.probe(certificates, deadline)
        except BrokerUnavailable as error:
            with contextlib.suppress(OSError):
                replace_file(self._probe_file, error.detail.encode())
            raise
        self._probe_file.unlink(missing_ok=True)
        return result

    def server_certificate(self, certificates: ProbeCertificates, deadline: float) -> bytes:
        """Return the certificate that the broker shows, DER, valid or not; raise ``BrokerUnavailable``."""
        return self.control.server_certificate(certificates, deadline)

    def probe_problem(self) -> str | None:
        """Return the sentence in which the last probe of any process failed, ``None`` if it did not."""
        try:
            return self._probe_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def accepted_revoked(self) -> bool:
        """Return whether the broker accepted the revoked certificate in the last probe of any process."""
        return self.probe_problem() == ACCEPTS_REVOKED

    def waits(self, certificates: ProbeCertificates, deadline: float) -> RestartReason | None:
        """Return why the broker has to be restarted; see ``broker.control.BrokerControl``.

        So it has if it accepted the revoked certificate in the last probe, and does so again.
        """
        waits = self.control.waits(deadline)
        if waits is None and self.accepted_revoked():
            with contextlib.suppress(BrokerUnavailable):
                self.probe(certificates, deadline)
            if self.accepted_revoked():
                return RestartReason.NO_CRL
        return waits

    def lacks_change_of(self, changed_at: datetime) -> bool:
        """Return whether topics that were changed then may wait for a restart of the running broker.

        It has what was changed before its start. Those that were changed later wait together.
        """
        return self.control.lacks_change_of(changed_at)

    def follow_presence(self, deadline: float) -> PresenceReports | None:
        """Ask the broker to report who is connected; see ``broker.control.BrokerControl``."""
        return self.control.follow_presence(deadline)

    def check_resumption(self, generation: int, certificates: ProbeCertificates, deadline: float) -> None:
        """Raise ``BrokerUnavailable`` while a device denied at ``generation`` might resume a TLS session."""
        self.control.check_resumption(generation, lambda: self.control.resumption(certificates, deadline))

    def reachable(self) -> bool:
        """Return whether the broker answers the portal within a second."""
        return self.control.reachable()

    def is_stopped(self) -> bool:
        """Return whether certainly no broker runs, and not only one that is slow to answer."""
        return self.control.is_stopped()


def _control(settings: Settings, clock: Callable[[], datetime]) -> BrokerControl:
    match settings.broker_control:
        case ControlKind.GUARD:
            return GuardControl(settings, clock)
        case ControlKind.FILES:
            return FilesControl(settings, clock)
        case ControlKind.NONE:
            return GuardElsewhere(settings, clock)
        case ControlKind.RABBITMQ:
            from broker.rabbitmq.control import RabbitmqControl  # here, as few portals have one

            return RabbitmqControl(settings, clock)


def _identity_of(probe: ProbeCertificate) -> str:
    try:
        return common_name(x509.load_pem_x509_certificate(probe.certificate.read_bytes()))
    except (OSError, ValueError) as error:
        raise BrokerUnavailable(f"The probe certificate {probe.certificate} cannot be read.") from error
