"""A portal with CAs born in a token, which is killed, stopped and restarted under load, as one in a network may be."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import requests

from tests.support.deployment import PLAIN, Deployment, wait_until
from tests.support.tokens import SoftTokens, TokenServer, client_module

pytestmark = pytest.mark.system

LIMIT = 2.0  # PORTAL_TOKEN_TIMEOUT
BOUND = 20.0  # what a request may take beside that on a busy machine
OUTAGES = [pytest.param(0.0, id="short"), pytest.param(10.0, id="10 s", marks=pytest.mark.long)]


@pytest.fixture
def portal(soft_tokens: SoftTokens, token_server: TokenServer) -> Iterator[Deployment]:
    uri = replace(soft_tokens.create(), module=client_module())
    with Deployment(PORTAL_CA_KEYS=str(uri), PORTAL_TOKEN_TIMEOUT=str(LIMIT)) as running:
        running.wait_ready()
        yield running


@dataclass
class Registrations:
    """Clients that register one device after the other, and keep what they are answered."""

    portal: Deployment
    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    longest: float = 0.0
    stopping: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Registrations:
        for _ in range(4):
            self.threads.append(threading.Thread(target=self._run))
            self.threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def count(self, status: int) -> int:
        return sum(answer[0] == status for answer in self.answers)

    def wait_for_more(self, status: int, more: int = 5) -> float:
        """Return after how many seconds more requests were answered so."""
        started, wanted = time.monotonic(), self.count(status) + more
        wait_until(lambda: self.count(status) >= wanted)
        return time.monotonic() - started

    def _run(self) -> None:
        with requests.Session() as session:
            session.trust_env = False
            session.verify = self.portal.operator["PORTAL_CA"]
            session.headers["Authorization"] = f"Bearer {self.portal.operator['PORTAL_TOKEN']}"
            while not self.stopping.is_set():
                started = time.monotonic()
                try:
                    answer = session.post(f"{self.portal.url}/register", json=PLAIN, timeout=3 * BOUND)
                except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                    continue  # to a worker that was killed, which may have begun to answer
                self.longest = max(self.longest, time.monotonic() - started)
                body = answer.json()
                self.answers.append((answer.status_code, body))
                if answer.status_code == 503:
                    if body["code"] != "token_unavailable" or int(answer.headers["Retry-After"]) < 1:
                        self.wrong.append(answer.text)
                    self.stopping.wait(0.05)
                elif answer.status_code != 201:
                    self.wrong.append(answer.text)


def failing(portal: Deployment) -> set[str]:
    return {check["name"] for check in portal.call("GET", "/readyz").json()["checks"] if not check["ok"]}


def openssl(*arguments: str) -> str:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def is_back(portal: Deployment) -> bool:
    return not failing(portal) & {"token", "ca"}


@pytest.mark.parametrize("seconds", OUTAGES)
def test_registrations_while_the_token_is_killed_and_stopped(
    portal: Deployment, token_server: TokenServer, seconds: float, record_property: Any
) -> None:
    first = portal.register()
    with Registrations(portal) as load:
        load.wait_for_more(201)
        token_server.kill()
        load.wait_for_more(503)
        assert failing(portal) >= {"token", "ca"}
        before = portal.workers()
        os.kill(before[0], signal.SIGKILL)  # the worker in its place starts without the token
        wait_until(lambda: len(portal.workers()) == len(before) and before[0] not in portal.workers())
        assert portal.call("POST", f"/revoke/{first['device_id']}").json()["broker"] == "enforced"
        time.sleep(seconds)
        token_server.start()
        record_property("recovered after kill", load.wait_for_more(201, 1))
        wait_until(lambda: is_back(portal))
        load.wait_for_more(201)
        token_server.stop()
        load.wait_for_more(503)
        time.sleep(seconds)
        token_server.resume()
        record_property("recovered after stop", load.wait_for_more(201, 1))
        load.wait_for_more(201)
    assert load.wrong == []
    assert load.longest < LIMIT + BOUND
    record_property("longest", load.longest)
    wait_until(lambda: is_back(portal))
    check_what_was_issued(portal, first, [body for status, body in load.answers if status == 201])


def check_what_was_issued(portal: Deployment, revoked: dict[str, Any], issued: list[dict[str, Any]]) -> None:
    """Have openssl verify every certificate, the CRL, and what the OCSP responder says of one."""
    folder = portal.folder / "issued"
    folder.mkdir()
    ca, issuer, crl = portal.operator["PORTAL_CA"], folder / "issuing.pem", folder / "crl.pem"

    def lists_it() -> bool:
        (folder / "crl.der").write_bytes(requests.get(f"{portal.pki_url}/crl/issuing-1.crl", timeout=BOUND).content)
        openssl("crl", "-inform", "DER", "-in", str(folder / "crl.der"), "-out", str(crl))
        return revoked["serial_number"].upper() in openssl("crl", "-in", str(crl), "-noout", "-text")

    wait_until(lists_it)
    assert "verify OK" in openssl("crl", "-in", str(crl), "-CAfile", ca, "-noout")
    (folder / "issuing.der").write_bytes(requests.get(f"{portal.pki_url}/ca/issuing-1.cer", timeout=BOUND).content)
    openssl("x509", "-inform", "DER", "-in", str(folder / "issuing.der"), "-out", str(issuer))
    paths = []
    for device in [revoked, *issued]:
        shown = portal.call("GET", f"/devices/{device['device_id']}").json()["certificate"]["certificate"]
        paths.append(folder / f"{device['device_id']}.pem")
        paths[-1].write_text(shown)
    checked = ["-CAfile", ca, "-CRLfile", str(crl), "-crl_check"]
    assert "certificate revoked" in openssl("verify", *checked, str(paths[0]))
    verified = openssl("verify", *checked, *map(str, paths[1:]))
    assert verified.count(": OK") == len(issued) > 10
    asked = ["-issuer", str(issuer), "-CAfile", ca, "-url", f"{portal.pki_url}/ocsp", "-no_nonce"]
    told = openssl("ocsp", *asked, "-cert", str(paths[0]), "-cert", str(paths[-1]))
    assert f"{paths[0]}: revoked" in told
    assert f"{paths[-1]}: good" in told
    assert "Response verify OK" in told
