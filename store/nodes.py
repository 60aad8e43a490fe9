"""The nodes of an installation: the data folders that work on its PostgreSQL together, and how one joins them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection

from core.errors import DatabaseInUse, NotFound, PortalRunning
from core.files import folder_number
from core.server_command import server_command
from store.database import Database, columns_of, hash_of
from store.locks import InstallationLock, lock_installation
from store.node_tables import Node, NodeInvitation, SettingChange, SharedFile
from store.scope import ALL_TENANTS

SIGN_SECONDS = 10.0  # between two signs of life of a node
_NOW = sa.func.clock_timestamp()  # of the database: the clocks of nodes differ


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node as it is recorded; see ``store.node_tables.Node``."""

    id: int
    name: str
    folder: int
    secrets_hash: str
    joined_at: datetime
    seen_at: datetime | None
    version: str | None
    own_issuer: str | None
    settings: Mapping[str, str] | None


_ALL = sa.select(*columns_of(NodeRecord, Node)).order_by(Node.id)


def list_nodes(tx: Connection) -> Sequence[NodeRecord]:
    """Return the nodes in the order in which they joined."""
    return [NodeRecord(*row) for row in tx.execute(_ALL)]


def of_folder(tx: Connection, folder: int) -> NodeRecord | None:
    """Return the node with a data folder, by that's number."""
    row = tx.execute(_ALL.where(Node.folder == folder)).one_or_none()
    return None if row is None else NodeRecord(*row)


def add_node(tx: Connection, name: str, folder: int, secrets_hash: str) -> NodeRecord:
    """Add a node under a name, with a number after it if there is one of that name."""
    taken = {record.name for record in list_nodes(tx)}
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name[:58]}-{number}"
    row = {"name": free, "folder": folder, "secrets_hash": secrets_hash}
    tx.execute(sa.insert(Node).values(**row, joined_at=_NOW))
    added = of_folder(tx, folder)
    assert added is not None  # noqa: S101 - for mypy: it was inserted
    return added


def get_node(tx: Connection, name: str) -> NodeRecord:
    """Return a node by its name; raises ``NotFound``."""
    found = next((record for record in list_nodes(tx) if record.name == name), None)
    if found is None:
        raise NotFound(f"There is no node {name[:63]}; list them by: {server_command('nodes')}")
    return found


def remove_node(tx: Connection, node: NodeRecord) -> None:
    """Forget a node, whose data folder is refused from now on."""
    tx.execute(sa.delete(Node).where(Node.id == node.id))


_WORKS = sa.text(
    "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND classid = :folders"
    " AND objid = :folder AND granted"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
)


def works(tx: Connection, node: NodeRecord) -> bool:
    """Return whether a portal works on the data folder of a node: whether it has a connection to the database."""
    from store import postgresql as server

    return bool(tx.execute(_WORKS, {"folders": server.FOLDERS, "folder": node.folder}).scalar_one())


