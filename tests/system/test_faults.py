"""What fails around the portal makes it say so, never lose an answer, never give the broker a bad file, and heals."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sqlite3
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography import x509

from bench.harness import make_csr
from broker.guard.journal import read_position
from tests.support.crash import Ledger, Load, Victim, group_members, read_crl, refusal_of
from tests.support.crash_check import Check
from tests.support.deployment import PLAIN, wait_until
from tests.support.harness import ALL
from tests.support.ports import free_port
from tests.support.postgres import Cluster
from tests.support.programs import Process

pytestmark = pytest.mark.system

QUICK = {"PORTAL_ENFORCE_TIMEOUT": "1"}
# What a client waits for at the longest: the write gate, then SQLite's own patience, and some for a busy machine.
BOUND = 20.0


class Faulty(Victim):
    """A deployment to do harm to, with devices whose key is here."""

    def __init__(self, **environment: str) -> None:
        super().__init__(**QUICK, **environment)
        self.statuses: list[int] = []

    def device(self) -> dict[str, Any]:
        name = f"device-{secrets.token_hex(4)}"
        return self.register(name=name, csr=make_csr(self.folder, name).read_text())

    def register(self, **fields: Any) -> dict[str, Any]:
        """As a program does that lets itself be told to come back: a busy machine's broker may need more time."""
        key = {"Idempotency-Key": f"device-{time.monotonic_ns()}"}
        answers: list[requests.Response] = []

        def is_answered() -> bool:
            answers.append(self.call("POST", "/register", PLAIN | fields, headers=key))
            return answers[-1].status_code != 503

        wait_until(is_answered)
        assert answers[-1].status_code == 201, answers[-1].text
        registered: dict[str, Any] = answers[-1].json()
        return registered

    def ask(self, method: str, path: str, body: Any = None) -> requests.Response:
        """Make a request that a fault may make fail: with 503, a time to come back, and soon."""
        started = time.monotonic()
        answer = self.session.request(method, self.url + path, json=body, timeout=2 * BOUND)
        assert time.monotonic() - started < BOUND
        assert answer.status_code < 500 or answer.status_code == 503, answer.text
        if answer.status_code == 503 and path != "/readyz":
            assert int(answer.headers["Retry-After"]) > 0
        self.statuses.append(answer.status_code)
        return answer

    def revoke(self, device: dict[str, Any]) -> requests.Response:
        return self.ask("POST", f"/revoke/{device['device_id']}")

    def revoke_until_enforced(self, device: dict[str, Any]) -> None:
        """Revoke it, and ask again until the broker is known to refuse it: a busy machine's may need more time."""
        wait_until(lambda: self.revoke(device).json()["broker"] == "enforced")

    def is_accepted(self, device: dict[str, Any]) -> bool:
        key, ca = self.folder / f"{device['name']}.key", self.operator["PORTAL_CA"]
        return refusal_of(ca, device["chain"], key, device["device_id"], self.mqtt_port, self.folder) == ""

    def problems(self) -> list[str]:
        """The checks of /readyz that fail."""
        return [check["name"] for check in self.ask("GET", "/readyz").json()["checks"] if not check["ok"]]

    def files_are_good(self) -> None:
        """Whatever the broker would read now is whole and current."""
        broker = self.data / "broker"
        assert read_crl(broker, self.data / "ca.pem")[1] == ""
        read_position(broker / "guard.journal", whole=True)

    ahead = timedelta(0)  # of the real clock

    def is_well(self) -> bool:
        problem = read_crl(self.data / "broker", self.data / "ca.pem", ahead=self.ahead)[1]
        with contextlib.suppress(requests.ConnectionError):
            return not problem and self.ask("GET", "/readyz").status_code == 200
        return False

    def recovers(
        self, *, revoked: list[dict[str, Any]] | None = None, active: list[dict[str, Any]] | None = None
    ) -> None:
        """Wait until the portal is ready with nobody's help, then see that every answer still holds."""
        wait_until(lambda: self.ask("GET", "/readyz").status_code == 200, 30)
        self.files_are_good()
        for device in revoked or []:
            assert self.ask("GET", f"/devices/{device['device_id']}").json()["status"] == "revoked"
            assert not self.is_accepted(device)
        for device in active or []:
            assert self.ask("GET", f"/devices/{device['device_id']}").json()["status"] == "active"
            assert self.is_accepted(device)
        assert self.is_accepted(self.device())


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    with Faulty() as running:
        yield running


@pytest.fixture
def pair(faulty: Faulty) -> tuple[dict[str, Any], dict[str, Any]]:
    """One device to be revoked, one to stay."""
    return faulty.device(), faulty.device()


