"""Opens the portal on its data folder, making at the first start whatever is missing."""

from __future__ import annotations

import logging
import secrets
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import ca
import db
from broker.files import FOLDER_MODE, broker_group
from broker.probe import Canary
from broker_provisioning import BrokerProvisioning
from config import Settings
from core import roles
from core.errors import PortalRunning, StartupError, Unavailable
from core.files import FileLock, private_folder, remove_leftovers, replace_file, secret_file
from core.roles import Role
from core.throttle import Throttle
from operations.backup import restore_journal
from operations.monitoring import Monitoring
from operations.own_certificates import canary_files as canary_files
from operations.own_certificates import is_current
from operations.own_certificates import is_due as is_due
from operations.readiness import Readiness
from pki.algorithms import KeyType, private_key_pem
from pki.keystore import CaKeys, KeyFiles, passphrase
from store import access, issuers
from store.database import Database
from store.tables import DEFAULT_TENANT
from workflows import audit, events
from workflows.authority.issuers import Authority, RecordedIssuer, open_authority
from workflows.authority.ocsp_certificates import ResponderCertificates
from workflows.authority.ocsp_responder import Responder
from workflows.bulk.upload import Bulk
from workflows.credentials import CredentialMaker
from workflows.delivery import Deliveries
from workflows.devices import Inventory
from workflows.enforcement import Enforcement
from workflows.enrolment.approval import Approvals
from workflows.enrolment.clients import Clients
from workflows.enrolment.enrolment import Enrolment
from workflows.enrolment.manufacturers import Manufacturers
from workflows.enrolment.tokens import EnrolmentTokens
from workflows.operators import Operators, new_token
from workflows.registration import Onboarding
from workflows.renewal import Renewals
from workflows.suspension import Suspensions
from workflows.webhooks.dispatch import Dispatcher
from workflows.webhooks.sending import Sender
from workflows.webhooks.signature import SecretSeal
from workflows.webhooks.subscriptions import Webhooks

log = logging.getLogger("portal.installation")

CANARY_DAYS = 90
# Shared by all who have a portal open, held alone by who replaces what they work on.
PRESENCE_LOCK = ".portal.lock"
# There while anybody may have subscribed to events.
SUBSCRIBED = ".subscribed"


def utc_now() -> datetime:
    """The clock of the portal."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Portal:
    """The parts of a running portal, built once."""

    settings: Settings
    database: Database
    keys: CaKeys
    authority: Authority
    broker: BrokerProvisioning
    enforcement: Enforcement
    onboarding: Onboarding
    bulk: Bulk
    deliveries: Deliveries
    suspensions: Suspensions
    renewals: Renewals
    webhooks: Webhooks
    dispatcher: Dispatcher
    clients: Clients
    enrolment: Enrolment
    enrolment_tokens: EnrolmentTokens
    manufacturers: Manufacturers
    approvals: Approvals
    inventory: Inventory
    operators: Operators
    readiness: Readiness
    monitoring: Monitoring
    responder: Responder
    clock: Callable[[], datetime]
    tenant_id: str
    presence: ExitStack

    def close(self) -> None:
        """Close the database's connections, and leave the data folder to others."""
        self.database.close()
        self.presence.close()


@contextmanager
def occupied(settings: Settings) -> Iterator[None]:
    """Be at work on the data folder, beside others; raises ``PortalRunning`` while somebody has it alone."""
    make_folders(settings)
    lock = FileLock(settings.data_dir / PRESENCE_LOCK)
    if restore_journal.is_unsettled(settings):
        with lock.try_hold() as free:
            if free:
                restore_journal.settle(settings)
    with lock.try_share() as present:
        if not present:
            raise PortalRunning(f"A backup is being restored to {settings.data_dir}; try again when that has ended.")
        yield


@contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """Have the data folder alone; raises ``PortalRunning`` while any process has a portal open on it."""
    make_folders(settings)
    with FileLock(settings.data_dir / PRESENCE_LOCK).try_hold() as free:
        if not free:
            raise PortalRunning(f"A portal is at work on {settings.data_dir}; stop it first.")
        restore_journal.settle(settings)
        yield


def open_portal(settings: Settings, clock: Callable[[], datetime] = utc_now) -> Portal:
    """Build all parts on the data folder; a first start makes CA, secrets, canaries and server certificates.

    Several processes may do so at once: one makes, the others find. Raises ``StartupError`` with what to change.
    """
    with ExitStack() as presence:
        presence.enter_context(occupied(settings))
        return _open(settings, clock, presence)


