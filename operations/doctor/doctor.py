"""Examines a running installation; a check that fails prevents no other."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from config import Settings
from core.broker_control import ControlKind
from core.errors import PortalError
from operations.doctor import authority, broker, data, keys, mail, mosquitto, network, outer, service, sign_on
from operations.doctor.base import Finding, Installation, State, problem

log = logging.getLogger("portal.doctor")

UNMADE = "The check could not be made: "

Check = Callable[[Installation], Finding]


def _rabbitmq_nodes(installation: Installation) -> Finding:
    from operations.doctor import rabbitmq  # here, as few portals have one

    return rabbitmq.nodes(installation)


def _rabbitmq_answers(installation: Installation) -> Finding:
    from operations.doctor import rabbitmq

    return rabbitmq.answers(installation)


def _rabbitmq_times(installation: Installation) -> Finding:
    from operations.doctor import rabbitmq

    return rabbitmq.times(installation)


CHECKS: tuple[tuple[str, Check], ...] = (
    ("data folder", data.data_folder),
    ("secret files", data.secret_files),
    ("disk space", data.disk_space),
    ("database", data.database),
    ("clock", authority.clock),
    ("audit record", data.audit_record),
    ("CA keys", keys.ca_keys),
    ("CA chain", authority.ca_chain),
    ("CAs above", outer.outer_cas),
    ("CRL", authority.crl),
    ("CRL served", authority.crl_served),
    ("OCSP responders", authority.ocsp_responders),
    ("OCSP served", authority.ocsp_served),
    ("expiry", authority.expiry),
    ("portal", network.portal),
    ("portal certificate", network.portal_certificate),
    ("front server", network.front_server),
    ("broker address", network.broker_address),
    ("broker", broker.broker),
    ("RabbitMQ nodes", _rabbitmq_nodes),
    ("RabbitMQ answers", _rabbitmq_answers),
    ("RabbitMQ times", _rabbitmq_times),
    ("broker version", mosquitto.broker_version),
    ("broker service", service.broker_service),
    ("broker configuration", mosquitto.broker_configuration),
    ("broker certificate", network.certificate_of_broker),
    ("broker files", broker.broker_files),
    ("ACL entries", broker.acl_entries),
    ("CRL entries", broker.crl_entries),
    ("probe certificates", network.probe),
    ("generation", data.generation),
    ("settings of nodes", data.settings_of_nodes),
    ("links", data.links),
    ("device names", data.device_names),
    ("certificate profiles", data.certificate_profiles),
    ("tokens", data.tokens),
    ("mail", mail.mail),
    ("identity provider", sign_on.identity_provider),
)

_OF_RABBITMQ = frozenset(("RabbitMQ nodes", "RabbitMQ answers", "RabbitMQ times"))
_OF_MOSQUITTO = frozenset(("broker", "broker version", "broker service", "broker configuration"))
# Of the broker beside the portal, if there is one.
OF_BROKER = frozenset(("broker address", "broker certificate", "broker files", "ACL entries", "CRL entries"))
OF_BROKER |= _OF_MOSQUITTO | _OF_RABBITMQ | {"probe certificates"}


def examine(
    settings: Settings,
    clock: Callable[[], datetime],
    *,
    broker_config: Path | None = None,
    checks: tuple[tuple[str, Check], ...] = CHECKS,
) -> Iterator[Finding]:
    """Yield the finding of each check; ``broker_config`` is the broker's configuration if it is not to be searched.

    A problem whose cause another check has told is left out, and so are all but the first if there is no
    data folder.
    """
    installation = Installation(settings, clock, broker_config)
    told: set[str] = set()
    try:
        of_another = _OF_MOSQUITTO if settings.broker_control is ControlKind.RABBITMQ else _OF_RABBITMQ
        of_another = of_another if settings.has_broker else OF_BROKER
        for name, check in [named for named in checks if named[0] not in of_another]:
            finding = dataclasses.replace(_result(check, installation), name=name)
            cause = finding.detail.removeprefix(UNMADE)
            if cause in told:
                continue
            if finding.state is State.PROBLEM:
                told.add(cause)
            yield finding
            if not settings.data_dir.is_dir():
                return
    finally:
        installation.close()


def exit_status(findings: Sequence[Finding]) -> int:
    """Return 0 if all is well, 1 if there is a problem, 2 if there are only warnings."""
    states = {finding.state for finding in findings}
    if State.PROBLEM in states:
        return 1
    return 2 if State.WARNING in states else 0


def _result(check: Check, installation: Installation) -> Finding:
    try:
        return check(installation)
    except PortalError as error:
        return problem(f"{UNMADE}{error.detail}", "Correct that first.")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        said = error.strerror or str(error) or type(error).__name__
        return problem(f"{UNMADE}{where}{said}.", "Correct that first.")
    except Exception as error:
        log.debug("a check failed unexpectedly", exc_info=True)
        return problem(
            f"The check failed unexpectedly ({type(error).__name__}).", "Correct what the other lines say first."
        )
