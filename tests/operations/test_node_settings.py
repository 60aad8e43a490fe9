"""Nodes that work at the same time have the same settings where it matters: a start is refused, or operators told."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import Result
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.broker_control import ControlKind
from core.errors import InputInvalid, StartupError
from core.roles import Role
from operations import node_settings, nodes
from operations.doctor import data
from operations.doctor.base import Installation, State
from operations.wiring import Portal, prepare, utc_now
from store import audit
from store import nodes as store_nodes
from store.scope import ALL_TENANTS
from tests.operations.test_nodes import ACTOR, code_of, running
from tests.support.databases import POSTGRES_URL, postgres_database
from tests.support.deployment import wait_until
from tests.support.harness import api_as, derived_quickly, settings_for

needs_postgresql = pytest.mark.skipif(not POSTGRES_URL, reason="needs PostgreSQL")
OF_ALL = {
    "PORTAL_BROKER_CONTROL": "guard",
    "PORTAL_PUBLIC_URL": "https://portal.example.org",
    "PORTAL_PKI_URL": "http://pki.example.org",
    "PORTAL_MQTT_PORT": "8883",
}


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Portal]:
    with postgres_database() as url, derived_quickly(), running(node(tmp_path, url, "first")) as portal:
        prepare(portal)
        yield portal


def node(tmp_path: Path, url: str, name: str, **environment: str) -> Settings:
    given = OF_ALL | ({"PORTAL_DATABASE_URL": url} if url else {}) | environment
    return settings_for(tmp_path / name, **given)


def beside(first: Portal, **environment: str) -> Settings:
    folder = first.settings.data_dir.parent
    return node(folder, first.settings.database_url, "second", **environment)


def join(first: Portal) -> None:
    nodes.join(beside(first), code_of(first), "second", now=utc_now())


def started(stack: ExitStack, settings: Settings) -> Portal:
    portal = stack.enter_context(running(settings))
    prepare(portal)
    return portal


def run(app: Flask, *arguments: str) -> Result:
    """Run a command of the server."""
    with app.app_context():
        return app.test_cli_runner().invoke(args=arguments)


def test_each_setting_is_of_all_nodes_or_of_one() -> None:
    kinds = node_settings.DECIDING, node_settings.COMMON, node_settings.OWN
    assert sorted(name for kind in kinds for name in kind) == sorted(Settings.model_fields)


DECIDE_OTHERWISE = {
    "PORTAL_TOPIC_PREFIX": {"PORTAL_TOPIC_PREFIX": "things"},
    "PORTAL_TOPIC_PREFIXES": {"PORTAL_TOPIC_PREFIXES": "homeassistant"},
    "PORTAL_WEBHOOK_ALLOW": {"PORTAL_WEBHOOK_ALLOW": "10.0.0.0/8"},
    "PORTAL_RENEWAL_GRACE_DAYS": {"PORTAL_RENEWAL_GRACE_DAYS": "30"},
}


@needs_postgresql
@pytest.mark.parametrize("variable", DECIDE_OTHERWISE)
def test_a_start_is_refused_with_a_setting_by_which_a_node_would_grant_what_another_denies(
    first: Portal, variable: str
) -> None:
    join(first)
    with (
        running(beside(first, **DECIDE_OTHERWISE[variable])) as second,
        pytest.raises(StartupError, match=rf"^{variable} is another here than at the node .+--change {variable}$"),
    ):
        prepare(second)
    assert not second.settings.broker_file("guard.journal").exists()  # nothing was granted by it


@needs_postgresql
def test_a_folder_does_not_join_with_such_a_setting_and_its_code_stays_valid(first: Portal) -> None:
    code, other = code_of(first), beside(first, PORTAL_TOPIC_PREFIX="things")
    with pytest.raises(StartupError, match=r"^PORTAL_TOPIC_PREFIX is another here"):
        nodes.join(other, code, "second", now=utc_now())
    assert not [path for path in other.secrets_dir.rglob("*") if path.is_file()]
    nodes.join(beside(first), code, "second", now=utc_now())


@needs_postgresql
def test_a_setting_that_was_announced_is_changed_at_one_node_after_another(first: Portal) -> None:
    join(first)
    new = {"PORTAL_TOPIC_PREFIXES": "homeassistant"}
    node_settings.let_change(first.database, ACTOR, "PORTAL_TOPIC_PREFIXES", now=utc_now())
    with ExitStack() as stack:
        started(stack, beside(first, **new))
        with first.database.snapshot(sees=ALL_TENANTS) as tx:
            [entry] = audit.list_audit_entries(tx, "default", limit=1, filters={"action": "node:change"})
        assert entry.detail["setting"] == "PORTAL_TOPIC_PREFIXES"
        assert first.readiness.nodes()[0].problem is not None
        with running(node(first.settings.data_dir.parent, first.settings.database_url, "first", **new)) as again:
            prepare(again)
        assert first.readiness.nodes()[0].problem is None


@needs_postgresql
def test_the_servers_command_announces_it(first: Portal) -> None:
    app = create_app(first.settings, background=False)
    said = run(app, "nodes", "--change", "PORTAL_TOPIC_PREFIXES")
    assert (said.exit_code, said.output.split()[:3]) == (0, ["May", "differ", "until"])
    with first.database.snapshot(sees=ALL_TENANTS) as tx:
        assert store_nodes.changing_settings(tx) == {"topic_prefixes"}


def test_on_sqlite_there_is_one_node(tmp_path: Path) -> None:
    with derived_quickly():
        app = create_app(settings_for(tmp_path / "data"), background=False)
        assert run(app, "nodes").output == "There are none.\n"
        said = run(app, "nodes", "--change", "PORTAL_TOPIC_PREFIX")
    assert (said.exit_code, "one node" in said.output) == (1, True)


@needs_postgresql
def test_it_may_differ_for_a_while_only(first: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    join(first)
    monkeypatch.setattr(node_settings, "CHANGE_LIFE", timedelta(0))
    node_settings.let_change(first.database, ACTOR, "topic_prefixes", now=utc_now())
    with running(beside(first, PORTAL_TOPIC_PREFIXES="x")) as second, pytest.raises(StartupError, match="is another"):
        prepare(second)


@needs_postgresql
def test_a_node_that_works_no_more_keeps_none_from_starting(first: Portal) -> None:
    join(first)
    with running(beside(first)) as second:
        prepare(second)
    settings = node(first.settings.data_dir.parent, first.settings.database_url, "first", PORTAL_TOPIC_PREFIX="things")
    first.close()

    def only_first_works(portal: Portal) -> bool:
        with portal.database.snapshot(sees=ALL_TENANTS) as tx:
            return len(store_nodes.working(tx)) == 1

    with running(settings) as portal:
        wait_until(lambda: only_first_works(portal))  # PostgreSQL ends sessions when it finds that their clients have
        prepare(portal)


@needs_postgresql
def test_other_differences_are_told_where_an_operator_looks(first: Portal, caplog: pytest.LogCaptureFixture) -> None:
    join(first)
    with ExitStack() as stack:
        with caplog.at_level(logging.WARNING, "portal.nodes"):
            second = started(stack, beside(first, PORTAL_DEVICE_DAYS="30", PORTAL_CA_PASSPHRASE=""))
        assert first.node is not None
        said = f"These settings are not the same at all nodes: PORTAL_DEVICE_DAYS ({first.node.name}, second). Give"
        [check] = second.readiness.nodes()
        assert (check.code, (check.problem or "")[: len(said)]) == ("node_settings_differ", said)
        [record] = [one for one in caplog.records if one.name == "portal.nodes"]
        assert record.__dict__["settings"] == "PORTAL_DEVICE_DAYS"
        installation = Installation(first.settings, utc_now)
        stack.callback(installation.close)
        finding = data.settings_of_nodes(installation)
        assert (finding.state, finding.detail) == (State.WARNING, check.problem)
        app = create_app(first.settings, background=False)
        stack.callback(portal_of(app).close)
        shown = api_as(app, Role.OPERATOR).get("/readyz").json["checks"]
        assert {"name": check.name, "ok": False, "code": check.code, "problem": check.problem} in shown
        assert not [one for one in api_as(app, None).get("/readyz").json["checks"] if one["name"] == check.name]
        listed = run(app, "nodes")
        assert [line.split()[1] for line in listed.stdout.splitlines()] == ["STATE", "works", "works"]
        assert listed.stderr.strip() == check.problem
    assert first.readiness.nodes() == []


@needs_postgresql
def test_a_secret_cannot_be_guessed_from_the_database(first: Portal) -> None:
    def hashes(**environment: str) -> dict[str, str]:
        return dict(node_settings.hashes_of(node(first.settings.data_dir.parent, "", "first", **environment)))

    assert first.node is not None
    with first.database.snapshot(sees=ALL_TENANTS) as tx:
        [recorded] = store_nodes.list_nodes(tx)
    assert recorded.settings == hashes()
    given = hashes(PORTAL_CA_PASSPHRASE="correct horse battery")
    assert given["ca_passphrase"] != hashes()["ca_passphrase"]
    pepper = first.settings.secrets_dir / "idempotency-pepper"
    pepper.write_text("ab" * 32)  # as who has the database only has to guess it
    assert not set(hashes(PORTAL_CA_PASSPHRASE="correct horse battery").values()) & set(given.values())


def test_how_a_setting_is_written_makes_no_difference(tmp_path: Path) -> None:
    (tmp_path / "first" / "secrets").mkdir(parents=True)
    (tmp_path / "first" / "secrets" / "idempotency-pepper").write_text("ab" * 32)

    def hashes(**environment: str) -> dict[str, str]:
        return dict(node_settings.hashes_of(node(tmp_path, "", "first", **environment)))

    one = hashes(PORTAL_TOPIC_PREFIXES="a,b", PORTAL_WEBHOOK_ALLOW="10.0.0.0/8, 10.1.0.0/16")
    assert one == hashes(PORTAL_TOPIC_PREFIXES="b, a", PORTAL_WEBHOOK_ALLOW="10.1.0.0/16,10.0.0.0/8")
    assert one["topic_prefixes"] != hashes(PORTAL_TOPIC_PREFIXES="a")["topic_prefixes"]
    settings = settings_for(tmp_path / "first")
    assert not [name for name in node_settings.hashes_of(settings) if name.startswith("rabbitmq_")]
    of_cluster = settings.model_copy(update={"broker_control": ControlKind.RABBITMQ})
    assert "rabbitmq_tenant_ports" in node_settings.hashes_of(of_cluster)


@needs_postgresql
def test_only_settings_that_keep_a_node_from_starting_are_announced(first: Portal) -> None:
    with pytest.raises(InputInvalid, match=r"PORTAL_OIDC_GROUPS.*PORTAL_TOPIC_PREFIX"):
        node_settings.let_change(first.database, ACTOR, "PORTAL_DEVICE_DAYS", now=utc_now())
