"""A portal whose role owns nothing: the owner's changes the schema and restores, as docs/operating.md tells it."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from config import Settings
from core.errors import BackupRefused, StartupError
from operations.backup.backup import back_up
from operations.backup.restore import restore
from operations.doctor.base import State
from operations.doctor.doctor import examine
from operations.wiring import Portal, open_portal
from store import grants, schema, tenants
from store.database import Database
from tests.support.databases import POSTGRES_URL, administrate, drop_database
from tests.support.harness import ON_POSTGRESQL, Clock
from tests.workflows.test_admission import OPERATOR, request_of

DOCUMENTED = (Path(__file__).parents[2] / "docs" / "operating.md").read_text().partition("## PostgreSQL")[2]


@dataclasses.dataclass(frozen=True)
class Roles:
    """The URLs of an empty database for its owner, and for a role that may only connect."""

    owner: str
    running: str


@pytest.fixture
def roles() -> Iterator[Roles]:
    if not POSTGRES_URL:
        pytest.skip("needs a PostgreSQL")
    name = f"portal_{uuid.uuid4().hex[:12]}"
    statements = [line.strip() for line in DOCUMENTED.splitlines() if line.startswith("    ") and line.endswith(";")]
    assert len(statements) == 5
    for statement in statements:
        wanted = statement.replace("portal_owner", f"{name}_owner").replace("ROLE portal ", f"ROLE {name} ")
        administrate(wanted.replace("DATABASE portal ", f"DATABASE {name} ").replace("TO portal;", f"TO {name};"))
    url = sa.make_url(POSTGRES_URL).set(database=name)
    yield Roles(*(url.set(username=role).render_as_string() for role in (f"{name}_owner", name)))
    drop_database(name)
    for role in (name, f"{name}_owner"):
        administrate(f"DROP ROLE {role}")


def opened(url: str, folder: Path) -> Database:
    return Database(url, folder=folder, threads=1)


def test_the_owner_makes_the_tables_and_the_running_role_owns_nothing(roles: Roles, tmp_path: Path) -> None:
    database = opened(roles.running, tmp_path)
    with pytest.raises(StartupError, match="PORTAL_DATABASE_OWNER_URL"):
        database.migrate()
    database.migrate(roles.owner)
    database.migrate()  # the schema is as it should be: the owner is not needed
    with database.snapshot() as tx:
        assert grants.role_of(tx).unbound is None
        assert schema.revision(tx) == schema.newest_revision()
    database.close()


def test_a_role_that_comes_later_is_given_what_it_lacks_at_the_next_start(roles: Roles, tmp_path: Path) -> None:
    owner = opened(roles.owner, tmp_path)
    owner.migrate()  # as a portal of one role does
    with owner.snapshot() as tx:
        assert grants.role_of(tx).unbound == "owns the tables"
    running = opened(roles.running, tmp_path)
    with pytest.raises(StartupError, match="PORTAL_DATABASE_OWNER_URL"):
        running.migrate()
    running.migrate(roles.owner)
    with running.transaction() as tx:
        tenants.add_tenant(tx, "default", created_at=Clock()())
    for database in (owner, running):
        database.close()


def test_a_newer_schema_takes_the_owner_again(roles: Roles, tmp_path: Path) -> None:
    database = opened(roles.running, tmp_path)
    database.migrate(roles.owner)
    owner = opened(roles.owner, tmp_path)
    with owner.transaction() as tx:
        tx.execute(sa.text("UPDATE alembic_version SET version_num = '0031'"))
    with pytest.raises(StartupError, match="PORTAL_DATABASE_OWNER_URL"):
        database.migrate()
    for one in (database, owner):
        one.close()


@ON_POSTGRESQL
def test_a_backup_takes_the_running_role_and_a_restore_the_owner(
    make_settings: Callable[..., Settings], roles: Roles, tmp_path: Path, clock: Clock
) -> None:
    settings = make_settings(PORTAL_DATABASE_URL=roles.running, PORTAL_DATABASE_OWNER_URL=roles.owner)
    portal = open_portal(settings, clock)
    portal.registrations.register(OPERATOR, request_of(1, csr=True))
    portal.close()
    without = settings.model_copy(update={"database_owner_url": ""})
    back_up(without, tmp_path / "a.backup", now=clock())
    with pytest.raises(BackupRefused, match="PORTAL_DATABASE_OWNER_URL"):
        restore(without, tmp_path / "a.backup", now=clock(), replace=True, keep_links=False)
    restore(settings, tmp_path / "a.backup", now=clock(), replace=True, keep_links=False)
    again = open_portal(without, clock)
    with again.database.snapshot(sees="default") as tx:
        assert tx.execute(sa.text("SELECT count(*) FROM devices")).scalar_one() == 1
    again.close()


@ON_POSTGRESQL
def test_the_doctor_warns_of_a_role_that_row_level_security_does_not_hold(portal: Portal, clock: Clock) -> None:
    def finding(settings: Settings) -> tuple[State, str]:
        [found] = [one for one in examine(settings, clock) if one.name == "database"]
        return found.state, found.detail

    of_one_role = portal.settings.model_copy(
        update={"database_url": portal.settings.database_owner_url, "database_owner_url": ""}
    )
    assert finding(portal.settings)[0] is State.OK
    assert finding(of_one_role)[0] is State.OK  # there is nobody to be kept apart from
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "another", created_at=clock())
    assert finding(portal.settings)[0] is State.OK
    state, detail = finding(of_one_role)
    assert state is State.WARNING
    assert "is a superuser" in detail
