"""What holds for each tenant: its topics, its choices, its quotas, and whether it is served."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import Connection

from config import Settings
from core.broker_control import ControlKind
from core.errors import NotFound, PortalError, StartupError, TenantSuspended, TooManyRegistrations
from core.rates import Rates, Taken
from core.tenants import Quotas, TenantOnBroker, TenantStatus, overlapping
from delivery.formats import BundleFormat
from store import tenants
from store.database import Database
from store.scope import ALL_TENANTS
from store.tables import DEFAULT_TENANT
from store.tenants import TenantRecord

log = logging.getLogger("portal.tenants")

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_LOOKS_AT_ALL = 60.0


@dataclass(frozen=True, slots=True)
class TenantTerms:
    """What holds for a tenant, the installation's settings where it has chosen nothing itself.

    Below ``topic_prefix`` are its devices' topics, below all of ``application_prefixes`` what applications may have.
    """

    id: str
    status: TenantStatus
    topic_prefix: str
    application_prefixes: tuple[str, ...]
    device_days: int
    key_type: str
    bundle_format: BundleFormat
    link_hours: int
    quotas: Quotas

    @property
    def on_broker(self) -> TenantOnBroker | None:
        """The tenant as the broker knows it, ``None`` for the first one."""
        if self.id == DEFAULT_TENANT:
            return None
        return TenantOnBroker(self.id, self.topic_prefix, self.status is not TenantStatus.ACTIVE)

    def check_served(self) -> None:
        """Raise ``TenantSuspended`` unless the tenant is active."""
        if self.status is not TenantStatus.ACTIVE:
            raise TenantSuspended(f"The tenant is {self.status}: ask an operator of the role system.")


def check_tenants(settings: Settings, records: Sequence[TenantRecord]) -> None:
    """Raise ``StartupError`` if the settings do not keep the tenants that there are apart on the broker."""
    others = [record for record in records if record.topic_prefix is not None]
    there = [record.id for record in others if record.status is not TenantStatus.REMOVED]
    if there and not settings.broker_control.by_journal:
        raise StartupError(
            f"There are further tenants ({', '.join(there[:3])}), which only the guard in the broker keeps apart: set"
            " PORTAL_BROKER_CONTROL=guard."
        )
    without = sorted({*there} - settings.rabbitmq_tenant_ports.keys())
    if without and settings.broker_control is ControlKind.RABBITMQ:
        raise StartupError(
            f"RabbitMQ has no listener for the tenants {', '.join(without[:3])}: set PORTAL_RABBITMQ_TENANT_PORTS."
        )
    for record in others:
        if (taken := overlapping(str(record.topic_prefix), settings.application_prefixes)) is not None:
            raise StartupError(
                f"The topics of the tenant {record.id} are below {record.topic_prefix}, which overlaps with {taken}:"
                " change PORTAL_TOPIC_PREFIX or PORTAL_TOPIC_PREFIXES."
            )


@dataclass(frozen=True, slots=True)
class _Seen:
    """The terms of a tenant, and when they were read, by the monotonic clock."""

    terms: TenantTerms
    at: float


class TenantDirectory:
    """The terms of each tenant, from memory; a change made by another process is seen within a second.

    Each is read when it is asked for, so that what a request costs does not grow with the number of tenants.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        """Use a database that has tenants."""
        self._settings = settings
        self._database = database
        self._looking = threading.Lock()
        self.refresh()

    def of(self, tenant_id: str) -> TenantTerms:
        """Return the terms of a tenant; raises ``NotFound``."""
        seen = self._seen.get(tenant_id)
        if seen is None:
            return self._read(tenant_id)
        if time.monotonic() - seen.at >= SECONDS_BETWEEN_LOOKS and self._looking.acquire(blocking=False):
            try:
                return self._read(tenant_id)
            except NotFound:
                self._seen.pop(tenant_id, None)
                raise
            except PortalError as error:
                self._seen[tenant_id] = _Seen(seen.terms, time.monotonic())
                log.error("a tenant cannot be read; what is known of it stays", extra={"problem": error.detail})
            finally:
                self._looking.release()
        return seen.terms

    def check_label(self, label: str) -> None:
        """Raise ``NotFound`` unless an EST label is the name of a tenant, ``TenantSuspended`` if that is not served."""
        try:
            self.of(label).check_served()
        except NotFound as error:
            raise NotFound("Unknown EST label; leave it out, or use the tenant's name.") from error

    @property
    def are_several(self) -> bool:
        """Whether there is any tenant beside the first one."""
        return bool(self._of_all("several", tenants.are_several, SECONDS_BETWEEN_LOOKS))

    @property
    def longest_link_hours(self) -> int:
        """For how many hours a link of any tenant can be good."""
        chosen = self._of_all("link hours", tenants.longest_link_hours, SECONDS_BETWEEN_LOOKS_AT_ALL)
        return max(chosen, self._settings.link_hours)

    def refresh(self) -> None:
        """Forget what was read, after a change."""
        self._seen: dict[str, _Seen] = {}
        self._figures: dict[str, tuple[int, float]] = {}

    def _read(self, tenant_id: str) -> TenantTerms:
        now = time.monotonic()
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            terms = self._terms_of(tenants.get_tenant(tx, tenant_id))
        self._seen[tenant_id] = _Seen(terms, now)
        return terms

    def _of_all(self, name: str, question: Callable[[Connection], int], seconds: float) -> int:
        """Return an answer of the database about all tenants, at most so many seconds old."""
        now = time.monotonic()
        known, at = self._figures.get(name, (0, -math.inf))
        if now - at >= seconds:
            try:
                with self._database.snapshot(sees=ALL_TENANTS) as tx:
                    known = question(tx)
            except PortalError as error:
                if at == -math.inf:
                    raise
                log.error("the tenants cannot be read; what is known stays", extra={"problem": error.detail})
            self._figures[name] = known, now
        return known

    def _terms_of(self, record: TenantRecord) -> TenantTerms:
        settings, choices = self._settings, record.choices
        own_prefix = record.topic_prefix
        return TenantTerms(
            id=record.id,
            status=record.status,
            topic_prefix=settings.topic_prefix if own_prefix is None else own_prefix,
            application_prefixes=settings.application_prefixes if own_prefix is None else (own_prefix,),
            device_days=choices.device_days or settings.device_days,
            key_type=choices.key_type or settings.key_type,
            bundle_format=BundleFormat(choices.bundle_format or BundleFormat.ZIP),
            link_hours=choices.link_hours or settings.link_hours,
            quotas=record.quotas,
        )