_FOLDERS = sa.text(
    "SELECT objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND classid = :folders AND granted"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


def working(tx: Connection) -> Sequence[NodeRecord]:
    """Return the nodes on whose data folders a portal works, in the order in which they joined; none on SQLite."""
    if tx.dialect.name == "sqlite":
        return []
    from store import postgresql as server

    folders = {*tx.execute(_FOLDERS, {"folders": server.FOLDERS}).scalars()}
    return [record for record in list_nodes(tx) if record.folder in folders]


def sign_of_life(tx: Connection, node_id: int, *, version: str, own_issuer: str) -> None:
    """Record that a node works, which version of the portal it runs, and which CA its own certificates are of."""
    values = {"seen_at": _NOW, "version": version, "own_issuer": own_issuer}
    tx.execute(sa.update(Node).where(Node.id == node_id).values(**values))


def set_settings(tx: Connection, node_id: int, hashes: Mapping[str, str]) -> None:
    """Record the settings with which a node starts, by a hash of each."""
    tx.execute(sa.update(Node).where(Node.id == node_id).values(settings=dict(hashes)))


def let_setting_change(tx: Connection, field: str, *, life: timedelta) -> datetime:
    """Let nodes start with different values of a setting for a while; return when that ends."""
    ends = _NOW + life
    added = postgresql.insert(SettingChange).values(field=field, ends_at=ends)
    changed = added.on_conflict_do_update(index_elements=[SettingChange.field], set_={"ends_at": ends})
    ended: datetime = tx.execute(changed.returning(SettingChange.ends_at)).scalar_one()
    return ended


def changing_settings(tx: Connection) -> frozenset[str]:
    """Return the settings that may differ now."""
    return frozenset(tx.execute(sa.select(SettingChange.field).where(SettingChange.ends_at > _NOW)).scalars())


# --- Entering --------------------------------------------------------------------------------------------------------


def enter(database: Database, name: str, secrets_hash: str | None) -> NodeRecord | None:
    """Return the node that the data folder of a database is; ``None`` on SQLite, which has no nodes.

    The first data folder of an installation becomes its first node. The folder of the only node may have been moved:
    another one with the same secrets takes its place, unless a portal works on the old one. ``secrets_hash`` is
    ``None`` for a folder that lacks any of its secrets: the first or only node enters once they were made, and nothing
    is returned before. Raises ``DatabaseInUse`` for any other folder.
    """
    if database.is_sqlite:
        return None
    number = folder_number(database.folder)
    with database.transaction(sees=ALL_TENANTS) as tx:
        lock_installation(tx, InstallationLock.NODES)
        there = list_nodes(tx)
        mine = next((record for record in there if record.folder == number), None)
        if mine is None and not there:
            mine = None if secrets_hash is None else add_node(tx, name, number, secrets_hash)
        elif mine is None:
            mine = _moved(tx, database, there, number, secrets_hash)
        elif mine.secrets_hash != secrets_hash:
            if len(there) > 1:
                raise DatabaseInUse(
                    f"The secrets of {database.folder} are not those of the other nodes; restore its folder secrets, or"
                    f" remove it by: {server_command(f'nodes --remove {mine.name}')}, and let an empty folder join."
                )
            if secrets_hash is None:
                mine = None
            else:
                tx.execute(sa.update(Node).where(Node.id == mine.id).values(secrets_hash=secrets_hash))
    if mine is not None:
        for engine in (database.engine, database.locks.engine):
            if engine is not None:
                engine.get_execution_options()["portal_claim"].is_node = True
    return mine


def _moved(
    tx: Connection, database: Database, there: Sequence[NodeRecord], number: int, secrets_hash: str | None
) -> NodeRecord:
    """Let a data folder take the place of the only node's; raises ``DatabaseInUse`` if it is not that one moved."""
    from store import postgresql as server

    if len(there) > 1 or there[0].secrets_hash != secrets_hash or others_work(database):
        raise DatabaseInUse(server.NO_NODE.format(database.folder, server_command("join")))
    tx.execute(sa.update(Node).where(Node.id == there[0].id).values(folder=number))
    moved = of_folder(tx, number)
    assert moved is not None  # noqa: S101 - for mypy: it was updated
    return moved


def others_work(database: Database) -> bool:
    """Return whether a portal with another data folder has a connection to the database."""
    if database.is_sqlite:
        return False
    from store import postgresql as server

    with closing(database.engine.raw_connection()) as pooled:
        driver: Any = pooled.driver_connection
        return server.other_folders(driver, folder_number(database.folder))


def check_alone(database: Database) -> None:
    """Raise ``PortalRunning`` while another node works on the database, whose rows are to be replaced."""
    if others_work(database):
        raise PortalRunning("Other nodes of the portal work on the database; stop them first.")


# --- Joining, and the files that all nodes need ----------------------------------------------------------------------


def add_invitation(tx: Connection, code: str, sealed_key: bytes, *, life: timedelta) -> datetime:
    """Record an invitation by the hash of its code; return when it ends."""
    tx.execute(sa.delete(NodeInvitation).where(NodeInvitation.expires_at < _NOW))
    row = {"code_hash": hash_of(code), "sealed_key": sealed_key}
    added = sa.insert(NodeInvitation).values(**row, expires_at=_NOW + life)
    ends: datetime = tx.execute(added.returning(NodeInvitation.expires_at)).scalar_one()
    return ends


def take_invitation(tx: Connection, code: str) -> bytes | None:
    """Return the sealed key of an invitation, which is used up; ``None`` if there is none, or it has expired."""
    taken = sa.delete(NodeInvitation).where(
        NodeInvitation.code_hash == hash_of(code), NodeInvitation.expires_at >= _NOW
    )
    found = tx.execute(taken.returning(NodeInvitation.sealed_key)).scalar_one_or_none()
    return None if found is None else bytes(found)


def shared_files(tx: Connection) -> Mapping[str, bool]:
    """Return the paths of the files that all nodes need, and whether each was destroyed."""
    rows = tx.execute(sa.select(SharedFile.name, SharedFile.destroyed))
    return {row.name: row.destroyed for row in rows}


def shared_file(tx: Connection, name: str) -> bytes | None:
    """Return a file that all nodes need, or its destruction, sealed; ``None`` if there is none of that path."""
    found = tx.execute(sa.select(SharedFile.sealed).where(SharedFile.name == name)).scalar_one_or_none()
    return None if found is None else bytes(found)


def put_shared_file(tx: Connection, name: str, sealed: bytes, *, destroyed: bool = False) -> None:
    """Record a file that all nodes need unless there is one of that path, or that it was ``destroyed``."""
    added = postgresql.insert(SharedFile).values(name=name, sealed=sealed, destroyed=destroyed)
    if destroyed:
        gone = {"sealed": sealed, "destroyed": True}
        tx.execute(added.on_conflict_do_update(index_elements=[SharedFile.name], set_=gone))
    else:
        tx.execute(added.on_conflict_do_nothing(index_elements=[SharedFile.name]))
