"""What keeps further tenants from being served while the installation is ready: CAs that cannot sign, stale CRLs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import Connection

from core.metrics import Gauge
from pki.issuers import Issuer
from store import issuers as store_issuers
from store.database import Database
from store.issuers import CrlState
from store.scope import ALL_TENANTS
from store.tables import DEFAULT_TENANT
from workflows.authority.issuers import Authority, RecordedIssuer

CRL_LIFE_LEFT = 1 / 3
_NAME = "portal_tenants_not_ready"
_TEXT = "Tenants beside the first one whose CA cannot sign, or whose CRL was not renewed."


@dataclass(frozen=True, slots=True)
class Check:
    """One dependency; ``problem`` is a sentence for operators, ``None`` if all is well; ``code`` is stable."""

    name: str
    code: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class TenantReadiness:
    """Looks at the CAs of all tenants but the first, whose trouble is the installation's."""

    _database: Database
    _authority: Authority
    _clock: Callable[[], datetime]

    def failed(self) -> dict[str, Check]:
        """Return the first check that fails of each tenant that is not ready, by one query for all of them.

        Raises ``DatabaseUnavailable``.
        """
        if not self._theirs():
            return {}
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return self._failed(tx)

    def _theirs(self) -> list[RecordedIssuer]:
        return [one for one in self._authority.current.with_crl() if one.tenant_id != DEFAULT_TENANT]

    def _failed(self, tx: Connection) -> dict[str, Check]:
        current, now, states = self._authority.current, self._clock(), store_issuers.crl_states(tx)
        missing = {one.id for one in self._authority.missing_keys()}
        found: dict[str, Check] = {}
        for recorded in self._theirs():
            tenant_id = recorded.tenant_id
            issues = current.has_issuing(tenant_id) and current.issuing_of(tenant_id).id == recorded.id
            problem = key_problem([recorded]) if recorded.id in missing else None
            problem = problem or (validity_problem(recorded.issuer, now) if issues else None)
            code = "ca_cannot_sign" if problem else "crl_not_renewed"
            problem = problem or crl_problem(recorded, states.get(recorded.id), now)
            if problem is not None:
                found.setdefault(tenant_id, Check(f"tenant {tenant_id}", code, problem))
        return found

    def gauge(self, tx: Connection, tenants: Sequence[str], *, max_tenants: int) -> list[Gauge]:
        """Return how many are not ready, by tenant for at most ``max_tenants``; nothing for a single tenant."""
        if len(tenants) < 2:
            return []
        failed = self._failed(tx)
        if len(tenants) > max_tenants:
            return [_count(len(failed))]
        further = [name for name in tenants if name != DEFAULT_TENANT]
        return [Gauge(_NAME, _TEXT, ["tenant"], [([name], float(name in failed)) for name in further])]

    def gauge_of(self, tx: Connection, tenant_id: str) -> list[Gauge]:
        """Return what one tenant is told of itself; the transaction may see its rows alone."""
        return [] if tenant_id == DEFAULT_TENANT else [_count(tenant_id in self._failed(tx))]


def _count(value: int) -> Gauge:
    return Gauge(_NAME, _TEXT, [], [([], float(value))])


# --- What can be wrong with a CA, whosever it is ----------------------------------------------------------------------


def key_problem(missing: list[RecordedIssuer]) -> str | None:
    """Say which CAs cannot sign because their keys are not here."""
    if not missing:
        return None
    first, others = missing[0].issuer.name, len(missing) - 1
    names = f"{first} and {others} more CAs" if others else first
    return f"The key of {names} is not here, so nothing is signed with it; restore it from a backup."


def validity_problem(issuer: Issuer, now: datetime) -> str | None:
    """Say that the certificate of a CA has expired, or is not valid yet."""
    if issuer.not_after <= now:
        return f"The issuing CA {issuer.name} has expired; nothing can be signed."
    if now < issuer.not_before:
        return (
            f"The issuing CA {issuer.name} is not valid before {issuer.not_before:%Y-%m-%d %H:%M:%S} UTC; set the"
            " clock, which is behind: until then nothing can be signed."
        )
    return None


def crl_problem(recorded: RecordedIssuer, state: CrlState | None, now: datetime) -> str | None:
    """Say that a CA has no CRL, or one that should have been renewed."""
    crl = None if state is None else state.newest
    if crl is None:
        return f"{recorded.issuer.name} has no CRL yet."
    if (crl.next_update - now) / (crl.next_update - crl.this_update) < CRL_LIFE_LEFT:
        return (
            f"The CRL of {recorded.issuer.name} expires at {crl.next_update:%Y-%m-%d %H:%M} UTC and has not been"
            " renewed; the log has the cause."
        )
    return None