@dataclass(frozen=True, slots=True)
class TenantRates:
    """What each tenant takes of a minute, counted in all processes of the data folder together."""

    _rates: Rates
    _clock: Callable[[], datetime]

    def take_registration(self, tenant: TenantTerms) -> None:
        """Count a device or application that is to be registered; raises ``TooManyRegistrations``."""
        if not (taken := self.take_registrations(tenant, 1)).number:
            raise too_many_registrations(tenant, taken.wait)

    def take_registrations(self, tenant: TenantTerms, wanted: int) -> Taken:
        """Count up to ``wanted`` that are to be registered."""
        return self._take("registrations", tenant.id, wanted, tenant.quotas.registrations_per_minute)

    def take_deliveries(self, tenant: TenantTerms, wanted: int) -> Taken:
        """Count up to ``wanted`` events that are to be sent."""
        return self._take("deliveries", tenant.id, wanted, tenant.quotas.webhook_deliveries_per_minute)

    def _take(self, what: str, tenant_id: str, wanted: int, limit: int | None) -> Taken:
        return self._rates.take(f"{what} {tenant_id}", wanted, limit, self._clock().timestamp())


def too_many_registrations(tenant: TenantTerms, wait: int) -> TooManyRegistrations:
    """Return the refusal of a tenant that has registered as many as it may in this minute."""
    limit = tenant.quotas.registrations_per_minute
    return TooManyRegistrations(
        f"The tenant may register {limit} devices and applications a minute; try again in {wait} seconds.", wait
    )
