"""A portal that is killed under load, what its clients were told, and whether all of that still holds."""

from __future__ import annotations

import http.client
import json
import os
import queue
import random
import re
import secrets
import shlex
import signal
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from cryptography import x509
from paho.mqtt.enums import CallbackAPIVersion

from bench.harness import make_csr
from tests.support import programs
from tests.support.deployment import SECONDS, Deployment, is_answered, wait_until
from tests.support.programs import SERVER, Process

ANSWER_SECONDS = 30.0  # no answer in this time counts as a hang
PLAIN = {"type": "pump", "firmware": "1.0"}


class Victim(Deployment):
    """A deployment whose portal can be killed, all processes at once."""

    started_with: Mapping[str, str] = {}

    def launch_portal(self, **others: str) -> Process:
        """Start the server in a process group of its own, and wait for nothing."""
        self.started_with = others
        if not self.processes:
            (self.data / "operator.env").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            environment = self.environment | others
            process = programs.start(
                SERVER, ["serve"], env=environment, stdout=log, stderr=log, start_new_session=True, under=self.under
            )
        self.processes.append(process)
        return process

    def start_portal(self, *, others: dict[str, str] | None = None) -> Process:
        """Start the server; returns once it answers, or has ended."""
        environment_file = self.data / "operator.env"
        beside = bool(self.processes)  # the one that runs keeps operator.env
        process = self.launch_portal(**(others or {}))
        if beside:
            address = (others or {})["PORTAL_BIND"]
            wait_until(lambda: is_answered(f"https://{address}/healthz") or process.poll() is not None)
            return process
        wait_until(lambda: environment_file.exists() or process.poll() is not None)
        if process.poll() is None:
            self.operator = read_environment(environment_file)
            self.session.verify = self.operator["PORTAL_CA"]
            self.session.headers["Authorization"] = f"Bearer {self.operator['PORTAL_TOKEN']}"
        return process

    def kill_portal(self) -> None:
        """SIGKILL to master and workers; returns once none of them is left."""
        for process in self.processes:
            members = group_members(process.pid)
            if process.poll() is None or members:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(SECONDS)
            wait_until(lambda group=process.pid: not group_members(group))
        self.processes.clear()
        self.session.close()  # its kept-alive connections are dead

    def stop_portal(self, how: signal.Signals = signal.SIGTERM) -> list[int]:
        """Stop what runs, however it was left."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGCONT)
        statuses = super().stop_portal(how) if all(process.poll() is None for process in self.processes) else []
        self.kill_portal()
        return statuses


def read_environment(path: Path) -> dict[str, str]:
    """The variables of an operator.env."""
    words = (shlex.split(line.removeprefix("export ")) for line in path.read_text().splitlines())
    return dict(word[0].split("=", 1) for word in words)


def group_members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _parent, of_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(of_group) == group and state not in "ZX":
                found.append(int(folder.name))
    return found


# --- What the clients were told ------------------------------------------------------------------------------------


@dataclass
class Known:
    """A registration that a client asked for, with everything it was answered since."""

    name: str
    key: str
    body: dict[str, Any]
    answer: dict[str, Any] | None = None
    places: list[str] = field(default_factory=list)  # asked for, in order; those before ``placed`` have ended
    placed: int = 0  # how many of them were answered
    revoke_sent: bool = False
    revoked: str = ""  # "enforced" or "pending", as answered
    fetches: list[tuple[float, bool]] = field(default_factory=list)  # when, and whether it came whole
    busy: bool = False

    @property
    def id(self) -> str:
        assert self.answer is not None
        return str(self.answer["device_id"])

    @property
    def fetched(self) -> bool:
        return any(whole for _, whole in self.fetches)


class Ledger:
    """All that clients asked for, with the answers; every field is changed under its lock."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder  # for the keys of devices that bring their own
        self.random = random.Random(seed)  # noqa: S311 - chance, not secrecy
        self.lock = threading.Lock()
        self.devices: list[Known] = []
        self.losses: Counter[str] = Counter()
        self.said: list[str] = []
        self.answers: Counter[str] = Counter()
        self.kills: list[float] = []

    def lost(self, what: str, detail: str) -> None:
        """Note a promise that was broken."""
        with self.lock:
            self.losses[what] += 1
            self.said.append(f"{what}: {detail}")

    def count(self, what: str) -> None:
        with self.lock:
            self.answers[what] += 1

    def new(self) -> Known:
        """A registration to be asked for."""
        with self.lock:
            name = f"d-{len(self.devices)}-{secrets.token_hex(4)}"
            body = {"name": name, "location": "hall 0", **PLAIN}
            if self.random.random() < 0.25:
                body["csr"] = make_csr(self.folder, name).read_text()
            known = Known(name, secrets.token_hex(16), body, busy=True)
            self.devices.append(known)
        return known

    def key_of(self, known: Known) -> Path:
        """The key of a device that was registered with a CSR."""
        return self.folder / f"{known.name}.key"

    def pick(self, fits: Callable[[Known], bool], newest: int = 200) -> Known | None:
        """One of the newest registrations that fits, for one client at a time."""
        with self.lock:
            found = [known for known in self.devices[-newest:] if not known.busy and fits(known)]
            if not found:
                return None
            chosen = self.random.choice(found)
            chosen.busy = True
        return chosen

    def answered(self) -> list[Known]:
        return [known for known in self.devices if known.answer is not None]


