"""The overview of a tenant's fleet: how much there is of what, and what somebody has to look after."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pki.issuers import CLOCK_SKEW
from store import generations, issuers
from store.database import Database
from store.generations import BrokerStateRecord
from store.issuers import CrlHead, IssuerRecord
from store.overview import Figures, figures_of
from store.scope import ALL_TENANTS

WEEKS = 13
DAY = timedelta(days=1)
CA_SOON = timedelta(days=90)


@dataclass(frozen=True, slots=True)
class TenantCa:
    """A CA of a tenant, with the head of its newest CRL, if it has one."""

    record: IssuerRecord
    crl: CrlHead | None

    @property
    def crl_made_at(self) -> datetime | None:
        """When its CRL was made: its thisUpdate is earlier, for clients whose clocks are slow."""
        return None if self.crl is None else self.crl.this_update + CLOCK_SKEW


@dataclass(frozen=True, slots=True)
class Overview:
    """A tenant's figures at a time; ``weeks`` are those of ``figures.weeks``, from and to."""

    at: datetime
    figures: Figures
    weeks: Sequence[tuple[datetime, datetime]]
    broker: BrokerStateRecord
    cas: Sequence[TenantCa]

    @property
    def cas_that_end(self) -> list[TenantCa]:
        """The CAs that end within three months."""
        return [ca for ca in self.cas if ca.record.not_after - self.at < CA_SOON]


@dataclass(frozen=True, slots=True)
class Overviews:
    """Reads only, by a few statements whose cost does not grow with the fleet."""

    _database: Database
    _clock: Callable[[], datetime]

    def of(self, tenant_id: str, at_brokers: Collection[int] | None = None) -> Overview:
        """Return the overview of a tenant, with those that are connected ``at_brokers``, ``None`` for all."""
        now = self._clock()
        weeks = [(now + timedelta(weeks=number), now + timedelta(weeks=number + 1)) for number in range(WEEKS)]
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            broker = generations.get_broker_state(tx)
            applied = broker.applied_generation
            figures = figures_of(tx, tenant_id, weeks=weeks, since=now - DAY, applied=applied, at_brokers=at_brokers)
            records = issuers.list_issuers(tx, tenant_id=tenant_id)
            states = issuers.crl_states(tx, [record.id for record in records])
        cas = [
            TenantCa(record, None if (state := states.get(record.id)) is None else state.newest) for record in records
        ]
        return Overview(now, figures, weeks, broker, cas)
