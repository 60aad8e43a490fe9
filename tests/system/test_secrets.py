"""After a run of everything, no secret of a device or an operator is anywhere in the clear."""

from __future__ import annotations

import base64
import contextlib
import email
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
    load_pem_private_key,
)

from tests.support.deployment import Deployment, wait_until
from tests.support.est import csr_der, in_base64
from tests.support.receiver import Receiver, receiving

pytestmark = pytest.mark.system

CHOSEN = "a password of my own choosing"
IDEMPOTENCY_KEY = "idempotency-key-4711-4711"
RENEWAL_KEY = "idempotency-key-0815-0815"
WRONG = "op_a-wrong-token-that-somebody-tried"
PLAIN = {"name": "pump-9", "type": "pump", "location": "hall 1", "firmware": "1.0"}


def key_forms(pem: bytes) -> Iterator[bytes]:
    """A private key in each form it could leak in: the body of its PEM, its DER, its raw scalar in hex and binary."""
    key = load_pem_private_key(pem, None)
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    scalar = key.private_numbers().private_value  # type: ignore[union-attr]  # the default key is ECDSA
    yield from (der, base64.b64encode(der)[:64], scalar.to_bytes(32, "big"), f"{scalar:064x}".encode())


def processes(deployment: Deployment) -> Iterator[Path]:
    """Of the portal's, each one's folder below /proc."""
    for process in Path("/proc").iterdir():
        try:
            environment = (process / "environ").read_bytes() if process.name.isdigit() else b""
        except OSError:
            continue  # it has ended
        if str(deployment.data).encode() in environment:
            yield process


def everything(deployment: Deployment) -> Iterator[tuple[str, bytes]]:
    """All that is left behind: files, logs, and what the list of processes shows of the portal."""
    for path in deployment.folder.rglob("*"):
        if path.is_file() and not path.relative_to(deployment.folder).parts[0].startswith("device-"):
            yield str(path.relative_to(deployment.folder)), path.read_bytes()
    for process in processes(deployment):
        try:
            yield f"command line of {process.name}", (process / "cmdline").read_bytes()
            yield f"environment of {process.name}", (process / "environ").read_bytes()
        except OSError:
            continue


def memory(process: Path) -> bytes:
    """What a core dump of the process would hold: all that it can read."""
    held = []
    with (process / "mem").open("rb", 0) as file:
        for line in (process / "maps").read_text().splitlines():
            first, last = (int(place, 16) for place in line.split()[0].split("-"))
            with contextlib.suppress(OSError, OverflowError):  # not for readers, the kernel's own, given back meanwhile
                file.seek(first)
                held.append(file.read(last - first))
    return b"".join(held)


def link(answer: dict[str, Any]) -> bytes:
    """The token inside of a link."""
    return str(answer["download_url"]).rpartition("/")[2].encode()


class Executed(Deployment):
    """A portal whose processes have a command line and an environment of their own, which a forked one has not."""

    under = ("env",)


