"""A start that cannot succeed says in one sentence why, and what to do."""

from __future__ import annotations

import os
import socket
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deployment import Deployment
from tests.support.guard_stub import journal_lines

pytestmark = pytest.mark.system


@pytest.fixture
def stopped() -> Iterator[Deployment]:
    """A portal that has been started once and stopped."""
    deployment = Deployment()
    deployment.make_data_folder()
    yield deployment
    deployment.__exit__(None, None, None)


def said(deployment: Deployment, *command: str) -> str:
    """What the server says when it does not start; it exits with a failure and shows no traceback."""
    done = deployment.run_flask(*(command or ("serve",)), check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize("name", ["PORTAL_BIND", "PORTAL_PKI_BIND"])
def test_a_port_in_use(stopped: Deployment, name: str) -> None:
    host, port = stopped.environment[name].split(":")
    with socket.create_server((host, int(port))):
        sentence = said(stopped)
    assert port in sentence
    assert name in sentence


def test_a_data_folder_that_cannot_be_written(tmp_path: Path) -> None:
    deployment = Deployment()
    (tmp_path / "file").write_text("a file is where the folder should be")
    deployment.environment["PORTAL_DATA_DIR"] = str(tmp_path / "file" / "data")
    sentence = said(deployment, "init")
    assert "cannot be written" in sentence
    assert "PORTAL_DATA_DIR" in sentence
    deployment.__exit__(None, None, None)


def test_a_wrong_passphrase(stopped: Deployment) -> None:
    stopped.environment["PORTAL_CA_PASSPHRASE"] = "this is not the passphrase"
    sentence = said(stopped)
    assert "passphrase" in sentence
    assert "this is not the passphrase" not in sentence


def test_a_lost_issuing_key(stopped: Deployment) -> None:
    (stopped.data / "ca" / "issuing-1.key.pem").unlink()
    assert "issuing-1.key.pem" in said(stopped)


def test_a_key_that_others_may_read(stopped: Deployment) -> None:
    (stopped.data / "ca" / "issuing-1.key.pem").chmod(0o644)
    assert "chmod 600" in said(stopped)


def test_a_database_from_a_newer_version(stopped: Deployment) -> None:
    with sqlite3.connect(stopped.data / "portal.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    assert "newer version" in said(stopped)


def test_a_database_older_than_what_the_broker_was_given(stopped: Deployment) -> None:
    copy = (stopped.data / "portal.db").read_bytes()
    for _ in range(3):
        stopped.run_flask("init")
    for path in stopped.data.glob("portal.db*"):
        path.unlink()
    (stopped.data / "portal.db").write_bytes(copy)
    assert "newer" in said(stopped)


def test_an_unknown_setting(stopped: Deployment) -> None:
    stopped.environment["PORTAL_WORKERS"] = "many"
    assert said(stopped) == "Error: PORTAL_WORKERS must be a whole number from 1 to 64."


def test_a_postgresql_that_does_not_answer(stopped: Deployment) -> None:
    stopped.environment["PORTAL_DATABASE_URL"] = "postgresql://portal:secret-word@127.0.0.1:1/portal"
    sentence = said(stopped)
    assert "database does not answer" in sentence
    assert "secret-word" not in sentence


def test_the_portal_runs_on_with_the_root_key_moved_away(stopped: Deployment) -> None:
    (stopped.data / "ca" / "root.key.pem").rename(stopped.folder / "root.key.pem")
    stopped.start_portal()
    assert stopped.register()["status"] == "active"


def test_without_a_broker_devices_are_registered_and_the_files_written(stopped: Deployment) -> None:
    stopped.start_portal()
    registered = stopped.register()
    fetched = stopped.session.get(registered["download_url"], timeout=20)
    assert fetched.status_code == 200
    assert f"allow {registered['device_id']}" in journal_lines(stopped.data / "broker" / "guard.journal")
    ready = stopped.call("GET", "/readyz")
    assert ready.status_code == 503
    assert [check["name"] for check in ready.json()["checks"] if not check["ok"]] == ["broker"]


def test_no_secret_is_readable_by_others(stopped: Deployment) -> None:
    stopped.start_portal()
    stopped.register()
    exposed = [
        str(path.relative_to(stopped.data))
        for path in stopped.data.rglob("*")
        if path.is_file() and stat.S_IMODE(os.stat(path).st_mode) & 0o007
    ]
    assert exposed == ["ca.pem"]


def test_flask_run_serves_the_same_application(stopped: Deployment) -> None:
    done = stopped.run_flask("routes")
    assert "/register" in done.stdout


def test_beside_a_broker_the_settings_are_printed_and_nothing_is_served_once_the_script_is_gone(
    stopped: Deployment,
) -> None:
    (stopped.data / "operator.env").write_text("of an earlier run\n")
    done = stopped.run_flask("serve", "--beside-broker", check=False)  # standard input is at its end
    assert (done.returncode, done.stderr) == (1, "")
    printed = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert printed["PORTAL_DATA_DIR"] == str(stopped.data)
    assert printed["PORTAL_MQTT_PORT"] == str(stopped.mqtt_port)
    assert printed["trust_anchor"] == "'CN=Device Onboarding Root CA'"
    assert printed["portal_log_size"] == "0"
    assert stat.S_IMODE((stopped.data / "portal.log").stat().st_mode) == 0o600
    assert not (stopped.data / "operator.env").exists()
