"""The revisions of the database's schema: which there are, which one a database has, how it gets another.

alembic is imported only where a schema changes, since every start asks for the revision and few change it.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

MIGRATIONS = Path(__file__).parents[1] / "migrations"
MIGRATION_LOCK = sa.text("SELECT pg_advisory_xact_lock(8443)")  # of several portals that start at once, one migrates


def revisions() -> list[str]:
    """Return the revisions that this version of the portal knows, the oldest first, by the names of their files."""
    return sorted(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*_*.py"))


def newest_revision() -> str:
    """Return the schema revision of this version of the portal."""
    return revisions()[-1]


def revision(tx: Connection) -> str | None:
    """Return the schema revision of a database, ``None`` if it has none."""
    if not sa.inspect(tx).has_table("alembic_version"):
        return None
    found: str | None = tx.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    return found


def upgrade(tx: Connection, wanted: str) -> None:
    """Upgrade the schema to a revision, or to the newest one, "head", within the transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = tx
    command.upgrade(config, wanted)
