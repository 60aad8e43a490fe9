"""A client that openapi-python-client makes of the portal's own description registers, lists and revokes a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deployment import ROOT, SECONDS, Deployment, deployed

pytestmark = [pytest.mark.system, pytest.mark.long]

STORY = """
import json, os, ssl
from device_onboarding_portal_client import AuthenticatedClient
from device_onboarding_portal_client.api.devices import list_devices, register, revoke, show_device
from device_onboarding_portal_client.models import ProblemModel, RegistrationRequest, RevokeRequest

trust = ssl.create_default_context(cafile=os.environ["PORTAL_CA"])
client = AuthenticatedClient(os.environ["PORTAL_URL"], os.environ["PORTAL_TOKEN"], verify_ssl=trust)
body = {"name": "pump-1", "type": "pump", "location": "Hall 2", "firmware": "1.0", "metadata": {"line": "4"}}
registered = register.sync(client=client, body=RegistrationRequest.from_dict(body), idempotency_key="a" * 32)
again = register.sync(client=client, body=RegistrationRequest.from_dict(body), idempotency_key="a" * 32)
listed = list_devices.sync(client=client, name="pump-1")
reason = RevokeRequest.from_dict({"reason": "key_compromise"})
revoked = revoke.sync(registered.device_id, client=client, body=reason)
shown = show_device.sync(registered.device_id, client=client)
refused = show_device.sync("0f9d2c4e-5b1a-4c7d-9e8f-102030405060", client=client)
assert isinstance(refused, ProblemModel)
print(json.dumps({
    "same": registered.device_id == again.device_id,
    "link": registered.download_url.startswith("https://"),
    "listed": [device.device_id == registered.device_id for device in listed.devices],
    "revoked": str(revoked.broker),
    "status": str(shown.status),
    "refused": refused.code,
}))
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=4 * SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with deployed() as running:
        running.wait_ready()
        yield running


def test_a_generated_client_registers_lists_and_revokes(deployment: Deployment, tmp_path: Path) -> None:
    operator = deployment.operator
    fetched = run(
        "curl", "-sS", "--cacert", operator["PORTAL_CA"], f"{operator['PORTAL_URL']}/openapi.json", cwd=tmp_path
    )
    (tmp_path / "openapi.json").write_text(fetched)
    program = Path(sys.prefix) / "bin" / "openapi-python-client"
    options = ("--config", str(ROOT / "docs" / "openapi-python-client.yaml"), "--output-path", "client")
    path = f"{program.parent}:{os.environ['PATH']}"  # it calls ruff
    run(str(program), "generate", "--path", "openapi.json", *options, "--fail-on-warning", cwd=tmp_path, PATH=path)
    told = run(sys.executable, "-c", STORY, cwd=tmp_path / "client", **operator)
    assert json.loads(told) == {
        "same": True,
        "link": True,
        "listed": [True],
        "revoked": "enforced",
        "status": "revoked",
        "refused": "device_not_found",
    }
