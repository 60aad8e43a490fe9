"""Checks of the broker's files against the database entry by entry, and of the broker that should obey them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from cryptography import x509

from broker.acl import DENY_ALL, GENERATION_TOPIC, PORTAL_USER, REFUSED_TOPIC, Acl
from broker.crl import read_crls
from broker.files import CRL_FILE, BrokerFiles
from broker.reload import peer_process
from broker.session import FAILURE, NOT_AUTHORISED, SUCCESS, Session, connect_unix
from config import AclStyle
from core.installed_style import ACL_FILE
from core.states import ON_CRL, IssuerKind
from operations.doctor.findings import Verdict, problem, some, together, warning, well
from operations.doctor.subject import SECONDS, Subject
from store import generations, issuers
from store.tables import Certificate, Device
from workflows.enforcement_acl import denials, put_into_acl

_REPAIRS = "The portal writes it anew within seconds while it runs: see that it does, and its log."
_PENDING = "See the line on the generation."


def broker_files(subject: Subject) -> Verdict:
    """Whether the files are as the portal wrote them."""
    files = BrokerFiles(subject.settings, subject.clock)
    if files.damage():
        with subject.between_passes():
            found = [problem(damage, _REPAIRS) for damage in files.damage()]
        if found:
            return together(found, "")
    return well(f"They are as the portal wrote them at generation {files.installed_generation()}.")


# --- Entry by entry -----------------------------------------------------------------------------------------------


def acl_entries(subject: Subject) -> Verdict:
    """Whether the ACL lets in every active device with its topics, and nobody else."""
    settings = subject.settings
    wanted, later = Acl(settings.acl_style, settings.topic_prefix), set()
    with subject.between_passes():
        installed = BrokerFiles(settings, subject.clock).installed_generation() or 0
        content = settings.broker_file(ACL_FILE).read_bytes()
        with subject.snapshot() as tx:
            per_device, now = settings.acl_style is AclStyle.PER_DEVICE, subject.clock()
            changes = generations.acl_changes(tx, subject.tenant_id, since=0, defaults=per_device)
            out = () if per_device else denials(tx, subject.tenant_id, applied=installed, now=now)
            for change in itertools.chain(changes, out):
                if change.generation > installed:
                    later.add(change.device_id)  # on its way to the broker
                else:
                    put_into_acl(wanted, change, now)
            expected, there = _blocks(wanted.render(installed)), _blocks(content)
            # A denial that is needed no longer may stay until the next pass.
            denied = [user for user in there.keys() - expected.keys() if there[user] == DENY_ALL]
            denied_still = generations.denied_among(tx, subject.tenant_id, denied)
    found = compare_acl(expected, there, later | denied_still)
    if wanted.closed:
        found.append(
            warning(
                f"{len(wanted.closed)} devices may do nothing, because their topics do not fit the settings:"
                f" {some(list(wanted.closed))}.",
                "Change their topics, or PORTAL_ACL_STYLE and PORTAL_TOPIC_PREFIX.",
            )
        )
    pending = f" {len(later)} more are on their way." if later else ""
    return together(found, f"It holds what the database says, no more and no less: {len(wanted)} devices.{pending}")


def compare_acl(wanted: Mapping[str, str], there: Mapping[str, str], later: set[str]) -> list[Verdict]:
    """What differs between two ACLs, each the text of the block by user, but for the users in ``later``."""
    missing = sorted(wanted.keys() - there.keys() - later)
    unknown = sorted(there.keys() - wanted.keys() - later)
    other = sorted(user for user in wanted.keys() & there.keys() - later if wanted[user] != there[user])
    found = []
    if missing:
        found.append(problem(f"{len(missing)} entries are missing: {some(missing)}.", _REPAIRS))
    if unknown:
        found.append(problem(f"{len(unknown)} entries should not be there: {some(unknown)}.", _REPAIRS))
    if other:
        found.append(problem(f"{len(other)} entries give other topics: {some(other)}.", _REPAIRS))
    return found


def _blocks(content: bytes) -> dict[str, str]:
    """The text of each user's block; what stands before the first is that of the empty name."""
    blocks: dict[str, str] = {}
    user = ""
    for line in content.decode("utf-8", "replace").splitlines():
        if line.startswith("user "):
            user = line.removeprefix("user ")
        elif not line.startswith("#"):
            blocks[user] = blocks.get(user, "") + line + "\n"
    return blocks


