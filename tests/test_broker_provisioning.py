"""The broker's files: what is put in its reach, what is refused, what is noticed afterwards."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from broker import process
from broker.ca_certificates import ca_certificate
from broker.control import RestartReason
from broker.crl import Trust, validate_crl
from broker.files.acl import Acl
from broker.files.control import BrokerFiles, FilesControl, Projection
from broker.folder import broker_group
from broker.probe import ProbeCertificate, ProbeCertificates, Resumption
from broker.process import run_command, signal_broker
from broker.session import MAX_INCOMING_BYTES, Session
from broker_provisioning import BrokerProvisioning, add_device_acl
from config import Settings
from core.errors import BrokerUnavailable, ProjectionInvalid, SettingInvalid
from tests.support.mosquitto import mosquitto_program, short_folder
from tests.support.pki import PEM, Authority, Pki, key_pem

DEVICE = "3f2b8c1e-9d4a-4e6b-8a57-1c0d2e3f4a5b"
NAMES = ("acl", "crl.pem", "ca.pem", "projection.json")


@dataclass
class Place:
    """A broker folder without a broker."""

    settings: Settings
    broker: BrokerProvisioning
    pki: Pki
    now: datetime

    def projection(self, generation: int, crl: bytes | None = None) -> Projection:
        acl = Acl(self.settings.acl_style, self.settings.topic_prefix)
        add_device_acl(acl, DEVICE, None)
        return Projection(generation, acl.render(generation), Trust(crl or self.pki.issuing.crl(), self.pki.ca_bundle))

    @property
    def written(self) -> BrokerFiles:
        assert isinstance(self.broker.files, BrokerFiles)
        return self.broker.files

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.settings.broker_dir.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = short_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def place(folder: Path, pki: Pki) -> Place:
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(folder), "PORTAL_ACL_STYLE": "per-device"})
    made = Place(settings, BrokerProvisioning(settings, lambda: made.now), pki, datetime.now(UTC))
    return made


def soon(seconds: float = 5) -> float:
    return time.monotonic() + seconds


# --- Installing ---------------------------------------------------------------------------------------------------


def test_a_projection_is_installed_with_its_record(place: Place) -> None:
    projection = place.projection(3)
    place.written.install(projection)
    files = place.files()
    assert projection.trust == Trust(files["crl.pem"], files["ca.pem"])
    assert files["acl"] == projection.acl
    assert json.loads(files["projection.json"])["generation"] == 3
    assert place.written.installed_generation() == 3
    assert place.written.damage() == []


def test_files_are_for_the_broker_and_nobody_else(place: Place) -> None:
    place.written.install(place.projection(1))
    for path in place.settings.broker_dir.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path
    assert stat.S_IMODE(place.settings.broker_dir.stat().st_mode) & 0o007 == 0
    secret = place.settings.secrets_dir / "broker-password"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert secret.read_bytes() not in b"".join(place.files().values())


def test_a_folder_that_the_broker_could_not_write_in_is_opened_to_its_group(place: Place) -> None:
    place.settings.broker_dir.mkdir(mode=0o750)
    place.written.install(place.projection(1))
    group_may_write = bool(place.settings.broker_dir.stat().st_mode & stat.S_IWGRP)
    assert group_may_write == (broker_group(place.settings) is not None)


def test_only_what_changed_is_written(place: Place) -> None:
    crl = place.pki.issuing.crl()
    place.written.install(place.projection(1, crl))
    before = {name: (place.settings.broker_dir / name).stat().st_ino for name in NAMES}
    place.written.install(place.projection(2, crl))
    after = {name: (place.settings.broker_dir / name).stat().st_ino for name in NAMES}
    assert {name for name in NAMES if before[name] != after[name]} == {"acl", "projection.json"}


def test_an_older_generation_never_replaces_a_newer_one_by_itself(place: Place) -> None:
    place.written.install(place.projection(5))
    with pytest.raises(ProjectionInvalid, match="generation 5, newer than 4"):
        place.written.install(place.projection(4))
    place.written.install(place.projection(5))
    place.written.install(place.projection(4), even_older=True)
    assert place.written.installed_generation() == 4


def _other_ca(place: Place) -> bytes:
    return Authority("Another CA").crl()


def _forged(place: Place) -> bytes:
    return place.pki.issuing.crl(signed_by=Authority("Another CA"))


def _expired(place: Place) -> bytes:
    return place.pki.issuing.crl(
        this_update=place.now - timedelta(days=2), next_update=place.now - timedelta(seconds=1)
    )


def _not_yet_valid(place: Place) -> bytes:
    return place.pki.issuing.crl(this_update=place.now + timedelta(minutes=5))


BAD_CRLS: dict[str, Callable[[Place], bytes]] = {
    "empty": lambda place: b"\n",
    "truncated": lambda place: place.pki.issuing.crl()[:-40],
    "malformed": lambda place: place.pki.issuing.crl().replace(b"CRL-----\nM", b"CRL-----\nA", 1),
    "a damaged block after a good one": lambda place: (
        place.pki.issuing.crl() + b"-----BEGIN X509 CRL-----\nMIIB\n-----END X509 CRL-----\n"
    ),
    "text after it": lambda place: place.pki.issuing.crl() + b"x",
    "a certificate": lambda place: place.pki.ca_bundle,
    "twice": lambda place: place.pki.issuing.crl() * 2,
    "of another CA": _other_ca,
    "of another CA as well": lambda place: place.pki.issuing.crl() + _other_ca(place),
    "signed by another key": _forged,
    "expired": _expired,
    "not yet valid": _not_yet_valid,
    "of the root only": lambda place: place.pki.root.crl(),
    "delta": lambda place: place.pki.issuing.crl(delta=True),
}


@pytest.mark.parametrize("kind", BAD_CRLS)
def test_a_bad_crl_is_refused_with_the_old_files_intact(place: Place, kind: str) -> None:
    place.written.install(place.projection(1))
    before = place.files()
    with pytest.raises(ProjectionInvalid):
        place.written.install(place.projection(2, BAD_CRLS[kind](place)))
    assert place.files() == before
    assert place.written.installed_generation() == 1
    assert place.written.damage() == []


def test_every_issuing_ca_needs_a_crl_of_its_own(place: Place) -> None:
    second = Authority("Second issuing", issuer=place.pki.root)
    bundle = place.pki.ca_bundle + second.certificate.public_bytes(PEM)
    crl = place.pki.issuing.crl()
    one = replace(place.projection(1), trust=Trust(crl, bundle))
    with pytest.raises(ProjectionInvalid, match="no CRL of CN=Second issuing"):
        place.written.install(one)
    place.written.install(replace(one, trust=Trust(crl + second.crl(), bundle)))
    assert place.written.damage() == []


def test_two_keys_under_one_name_are_two_issuing_cas(place: Place) -> None:
    twin = Authority(place.pki.issuing.common_name, issuer=place.pki.root)
    issuers = [ca_certificate(one.certificate) for one in (place.pki.issuing, twin)]
    with pytest.raises(ProjectionInvalid, match="no CRL of"):
        validate_crl(place.pki.issuing.crl(), issuers, place.now)
    validate_crl(twin.crl() + place.pki.issuing.crl(), issuers, place.now)


def test_the_window_of_several_crls_is_the_one_they_share(place: Place) -> None:
    second = Authority("Second issuing", issuer=place.pki.root)
    start, end = place.now.replace(microsecond=0) - timedelta(seconds=5), place.now.replace(microsecond=0)
    window = validate_crl(
        place.pki.issuing.crl(this_update=start, next_update=end + timedelta(days=3))
        + second.crl(this_update=start - timedelta(days=1), next_update=end + timedelta(days=1)),
        [ca_certificate(one.certificate) for one in (place.pki.issuing, second)],
        place.now,
    )
    assert (window.this_update, window.next_update) == (start, end + timedelta(days=1))


@pytest.mark.parametrize("kind", ["empty", "malformed", "device certificate", "no root"])
def test_a_bad_ca_file_is_refused(place: Place, kind: str) -> None:
    bad = {
        "empty": b"",
        "malformed": place.pki.ca_bundle + b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "device certificate": place.pki.ca_bundle + place.pki.issuing.issue("x").certificate.public_bytes(PEM),
        "no root": place.pki.issuing.certificate.public_bytes(PEM),
    }[kind]
    with pytest.raises(ProjectionInvalid):
        place.written.install(replace(place.projection(1), trust=Trust(place.pki.issuing.crl(), bad)))
    assert not place.settings.broker_dir.exists()


def test_an_acl_of_another_generation_is_refused(place: Place) -> None:
    with pytest.raises(ProjectionInvalid, match="not of generation 1 or an older one"):
        place.written.install(replace(place.projection(2), generation=1))


def test_a_folder_that_cannot_be_made_is_said_with_its_path(place: Place) -> None:
    place.settings.broker_dir.write_text("a file where the folder should be")
    with pytest.raises(BrokerUnavailable, match=str(place.settings.broker_dir)):
        place.written.install(place.projection(1))


def test_a_read_only_folder_is_said_with_its_path(folder: Path, pki: Pki) -> None:
    # A file system that is read-only even for root: the process table's.
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(folder), "PORTAL_BROKER_DIR": "/proc/self"})
    place = Place(settings, BrokerProvisioning(settings), pki, datetime.now(UTC))
    with pytest.raises(BrokerUnavailable, match=r"/proc/self.* cannot be written"):
        place.written.install(place.projection(1))


def test_a_write_that_fails_midway_changes_no_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.written.install(place.projection(1))
    before = place.files()
    write, calls = os.write, iter([True, False])

    def disk_full_at_the_second(descriptor: int, data: bytes) -> int:
        if next(calls):
            return write(descriptor, data)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("core.files.os.write", disk_full_at_the_second)
    with pytest.raises(BrokerUnavailable, match="No space left on device"):
        place.written.install(place.projection(2))
    monkeypatch.undo()
    assert place.files() == before


def test_an_unknown_group_is_said_at_start(folder: Path) -> None:
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(folder), "PORTAL_BROKER_GROUP": "no-such-group"})
    with pytest.raises(SettingInvalid, match="no-such-group"):
        BrokerProvisioning(settings)


# --- Damage -------------------------------------------------------------------------------------------------------


def _overwrite(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def _same_size_and_time(path: Path) -> None:
    status = path.stat()
    _overwrite(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _link(path: Path) -> None:
    moved = path.rename(path.with_name("moved"))
    path.symlink_to(moved)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "changed": _overwrite,
    "changed with its size and time kept": _same_size_and_time,
    "closed to the broker": lambda path: path.chmod(0o600),
    "open to everybody": lambda path: path.chmod(0o644),
    "a link": _link,
}


@pytest.mark.parametrize("name", ["acl", "crl.pem", "ca.pem", "passwords"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_seen_and_repaired_by_installing_again(place: Place, name: str, kind: str) -> None:
    projection = place.projection(1)
    place.written.install(projection)
    assert place.written.damage() == []
    path = place.settings.broker_dir / name
    DAMAGE[kind](path)
    problems = place.written.damage()
    assert len(problems) == 1
    assert str(path) in problems[0]
    place.written.install(projection)
    assert place.written.damage() == []


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"generation": "1", "sha256": {}}', b"\xff"])
def test_a_damaged_record_is_damage(place: Place, content: bytes | None) -> None:
    place.written.install(place.projection(1))
    record = place.settings.broker_dir / "projection.json"
    if content is None:
        record.unlink()
    else:
        record.write_bytes(content)
    assert place.written.installed_generation() is None
    assert place.written.damage() == [f"{record} is missing or unreadable."]


def test_a_crl_that_expires_where_it_lies_is_damage(place: Place) -> None:
    place.written.install(place.projection(1))
    place.now += timedelta(days=8)
    (problem,) = place.written.damage()
    assert "crl.pem expired at" in problem
    place.now -= timedelta(days=16)
    (problem,) = place.written.damage()
    assert "crl.pem is not valid before" in problem


def test_an_unchanged_file_is_not_read_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.written.install(place.projection(1))
    assert place.written.damage() == []
    monkeypatch.setattr("broker.folder.hashlib.sha256", lambda content: pytest.fail("read again"))
    assert place.written.damage() == []


# --- Password, server certificate ---------------------------------------------------------------------------------


def test_the_password_is_made_once_and_kept(place: Place) -> None:
    password = place.written.password()
    assert len(password) == 43
    assert BrokerProvisioning(place.settings).files.password() == password


def test_several_threads_at_first_use_get_one_password(place: Place) -> None:
    passwords: list[str] = []
    brokers = [BrokerProvisioning(place.settings) for _ in range(8)]
    threads = [threading.Thread(target=lambda b=b: passwords.append(b.files.password())) for b in brokers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passwords) == 8
    assert len(set(passwords)) == 1


def test_the_password_file_is_as_mosquitto_passwd_writes_it(place: Place) -> None:
    place.written.write_password_file("correct horse")
    line = (place.settings.broker_dir / "passwords").read_text().strip()
    name, line = line.split(":")
    empty, kind, iterations, salt, digest = line.split("$")
    assert (name, empty, kind) == ("portal", "", "7")
    # OpenSSL derives the same; that Mosquitto reads it is for the tests with a broker.
    derived = subprocess.run(
        ["openssl", "kdf", "-keylen", "64", "-kdfopt", "digest:SHA512", "-kdfopt", "pass:correct horse",
         "-kdfopt", f"hexsalt:{base64.b64decode(salt).hex()}", "-kdfopt", f"iter:{iterations}", "-binary", "PBKDF2"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert base64.b64decode(digest) == derived


def test_a_server_certificate_is_written_once_with_its_key(place: Place) -> None:
    server = place.pki.issuing.issue("localhost", server_names=["localhost"])
    chain = server.certificate.public_bytes(PEM) + place.pki.issuing.certificate.public_bytes(PEM)
    assert place.written.write_server_certificate(chain, key_pem(server.key))
    assert not place.written.write_server_certificate(chain, key_pem(server.key))
    assert stat.S_IMODE((place.settings.broker_dir / "server.key").stat().st_mode) == 0o640


def test_a_server_certificate_with_another_key_is_refused(place: Place) -> None:
    one, two = (place.pki.issuing.issue("localhost", server_names=["localhost"]) for _ in range(2))
    for key in (key_pem(two.key), b"no key"):
        with pytest.raises(ProjectionInvalid):
            place.written.write_server_certificate(one.certificate.public_bytes(PEM), key)


# --- Signals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that SIGHUP would end."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_pid_file_of_another_process_is_never_signalled(folder: Path, bystander: subprocess.Popen[bytes]) -> None:
    pid_file = folder / "pid"
    pid_file.write_text(f"{bystander.pid}\n")
    with pytest.raises(BrokerUnavailable, match="is not Mosquitto"):
        signal_broker(pid_file, bystander.pid)
    with pytest.raises(BrokerUnavailable, match="answers on the broker's internal listener"):
        signal_broker(pid_file, os.getpid())
    bystander.send_signal(signal.SIGTERM)
    assert bystander.wait(5) == -signal.SIGTERM


@pytest.mark.parametrize("content", ["", "x", "0", "-1", "99999999999", "1 2", str(2**22 + 5)])
def test_a_pid_file_that_names_no_process_is_said(folder: Path, content: str) -> None:
    pid_file = folder / "pid"
    pid_file.write_text(content)
    with pytest.raises(BrokerUnavailable, match="start the broker"):
        signal_broker(pid_file, 2**22 + 5)


@pytest.mark.parametrize(
    ("named", "visible", "inside"),
    [
        pytest.param(1, True, 1, id="process 1 of a container"),
        pytest.param(7, True, 7, id="another process of a container"),
        pytest.param(7, False, 0, id="the portal is in a container, the broker is not"),
    ],
)
def test_a_broker_in_a_pid_namespace_of_its_own_is_not_signalled_but_told(
    folder: Path,
    bystander: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    named: int,
    visible: bool,
    inside: int,
) -> None:
    monkeypatch.setattr(process, "_inner_pid", lambda pid: inside if pid == bystander.pid else 0)
    (folder / "pid").write_text(f"{named}\n")
    with pytest.raises(BrokerUnavailable, match=r"PID namespace of its own.*PORTAL_BROKER_RELOAD"):
        signal_broker(folder / "pid", bystander.pid if visible else 0)


def test_a_missing_pid_file_is_said(folder: Path) -> None:
    with pytest.raises(BrokerUnavailable, match="cannot be read"):
        signal_broker(folder / "none", 0)


def test_a_reload_command_is_run_without_a_shell(folder: Path) -> None:
    run_command("PORTAL_BROKER_RELOAD", f"touch '{folder}/a b;c'", soon())
    assert (folder / "a b;c").exists()


@pytest.mark.parametrize("command", ["false", "/no/such/program", "unbalanced '", "sleep 60"])
def test_a_reload_command_that_fails_is_said(command: str) -> None:
    with pytest.raises(BrokerUnavailable, match="PORTAL_BROKER_RELOAD"):
        run_command("PORTAL_BROKER_RELOAD", command, soon(0.2))


# --- What waits for a restart ---------------------------------------------------------------------------------------


class Starts:
    """A broker that has its ACL, and that can be started again."""

    def __init__(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        self.socket = place.settings.broker_socket
        self.control = FilesControl(place.settings, lambda: place.now)
        self.control.files.install(place.projection(1))
        monkeypatch.setattr(FilesControl, "_ask", lambda *_: None)
        monkeypatch.setattr("broker.files.control.connect_unix", lambda *_: None)
        monkeypatch.setattr("broker.files.control.Session", lambda *_: contextlib.nullcontext())
        self.at = time.time() - 1000
        self.again()

    def again(self) -> None:
        self.at += 100
        self.socket.touch()
        os.utime(self.socket, (self.at, self.at))

    def is_pending(self, generation: int, how: Resumption) -> bool:
        try:
            self.control.check_resumption(generation, lambda: how)
        except BrokerUnavailable:
            assert self.control.waits(soon()) is RestartReason.SESSIONS
            return True
        assert self.control.waits(soon()) is None
        return False


def test_sessions_that_can_be_resumed_keep_a_revocation_pending_until_a_restart(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Starts(place, monkeypatch)
    assert not broker.is_pending(1, Resumption.NONE)
    broker.again()
    assert broker.is_pending(2, Resumption.TICKETS)
    assert broker.is_pending(2, Resumption.TICKETS)
    place.written.install(place.projection(3))  # the record keeps it
    broker.at = time.time() + 1
    broker.again()
    assert not broker.is_pending(2, Resumption.TICKETS)


@pytest.mark.parametrize(("how", "ends"), [(Resumption.SESSION_IDS, True), (Resumption.TICKETS, False)])
def test_session_ids_end_by_themselves_after_two_hours_and_tickets_do_not(
    place: Place, monkeypatch: pytest.MonkeyPatch, how: Resumption, ends: bool
) -> None:
    broker = Starts(place, monkeypatch)
    assert broker.is_pending(2, how)
    now = time.time()
    monkeypatch.setattr("broker.files.control.time.time", lambda: now + 7201)
    assert broker.is_pending(2, how) is not ends


def test_crls_that_take_much_memory_wait_for_a_restart(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Starts(place, monkeypatch)
    monkeypatch.setattr("broker.files.control._MAX_CRL_BYTES", 1500)
    waits = []
    for generation in range(2, 8):
        broker.control.files.install(place.projection(generation))
        waits.append(broker.control.waits(soon()))
    assert waits[0] is None
    assert waits[-1] is RestartReason.CRLS
    broker.again()
    assert broker.control.waits(soon()) is None


# --- A broker that is not there, or not one -----------------------------------------------------------------------


def test_no_broker_is_said_at_once(place: Place) -> None:
    place.written.install(place.projection(1))
    assert not place.broker.reachable()
    folder, issuing = place.settings.data_dir, place.pki.issuing
    good, revoked = (ProbeCertificate(*issuing.issue("c").write(folder, name)) for name in "gb")
    probe_certificates = ProbeCertificates(good, revoked)
    for call in (
        lambda: place.broker.enforce(1, soon()),
        lambda: place.broker.disconnect([DEVICE], soon()),
    ):
        with pytest.raises(BrokerUnavailable, match=r"portal\.sock"):
            call()
    with pytest.raises(BrokerUnavailable, match="does not answer at localhost"):
        place.broker.probe(probe_certificates, soon())


def test_only_device_ids_are_cut(place: Place) -> None:
    with pytest.raises(ValueError, match="UUID"):
        place.broker.disconnect(["portal"], soon())


def test_a_broker_that_has_not_answered_yet_is_not_signalled(place: Place) -> None:
    """One that still starts would die of it: so no CONNACK, no signal."""
    place.written.install(place.projection(1))
    program = shutil.copy(shutil.which("sleep") or "sleep", place.settings.data_dir / "mosquitto")
    with (
        subprocess.Popen([program, "60"]) as starting,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        try:
            place.settings.broker_pid_file.write_text(str(starting.pid))
            listener.bind(str(place.settings.broker_socket))
            listener.listen()
            with pytest.raises(BrokerUnavailable, match=r"no answer in time|timed out"):
                place.broker.enforce(1, soon(0.2))
            signal_broker(place.settings.broker_pid_file, starting.pid)
            assert starting.wait(5) == -signal.SIGHUP  # the first signal that it got
        finally:
            starting.kill()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x20",
        b"\x20\x01\x00",
        b"\x20\xff\xff\xff\xff\x01",
        b"\x20\xff\xff\x7f" + b"x" * MAX_INCOMING_BYTES,
        b"\x40\x02\x00\x01",
        b"\xe0\x01\x8b",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_what_is_no_connack_is_an_error_and_never_a_hang(answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs, Session(ours, soon(2)) as session:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError):
            session.connect("x")


def test_a_silent_peer_costs_no_more_than_the_deadline() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Session(ours, soon(0.05)) as session, pytest.raises(TimeoutError):
        session.connect("x")


def test_the_client_speaks_mqtt_5() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Session(ours, soon()) as session:
        theirs.sendall(b"\x20\x03\x00\x00\x00" + b"\x40\x03\x00\x01\x87" + b"\x40\x02\x00\x02")
        assert session.connect("id", "user", "pass") == 0
        assert session.publish("a/b", b"hi") == 0x87
        assert session.publish("a/b") == 0
        session.close()
        sent = b"".join(iter(lambda: theirs.recv(4096), b""))
    assert sent == (
        b"\x10\x1b\x00\x04MQTT\x05\xc2\x00\x3c\x00\x00\x02id\x00\x04user\x00\x04pass"
        b"\x32\x0a\x00\x03a/b\x00\x01\x00hi\x32\x08\x00\x03a/b\x00\x02\x00\xe0\x00"
    )


def test_the_broker_is_installed() -> None:
    assert shutil.which(mosquitto_program()), "scripts/test installs it"


def test_ten_thousand_devices_are_rendered_and_checked(place: Place) -> None:
    acl = Acl(place.settings.acl_style, place.settings.topic_prefix)
    for _ in range(10_000):
        add_device_acl(acl, str(uuid.uuid4()), None)
    place.written.install(Projection(1, acl.render(1), Trust(place.pki.issuing.crl(), place.pki.ca_bundle)))
    assert place.files()["acl"].count(b"\nuser ") == 10_001
