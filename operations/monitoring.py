"""What a monitoring system reads: whether the portal is ready, check by check, and its gauges."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from sqlalchemy.engine import Connection

from config import Settings
from core.errors import PortalError
from core.metrics import Gauge
from operations import node_settings
from operations.outside_certificates import outside_certificates
from operations.tenant_gauges import EXPIRING, tenant_gauges
from operations.tenant_readiness import Check, TenantReadiness, crl_problem, key_problem, validity_problem
from pki.crl import sign_crl
from pki.keys.contract import check_that_it_signs
from pki.keys.token_keys import is_in_token
from store import brokers, generations, issuers, nodes
from store import issuers as store_issuers
from store.counts import counts_of
from store.database import Database
from store.generations import BrokerStateRecord
from store.scope import ALL_TENANTS
from store.tables import DEFAULT_TENANT
from workflows.authority.issuers import Authority
from workflows.brokers import BrokerState, states_of
from workflows.connections import KnownContacts
from workflows.other_brokers import NONE_COUNTS
from workflows.reconciliation import Reconciler

log = logging.getLogger("portal.readiness")

# The root's CRL needs the root's key: log and doctor warn a month before the CRL expires.
ROOT_CRL_SOON = timedelta(days=30)
ROOT_CRL_LEAST = timedelta(days=7)
LEAST_FREE_BYTES = 16 << 20


# --- Readiness --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Readiness:
    """Checks the database, the space on the disks of its folders, the CA, its token, the CRLs and the node's broker.

    A node that has none is ready whatever becomes of those elsewhere, but not while none at all counts.

    CAs and CRLs are the first tenant's: those of others keep nobody else from being served.
    """

    _settings: Settings
    _database: Database
    _authority: Authority
    _reconciler: Reconciler
    _clock: Callable[[], datetime]
    _started: datetime  # by this clock

    def checks(self) -> list[Check]:
        """Return all checks; one that fails prevents no other."""
        named: list[tuple[str, str, Callable[[], str | None]]] = [
            ("database", "database_unavailable", self._database_problem),
            ("disk", "disk_full", self._disk_problem),
            ("token", "token_unavailable", self._token_problem),
            ("ca", "ca_cannot_sign", self._ca_problem),
            ("crl", "crl_not_renewed", self._crl_problem),
            ("broker files", "broker_files_damaged", self._files_problem),
            ("broker", "broker_not_enforcing", self._broker_problem),
        ]
        return [Check(name, code, _problem_of(question)) for name, code, question in named]

    def brokers(self) -> list[Check]:
        """Return a check for each broker where there are several, and for each node of a cluster.

        The portal is ready whatever they say.
        """
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            found = states_of(tx, self._clock())
        nodes = [
            Check(
                f"node {name}", "broker_node_down", None if up else f"Nobody can connect to the node {name}; start it."
            )
            for name, up in self._reconciler.broker_nodes().items()
        ]
        if len(found) == 1 and self._settings.has_broker:
            return nodes
        each = [Check(f"broker {one.record.name}", one.code, one.sentence) for one in found]
        return each + nodes

    def nodes(self) -> list[Check]:
        """Return a check of the settings that nodes have in common, where there are several; it prevents nothing."""
        if self._database.is_sqlite:
            return []
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            if len(nodes.working(tx)) < 2:
                return []
            found = node_settings.differences(tx)
        return [
            Check("settings of nodes", "node_settings_differ", node_settings.sentence_about(found) if found else None)
        ]

    def _database_problem(self) -> None:
        self._database.ping()

    def _disk_problem(self) -> str | None:
        for folder in (self._settings.data_dir, self._settings.broker_dir):
            free = shutil.disk_usage(folder).free
            if free < LEAST_FREE_BYTES:
                left = free >> 10
                return f"The disk of {folder} has {left} KiB left; free disk space before the portal refuses requests."
        return None

    def _token_problem(self) -> None:
        key = self._authority.first.issuing.issuer.key
        if key is not None and not callable(key) and is_in_token(key):
            check_that_it_signs(key)

    def _ca_problem(self) -> str | None:
        issuer, now = self._authority.first.issuing.issuer, self._clock()
        if problem := validity_problem(issuer, now):
            return problem
        # Signed, verified and discarded.
        sign_crl(issuer, [], number=1, this_update=now, next_update=now + timedelta(seconds=1))
        return key_problem([one for one in self._authority.missing_keys() if one.tenant_id == DEFAULT_TENANT])

    def _crl_problem(self) -> str | None:
        now = self._clock()
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            states = issuers.crl_states(tx)
            for recorded in self._authority.with_crl():
                ours = recorded.tenant_id == DEFAULT_TENANT
                if ours and (problem := crl_problem(recorded, states.get(recorded.id), now)):
                    return problem
            root = None if self._authority.root.retired else issuers.get_crl(tx, self._authority.root.id)
            if root is not None and root.next_update - now < ROOT_CRL_LEAST:
                return (
                    f"The root's CRL expires at {root.next_update:%Y-%m-%d %H:%M} UTC; put the root's key back into the"
                    " CA folder until the portal has signed another."
                )
        return None

    def _files_problem(self) -> str | None:
        return " ".join(self._reconciler.damage()) or None

    def _broker_problem(self) -> str | None:
        if not self._settings.has_broker:
            with self._database.snapshot(sees=ALL_TENANTS) as tx:
                return None if any(one.counts for one in brokers.list_brokers(tx)) else NONE_COUNTS
        if not self._reconciler.broker_answers():
            advice = (
                "start them, or see PORTAL_RABBITMQ_NODES"
                if self._settings.rabbitmq_nodes
                else "start it, or see its log"
            )
            return f"{self._reconciler.silence.rstrip('.')}; {advice}."
        state = self._reconciler.own_state()
        if state.applied_generation < state.generation and not self._is_being_enforced(state):
            return (
                f"The broker enforces generation {state.applied_generation}, the newest is {state.generation};"
                " the portal keeps trying."
            )
        return self._reconciler.probe_problem()

    def _is_being_enforced(self, state: BrokerStateRecord) -> bool:
        """Whether the broker is only as far behind as it always is while there are changes all the time.

        It has been since this process started, no attempt of this process has failed since, and either the newest
        change or the last proof is not older than what a client waits for one.
        """
        if state.applied_at is None or state.applied_at < self._started or self._reconciler.is_failing():
            return False
        now, most = self._clock(), timedelta(seconds=self._settings.enforce_timeout)
        times = [since for since in (state.applied_at, state.pending_since) if since is not None]
        return any(timedelta(0) <= now - since < most for since in times)


def _problem_of(question: Callable[[], str | None]) -> str | None:
    try:
        return question()
    except PortalError as error:
        return error.detail
    except Exception:
        log.exception("a readiness check failed unexpectedly")
        return "The check failed unexpectedly; the portal's log has the cause."


# --- Gauges -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Monitoring:
    """Reads gauges from the database, the files and the broker: the same in every process."""

    _settings: Settings
    _database: Database
    _reconciler: Reconciler
    _clock: Callable[[], datetime]
    _contacts: KnownContacts
    _tenants: TenantReadiness

    def gauges(self) -> list[Gauge]:
        """Return all gauges; takes about 0.15 s with 100,000 devices."""
        now = self._clock()
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            stored = [*self._of_tenants(tx, None, now), *self._generations(tx, now)]
            stored += _of_brokers(states_of(tx, now), now)
            issuers = store_issuers.issuer_expiries(tx)
        up = [float(self._reconciler.broker_answers())] if self._settings.has_broker else []
        text = "1 if the broker beside this node answers on its internal listener, else 0."
        return [
            *stored,
            *self._expiries(issuers, now),
            *(_gauge("portal_broker_up", text, value) for value in up),
            _gauges(
                "portal_broker_node_up",
                "1 if clients reach a node of the broker's cluster, else 0.",
                "node",
                [(name, float(is_up)) for name, is_up in self._reconciler.broker_nodes().items()],
            ),
        ]

    def gauges_of(self, tenant_id: str) -> list[Gauge]:
        """Return what concerns one tenant alone, and says nothing of others or of the installation."""
        with self._database.snapshot() as tx:
            return self._of_tenants(tx, tenant_id, self._clock())

    def _of_tenants(self, tx: Connection, tenant_id: str | None, now: datetime) -> list[Gauge]:
        contacts, within = self._contacts.read(), list(EXPIRING.values())
        counts = counts_of(tx, now=now, within=within, tenant_id=tenant_id, at_brokers=contacts.narrowed)
        known, most = contacts.are_current, self._settings.metrics_tenants
        return [
            *tenant_gauges(counts, max_tenants=most, now=now, connections_known=bool(contacts.heard)),
            _gauge(
                "portal_connections_known", "1 if it is known of every broker which devices are connected to it.", known
            ),
            *self._tenants_ready(tx, tenant_id, list(counts)),
        ]

    def _tenants_ready(self, tx: Connection, tenant_id: str | None, names: Sequence[str]) -> list[Gauge]:
        if tenant_id is not None:
            return self._tenants.gauge_of(tx, tenant_id)
        return self._tenants.gauge(tx, names, max_tenants=self._settings.metrics_tenants)

    def _generations(self, tx: Connection, now: datetime) -> list[Gauge]:
        state = generations.get_broker_state(tx)
        pending = 0.0 if state.pending_since is None else max(0.0, (now - state.pending_since).total_seconds())
        return [
            _gauge("portal_generation", "The newest generation of what the broker must know.", state.generation),
            _gauge(
                "portal_generation_enforced",
                "The newest generation that every broker which counts was seen to enforce.",
                state.applied_generation,
            ),
            _gauge(
                "portal_generation_pending_seconds",
                "Time since every broker was last seen to enforce the newest generation; 0 if all do.",
                pending,
            ),
        ]

    def _expiries(self, issuers: Sequence[tuple[str, datetime, datetime | None]], now: datetime) -> list[Gauge]:
        def left(ends: Iterable[tuple[str, datetime | None]]) -> list[tuple[str, float]]:
            return [(name, (end - now).total_seconds()) for name, end in ends if end is not None]

        settings = self._settings
        responders = [(name, _expiry_of(settings.ocsp_dir / f"{name}.pem")) for name, _, _ in issuers]
        files = {"portal": settings.tls_dir / "server.pem"}
        files |= {"broker": settings.broker_file("server.pem")} if settings.has_broker else {}
        own = [(name, _expiry_of(path)) for name, path in files.items()]
        refused = [(one.server, float(one.refused() is not None)) for one in outside_certificates(settings)]
        crls, cas = [(name, crl) for name, _, crl in issuers], [(name, end) for name, end, _ in issuers]
        return [
            _gauges(
                "portal_crl_life_left_seconds", "Time until the newest CRL of an issuer expires.", "issuer", left(crls)
            ),
            _gauges(
                "portal_ca_life_left_seconds", "Time until the certificate of an issuer expires.", "issuer", left(cas)
            ),
            _gauges(
                "portal_ocsp_responder_life_left_seconds",
                "Time until the certificate that signs an issuer's OCSP responses expires.",
                "issuer",
                left(responders),
            ),
            _gauges(
                "portal_server_certificate_life_left_seconds",
                "Time until the portal's or the broker's own certificate expires.",
                "server",
                left(own),
            ),
            _gauges(
                "portal_server_certificate_refused",
                "1 if the newest certificate of another issuer cannot be used, else 0.",
                "server",
                refused,
            ),
        ]


def _of_brokers(states: Sequence[BrokerState], now: datetime) -> list[Gauge]:
    heard = [(one.record.name, one.record.reported_at) for one in states]
    return [
        _gauges(
            "portal_broker_generation_enforced",
            "The newest generation that a broker was seen to enforce.",
            "broker",
            [(one.record.name, one.record.applied_generation) for one in states],
        ),
        _gauges(
            "portal_broker_counts",
            "1 if a change is enforced only once this broker enforces it, 0 if it was declared away or has not joined.",
            "broker",
            [(one.record.name, float(one.record.counts)) for one in states],
        ),
        _gauges(
            "portal_broker_reported_seconds",
            "Time since a broker was last heard of, or proved something; no value before.",
            "broker",
            [(name, max(0.0, (now - at).total_seconds())) for name, at in heard if at is not None],
        ),
    ]


def _gauge(name: str, text: str, value: float) -> Gauge:
    return Gauge(name, text, [], [([], value)])


def _gauges(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Gauge:
    return Gauge(name, text, [label], [([key], value) for key, value in values])


def _expiry_of(path: Path) -> datetime | None:
    """Return when the certificate in a file expires; ``None`` if it cannot be read, which ``/readyz`` reports."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return None