# --- The disk -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk_below(faulty: Faulty, folder: Path) -> Iterator[Path]:
    """A running deployment continues with one of its folders on a disk of 48 MB of its own."""
    faulty.stop_portal()
    faulty.stop_broker()
    before = folder.with_name(f"{folder.name}-before")
    folder.rename(before)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], check=True)
    try:
        subprocess.run(["cp", "-a", f"{before}/.", str(folder)], check=True)
        faulty.start_broker()
        faulty.start_portal()
        faulty.wait_ready()
        yield folder
    finally:
        faulty.stop_portal()
        faulty.stop_broker()
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """No room left on a disk for the body of the ``with``."""
    ballast = folder / "ballast"
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(descriptor, bytes(4096))
    os.close(descriptor)
    try:
        yield
    finally:
        ballast.unlink()


def test_a_full_disk() -> None:
    faulty = Faulty()
    with faulty, small_disk_below(faulty, faulty.data):
        revoked, kept = faulty.device(), faulty.device()
        with full(faulty.data):
            statuses = {faulty.ask("POST", "/register", PLAIN).status_code for _ in range(20)}
            assert 503 in statuses
            answer = faulty.revoke(revoked)
            faulty.files_are_good()
            assert faulty.ask("GET", f"/devices/{kept['device_id']}").status_code == 200
            assert faulty.ask("GET", "/readyz").status_code == 503
        if answer.status_code != 200:
            assert faulty.revoke(revoked).status_code == 200
        faulty.recovers(revoked=[revoked], active=[kept])


def test_a_broker_folder_that_became_read_only() -> None:
    faulty = Faulty()
    with faulty, small_disk_below(faulty, faulty.data / "broker") as disk:
        revoked, kept = faulty.device(), faulty.device()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        answer = faulty.revoke(revoked)
        assert (answer.status_code, answer.json()["broker"]) == (200, "pending")
        assert "Read-only file system" in answer.json()["broker_problem"]
        wait_until(lambda: "broker" in faulty.problems())  # at once in the worker that has tried
        faulty.files_are_good()
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        faulty.recovers(revoked=[revoked], active=[kept])


@contextlib.contextmanager
def injected(faulty: Faulty, what: str) -> Iterator[None]:
    """System calls of all of the portal's processes fail, by strace."""
    processes = [option for pid in group_members(faulty.processes[0].pid) for option in ("-p", str(pid))]
    command = ["strace", "-f", "-qq", "-o", str(faulty.folder / "strace"), "-e", f"inject={what}", *processes]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as strace:
        wait_until(lambda: all(is_traced(pid) for pid in group_members(faulty.processes[0].pid)))
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)
            strace.communicate()


def is_traced(pid: int) -> bool:
    statuses = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return all("TracerPid:\t0\n" not in status for status in statuses)


@pytest.mark.parametrize("call", ["fsync,fdatasync:error=EIO", "rename,renameat,renameat2:error=EIO"])
def test_a_disk_that_fails(faulty: Faulty, pair: tuple[dict[str, Any], dict[str, Any]], call: str) -> None:
    revoked, kept = pair
    with injected(faulty, call):
        registered = faulty.ask("POST", "/register", PLAIN)
        answer = faulty.revoke(revoked)
        faulty.files_are_good()
        if call.startswith("fsync"):  # the journal is appended to, which takes no rename
            assert registered.status_code == 503
            assert answer.status_code == 503 or answer.json()["broker"] == "pending"
    if answer.status_code != 200:
        assert faulty.revoke(revoked).status_code == 200
    faulty.recovers(revoked=[revoked], active=[kept])


# --- The broker ---------------------------------------------------------------------------------------------------


