"""Opens the portal on its data folder: builds each part once, in order, and creates what a first start lacks."""

from __future__ import annotations

import functools
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime

import db
from broker.folder import SERVER_CERTIFICATE_FILE
from broker_provisioning import BrokerProvisioning
from config import Settings
from core import rates, throttle
from core.errors import TokenUnavailable
from core.fair_share import FairShare
from core.files import FileLock, access_problem, remove_leftovers, replace_file, secret_file
from core.pages import Layout, PageFile, Pages
from core.rates import Rates
from core.served_tenants import ServedTenants
from core.throttle import Throttle
from operations import data_folder, node_settings, nodes
from operations.monitoring import Monitoring, Readiness
from operations.own_certificates import OwnCertificates, probe_certificates
from operations.tenant_readiness import TenantReadiness
from pki.keys.stores import KeyStores
from store import tenants
from store.database import Database
from store.nodes import NodeRecord
from store.pages import PageTable
from store.tables import DEFAULT_TENANT
from workflows import events
from workflows.agents.agents import BrokerAgents
from workflows.agents.feed import AgentFeed
from workflows.agents.presence import AgentPresences
from workflows.attestation.appraisal import DeviceAttestations
from workflows.attestation.nonces import AttestationNonces
from workflows.attestation.policies import AttestationPolicies
from workflows.attestation.reappraisal import Reappraisals
from workflows.audit import AuditLog, AuditLogs, open_audit_logs
from workflows.authority.creation import create_tenant_issuer, open_authority
from workflows.authority.issuers import Authority
from workflows.authority.keys import open_keys
from workflows.authority.ocsp import Responder, ResponderCertificates
from workflows.brokers import Brokers
from workflows.bulk.batch import Batches
from workflows.bulk.processes import CredentialProcesses
from workflows.bulk.upload import Bulk
from workflows.bundles import Bundles
from workflows.connections import KnownContacts
from workflows.credentials import CredentialIssuer
from workflows.delivery import Deliveries, KeptAnswers
from workflows.devices import Inventory
from workflows.enforcement import Enforcements
from workflows.enrolment.approval import Approvals
from workflows.enrolment.clients import TlsClients
from workflows.enrolment.credentials import EnrolmentTokens
from workflows.enrolment.enrolment import Enrolments
from workflows.enrolment.first import FirstEnrolments
from workflows.enrolment.manufacturers import Manufacturers
from workflows.enrolment.reenrolment import Reenrolments
from workflows.groups import Groups
from workflows.mail.mail import Mail
from workflows.oidc.login import SingleSignOn
from workflows.oidc.provider import IdentityProvider
from workflows.operators import Operators
from workflows.overview import Overviews
from workflows.presence import PresenceFollower
from workflows.probe_identities import ProbeIdentities
from workflows.profiles import CertificateProfiles
from workflows.questioners import Questioners
from workflows.reconciliation import Reconciler
from workflows.registration import Registrations
from workflows.renewal import Renewals
from workflows.revocation import DeviceRevocations
from workflows.sessions import Sessions
from workflows.shared_files import SharedFiles
from workflows.tenant_life import Tenants
from workflows.tenant_removal import TenantRemovals
from workflows.tenants import TenantDirectory, TenantRates, check_tenants
from workflows.webhooks.sending import SecretSeal, Sender
from workflows.webhooks.subscriptions import Dispatcher, Webhooks

log = logging.getLogger("portal.installation")

# There while anybody may have subscribed to events.
SUBSCRIBED = ".subscribed"
utc_now = functools.partial(datetime.now, UTC)  # the clock of a portal, unless a test has one of its own


@dataclass(slots=True)
class JobMemory:
    """What the jobs of a process remember from one run to the next."""

    damage: list[str] = field(default_factory=list)  # recorded already; it may last for many attempts at a repair
    disconnected: set[int] = field(default_factory=set)  # superseded certificates, their devices disconnected twice
    root_crl_logged_at: datetime | None = None
    audit_problems: Mapping[str, str] = field(default_factory=dict)  # of each tenant, logged already
    own_issuer: str = ""  # of the certificates that portal and broker show
    broker_restart_at: datetime | None = None  # for its certificate, or when that was told


