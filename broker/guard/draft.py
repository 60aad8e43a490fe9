"""The next lines of the guard's journal, until they are written."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING

from broker.crl import NO_TENANTS, Trust
from broker.guard import journal
from broker.guard.access import GuardAccess
from broker.guard.journal import JournalAppend, NewJournal
from broker.guard.told import NamedIssuers, Told
from core.errors import ProjectionInvalid
from core.tenants import TenantOnBroker, overlapping

if TYPE_CHECKING:
    from broker.guard.writing import JournalControl

MAX_ISSUERS = 60_000  # hashes of CAs of all tenants, retired ones too; the guard takes 65,536
log = logging.getLogger("portal.broker")

UNKNOWN_IDENTITY = "unknown"  # of a certificate of which only the serial number is known


class GuardDraft(GuardAccess):
    """Lines for the journal: those of the changes since its generation, or a whole new one."""

    lists_every_device = True
    lists_certificates = True

    def __init__(
        self, control: JournalControl, prefixes: Sequence[str], writer: JournalAppend | NewJournal, since: int
    ) -> None:
        super().__init__(prefixes, writer, whole=since == 0, check=control.check_filter)
        self.since = since
        self._control = control
        self._journal = writer
        self._urgent = False  # whether the broker must have the CRL at once
        self._told: Told | None = None  # what the journal has told; read at need
        self._adds_to_told = False  # then it is this draft's own, with its lines

    lists_tenants = True

    def tell_tenant(self, tenant: TenantOnBroker) -> None:
        """Add the lines that say how a tenant stands, if the journal does not; see ``broker.control.Draft``."""
        known = self.told.tenants.get(tenant.name)
        if known == tenant:
            return
        if known is None:
            self._check_prefix(tenant)
        elif known.prefix != tenant.prefix:
            self._control.distrust()
            raise ProjectionInvalid(f"The journal has another tenant of the name {tenant.name}; it is written again.")
        self._control.check_knows_tenants()
        lines = [journal.tenant_line(tenant.name, tenant.prefix)] if known is None or known.suspended else []
        lines += [journal.suspend_line(tenant.name)] if tenant.suspended else []
        self._tell(lines)

    def unknown_tenants(self, names: Iterable[str]) -> Set[str]:
        """Return which tenants the journal has not told; see ``broker.control.Draft``."""
        wanted = {*names}
        return wanted - self.told.tenants.keys() if wanted else wanted

    def _check_prefix(self, tenant: TenantOnBroker) -> None:
        if self.told.prefixes.overlaps(tenant.prefix) or overlapping(tenant.prefix, self._prefixes) is not None:
            raise ProjectionInvalid(
                f"The topics of the tenant {tenant.name}, below {tenant.prefix}, are not apart from those of another"
                " one: change PORTAL_TOPIC_PREFIX or PORTAL_TOPIC_PREFIXES."
            )

    def _add(self, text: str, tenant: TenantOnBroker | None) -> None:
        """Add a line, after that of the tenant which it names."""
        if tenant is not None:
            self.tell_tenant(tenant)
        super()._add(text, tenant)

    @property
    def told(self) -> Told:
        """What the journal has told, with this draft."""
        if self._told is None:
            self._told = self._control.told_by(self._journal)
        return self._told

    def _tell(self, lines: Sequence[str]) -> None:
        if lines and not self._adds_to_told:
            self._told, self._adds_to_told = self.told.copy(), True
        for line in lines:
            self._writer.add(line)
            self.told.take(line)

    def tell_issuers(self, issuers: NamedIssuers) -> bool:
        """Add the lines of CAs that are of other tenants than the first; return whether there were any to add.

        Left out, so that nobody is admitted by them, are those of a tenant that was added since this draft began, which
        the next one tells, and those whose name another tenant's CA has.
        """
        lines, told = [], self.told
        for issuer_hash, tenant in issuers:
            if tenant is None or tenant not in told.tenants:
                continue
            if issuer_hash not in told.issuers:
                lines.append(journal.issuer_line(issuer_hash, tenant))
            elif told.issuers[issuer_hash] != tenant:
                log.error("a CA has the name of another tenant's, so it admits nobody", extra={"tenant": tenant})
        if len(self.told.issuers) + len(lines) > MAX_ISSUERS:
            self._control.distrust()
            raise ProjectionInvalid(
                "The journal names more CAs than the guard takes; it is written again without old ones."
            )
        self._tell(lines)
        return bool(lines)

    def revoke_certificate(self, issuer: bytes, serial_number: str, identity: str | None, *, is_probe: bool) -> None:
        """Refuse a certificate; see ``broker.control.Draft``."""
        issuer_hash = hashlib.sha256(issuer).hexdigest()
        self._writer.add(journal.serial_line(issuer_hash, serial_number, identity or UNKNOWN_IDENTITY))
        self._urgent = self._urgent or is_probe

    def add_line(self, text: str, *, urgent: bool = False) -> None:
        """Add a line that was checked before; ``urgent`` if the broker must have the CRL at once."""
        self._writer.add(text)
        self._urgent = self._urgent or urgent

    def puts_off_crls(self, ca: bytes, tenants: Mapping[str, str] = NO_TENANTS) -> bool:
        """Return whether the broker can do without new CRLs, and no file needs to be repaired; see ``Draft``."""
        return self._control.publishes_crls and self._needs_no_crls(ca, tenants)

    def grants_ahead(self, ca: bytes, tenants: Mapping[str, str] = NO_TENANTS) -> bool:
        """Return whether it may be installed while others are still being proven; see ``Draft``."""
        return self._needs_no_crls(ca, tenants)

    def _needs_no_crls(self, ca: bytes, tenants: Mapping[str, str]) -> bool:
        control = self._control
        return (
            not self._urgent
            and isinstance(self._journal, JournalAppend)
            and control.has_told(ca, tenants, self)
            and control.is_whole()
        )

    def install(self, generation: int, trust: Trust | None) -> bool:
        """Append it to the journal, or replace that; see ``broker.control.Draft``."""
        try:
            if trust is None:
                if not isinstance(self._journal, JournalAppend):
                    raise TypeError("a new journal is installed with its CRLs")
                self._control.append(self._journal, generation)
                return False
            issuers = self._control.issuers(trust.ca, trust.tenants)
            has_new = self.tell_issuers(issuers)
            return self._control.install(self._journal, generation, trust, urgent=self._urgent or has_new)
        finally:
            self.discard()

    def discard(self) -> None:
        """Drop what was not installed."""
        self._writer.discard()
