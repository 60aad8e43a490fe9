"""Examines a living installation, check by check, none left out because another failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from config import Settings
from core.errors import PortalError
from operations.doctor import authority, broker, files, mosquitto, network, ocsp, records
from operations.doctor.findings import Finding, Verdict, problem
from operations.doctor.subject import Subject

log = logging.getLogger("portal.doctor")

CHECKS: tuple[tuple[str, Callable[[Subject], Verdict]], ...] = (
    ("data folder", files.data_folder),
    ("secret files", files.secret_files),
    ("disk space", files.disk_space),
    ("clock", authority.clock),
    ("database", records.database),
    ("audit record", records.audit_record),
    ("CA keys", authority.ca_keys),
    ("CA chain", authority.ca_chain),
    ("CRL", authority.crl),
    ("CRL served", authority.crl_served),
    ("OCSP responders", ocsp.responders),
    ("OCSP served", ocsp.answers),
    ("expiry", authority.expiry),
    ("portal", network.portal),
    ("portal certificate", network.portal_certificate),
    ("broker", broker.broker),
    ("broker version", mosquitto.broker_version),
    ("broker configuration", mosquitto.broker_configuration),
    ("broker certificate", network.broker_certificate),
    ("broker files", broker.broker_files),
    ("ACL entries", broker.acl_entries),
    ("CRL entries", broker.crl_entries),
    ("canaries", network.canaries),
    ("generation", records.generation),
    ("links", records.links),
    ("tokens", records.tokens),
)


def examine(
    settings: Settings,
    clock: Callable[[], datetime],
    *,
    broker_config: Path | None = None,
    checks: tuple[tuple[str, Callable[[Subject], Verdict]], ...] = CHECKS,
) -> Iterator[Finding]:
    """Make every check, each by itself; ``broker_config`` is the broker's configuration where it is not found."""
    subject = Subject(settings, clock, broker_config)
    try:
        for name, check in checks:
            verdict = _made(check, subject)
            yield Finding(name, verdict.state, verdict.detail, verdict.advice)
    finally:
        subject.close()


def _made(check: Callable[[Subject], Verdict], subject: Subject) -> Verdict:
    try:
        return check(subject)
    except PortalError as error:
        return problem(f"The check could not be made: {error.detail}", "See to that first.")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        said = error.strerror or str(error) or type(error).__name__
        return problem(f"The check could not be made: {where}{said}.", "See to that first.")
    except Exception as error:
        log.debug("a check failed unexpectedly", exc_info=True)
        return problem(f"The check failed unexpectedly ({type(error).__name__}).", "See the other lines first.")