def test_a_broker_that_was_killed(faulty: Faulty, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    revoked, kept = pair
    assert faulty.broker is not None
    os.kill(faulty.broker.pid, signal.SIGKILL)
    faulty.broker.stop()
    assert faulty.revoke(revoked).json()["broker"] == "pending"
    assert faulty.problems() == ["broker"]
    faulty.start_broker()
    faulty.recovers(revoked=[revoked], active=[kept])


def test_a_broker_that_was_stopped(faulty: Faulty, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    revoked, kept = pair
    assert faulty.broker is not None
    os.kill(faulty.broker.pid, signal.SIGSTOP)
    try:
        assert faulty.revoke(revoked).json()["broker"] == "pending"
        assert faulty.problems() == ["broker"]
    finally:
        os.kill(faulty.broker.pid, signal.SIGCONT)
    faulty.recovers(revoked=[revoked], active=[kept])


def test_a_broker_that_is_slow(faulty: Faulty, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    revoked, kept = pair
    assert faulty.broker is not None
    pid, over = faulty.broker.pid, threading.Event()

    def hold_up() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            over.wait(0.09)
            os.kill(pid, signal.SIGCONT)
            over.wait(0.01)

    thread = threading.Thread(target=hold_up)
    thread.start()
    try:
        answer = faulty.revoke(revoked).json()
    finally:
        over.set()
        thread.join()
    if answer["broker"] == "enforced":
        assert not faulty.is_accepted(revoked)
    faulty.recovers(revoked=[revoked], active=[kept])


def test_a_broker_whose_socket_is_gone(faulty: Faulty, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    revoked, kept = pair
    (faulty.data / "broker" / "portal.sock").unlink()
    assert faulty.revoke(revoked).json()["broker"] == "pending"
    assert faulty.problems() == ["broker"]
    faulty.stop_broker()
    faulty.start_broker()
    faulty.recovers(revoked=[revoked], active=[kept])


# --- The database -------------------------------------------------------------------------------------------------


def test_a_database_that_another_process_keeps_locked(
    faulty: Faulty, pair: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    revoked, kept = pair
    seconds = float(os.environ.get("FAULT_SECONDS", "8" if ALL else "3"))
    other = sqlite3.connect(faulty.data / "portal.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    over, threads, until = threading.Event(), [], time.monotonic() + seconds

    def go_on() -> None:
        while not over.is_set():
            faulty.ask("POST", "/register", PLAIN)

    for _ in range(20):  # more than the portal has threads: none of it may hang for the others' sake
        threads.append(threading.Thread(target=go_on))
        threads[-1].start()
    while time.monotonic() < until:
        assert faulty.ask("GET", f"/devices/{kept['device_id']}").status_code == 200
        answer = faulty.revoke(revoked)
        assert answer.status_code == 503
    over.set()
    other.execute("ROLLBACK")
    other.close()
    for thread in threads:
        thread.join()
    assert 503 in faulty.statuses
    faulty.revoke_until_enforced(revoked)
    faulty.recovers(revoked=[revoked], active=[kept])


@pytest.mark.long
def test_a_postgresql_that_crashes_under_load_and_comes_back() -> None:
    with Cluster() as cluster, Faulty(PORTAL_DATABASE_URL=cluster.url) as faulty:
        ledger = Ledger(faulty.folder, seed=3)
        check = Check(faulty, ledger, "guard")
        with Load(ledger, faulty, "guard"):
            for _ in range(3):
                enough = ledger.answers.total() + 30
                wait_until(lambda enough=enough: ledger.answers.total() >= enough)
                cluster.kill()
                assert faulty.problems()
                refused = count(ledger, "503") + 5
                wait_until(lambda refused=refused: count(ledger, "503") >= refused)
                cluster.start()
                wait_until(faulty.is_well)
        check.everything()
        assert ledger.said == []
        faulty.recovers()


def count(ledger: Ledger, status: str) -> int:
    """How many answers there were with a status."""
    return sum(times for answer, times in ledger.answers.items() if answer.endswith(status))


# --- The clock ----------------------------------------------------------------------------------------------------


class Timed(Faulty):
    """A deployment whose portal and broker go by a clock that the test moves (libfaketime)."""

    lasting_token = ""

    def __init__(self) -> None:
        super().__init__()
        self.fake = {
            "LD_PRELOAD": str(next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))),
            "FAKETIME_TIMESTAMP_FILE": str(self.folder / "clock"),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        # libfaketime 0.9.10 fails at the system call that time.sleep() is made of.
        (self.folder / "sitecustomize.py").write_text(
            "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
        )
        self.environment |= self.fake | {"PYTHONPATH": str(self.folder)}
        self.session.verify = False  # this process's own clock is not moved
        self.move(timedelta(days=-10))

    def make_data_folder(self) -> None:
        self.run_flask("init")  # at this clock: a copy would be of another time

    def move(self, ahead: timedelta) -> None:
        self.ahead = ahead
        (self.folder / "clock.new").write_text(f"{ahead.total_seconds():+.0f}")
        (self.folder / "clock.new").rename(self.folder / "clock")

    def is_well(self) -> bool:
        """As ever, and the jobs have seen that the clock was moved: what they try the broker with is valid now."""
        now = datetime.now(UTC) + self.ahead
        probes = [x509.load_pem_x509_certificate(path.read_bytes()) for path in (self.data / "canaries").glob("*.pem")]
        current = [one.not_valid_before_utc <= now < one.not_valid_after_utc for one in probes]
        return len(current) == 2 and all(current) and super().is_well()

    def start_portal(self, *, others: dict[str, str] | None = None) -> Process:
        process = super().start_portal(others=others)
        self.session.verify = self.ahead == timedelta(0) and self.operator["PORTAL_CA"]
        if not self.lasting_token:  # the first one is valid for a day
            self.lasting_token = self.call("POST", "/tokens", {"name": "tests", "role": "admin"}).json()["token"]
        self.session.headers["Authorization"] = f"Bearer {self.lasting_token}"
        return process

    def every_worker_shows_the_certificate_on_disk(self) -> bool:
        """Open so many connections at once that each worker has some, and compare what they show."""
        wanted = ssl.PEM_cert_to_DER_cert((self.data / "tls" / "server.pem").read_text().partition("-----END")[0]
                                          + "-----END CERTIFICATE-----\n")  # fmt: skip
        host, port = self.environment["PORTAL_BIND"].split(":")
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with contextlib.ExitStack() as stack:
            shown = set()
            for _ in range(8):
                plain = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
                secured = stack.enter_context(context.wrap_socket(plain))
                shown.add(secured.getpeercert(binary_form=True))
        return shown == {wanted}


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
@pytest.mark.parametrize(
    "ahead",
    [
        timedelta(days=370),
        pytest.param(timedelta(days=-2), marks=pytest.mark.long),
        pytest.param(timedelta(hours=-1), marks=pytest.mark.long),
    ],
    ids=["a year ahead", "two days back", "an hour back"],
)
def test_a_clock_that_is_moved_and_moved_back(ahead: timedelta) -> None:
    with Timed() as faulty:
        faulty.move(timedelta(0))  # as if it had been made ten days ago, and its CRL been over for three
        wait_until(faulty.is_well)
        revoked, other, kept = (faulty.device() for _ in range(3))
        bundle = faulty.register()
        faulty.revoke_until_enforced(revoked)
        faulty.move(ahead)
        wait_until(faulty.is_well)
        faulty.revoke_until_enforced(other)
        looked = faulty.session.head(bundle["download_url"], timeout=20).status_code
        assert looked == (410 if ahead > timedelta(0) else 200)
        faulty.move(timedelta(0))
        faulty.session.verify = faulty.operator["PORTAL_CA"]
        wait_until(faulty.is_well)  # with a certificate of its own, too, that is valid now
        wait_until(faulty.every_worker_shows_the_certificate_on_disk)
        fetched = faulty.session.get(bundle["download_url"], timeout=20)
        # Its link had expired: the jobs may have destroyed it meanwhile.
        destroyed = ahead > timedelta(0) and fetched.status_code == 410 and fetched.json()["code"] == "link_expired"
        assert destroyed or fetched.content.startswith(b"PK")
        faulty.recovers(revoked=[revoked, other], active=[kept])


# --- Another portal on the same folder, stopped -------------------------------------------------------------------


@pytest.mark.parametrize("held", ["revoke.before_commit", "apply.after_install"])
def test_a_portal_that_was_stopped_while_it_holds_a_lock_holds_no_other_up(
    faulty: Faulty, pair: tuple[dict[str, Any], dict[str, Any]], held: str
) -> None:
    """``revoke.before_commit`` is reached with the write lock held, ``apply.after_install`` during a reconciliation."""
    revoked, kept = pair
    mine = {"PORTAL_BIND": f"127.0.0.1:{free_port()}", "PORTAL_PKI_BIND": f"127.0.0.1:{free_port()}"}
    sleeps = {"PORTAL_FAILPOINT": f"revoke.after_commit>{held}=sleep:600"}
    if held.startswith("revoke"):
        sleeps = {"PORTAL_FAILPOINT": f"{held}=sleep:600"}
    other = faulty.start_portal(others=mine | sleeps)

    def revoke_there() -> None:
        with contextlib.suppress(requests.RequestException):
            faulty.session.post(f"https://{mine['PORTAL_BIND']}/revoke/{revoked['device_id']}", timeout=60)

    stuck = threading.Thread(target=revoke_there)
    faulty.wait_ready()
    stuck.start()
    lock = faulty.data / (".write.lock" if held == "revoke.before_commit" else ".pass.lock")
    wait_until(lambda: all(is_held(lock, other.pid) for _ in range(50)))  # held for good, not in passing
    for pid in group_members(other.pid):
        os.kill(pid, signal.SIGSTOP)
    registered = faulty.ask("POST", "/register", PLAIN)
    answer = faulty.revoke(revoked)
    if held == "revoke.before_commit":
        assert (registered.status_code, answer.status_code) == (503, 503)
    else:
        assert registered.status_code == 201
        assert answer.json()["broker"] == "pending"
        assert "another process of the portal holds it" in answer.json()["broker_problem"]
        assert "broker" in faulty.problems()
    os.killpg(other.pid, signal.SIGKILL)
    stuck.join()
    faulty.revoke_until_enforced(revoked)
    faulty.recovers(revoked=[revoked], active=[kept])


def is_held(lock: Path, group: int) -> bool:
    """Whether a process of the group holds a lock."""
    members = {str(pid) for pid in group_members(group)}
    held = [line.split() for line in Path("/proc/locks").read_text().splitlines() if " FLOCK " in line]
    return any(fields[4] in members and int(fields[5].split(":")[2]) == lock.stat().st_ino for fields in held)