class Run:
    """A run of everything that shows a secret to somebody; ``secrets`` says what each one is."""

    def __init__(self, deployment: Deployment, receiver: Receiver) -> None:
        self.deployment = deployment
        self.receiver = receiver
        self.secrets: dict[str, bytes] = {}

    def call(self, method: str, path: str, body: Any = None, status: int = 201, **options: Any) -> dict[str, Any]:
        answer = self.deployment.call(method, path, body, **options)
        assert answer.status_code == status, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def of_a_bundle(self, what: str, answer: dict[str, Any]) -> None:
        self.secrets[f"{what}: password"] = str(answer["bundle_password"]).encode()
        self.secrets[f"{what}: link"] = link(answer)

    def of_a_key(self, what: str, pem: bytes) -> None:
        for number, form in enumerate(key_forms(pem)):
            self.secrets[f"{what}: key, form {number}"] = form

    def everything(self) -> None:
        self.webhook()
        self.registrations()
        self.renewals()
        self.operators()
        self.enrolment()
        self.bulk()
        wait_until(lambda: len(self.receiver.requests) >= 3)  # signed and sent
        wait_until(lambda: b"bundle:deliver" in json.dumps(self.deployment.call("GET", "/audit").json()).encode())

    def webhook(self) -> None:
        made = self.call("POST", "/webhooks", {"name": "a receiver", "url": self.receiver.url})
        self.secrets["a webhook's secret"] = made["secret"].encode()
        self.secrets["a webhook's secret, without its prefix"] = made["secret"].rpartition("_")[2].encode()
        self.secrets["a webhook's secret, as bytes"] = base64.b64decode(made["secret"].rpartition("_")[2])

    def registrations(self) -> None:
        deployment = self.deployment
        self.device = deployment.onboard()
        self.of_a_key("a device", Path(self.device.file("device.key")).read_bytes())
        waiting = deployment.register()
        self.of_a_bundle("a registration", waiting)
        deployment.session.get(f"{waiting['download_url']}x", timeout=10)
        self.chosen = deployment.register(bundle_password=CHOSEN)["device_id"]
        self.secrets["a chosen password"] = CHOSEN.encode()
        header = {"Idempotency-Key": IDEMPOTENCY_KEY}
        self.secrets["an idempotency key"] = IDEMPOTENCY_KEY.encode()
        repeated = self.call("POST", "/register", PLAIN, headers=header)
        assert self.call("POST", "/register", PLAIN, headers=header) == repeated
        assert deployment.session.get(repeated["download_url"], timeout=10).status_code == 200
        self.of_a_bundle("a repeated registration, fetched", repeated)

    def renewals(self) -> None:
        out = self.deployment.folder / "device-renewed"
        self.deployment.cli("renew", self.device.id, "--out", str(out))
        self.of_a_key("a renewed device", (out / "device.key").read_bytes())
        path, header = f"/devices/{self.device.id}/renew", {"Idempotency-Key": RENEWAL_KEY}
        renewed = self.call("POST", path, headers=header)
        assert self.call("POST", path, headers=header) == renewed
        self.of_a_bundle("a repeated renewal", renewed)
        self.secrets["a renewal's idempotency key"] = RENEWAL_KEY.encode()
        self.call("POST", f"/devices/{self.device.id}/suspend", status=200)
        self.call("POST", f"/revoke/{self.device.id}", status=200)
        self.call("POST", f"/revoke/{self.chosen}", status=200)

    def operators(self) -> None:
        token = self.call("POST", "/tokens", {"name": "ci", "role": "operator"})["token"]
        self.secrets["an operator's token"] = token.encode()
        self.secrets["a token that was tried"] = WRONG.encode()
        for authorization in (f"Bearer {token}", f"Bearer {WRONG}", "Basic dXNlcjpwYXNz"):
            header = {"Authorization": authorization}
            self.deployment.session.get(f"{self.deployment.url}/devices", headers=header, timeout=10)

    def enrolment(self) -> None:
        terms = {"name": "a batch", "type": "pump", "count": 5}
        token = self.call("POST", "/enrolment-tokens", terms)["token"]
        for secret, status in ((token, 200), (f"{token}x", 401), (WRONG, 401)):
            self.est("simpleenroll", secret, status)
        with_key = self.est("serverkeygen", token, 200)
        answer = email.message_from_bytes(
            f"Content-Type: {with_key.headers['Content-Type']}\r\n\r\n".encode() + with_key.content
        )
        der = next(part for part in answer.walk() if part.get_content_type() == "application/pkcs8").get_payload(
            decode=True
        )
        assert isinstance(der, bytes)
        key = load_der_private_key(der, None)
        self.of_a_key("a key made over EST", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    def est(self, operation: str, token: str, status: int) -> requests.Response:
        answer = requests.post(
            f"{self.deployment.url}/.well-known/est/{operation}",
            in_base64(csr_der(subject=operation)),
            auth=("device", token),
            headers={"Content-Type": "application/pkcs10"},
            verify=self.deployment.operator["PORTAL_CA"],
            timeout=20,
        )
        assert answer.status_code == status, answer.text
        sent = base64.b64encode(f"device:{token}".encode())
        self.secrets |= {f"an enrolment token: {token}": token.encode(), f"as it was sent: {token}": sent}
        return answer

    def bulk(self) -> None:
        rows = [PLAIN | {"external_id": f"unit-{number}", "name": f"pump-{number}"} for number in range(3)]
        body = "".join(json.dumps(row) + "\n" for row in rows)
        header = {"Content-Type": "application/x-ndjson"}
        url = f"{self.deployment.url}/register/bulk"
        answers = self.deployment.session.post(url, body, headers=header, timeout=60).text.splitlines()
        assert len(answers) == len(rows)
        for number, line in enumerate(answers):
            self.of_a_bundle(f"row {number} of an upload", json.loads(line))
        fetched = self.deployment.session.get(json.loads(answers[0])["download_url"], timeout=20)
        assert fetched.status_code == 200


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with ExitStack() as stack:
        allowed = "127.0.0.0/8,::1"
        deployment = stack.enter_context(Executed(PORTAL_LOG_LEVEL="debug", PORTAL_WEBHOOK_ALLOW=allowed))
        made = Run(deployment, stack.enter_context(receiving()))
        made.everything()
        yield made


def test_nothing_secret_is_left_in_files_logs_database_or_the_list_of_processes(run: Run) -> None:
    left = list(everything(run.deployment))
    assert [(what, where) for where, content in left for what, secret in run.secrets.items() if secret in content] == []
    first = run.deployment.operator["PORTAL_TOKEN"].encode()
    places = {where for where, content in left if first in content}
    assert places == {"data/operator.env", "data/secrets/operator-token"}


def test_no_process_of_the_portal_leaves_a_core(run: Run) -> None:
    for process in processes(run.deployment):
        (limit,) = [line for line in (process / "limits").read_text().splitlines() if line.startswith("Max core")]
        assert limit.split()[4:6] == ["0", "0"]


def test_the_process_that_starts_the_others_has_none_of_it_in_memory(run: Run) -> None:
    """What went through a worker stays in its memory for an unknown time, as docs/security.md says."""
    master = run.deployment.processes[0].pid
    kept = (run.deployment.data / "secrets" / "link-keys").read_bytes().strip()
    workers = run.deployment.workers()
    assert workers
    for worker in workers:
        assert kept in memory(Path(f"/proc/{worker}"))  # the search finds what is there
    held = memory(Path(f"/proc/{master}"))
    assert [what for what, secret in run.secrets.items() if secret in held] == []


def test_the_search_would_find_them(run: Run) -> None:
    leak = run.deployment.data / "leak"
    leak.write_text("op_a-token-in-the-clear")
    left = list(everything(run.deployment))
    leak.unlink()
    assert any(b"op_a-token-in-the-clear" in content for _, content in left)
    assert any(where.startswith("command line") for where, _ in left)
    assert any(where.startswith("environment") for where, _ in left)
    assert len(list(processes(run.deployment))) > len(run.deployment.workers())
    assert len(run.secrets) > 30
