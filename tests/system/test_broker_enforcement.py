"""The real broker obeys: who may do what, which devices it disconnects and refuses, how a damaged file is noticed."""

from __future__ import annotations

import queue
import re
import shutil
import signal
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from broker.control import DeviceAccess, RestartReason
from broker.crl import Trust
from broker.files.control import BrokerFiles, may_reload
from broker.probe import ProbeCertificate, ProbeCertificates
from broker.session import Session, connect_unix
from broker_provisioning import BrokerProvisioning, add_device_acl, remove_device_acl
from config import Settings
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from core.topics import Access, Topic, default_topics
from tests.support.mosquitto import Mosquitto, StartFailed, short_folder
from tests.support.pki import PEM, Credentials, Pki, key_pem
from tests.support.ports import free_port

pytestmark = pytest.mark.system

STYLES = ("per-device", "pattern")
NOT_AUTHORISED = 0x87
DELIVERED = (0x00, 0x10)  # success; success with nobody subscribed
SECONDS = 10.0


def soon(seconds: float = SECONDS) -> float:
    return time.monotonic() + seconds


@dataclass
class Site:
    """A portal's broker files with a real broker beside them."""

    settings: Settings
    pki: Pki
    mosquitto: Mosquitto
    broker: BrokerProvisioning
    probe_certificates: ProbeCertificates
    revoked: list[Credentials]
    generation: int = 0
    known: dict[str, Credentials] = field(default_factory=dict)
    changes: list[Callable[[DeviceAccess], None]] = field(default_factory=list)

    @property
    def files(self) -> BrokerFiles:
        assert isinstance(self.broker.files, BrokerFiles)
        return self.broker.files

    @property
    def folder(self) -> Path:
        return self.settings.data_dir

    def admit(self, topics: Sequence[Topic] | None = None) -> str:
        device_id = str(uuid.uuid4())
        self.known[device_id] = self.pki.issuing.issue(device_id)
        self.known[device_id].write(self.folder, device_id)
        self.changes.append(lambda access: add_device_acl(access, device_id, topics))
        return device_id

    def revoke(self, device_id: str) -> None:
        self.changes.append(lambda access: remove_device_acl(access, device_id))
        self.revoked.append(self.known[device_id])

    def install(self) -> None:
        self.generation += 1
        draft = self.broker.draft()
        for change in self.changes:
            change(draft)
        self.changes.clear()
        assert draft.install(self.generation, Trust(self.pki.issuing.crl(*self.revoked), self.pki.ca_bundle))

    def apply(self) -> None:
        """Install, and restart the broker if something waits for that."""
        self.install()
        if self.waits() is not None:
            self.mosquitto.restart()
        assert self.waits() is None
        assert self.broker.enforce(self.generation, soon()) == self.generation

    def waits(self) -> RestartReason | None:
        return self.broker.control.waits(soon())

    def file(self, name: str) -> Path:
        return self.settings.broker_dir / name

    def mosquitto_pub(self, device_id: str, topic: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["mosquitto_pub", "-V", "mqttv5", "-h", "localhost", "-p", str(self.settings.mqtt_port), "-q", "1",
             "--cafile", self.file("ca.pem"), "--cert", self.folder / f"{device_id}.pem",
             "--key", self.folder / f"{device_id}.key", "-t", topic, "-m", "hello"],
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip

    def s_client(self, device_id: str) -> str:
        """What OpenSSL sees when a device that is refused connects with TLS alone."""
        with subprocess.Popen(
            ["openssl", "s_client", "-connect", f"localhost:{self.settings.mqtt_port}", "-CAfile", self.file("ca.pem"),
             "-cert", self.folder / f"{device_id}.pem", "-key", self.folder / f"{device_id}.key"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as client:  # fmt: skip
            assert client.stdout is not None
            assert client.stdin is not None
            lines = []
            for line in client.stdout:
                lines.append(line)
                if "SSL alert number" in line:
                    break
            client.kill()
        return "".join(lines)


class Device:
    """A device as an independent MQTT library plays it."""

    def __init__(self, site: Site, device_id: str, *, client_id: str | None = None, expiry: int = 0) -> None:
        self.messages: queue.Queue[tuple[str, bytes | bytearray]] = queue.Queue()
        self.cut = threading.Event()
        self._acknowledged: queue.Queue[int] = queue.Queue()
        self._connected: queue.Queue[int] = queue.Queue()
        self._subscribed = threading.Event()
        self._properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho has no types here
        self._properties.SessionExpiryInterval = expiry
        self.session_present = False
        self.client = client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id or device_id,
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
        )
        client.tls_set(
            str(site.file("ca.pem")), str(site.folder / f"{device_id}.pem"), str(site.folder / f"{device_id}.key")
        )
        client.on_connect = self._on_connect
        client.on_disconnect = lambda *_: self.cut.set()
        client.on_message = lambda _client, _data, message: self.messages.put((message.topic, message.payload))
        client.on_publish = lambda _client, _data, _id, reason, _properties: self._acknowledged.put(reason.value)
        client.on_subscribe = lambda *_: self._subscribed.set()
        self._port = site.settings.mqtt_port

    def _on_connect(
        self, _client: object, _data: object, flags: paho.ConnectFlags, reason: ReasonCode, _properties: object
    ) -> None:
        self.session_present = flags.session_present
        self._connected.put(reason.value)

    def connect(self, *, clean: bool = True) -> Device:
        self.client.connect("localhost", self._port, clean_start=clean, properties=self._properties)
        self.client.loop_start()
        assert self._connected.get(timeout=SECONDS) == 0
        return self

    def will(self, topic: str) -> None:
        self.client.will_set(topic, b"will", qos=1)

    def publish(self, topic: str, payload: bytes = b"hello", *, retain: bool = False) -> int:
        self.client.publish(topic, payload, qos=1, retain=retain)
        return self._acknowledged.get(timeout=SECONDS)

    def subscribe(self, filter_: str) -> None:
        self._subscribed.clear()
        self.client.subscribe(filter_, qos=1)
        assert self._subscribed.wait(SECONDS)

    def received(self) -> tuple[str, bytes | bytearray]:
        return self.messages.get(timeout=SECONDS)

    def close(self) -> None:
        with suppress(OSError, ssl.SSLError):
            self.client.disconnect()
        self.client.loop_stop()
        for name in ("connect", "disconnect", "message", "publish", "subscribe"):  # in no cycle it closes its sockets
            setattr(self.client, f"on_{name}", None)


@contextmanager
def connected(site: Site, device_id: str, *, client_id: str | None = None) -> Iterator[Device]:
    device = Device(site, device_id, client_id=client_id)
    try:
        yield device.connect()
    finally:
        device.close()


@contextmanager
def built(style: str) -> Iterator[Site]:
    folder, port = short_folder(), free_port()
    settings = Settings.from_env(
        {"PORTAL_DATA_DIR": str(folder), "PORTAL_MQTT_PORT": str(port), "PORTAL_ACL_STYLE": style}
    )
    pki = Pki()
    good, bad = pki.issuing.issue(str(uuid.uuid4())), pki.issuing.issue(str(uuid.uuid4()))
    broker = BrokerProvisioning(settings)
    site = Site(
        settings,
        pki,
        Mosquitto(settings.broker_dir, port),
        broker,
        ProbeCertificates(ProbeCertificate(*good.write(folder, "good")), ProbeCertificate(*bad.write(folder, "bad"))),
        [bad],
    )
    server = pki.issuing.issue("localhost", server_names=["localhost"])
    site.install()
    broker.files.write_server_certificate(
        server.certificate.public_bytes(PEM) + pki.issuing.certificate.public_bytes(PEM), key_pem(server.key)
    )
    try:
        yield site
    finally:
        site.mosquitto.stop()
        shutil.rmtree(folder)


@pytest.fixture(params=STYLES)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with built(request.param) as site, site.mosquitto:
        yield site


@pytest.fixture
def stopped() -> Iterator[Site]:
    """A site whose broker is not running."""
    with built("per-device") as site:
        yield site


@pytest.fixture
def strict() -> Iterator[Site]:
    """A running site with an allow-list."""
    with built("per-device") as site, site.mosquitto:
        yield site


# --- Who may do what ----------------------------------------------------------------------------------------------


def test_the_installed_configuration_starts_without_a_warning(site: Site) -> None:
    assert " running" in site.mosquitto.log
    start = site.mosquitto.log.partition(" running")[0]
    assert not re.search("warning|error|deprecated", start, re.IGNORECASE)


def test_a_device_reaches_its_own_topics_and_no_other(site: Site) -> None:
    one, two = site.admit(), site.admit()
    site.apply()
    with connected(site, one) as device, connected(site, two) as neighbour:
        device.subscribe(f"devices/{one}/#")
        device.subscribe("devices/#")
        device.subscribe("#")
        assert device.publish(f"devices/{one}/x") in DELIVERED
        for topic in (
            f"devices/{two}/x",
            "devices/x",
            "other",
            "devices/portal/x",
            f"portal/acl/{site.generation}",
            f"{one}",
            f"devices/{one}x/y",
        ):
            assert device.publish(topic) == NOT_AUTHORISED, topic
        assert neighbour.publish(f"devices/{two}/secret") in DELIVERED
        assert device.publish(f"devices/{one}/last", b"last") in DELIVERED
        seen = {device.received()[0]}
        while f"devices/{one}/last" not in seen:
            seen.add(device.received()[0])
        assert seen == {f"devices/{one}/x", f"devices/{one}/last"}


def test_topics_of_its_own_are_enforced(strict: Site) -> None:
    topics = (
        Topic("devices/{id}/telemetry", Access.WRITE),
        Topic("devices/{id}/living room/+", Access.READWRITE),
        Topic("devices/shared/announce", Access.READ),
    )
    narrow = strict.admit(topics)
    wide = strict.admit((*default_topics("devices"), Topic("devices/shared/announce", Access.WRITE)))
    strict.apply()
    with connected(strict, narrow) as device, connected(strict, wide) as announcer:
        device.subscribe("devices/#")
        assert device.publish(f"devices/{narrow}/telemetry") in DELIVERED
        assert device.publish(f"devices/{narrow}/living room/lamp") in DELIVERED
        assert device.publish(f"devices/{narrow}/living/lamp") == NOT_AUTHORISED
        assert device.publish(f"devices/{narrow}/other") == NOT_AUTHORISED
        assert device.publish("devices/shared/announce") == NOT_AUTHORISED
        assert announcer.publish("devices/shared/announce") in DELIVERED
        assert device.received()[0] == f"devices/{narrow}/living room/lamp"
        assert device.received()[0] == "devices/shared/announce"


def test_in_pattern_style_topics_of_its_own_add_to_the_pattern_and_narrower_ones_close() -> None:
    with built("pattern") as site, site.mosquitto:
        wide = site.admit((*default_topics("devices"), Topic("devices/shared/announce", Access.WRITE)))
        narrow = site.admit((Topic("devices/{id}/telemetry", Access.WRITE),))
        site.apply()
        assert list(site.broker.draft().closed) == [narrow]
        with connected(site, wide) as device, connected(site, narrow) as closed:
            assert device.publish(f"devices/{wide}/x") in DELIVERED
            assert device.publish("devices/shared/announce") in DELIVERED
            assert closed.publish(f"devices/{narrow}/telemetry") == NOT_AUTHORISED
            assert closed.publish(f"devices/{narrow}/x") == NOT_AUTHORISED


def test_a_device_cannot_take_another_ones_client_id(site: Site) -> None:
    one, two = site.admit(), site.admit()
    site.apply()
    with connected(site, one) as device, connected(site, two, client_id=one) as thief:
        assert thief.publish(f"devices/{one}/x") == NOT_AUTHORISED
        assert device.publish(f"devices/{one}/x") in DELIVERED
        assert not device.cut.is_set()


def test_the_internal_user_may_write_its_generation_and_nothing_else(site: Site) -> None:
    site.apply()
    with Session(connect_unix(site.settings.broker_socket, soon()), soon()) as session:
        assert session.connect("x", "portal", site.broker.files.password()) == 0
        number = site.files.acl_number()
        assert session.publish(f"portal/acl/{number}") in DELIVERED
        for topic in (f"portal/acl/{number + 1}", "portal/refused", "devices/portal/x", "x"):
            assert session.publish(topic) == NOT_AUTHORISED


@pytest.mark.parametrize(("user", "password"), [("portal", "wrong"), ("", ""), ("nobody", "x")])
def test_the_internal_listener_needs_the_password(strict: Site, user: str, password: str) -> None:
    with Session(connect_unix(strict.settings.broker_socket, soon()), soon()) as session:
        assert session.connect("x", user, password) == NOT_AUTHORISED


# --- Putting a device out -----------------------------------------------------------------------------------------


def test_a_revoked_device_is_cut_and_refused_while_nothing_is_reloaded(site: Site) -> None:
    shared = Topic("devices/shared/#", Access.READWRITE)
    topics = (*default_topics("devices"), shared)
    watcher_id, device_id, other_id = site.admit(topics), site.admit(topics), site.admit(topics)
    site.apply()
    with connected(site, watcher_id) as watcher:
        device = Device(site, device_id)
        device.will("devices/shared/will")
        device.connect()
        watcher.subscribe("devices/shared/#")
        assert device.publish("devices/shared/a", b"before") == 0
        assert watcher.received() == ("devices/shared/a", b"before")

        broker = site.mosquitto.pid
        site.revoke(device_id)
        site.apply()
        site.broker.disconnect([device_id], soon())
        assert device.cut.wait(SECONDS)
        device.close()
        result = site.broker.probe(site.probe_certificates, soon())
        assert (result.revoked_alert, result.good_reason) == (44, 0)

        # OpenSSL's and Mosquitto's own clients are refused; after the will, which the cut sends, nothing was delivered.
        assert "SSL alert number 44" in site.s_client(device_id)
        assert site.mosquitto_pub(device_id, f"devices/{device_id}/x").returncode != 0
        assert site.mosquitto_pub(other_id, "devices/shared/last").returncode == 0
        assert watcher.received() == ("devices/shared/will", b"will")
        assert watcher.received() == ("devices/shared/last", b"hello")
        assert watcher.messages.empty()
        assert not watcher.cut.is_set()
        assert site.mosquitto.pid == broker
        assert "Reloading config" not in site.mosquitto.log


def test_a_revoked_device_stays_refused_after_the_broker_is_restarted(site: Site) -> None:
    device_id, other_id = site.admit(), site.admit()
    site.apply()
    assert site.mosquitto_pub(device_id, f"devices/{device_id}/x").returncode == 0
    site.revoke(device_id)
    site.apply()
    site.mosquitto.restart()
    assert "SSL alert number 44" in site.s_client(device_id)
    assert site.mosquitto_pub(other_id, f"devices/{other_id}/x").returncode == 0
    assert site.broker.enforce(site.generation, soon()) == site.generation
    site.broker.probe(site.probe_certificates, soon())


def test_a_cut_discards_the_session_that_waits_for_the_device(strict: Site) -> None:
    device_id = strict.admit()
    strict.apply()
    device = Device(strict, device_id, expiry=3600).connect()
    device.close()
    device = Device(strict, device_id, expiry=3600).connect(clean=False)
    assert device.session_present
    device.close()
    strict.broker.disconnect([device_id], soon())
    device = Device(strict, device_id, expiry=3600).connect(clean=False)
    assert not device.session_present
    device.close()


def test_many_sessions_are_cut_at_once(strict: Site) -> None:
    ids = [strict.admit() for _ in range(20)]
    strict.apply()
    devices = [Device(strict, device_id).connect() for device_id in ids]
    try:
        strict.broker.disconnect([*ids, str(uuid.uuid4())], soon())
        assert all(device.cut.wait(SECONDS) for device in devices)
    finally:
        for device in devices:
            device.close()


def test_a_retained_message_of_a_revoked_device_is_not_delivered(strict: Site) -> None:
    shared = Topic("devices/shared/#", Access.READWRITE)
    sender_id, other_id, watcher_id = strict.admit([shared]), strict.admit([shared]), strict.admit([shared])
    strict.apply()
    with connected(strict, sender_id) as sender, connected(strict, other_id) as other:
        assert sender.publish("devices/shared/a", retain=True) in DELIVERED
        assert other.publish("devices/shared/b", retain=True) in DELIVERED
    strict.revoke(sender_id)
    strict.apply()
    strict.mosquitto.restart()  # until then its block is there
    with connected(strict, watcher_id) as watcher:
        watcher.subscribe("devices/shared/#")
        assert watcher.received()[0] == "devices/shared/b"
        assert watcher.messages.empty()


# --- Knowing that the broker obeys --------------------------------------------------------------------------------


def test_new_topics_wait_for_a_restart_and_nothing_is_reloaded(strict: Site) -> None:
    device_id = strict.admit()
    strict.install()
    assert strict.broker.enforce(strict.generation, soon()) == strict.generation
    assert strict.waits() is RestartReason.TOPICS
    with connected(strict, device_id) as device:
        assert device.publish(f"devices/{device_id}/x") == NOT_AUTHORISED
    assert "Reloading config" not in strict.mosquitto.log
    strict.mosquitto.restart()
    assert strict.waits() is None
    with connected(strict, device_id) as device:
        assert device.publish(f"devices/{device_id}/x") in DELIVERED


def test_nothing_waits_in_the_pattern_style_for_a_device_with_the_default_topics() -> None:
    with built("pattern") as site, site.mosquitto:
        device_id = site.admit()
        site.install()
        assert site.waits() is None
        with connected(site, device_id) as device:
            assert device.publish(f"devices/{device_id}/x") in DELIVERED


@pytest.fixture
def reloaded(strict: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose broker passes for one that a reload does no harm to."""
    monkeypatch.setattr("broker.files.control.may_reload", lambda version: True)
    strict.admit()
    return strict


def test_a_broker_that_a_reload_does_no_harm_to_is_told_to_read_new_topics(reloaded: Site) -> None:
    reloaded.install()
    assert reloaded.broker.enforce(reloaded.generation, soon()) == reloaded.generation
    assert reloaded.waits() is None
    reloaded.broker.enforce(reloaded.generation, soon())  # it has all, and is left alone
    reloaded.mosquitto.wait_for_log("Reloading config")
    assert reloaded.mosquitto.log.count("Reloading config") == 1


def test_a_reload_command_does_as_well_as_a_signal(reloaded: Site) -> None:
    settings = Settings.from_env(
        {
            "PORTAL_DATA_DIR": str(reloaded.folder),
            "PORTAL_BROKER_RELOAD": f"kill -HUP {reloaded.mosquitto.pid}",
            "PORTAL_BROKER_PID_FILE": "/nonexistent",
        }
    )
    reloaded.install()
    assert BrokerProvisioning(settings).enforce(reloaded.generation, soon()) == reloaded.generation


@pytest.mark.parametrize(
    ("version", "may"),
    [
        (b"mosquitto version 2.0.11", False),
        (b"mosquitto version 2.0.22", False),
        (b"mosquitto version 2.1.0", True),
        (b"mosquitto version 2.1.2-1", True),
        (b"mosquitto version 3.0.1", True),
        (b"another broker 2.1.0", False),
        (b"", False),
        (None, False),
    ],
)
def test_only_a_broker_that_says_it_is_2_1_is_reloaded(version: bytes | None, may: bool) -> None:
    assert may_reload(version) is may


def test_the_broker_says_its_version_to_the_portal(strict: Site) -> None:
    with Session(connect_unix(strict.settings.broker_socket, soon()), soon()) as session:
        assert session.connect("x", "portal", strict.files.password()) == 0
        assert (session.retained("$SYS/broker/version", "x") or b"").startswith(b"mosquitto version 2.")
        assert session.retained("$SYS/broker/uptime", "x") is None


def test_the_pid_file_of_another_process_is_not_signalled(reloaded: Site) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        try:
            reloaded.settings.broker_pid_file.unlink()
            reloaded.settings.broker_pid_file.write_text(str(bystander.pid))
            reloaded.install()
            with pytest.raises(BrokerUnavailable, match="answers on the broker's internal listener"):
                reloaded.broker.enforce(reloaded.generation, soon(1))
            bystander.send_signal(signal.SIGTERM)
            assert bystander.wait(5) == -signal.SIGTERM
        finally:
            bystander.kill()


def test_a_broker_with_an_older_password_learns_the_new_one_by_a_restart(strict: Site) -> None:
    (strict.settings.secrets_dir / "broker-password").unlink()
    assert not strict.broker.reachable()
    strict.install()
    assert strict.waits() is RestartReason.PASSWORD
    strict.mosquitto.restart()
    assert strict.waits() is None
    assert strict.broker.reachable()


def test_a_broker_with_another_password_file_is_said(strict: Site) -> None:
    settings = Settings.from_env(
        {
            "PORTAL_DATA_DIR": str(strict.folder / "other"),
            "PORTAL_BROKER_SOCKET": str(strict.settings.broker_socket),
            "PORTAL_BROKER_PID_FILE": str(strict.settings.broker_pid_file),
        }
    )
    other = BrokerProvisioning(settings)
    assert not other.reachable()
    with pytest.raises(BrokerUnavailable, match="reason 0x87: password_file in its configuration"):
        other.enforce(1, soon(0.3))
    with pytest.raises(BrokerUnavailable, match="reason 0x87"):
        other.disconnect([str(uuid.uuid4())], soon())


def test_the_probe_wants_to_see_both_certificates_treated_as_they_deserve(strict: Site) -> None:
    one, two = strict.probe_certificates.good, strict.probe_certificates.revoked
    with pytest.raises(BrokerNotEnforcing, match="accepts a revoked certificate"):
        strict.broker.probe(ProbeCertificates(good=one, revoked=one), soon(2))
    with pytest.raises(BrokerNotEnforcing, match="refuses a good certificate with TLS alert 44"):
        strict.broker.probe(ProbeCertificates(good=two, revoked=two), soon())
    stranger = Pki()
    paths = ProbeCertificate(*stranger.issuing.issue("x").write(strict.folder, "stranger"))
    with pytest.raises(BrokerNotEnforcing, match="TLS alert 48"):
        strict.broker.probe(ProbeCertificates(good=one, revoked=paths), soon())


def test_the_probe_wants_to_see_the_brokers_own_certificate(strict: Site) -> None:
    strict.file("ca.pem").write_bytes(Pki().ca_bundle)
    with pytest.raises(BrokerUnavailable, match="broker's certificate is refused"):
        strict.broker.probe(strict.probe_certificates, soon())


# --- Files damaged by hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["acl", "crl.pem"])
def test_the_broker_does_not_start_on_a_damaged_file_until_it_is_repaired(stopped: Site, name: str) -> None:
    stopped.file(name).write_bytes(b"damaged\n")
    assert [problem for problem in stopped.files.damage() if name in problem]
    with pytest.raises(StartFailed):
        stopped.mosquitto.start()
    stopped.install()
    assert stopped.files.damage() == []
    stopped.mosquitto.start()
    stopped.broker.probe(stopped.probe_certificates, soon())


def test_a_crl_damaged_under_a_broker_that_others_reload_is_noticed_and_repaired(strict: Site) -> None:
    strict.apply()
    strict.file("crl.pem").write_bytes(b"damaged\n")
    strict.mosquitto.hang_up()
    strict.mosquitto.wait_for_log("Reloading config")
    assert len(strict.files.damage()) == 1
    strict.broker.enforce(strict.generation, soon())
    # The broker fails open here; the probe sees it.
    with pytest.raises(BrokerNotEnforcing, match="accepts a revoked certificate"):
        strict.broker.probe(strict.probe_certificates, soon(2))
    strict.install()
    strict.mosquitto.restart()
    strict.broker.probe(strict.probe_certificates, soon())
    assert strict.files.damage() == []


def test_an_acl_lost_under_a_broker_that_others_reload_is_noticed_and_repaired(strict: Site) -> None:
    device_id = strict.admit()
    strict.apply()
    strict.file("acl").unlink()
    strict.mosquitto.hang_up()
    strict.mosquitto.wait_for_log("Reloading config")
    with connected(strict, device_id) as device:
        assert device.publish("anything") in DELIVERED  # the broker fails open
    with pytest.raises(BrokerNotEnforcing, match="without an ACL"):
        strict.broker.enforce(strict.generation, soon(0.3))
    strict.install()
    assert strict.waits() is RestartReason.NO_ACL
    strict.mosquitto.restart()
    assert strict.waits() is None
    with connected(strict, device_id) as device:
        assert device.publish("anything") == NOT_AUTHORISED


def test_an_acl_changed_by_others_is_loaded_again_once_it_is_repaired(strict: Site) -> None:
    strict.apply()
    path = strict.file("acl")
    path.write_bytes(path.read_bytes().replace(b"# end", b"user x\ntopic readwrite #\n# end"))
    strict.mosquitto.hang_up()
    strict.mosquitto.wait_for_log("Reloading config")
    strict.install()
    assert strict.waits() is RestartReason.TOPICS
