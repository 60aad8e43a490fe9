"""Checks of the broker's files against the database, entry by entry, and of the running broker."""

from __future__ import annotations

import time
from collections.abc import Mapping

import sqlalchemy as sa
from cryptography import x509

from broker.control import RestartReason
from broker.crl import read_crls
from broker.files.acl import Acl, number_of
from broker.files.control import BrokerFiles, FilesControl
from broker.folder import CRL_FILE
from broker.guard.access import GuardAccess
from broker.guard.control import GuardControl
from broker.guard.journal import issuer_hashes, read_access, read_position
from broker.guard.told import Told, read_told
from broker.session import connect_unix, peer_process
from broker_provisioning import BrokerProvisioning
from config import Settings
from core.broker_control import ACL_FILE, JOURNAL_FILE, AclStyle, ControlKind
from core.errors import BrokerUnavailable
from core.server_command import client_command
from core.states import ON_CRL, IssuerKind
from operations.doctor.base import (
    SECONDS,
    Finding,
    Findings,
    Installation,
    combine,
    counted,
    problem,
    summarize,
    warning,
    well,
)
from store import devices, generations, issuers, tenants
from store.tables import DEFAULT_TENANT, Certificate
from workflows.access import BrokerTenants, on_broker, update_access

_REPAIRS = "A running portal writes the file again within seconds: check that it runs, and its log."
_PENDING = "See the line 'generation'."


def broker_files(installation: Installation) -> Finding:
    """Check that the files are as the portal wrote them."""
    files = BrokerProvisioning(installation.settings, installation.clock).files
    if files.damage():
        with installation.between_reconciliations():
            found = [problem(damage, _REPAIRS) for damage in files.damage()]
        if found:
            return combine(found, "")
    return well(f"The files are as the portal wrote them at generation {files.installed_generation()}.")


# --- Entry by entry -----------------------------------------------------------------------------------------------


def acl_entries(installation: Installation) -> Finding:
    """Check that the ACL, or the guard's journal, grants each active device its topics, and nobody else anything."""
    settings = installation.settings
    if settings.broker_control.by_journal:
        return _journal_entries(installation)
    expected_acl, pending = Acl(settings.acl_style, settings.topic_prefix), set()
    with installation.between_reconciliations():
        installed = BrokerFiles(settings, installation.clock).installed_generation() or 0
        content = settings.broker_file(ACL_FILE).read_bytes()
        with installation.snapshot() as tx:
            per_device = settings.acl_style is AclStyle.PER_DEVICE
            for change in generations.acl_changes(tx, since=0, defaults=per_device):
                if change.generation > installed:
                    pending.add(change.device_id)  # not installed at the broker yet
                else:
                    update_access(expected_acl, change)
    found = compare_acl(_blocks(expected_acl.render(number_of(content))), _blocks(content), pending)
    _add_closed(found, expected_acl, "PORTAL_ACL_STYLE and PORTAL_TOPIC_PREFIX; applications need the guard")
    more = f" {len(pending)} more will be installed soon." if pending else ""
    return combine(
        found, f"The ACL is what the database says: {counted(len(expected_acl), 'device', 'devices')}.{more}"
    )


class _Lines:
    """Keeps the last line of each identity."""

    def __init__(self) -> None:
        self.access: dict[str, str] = {}

    def add(self, text: str) -> None:
        self.access[text.split(" ")[1]] = text

    def discard(self) -> None:
        pass


