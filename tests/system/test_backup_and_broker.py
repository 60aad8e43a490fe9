"""Backups of a portal that serves, put back before a real broker that has gone on meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from broker.crl import read_crls
from tests.conftest import DATABASES
from tests.support.databases import postgres_database
from tests.support.deployment import Deployment, deployed, examine, wait_until

pytestmark = pytest.mark.system


@pytest.fixture
def control(request: pytest.FixtureRequest) -> str:
    """The guard, unless a test says otherwise."""
    return str(getattr(request, "param", "guard"))


@pytest.fixture
def running(control: str) -> Iterator[Deployment]:
    with deployed(PORTAL_BROKER_CONTROL=control) as deployment:
        yield deployment


@pytest.fixture(params=DATABASES)
def other_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'moved.db'}"
    else:
        with postgres_database() as url:
            yield url


def put_back(deployment: Deployment, file: Path, *options: str) -> str:
    """Stop the portal, restore, start it again; the broker runs on. Returns what the restore said."""
    deployment.stop_portal()
    done = deployment.run_flask("restore", str(file), *options, check=False)
    assert done.returncode == (3 if "Not known" in done.stdout else 0), done.stderr
    said = str(done.stdout)
    deployment.start_portal()
    deployment.wait_ready()
    return said


def crl_for_the_next_start(deployment: Deployment) -> set[int]:
    """The serial numbers on the CRLs that the broker reads at its start."""
    crls = read_crls((deployment.data / "broker" / "crl.pem").read_bytes())
    return {entry.serial_number for read in crls for entry in read.crl}


@pytest.mark.parametrize("control", ["guard", pytest.param("files", marks=pytest.mark.long)], indirect=True)
@pytest.mark.parametrize("lost", [False, True], ids=["the old database is readable", "only the CRL is left"])
def test_a_device_revoked_since_the_copy_is_refused_after_its_restore(
    running: Deployment, control: str, lost: bool
) -> None:
    stays, goes = running.onboard("stays"), running.onboard("goes")
    copy = running.folder / "portal.backup"
    running.run_flask("backup", str(copy))
    late = running.onboard("late")
    late.client().close()
    assert running.call("POST", f"/revoke/{goes.id}", {"reason": "key_compromise"}).json()["broker"] == "enforced"
    refused = running.run_flask("restore", str(copy), "--replace", check=False)
    assert refused.returncode == 1
    assert "stop it first" in refused.stderr
    if lost:
        revoked = x509.load_pem_x509_certificate(Path(goes.file("device.pem")).read_bytes()).serial_number
        wait_until(lambda: revoked in crl_for_the_next_start(running))  # the reason follows the answer
        running.stop_portal()
        for path in running.data.glob("portal.db*"):
            path.unlink()
    said = put_back(running, copy, "--replace")
    assert f"device {goes.id} (goes) (key_compromise, " in said
    assert goes.refusal()
    client = stays.client()
    assert client.publish(f"devices/{stays.id}/up") in ("Success", "No matching subscribers")
    client.close()
    device = running.call("GET", f"/devices/{goes.id}").json()
    assert (device["status"], device["revocation_reason"]) == ("revoked", "key_compromise")
    assert running.call("GET", f"/devices/{late.id}").status_code == 404
    if lost:
        # Its certificate is still good for a connection. The guard's list does not have it, the ACL's pattern does.
        client = late.client()
        assert client.is_refused(f"devices/{late.id}/up") == (control == "guard")
        client.close()
    else:
        assert late.refusal()
    again = running.onboard("again")
    again.client().close()
    assert "are sound" in running.run_flask("audit", "verify").stdout
    assert examine(running) == (0, {})


def test_devices_go_on_when_their_portal_moves_to_another_database(running: Deployment, other_database: str) -> None:
    stays, goes = running.onboard("stays"), running.onboard("goes")
    waiting = running.register(name="waits")
    running.cli("revoke", goes.id, "--yes")
    copy = running.folder / "portal.backup"
    running.run_flask("backup", str(copy))
    client = stays.client()
    running.environment["PORTAL_DATABASE_URL"] = other_database
    said = put_back(running, copy, "--keep-links")
    assert "Kept revoked   nothing" in said
    assert client.publish(f"devices/{stays.id}/up") in ("Success", "No matching subscribers")
    client.close()
    stays.client().close()
    assert goes.refusal()
    assert running.session.get(waiting["download_url"], timeout=20).status_code == 200
    running.onboard("new").client().close()
    assert "are sound" in running.run_flask("audit", "verify").stdout


def test_a_backup_is_one_state_while_devices_are_registered(running: Deployment) -> None:
    copies = [running.folder / f"{number}.backup" for number in range(3)]
    registered: list[str] = []
    for copy in copies:
        registered.append(running.register()["device_id"])
        running.run_flask("backup", str(copy))
    put_back(running, copies[1], "--replace")
    found = {device["device_id"] for device in running.call("GET", "/devices").json()["devices"]}
    assert found == set(registered[:2])
    wait_until(lambda: examine(running) == (0, {}))
