"""The tables of what the nodes of an installation share, which belong to no tenant; on SQLite there is one node."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from store.database import Base

# Of those who run now: no backup has these tables.
OF_NODES = {"info": {"of_nodes": True}}


class Node(Base):
    """A data folder that may work on this database, by its ``folder`` number (``core.files.folder_number``)."""

    __tablename__ = "nodes"
    __table_args__ = (sa.UniqueConstraint("name"), sa.UniqueConstraint("folder"), OF_NODES)

    id: Mapped[int] = mapped_column(sa.Integer, primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(63))
    folder: Mapped[int] = mapped_column(sa.BigInteger)
    secrets_hash: Mapped[str] = mapped_column(sa.String(64))
    joined_at: Mapped[datetime]
    # The last sign of life, with the version that it runs, and the CA of its own certificates then.
    seen_at: Mapped[datetime | None]
    version: Mapped[str | None] = mapped_column(sa.String(32))
    own_issuer: Mapped[str | None] = mapped_column(sa.String(63))
    # Of its last start: a keyed hash of each setting that nodes have in common.
    settings: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))


class NodeInvitation(Base):
    """A code by which one data folder joins once: what it opens is sealed under a key made of it."""

    __tablename__ = "node_invitations"
    __table_args__ = OF_NODES

    code_hash: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    sealed_key: Mapped[bytes] = mapped_column(sa.LargeBinary)
    expires_at: Mapped[datetime]


class SettingChange(Base):
    """A setting, by its field, with which nodes may start though others that work have another value of it."""

    __tablename__ = "setting_changes"
    __table_args__ = OF_NODES

    field: Mapped[str] = mapped_column(sa.String(63), primary_key=True)
    ends_at: Mapped[datetime]


class SharedFile(Base):
    """A secret file that every node needs, by its path in the data folder, sealed under a key that each node has.

    Once it is ``destroyed`` for good, ``sealed`` has nothing but the seal.
    """

    __tablename__ = "shared_files"
    __table_args__ = OF_NODES

    name: Mapped[str] = mapped_column(sa.String(255), primary_key=True)
    sealed: Mapped[bytes] = mapped_column(sa.LargeBinary)
    destroyed: Mapped[bool] = mapped_column(sa.Boolean, server_default=sa.false())


class Leader(Base):
    """When the process that does something for all nodes gave its last sign of life."""

    __tablename__ = "leaders"
    __table_args__ = OF_NODES

    name: Mapped[str] = mapped_column(sa.String(63), primary_key=True)
    seen_at: Mapped[datetime]


class Page(Base):
    """A page of counts; see ``core.pages``."""

    __tablename__ = "pages"
    __table_args__ = OF_NODES

    kind: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    number: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    content: Mapped[bytes] = mapped_column(sa.LargeBinary)
