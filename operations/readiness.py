"""Whether the portal can do its work, each thing it depends on by itself."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from core.errors import PortalError
from pki.crl import sign_crl
from store import generations, issuers
from store.database import Database
from workflows.authority.issuers import Authority
from workflows.reconciliation import Reconciler

log = logging.getLogger("portal.readiness")

CRL_LIFE_LEFT = 1 / 3
# The root's CRL, for which somebody has to bring a key: the log and the doctor say so a month before its end.
ROOT_CRL_SOON = timedelta(days=30)
ROOT_CRL_LEAST = timedelta(days=7)
LEAST_FREE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Check:
    """One dependency; ``problem`` is a sentence for operators, ``None`` where all is well; ``code`` is stable."""

    name: str
    code: str
    problem: str | None


class Readiness:
    """Asks the database, the CA, the CRLs and the broker."""

    def __init__(
        self,
        database: Database,
        authority: Authority,
        reconciler: Reconciler,
        clock: Callable[[], datetime],
        tenant_id: str,
        folders: Sequence[Path] = (),
    ) -> None:
        """``folders`` are those whose disks must have room."""
        self._database = database
        self._authority = authority
        self._reconciler = reconciler
        self._clock = clock
        self._tenant_id = tenant_id
        self._folders = folders

    def checks(self) -> list[Check]:
        """Every check, none left out because another failed."""
        named: list[tuple[str, str, Callable[[], str | None]]] = [
            ("database", "database_unavailable", self._database_problem),
            ("disk", "disk_full", self._disk_problem),
            ("ca", "ca_cannot_sign", self._ca_problem),
            ("crl", "crl_not_renewed", self._crl_problem),
            ("broker files", "broker_files_damaged", self._files_problem),
            ("broker", "broker_not_enforcing", self._broker_problem),
        ]
        return [Check(name, code, _asked(question)) for name, code, question in named]

    def _database_problem(self) -> None:
        self._database.ping()

    def _disk_problem(self) -> str | None:
        for folder in self._folders:
            free = shutil.disk_usage(folder).free
            if free < LEAST_FREE_BYTES:
                return (
                    f"The disk of {folder} has {free >> 10} KiB left; make room before the portal has to refuse work."
                )
        return None

    def _ca_problem(self) -> str | None:
        issuer = self._authority.issuing.issuer
        if issuer.certificate.not_valid_after_utc <= self._clock():
            return f"The issuing CA {issuer.name} has expired; nothing can be signed."
        # Signed, checked and thrown away: the key may be in a token that has gone away.
        now = self._clock()
        sign_crl(issuer, [], number=1, this_update=now, next_update=now + timedelta(seconds=1))
        return None

    def _crl_problem(self) -> str | None:
        now = self._clock()
        with self._database.snapshot() as tx:
            for recorded in self._authority.with_crl():
                crl = issuers.get_crl_head(tx, recorded.id)
                if crl is None:
                    return f"{recorded.issuer.name} has no CRL yet."
                left = (crl.next_update - now) / (crl.next_update - crl.this_update)
                if left < CRL_LIFE_LEFT:
                    return (
                        f"The CRL of {recorded.issuer.name} ends at {crl.next_update:%Y-%m-%d %H:%M} UTC and has not"
                        " been renewed; see the log for why."
                    )
            root = issuers.get_crl(tx, self._authority.root.id)
            if root is not None and root.next_update - now < ROOT_CRL_LEAST:
                return (
                    f"The root's CRL ends at {root.next_update:%Y-%m-%d %H:%M} UTC; bring the root's key back for as"
                    " long as the portal needs to sign another."
                )
        return None

    def _files_problem(self) -> str | None:
        return " ".join(self._reconciler.damage()) or None

    def _broker_problem(self) -> str | None:
        if not self._reconciler.broker_answers():
            return "The broker does not answer on its internal listener; start it, or see its log."
        with self._database.snapshot() as tx:
            state = generations.get_broker_state(tx, self._tenant_id)
        if state.applied_generation < state.generation:
            return (
                f"The broker enforces generation {state.applied_generation}, the newest is {state.generation};"
                " the portal goes on trying."
            )
        return None


def _asked(question: Callable[[], str | None]) -> str | None:
    try:
        return question()
    except PortalError as error:
        return error.detail
    except Exception:
        log.exception("a readiness check failed unexpectedly")
        return "The check failed unexpectedly; the portal's log has the cause."