def crl_entries(subject: Subject) -> Verdict:
    """Whether the CRL lists every revoked certificate that has not expired, and no other."""
    now, found, count = subject.clock(), [], 0
    with subject.between_passes():
        crls = read_crls(subject.settings.broker_file(CRL_FILE).read_bytes())
        with subject.snapshot() as tx:
            pending = _is_pending(subject, tx)
            for issuer in issuers.list_issuers(tx):
                if issuer.kind == IssuerKind.ROOT:
                    continue
                subject_name = x509.load_der_x509_certificate(issuer.der).subject
                listed = {f"{entry.serial_number:x}" for crl in crls if crl.issuer == subject_name for entry in crl}
                revoked = tx.execute(
                    sa.select(Certificate.serial_number, Certificate.not_after).where(
                        Certificate.issuer_id == issuer.id, Certificate.status.in_(ON_CRL)
                    )
                ).all()
                count += len(listed)
                missing = sorted({serial for serial, end in revoked if end > now} - listed)
                extra = sorted(listed - {serial for serial, _ in revoked})
                if missing and pending:
                    found.append(warning(f"{len(missing)} revoked certificates are on their way to the CRL.", _PENDING))
                elif missing:
                    found.append(
                        problem(f"{len(missing)} revoked certificates are not on the CRL: {some(missing)}.", _REPAIRS)
                    )
                if extra:
                    found.append(
                        problem(f"{len(extra)} certificates are on the CRL but not revoked: {some(extra)}.", _REPAIRS)
                    )
    return together(found, f"It lists what the database says, no more and no less: {count} certificates.")


def _is_pending(subject: Subject, tx: sa.Connection) -> bool:
    """Whether something was revoked that the newest CRL cannot have yet."""
    for issuer in issuers.list_issuers(tx):
        crl = issuers.get_crl(tx, issuer.id)
        if issuer.kind == IssuerKind.ISSUING and (crl is None or issuer.revoked_generation > crl.generation):
            return True
    installed = BrokerFiles(subject.settings, subject.clock).installed_generation() or 0
    return any(
        crl is not None and crl.generation > installed
        for crl in (issuers.get_crl(tx, issuer.id) for issuer in issuers.list_issuers(tx))
    )


# --- The broker itself --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Running:
    """The broker that answers on the internal listener: its process, 0 where that cannot be seen."""

    pid: int


def running_broker(subject: Subject) -> Running | None:
    """The broker's process, ``None`` where none answers."""
    deadline = time.monotonic() + SECONDS
    try:
        with connect_unix(subject.settings.broker_socket, deadline) as sock:
            return Running(peer_process(sock))
    except OSError:
        return None


def broker(subject: Subject) -> Verdict:
    """Whether the broker answers, and obeys the generation that it was last seen to enforce."""
    settings = subject.settings
    with subject.snapshot() as tx:
        applied = generations.get_broker_state(tx, subject.tenant_id).applied_generation
    deadline = time.monotonic() + SECONDS
    try:
        with Session(connect_unix(settings.broker_socket, deadline), deadline) as session:
            reason = session.connect("portal-doctor", PORTAL_USER, _password(settings.secrets_dir / "broker-password"))
            if reason != SUCCESS:
                return problem(
                    f"The broker refuses the portal on its internal listener with reason 0x{reason:02x}.",
                    "Make password_file in its configuration name the portal's file, and reload it.",
                )
            if session.publish(REFUSED_TOPIC) != NOT_AUTHORISED:
                return problem(
                    "The broker runs without an access list: everybody may do everything.",
                    "Stop it, see acl_file in its configuration, start the portal, then the broker.",
                )
            # A pass may have gone on meanwhile: then a newer generation is in force.
            in_force = session.publish(f"{GENERATION_TOPIC}/{applied}") < FAILURE
            if not in_force:
                with subject.snapshot() as tx:
                    applied = generations.get_broker_state(tx, subject.tenant_id).applied_generation
                in_force = session.publish(f"{GENERATION_TOPIC}/{applied}") < FAILURE
    except OSError as error:
        said = error.strerror or str(error) or type(error).__name__
        return problem(
            f"The broker does not answer on its internal listener {settings.broker_socket}: {said}.",
            "Start the broker with the portal's configuration, or see its log.",
        )
    if not in_force:
        return problem(f"The broker does not obey generation {applied}.", "Reload it; the portal's log says more.")
    return well(f"It answers, and obeys generation {applied}.")


def _password(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


def active_devices(subject: Subject) -> int:
    """How many devices the broker is to let in."""
    with subject.snapshot() as tx:
        count: int = tx.execute(
            sa.select(sa.func.count())
            .select_from(Device)
            .where(Device.tenant_id == subject.tenant_id, Device.status == "active")
        ).scalar_one()
    return count