def _open(settings: Settings, clock: Callable[[], datetime], presence: ExitStack) -> Portal:
    with FileLock(settings.data_dir / ".setup.lock").hold():
        database = Database(
            settings.database_url, lock_path=settings.data_dir / ".write.lock", threads=settings.threads
        )
        database.migrate()
        events.watch(database.engine, settings.data_dir / SUBSCRIBED)
        with database.transaction() as tx:
            issuers.add_tenant(tx, DEFAULT_TENANT, created_at=clock())
        keys = KeyFiles(settings.ca_dir, passphrase(settings.ca_passphrase, settings.secrets_dir / "ca-passphrase"))
        authority = open_authority(database, keys, settings, DEFAULT_TENANT, now=clock())
        link_keys = secret_file(settings.secrets_dir / "link-keys", lambda: secrets.token_urlsafe(32)).split()
        pepper = bytes.fromhex(secret_file(settings.secrets_dir / "idempotency-pepper", lambda: secrets.token_hex(32)))
        webhook_key = secret_file(settings.secrets_dir / "webhook-key", lambda: secrets.token_hex(32))
        seal = SecretSeal(bytes.fromhex(webhook_key))
        broker = BrokerProvisioning(settings, clock)
        enforcement = Enforcement(
            settings, database, authority, broker, lambda: canary_files(settings), clock, DEFAULT_TENANT
        )
        replace_file(settings.data_dir / "ca.pem", authority.ca_pem.encode(), mode=0o644)
    responder_certificates = ResponderCertificates(settings, database, authority, clock, DEFAULT_TENANT)
    sender = Sender(settings.webhook_allow, settings.webhook_ca_file, seal)
    marker = settings.data_dir / SUBSCRIBED
    webhooks = Webhooks(database, sender, seal, marker, settings.webhook_allow, clock)
    webhooks.look_for_any()
    credentials = CredentialMaker(settings, authority, link_keys)
    onboarding = Onboarding(settings, database, enforcement, credentials, pepper=pepper, clock=clock)
    renewals = Renewals(settings, database, enforcement, credentials, onboarding, pepper=pepper, clock=clock)
    clients = Clients(settings, database, authority, clock)
    return Portal(
        settings,
        database,
        keys,
        authority,
        broker,
        enforcement,
        onboarding,
        Bulk(settings, database, authority, enforcement, onboarding, credentials, link_keys=link_keys, clock=clock),
        Deliveries(settings, database, onboarding, link_keys, clock),
        Suspensions(database, enforcement, clock),
        renewals,
        webhooks,
        Dispatcher(database, sender, clock),
        clients,
        Enrolment(settings, database, onboarding, credentials, clock),
        EnrolmentTokens(database, clock),
        Manufacturers(database, clients, clock),
        Approvals(database, onboarding, clock),
        Inventory(settings, database),
        Operators(database, Throttle(settings.data_dir / "attempts", settings.login_failures), clock),
        Readiness(database, authority, enforcement, clock, DEFAULT_TENANT, (settings.data_dir, settings.broker_dir)),
        Monitoring(settings, database, enforcement, clock, DEFAULT_TENANT),
        Responder(settings, database, authority, responder_certificates, clock),
        clock,
        DEFAULT_TENANT,
        presence.pop_all(),
    )


def _folders(settings: Settings) -> tuple[Path, ...]:
    own = settings.secrets_dir, settings.ca_dir, settings.tls_dir, settings.ocsp_dir, settings.data_dir / "canaries"
    return settings.data_dir, *own, settings.broker_dir


def prepare(portal: Portal) -> None:
    """Renew what of the portal's own is due and write the broker's files, before broker and portal serve."""
    with FileLock(portal.settings.data_dir / ".setup.lock").hold():
        for folder in _folders(portal.settings):
            remove_leftovers(folder)
        portal.broker.password()  # made with its file for the broker where it is missing
        renew_own_certificates(portal)
        portal.responder.certificates.renew()
        portal.clients.write_authorities()
        with portal.database.transaction() as tx:
            # Whatever changed while nobody looked (a setting, a file), the broker is brought to it anew.
            db.next_generation(tx, portal.tenant_id, at=portal.clock())
        portal.enforcement.install()


def first_token(portal: Portal) -> str:
    """The token of the first operator, an admin, kept in a 0600 file of the data folder; made anew if revoked."""
    path = portal.settings.secrets_dir / "operator-token"
    now = portal.clock()
    if path.exists():
        secret = secret_file(path, lambda: "")
        with portal.database.snapshot() as tx:
            record = access.find_token(tx, roles.hash_token(secret))
        if record is not None and record.is_valid(now):
            return secret
        path.unlink()
    secret, record = new_token(portal.tenant_id, "first operator", Role.ADMIN, None, now=now)
    with portal.database.transaction() as tx:
        access.add_token(tx, record, token_hash=roles.hash_token(secret))
        audit.record(
            tx, audit.system_actor(portal.tenant_id), "token:create", f"token:{record.id}", at=now, role=Role.ADMIN
        )
    return secret_file(path, lambda: secret)


# --- Folders ------------------------------------------------------------------------------------------------------


