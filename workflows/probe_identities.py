"""Which identities are those of probe certificates: of this portal, and of others on its database."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Set
from datetime import datetime

from cryptography import x509

from core.errors import PortalError
from pki.client_certificates import common_name
from store.certificates import probe_certificates
from store.database import Database
from store.scope import ALL_TENANTS

LOOK_SECONDS = 1.0  # between two looks into the database


class ProbeIdentities:
    """Knows them from the database, which is looked into for an unknown one, at most once a second."""

    def __init__(self, database: Database, first_tenant: str, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._first_tenant = first_tenant
        self._clock = clock
        self._lock = threading.Lock()
        self._known: Set[str] = frozenset()
        self._looked_at = -LOOK_SECONDS

    def has(self, identity: str) -> bool:
        """Return whether a probe certificate has an identity and counts, or did when the database was last heard."""
        if identity not in self._known and self._lock.acquire(blocking=False):
            try:
                if time.monotonic() - self._looked_at >= LOOK_SECONDS:
                    self._looked_at = time.monotonic()
                    self._known = self._read()
            except PortalError:
                pass
            finally:
                self._lock.release()
        return identity in self._known

    def _read(self) -> Set[str]:
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            found = probe_certificates(tx, self._first_tenant, now=self._clock())
        return frozenset(common_name(x509.load_der_x509_certificate(der)) for der in found)
