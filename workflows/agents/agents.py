"""The use cases of agents beside brokers elsewhere: how one is added, joins, gets certificates, and reports.

An agent holds no CA key and no database. It is believed only for what it was given: a report names a page of changes by
its digest, which nobody knows who was not sent the page.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy.engine import Connection

import ca
import db
from config import Settings
from core.errors import ClientCertificateRefused, InputInvalid, NotFound, SettingInvalid, StateConflict
from core.setting_values import Address, parse_address
from core.states import BrokerKind
from pki.client_certificates import common_name
from pki.csr import Csr, read_csr
from pki.issuers import Reason, agent_name, server_profile
from store import agents, audit, brokers, certificates, issuers
from store.agents import AgentRecord
from store.audit import Actor
from store.brokers import BrokerRecord
from store.database import Database
from store.scope import ALL_TENANTS
from workflows.agents.runs import ANOTHER_RUN, COPIED, OF_BEFORE, take_run
from workflows.authority.issuers import Authority, RecordedIssuer
from workflows.authority.own import PROBE_DAYS, record_own
from workflows.delivery import KeptAnswers, MadeSecret
from workflows.enforcement import note_applied
from workflows.reconciliation import Reconciler

log = logging.getLogger("portal.agents")

CODE_LIFE = timedelta(hours=1)
AGENT_DAYS = 90
MQTT_PORT = 8883


class AgentCertificate(StrEnum):
    """What an agent has certificates for."""

    AGENT = "agent"  # for the portal: it is an agent, and which
    SERVER = "server"  # the broker's own
    GOOD = "good"  # with these two it tries whether its broker accepts and refuses as it must
    REVOKED = "revoked"


_PURPOSES = {
    AgentCertificate.AGENT: "agent",
    AgentCertificate.SERVER: "server",
    AgentCertificate.GOOD: "canary",
    AgentCertificate.REVOKED: "canary",
}


@dataclass(frozen=True, slots=True)
class NewAgent:
    """A broker that was added, with the code by which its agent joins, which is stored nowhere."""

    broker: BrokerRecord
    code: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Joined:
    """What an agent learns when it joins: its certificate with its chain (PEM), whom it may trust, and where."""

    name: str
    chain: str
    portal_ca: str
    agents_url: str
    settings: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class IssuedCertificates:
    """Certificates with their chains (PEM), and the generation whose CRL lists the revoked one, if there is one."""

    chains: Mapping[AgentCertificate, str]
    generation: int


@dataclass(frozen=True, slots=True)
class Report:
    """What an agent says: how far its broker was seen to obey, by a page that it was given, or what is wrong.

    ``presence`` is the session in which it has told all of who is connected, ``None`` if it has not; ``run`` the id of
    the agent's run.
    """

    generation: int
    digest: str
    problem: str | None
    presence: str | None = None
    run: str = OF_BEFORE


class BrokerAgents:
    """Adds agents, lets them join, certifies their keys, and takes their reports in."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        authority: Authority,
        reconciler: Reconciler,
        answers: KeptAnswers,
        clock: Callable[[], datetime],
        first_tenant: str,
    ) -> None:
        self._settings = settings
        self._database = database
        self._authority = authority
        self._answers = answers
        self._reconciler = reconciler
        self._clock = clock
        self._first_tenant = first_tenant

    # --- Joining

    def add(self, actor: Actor, name: str, address: str, idempotency_key: str | None = None) -> NewAgent:
        """Add a broker elsewhere, which counts once its agent has joined; return the code for that.

        ``address`` is what clients connect to, HOST or HOST:PORT. Requests with one ``idempotency_key`` add one. Raise
        ``StateConflict`` if agents cannot reach this portal or the name is taken, ``InputInvalid`` for an address that
        is none, ``IdempotencyConflict``, and at a repeat ``NotFound`` if the broker has been removed since.
        """
        if self._settings.agents_bind is None:
            raise StateConflict("Agents cannot reach this portal: set PORTAL_AGENTS_BIND, then start it again.")
        address = checked_address(address)
        now, new = self._clock(), MadeSecret("broker", name, secrets.token_hex(16))

        def write(tx: Connection) -> None:
            broker = brokers.add_broker(tx, name, BrokerKind.AGENT, at=now, joined=False, address=address)
            agents.add_agent(tx, broker.id, code=new.secret, expires_at=now + CODE_LIFE)
            audit.record(tx, actor, "broker:add", f"broker:{name}", at=now, address=address)

        made = self._answers.secret_once(actor, idempotency_key, [name, address], new, write)
        with self._database.snapshot() as tx:
            broker = brokers.get_broker(tx, name)
        return NewAgent(broker, made.secret, broker.created_at + CODE_LIFE)

    def join(self, code: str, csr: str) -> Joined:
        """Certify the key of an agent that has the code; from now on its broker counts, and nothing is enforced there.

        Raise ``NotFound`` if the code is unknown, used or expired, ``CsrInvalid`` for the request.
        """
        now, signer = self._clock(), self._authority.first.issuing
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            if not agents.knows_code(tx, code, now=now):
                raise _unknown_code()
        request = read_csr(csr)
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            record = agents.take_code(tx, code, now=now)
            if record is None:
                raise _unknown_code()
            issued = self._sign_agent(signer, request, record.name, now)
            agents.set_certificate(tx, record.broker_id, issued.fingerprint)
            brokers.join(tx, record.broker_id, at=now)
            record_own(tx, self._first_tenant, signer, issued, purpose="agent", now=now)
            actor = audit.system_actor(self._first_tenant)
            audit.record(tx, actor, "broker:join", f"broker:{record.name}", at=now)
        self._reconciler.heard_of_another()
        log.info("an agent has joined", extra={"broker": record.name})
        settings, chain = self._settings, signer.chain_pem(issued.pem)
        return Joined(record.name, chain, self.portal_ca, settings.agents_url, told_settings(settings, record.address))

    @property
    def portal_ca(self) -> str:
        """The roots by which agents verify this portal, PEM."""
        return ca.chain_pem(*self._authority.first.anchors)

    @property
    def root_fingerprint(self) -> str | None:
        """The SHA-256, in hex, of the root by which HTTPS is verified; ``None`` if that is another issuer's."""
        if self._settings.tls_certificate is not None:
            return None
        return hashlib.sha256(self._authority.first.anchors[0].public_bytes(Encoding.DER)).hexdigest()

    @property
    def client_cas(self) -> str:
        """The CAs that agents' certificates are verified by, PEM."""
        return self._authority.first.ca_pem

    # --- What an agent asks for, by its certificate

    def shown(self, certificate: bytes) -> AgentRecord:
        """Return which agent has shown a certificate (DER); one that was issued last counts from then on.

        Raise ``ClientCertificateRefused`` if it is none that counts.
        """
        fingerprint = hashlib.sha256(certificate).hexdigest()
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            record = agents.find_agent(tx, fingerprint)
        if record is None:
            raise ClientCertificateRefused(
                "This certificate is not the newest one of an agent here: add its broker, and join with"
                " portal-server agent join --again."
            )
        if record.certificate != fingerprint:
            with self._database.transaction(sees=ALL_TENANTS) as tx:
                agents.set_certificate(tx, record.broker_id, fingerprint)
        return record

    def certify(self, record: AgentRecord, requests: Mapping[AgentCertificate, str]) -> IssuedCertificates:
        """Certify keys of an agent, of its broker and of its probe; raise ``CsrInvalid``.

        Names are the portal's to decide: the broker's certificate has the host of its address.
        """
        read = {kind: read_csr(csr) for kind, csr in requests.items()}
        now, chains, generation = self._clock(), dict[AgentCertificate, str](), 0
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            if AgentCertificate.REVOKED in read:
                generation = db.next_generation(tx, at=now)
            for kind, request in read.items():
                chains[kind] = self._certify(tx, record, kind, request, now, generation)
        if generation:
            self._reconciler.wake()
        return IssuedCertificates(chains, generation)

    def _certify(
        self, tx: Connection, record: AgentRecord, kind: AgentCertificate, request: Csr, now: datetime, generation: int
    ) -> str:
        is_server, is_revoked = kind is AgentCertificate.SERVER, kind is AgentCertificate.REVOKED
        signer = self._authority.servers if is_server else self._authority.first.issuing
        if is_server:
            issued = self._sign_server(signer, request, record, now)
        elif kind is AgentCertificate.AGENT:
            issued = self._sign_agent(signer, request, record.name, now)
            agents.set_next_certificate(tx, record.broker_id, issued.fingerprint)
        else:
            issued = self._sign_probe(signer, request, now)
        if is_revoked:
            issuers.touch_issuer(tx, signer.id, generation=generation)
        purpose, revoked_at = _PURPOSES[kind], generation if is_revoked else 0
        record_own(tx, self._first_tenant, signer, issued, purpose=purpose, now=now, generation=revoked_at)
        return signer.chain_pem(issued.pem)

    def _sign_agent(self, signer: RecordedIssuer, request: Csr, name: str, now: datetime) -> ca.Issued:
        url = self._settings.pki_url
        return ca.sign_agent_certificate(
            signer.issuer, request.public_key, name=name, now=now, days=AGENT_DAYS, pki_url=url
        )

    def _sign_server(self, signer: RecordedIssuer, request: Csr, record: AgentRecord, now: datetime) -> ca.Issued:
        address = _parsed(record.address)
        if address is None:
            raise StateConflict(
                f"The broker {record.name} has no address HOST:PORT for its certificate; see portal broker update."
            )
        names = (address.host,)
        days, url = self._settings.server_days, self._settings.pki_url
        return ca.sign_server_certificate(
            signer.issuer, request.public_key, names=names, now=now, days=days, pki_url=url
        )

    def _sign_probe(self, signer: RecordedIssuer, request: Csr, now: datetime) -> ca.Issued:
        identity, url = str(uuid.uuid4()), self._settings.pki_url
        return ca.sign_certificate(
            signer.issuer, request.public_key, device_id=identity, now=now, days=PROBE_DAYS, pki_url=url
        )

    def take_run(self, record: AgentRecord, run: str) -> None:
        """Take in that a run of an agent asks for something; raise ``StateConflict`` if another one has begun since."""
        if record.is_run_by(run) or record.copied_since is not None:
            return
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            brokers.take_turns(tx)
            current = agents.get_agent(tx, record.broker_id)
            refusal = None if current is None else take_run(tx, current, run, at=self._clock())
        if refusal is not None:
            raise StateConflict(refusal)

    def report(self, record: AgentRecord, report: Report) -> bool:
        """Take in how far the broker of an agent was seen to obey; return whether it is known who is connected there.

        Raise ``StateConflict`` for a page of changes that the agent was not given, or that was not the last one up to
        its generation, by which nothing is enforced; and whatever it says once two agents run with its key.
        """
        now = self._clock()
        self.take_run(record, report.run)
        if report.problem is not None:
            with self._database.transaction(durable=False, sees=ALL_TENANTS) as tx:
                brokers.take_turns(tx)
                check_run(agents.get_agent(tx, record.broker_id), report.run)
                brokers.set_problem(tx, record.broker_id, report.problem, at=now)
                return _note_presence(tx, record, report, now)
        # If a power cut takes this record back, the same is reported again.
        with self._database.transaction(durable=False, sees=ALL_TENANTS) as tx:
            brokers.take_turns(tx)
            # Read anew: a restore may just have made it forget what it was given.
            current = agents.get_agent(tx, record.broker_id)
            check_run(current, report.run)
            page = None if current is None else current.has_shown(report.generation, report.digest)
            if current is None or page is None or not page.is_last:
                log.error("an agent reports what it was not given", extra={"broker": record.name})
                raise StateConflict("This page of changes was not given to this agent; ask for the changes again.")
            note_applied(tx, record.broker_id, report.generation, at=now)
            brokers.set_problem(tx, record.broker_id, None, at=now)
            knows_presence = _note_presence(tx, current, report, now)
        self._reconciler.heard_of_another()
        return knows_presence


