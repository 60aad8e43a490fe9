"""What every check of the doctor works with: the installation that it examines, and the finding that it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
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

SECONDS = 5.0  # the time limit of each request over a network


class State(StrEnum):
    """The result of a check, from good to bad."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


_BY_SEVERITY = list(State)


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of the check ``name``: what was seen and, unless all is well, what to do about it."""

    name: str
    state: State
    detail: str
    advice: str = ""


def well(detail: str) -> Finding:
    """Return a finding that nothing is wrong."""
    return Finding("", State.OK, detail)


def warning(detail: str, advice: str) -> Finding:
    """Return a finding that something works, but not as well as it should, or not for long."""
    return Finding("", State.WARNING, detail, advice)


def problem(detail: str, advice: str) -> Finding:
    """Return a finding that something is broken or insecure."""
    return Finding("", State.PROBLEM, detail, advice)


class Findings(list[Finding]):
    """What a check finds while it looks at several things."""

    def warning(self, detail: str, advice: str) -> None:
        """Add a warning."""
        self.append(warning(detail, advice))

    def problem(self, detail: str, advice: str) -> None:
        """Add a problem."""
        self.append(problem(detail, advice))


def combine(findings: Sequence[Finding], otherwise: str) -> Finding:
    """Return one finding with the details of all and the worst state; ``well(otherwise)`` if there are none."""
    if not findings:
        return well(otherwise)
    state = max((finding.state for finding in findings), key=_BY_SEVERITY.index)
    advice = dict.fromkeys(finding.advice for finding in findings if finding.advice)
    return Finding("", state, " ".join(dict.fromkeys(finding.detail for finding in findings)), " ".join(advice))


def summarize(things: Sequence[str], limit: int = 3) -> str:
    """Return the first few of a list, and how many more there are."""
    shown = ", ".join(things[:limit])
    return shown if len(things) <= limit else f"{shown} and {len(things) - limit} more"


def counted(number: int, one: str, several: str) -> str:
    """Return a number with the words for one or for several, such as ``1 token expires`` or ``2 tokens expire``."""
    return f"{number} {one if number == 1 else several}"


class Installation:
    """The settings and parts of an installation, which may be broken; nothing of it is changed."""

    def __init__(self, settings: Settings, clock: Callable[[], datetime], broker_config: Path | None = None) -> None:
        self.settings = settings
        self.clock = clock
        self.broker_config = broker_config
        self.first_tenant = DEFAULT_TENANT
        self._database: Database | DatabaseUnavailable | None = None

    @property
    def probe_certificates(self) -> ProbeCertificates:
        """Return the two client certificates that the portal probes the broker with."""
        return probe_certificates(self.settings)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """Open a snapshot of the database; raise ``DatabaseUnavailable``."""
        if self._database is None:
            self._database = self._open_database()
        if isinstance(self._database, DatabaseUnavailable):
            raise self._database
        try:
            with self._database.snapshot() as tx:
                yield tx
        except DatabaseUnavailable as error:
            self._database = error  # no other check has to wait for it
            raise

    def _open_database(self) -> Database | DatabaseUnavailable:
        url = sa.make_url(self.settings.database_url)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            return DatabaseUnavailable(f"There is no database at {url.database}.")
        return Database(self.settings.database_url, folder=self.settings.data_dir, threads=1)

    def issuers(self) -> Sequence[IssuerRecord]:
        """Return the CAs of the database, the root first."""
        with self.snapshot() as tx:
            return store_issuers.list_issuers(tx)

    @contextlib.contextmanager
    def between_reconciliations(self) -> Iterator[None]:
        """Keep the portal from changing the broker's files for the body of a ``with``."""
        with contextlib.ExitStack() as stack:
            for name in (".pass.lock", ".install.lock", ".crl.lock"):
                stack.enter_context(FileLock(self.settings.data_dir / name).hold())
            yield

    def close(self) -> None:
        """Close the database's connections."""
        if isinstance(self._database, Database):
            self._database.close()


def certificate_of(path: Path) -> x509.Certificate:
    """Return the first certificate of a PEM file; raise ``OSError`` or ``ValueError``."""
    return x509.load_pem_x509_certificates(path.read_bytes())[0]
