"""Compares the settings of an installation's nodes: which have to be the same at all of them, and which are not."""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr
from sqlalchemy.engine import Connection

from config import Settings
from core.broker_control import ControlKind
from core.errors import InputInvalid, StartupError, StateConflict
from core.given_settings import variable_of
from core.rabbitmq_nodes import RabbitmqNode
from core.server_command import server_command
from store import audit, nodes
from store.audit import Actor
from store.database import Database
from store.locks import InstallationLock, lock_installation
from store.nodes import NodeRecord
from store.scope import ALL_TENANTS

log = logging.getLogger("portal.nodes")

CHANGE_LIFE = timedelta(hours=1)
_KEY_FROM = "idempotency-pepper"  # random, the same at all nodes, and never in the database

# By these each node decides who may do something. Where they differ, one node grants what another denies: topics at the
# brokers, a role after a login, a receiver of events, the renewal of a certificate that has expired.
DECIDING = frozenset(
    (
        "topic_prefix",
        "topic_prefixes",
        "rabbitmq_tenant_ports",
        "webhook_allow",
        "oidc_issuer",
        "oidc_groups",
        "oidc_groups_claim",
        "renewal_grace_days",
    )
)
# Where these differ, what a client gets depends on the node that it came to.
COMMON = frozenset(
    (
        *("public_url", "pki_url", "agents_url", "mqtt_host", "mqtt_port", "mqtt_tls", "console"),
        *("max_body_bytes", "bulk_max_bytes", "bulk_max_rows", "login_failures", "metrics_tenants", "enforce_timeout"),
        *("ca_name", "ca_passphrase", "root_key_type", "issuing_key_type", "root_days", "issuing_days"),
        *("device_days", "server_days", "key_type", "crl_days", "ocsp_hours", "link_hours", "link_grace"),
        *("renewal_from", "renewal_overlap_hours", "renewal_revoke_previous", "event_days", "tenant_grace_days"),
        *("mail_server", "mail_tls", "mail_from", "mail_to", "mail_minutes"),
        *("oidc_client_id", "oidc_cli_client_id", "oidc_scopes"),
        *("rabbitmq_nodes", "rabbitmq_url", "rabbitmq_cache_seconds"),
    )
)
# Of a node's machine: addresses, folders, files, sizes, and the broker beside it.
OWN = frozenset(
    (
        *("data_dir", "bind", "pki_bind", "agents_bind", "database_url", "database_owner_url"),
        *("tls_certificate", "tls_key", "server_names", "trusted_proxies", "log_format", "log_level"),
        *("workers", "threads", "max_connections", "request_timeout", "bulk_uploads", "bulk_processes"),
        *("ca_passphrase_file", "ca_keys", "root_keys", "token_timeout"),
        *("mqtt_bind", "broker_probe_address", "broker_certificate", "broker_key", "broker_names", "broker_dir"),
        *("acl_style", "broker_control", "broker_socket", "broker_pid_file", "broker_reload", "broker_restart"),
        *("broker_group", "agent_deny_all_after", "rabbitmq_user", "rabbitmq_password_file", "rabbitmq_bind"),
        *("webhook_ca_file", "mail_ca_file", "mail_login_file", "oidc_client_secret_file", "oidc_ca_file"),
    )
)