def make_folders(settings: Settings) -> None:
    """Make the folders with their modes; raises ``StartupError`` where they cannot be written."""
    # The broker, often another user, must be able to pass through the data folder to its own; it can list nothing.
    folders = [(settings.data_dir, 0o711), (settings.secrets_dir, 0o700), (settings.ca_dir, 0o700),
               (settings.tls_dir, 0o700), (settings.ocsp_dir, 0o700),
               (settings.data_dir / "canaries", 0o700)]  # fmt: skip
    try:
        for folder, mode in folders:
            private_folder(folder, mode=mode)
        group = broker_group(settings)
        private_folder(settings.broker_dir, mode=0o700 if group is None else FOLDER_MODE, group=group)
        probe = settings.data_dir / ".writable"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)  # another process that starts has the same probe
    except OSError as error:
        raise StartupError(
            f"The data folder {settings.data_dir} cannot be written ({error.strerror});"
            " make it writable for this user or set PORTAL_DATA_DIR."
        ) from error


# --- The portal's own certificates ----------------------------------------------------------------------------------


def renew_own_certificates(portal: Portal, *, served: bool = False) -> list[str]:
    """Issue anew whatever of the portal's own certificates is due; returns the names of those renewed.

    ``served`` where portal and broker may be at work meanwhile. Raises ``Unavailable`` where the broker does not obey.
    """
    settings, now = portal.settings, portal.clock()
    issuer = portal.authority.issuing.issuer
    canaries = canary_files(settings)
    renewed: list[str] = []
    if is_due(settings.tls_dir / "server.pem", settings.tls_dir / "server.key", now, issuer, settings.server_names):
        chain, key = _issue_server(portal, settings.server_names)
        replace_file(settings.tls_dir / "server.key", key)
        replace_file(settings.tls_dir / "server.pem", chain)
        renewed.append("portal server certificate")
    broker_files = settings.broker_file("server.pem"), settings.broker_file("server.key")
    if is_due(*broker_files, now, issuer, settings.broker_names):
        portal.broker.write_server_certificate(*_issue_server(portal, settings.broker_names))
        renewed.append("broker server certificate")
    if is_due(canaries.good.certificate, canaries.good.key, now, issuer):
        _issue_canary(portal, canaries.good, revoked=False)
        renewed.append("good canary")
    if is_due(canaries.revoked.certificate, canaries.revoked.key, now, issuer):
        # One that is out of date proves nothing: no pass would end well before the new one is in its place.
        of_use = is_current(canaries.revoked.certificate, now)
        _issue_canary(portal, canaries.revoked, revoked=True, served=served and of_use)
        renewed.append("revoked canary")
    for name in renewed:
        log.info("issued", extra={"what": name})
    return renewed


def _issue_server(portal: Portal, names: tuple[str, ...]) -> tuple[bytes, bytes]:
    key, signer = ca.generate_keypair(KeyType.EC_P256), portal.authority.issuing
    issued = ca.sign_server_certificate(
        signer.issuer,
        key.public_key(),
        names=names,
        now=portal.clock(),
        days=portal.settings.server_days,
        pki_url=portal.settings.pki_url,
    )
    _record(portal, signer, issued, purpose="server", revoked=False)
    return signer.chain_pem(issued.pem).encode(), private_key_pem(key)


def _issue_canary(portal: Portal, canary: Canary, *, revoked: bool, served: bool = False) -> None:
    now = portal.clock()
    key, signer = ca.generate_keypair(KeyType.EC_P256), portal.authority.issuing
    issued = ca.sign_certificate(
        signer.issuer,
        key.public_key(),
        device_id=str(uuid.uuid4()),
        now=now,
        days=CANARY_DAYS,
        pki_url=portal.settings.pki_url,
    )
    generation = _record(portal, signer, issued, purpose="canary", revoked=revoked)
    # Shown to a broker whose CRL does not list it yet, it would be let in, and look like a hole.
    listed = not served or portal.enforcement.apply(generation).covers(generation)
    if not listed and portal.enforcement.broker_answers():
        raise Unavailable("The broker did not take the CRL with the new revoked canary; the next try is to come.")
    replace_file(canary.key, private_key_pem(key))
    replace_file(canary.certificate, signer.chain_pem(issued.pem).encode())


def _record(portal: Portal, signer: RecordedIssuer, issued: ca.Issued, *, purpose: str, revoked: bool) -> int:
    """Record a certificate; returns the generation at which it stands on the CRL, 0 where it does not."""
    now, generation = portal.clock(), 0
    with portal.database.transaction() as tx:
        db.add_certificate(
            tx,
            tenant_id=portal.tenant_id,
            issuer_id=signer.id,
            purpose=purpose,
            serial_number=issued.serial_number,
            fingerprint=issued.fingerprint,
            der=issued.der,
            not_before=issued.not_before,
            not_after=issued.not_after,
            issued_at=now,
            revoked_at=now if revoked else None,
            reason="cessation_of_operation" if revoked else None,
        )
        if revoked:
            generation = db.next_generation(tx, portal.tenant_id, at=now)
            issuers.touch_issuer(tx, signer.id, generation=generation)
        audit.record(
            tx,
            audit.system_actor(portal.tenant_id),
            "certificate:issue",
            f"certificate:{issued.serial_number}",
            at=now,
            purpose=purpose,
        )
    return generation