@dataclass(frozen=True, slots=True, kw_only=True)
class Portal:
    """The parts of an open portal.

    ``first_tenant`` is that of whoever runs the installation. What belongs to no tenant in particular bears it: the
    root, the certificates of portal and broker, and what the portal does by itself.
    """

    settings: Settings
    clock: Callable[[], datetime]
    first_tenant: str
    database: Database
    node: NodeRecord | None  # None on SQLite
    shared_files: SharedFiles
    tenant_terms: TenantDirectory
    fair_share: FairShare
    tenants: Tenants
    brokers: Brokers
    tenant_removals: TenantRemovals
    keys: KeyStores
    authority: Authority
    broker: BrokerProvisioning
    reconciler: Reconciler
    agents: BrokerAgents
    agent_feed: AgentFeed
    questioners: Questioners
    agent_presences: AgentPresences
    own_certificates: OwnCertificates
    registrations: Registrations
    bulk: Bulk
    deliveries: Deliveries
    revocations: DeviceRevocations
    enforcements: Enforcements
    renewals: Renewals
    clients: TlsClients
    profiles: CertificateProfiles
    groups: Groups
    enrolment: Enrolments
    enrolment_tokens: EnrolmentTokens
    manufacturers: Manufacturers
    approvals: Approvals
    nonces: AttestationNonces
    attestations: DeviceAttestations
    attestation_policies: AttestationPolicies
    reappraisals: Reappraisals
    inventory: Inventory
    overviews: Overviews
    operators: Operators
    sign_on: SingleSignOn | None
    sessions: Sessions
    audit_logs: AuditLogs
    webhooks: Webhooks
    dispatcher: Dispatcher
    mail: Mail
    responder: Responder
    readiness: Readiness
    tenant_readiness: TenantReadiness
    monitoring: Monitoring
    contacts: KnownContacts
    follower: PresenceFollower
    presence: ExitStack
    memory: JobMemory = field(default_factory=JobMemory)

    @property
    def audit_log(self) -> AuditLog:
        """The audit record of the first tenant."""
        return self.audit_logs.of(self.first_tenant)

    def named(self, tenant_id: str) -> dict[str, str]:
        """Return the tenant as a log says it: of the first one nothing, so that a single one is not mentioned."""
        return {} if tenant_id == self.first_tenant else {"tenant": tenant_id}

    def close(self) -> None:
        """Close the database's connections, leave the tokens, and give the data folder up."""
        self.bulk.close()
        self.follower.close()
        self.keys.close()
        self.database.close()
        self.presence.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Foundation:
    """What every other part builds on: the database, the CA, the broker and the secrets."""

    settings: Settings
    clock: Callable[[], datetime]
    first_tenant: str
    database: Database
    node: NodeRecord | None
    shared_files: SharedFiles
    tenant_terms: TenantDirectory
    keys: KeyStores
    authority: Authority
    broker: BrokerProvisioning
    reconciler: Reconciler
    own_broker_id: int
    link_keys: list[str]
    pepper: bytes
    sender: Sender
    webhooks: Webhooks
    audit_logs: AuditLogs
    provider: IdentityProvider | None


def open_portal(
    settings: Settings, clock: Callable[[], datetime] = utc_now, served: ServedTenants | None = None
) -> Portal:
    """Build all parts on the data folder; a first start creates the database, the CA and the secrets.

    Several processes may do so at once: one creates, the others find. Those that share requests out among tenants
    together have one ``served``. Raise ``StartupError`` with what to change.
    """
    with ExitStack() as presence:
        presence.enter_context(data_folder.shared(settings))
        with FileLock(settings.data_dir / ".setup.lock").hold():
            foundation = _lay_foundation(settings, clock)
        return _build(foundation, served or ServedTenants(), presence)