def _journal_entries(installation: Installation) -> Finding:
    settings, lines, pending = installation.settings, _Lines(), set()
    expected = GuardAccess(settings.application_prefixes, lines, whole=True)
    with installation.between_reconciliations():
        installed = read_position(settings.broker_file(JOURNAL_FILE)).generation
        access = read_access(settings.broker_file(JOURNAL_FILE))
        told = read_told(settings.broker_file(JOURNAL_FILE))
        with installation.snapshot() as tx:
            known = BrokerTenants(tx)
            for change in generations.acl_changes(tx, since=0, defaults=True):
                if change.generation > installed:
                    pending.add(change.device_id)
                else:
                    update_access(expected, change, known.of(change.tenant_id))
            differences = compare_tenants(tx, told, installed)
    granted = {identity: line for identity, line in access.items() if line.startswith("allow ")}
    allowed = {identity: line for identity, line in lines.access.items() if line.startswith("allow ")}
    found = compare_acl(allowed, granted, pending)
    if differences:
        found.problem(f"The guard's journal says otherwise of tenants: {summarize(differences)}.", _REPAIRS)
    _add_closed(found, expected, "PORTAL_TOPIC_PREFIX and PORTAL_TOPIC_PREFIXES")
    more = f" {len(pending)} more will be installed soon." if pending else ""
    count = counted(len(allowed), "device or application", "devices and applications") + " may connect"
    return combine(found, f"The guard's journal is what the database says: {count}.{more}")


def compare_tenants(tx: sa.Connection, told: Told, installed: int) -> list[str]:
    """Return the tenants of which a journal of a generation says otherwise, or of whose CAs it does; not the first."""
    differ = {
        row.id
        for row in tenants.list_tenants(tx)
        if row.id != DEFAULT_TENANT and row.generation <= installed and told.tenants.get(row.id) != on_broker(row)
    }
    for issuer in issuers.list_issuers(tx):
        owner = None if issuer.tenant_id == DEFAULT_TENANT else issuer.tenant_id
        hashes = issuer_hashes(x509.load_der_x509_certificate(issuer.der))
        said = {told.issuers[each] for each in hashes if each in told.issuers}
        if issuer.kind == IssuerKind.ISSUING and not said <= {owner}:
            differ.add(issuer.tenant_id)
    return sorted(differ)


def compare_acl(expected: Mapping[str, str], installed: Mapping[str, str], ignored: set[str]) -> Findings:
    """Return the differences of two ACLs, each the text of the block by user, except for the users in ``ignored``."""
    missing = sorted(expected.keys() - installed.keys() - ignored)
    unknown = sorted(installed.keys() - expected.keys() - ignored)
    other = sorted(user for user in expected.keys() & installed.keys() - ignored if expected[user] != installed[user])
    found = Findings()
    if missing:
        those = counted(len(missing), "entry of the ACL is", "entries of the ACL are")
        found.problem(f"{those} missing: {summarize(missing)}.", _REPAIRS)
    if unknown:
        those = counted(len(unknown), "entry", "entries")
        found.problem(f"{those} of the ACL should not exist: {summarize(unknown)}.", _REPAIRS)
    if other:
        those = counted(len(other), "entry of the ACL grants", "entries of the ACL grant")
        found.problem(f"{those} other topics: {summarize(other)}.", _REPAIRS)
    return found


def _add_closed(found: Findings, access: Acl | GuardAccess, variables: str) -> None:
    """Warn of the clients whose topics the settings do not allow."""
    if access.closed:
        found.warning(
            f"{counted(len(access.closed), 'client', 'clients')} may do nothing, because the settings do not allow"
            f" {'its' if len(access.closed) == 1 else 'their'} topics: {summarize(list(access.closed))}.",
            f"Change their topics ({client_command('update')}, {client_command('application update')}), or"
            f" {variables}.",
        )


def _blocks(content: bytes) -> dict[str, str]:
    """Return the text of each user's block; the lines before the first have the empty name."""
    blocks: dict[str, str] = {}
    user = ""
    for line in content.decode("utf-8", "replace").splitlines():
        if line.startswith("user "):
            user = line.removeprefix("user ")
        elif not line.startswith("#"):
            blocks[user] = blocks.get(user, "") + line + "\n"
    return blocks


