"""Two portals on one data folder agree with each other, and with the broker, to the last device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import requests
from cryptography import x509

from tests.support.crash import access_on_disk, read_crl
from tests.support.databases import POSTGRES_URL, postgres_database
from tests.support.deployment import Deployment, wait_until
from tests.support.ports import free_port

pytestmark = pytest.mark.system

REGISTRATIONS = 200
CLIENTS = 8


# Each takes half a minute: the one that has most in it always, the others with --all.
CASES = [
    pytest.param("guard", "sqlite", marks=[pytest.mark.long] if POSTGRES_URL else []),
    pytest.param("files", "sqlite", marks=pytest.mark.long),
]
if POSTGRES_URL:
    CASES.append(pytest.param("guard", "postgresql"))


@pytest.mark.parametrize(("control", "database"), CASES)
def test_registered_and_revoked_by_two_portals_at_once_all_agree(control: str, database: str) -> None:
    with ExitStack() as stack:
        environment = {"PORTAL_BROKER_CONTROL": control}
        if database == "postgresql":
            environment["PORTAL_DATABASE_URL"] = stack.enter_context(postgres_database())
        deployment = stack.enter_context(Deployment(**environment))
        other = f"127.0.0.1:{free_port()}"
        binds = {"PORTAL_BIND": other, "PORTAL_PKI_BIND": f"127.0.0.1:{free_port()}"}
        told = (deployment.data / "operator.env").read_text()
        deployment.start_portal(others=binds)
        assert (deployment.data / "operator.env").read_text() == told  # the first one's, while it lives
        urls = (deployment.url, f"https://{other}")
        credentials = deployment.session.headers["Authorization"]

        def work(client: int) -> list[dict[str, Any]]:
            session = requests.Session()
            session.trust_env = False
            session.verify = deployment.session.verify
            session.headers["Authorization"] = credentials
            done = []
            for number in range(REGISTRATIONS // CLIENTS):
                url = urls[(client + number) % 2]
                plain = {"name": f"pump-{client}-{number}", "type": "pump", "location": "hall 1", "firmware": "1.0"}
                answer = session.post(f"{url}/register", json=plain, timeout=30)
                assert answer.status_code == 201, answer.text
                device = answer.json()
                if number % 2:
                    # Revoked through the other portal than it was registered with.
                    revoked = session.post(
                        f"{urls[(client + number + 1) % 2]}/revoke/{device['device_id']}", timeout=30
                    )
                    assert revoked.json()["broker"] == "enforced", revoked.text
                    device["status"] = "revoked"
                done.append(device)
            session.close()
            return done

        with ThreadPoolExecutor(CLIENTS) as pool:
            answered = [device for devices in pool.map(work, range(CLIENTS)) for device in devices]
        assert len({device["device_id"] for device in answered}) == REGISTRATIONS
        deployment.wait_ready()
        said = {device["device_id"]: device["status"] for device in answered}
        assert said == recorded(deployment)
        broker = deployment.data / "broker"
        active = {device_id for device_id, status in said.items() if status == "active"}
        wait_until(lambda: access_on_disk(broker)[0] & set(said) == (active if deployment.is_guarded else set()))
        revoked = {int(device["serial_number"], 16) for device in answered if device["status"] == "revoked"}
        wait_until(lambda: revoked <= read_crl(broker, deployment.data / "ca.pem")[0])
        crl = x509.load_pem_x509_crl((broker / "crl.pem").read_bytes())
        assert {entry.serial_number for entry in crl} - revoked  # probe certificates
        served = deployment.session.get(f"{deployment.pki_url}/crl/issuing-1.crl", timeout=10).content
        assert x509.load_der_x509_crl(served) == crl


def recorded(deployment: Deployment) -> dict[str, str]:
    """Every device of the database, page by page, with its status."""
    found: dict[str, str] = {}
    cursor = ""
    while True:
        page = deployment.call("GET", f"/devices?limit=37{cursor}").json()
        found |= {device["device_id"]: device["status"] for device in page["devices"]}
        if page["next_cursor"] is None:
            return found
        cursor = f"&cursor={page['next_cursor']}"
