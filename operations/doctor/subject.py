"""The installation under examination, each part of it opened when it is first looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa
from cryptography import x509
from sqlalchemy.engine import Connection

from broker.probe import ProbeCertificates
from config import Settings
from core.errors import DatabaseUnavailable
from core.files import FileLock
from operations.own_certificates import probe_certificates
from store import issuers as store_issuers
from store.database import Database
from store.issuers import IssuerRecord
from store.tables import DEFAULT_TENANT

SECONDS = 5.0  # that anything asked over a network may take


class Subject:
    """Settings and parts of an installation that may be broken; nothing of it is changed."""

    def __init__(self, settings: Settings, clock: Callable[[], datetime], broker_config: Path | None = None) -> None:
        self.settings = settings
        self.clock = clock
        self.broker_config = broker_config
        self.tenant_id = DEFAULT_TENANT
        self._database: Database | DatabaseUnavailable | None = None

    @property
    def probe_certificates(self) -> ProbeCertificates:
        """The two client certificates that the portal probes the broker with."""
        return probe_certificates(self.settings)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """One state of the database; raises ``DatabaseUnavailable``."""
        if self._database is None:
            self._database = self._open_database()
        if isinstance(self._database, DatabaseUnavailable):
            raise self._database
        try:
            with self._database.snapshot() as tx:
                yield tx
        except DatabaseUnavailable as error:
            self._database = error  # no check need wait for it again
            raise

    def _open_database(self) -> Database | DatabaseUnavailable:
        url = sa.make_url(self.settings.database_url)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            return DatabaseUnavailable(f"There is no database at {url.database}.")
        return Database(self.settings.database_url, lock_path=self.settings.data_dir / ".write.lock", threads=1)

    def issuers(self) -> Sequence[IssuerRecord]:
        """The CAs as the database has them, the root first."""
        with self.snapshot() as tx:
            return store_issuers.list_issuers(tx)

    @contextlib.contextmanager
    def between_passes(self) -> Iterator[None]:
        """Keep the portal from changing the broker's files for the body of the ``with``."""
        with FileLock(self.settings.data_dir / ".pass.lock").hold():
            yield

    def close(self) -> None:
        """Close the database's connections."""
        if isinstance(self._database, Database):
            self._database.close()


def certificate_of(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file; raises ``OSError`` or ``ValueError``."""
    return x509.load_pem_x509_certificates(path.read_bytes())[0]
