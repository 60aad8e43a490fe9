"""Grants that count once they are written, where the broker reads the newest lines before it refuses anybody."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime

from sqlalchemy.engine import Connection

from broker.control import Draft
from broker_provisioning import BrokerProvisioning
from config import Settings
from core.errors import PortalError
from core.fair_share import give_up_share
from core.files import FileLock
from store import brokers
from store.database import Database
from store.generations import BrokerStateRecord
from store.scope import ALL_TENANTS
from workflows.access import BrokerTenants, complete_draft
from workflows.authority.issuers import Authority, Issuers

log = logging.getLogger("portal.reconciliation")


class Granting:
    """Drafts what this node's broker must enforce, and writes it before the proof for those who are granted something.

    ``lock`` is held from a draft until it is installed, in whichever process.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        authority: Authority,
        broker: BrokerProvisioning,
        clock: Callable[[], datetime],
        broker_id: int,
    ) -> None:
        self._timeout = settings.enforce_timeout
        self._database = database
        self._authority = authority
        self._broker = broker
        self._clock = clock
        self._broker_id = broker_id
        self.lock = FileLock(settings.data_dir / ".install.lock")
        self._newest = 0  # the generation up to which a thread of this process has seen that it is written

    def begin(self, tx: Connection, known: BrokerTenants) -> tuple[BrokerStateRecord, Draft, Issuers]:
        """Draft what a snapshot says; the caller holds the lock until it is installed, or discards it."""
        state = brokers.own_state(tx, self._broker_id)
        draft = self._broker.draft(state.applied_generation)
        return state, draft, self._complete(draft, tx, known)

    def _complete(self, draft: Draft, tx: Connection, known: BrokerTenants) -> Issuers:
        try:
            issuers = self._authority.seen_by(tx)
            complete_draft(draft, tx, issuers, self._clock(), known)
        except BaseException:
            draft.discard()
            raise
        return issuers

    def is_granted(self, generation: int) -> bool:
        """Return whether who was admitted at a generation can connect, because that is written."""
        written = self._broker.control.grants_up_to()
        return written is not None and written >= generation

    def grant(self, generation: int) -> bool:
        """Write for the broker what it lacks, while others may be proving what was written before.

        Return whether who was admitted at the generation can connect then. Who is only granted something needs no
        proof; what is taken away by it the next reconciliation proves.
        """
        written = self._broker.control.grants_up_to()
        if written is None:
            return False
        if written >= generation:
            return True
        give_up_share()
        try:
            with self.lock.hold_unless(lambda: self._newest >= generation, self._timeout) as held:
                return not held or self._write(generation)
        except PortalError as error:
            log.warning("a grant waits for the next reconciliation", extra={"problem": error.detail})
            return False

    def _write(self, generation: int) -> bool:
        written = self._broker.control.grants_up_to()  # another one may have begun a new journal meanwhile
        if written is None:
            return False
        if written >= generation:  # by another process
            self._newest = written
            return True
        with ExitStack() as stack:
            with self._database.snapshot(sees=ALL_TENANTS) as tx:
                state = brokers.own_state(tx, self._broker_id)
                draft = self._broker.draft(state.applied_generation)
                stack.callback(draft.discard)
                if draft.since == 0:  # all devices, which one reconciliation writes for everybody who waits
                    return False
                issuers = self._complete(draft, tx, BrokerTenants(tx))
            if not draft.grants_ahead(issuers.broker_ca, issuers.tenants):
                return False
            log_closed(draft)
            draft.install(state.generation, None)
        self._newest = state.generation
        return True


def log_closed(draft: Draft) -> None:
    """Log whose topics cannot be granted, before a draft is installed that denies them everything for it."""
    if draft.closed:
        log.error(
            "devices are denied everything because their topics do not fit the settings",
            extra={"devices": len(draft.closed), "first": next(iter(draft.closed.items()))},
        )
