"""Examines a living installation, check by check, none left out because another failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import doctor_authority
import doctor_broker
import doctor_files
import doctor_mosquitto
import doctor_network
import doctor_ocsp
import doctor_records
from config import Settings
from core.errors import PortalError
from doctor_findings import Finding, Verdict, problem
from doctor_subject import Subject

log = logging.getLogger("portal.doctor")

CHECKS: tuple[tuple[str, Callable[[Subject], Verdict]], ...] = (
    ("data folder", doctor_files.data_folder),
    ("secret files", doctor_files.secret_files),
    ("disk space", doctor_files.disk_space),
    ("clock", doctor_authority.clock),
    ("database", doctor_records.database),
    ("audit record", doctor_records.audit_record),
    ("CA keys", doctor_authority.ca_keys),
    ("CA chain", doctor_authority.ca_chain),
    ("CRL", doctor_authority.crl),
    ("CRL served", doctor_authority.crl_served),
    ("OCSP responders", doctor_ocsp.responders),
    ("OCSP served", doctor_ocsp.answers),
    ("expiry", doctor_authority.expiry),
    ("portal", doctor_network.portal),
    ("portal certificate", doctor_network.portal_certificate),
    ("broker", doctor_broker.broker),
    ("broker version", doctor_mosquitto.broker_version),
    ("broker configuration", doctor_mosquitto.broker_configuration),
    ("broker certificate", doctor_network.broker_certificate),
    ("broker files", doctor_broker.broker_files),
    ("ACL entries", doctor_broker.acl_entries),
    ("CRL entries", doctor_broker.crl_entries),
    ("canaries", doctor_network.canaries),
    ("generation", doctor_records.generation),
    ("links", doctor_records.links),
    ("tokens", doctor_records.tokens),
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
