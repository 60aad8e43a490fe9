"""The figures of the portal that are read at the moment somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from config import Settings
from core.metrics import Gauge
from core.states import DeviceStatus
from store import audit, certificates, deliveries, generations, webhooks
from store import devices as store_devices
from store import issuers as store_issuers
from store.database import Database
from workflows.reconciliation import Reconciler

EXPIRING = {"7d": timedelta(days=7), "30d": timedelta(days=30)}


class Monitoring:
    """Facts of the database, the files and the broker: the same whichever process is asked."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        reconciler: Reconciler,
        clock: Callable[[], datetime],
        tenant_id: str,
    ) -> None:
        self._database = database
        self._reconciler = reconciler
        self._clock = clock
        self._tenant_id = tenant_id
        self._ocsp_dir = settings.ocsp_dir
        self._own = {"portal": settings.tls_dir / "server.pem", "broker": settings.broker_file("server.pem")}

    def gauges(self) -> list[Gauge]:
        """Every figure, those of the database from one state of it; some 0.15 s for 100,000 devices."""
        now = self._clock()
        with self._database.snapshot() as tx:
            devices = store_devices.devices_by_status(tx, self._tenant_id)
            ending = certificates.count_expiring(tx, self._tenant_id, now=now, within=list(EXPIRING.values()))
            bundles = deliveries.count_undelivered(tx, self._tenant_id)
            entries = audit.count_audit_entries(tx, self._tenant_id)
            issuers = store_issuers.issuer_expiries(tx)
            state = generations.get_broker_state(tx, self._tenant_id)
            backlog = webhooks.backlog(tx, self._tenant_id).values()
        pending = 0.0 if state.pending_since is None else max(0.0, (now - state.pending_since).total_seconds())
        responders = [(name, _end_of(self._ocsp_dir / f"{name}.pem")) for name, _, _ in issuers]
        own = {name: _end_of(path) for name, path in self._own.items()}
        return [
            Gauge(
                "portal_devices",
                "Devices by status.",
                ["status"],
                [([status], devices.get(status, 0)) for status in DeviceStatus],
            ),
            Gauge(
                "portal_certificates_expiring",
                "Certificates in use by devices that end within this time.",
                ["within"],
                [([name], count) for name, count in zip(EXPIRING, ending, strict=True)],
            ),
            _figure("portal_bundles_undelivered", "Bundles that wait for their download.", bundles),
            _figure("portal_events_waiting", "Events that wait to be sent.", sum(one.waiting for one in backlog)),
            _figure("portal_events_dead", "Events that were given up.", sum(one.dead for one in backlog)),
            _figure(
                "portal_events_oldest_waiting_seconds",
                "For how long the oldest event has waited that was not sent; 0 where none waits.",
                max((max(0.0, (now - one.oldest).total_seconds()) for one in backlog if one.oldest), default=0.0),
            ),
            _figure("portal_audit_entries", "Entries of the audit record.", entries),
            _figure("portal_generation", "The newest generation of what the broker must know.", state.generation),
            _figure(
                "portal_generation_enforced",
                "The newest generation that the broker was seen to enforce.",
                state.applied_generation,
            ),
            _figure(
                "portal_generation_pending_seconds",
                "For how long the broker has not been seen to enforce the newest generation; 0 where it was.",
                pending,
            ),
            Gauge(
                "portal_crl_life_left_seconds",
                "Time until the newest CRL of an issuer ends.",
                ["issuer"],
                [([name], (crl_end - now).total_seconds()) for name, _, crl_end in issuers if crl_end is not None],
            ),
            Gauge(
                "portal_ca_life_left_seconds",
                "Time until the certificate of an issuer ends.",
                ["issuer"],
                [([name], (end - now).total_seconds()) for name, end, _ in issuers],
            ),
            Gauge(
                "portal_ocsp_responder_life_left_seconds",
                "Time until the certificate ends with which OCSP is answered for an issuer.",
                ["issuer"],
                [([name], (end - now).total_seconds()) for name, end in responders if end is not None],
            ),
            Gauge(
                "portal_server_certificate_life_left_seconds",
                "Time until the portal's or the broker's own certificate ends.",
                ["server"],
                [([name], (end - now).total_seconds()) for name, end in own.items() if end is not None],
            ),
            _figure(
                "portal_broker_up",
                "1 where the broker answers on its internal listener, else 0.",
                float(self._reconciler.broker_answers()),
            ),
        ]


def _figure(name: str, text: str, value: float) -> Gauge:
    return Gauge(name, text, [], [([], value)])


def _end_of(path: Path) -> datetime | None:
    """When the certificate in a file ends; ``None`` for one that cannot be read, of which ``/readyz`` speaks."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return None
