"""A root that was made by the documented commands signs the portal's issuing CA; devices talk under both roots."""

from __future__ import annotations

import functools
import re
import socket
import sqlite3
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from tests.support.company import CompanyCa, pem
from tests.support.deployment import Deployment, Onboarded, examine, wait_until
from tests.support.pki import key_pem

pytestmark = [pytest.mark.system, pytest.mark.both_stores]

ROOT = Path(__file__).resolve().parents[2]
COMPANY, OWN = "CN=Example Root CA,O=Example Ltd", "CN=Device Onboarding Root CA"


class Quiet(SimpleHTTPRequestHandler):
    """What the company publishes, without a line for each request."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def deployment(ca_keys: Callable[[], dict[str, str]]) -> Iterator[Deployment]:
    with Deployment(**ca_keys()) as running:
        yield running


@pytest.fixture
def published(tmp_path: Path) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ceremony(folder: Path, request: str, published: str) -> Path:
    """Run the commands of docs/ca.md on the machine of the root, one block after the other."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "ca.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    (folder / "root.pass").write_text("a passphrase of the root\n")
    (folder / "issuing.csr").write_text(request)
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "PUBLISHED": published},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    return folder / "chain.pem"


def roots(path: Path) -> set[str]:
    found = x509.load_pem_x509_certificates(path.read_bytes())
    return {one.subject.rfc4514_string() for one in found if one.subject == one.issuer}


def root_of_broker(deployment: Deployment) -> str:
    """The root of the certificate that the broker reads at its next start."""
    chain = x509.load_pem_x509_certificates((deployment.data / "broker" / "server.pem").read_bytes())
    return chain[-1].issuer.rfc4514_string()


