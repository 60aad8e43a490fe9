"""What other people's tools say of OCSP answers, and of the certificates that sign them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

import ca
from pki import ocsp
from pki.algorithms import KeyType, private_key_pem
from pki.issuers import Issuer, Reason
from pki.ocsp import GOOD, UNKNOWN, CertStatus, Status
from tests.support.ca_hierarchy import Hierarchy, MakeKey, make_hierarchy
from tests.support.ocsp import Ocsp, ask, nonce

# pkilint's own command-line tools, started once for all the files; a line of JSON for each.
RUN_PKILINT = """
import sys
from pkilint.bin import lint_ocsp_response, lint_pkix_cert
for path in sys.argv[1:]:
    tool = lint_pkix_cert if path.endswith(".cer") else lint_ocsp_response
    tool.main(["lint", "-s", "WARNING", "-f", "JSON", path])
"""


@dataclass(frozen=True)
class World:
    """Answers of every kind as ``<name>.ocsp``, the responders' and the CAs' certificates as ``.cer`` and ``.pem``."""

    cas: Hierarchy
    folder: Path
    device: ca.Issued

    def file(self, name: str) -> str:
        return str(self.folder / name)


ANSWERS = [
    "good",
    "unknown",
    "revoked",
    "held",
    "unspecified",
    "several",
    "several-nonce",
    "sha512",
    "nonce",
    "of-the-root",
]
RESPONDERS = ["responder-root", "responder-issuing-1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_ca_key: MakeKey) -> World:
    folder = tmp_path_factory.mktemp("ocsp")
    cas = make_hierarchy(datetime.now(UTC), make_ca_key)
    device = cas.device()
    certificates = {"root": cas.root.certificate, "issuing": cas.issuing.certificate, "device": device.certificate}
    signers = {}
    for issuer in (cas.root, cas.issuing):
        key = ca.generate_keypair(KeyType.EC_P256)
        issued = ca.sign_responder_certificate(issuer, key.public_key(), now=cas.now, days=14)
        signers[issuer] = ocsp.open_signer(private_key_pem(key) + issued.pem.encode(), issuer)
        certificates[f"responder-{issuer.name}"] = issued.certificate
    for name, certificate in certificates.items():
        (folder / f"{name}.pem").write_text(ca.chain_pem(certificate))
        (folder / f"{name}.cer").write_bytes(certificate.public_bytes(Encoding.DER))

    def write(name: str, request: Ocsp, *statuses: Status, issuer: Issuer = cas.issuing) -> None:
        read = ocsp.read_request(request.der())
        answers = list(zip(read.questions, statuses, strict=True))
        end = cas.now + timedelta(hours=24)
        der = ocsp.sign_response(signers[issuer], answers, nonce=read.nonce, now=cas.now, next_update=end)
        (folder / f"{name}.ocsp").write_bytes(der)

    number = device.certificate.serial_number
    issuing, plain = cas.issuing.certificate, ask(cas.issuing.certificate, number)
    revoked = {
        name: Status(CertStatus.REVOKED, cas.now - timedelta(days=1), reason)
        for name, reason in (
            ("revoked", Reason.KEY_COMPROMISE),
            ("held", Reason.CERTIFICATE_HOLD),
            ("unspecified", Reason.UNSPECIFIED),
        )
    }
    for name, status in {"good": GOOD, "unknown": UNKNOWN, **revoked}.items():
        write(name, plain, status)
    several = ask(issuing, number, 5, 6)
    write("several", several, GOOD, revoked["revoked"], UNKNOWN)
    several = dataclasses.replace(several, extensions=[nonce(b"n" * 32)])
    write("several-nonce", several, GOOD, revoked["held"], UNKNOWN)
    write("sha512", ask(issuing, number, algorithm="sha512"), GOOD)
    write("nonce", dataclasses.replace(plain, extensions=[nonce(b"n" * 32)]), GOOD)
    write("of-the-root", ask(cas.root.certificate, issuing.serial_number), GOOD, issuer=cas.root)
    write("by-the-wrong-responder", plain, GOOD, issuer=cas.root)
    return World(cas, folder, device)


@pytest.fixture(scope="module")
def findings(world: World) -> dict[str, list[str]]:
    """What pkilint has to say of each file, from WARNING on."""
    paths = sorted([*world.folder.glob("responder-*.cer"), *world.folder.glob("*.ocsp")])
    command = [sys.executable, "-c", RUN_PKILINT, *map(str, paths)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {
        path.name: [
            finding["code"] for result in json.loads(line)["results"] for finding in result["finding_descriptions"]
        ]
        for path, line in zip(paths, lines, strict=True)
    }


@pytest.mark.parametrize("file", [*(f"{name}.ocsp" for name in ANSWERS), *(f"{name}.cer" for name in RESPONDERS)])
def test_pkilint_finds_nothing_wrong(findings: dict[str, list[str]], file: str) -> None:
    assert findings[file] == []


def test_pkilint_would_find_something_wrong(tmp_path: Path, world: World) -> None:
    damaged = tmp_path / "damaged.ocsp"
    content = (world.folder / "good.ocsp").read_bytes()
    year = f"{world.cas.now:%Y}".encode()
    damaged.write_bytes(content.replace(b"\x18\x0f" + year, b"\x18\x0f" + b"19x6"))
    command = [sys.executable, "-c", RUN_PKILINT, str(damaged)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(report)["results"]


# --- openssl ------------------------------------------------------------------------------------------------------


def openssl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *arguments], check=False, capture_output=True, text=True)


@pytest.mark.parametrize("responder", RESPONDERS)
def test_openssl_verifies_a_responder_for_ocsp_and_for_nothing_of_tls(world: World, responder: str) -> None:
    chain = ["-x509_strict", "-CAfile", world.file("root.pem"), "-untrusted", world.file("issuing.pem")]
    certificate = world.file(f"{responder}.pem")
    assert openssl("verify", *chain, "-purpose", "ocsphelper", certificate).returncode == 0
    for purpose in ("sslclient", "sslserver"):
        assert openssl("verify", *chain, "-purpose", purpose, certificate).returncode != 0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("good", "good"),
        ("unknown", "unknown"),
        ("revoked", "revoked"),
        ("held", "revoked"),
        ("unspecified", "revoked"),
        ("several", "good"),
    ],
)
def test_openssl_believes_an_answer(world: World, answer: str, said: str) -> None:
    result = openssl(
        *("ocsp", "-respin", world.file(f"{answer}.ocsp"), "-CAfile", world.file("root.pem")),
        *("-verify_other", world.file("issuing.pem"), "-issuer", world.file("issuing.pem"), "-no_nonce"),
        *("-cert", world.file("device.pem")),
    )
    assert (result.returncode, result.stderr.strip()) == (0, "Response verify OK")
    assert f"device.pem: {said}" in result.stdout
    if answer in ("revoked", "held"):
        assert f"Reason: {'keyCompromise' if answer == 'revoked' else 'certificateHold'}" in result.stdout


def test_openssl_does_not_believe_the_responder_of_another_ca(world: World) -> None:
    result = openssl(
        *("ocsp", "-respin", world.file("by-the-wrong-responder.ocsp"), "-CAfile", world.file("root.pem")),
        *("-verify_other", world.file("issuing.pem"), "-issuer", world.file("issuing.pem"), "-no_nonce"),
        *("-cert", world.file("device.pem")),
    )
    assert "Response Verify Failure" in result.stderr
