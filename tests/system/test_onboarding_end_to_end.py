"""A device onboarded through the CLI, talking to the real broker, and revoked."""

from __future__ import annotations

import queue
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from cryptography import x509

from tests.support.deployment import Client, Deployment, Onboarded, deployed, wait_until
from tests.support.ports import free_port

pytestmark = pytest.mark.system


def test_a_device_talks_on_its_own_topics_and_on_no_other(deployment: Deployment) -> None:
    one, other = deployment.onboard("one"), deployment.onboard("other")
    client, stranger = one.client(), other.client()
    client.subscribe(f"devices/{one.id}/#")
    client.subscribe(f"devices/{other.id}/#")
    assert client.publish(f"devices/{one.id}/up") == "Success"
    assert client.messages.get(timeout=10) == (f"devices/{one.id}/up", b"hello")
    assert client.publish(f"devices/{other.id}/up") == "Not authorized"
    assert client.publish("$SYS/broker/x") != "Success"
    assert stranger.publish(f"devices/{other.id}/up") in ("Success", "No matching subscribers")
    assert client.publish(f"devices/{one.id}/last") == "Success"
    # What the stranger sent before would have arrived before this.
    assert client.messages.get(timeout=10) == (f"devices/{one.id}/last", b"hello")
    client.close()
    stranger.close()