def crl_entries(installation: Installation) -> Finding:
    """Check that the CRL lists every revoked certificate that has not expired, and no other."""
    now, found, count = installation.clock(), Findings(), 0
    with installation.between_reconciliations():
        crls = [read.crl for read in read_crls(installation.settings.broker_file(CRL_FILE).read_bytes())]
        with installation.snapshot() as tx:
            pending = _is_pending(installation, tx)
            for issuer in issuers.list_issuers(tx):
                if issuer.kind == IssuerKind.ROOT:
                    continue
                ca_name = x509.load_der_x509_certificate(issuer.der).subject
                listed = {f"{entry.serial_number:x}" for crl in crls if crl.issuer == ca_name for entry in crl}
                revoked = tx.execute(
                    sa.select(Certificate.serial_number, Certificate.not_after).where(
                        Certificate.issuer_id == issuer.id, Certificate.status.in_(ON_CRL)
                    )
                ).all()
                count += len(listed)
                missing = sorted({serial for serial, end in revoked if end > now} - listed)
                extra = sorted(listed - {serial for serial, _ in revoked})
                if missing and pending:
                    soon = counted(len(missing), "revoked certificate", "revoked certificates")
                    found.warning(f"{soon} will be on the next CRL.", _PENDING)
                elif missing:
                    many = counted(len(missing), "revoked certificate is", "revoked certificates are")
                    found.problem(f"{many} not on the CRL: {summarize(missing)}.", _REPAIRS)
                if extra:
                    many = counted(len(extra), "certificate is", "certificates are")
                    found.problem(f"{many} on the CRL but not revoked: {summarize(extra)}.", _REPAIRS)
    return combine(found, f"The CRL is what the database says: {counted(count, 'certificate', 'certificates')}.")


def _is_pending(installation: Installation, tx: sa.Connection) -> bool:
    """Return whether something was revoked that the newest CRL cannot list yet."""
    installed = BrokerFiles(installation.settings, installation.clock).installed_generation() or 0
    for issuer in issuers.list_issuers(tx):
        crl = issuers.get_crl(tx, issuer.id)
        if issuer.kind == IssuerKind.ISSUING and (crl is None or issuer.revoked_generation > crl.generation):
            return True
        if crl is not None and crl.generation > installed:
            return True
    return False


# --- The running broker --------------------------------------------------------------------------------------------


def running_broker(installation: Installation) -> int:
    """Return the process id of the broker that answers on the internal listener, 0 if unknown."""
    deadline = time.monotonic() + SECONDS
    try:
        with connect_unix(installation.settings.broker_socket, deadline) as sock:
            return peer_process(sock)
    except OSError:
        return 0


def broker(installation: Installation) -> Finding:
    """Check that the broker answers, and enforces the generation that it last reported."""
    settings = installation.settings
    with installation.snapshot() as tx:
        applied = generations.get_broker_state(tx).applied_generation
    deadline = time.monotonic() + SECONDS
    if settings.broker_control is ControlKind.GUARD:
        return _guarded_broker(installation, deadline)
    try:
        with installation.between_reconciliations():
            waits = FilesControl(settings, installation.clock).waits(deadline)
    except BrokerUnavailable as error:
        return problem(error.detail, "Start the broker with the portal's configuration, or see its log.")
    if waits is RestartReason.NO_ACL:
        return problem(
            "The broker runs without an ACL: every client may do everything.",
            "Stop it, correct acl_file in its configuration, start the portal, then the broker.",
        )
    if waits is RestartReason.PASSWORD:
        return problem(
            "The broker refuses the portal on its internal listener.",
            "Set password_file in its configuration to the portal's file, then restart it.",
        )
    if waits is not None:
        return _has_to_be_restarted(waits, settings)
    return well(f"The broker answers, and enforces generation {applied}.")


def _has_to_be_restarted(reason: RestartReason, settings: Settings) -> Finding:
    how = "The portal does it soon." if settings.broker_restart else "Do it at a quiet time: sessions are kept."
    return warning(f"The broker has to be restarted: {reason}.", how)


def _guarded_broker(installation: Installation, deadline: float) -> Finding:
    try:
        with installation.between_reconciliations():
            control = GuardControl(installation.settings, installation.clock)
            generation, waits = control.check(deadline), control.waits(deadline)
    except BrokerUnavailable as error:
        return problem(error.detail, "Start the broker with the portal's configuration, or see its log.")
    if waits is not None:
        return _has_to_be_restarted(waits, installation.settings)
    return well(f"The broker answers, and its guard enforces generation {generation}.")


def active_devices(installation: Installation) -> int:
    """Return the number of devices that the broker must accept."""
    with installation.snapshot() as tx:
        return devices.count_active(tx)
