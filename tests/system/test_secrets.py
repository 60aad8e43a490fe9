"""After a run of everything, no secret of a device or an operator stands anywhere in the clear."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from tests.deployment import Deployment, deployed, wait_until

pytestmark = pytest.mark.system

CHOSEN = "a password of my own choosing"
IDEMPOTENCY_KEY = "idempotency-key-4711-4711"


def key_forms(pem: bytes) -> Iterator[bytes]:
    """A private key in each form it could leak in: the body of its PEM, its DER, its raw scalar in hex and binary."""
    key = load_pem_private_key(pem, None)
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    scalar = key.private_numbers().private_value  # type: ignore[union-attr]  # the default key is ECDSA
    yield from (der, base64.b64encode(der)[:64], scalar.to_bytes(32, "big"), f"{scalar:064x}".encode())


def everything(deployment: Deployment) -> Iterator[tuple[str, bytes]]:
    """All that is left behind: files, logs, and what the list of processes shows of the portal."""
    for path in deployment.folder.rglob("*"):
        if path.is_file() and not path.relative_to(deployment.folder).parts[0].startswith("device-"):
            yield str(path.relative_to(deployment.folder)), path.read_bytes()
    for process in Path("/proc").iterdir():
        try:
            environment = (process / "environ").read_bytes() if process.name.isdigit() else b""
            if str(deployment.data).encode() in environment:
                yield f"command line of {process.name}", (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended


def test_nothing_secret_is_left_in_files_logs_database_or_the_list_of_processes() -> None:
    with deployed(PORTAL_LOG_LEVEL="debug") as deployment:
        device = deployment.onboard()
        waiting = deployment.register()
        chosen = deployment.register(bundle_password=CHOSEN)
        header = {"Idempotency-Key": IDEMPOTENCY_KEY}
        plain = {"name": "pump-9", "type": "pump", "location": "hall 1", "firmware": "1.0"}
        repeated = deployment.call("POST", "/register", plain, headers=header).json()
        assert deployment.call("POST", "/register", plain, headers=header).json() == repeated
        fetched = deployment.session.get(repeated["download_url"], timeout=10)
        assert fetched.status_code == 200
        token = deployment.call("POST", "/tokens", {"name": "ci", "role": "operator"}).json()["token"]
        for authorization in (f"Bearer {token}", "Bearer op_a-wrong-token-that-somebody-tried", "Basic dXNlcjpwYXNz"):
            deployment.session.get(f"{deployment.url}/devices", headers={"Authorization": authorization}, timeout=10)
        deployment.session.get(f"{waiting['download_url']}x", timeout=10)
        deployment.call("POST", f"/revoke/{device.id}")
        deployment.call("POST", f"/revoke/{chosen['device_id']}")
        wait_until(lambda: b"bundle:deliver" in json.dumps(deployment.call("GET", "/audit").json()).encode())
        secrets: dict[str, bytes] = {
            "a generated bundle password": waiting["bundle_password"].encode(),
            "a chosen bundle password": CHOSEN.encode(),
            "a repeated answer's password": repeated["bundle_password"].encode(),
            "an idempotency key": IDEMPOTENCY_KEY.encode(),
            "an operator's token": token.encode(),
            "a token that was tried": b"op_a-wrong-token-that-somebody-tried",
            "a link's token": waiting["download_url"].rpartition("/")[2].encode(),
            "a used link's token": repeated["download_url"].rpartition("/")[2].encode(),
        }
        for number, form in enumerate(key_forms(Path(device.file("device.key")).read_bytes())):
            secrets[f"a device's key, form {number}"] = form
        found = [
            (what, where) for where, content in everything(deployment) for what, it in secrets.items() if it in content
        ]
        assert found == []
        first = deployment.operator["PORTAL_TOKEN"].encode()
        places = {where for where, content in everything(deployment) if first in content}
        assert places == {"data/operator.env", "data/secrets/operator-token"}


def test_the_search_would_find_them() -> None:
    with deployed() as deployment:
        (deployment.data / "leak").write_text("op_a-token-in-the-clear")
        assert any(b"op_a-token-in-the-clear" in content for _, content in everything(deployment))
        assert any(where.startswith("command line") for where, _ in everything(deployment))