def test_the_tools_of_mosquitto_work_with_the_bundle_as_it_is(deployment: Deployment) -> None:
    device = deployment.onboard()
    options = (device.folder / "mosquitto-client.conf").read_text().splitlines()
    arguments = [word for line in options if not line.startswith("#") for word in line.split(" ", 1)]
    command = ["mosquitto_pub", *arguments, "-t", f"devices/{device.id}/up", "-m", "hello", "-q", "1", "-V", "mqttv5"]
    done = subprocess.run(command, cwd=device.folder, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


def test_openssl_accepts_the_chain_and_checks_it_against_the_crl(deployment: Deployment, tmp_path: Path) -> None:
    device = deployment.onboard()
    verify = ["openssl", "verify", "-x509_strict", "-crl_check", "-CAfile", device.file("ca.pem"), "-CRLfile"]

    def judged() -> str:
        crl = deployment.session.get(f"{deployment.pki_url}/crl/issuing-1.crl", timeout=10).content
        (tmp_path / "crl.der").write_bytes(crl)
        subprocess.run(
            ["openssl", "crl", "-in", "crl.der", "-inform", "DER", "-out", "crl.pem"], cwd=tmp_path, check=True
        )
        command = [*verify, str(tmp_path / "crl.pem"), device.file("device.pem")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert judged().endswith(": OK\n")
    deployment.cli("revoke", device.id, "--yes", "--reason", "key_compromise")
    assert "certificate revoked" in judged()


def test_a_device_with_its_own_key_is_onboarded_by_a_csr(deployment: Deployment, tmp_path: Path) -> None:
    key, csr = tmp_path / "device.key", tmp_path / "device.csr"
    make = [
        "openssl",
        "req",
        "-new",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=x",
    ]
    subprocess.run([*make, "-keyout", key, "-out", csr], check=True, capture_output=True)
    answer = deployment.register(csr=csr.read_text())
    (tmp_path / "chain.pem").write_text(answer["chain"])
    (tmp_path / "ca.pem").write_bytes((deployment.data / "ca.pem").read_bytes())
    client = Onboarded(answer["device_id"], tmp_path, deployment.mqtt_port).client()
    # The answer came after the broker knew the device: no wait, no second try.
    assert client.publish(f"devices/{answer['device_id']}/up") in ("Success", "No matching subscribers")
    client.close()


def test_a_bundle_works_the_moment_it_can_be_fetched(deployment: Deployment) -> None:
    for _ in range(5):
        device = deployment.onboard()
        client = device.client()
        assert client.publish(f"devices/{device.id}/up") in ("Success", "No matching subscribers")
        client.close()


def test_a_revoked_device_is_disconnected_silenced_and_stays_refused(deployment: Deployment) -> None:
    device, witness = deployment.onboard("goes"), deployment.onboard("stays")
    listening = witness.client()
    client = device.client()
    client.subscribe(f"devices/{device.id}/#")
    answer = deployment.call("POST", f"/revoke/{device.id}", {"reason": "key_compromise"})
    assert answer.json()["broker"] == "enforced", answer.text
    client.paho.publish(f"devices/{device.id}/up", b"after the answer", qos=1)
    client.wait_cut()
    client.close()
    assert device.refusal()
    assert listening.publish(f"devices/{witness.id}/up") in ("Success", "No matching subscribers")
    with pytest.raises(queue.Empty):
        client.messages.get_nowait()
    listening.close()


def test_a_registration_on_a_new_installation_leaves_a_sleeping_device_its_messages() -> None:
    with deployed() as deployment:
        assert deployment.broker is not None
        shared = ("--topic", "devices/{id}/#:readwrite", "--topic", "devices/line/#:readwrite")
        sleeper, sender = deployment.onboard("sleeper", *shared), deployment.onboard("sender", *shared)
        deployment.wait_ready()
        talking = sender.client()
        wait_until(lambda: talking.publish("devices/line/first") in ("Success", "No matching subscribers"))
        asleep = Client(sleeper, session_seconds=600)
        asleep.connect()
        wait_until(lambda: asleep.subscribe("devices/line/#") == "Granted QoS 1")
        asleep.close()
        reloads = deployment.broker.log.count("Reloading config")

        other = deployment.onboard("another").client()
        wait_until(lambda: other.publish(f"devices/{other.device.id}/up") != "Not authorized")
        other.close()
        deployment.wait_ready()
        assert deployment.broker.log.count("Reloading config") == reloads
        assert talking.publish("devices/line/news", b"while it slept") == "Success"
        talking.close()

        awake = Client(sleeper, session_seconds=600)
        awake.connect()
        assert awake.messages.get(timeout=10) == ("devices/line/news", b"while it slept")
        awake.close()
        assert deployment.broker.running


def test_it_stays_refused_after_broker_and_portal_have_been_restarted() -> None:
    with deployed() as deployment:
        device, witness = deployment.onboard("goes"), deployment.onboard("stays")
        deployment.cli("revoke", device.id, "--yes")
        deployment.stop_broker()
        assert deployment.stop_portal() == [0]
        deployment.start_broker()
        deployment.start_portal()
        deployment.wait_ready()
        device.refusal()
        witness.client().close()


def test_a_device_revoked_while_the_broker_is_down_is_pending_then_refused() -> None:
    with deployed(PORTAL_ENFORCE_TIMEOUT="0.5") as deployment:
        device, witness = deployment.onboard("goes"), deployment.onboard("stays")
        deployment.stop_broker()
        done = deployment.cli("revoke", device.id, "--yes")
        assert "pending" in done.stdout + done.stderr
        assert deployment.cli("status", check=False).returncode == 1
        deployment.start_broker()
        deployment.wait_ready()
        wait_until(lambda: deployment.call("POST", f"/revoke/{device.id}").json()["broker"] == "enforced")
        device.refusal()
        witness.client().close()


def test_a_revocation_survives_kill_9_before_the_broker_is_reloaded() -> None:
    with deployed(PORTAL_ENFORCE_TIMEOUT="0.5") as deployment:
        device = deployment.onboard("goes")
        deployment.stop_broker()
        assert deployment.call("POST", f"/revoke/{device.id}").json()["broker"] == "pending"
        deployment.stop_portal(signal.SIGKILL)
        deployment.start_broker()
        deployment.start_portal()
        deployment.wait_ready()
        device.refusal()


@pytest.mark.parametrize("name", [pytest.param("crl.pem", marks=pytest.mark.long), "acl"])  # a minute, and seconds
def test_a_file_damaged_by_hand_is_reported_repaired_and_never_opens_the_door(name: str) -> None:
    with deployed(PORTAL_BROKER_CONTROL="files") as deployment:
        device, witness = deployment.onboard("goes"), deployment.onboard("stays")
        deployment.cli("revoke", device.id, "--yes")
        assert deployment.broker is not None
        (deployment.data / "broker" / name).write_bytes(b"")
        deployment.broker.hang_up()
        deployment.wait_ready()
        device.refusal()
        client = witness.client()
        assert client.publish(f"devices/{witness.id}/up") in ("Success", "No matching subscribers")
        assert client.publish(f"devices/{device.id}/up") == "Not authorized"
        client.close()
        wait_until(lambda: "damaged" in deployment.log.read_text())


def test_certificate_profile_points_at_what_the_pki_listener_serves(deployment: Deployment) -> None:
    device = deployment.onboard()
    certificate = x509.load_pem_x509_certificate(Path(device.file("device.pem")).read_bytes())
    points = certificate.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    access = certificate.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
    assert points[0].full_name is not None
    crl = deployment.session.get(points[0].full_name[0].value, timeout=10)
    issuer = deployment.session.get(access[0].access_location.value, timeout=10)
    assert crl.headers["Content-Type"] == "application/pkix-crl"
    certificate.verify_directly_issued_by(x509.load_der_x509_certificate(issuer.content))
    refused = deployment.session.get(f"{deployment.pki_url}/devices", timeout=10)
    assert refused.status_code == 404


# --- Downloads ----------------------------------------------------------------------------------------------------


def half_read(deployment: Deployment, path: str, *, read: int) -> None:
    """Ask for a bundle, read at most ``read`` bytes of the answer, and break off."""
    host, port = deployment.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=deployment.operator["PORTAL_CA"])
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert connection.recv(read)


@pytest.mark.parametrize("read", [1, 100])
def test_a_download_that_breaks_off_has_used_the_link_and_destroyed_the_bundle(
    deployment: Deployment, read: int
) -> None:
    registered = deployment.register()
    half_read(deployment, registered["download_url"].removeprefix(deployment.url), read=read)
    assert deployment.session.get(registered["download_url"], timeout=10).status_code == 410
    refused, delivered = deployment.call("GET", f"/audit?object=device:{registered['device_id']}").json()["entries"][:2]
    assert (delivered["action"], delivered["outcome"]) == ("bundle:deliver", "done")
    assert (refused["action"], refused["outcome"]) == ("bundle:fetch", "refused")


def test_the_delivery_is_on_record_when_the_bundle_is_answered(deployment: Deployment) -> None:
    registered = deployment.register()
    answer = deployment.session.get(registered["download_url"], timeout=10)
    assert answer.content.startswith(b"PK")
    assert len(answer.content) == int(answer.headers["Content-Length"])
    entries = deployment.call("GET", f"/audit?object=device:{registered['device_id']}").json()["entries"]
    assert entries[0]["action"] == "bundle:deliver"


def test_of_fifty_fetches_at_once_one_gets_the_bundle(deployment: Deployment) -> None:
    url = deployment.register()["download_url"]

    def fetch(_: int) -> int:
        return requests.get(url, verify=deployment.operator["PORTAL_CA"], timeout=20).status_code

    with ThreadPoolExecutor(50) as pool:
        statuses = sorted(pool.map(fetch, range(50)))
    assert statuses == [200] + [410] * 49


# --- A device that is a TLS server -----------------------------------------------------------------------------------


SUBJECT = ("--organization", "ACME", "--organizational-unit", "{location}", "--serial-number", "{id}")


@contextmanager
def serving(device: Onboarded) -> Iterator[str]:
    """The address of ``openssl s_server`` with the device's certificate."""
    address = f"127.0.0.1:{free_port()}"
    command = ["openssl", "s_server", "-accept", address, "-cert", "device.pem", "-cert_chain", "chain.pem", "-key"]
    command += ["device.key", "-www"]
    process = subprocess.Popen(command, cwd=device.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield address
    finally:
        process.kill()
        process.wait()


def connect(address: str, ca: str, host: str) -> str:
    """What ``openssl s_client`` says of the server, which it is to know by ``host``."""
    command = ["openssl", "s_client", "-connect", address, "-CAfile", ca, "-verify_hostname", host, "-servername", host]
    done = subprocess.run([*command, "-verify_return_error"], input=b"", capture_output=True, check=False, timeout=60)
    return (done.stdout + done.stderr).decode(errors="replace")


@pytest.mark.parametrize("deployment", ["guard", pytest.param("files", marks=pytest.mark.long)], indirect=True)
def test_a_device_with_server_auth_is_a_tls_server_by_its_name_and_by_no_other(deployment: Deployment) -> None:
    template = "{name}.devices.example.com"
    deployment.cli("profile", "add", "tls-server", "--server-auth", "--dns-name", template, *SUBJECT)
    device = deployment.onboard("pump-17", "--profile", "tls-server")
    plain = deployment.onboard("pump-18")
    with serving(device) as address:
        wait_until(lambda: "Verification: OK" in connect(address, device.file("ca.pem"), "pump-17.devices.example.com"))
        for other in ("localhost", "pump-18.devices.example.com", device.id):
            assert "hostname mismatch" in connect(address, device.file("ca.pem"), other).lower()
        # Nor is it the portal or the broker for their own clients.
        asked = deployment.cli("status", "--url", f"https://{address}", check=False)
        assert (asked.returncode, "is for another name" in asked.stderr) == (3, True), asked.stderr
        config = (
            (plain.folder / "mosquitto-client.conf").read_text().replace(str(plain.port), address.partition(":")[2])
        )
        lines = [line for line in config.splitlines() if not line.startswith("#")]
        command = ["mosquitto_pub", *(word for line in lines for word in line.split(" ", 1)), "-t", "x", "-m", "x"]
        published = subprocess.run(command, cwd=plain.folder, capture_output=True, text=True, check=False, timeout=60)
        assert "A TLS error occurred" in published.stderr, published.stderr
    with serving(plain) as address:
        wait_until(lambda: "unsuitable certificate purpose" in connect(address, plain.file("ca.pem"), "localhost"))
    client = device.client()
    assert client.publish(f"devices/{device.id}/up") in ("Success", "No matching subscribers")
    assert client.publish(f"devices/{plain.id}/up") == "Not authorized"
    client.close()
