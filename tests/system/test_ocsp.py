"""OCSP over the network, asked by openssl and curl, while a real broker and several worker processes run."""

from __future__ import annotations

import base64
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from tests.support.deployment import ROOT, Deployment

pytestmark = pytest.mark.both_stores


@pytest.fixture(scope="module")
def deployment(ca_keys: Callable[[], dict[str, str]]) -> Iterator[Deployment]:
    with Deployment(PORTAL_WORKERS="3", **ca_keys()) as running:
        yield running


class Asking:
    """openssl, with the CAs of a deployment in the files that it wants."""

    def __init__(self, deployment: Deployment, folder: Path) -> None:
        issuing, root = x509.load_pem_x509_certificates((deployment.data / "ca.pem").read_bytes())
        self.deployment, self.folder = deployment, folder
        for name, certificate in (("issuing", issuing), ("root", root)):
            (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))

    def openssl(self, *options: str, issuer: str = "issuing") -> subprocess.CompletedProcess[str]:
        command = ["openssl", "ocsp", "-issuer", f"{issuer}.pem", "-CAfile", "root.pem", "-verify_other", "issuing.pem"]
        return subprocess.run(
            [*command, *options], cwd=self.folder, check=False, capture_output=True, text=True, timeout=20
        )

    def status(self, certificate: Path, *options: str, issuer: str = "issuing") -> str:
        """What the portal says of a certificate, in an answer that openssl verifies."""
        url = ("-url", f"{self.deployment.pki_url}/ocsp")
        result = self.openssl(*url, "-cert", str(certificate), *options, issuer=issuer)
        assert result.returncode == 0, result.stderr
        assert result.stderr.strip() == "Response verify OK"
        return re.sub(r"\t(This|Next) Update: .*\n?", "", result.stdout.partition(": ")[2])


@pytest.fixture
def asking(deployment: Deployment, tmp_path: Path) -> Asking:
    return Asking(deployment, tmp_path)


def certificate_of(deployment: Deployment, device_id: str, folder: Path) -> Path:
    path = folder / f"{device_id}.pem"
    [first, *_] = deployment.call("GET", f"/devices/{device_id}/certificates").json()["certificates"]
    path.write_text(first["certificate"])
    return path


@pytest.mark.parametrize("options", [[], ["-no_nonce"]], ids=["nonce", "no nonce"])
def test_openssl_follows_a_certificate_from_good_to_revoked(
    deployment: Deployment, asking: Asking, options: list[str]
) -> None:
    device = deployment.register()
    certificate = certificate_of(deployment, device["device_id"], asking.folder)
    access = x509.load_pem_x509_certificate(certificate.read_bytes()).extensions.get_extension_for_class(
        x509.AuthorityInformationAccess
    )
    assert access.value[1].access_location.value == f"{deployment.pki_url}/ocsp"
    for _ in range(4):
        assert asking.status(certificate, *options) == "good\n"
    deployment.call("POST", f"/revoke/{device['device_id']}", {"reason": "key_compromise"})
    told = asking.status(certificate, *options)
    assert re.fullmatch(r"revoked\n\tReason: keyCompromise\n\tRevocation Time: .* GMT\n", told)


def test_openssl_asks_about_several_and_about_the_issuing_ca(deployment: Deployment, asking: Asking) -> None:
    one, other = (certificate_of(deployment, deployment.register()["device_id"], asking.folder) for _ in range(2))
    told = asking.status(one, "-sha256", "-cert", str(other), "-serial", "0x1234")
    assert told.count(": good") == 1
    assert told.startswith("good\n")
    assert "0x1234: unknown" in told
    assert asking.status(asking.folder / "issuing.pem", issuer="root") == "good\n"


