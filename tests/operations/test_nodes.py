"""A data folder joins an installation on PostgreSQL by a code; any other one is refused; one that was moved goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from config import Settings
from core.broker_control import ControlKind
from core.errors import DatabaseInUse, NotFound, PortalRunning, StartupError, StateConflict, TooManyUploads
from core.states import BrokerEngine
from core.tenants import Quotas
from operations import authority, jobs, leadership, node_commands, nodes
from operations.backup.backup import back_up
from operations.backup.restore import restore
from operations.leadership import leadership_of
from operations.wiring import Portal, open_portal, prepare, utc_now
from pki.algorithms import KeyType
from store import audit, brokers, tenants
from store import nodes as store_nodes
from store.scope import ALL_TENANTS
from tests.support.databases import POSTGRES_URL, postgres_database
from tests.support.deployment import wait_until
from tests.support.harness import derived_quickly, settings_for
from tests.support.ports import free_port
from tests.support.tenants import add_tenant
from workflows import shared_files

pytestmark = pytest.mark.skipif(not POSTGRES_URL, reason="needs PostgreSQL")
ACTOR = audit.system_actor("default")


@pytest.fixture
def url() -> Iterator[str]:
    with postgres_database() as made, derived_quickly():
        yield made


def node(tmp_path: Path, url: str, name: str) -> Settings:
    return settings_for(tmp_path / name, PORTAL_DATABASE_URL=url, PORTAL_BROKER_CONTROL="guard")


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[Portal]:
    with contextlib.closing(open_portal(settings)) as portal:
        yield portal


def code_of(portal: Portal) -> str:
    return nodes.invite(portal.settings, portal.database, ACTOR, now=utc_now())[0]


def names(portal: Portal) -> list[str]:
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        return [record.name for record in store_nodes.list_nodes(tx)]


def everything_of(folder: Path) -> str:
    return " ".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def test_a_second_data_folder_is_refused_at_its_start_and_keeps_nothing(tmp_path: Path, url: str) -> None:
    first, second = node(tmp_path, url, "first"), node(tmp_path, url, "second")
    with running(first):
        pass
    with pytest.raises(DatabaseInUse, match="join"), running(second):  # also while no portal works on the first one
        pass
    assert not [path for path in (tmp_path / "second" / "secrets").iterdir() if path.is_file()]
    with running(first), pytest.raises(DatabaseInUse, match="join"), running(second):
        pass


def test_a_folder_that_joins_has_the_secrets_and_the_keys_but_for_the_roots(tmp_path: Path, url: str) -> None:
    first, second = node(tmp_path, url, "first"), node(tmp_path, url, "second")
    with running(first) as portal:
        prepare(portal)
        joined = nodes.join(second, code_of(portal), "edge 2.example", now=utc_now())
        assert names(portal)[1:] == [joined.name] == ["edge-2"]
        with running(second) as other:
            prepare(other)
            for name in ("link-keys", "idempotency-pepper", "webhook-key", "audit-key", "ca-passphrase"):
                path = second.secrets_dir / name
                assert path.read_bytes() == (first.secrets_dir / name).read_bytes()
                assert path.stat().st_mode & 0o777 == 0o600
            assert {path.name for path in first.ca_dir.glob("*.key.pem")} == {"issuing-1.key.pem", "root.key.pem"}
            assert {path.name for path in second.ca_dir.glob("*.key.pem")} == {"issuing-1.key.pem"}
            assert other.audit_log.verifier == portal.audit_log.verifier


def test_no_secret_is_in_the_database_in_the_clear(tmp_path: Path, url: str) -> None:
    first = node(tmp_path, url, "first")
    with running(first) as portal:
        code = code_of(portal)
        with portal.database.snapshot(sees=ALL_TENANTS) as tx:
            rows = [*tx.exec_driver_sql("SELECT name, sealed FROM shared_files").all()]
            rows += tx.exec_driver_sql("SELECT code_hash, sealed_key FROM node_invitations").all()
        held = b" ".join(bytes(sealed) for _, sealed in rows) + " ".join(name for name, _ in rows).encode()
    assert len(rows) >= 6
    for secret in (
        code.encode(),
        *(path.read_bytes().strip() for path in first.secrets_dir.iterdir() if path.is_file()),
    ):
        assert secret not in held
    assert b"PRIVATE KEY" not in held


def test_a_code_is_used_once_and_not_after_its_time(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(node(tmp_path, url, "first")) as portal:
        code = code_of(portal)
        nodes.join(node(tmp_path, url, "second"), code, "", now=utc_now())
        for wrong in (code, "A" * 43, ""):
            with pytest.raises(StartupError, match="was used, or has expired"):
                nodes.join(node(tmp_path, url, "third"), wrong, "", now=utc_now())
        monkeypatch.setattr(nodes, "INVITATION_LIFE", timedelta(seconds=-1))
        late = code_of(portal)
        with pytest.raises(StartupError, match="was used, or has expired"):
            nodes.join(node(tmp_path, url, "third"), late, "", now=utc_now())
        assert "third" not in " ".join(names(portal))
    assert not [path for path in (tmp_path / "third" / "secrets").rglob("*") if path.is_file()]


def test_only_an_empty_folder_joins(tmp_path: Path, url: str) -> None:
    with running(node(tmp_path, url, "first")) as portal:
        second = node(tmp_path, url, "second")
        second.secrets_dir.mkdir(parents=True)
        (second.secrets_dir / "link-keys").write_text("another")
        with pytest.raises(StartupError, match="secrets already"):
            nodes.join(second, code_of(portal), "", now=utc_now())
        assert (second.secrets_dir / "link-keys").read_text() == "another"


def test_a_node_whose_secrets_differ_from_the_others_is_refused(tmp_path: Path, url: str) -> None:
    first, second = node(tmp_path, url, "first"), node(tmp_path, url, "second")
    with running(first) as portal:
        (first.secrets_dir / "link-keys").write_text("rotated-while-it-is-the-only-node-0123456789\n")
    with running(first) as portal:
        nodes.join(second, code_of(portal), "", now=utc_now())
        (second.secrets_dir / "webhook-key").write_text("ab" * 32)
        with pytest.raises(DatabaseInUse, match="not those of the other nodes"), running(second):
            pass


def test_the_only_node_makes_a_secret_anew_that_its_folder_has_lost(tmp_path: Path, url: str) -> None:
    first = node(tmp_path, url, "first")
    with running(first) as portal:
        before = portal.node
    (first.secrets_dir / "link-keys").unlink()
    with running(first) as portal, portal.database.snapshot(sees=ALL_TENANTS) as tx:
        (after,) = store_nodes.list_nodes(tx)
    assert before is not None
    assert (after.id, after.name) == (before.id, before.name)
    assert after.secrets_hash == nodes.hash_of_secrets(first) != before.secrets_hash


def test_the_folder_of_the_only_node_can_be_moved_and_the_old_one_is_refused_then(tmp_path: Path, url: str) -> None:
    first = node(tmp_path, url, "first")
    with running(first) as portal:
        name = names(portal)
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    moved = node(tmp_path, url, "moved")
    with running(first), pytest.raises(DatabaseInUse), running(moved):
        pass
    with running(moved) as portal:
        assert names(portal) == name
    (first.secrets_dir / "link-keys").write_text("another-key-than-the-installation-has-0123456789\n")
    with pytest.raises(DatabaseInUse, match="join"), running(first):
        pass


def test_a_copy_of_the_folder_of_one_of_two_nodes_is_refused(tmp_path: Path, url: str) -> None:
    first, second = node(tmp_path, url, "first"), node(tmp_path, url, "second")
    with running(first) as portal:
        nodes.join(second, code_of(portal), "", now=utc_now())
    shutil.copytree(tmp_path / "second", tmp_path / "copy")
    with pytest.raises(DatabaseInUse, match="join"), running(node(tmp_path, url, "copy")):
        pass


def test_a_running_portal_whose_place_was_taken_gets_no_new_connection(tmp_path: Path, url: str) -> None:
    first = node(tmp_path, url, "first")
    with running(first) as portal:
        portal.database.engine.dispose()
        portal.database.locks.close()
        with portal.database.snapshot(sees=ALL_TENANTS):
            pass
        portal.database.engine.dispose()
        shutil.copytree(tmp_path / "first", tmp_path / "moved")
        with running(node(tmp_path, url, "moved")):
            pass
        with pytest.raises(DatabaseInUse), portal.database.snapshot():
            pass


def test_a_key_that_one_node_makes_the_other_has_and_one_that_it_destroys_the_other_destroys(
    tmp_path: Path, url: str
) -> None:
    first, second = node(tmp_path, url, "first"), node(tmp_path, url, "second")
    with running(first) as portal:
        nodes.join(second, code_of(portal), "", now=utc_now())
        with running(second) as other:
            made = portal.keys.create("issuing-9", KeyType.EC_P256)
            portal.keys.create("plant-root", KeyType.EC_P256)
            assert other.keys.load("issuing-9").public_key() == made.public_key()
            assert not (second.ca_dir / "plant-root.key.pem").exists()
            other.keys.destroy("issuing-9")
            portal.shared_files.fetch_all()
            assert not portal.keys.exists("issuing-9")
            other.shared_files.fetch_all()
            assert not other.keys.exists("issuing-9")


def test_who_can_write_the_database_alone_gives_no_node_a_file_and_destroys_none(tmp_path: Path, url: str) -> None:
    first, second = node(tmp_path, url, "first"), node(tmp_path, url, "second")
    with running(first) as portal:
        nodes.join(second, code_of(portal), "", now=utc_now())
        key = first.ca_dir / "issuing-1.key.pem"
        with portal.database.transaction(sees=ALL_TENANTS) as tx:
            tx.exec_driver_sql("UPDATE shared_files SET destroyed = true")
            moved = (
                "INSERT INTO shared_files SELECT '../outside', sealed FROM shared_files WHERE name LIKE 'ca/issuing%%'"
            )
            tx.exec_driver_sql(moved)
            tx.exec_driver_sql("INSERT INTO shared_files SELECT 'ca/b.key.pem', sealed FROM shared_files LIMIT 1")
        with pytest.raises(StartupError, match="cannot be opened"):
            portal.shared_files.fetch_all()
        assert key.exists()
        assert (first.secrets_dir / "link-keys").exists()
        assert not (tmp_path / "outside").exists()
        assert not (first.ca_dir / "b.key.pem").exists()


def test_the_key_of_a_root_and_files_elsewhere_are_never_given() -> None:
    given = ["secrets/link-keys", "ca/issuing-1.key.pem", "ca/issuing-1.token.json", "secrets/audit-keys/acme"]
    kept = ["ca/root.key.pem", "ca/acme-root-2.key.pem", "secrets/../x", "secrets/operator-token", "/etc/passwd"]
    kept += ["secrets/installation-key", "secrets/broker-password", "ca/issuing-1.key.pem.moved", "ca/root.token.json"]
    assert [name for name in given + kept if shared_files.is_shared(name)] == given


def test_a_node_is_removed_once_it_works_no_more_and_is_refused_then(tmp_path: Path, url: str) -> None:
    first, second = node(tmp_path, url, "first"), node(tmp_path, url, "second")
    with running(first) as portal:
        joined = nodes.join(second, code_of(portal), "second", now=utc_now())
        with running(second), pytest.raises(StateConflict, match="stop it first"):
            nodes.remove(portal.database, ACTOR, joined.name, now=utc_now())

        def works() -> bool:  # PostgreSQL ends sessions when it finds that their clients have
            with portal.database.snapshot(sees=ALL_TENANTS) as tx:
                return store_nodes.works(tx, joined)

        wait_until(lambda: not works())
        nodes.remove(portal.database, ACTOR, joined.name, now=utc_now())
        with pytest.raises(NotFound):
            nodes.remove(portal.database, ACTOR, joined.name, now=utc_now())
        with pytest.raises(DatabaseInUse), running(second):
            pass


def test_several_nodes_need_the_guard(tmp_path: Path, url: str) -> None:
    by_files = settings_for(tmp_path / "first", PORTAL_DATABASE_URL=url)
    with running(by_files) as portal, pytest.raises(StartupError, match="PORTAL_BROKER_CONTROL=guard"):
        code_of(portal)
    with running(node(tmp_path, url, "first")) as portal:
        nodes.join(node(tmp_path, url, "second"), code_of(portal), "", now=utc_now())
    with pytest.raises(StartupError, match="PORTAL_BROKER_CONTROL=guard"):
        open_portal(by_files)


def test_each_node_has_a_broker_that_counts_from_its_first_start(tmp_path: Path, url: str) -> None:
    first, second = node(tmp_path, url, "first"), node(tmp_path, url, "second")

    def brokers_of(portal: Portal) -> list[tuple[str, int | None, bool]]:
        with portal.database.snapshot(sees=ALL_TENANTS) as tx:
            return [(one.name, one.node_id, one.counts) for one in brokers.list_brokers(tx)]

    with running(first) as portal:
        joined = nodes.join(second, code_of(portal), "second", now=utc_now())
        assert portal.node is not None
        assert brokers_of(portal) == [("main", portal.node.id, True)]
        with running(second) as other:
            assert brokers_of(other) == [("main", portal.node.id, True), ("second", joined.id, True)]
        nodes.remove(portal.database, ACTOR, "second", now=utc_now())
        assert brokers_of(portal) == [("main", portal.node.id, True)]


def test_nodes_that_tell_one_rabbitmq_give_it_one_server_certificate(tmp_path: Path, url: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "password").touch(mode=0o600)
    (tmp_path / "password").write_text("x" * 32)
    listed = {"name": "rabbit@a", "mqtt": f"127.0.0.1:{free_port()}", "management": f"http://127.0.0.1:{free_port()}"}
    of_cluster = {
        "PORTAL_BROKER_CONTROL": "rabbitmq",
        "PORTAL_RABBITMQ_NODES": json.dumps([listed | {"folder": str(tmp_path / "a")}]),
        "PORTAL_RABBITMQ_PASSWORD_FILE": str(tmp_path / "password"),
        "PORTAL_RABBITMQ_BIND": f"127.0.0.1:{free_port()}",
        "PORTAL_RABBITMQ_URL": "https://localhost",
    }
    first, second = (
        settings_for(tmp_path / name, PORTAL_DATABASE_URL=url, **of_cluster) for name in ("first", "second")
    )
    files = [tmp_path / "a" / name for name in ("server.pem", "server.key")]
    with running(first) as portal:
        prepare(portal)
        nodes.join(second, code_of(portal), "second", now=utc_now())
        with running(second) as other:
            prepare(other)
            assert [*portal.broker.files.damage(), *other.broker.files.damage()] == []
            before = files[0].read_bytes()
            for file in (*files, second.broker_file("server.pem")):
                file.unlink()  # so that the second one makes the next one
            for one in (other, portal):
                one.own_certificates.renew()
            assert files[0].read_bytes() != before
            assert [*portal.broker.files.damage(), *other.broker.files.damage()] == []


def test_what_program_the_broker_is_follows_from_its_control(tmp_path: Path) -> None:
    with running(settings_for(tmp_path / "one", PORTAL_BROKER_CONTROL="guard")) as portal:
        for control, engine in (("rabbitmq", BrokerEngine.RABBITMQ), ("guard", BrokerEngine.MOSQUITTO)):
            settings = portal.settings.model_copy(update={"broker_control": ControlKind(control)})
            with portal.database.transaction(sees=ALL_TENANTS) as tx:
                own = nodes.own_broker(tx, None, settings, lambda: True, at=utc_now())
                assert own is not None
                assert brokers.list_brokers(tx) == [own]
            assert own.engine is engine


def test_on_sqlite_there_is_nothing_to_join(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "data")
    with pytest.raises(StartupError, match="PORTAL_DATABASE_URL"):
        nodes.join(settings, "A" * 43, "", now=utc_now())
    with derived_quickly(), running(settings) as portal, pytest.raises(StartupError, match="need PostgreSQL"):
        code_of(portal)


# --- What waits until no other node works ----------------------------------------------------------------------------


def test_a_restore_is_refused_while_another_node_works(tmp_path: Path, url: str) -> None:
    first, second, now = node(tmp_path, url, "first"), node(tmp_path, url, "second"), utc_now()
    with running(first) as portal:
        prepare(portal)
        nodes.join(second, code_of(portal), "", now=now)
        back_up(first, tmp_path / "backup", now=now)
    with running(second), pytest.raises(PortalRunning, match="Other nodes of the portal work"):
        restore(first, tmp_path / "backup", replace=True, keep_links=False, now=now)


def test_tables_are_not_changed_while_another_node_works_with_them(tmp_path: Path, url: str) -> None:
    first, second = node(tmp_path, url, "first"), node(tmp_path, url, "second")
    with running(first) as portal:
        nodes.join(second, code_of(portal), "", now=utc_now())
        with running(second) as other:
            with portal.database.transaction(sees=ALL_TENANTS) as tx:
                tx.exec_driver_sql("UPDATE alembic_version SET version_num = '0040'")
            with pytest.raises(StartupError, match="Other nodes work with an older version"):
                other.database.migrate()


def test_a_root_waits_for_the_nodes_that_may_still_show_certificates_below_it(tmp_path: Path, url: str) -> None:
    first, second = node(tmp_path, url, "first"), node(tmp_path, url, "second")
    with running(first) as portal:
        prepare(portal)
        nodes.join(second, code_of(portal), "second", now=utc_now())
        with pytest.raises(StateConflict, match="nodes second may still show"):
            authority._check_other_nodes(portal, "issuing-1")
        with running(second) as other:
            prepare(other)
            jobs.show_node(other)
        authority._check_other_nodes(portal, "issuing-1")


def test_another_node_stands_in_for_a_leader_that_is_silent_and_for_no_other(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = node(tmp_path, url, "first"), node(tmp_path, url, "second")
    monkeypatch.setattr(leadership, "PATIENCE_SECONDS", 0.0)
    with running(first) as portal:
        nodes.join(second, code_of(portal), "", now=utc_now())
        with running(second) as other:
            seen = [
                leadership_of(one.database, one.settings.data_dir, ".installation.lock", of_all=True)
                for one in (portal, other)
            ]
            with seen[0].try_lead() as leads, seen[1].try_lead() as leads_too:
                assert (leads, leads_too) == (True, False)
                assert not seen[1].is_silent()  # it has just begun
                assert seen[0].goes_on()
                assert not seen[1].is_silent()
                monkeypatch.setattr(leadership, "SILENT_SECONDS", 0.0)
                assert seen[1].is_silent()
                with seen[1].try_stand_in() as stands_in, seen[0].try_stand_in() as stands_in_too:
                    assert (stands_in, stands_in_too) == (True, False)
            with seen[1].try_lead() as leads:
                assert leads


def test_a_quota_of_uploads_is_of_all_nodes_together(tmp_path: Path, url: str) -> None:
    first, second = node(tmp_path, url, "first"), node(tmp_path, url, "second")
    with running(first) as portal:
        nodes.join(second, code_of(portal), "", now=utc_now())
        add_tenant(portal, "acme")
        with portal.database.transaction(sees=ALL_TENANTS) as tx:
            record = tenants.get_tenant(tx, "acme")
            tenants.update_tenant(tx, dataclasses.replace(record, quotas=Quotas(bulk_uploads=1)))
        portal.tenant_terms.refresh()
        with running(second) as other:
            with portal.bulk.place("acme"), pytest.raises(TooManyUploads), other.bulk.place("acme"):
                pass
            with other.bulk.place("acme"):
                pass


@pytest.mark.parametrize(("given", "status"), [("c0de\n", 0), ("", 2), ("\n", 2)])
def test_a_code_can_be_given_on_standard_input(monkeypatch: pytest.MonkeyPatch, given: str, status: int) -> None:
    taken: list[str] = []

    def join(settings: object, code: str, name: str, *, now: datetime) -> SimpleNamespace:
        taken.append(code)
        return SimpleNamespace(name=name)

    monkeypatch.setattr(node_commands, "settings_of_app", lambda: SimpleNamespace(data_dir="data"))
    monkeypatch.setattr(nodes, "join", join)
    result = CliRunner().invoke(node_commands.join, ["--name", "edge-2"], input=given)
    assert (result.exit_code, taken) == (status, ["c0de"] if status == 0 else [])
    assert "Warning" not in result.output  # as the standard library prints if it shall hide what no terminal shows
    assert status == 0 or "--code" in result.output
