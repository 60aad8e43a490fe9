"""One issuing CA follows another while portal, broker and devices are at work."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from cryptography import x509

from tests.support.deployment import Client, Deployment, Onboarded, examine, wait_until

pytestmark = [pytest.mark.system, pytest.mark.both_stores]


@pytest.fixture(scope="module")
def deployment(ca_keys: Callable[[], dict[str, str]]) -> Iterator[Deployment]:
    with Deployment(PORTAL_WORKERS="3", **ca_keys()) as running:
        yield running


def number_of_issuer(pem: bytes) -> str:
    return x509.load_pem_x509_certificate(pem).issuer.rfc4514_string()[-1]


def issuer_of(device: Onboarded) -> str:
    return number_of_issuer(Path(device.file("device.pem")).read_bytes())


def issuer_of_the_next(deployment: Deployment) -> str:
    """The issuer of a device that any of the workers registers."""
    deployment.session.close()
    device_id = deployment.register()["device_id"]
    certificate = deployment.call("GET", f"/devices/{device_id}").json()["certificate"]
    deployment.call("POST", f"/revoke/{device_id}")
    return number_of_issuer(certificate["certificate"].encode())


def talks(client: Client) -> bool:
    return client.publish(f"devices/{client.device.id}/up") in ("Success", "No matching subscribers")


def verified(deployment: Deployment, device: Onboarded, folder: Path) -> str:
    """What openssl says of a device's chain, by what the portal serves in plain HTTP."""
    crls = []
    for name in ("root", "issuing-1", "issuing-2"):
        (folder / f"{name}.crl").write_bytes(requests.get(f"{deployment.pki_url}/crl/{name}.crl", timeout=10).content)
        crls += ["-CRLfile", f"{name}.crl"]
    (folder / "ca.pem").write_bytes(requests.get(f"{deployment.pki_url}/ca.pem", timeout=10).content)
    command = ["openssl", "verify", "-x509_strict", "-crl_check_all", "-CAfile", "ca.pem", *crls]
    done = subprocess.run(
        [*command, device.file("device.pem")], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def broker_file(deployment: Deployment, name: str) -> str:
    return (deployment.data / "broker" / name).read_text()


def test_devices_of_both_cas_are_at_work_before_during_and_after(deployment: Deployment, tmp_path: Path) -> None:
    older, revoked = deployment.onboard("older"), deployment.onboard("revoked")
    session = older.client()
    assert issuer_of(older) == "1"
    done = deployment.run_flask("ca", "rollover")
    assert "issuing-2 issues." in done.stdout
    assert talks(session), "the session of a device of the first CA continues"
    assert broker_file(deployment, "crl.pem").count("BEGIN X509 CRL") == 2

    def all_workers_issue_by_it() -> bool:
        return all(issuer_of_the_next(deployment) == "2" for _ in range(12))

    wait_until(all_workers_issue_by_it)
    newer = deployment.onboard("newer")
    with_newer = newer.client()
    assert talks(with_newer)
    assert talks(session)
    session.close()
    with_newer.close()
    deployment.stop_broker()
    deployment.start_broker()  # as PORTAL_BROKER_RESTART does, for its certificate of the second CA
    session, with_newer = older.client(), newer.client()
    assert talks(session)
    deployment.wait_ready()
    for device in (older, newer):
        assert verified(deployment, device, tmp_path).endswith(": OK\n")

    # Each can be revoked by the CRL of its own CA.
    gone = deployment.onboard("gone")
    for device in (revoked, gone):
        assert deployment.call("POST", f"/revoke/{device.id}").json()["broker"] == "enforced"
        assert device.refusal()
        assert "certificate revoked" in verified(deployment, device, tmp_path)
    listed = deployment.run_flask("ca", "list").stdout.splitlines()
    assert [" ".join(line.split()[:2]) for line in listed[1:]] == ["root root,", "issuing-1 is", "issuing-2 issues"]

    # The last device of the first CA gets a certificate of the second, and the first retires.
    with sqlite3.connect(deployment.data / "portal.db") as database:  # as if the rollover had been yesterday
        database.execute("UPDATE issuers SET issuing_since = datetime(issuing_since, '-1 day')")
    out = deployment.folder / "older-renewed"
    deployment.cli("renew", older.id, "--overlap-hours", "0", "--out", str(out))
    session.wait_cut()
    session.close()
    deployment.run_flask("ca", "retire", "issuing-1")
    wait_until(lambda: broker_file(deployment, "crl.pem").count("BEGIN X509 CRL") == 1)
    renewed = Onboarded(older.id, out, deployment.mqtt_port)
    session = renewed.client()
    assert talks(session)
    assert talks(with_newer)
    session.close()
    with_newer.close()
    deployment.wait_ready()
    assert requests.get(f"{deployment.pki_url}/crl/issuing-1.crl", timeout=10).status_code == 200
    assert examine(deployment) == (0, {})