class LoadClient(threading.Thread):
    """Registers, fetches, changes and revokes until it is told to stop or the portal is gone."""

    def __init__(self, ledger: Ledger, url: str, token: str, ca: str, style: str) -> None:
        super().__init__(daemon=True)
        self.ledger = ledger
        self.style = style
        self.stopping = threading.Event()
        self._url = urlsplit(url)
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._context = ssl.create_default_context(cafile=ca)
        self._connection: http.client.HTTPSConnection | None = None

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                self.act()
            except (OSError, http.client.HTTPException):
                self.disconnect()  # the portal was killed: what was asked for stays unanswered
                self.stopping.wait(0.02)
        self.disconnect()

    def act(self) -> None:
        choice = self.ledger.random.random()
        if choice < 0.35:
            self.holding(self.ledger.new(), self.register)
        elif choice < 0.45:
            self.on(lambda known: known.answer is None, self.register)
        elif choice < 0.65:
            self.on(lambda known: can_fetch(known), self.fetch)
        elif choice < 0.8:
            self.on(lambda known: known.answer is not None and not known.revoke_sent, self.change)
        else:
            self.on(lambda known: known.answer is not None and not known.revoked, self.revoke)

    def on(self, fits: Callable[[Known], bool], do: Callable[[Known], None]) -> None:
        known = self.ledger.pick(fits)
        if known is not None:
            self.holding(known, do)

    def holding(self, known: Known, do: Callable[[Known], None]) -> None:
        try:
            do(known)
        finally:
            known.busy = False

    def register(self, known: Known) -> None:
        status, body = self.ask("POST", "/register", known.body, {"Idempotency-Key": known.key})
        if status == 201:
            answer = json.loads(body)
            if known.answer is not None and known.answer != answer:
                self.ledger.lost("idempotency key with two answers", known.name)
            known.answer = answer

    def fetch(self, known: Known) -> None:
        assert known.answer is not None
        path = urlsplit(known.answer["download_url"]).path
        started = time.monotonic()
        known.fetches.append((started, False))
        connection = self.connect()
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()  # raises IncompleteRead where the portal dies in the middle
        self.disconnect()
        self.ledger.count(f"fetch {response.status}")
        if response.status == 200:
            if sum(whole for _, whole in known.fetches):
                self.ledger.lost("bundle fetched twice", known.name)
            if body[:2] != b"PK" or len(body) != int(response.headers["Content-Length"]):
                self.ledger.lost("bundle torn", known.name)
            known.fetches[-1] = (time.monotonic(), True)
        else:
            known.fetches.pop()
            self.check_status(response.status, body, "GET /download")

    def change(self, known: Known) -> None:
        place = f"hall {len(known.places) + 1}"
        known.places.append(place)
        body: dict[str, Any] = {"location": place}
        if self.style != "pattern" and self.ledger.random.random() < 0.5:
            body["topics"] = [{"filter": f"devices/{{id}}/t{len(known.places)}", "access": "write"}]
        status, _ = self.ask("PATCH", f"/devices/{known.id}", body)
        if status == 200:
            known.placed = len(known.places)

    def revoke(self, known: Known) -> None:
        known.revoke_sent = True
        status, body = self.ask("POST", f"/revoke/{known.id}", {"reason": "key_compromise"})
        if status == 200:
            known.revoked = json.loads(body)["broker"]
            self.ledger.count(f"revoked, {known.revoked}")

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = self.connect()
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, self._headers | (headers or {}))
        try:
            response = connection.getresponse()
            answer = response.read()
        except TimeoutError:
            self.ledger.lost("no answer", f"{method} {path} in {ANSWER_SECONDS:.0f} s")
            raise
        kind = re.sub(r"/[^/]{20,}", "/…", path)
        self.ledger.count(f"{method} {kind} {response.status}")
        self.check_status(response.status, answer, f"{method} {kind}")
        return response.status, answer

    def check_status(self, status: int, answer: bytes, what: str) -> None:
        if status >= 500 and status != 503:
            self.ledger.lost("internal error", f"{what}: {answer[:300]!r}")

    def disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def connect(self) -> http.client.HTTPSConnection:
        if self._connection is None:
            host, port = self._url.hostname or "", self._url.port
            self._connection = http.client.HTTPSConnection(host, port, context=self._context, timeout=ANSWER_SECONDS)
            self._connection.connect()
        return self._connection


