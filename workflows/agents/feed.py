"""What an agent is given: pages of changes from one snapshot of the database each, and the CAs with their CRLs."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

import ca
from broker.guard.feed import MAX_IN_MEMORY, NOTHING, FeedDraft, Lines, Mark, Page, TrustNames
from config import Settings
from core.errors import PortalError, StateConflict
from store import agents, generations
from store.agents import AgentRecord, Given
from store.database import Database
from store.issuers import KnownCrlStates
from store.scope import ALL_TENANTS
from store.tables import DEFAULT_TENANT
from workflows.access import BrokerTenants, complete_draft
from workflows.agents.agents import told_settings
from workflows.authority.crl_publication import CrlPublication
from workflows.authority.issuers import Authority, Issuers

log = logging.getLogger("portal.agents")

PAGE_DEVICES, MAX_PAGE_BYTES = 20_000, MAX_IN_MEMORY
KEPT_BYTES = 1 << 20  # of a page that several agents ask for at the same time
LOOK_SECONDS, TRUST_SECONDS = 1.0, 1.0  # how often it is looked for changes that nobody tells, and for new CRLs
AGAIN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Kept:
    """The page that was made last, and the least cut that it has; several agents wait for the same one."""

    since: int
    cut_since: int
    page: Page


class AgentFeed:
    """Makes pages of changes, and waits for changes on behalf of many agents at once."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        authority: Authority,
        crls: CrlPublication,
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._database = database
        self._authority = authority
        self._crls = crls
        self._clock = clock
        self._states = KnownCrlStates()
        self._making = threading.Lock()
        self._kept: _Kept | None = None
        self._changed = threading.Condition()
        self._looked_at = 0.0
        self._generation = 0
        self._known_names: TrustNames | None = None
        self._names: tuple[float, TrustNames] | None = None
        self._cas: tuple[Issuers, str] | None = None

    # --- Changes

    def start_of(self, record: AgentRecord, shown: Mark) -> Given:
        """Return the page after which an agent goes on: the one that it shows to have, or none of them."""
        known = record.has_shown(shown.generation, shown.digest)
        return known or Given(NOTHING.generation, NOTHING.digest, is_last=False)

    def wait(self, start: Given, seen: TrustNames, seconds: float, *, goes_on: Callable[[], bool]) -> bool:
        """Wait until there are changes after a page; return whether there are, ``False`` if not in time.

        Return ``False`` at once if there are newer CRLs or CAs than the agent has seen. ``goes_on`` is asked now and
        then whether anybody still waits for it.
        """
        deadline = time.monotonic() + seconds
        self._look()
        while True:
            with self._changed:
                if self._generation > start.generation or not start.is_last:
                    return True
                left = deadline - time.monotonic()
                if self._known_names != seen or left <= 0 or not goes_on():
                    return False
                is_told = self._changed.wait(min(left, LOOK_SECONDS))
                is_late = not is_told and time.monotonic() - self._looked_at >= LOOK_SECONDS
                if is_late:  # nobody follows, or has been told: one of those that wait looks for all of them
                    self._looked_at = time.monotonic()
            if is_late:
                self._look()

    def follow(self, stopping: threading.Event) -> None:
        """Look for changes on behalf of all that wait, whenever one is told, until ``stopping`` is set."""
        while not stopping.is_set():
            try:
                with self._database.advances.listening() as wait:
                    while not stopping.is_set():
                        wait(LOOK_SECONDS)
                        self._look()
            except (PortalError, OSError) as error:
                log.error("agents are told of changes late", extra={"problem": str(error)})
                stopping.wait(AGAIN_SECONDS)

    def _look(self) -> None:
        """Read how far changes have come; wake those that wait if they have."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            generation = max(0, generations.get_broker_state(tx).generation)
        names = self.names()
        with self._changed:
            self._looked_at = time.monotonic()
            if (generation, names) != (self._generation, self._known_names):
                self._generation, self._known_names = generation, names
                self._changed.notify_all()

    def page(self, record: AgentRecord, start: Given, ends: int = 0) -> Page:
        """Return the changes after a page, up to the newest generation or one before, if they are many.

        The agent knows already, and remembers, whose sessions must end because of changes up to generation ``ends``.
        """
        with self._making:
            kept = self._kept
            applied = record.applied_generation  # 0 of a broker that was never seen to obey
            if record.copied_since is not None:  # since then each of two agents may have proven for the other
                applied = record.copied_since
            cut_since = max(applied, min(ends, start.generation)) if applied else 0
            fits = kept is not None and (kept.since, kept.cut_since) == (start.generation, cut_since)
            if kept is not None and fits and kept.page.newest == self._newest():
                return kept.page
            page = self._make(start.generation, cut_since, PAGE_DEVICES)
            if page.size > MAX_PAGE_BYTES:
                page = self._shorter(page, cut_since)
            self._kept = None
            if page.size <= KEPT_BYTES:
                self._kept = _Kept(start.generation, cut_since, page)
            return page

    def _shorter(self, page: Page, cut_since: int) -> Page:
        """Return a page with fewer generations, if there are several: one is not divided."""
        size = PAGE_DEVICES
        try:
            while page.size > MAX_PAGE_BYTES and size > 1:
                size = max(1, size // 8)
                with self._database.snapshot(sees=ALL_TENANTS) as tx:
                    end = generations.end_of_page(tx, page.since, size)
                if end is not None and end < page.generation:
                    page.close()
                    page = self._make(page.since, cut_since, size)
        except BaseException:
            page.close()
            raise
        return page

    def _newest(self) -> int:
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return generations.get_broker_state(tx).generation

    def _make(self, since: int, cut_since: int, size: int) -> Page:
        lines = Lines()
        try:
            draft = FeedDraft(self._settings.application_prefixes, since, lines)
            with self._database.snapshot(sees=ALL_TENANTS) as tx:
                newest = generations.get_broker_state(tx).generation
                end = generations.end_of_page(tx, since, size)
                until = newest if end is None else min(end, newest)
                known = BrokerTenants(tx)
                issuers = self._authority.seen_by(tx)
                complete_draft(draft, tx, issuers, self._clock(), known, None if until == newest else until)
                if until == newest and cut_since > 0:
                    self._end_sessions(tx, draft, known, cut_since)
            if draft.closed:
                log.error("devices are denied everything because their topics do not fit the settings")
            return lines.page(since, until, newest)
        except BaseException:
            lines.discard()
            raise

    def _end_sessions(self, tx: Connection, draft: FeedDraft, known: BrokerTenants, since: int) -> None:
        """Name whose sessions must end. At a broker that has never been seen to obey, a guard admits nobody before."""
        for one in generations.sessions_to_end(tx, since):
            if one.is_narrowed:
                draft.narrow(one.device_id)
            elif one.is_revoked:
                tenant = known.of(one.tenant_id)
                draft.end_session(one.device_id, self._settings.topic_prefix if tenant is None else tenant.prefix)
            else:
                draft.end_session(one.device_id)

    def given(self, record: AgentRecord, start: Given, page: Page) -> None:
        """Record that an agent is given a page, before its last line is sent.

        Raise ``StateConflict`` if it has to begin again meanwhile.
        """
        # If a power cut takes this record back, the agent begins again.
        with self._database.transaction(durable=False, sees=ALL_TENANTS) as tx:
            given = Given(page.generation, page.digest, page.is_last)
            if not agents.give(tx, record.broker_id, held=start, given=given):
                raise StateConflict("All changes are given anew; ask for them again.")

    # --- CAs and CRLs

    def names(self) -> TrustNames:
        """Return what names the newest CAs and CRLs, as they were a second ago at most."""
        now, known = time.monotonic(), self._names
        if known is None or now - known[0] >= TRUST_SECONDS:
            with self._making, self._database.snapshot(sees=ALL_TENANTS) as tx:
                known = self._names = (now, self._names_of(tx, self._authority.seen_by(tx)))
        return known[1]

    def _names_of(self, tx: Connection, issuers: Issuers) -> TrustNames:
        heads = [
            (row, state.newest.number)
            for row, state in sorted(self._states.read(tx).items())
            if state.newest is not None
        ]
        return TrustNames(self._name_of_cas(issuers), hashlib.sha256(repr(heads).encode()).hexdigest())

    def _name_of_cas(self, issuers: Issuers) -> str:
        if self._cas is None or self._cas[0] is not issuers:
            settings, tenants = told_settings(self._settings, ""), sorted(issuers.tenants.items())
            told = json.dumps([issuers.broker_ca.decode(), tenants, settings])
            self._cas = (issuers, hashlib.sha256(told.encode()).hexdigest())
        return self._cas[1]

    def trust(self, record: AgentRecord) -> tuple[TrustNames, dict[str, Any]]:
        """Return the CAs and their newest CRLs, signed anew if they are due, with the settings that agents need."""
        issuers, _ = self._crls.sign_due()
        with self._crls.trust(issuers) as trust, self._making, self._database.snapshot(sees=ALL_TENANTS) as tx:
            names = self._names_of(tx, issuers)
        body = {
            "ca": trust.ca.decode(),
            "crl": trust.crl.decode(),
            "tenants": dict(trust.tenants),
            "portal_ca": ca.chain_pem(*issuers.of(DEFAULT_TENANT).anchors),
            "settings": told_settings(self._settings, record.address),
        }
        return names, body