def check_run(record: AgentRecord | None, run: str) -> None:
    """Raise ``StateConflict`` if an agent is not to be believed: another run has begun, or two have one key."""
    check_not_copied(record)
    if record is not None and not record.is_run_by(run):
        raise StateConflict(ANOTHER_RUN)


def check_not_copied(record: AgentRecord | None) -> None:
    """Raise ``StateConflict`` if two agents were seen to run with one key."""
    if record is not None and record.copied_since is not None:
        raise StateConflict(COPIED)


def _note_presence(tx: Connection, record: AgentRecord, report: Report, now: datetime) -> bool:
    """Record that it is known still who is connected, and return whether it is."""
    is_known = bool(report.presence) and report.presence == record.presence_session
    if is_known:
        brokers.note_presence(tx, record.broker_id, at=now)
    return is_known


def revoke_agent(tx: Connection, tenant_id: str, name: str, *, now: datetime) -> None:
    """Revoke the certificates of the agent of a broker; ``tenant_id`` is the first tenant, whose CA has issued them."""
    own = certificates.own_certificates(tx, tenant_id, now=now, purpose="agent")
    revoked = [record for record in own if common_name(x509.load_der_x509_certificate(record.der)) == agent_name(name)]
    generation = db.next_generation(tx, at=now) if revoked else 0
    for record in revoked:
        reason = Reason.CESSATION_OF_OPERATION
        certificates.revoke_own_certificate(tx, record, at=now, reason=reason, generation=generation)
        issuers.touch_issuer(tx, record.issuer_id, generation=generation)


def told_settings(settings: Settings, address: str) -> dict[str, str]:
    """Return what this portal decides of the settings of an agent whose broker has this address, if it has one."""
    told = {"topic_prefix": settings.topic_prefix, "topic_prefixes": ",".join(settings.topic_prefixes)}
    known = _parsed(address)
    return told if known is None else told | {"mqtt_host": known.host, "mqtt_port": str(known.port)}


def _unknown_code() -> NotFound:
    return NotFound("The code is unknown, was used or has expired; remove the broker, and add it again.")


def checked_address(address: str) -> str:
    """Return the address of a broker as HOST:PORT; raise ``InputInvalid`` if it is none."""
    parsed = _parsed(address)
    if parsed is None:
        raise InputInvalid("The address must be HOST or HOST:PORT, such as mqtt.example.org:8883.")
    return str(parsed)


def _parsed(address: str) -> Address | None:
    """Return the address of a broker, which an operator may have changed to anything; ``None`` if it is not one."""
    try:
        parsed = parse_address(address if ":" in address.rpartition("]")[2] else f"{address}:{MQTT_PORT}")
        server_profile((parsed.host,))  # raises for a host that no certificate can name
    except (ValueError, SettingInvalid):
        return None
    return parsed
