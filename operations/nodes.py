"""Lets a data folder be a node of the installation: at each start, and once by a code that another node has made."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from datetime import datetime, timedelta

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy.engine import Connection

from config import Settings
from core.errors import StartupError, StateConflict
from core.files import FileLock, folder_number, replace_file
from core.server_command import server_command
from core.states import BrokerKind
from operations import data_folder, node_settings
from store import audit, brokers, nodes, schema
from store.audit import Actor
from store.brokers import BrokerRecord
from store.database import Database
from store.locks import InstallationLock, lock_installation
from store.nodes import NodeRecord
from store.scope import ALL_TENANTS
from store.tables import DEFAULT_TENANT
from workflows.shared_files import COMPARED, KEY_FILE, SharedFiles, seal, unseal

INVITATION_LIFE = timedelta(hours=1)
_SEALED_AS = "invitation"
_NOT_INVITED = "The code is not one of this installation, was used, or has expired; get another one by: {}"


def invite(settings: Settings, database: Database, actor: Actor, *, now: datetime) -> tuple[str, datetime]:
    """Return a code by which one data folder can join the installation, and when it ends.

    The code is 256 random bits, of which the database has a hash. It opens the installation's key, with which the
    secrets in the database are sealed that every node needs. Raises ``StartupError`` on SQLite.
    """
    if database.is_sqlite:
        raise StartupError(
            "Several nodes need PostgreSQL; bring this installation there by a backup, and set PORTAL_DATABASE_URL."
        )
    _check_control(settings)
    shared = SharedFiles(settings, database)
    key, code = shared.key(), secrets.token_urlsafe(32)
    shared.publish_all()
    sealed = seal(_key_of(code), _SEALED_AS, key)
    with database.transaction(sees=ALL_TENANTS) as tx:
        ends = nodes.add_invitation(tx, code, sealed, life=INVITATION_LIFE)
        audit.record(tx, actor, "node:invite", "nodes", at=now, expires_at=ends.isoformat())
    return code, ends


def _key_of(code: str) -> bytes:
    """Return the key that a code stands for; it has as many random bits, so that no slow derivation is needed."""
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"node invitation").derive(code.encode())


def join(settings: Settings, code: str, name: str, *, now: datetime) -> NodeRecord:
    """Make the data folder a node: fetch the secrets of the installation, and record it.

    Nothing is left in the folder if that fails. Raises ``StartupError`` if the folder has secrets already, if the code
    is not valid, or if the database has another version's tables.
    """
    if settings.database_url.startswith("sqlite"):
        raise StartupError("Set PORTAL_DATABASE_URL to the URL of the PostgreSQL that the other nodes work on.")
    _check_control(settings)
    with data_folder.shared(settings), FileLock(settings.data_dir / ".setup.lock").hold():
        present = [path for path in (*settings.secrets_dir.rglob("*"), *settings.ca_dir.iterdir()) if path.is_file()]
        if present:
            raise StartupError(f"{settings.data_dir} has secrets already ({present[0]}); let an empty folder join.")
        # Without a claim of the folder, which is no node yet.
        with closing(Database(settings.database_url, folder=settings.data_dir, threads=1, claims=False)) as database:
            try:
                return _join(settings, database, code, name, now=now)
            except BaseException:
                _forget_secrets(settings)
                raise


def _join(settings: Settings, database: Database, code: str, name: str, *, now: datetime) -> NodeRecord:
    with database.snapshot(sees=ALL_TENANTS) as tx:
        if schema.revision(tx) != schema.newest_revision():
            raise StartupError("The other nodes run another version of the portal; install that one here.")
    shared = SharedFiles(settings, database)
    with database.transaction(sees=ALL_TENANTS) as tx:
        lock_installation(tx, InstallationLock.NODES)
        sealed = nodes.take_invitation(tx, code)
        if sealed is None:
            raise StartupError(_NOT_INVITED.format(server_command("invite")))
        key = unseal(_key_of(code), _SEALED_AS, sealed)
        replace_file(settings.secrets_dir / KEY_FILE, key.hex().encode() + b"\n")
        shared.fetch_all()
        secrets_hash = hash_of_secrets(settings)
        if secrets_hash is None:
            raise StartupError("The other nodes have not given their secrets; make another code at one of them.")
        node_settings.check(tx, node_settings.hashes_of(settings), None)
        node = nodes.add_node(tx, name_of(name), folder_number(settings.data_dir), secrets_hash)
        actor = audit.system_actor(DEFAULT_TENANT)
        audit.record(tx, actor, "node:join", f"node:{node.name}", at=now)
    return node


def _forget_secrets(settings: Settings) -> None:
    for path in (*settings.secrets_dir.rglob("*"), *settings.ca_dir.iterdir()):
        if path.is_file():
            with suppress(OSError):
                path.unlink()


def enter(settings: Settings, database: Database) -> NodeRecord | None:
    """Return the node that the data folder is, at a start; ``None`` on SQLite. Raises as ``store.nodes.enter``."""
    try:
        node = nodes.enter(database, name_of(socket.gethostname()), hash_of_secrets(settings))
        if node is not None:
            with database.snapshot(sees=ALL_TENANTS) as tx:
                if len(nodes.list_nodes(tx)) > 1:
                    _check_control(settings)
        return node
    except BaseException:
        database.close()
        raise


def _check_control(settings: Settings) -> None:
    """Raise ``StartupError`` unless the guard proves what the broker enforces: files do so by a certificate that one
    node alone has on the newest CRL."""
    if not settings.broker_control.by_journal:
        raise StartupError(
            "Several nodes need the guard in their brokers: set PORTAL_BROKER_CONTROL=guard, or none for a node without"
            " a broker."
        )


def own_broker(
    tx: Connection, node: NodeRecord | None, settings: Settings, is_stopped: Callable[[], bool], *, at: datetime
) -> BrokerRecord | None:
    """Return the broker that a node tells, with what program it is; it counts from now on if it is new.

    One that was beside no node that there is now, as before there were nodes and after a restore, is this one's.
    ``None`` if there is to be none; raises ``StartupError`` if the one that was runs all the same, by ``is_stopped``.
    """
    node_id, engine = None if node is None else node.id, settings.broker_control.engine
    own = brokers.of_node(tx, node_id)
    if not settings.has_broker:
        _forget_brokers(tx, [*([] if own is None else [own]), *_left(tx)], settings, is_stopped, at=at)
        return None
    own = own or _taken_over(tx, node_id, at) or _added(tx, node, at)
    if own.engine is not engine:
        brokers.set_engine(tx, own.id, engine)
    return dataclasses.replace(own, engine=engine)


def _left(tx: Connection) -> Sequence[BrokerRecord]:
    """Return the brokers that were beside nodes which there are no more."""
    known = {record.id for record in nodes.list_nodes(tx)}
    return [one for one in brokers.list_brokers(tx) if one.kind is BrokerKind.NODE and one.node_id not in known]


def _taken_over(tx: Connection, node_id: int | None, at: datetime) -> BrokerRecord | None:
    left = _left(tx)
    for another in left[1:]:
        brokers.remove_broker(tx, another, at=at)
    if not left:
        return None
    brokers.move_to_node(tx, left[0].id, node_id)
    return brokers.get_broker(tx, left[0].name)


def _added(tx: Connection, node: NodeRecord | None, at: datetime) -> BrokerRecord:
    name = brokers.FIRST_NAME if node is None else node.name
    node_id = None if node is None else node.id
    return brokers.add_broker(tx, free_name(tx, name), BrokerKind.NODE, at=at, joined=True, node_id=node_id)


def _forget_brokers(
    tx: Connection, left: Sequence[BrokerRecord], settings: Settings, is_stopped: Callable[[], bool], *, at: datetime
) -> None:
    if any(one.applied_at is not None for one in left) and not is_stopped():
        raise StartupError(
            f"The broker at {settings.broker_socket} still runs, and would not learn of revocations any more: stop it"
            " before the portal starts with PORTAL_BROKER_CONTROL=none."
        )
    for one in {record.id: record for record in left}.values():
        brokers.forget_broker(tx, one, at=at)
        actor = audit.system_actor(DEFAULT_TENANT)
        audit.record(tx, actor, "broker:remove", f"broker:{one.name}", at=at, because="PORTAL_BROKER_CONTROL=none")


def free_name(tx: Connection, name: str) -> str:
    """Return a name that no broker has: this one, or with a number after it."""
    taken = {record.name for record in brokers.list_brokers(tx)}
    candidates = (name, *(f"{name[:58]}-{number}" for number in range(2, len(taken) + 3)))
    return next(one for one in candidates if one not in taken)


def name_of(text: str) -> str:
    """Return a DNS label made of a host's name."""
    label = re.sub(r"[^a-z0-9-]+", "-", text.partition(".")[0].lower()).strip("-")[:60].strip("-")
    return label or "node"


def hash_of_secrets(settings: Settings) -> str | None:
    """Return the SHA-256, in hex, of the secrets that nodes have in common; ``None`` if there are none yet."""
    digest = hashlib.sha256()
    for name in COMPARED:
        try:
            content = (settings.secrets_dir / name).read_bytes().strip()
        except FileNotFoundError:
            return None
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def remove(database: Database, actor: Actor, name: str, *, now: datetime) -> None:
    """Forget a node that works no more, with its broker; its data folder is refused from then on.

    Raises ``NotFound``, and ``StateConflict`` while a portal works on its data folder, or for the last broker.
    """
    with database.transaction(sees=ALL_TENANTS) as tx:
        lock_installation(tx, InstallationLock.NODES)
        node = nodes.get_node(tx, name)
        if nodes.works(tx, node):
            raise StateConflict(f"A portal works on the data folder of {name}; stop it first.")
        if (broker := brokers.of_node(tx, node.id)) is not None:
            brokers.remove_broker(tx, broker, at=now)
        nodes.remove_node(tx, node)
        audit.record(tx, actor, "node:remove", f"node:{name}", at=now)