def verified(deployment: Deployment, device: Onboarded, folder: Path, published: str) -> str:
    """What openssl says of a device up to the company's root, with all CRLs and nothing else of the portal's."""
    crls = {"issuing.crl": f"{deployment.pki_url}/crl/issuing-2.crl", "above.crl": f"{published}/root.crl"}
    for name, url in crls.items():
        (folder / name).write_bytes(requests.get(url, timeout=10).content)
    command = ["openssl", "verify", "-x509_strict", "-crl_check_all", "-CAfile", "root.pem", "-untrusted"]
    command += [device.file("chain.pem"), *(word for name in crls for word in ("-CRLfile", name))]
    done = subprocess.run(
        [*command, device.file("device.pem")], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def ocsp(deployment: Deployment, device: Onboarded, folder: Path) -> str:
    command = ["openssl", "ocsp", "-issuer", "issuing.pem", "-cert", device.file("device.pem"), "-no_nonce"]
    command += ["-url", f"{deployment.pki_url}/ocsp", "-CAfile", "root.pem", "-verify_other", "issuing.pem"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_a_company_root_signs_the_issuing_ca_and_devices_connect(
    deployment: Deployment, tmp_path: Path, published: str
) -> None:
    older = deployment.onboard("older")
    session = older.client()
    chain = ceremony(tmp_path, deployment.run_flask("ca", "request").stdout, published)
    done = deployment.run_flask("ca", "install", str(chain))
    assert "issuing-2 issues." in done.stdout
    assert session.publish(f"devices/{older.id}/up") in ("Success", "No matching subscribers")
    assert root_of_broker(deployment) == OWN, "the older device knows no other root"

    # Beside the own root: both kinds of devices talk to a broker that was restarted, too.
    def issues() -> bool:
        deployment.session.close()
        device_id = deployment.register()["device_id"]
        shown = deployment.call("GET", f"/devices/{device_id}").json()["certificate"]["certificate"]
        is_below_it = x509.load_pem_x509_certificate(shown.encode()).issuer.rfc4514_string().endswith("2")
        if not is_below_it:  # by a worker that has not looked yet
            deployment.call("POST", f"/revoke/{device_id}")
        return is_below_it

    wait_until(lambda: all(issues() for _ in range(6)))
    newer, gone = deployment.onboard("newer"), deployment.onboard("gone")
    assert roots(newer.folder / "ca.pem") == {COMPANY, OWN}
    session.close()
    deployment.stop_broker()
    deployment.start_broker()
    deployment.wait_ready()
    for device in (older, newer):
        client = device.client()
        assert client.publish(f"devices/{device.id}/up") in ("Success", "No matching subscribers")
        client.close()
    for name in ("CA chain", "CAs above", "broker certificate", "portal certificate", "probe certificates"):
        assert name not in examine(deployment)[1]

    # CRL and OCSP verify up to the company's root.
    assert verified(deployment, newer, tmp_path, published).endswith(": OK\n")
    assert deployment.call("POST", f"/revoke/{gone.id}").json()["broker"] == "enforced"
    assert gone.refusal()
    assert "certificate revoked" in verified(deployment, gone, tmp_path, published)
    for device, status in ((newer, "good"), (gone, "revoked")):
        answer = ocsp(deployment, device, tmp_path)
        assert "Response verify OK" in answer
        assert f"{status}\n" in answer

    # What another CA of the company, or its root itself, has certified under a device's name is refused.
    for below in (False, True):
        assert alert(impostor(tmp_path, newer, below=below)) == "TLSV1_ALERT_UNKNOWN_CA"
    assert alert(newer) == ""

    # In its place: the last device of the own root is renewed, the broker restarts, the own root goes.
    deployment.cli("renew", older.id, "--overlap-hours", "0", "--out", str(tmp_path / "renewed"))
    with sqlite3.connect(deployment.data / "portal.db") as database:  # as if the installation had been yesterday
        database.execute("UPDATE issuers SET issuing_since = datetime(issuing_since, '-1 day')")
    assert root_of_broker(deployment) == OWN
    early = deployment.run_flask("ca", "retire", "issuing-1", check=False)
    assert "Error: The broker still shows a certificate below the root of issuing-1" in early.stderr + early.stdout
    deployment.stop_broker()
    deployment.start_broker()
    deployment.wait_ready()
    deployment.run_flask("ca", "retire", "issuing-1")
    assert roots(deployment.data / "ca.pem") == {COMPANY}
    wait_until(lambda: roots(deployment.data / "broker" / "ca.pem") == {COMPANY})
    deployment.wait_ready()
    last = deployment.onboard("last")
    assert roots(last.folder / "ca.pem") == {COMPANY}
    for device in (Onboarded(older.id, tmp_path / "renewed", deployment.mqtt_port), newer, last):
        client = device.client()
        assert client.publish(f"devices/{device.id}/up") in ("Success", "No matching subscribers")
        client.close()
    trust = ssl.create_default_context(cafile=str(tmp_path / "root.pem"))
    host, _, port = deployment.url.removeprefix("https://").partition(":")
    with socket.create_connection((host, int(port))) as plain, trust.wrap_socket(plain, server_hostname=host) as secure:
        assert secure.version(), "the company's root alone is enough to verify the portal"
    assert examine(deployment) == (0, {})


def alert(client: Onboarded) -> str | None:
    """The alert with which the broker ends the handshake, empty if it does not."""
    context = ssl.create_default_context(cafile=client.file("ca.pem"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # in which the client's certificate is part of the handshake
    context.load_cert_chain(client.file("chain.pem"), client.file("device.key"))
    try:
        with socket.create_connection(("localhost", client.port)) as plain:
            context.wrap_socket(plain, server_hostname="localhost").close()
    except ssl.SSLError as error:
        return error.reason
    return ""


def impostor(folder: Path, device: Onboarded, *, below: bool) -> Onboarded:
    """A client of the company's root, or of another CA below it, that has the id of a device for its name."""
    root = CompanyCa(
        load_pem_private_key((folder / "root.key").read_bytes(), b"a passphrase of the root"),
        x509.load_pem_x509_certificate((folder / "root.pem").read_bytes()),
    )
    signer = root.below("Other CA", path_length=0) if below else root
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = signer.sign(key.public_key(), device.id, is_ca=False)
    own = folder / f"impostor-{below}"
    own.mkdir()
    (own / "device.key").write_bytes(key_pem(key))
    (own / "chain.pem").write_bytes(pem(leaf, signer) if below else pem(leaf))
    (own / "device.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
    (own / "ca.pem").write_bytes(Path(device.file("ca.pem")).read_bytes())
    return Onboarded(device.id, own, device.port)
