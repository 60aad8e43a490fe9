"""The probe against a stand-in for the broker that goes wrong in ways that a real one does not on request."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker import probe
from broker.probe import CERTIFICATE_REVOKED, Probe, ProbeCertificate, ProbeCertificates
from core.errors import BrokerNotEnforcing, BrokerUnavailable
from core.setting_values import Address
from tests.support.mosquitto import short_folder
from tests.support.pki import Pki


class StandIn:
    """A TLS listener that checks client certificates against a CRL, and answers CONNECT with ``reason``."""

    def __init__(self, folder: Path, *, name: str = "localhost") -> None:
        self.pki, self.folder, self.reason = Pki(), folder, 0
        good, revoked = self.pki.issuing.issue("good"), self.pki.issuing.issue("revoked")
        self.certificates = ProbeCertificates(
            ProbeCertificate(*good.write(folder, "good")), ProbeCertificate(*revoked.write(folder, "revoked"))
        )
        (folder / "ca.pem").write_bytes(self.pki.ca_bundle)
        (folder / "crl.pem").write_bytes(self.pki.issuing.crl(revoked))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(*self.pki.issuing.issue("server", server_names=[name]).write(folder, "server"))
        self.context.load_verify_locations(folder / "ca.pem")
        self.context.load_verify_locations(folder / "crl.pem")
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()
        self.probe = Probe("localhost", [Address(*self.listener.getsockname())], folder / "ca.pem")

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = self.listener.accept()
                with plain, contextlib.suppress(OSError), self.context.wrap_socket(plain, server_side=True) as secure:
                    secure.recv(1000)
                    secure.sendall(bytes([0x20, 3, 0, self.reason, 0]))
                    secure.recv(1000)

    def run(self) -> int:
        return self.probe.run(self.certificates, time.monotonic() + 5).revoked_alert


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = short_folder()
    yield folder
    shutil.rmtree(folder)


def test_a_listener_that_refuses_and_accepts_as_it_must_passes(folder: Path) -> None:
    assert StandIn(folder).run() == CERTIFICATE_REVOKED


def test_a_broker_that_sends_no_tickets_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker, waits = StandIn(folder), list[float]()
    broker.context.num_tickets = 0
    wait = probe._await_verdict

    def noted(secure: ssl.SSLSocket, seconds: float) -> None:
        waits.append(seconds)
        wait(secure, seconds)

    monkeypatch.setattr(probe, "_await_verdict", noted)
    assert broker.run() == CERTIFICATE_REVOKED
    assert waits[-1] == 0.0  # for the good certificate nothing would come


def test_a_good_certificate_that_tls_refuses_is_a_fault(folder: Path) -> None:
    broker = StandIn(folder)
    swapped = ProbeCertificates(good=broker.certificates.revoked, revoked=broker.certificates.revoked)
    with pytest.raises(BrokerNotEnforcing, match=f"good certificate with TLS alert {CERTIFICATE_REVOKED}"):
        broker.probe.run(swapped, time.monotonic() + 5)


def test_a_good_certificate_that_mqtt_refuses_is_a_fault(folder: Path) -> None:
    broker = StandIn(folder)
    broker.reason = 0x87
    with pytest.raises(BrokerNotEnforcing, match="MQTT reason 0x87"):
        broker.run()


def test_a_certificate_of_another_host_is_refused(folder: Path) -> None:
    sentence = r"certificate is refused: Hostname mismatch, .* 'localhost'; if the name was changed, restart the broker"
    with pytest.raises(BrokerUnavailable, match=rf"{sentence}, .* portal broker update"):
        StandIn(folder, name="broker.example").run()


def test_a_certificate_of_another_address_is_refused(folder: Path) -> None:
    broker = StandIn(folder)
    at = Address(*broker.listener.getsockname())
    with pytest.raises(BrokerUnavailable, match=r"IP address mismatch.*; if the name was changed, restart the broker"):
        Probe("127.0.0.9", [at], folder / "ca.pem").run(broker.certificates, time.monotonic() + 5)


def test_a_certificate_of_another_ca_is_refused(folder: Path, tmp_path: Path) -> None:
    broker, other = StandIn(folder), tmp_path / "other"
    other.mkdir()
    StandIn(other)
    at = Address(*broker.listener.getsockname())
    with pytest.raises(BrokerUnavailable, match=r"certificate is refused: .*; see that it is one of the portal's, and"):
        Probe("localhost", [at], other / "ca.pem").run(broker.certificates, time.monotonic() + 5)


def test_a_certificate_that_is_refused_can_be_looked_at(folder: Path) -> None:
    broker = StandIn(folder, name="broker.example")
    shown = broker.probe.server_certificate(broker.certificates.good, time.monotonic() + 5)
    assert shown == ssl.PEM_cert_to_DER_cert((folder / "server.pem").read_text())


def test_a_broker_is_tried_where_something_listens_and_known_by_the_name_that_devices_use(folder: Path) -> None:
    broker = StandIn(folder, name="mqtt.example.com")
    at = Address(*broker.listener.getsockname())
    with socket.socket() as bound:  # nothing listens there
        bound.bind(("127.0.0.1", 0))
        probe = Probe("mqtt.example.com", [Address(*bound.getsockname()), at], folder / "ca.pem")
        assert probe.run(broker.certificates, time.monotonic() + 5).good_reason == 0
        probe = Probe("mqtt.example.com", [Address(*bound.getsockname())], folder / "ca.pem")
        with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:\d+: .*set PORTAL_BROKER_PROBE_ADDRESS"):
            probe.run(broker.certificates, time.monotonic() + 5)


def test_a_probe_certificate_that_was_replaced_is_read_again(folder: Path) -> None:
    broker = StandIn(folder)
    broker.run()
    for name in ("pem", "key"):
        shutil.copy(folder / f"revoked.{name}", folder / f"good.{name}")
    with pytest.raises(BrokerNotEnforcing, match=f"refuses a good certificate with TLS alert {CERTIFICATE_REVOKED}"):
        broker.run()
