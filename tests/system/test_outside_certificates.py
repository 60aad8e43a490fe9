"""A CA that openssl made, which is not the portal's, has issued what HTTPS and the broker show."""

from __future__ import annotations

import http.client
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from tests.support.deployment import Deployment, Onboarded, examine, wait_until

pytestmark = pytest.mark.system


class OutsideCa:
    """A root and the servers' files, made by the openssl program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
        self.run(
            "req", "-x509", *self.key("root"), "-days", "90", "-subj", "/CN=Outside Root", "-out", "root.pem", *usage
        )
        self.issue("portal")
        self.issue("broker")

    def run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)

    @staticmethod
    def key(name: str) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key"]

    def issue(self, name: str, *, subject: str = "localhost", purpose: str = "serverAuth") -> x509.Certificate:
        """Make files anew, which replace those before at once."""
        self.run("req", *self.key("new"), "-subj", f"/CN={subject}", "-out", "new.csr")
        extensions = f"subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage={purpose}\n"
        (self.folder / "new.ext").write_text(extensions + "authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n")
        signer = ["-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial", "-days", "60", "-extfile", "new.ext"]
        self.run("x509", "-req", "-in", "new.csr", *signer, "-out", "new.pem")
        issued = (self.folder / "new.pem").read_bytes()
        (self.folder / "new.pem").write_bytes(issued + (self.folder / "root.pem").read_bytes())
        for kind in ("key", "pem"):
            (self.folder / f"new.{kind}").rename(self.folder / f"{name}.{kind}")
        return x509.load_pem_x509_certificate(issued)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> OutsideCa:
    return OutsideCa(tmp_path_factory.mktemp("outside"))


@pytest.fixture(scope="module")
def deployment(outside: OutsideCa) -> Iterator[Deployment]:
    files = {
        f"PORTAL_{setting}_{kind}": str(outside.folder / f"{name}.{suffix}")
        for setting, name in (("TLS", "portal"), ("BROKER", "broker"))
        for kind, suffix in (("CERTIFICATE", "pem"), ("KEY", "key"))
    }
    with Deployment(**files) as running:
        yield running


def shown(port: int, ca: Path, *, client: tuple[str, str] | None = None) -> x509.Certificate:
    """The certificate that a server shows, verified by what the file has."""
    context = ssl.create_default_context(cafile=str(ca))
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # in which the client's certificate is part of the handshake
    if client is not None:
        context.load_cert_chain(*client)
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")


def test_clients_verify_both_servers_by_an_outside_root_and_renewals_are_taken(
    deployment: Deployment, outside: OutsideCa
) -> None:
    device = deployment.onboard("pump")  # by the command, which has PORTAL_CA of operator.env
    root, https = outside.folder / "root.pem", int(deployment.url.rpartition(":")[2])
    assert Path(deployment.operator["PORTAL_CA"]).read_bytes() == root.read_bytes()
    assert (device.folder / "portal-ca.pem").read_bytes() == root.read_bytes()
    client = device.client()
    assert client.publish(f"devices/{device.id}/up") in ("Success", "No matching subscribers")
    client.close()
    shown_certificates = certificates_of(deployment, device, root)
    assert {one.issuer.rfc4514_string() for one in shown_certificates} == {"CN=Outside Root"}
    names = ("portal certificate", "broker certificate", "probe certificates", "broker configuration", "CA chain")
    assert not set(names) & set(examine(deployment)[1])

    # Whom that CA has certified under the device's name is nobody at the broker.
    outside.issue("impostor", subject=device.id, purpose="clientAuth")
    impostor = str(outside.folder / "impostor.pem"), str(outside.folder / "impostor.key")
    with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca"):
        shown(deployment.mqtt_port, root, client=impostor)

    # Renewed, and taken at once where a minute is too long to wait: HTTPS keeps the connections that are open.
    context = ssl.create_default_context(cafile=str(root))
    kept = http.client.HTTPSConnection("127.0.0.1", https, context=context, timeout=30)
    assert answer_of(kept) == http.client.OK
    connected = kept.sock
    renewed = outside.issue("portal"), outside.issue("broker")
    deployment.run_flask("init")
    wait_until(lambda: shown(https, root) == renewed[0])
    assert answer_of(kept) == http.client.OK
    assert kept.sock is connected
    kept.close()

    # The broker reads its certificate at its start only; so the portal has it restarted when there is time.
    files = device.file("chain.pem"), device.file("device.key")
    assert shown(deployment.mqtt_port, Path(device.file("ca.pem")), client=files) != renewed[1]
    deployment.restart_broker()
    wait_until(lambda: is_shown(deployment, Path(device.file("ca.pem")), files, renewed[1]))
    deployment.wait_ready()
    assert not set(names) & set(examine(deployment)[1])


def answer_of(connection: http.client.HTTPSConnection) -> int:
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    answer.read()
    return answer.status


def is_shown(deployment: Deployment, ca: Path, client: tuple[str, str], certificate: x509.Certificate) -> bool:
    try:
        return shown(deployment.mqtt_port, ca, client=client) == certificate
    except OSError:
        return False


def certificates_of(deployment: Deployment, device: Onboarded, root: Path) -> list[x509.Certificate]:
    files = device.file("chain.pem"), device.file("device.key")
    https = int(deployment.url.rpartition(":")[2])
    return [shown(https, root), shown(deployment.mqtt_port, Path(device.file("ca.pem")), client=files)]