def can_fetch(known: Known) -> bool:
    """Whether a client would fetch: not after a fetch that broke off, whose link is looked at later."""
    if known.answer is None or known.fetches or known.revoke_sent:
        return False
    return "download_url" in known.answer


class Load:
    """Clients at work for the body of a ``with``; ``stop`` ends them, too."""

    def __init__(self, ledger: Ledger, victim: Victim, style: str, clients: int = 6) -> None:
        operator = victim.operator
        self._clients = [
            LoadClient(ledger, victim.url, operator["PORTAL_TOKEN"], operator["PORTAL_CA"], style)
            for _ in range(clients)
        ]

    def __enter__(self) -> Self:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        for client in self._clients:
            client.stopping.set()
        for client in self._clients:
            client.join(ANSWER_SECONDS + SECONDS)
            assert not client.is_alive(), "a client hangs"


# --- A device at the broker ----------------------------------------------------------------------------------------


def refusal_of(ca: str, chain: str, key: Path, device_id: str, port: int, folder: Path, *, topics: int = 1) -> str:
    """What the broker says to the device: "" if it accepts it and what it publishes, else why not.

    ``topics``: how many it tries, each change by a ``LoadClient`` being to the next one; with 0 it only connects.
    """
    certificate = folder / f"{secrets.token_hex(8)}.pem"
    certificate.write_text(chain)
    said: queue.Queue[str] = queue.Queue()
    client = paho.Client(CallbackAPIVersion.VERSION2, device_id, protocol=paho.MQTTv5, reconnect_on_failure=False)
    try:
        client.tls_set(ca, str(certificate), str(key))
        client.on_connect = lambda _c, _u, _f, reason, _p: said.put("" if reason == 0 else str(reason))
        client.on_disconnect = lambda _c, _u, _f, reason, _p: said.put(f"cut: {reason}")
        client.on_publish = lambda _c, _u, _mid, reason, _p: said.put(str(reason) if reason.is_failure else "")
        client.connect("localhost", port, keepalive=30)
        client.loop_start()
        answer = said.get(timeout=SECONDS)
        for number in range(0 if answer else topics):
            client.publish(f"devices/{device_id}/t{number}", b"hello", qos=1)
            answer = said.get(timeout=SECONDS)
            if not answer or answer.startswith("cut"):
                break
        return answer
    except OSError as error:
        return str(error)
    finally:
        client.disconnect()
        client.loop_stop()
        certificate.unlink()


# --- What the portal's files say -----------------------------------------------------------------------------------


def acl_blocks(broker: Path) -> dict[str, list[str]]:
    """Each device's lines in the ACL."""
    text = (broker / "acl").read_text()
    return {
        user: lines.splitlines() for user, lines in re.findall(r"^user (\S{36})\n((?:topic .*\n)+)", text, re.MULTILINE)
    }


def access_on_disk(broker: Path) -> tuple[set[str], set[str]]:
    """The devices that the guard's journal allows and denies or, where there is none, the ACL."""
    journal = broker / "guard.journal"
    if not journal.exists():
        blocks = acl_blocks(broker)
        denied = {device_id for device_id, lines in blocks.items() if lines == ["topic deny #"]}
        return set(blocks) - denied, denied
    last = {line.split()[2]: line.split()[1] for line in journal.read_text().splitlines() if len(line.split()) > 3}
    granted, denied = ({identity for identity, verb in last.items() if verb == wanted} for wanted in ("allow", "deny"))
    return granted, denied


def read_crl(broker: Path, ca_pem: Path, *, ahead: timedelta = timedelta(0)) -> tuple[set[int], str]:
    """The serial numbers on the CRL, with what is wrong with it, for a reader whose clock is ``ahead``."""
    crl = x509.load_pem_x509_crl((broker / "crl.pem").read_bytes())
    issuers = x509.load_pem_x509_certificates(ca_pem.read_bytes())
    issuer = next(one for one in issuers if one.subject == crl.issuer)
    now = datetime.now(UTC) + ahead
    end = crl.next_update_utc
    problem = ""
    if not crl.is_signature_valid(issuer.public_key()):  # type: ignore[arg-type]  # an EC key
        problem = "its signature is not valid"
    elif end is None or not crl.last_update_utc <= now < end:
        problem = "it is not current"
    return {entry.serial_number for entry in crl}, problem


def every_device(victim: Victim) -> Iterator[dict[str, Any]]:
    """All devices, page by page."""
    cursor = ""
    while True:
        page = victim.call("GET", f"/devices?limit=200{cursor}").json()
        yield from page["devices"]
        if page["next_cursor"] is None:
            return
        cursor = f"&cursor={page['next_cursor']}"