def write_trust_anchors(settings: Settings, content: bytes) -> None:
    """Write the CAs of all tenants to ``ca.pem``, which everybody may read, unless it has them already."""
    path = settings.data_dir / "ca.pem"
    if access_problem(path, 0o644, None) is not None or path.read_bytes() != content:
        replace_file(path, content, mode=0o644)


def _lay_foundation(settings: Settings, clock: Callable[[], datetime]) -> _Foundation:
    provider = IdentityProvider(settings) if settings.oidc_issuer else None  # first: its files may be wrong
    folder, first_tenant, subscribed = settings.secrets_dir, DEFAULT_TENANT, settings.data_dir / SUBSCRIBED
    database = Database(settings.database_url, folder=settings.data_dir, threads=settings.threads)
    database.migrate(settings.database_owner_url)
    node = nodes.enter(settings, database)  # before anything is made in a folder that is none
    shared_files = SharedFiles(settings, database)
    shared_files.fetch_all()
    link_keys = secret_file(folder / "link-keys", lambda: secrets.token_urlsafe(32)).split()
    seal = SecretSeal(bytes.fromhex(secret_file(folder / "webhook-key", lambda: secrets.token_hex(32))))
    pepper = bytes.fromhex(secret_file(folder / "idempotency-pepper", lambda: secrets.token_hex(32)))
    node = node or nodes.enter(settings, database)  # the first one, which has secrets now
    if database.is_sqlite:  # else another node may record an event after a subscription at this one
        events.watch(database.engine, subscribed)
    broker, probes = BrokerProvisioning(settings, clock), probe_certificates(settings)
    with database.transaction() as tx:
        tenants.add_tenant(tx, first_tenant, created_at=clock())
        own_broker = nodes.own_broker(tx, node, settings, broker.is_stopped, at=clock())
        check_tenants(settings, tenants.list_tenants(tx))
    audit_logs = open_audit_logs(database, settings, clock)
    keys = open_keys(settings, shared=None if database.is_sqlite else shared_files)
    authority = open_authority(database, keys, settings, first_tenant, now=clock())
    write_trust_anchors(settings, authority.current.broker_ca)
    sender = Sender(settings.webhook_allow, settings.webhook_ca_file, seal)
    answers = KeptAnswers(database, pepper, clock)
    webhooks = Webhooks(database, sender, seal, subscribed, settings.webhook_allow, answers, clock)
    webhooks.look_for_any()
    own_id = 0 if own_broker is None else own_broker.id
    return _Foundation(
        settings=settings,
        clock=clock,
        first_tenant=first_tenant,
        database=database,
        node=node,
        shared_files=shared_files,
        tenant_terms=TenantDirectory(settings, database),
        keys=keys,
        authority=authority,
        broker=broker,
        reconciler=Reconciler(settings, database, authority, broker, probes, clock, first_tenant, own_id),
        own_broker_id=own_id,
        link_keys=link_keys,
        pepper=pepper,
        sender=sender,
        webhooks=webhooks,
        audit_logs=audit_logs,
        provider=provider,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """What several of the use cases work with."""

    bundles: Bundles
    credentials: CredentialIssuer
    answers: KeptAnswers
    clients: TlsClients
    follower: PresenceFollower
    throttle: Throttle
    rates: TenantRates
    nonces: AttestationNonces
    attestations: DeviceAttestations


def _share(base: _Foundation) -> _Shared:
    settings, database, clock = base.settings, base.database, base.clock
    attempts = Throttle(_pages(base, "attempts", throttle.LAYOUT), settings.login_failures)
    nonces = AttestationNonces(database, clock)
    bundles = Bundles(settings, base.authority, base.link_keys)
    return _Shared(
        bundles=bundles,
        credentials=CredentialIssuer(settings, base.authority, bundles),
        answers=KeptAnswers(database, base.pepper, clock),
        clients=TlsClients(settings, database, base.authority, clock),
        follower=PresenceFollower(settings, database, base.broker, base.own_broker_id, clock),
        throttle=attempts,
        rates=TenantRates(Rates(_pages(base, "rates", rates.LAYOUT)), clock),
        nonces=nonces,
        attestations=DeviceAttestations(database, nonces, attempts, clock),
    )


def _pages(base: _Foundation, name: str, layout: Layout) -> Pages:
    """Return where counts are kept: in a file of the data folder, or where nodes share a database, in that."""
    if base.database.is_sqlite:
        return PageFile(base.settings.data_dir / name, layout)
    return PageTable(base.database, layout)


def _build(base: _Foundation, served: ServedTenants, presence: ExitStack) -> Portal:
    settings, clock, first_tenant, database = base.settings, base.clock, base.first_tenant, base.database
    authority, reconciler, shared = base.authority, base.reconciler, _share(base)
    tenant_terms = base.tenant_terms
    credentials, answers, follower = shared.credentials, shared.answers, shared.follower
    contacts = KnownContacts(database, follower.contact, base.own_broker_id, clock)
    return Portal(
        settings=settings,
        clock=clock,
        first_tenant=first_tenant,
        database=database,
        node=base.node,
        shared_files=base.shared_files,
        tenant_terms=tenant_terms,
        fair_share=FairShare(settings.threads, served),
        tenants=(administration := _tenants(base, answers)),
        brokers=Brokers(database, reconciler, clock, first_tenant),
        tenant_removals=TenantRemovals(
            settings, database, administration, reconciler, base.keys, base.audit_logs, base.broker, clock
        ),
        keys=base.keys,
        authority=authority,
        broker=base.broker,
        reconciler=reconciler,
        agents=BrokerAgents(settings, database, authority, reconciler, answers, clock, first_tenant),
        agent_presences=AgentPresences(database, clock),
        agent_feed=AgentFeed(settings, database, authority, reconciler.crls, clock),
        questioners=(questioners := _questioners(base)),
        own_certificates=OwnCertificates(
            settings, database, authority, base.broker, reconciler, clock, first_tenant, questioners
        ),
        registrations=Registrations(
            settings, database, tenant_terms, reconciler, credentials, answers, shared.attestations, shared.rates, clock
        ),
        bulk=_bulk(base, shared),
        deliveries=Deliveries(settings, database, tenant_terms, reconciler, shared.bundles, base.pepper, clock),
        revocations=DeviceRevocations(database, reconciler, clock),
        enforcements=Enforcements(database, reconciler.why_pending),
        renewals=Renewals(
            settings, database, tenant_terms, reconciler, credentials, answers, shared.attestations, clock
        ),
        clients=shared.clients,
        profiles=CertificateProfiles(database, authority, clock),
        groups=Groups(settings, database, tenant_terms, reconciler, clock),
        enrolment=_enrolments(base, shared),
        enrolment_tokens=EnrolmentTokens(database, clock, answers),
        manufacturers=Manufacturers(database, shared.clients, clock),
        approvals=Approvals(settings, database, tenant_terms, clock),
        nonces=shared.nonces,
        attestations=shared.attestations,
        attestation_policies=AttestationPolicies(database),
        reappraisals=Reappraisals(database, clock),
        inventory=Inventory(
            settings, database, tenant_terms, reconciler.crls.sign_put_off, contacts, base.broker, clock
        ),
        overviews=Overviews(database, clock),
        operators=(operators := Operators(database, shared.throttle, clock, answers)),
        sign_on=_sign_on(base, operators),
        sessions=Sessions(database, operators, clock),
        audit_logs=base.audit_logs,
        webhooks=base.webhooks,
        dispatcher=Dispatcher(database, tenant_terms, base.sender, shared.rates, clock),
        mail=Mail(settings, database, reconciler.is_broker_well, clock, first_tenant),
        responder=_responder(base),
        readiness=Readiness(settings, database, authority, reconciler, clock, clock()),
        tenant_readiness=(tenant_readiness := TenantReadiness(database, authority, clock)),
        monitoring=Monitoring(settings, database, reconciler, clock, contacts, tenant_readiness),
        contacts=contacts,
        follower=follower,
        presence=presence.pop_all(),
    )


def _questioners(base: _Foundation) -> Questioners:
    database, clock, first_tenant = base.database, base.clock, base.first_tenant
    probes = ProbeIdentities(database, first_tenant, clock)
    return Questioners(base.settings, database, base.authority, clock, first_tenant, probes, base.own_broker_id)


def _tenants(base: _Foundation, answers: KeptAnswers) -> Tenants:
    settings, database, authority, keys = base.settings, base.database, base.authority, base.keys
    return Tenants(
        settings,
        database,
        base.tenant_terms,
        base.reconciler,
        answers,
        lambda: base.broker.knows_tenants(time.monotonic() + settings.enforce_timeout),
        lambda actor, own_root: create_tenant_issuer(
            database, authority, keys, settings, actor, own_root=own_root, now=base.clock()
        ),
        base.clock,
    )


def _bulk(base: _Foundation, shared: _Shared) -> Bulk:
    processes = CredentialProcesses(base.settings, base.link_keys, shared.credentials)
    batches = Batches(
        base.settings,
        base.database,
        base.tenant_terms,
        base.authority,
        base.reconciler,
        processes,
        shared.rates,
        base.clock,
    )
    return Bulk(base.settings, base.tenant_terms, base.reconciler, processes, batches, base.database.locks)


def _enrolments(base: _Foundation, shared: _Shared) -> Enrolments:
    tenants, credentials = base.tenant_terms, shared.credentials
    first = FirstEnrolments(base.settings, base.database, tenants, credentials, shared.rates, base.clock)
    again = Reenrolments(base.database, tenants, base.reconciler, credentials, base.clock)
    return Enrolments(base.database, base.reconciler, first, again, shared.attestations)


def _sign_on(base: _Foundation, operators: Operators) -> SingleSignOn | None:
    settings = base.settings
    if base.provider is None:
        return None
    return SingleSignOn(
        settings, base.database, base.tenant_terms, operators, base.provider, base.link_keys, base.clock
    )


def _responder(base: _Foundation) -> Responder:
    settings, database, authority, clock = base.settings, base.database, base.authority, base.clock
    certificates = ResponderCertificates(settings, database, authority, clock, base.first_tenant)
    return Responder(certificates, settings, database, authority, clock)


def prepare(portal: Portal) -> None:
    """Renew the portal's own certificates that are due and write the broker's files, before either serves."""
    settings = portal.settings
    with FileLock(settings.data_dir / ".setup.lock").hold():
        node_settings.enter(settings, portal.database, portal.node)  # before anything is granted by them
        for folder in (settings.data_dir, *data_folder.own_folders(settings), settings.broker_dir):
            remove_leftovers(folder)
        if settings.has_broker:
            portal.broker.files.password()  # created, with its file for the broker, if it is missing
        _renew_own_certificates(portal)
        portal.responder.certificates.renew()
        portal.clients.write_authorities()
        with portal.database.transaction() as tx:
            # A setting or a file may have changed while no portal ran, so the broker gets everything again.
            db.next_generation(tx, at=portal.clock())
        portal.reconciler.install()
    for tenant_id, problem in portal.audit_logs.problems().items():
        log.error("the audit record was changed", extra=portal.named(tenant_id) | {"problem": problem})


def _renew_own_certificates(portal: Portal) -> None:
    """Renew what is due; raise ``TokenUnavailable`` only if there is nothing yet with which portal and broker start."""
    try:
        portal.own_certificates.renew()
    except TokenUnavailable as error:
        needed = [portal.settings.tls_dir / "server.pem"]
        needed += [portal.settings.broker_file(SERVER_CERTIFICATE_FILE)] if portal.settings.has_broker else []
        if not all(path.exists() for path in needed):
            raise
        log.error("the portal's own certificates are not renewed", extra={"problem": error.detail})
