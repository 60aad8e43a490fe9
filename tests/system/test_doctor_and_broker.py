"""A whole installation is examined from outside, sound and then damaged in one place after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.deployment import Deployment, deployed, examine, wait_until

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def running() -> Iterator[Deployment]:
    """An installation with devices, under files, shared: each test puts right what it damaged."""
    with deployed(PORTAL_BROKER_CONTROL="files") as deployment:
        deployment.onboard("stays")
        gone = deployment.onboard("gone")
        deployment.cli("revoke", gone.id, "--yes")
        deployment.wait_ready()
        yield deployment


def test_a_sound_installation_is_well_in_every_line(running: Deployment) -> None:
    assert examine(running) == (0, {})
    lines = running.run_flask("doctor", check=False).stdout.splitlines()
    assert all(line.startswith("ok ") or "broker version" in line for line in lines)
    assert any("Mosquitto 2." in line for line in lines)
    assert any("TLS alert 44" in line for line in lines)


def test_a_broker_that_is_stopped(running: Deployment) -> None:
    running.stop_broker()
    status, bad = examine(running)
    running.start_broker()
    running.wait_ready()
    assert status == 1
    assert {"broker", "broker certificate", "probe certificates", "portal"} <= bad.keys()
    assert "internal listener" in bad["broker"]
    assert "does not answer" in bad["broker"]
    assert bad.keys() <= {
        "broker",
        "broker certificate",
        "probe certificates",
        "portal",
        "broker configuration",
        "generation",
    }


def test_files_of_the_broker_that_were_changed_by_hand(running: Deployment) -> None:
    acl, crl = running.data / "broker" / "acl", running.data / "broker" / "crl.pem"
    older = crl.read_bytes()
    another = running.onboard("another")
    running.cli("revoke", another.id, "--yes")
    running.stop_portal()  # it would put them right within seconds
    good = acl.read_bytes(), crl.read_bytes()
    acl.write_bytes(good[0].replace(b"# end", b"user 00000000-0000-4000-8000-000000000000\ntopic readwrite #\n# end"))
    status, bad = examine(running)
    assert status == 1
    assert "1 entry of the ACL should not exist" in bad["ACL entries"]
    assert "acl was changed since" in bad["broker files"]
    assert "does not answer" in bad["portal"]
    acl.write_bytes(good[0])
    crl.write_bytes(older)
    status, bad = examine(running)
    assert status == 1
    assert "not on the CRL" in bad["CRL entries"]
    assert "does not contain the newest CRL" in bad["CRL"]
    assert "ACL entries" not in bad
    running.start_portal()
    running.wait_ready()
    wait_until(lambda: examine(running) == (0, {}))


def test_a_configuration_without_the_client_id(running: Deployment) -> None:
    assert running.broker is not None
    text = running.broker.configuration.read_text()
    other = running.folder / "other.conf"
    other.write_text(text.replace("use_username_as_clientid true", ""))
    status, bad = examine(running, "--broker-config", str(other))
    assert status == 1
    assert bad.keys() == {"broker configuration"}
    assert "use_username_as_clientid is not true" in bad["broker configuration"]


def test_a_configuration_that_ends_sessions_by_itself(running: Deployment) -> None:
    assert running.broker is not None
    other = running.folder / "other.conf"
    other.write_text(running.broker.configuration.read_text() + "\npersistent_client_expiration 14d\n")
    status, bad = examine(running, "--broker-config", str(other))
    assert (status, list(bad)) == (2, ["broker configuration"])
    assert "persistent_client_expiration is set" in bad["broker configuration"]


def test_a_key_that_others_may_read(running: Deployment) -> None:
    key = running.data / "ca" / "issuing-1.key.pem"
    key.chmod(0o644)
    status, bad = examine(running)
    key.chmod(0o600)
    assert status == 1
    assert bad.keys() == {"secret files", "CA keys"}
    assert f"chmod 600 {key}" in bad["secret files"]


def test_warnings_alone_have_a_status_of_their_own(running: Deployment) -> None:
    made = running.call("POST", "/tokens", {"name": "endless", "role": "auditor"})
    assert made.status_code == 201, made.text
    status, bad = examine(running)
    running.call("DELETE", f"/tokens/{made.json()['token_id']}")
    assert (status, sorted(bad)) == (2, ["tokens"])