def hashes_of(settings: Settings) -> Mapping[str, str]:
    """Return an HMAC-SHA256, in hex, of each setting that nodes have in common, by its field.

    Some are secrets: the key is made of one that the database does not have, so that nobody guesses them from there.
    Settings of what the node does not have, as a RabbitMQ, are left out. The node must have its secrets.
    """
    secret = bytes.fromhex((settings.secrets_dir / _KEY_FROM).read_text().strip())
    key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"settings of nodes").derive(secret)
    found = {}
    for name in sorted(DECIDING | COMMON):
        unused = settings.broker_control is not ControlKind.RABBITMQ and name.startswith("rabbitmq_")
        if unused or (name == "agents_url" and settings.agents_bind is None):
            continue
        said = json.dumps([name, _plain(getattr(settings, name))])
        found[name] = hmac.digest(key, said.encode(), "sha256").hex()
    return found


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, in one order, however the setting was written."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Mapping):
        return sorted((str(key), _plain(each)) for key, each in value.items())
    if isinstance(value, RabbitmqNode):
        return value.name  # a node of RabbitMQ, whose folder is at another place of each machine
    if isinstance(value, (list, tuple, set, frozenset)):
        return sorted((_plain(each) for each in value), key=json.dumps)
    return value if isinstance(value, (bool, int, float)) or value is None else str(value)


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting that is not the same at some nodes: the first one of each value, by its name."""

    field: str
    nodes: Sequence[str]

    def __str__(self) -> str:
        """Return the setting with the nodes."""
        return f"{variable_of(self.field)} ({', '.join(self.nodes)})"


def differences(tx: Connection) -> Sequence[Difference]:
    """Return the settings that are not the same at all nodes that work now, with those that decide first."""
    working = nodes.working(tx)
    found = []
    for field in (*sorted(DECIDING), *sorted(COMMON)):
        first: dict[str, str] = {}
        for one in working:
            if one.settings is not None and field in one.settings:
                first.setdefault(one.settings[field], one.name)
        if len(first) > 1:
            found.append(Difference(field, [*first.values()]))
    return found


def sentence_about(found: Sequence[Difference]) -> str:
    """Return what is to be done about settings that differ."""
    return (
        f"These settings are not the same at all nodes: {', '.join(map(str, found))}. Give each node the same value,"
        " and restart it."
    )


def check(tx: Connection, own: Mapping[str, str], node_id: int | None) -> Sequence[str]:
    """Return which settings another node that works now has with another value, as variables.

    Raises ``StartupError`` if it is one by which each node decides, unless that may differ for a while.
    """
    theirs = [one for one in nodes.working(tx) if one.id != node_id and one.settings is not None]
    found, may_differ = [], nodes.changing_settings(tx)
    for field, value in own.items():
        other = next((one for one in theirs if (one.settings or {}).get(field, value) != value), None)
        if other is None:
            continue
        if field in DECIDING and field not in may_differ:
            variable = variable_of(field)
            raise StartupError(
                f"{variable} is another here than at the node {other.name}, which works now, so that one would grant"
                " what the other denies: set it as there, or let it differ for an hour by:"
                f" {server_command(f'nodes --change {variable}')}"
            )
        found.append(variable_of(field))
    return found


def enter(settings: Settings, database: Database, node: NodeRecord | None) -> None:
    """Record the settings of a node that is about to serve, and compare them; raises as ``check``."""
    if node is None:
        return
    own = hashes_of(settings)
    with database.transaction(sees=ALL_TENANTS) as tx:
        lock_installation(tx, InstallationLock.NODES)  # of two that start at a time, one sees the other
        found = check(tx, own, node.id)
        nodes.set_settings(tx, node.id, own)
    if found:
        log.warning("settings are not those of other nodes", extra={"settings": " ".join(found)})


def let_change(database: Database, actor: Actor, variable: str, *, now: datetime) -> datetime:
    """Let nodes start with different values of a setting for an hour; return when that ends, by the database's clock.

    Raises ``InputInvalid`` for a setting that keeps no node from starting, ``StateConflict`` on SQLite.
    """
    if database.is_sqlite:
        raise StateConflict("On SQLite there is one node: change the setting, and restart the portal.")
    field = variable.strip().lower().removeprefix("portal_")
    if field not in DECIDING:
        names = ", ".join(variable_of(name) for name in sorted(DECIDING))
        raise InputInvalid(f"Only these settings have to be announced before they differ: {names}.")
    with database.transaction(sees=ALL_TENANTS) as tx:
        ends = nodes.let_setting_change(tx, field, life=CHANGE_LIFE)
        audit.record(tx, actor, "node:change", "nodes", at=now, setting=variable_of(field), until=ends.isoformat())
    return ends