def test_curl_asks_by_get_over_both_listeners(deployment: Deployment, asking: Asking) -> None:
    certificate = certificate_of(deployment, deployment.register()["device_id"], asking.folder)
    asking.openssl("-cert", str(certificate), "-no_nonce", "-reqout", "request.der")
    text = base64.b64encode((asking.folder / "request.der").read_bytes()).decode()
    bases = (deployment.pki_url, deployment.url)
    answers = set()
    for base in bases:
        for path in (text, quote(text, safe=""), text.replace("=", "")):
            command = ["curl", "-fsS", "--cacert", deployment.operator["PORTAL_CA"], "-D", "head", "-o", "answer.der"]
            subprocess.run([*command, f"{base}/ocsp/{path}"], cwd=asking.folder, check=True, timeout=20)
            head = (asking.folder / "head").read_text().lower()
            assert "content-type: application/ocsp-response" in head
            assert "cache-control: public, max-age=" in head
            answers.add((asking.folder / "answer.der").read_bytes())
            told = asking.openssl("-respin", "answer.der", "-cert", str(certificate), "-no_nonce")
            assert ": good" in told.stdout
    assert 1 <= len(answers) <= 6  # each of three worker processes a listener signs for itself, and once


def test_a_revocation_shows_at_once_in_every_worker_process(deployment: Deployment, asking: Asking) -> None:
    device = deployment.register()
    certificate = certificate_of(deployment, device["device_id"], asking.folder)
    asking.openssl("-cert", str(certificate), "-no_nonce", "-reqout", "request.der")
    request = (asking.folder / "request.der").read_bytes()
    urls = (deployment.url, deployment.pki_url)
    sessions = [requests.Session() for _ in range(24)]  # connections to the three processes of each listener
    for session in sessions:
        session.trust_env = False
        session.verify = deployment.session.verify

    def said() -> tuple[set[str], list[int]]:
        """What is answered, and how many different signatures the processes of each listener have made of it."""
        answers: tuple[set[bytes], set[bytes]] = (set(), set())
        for number, session in enumerate(sessions):
            headers = {"Content-Type": "application/ocsp-request"}
            answer = session.post(f"{urls[number % 2]}/ocsp", request, headers=headers, timeout=10)
            answers[number % 2].add(answer.content)
        names = {ocsp.load_der_ocsp_response(each).certificate_status.name for each in set.union(*answers)}
        return names, [len(each) for each in answers]

    said()
    names, signed = said()
    assert names == {"GOOD"}
    assert min(signed) > 1, "all connections came to one worker, which shows nothing of the others"
    deployment.call("POST", f"/revoke/{device['device_id']}")
    assert said()[0] == {"REVOKED"}
    for session in sessions:
        session.close()


def test_the_commands_of_the_guide_run_and_believe_the_answers(deployment: Deployment, asking: Asking) -> None:
    guide = (ROOT / "docs" / "revocation.md").read_text()
    commands = "".join(re.findall(r"^```bash\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE))
    device_id = deployment.register()["device_id"]
    certificate_of(deployment, device_id, asking.folder).rename(asking.folder / "device.pem")

    def told() -> list[str]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=asking.folder,
            env=deployment.environment | {"PORTAL_PKI_URL": deployment.pki_url},
            check=False, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines() == ["Response verify OK"] * 2
        return re.findall("^device.pem: (.*)", done.stdout, re.MULTILINE)

    assert told() == ["good", "good"]
    deployment.call("POST", f"/revoke/{device_id}")
    assert told() == ["revoked", "revoked"]


def test_a_request_of_64_kilobytes_and_a_body_that_is_no_request_are_refused(
    deployment: Deployment, asking: Asking
) -> None:
    url, headers = f"{deployment.pki_url}/ocsp", {"Content-Type": "application/ocsp-request"}
    assert requests.post(url, b"\x30" * 65536, headers=headers, timeout=10).status_code == 413
    malformed = requests.post(url, b"hello", headers=headers, timeout=10)
    assert (malformed.status_code, malformed.content) == (200, b"0\x03\n\x01\x01")
    result = asking.openssl("-url", url, "-serial", "5", issuer="root")
    assert ": unknown" in result.stdout
    stranger = asking.folder / "stranger.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-subj", "/CN=x",
         "-keyout", "/dev/null", "-out", str(stranger)], check=True, capture_output=True,
    )  # fmt: skip
    result = asking.openssl("-url", url, "-serial", "5", issuer="stranger")
    assert "Responder Error: unauthorized (6)" in result.stdout
