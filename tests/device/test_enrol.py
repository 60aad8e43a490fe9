"""How the enrolment tool for devices reads the portal's answers."""

from __future__ import annotations

import base64
import json
import os
import sys
from argparse import Namespace
from datetime import UTC, datetime
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from pki.est import check_same_names, read_enrolment_request
from pki.issuers import DeviceContents
from tests.support.ca_hierarchy import make_hierarchy
from tests.support.deployment import ROOT
from tests.support.pki import PEM, Authority


@pytest.fixture(scope="module")
def enrol() -> ModuleType:
    spec = spec_from_loader("device_enrol", SourceFileLoader("device_enrol", str(ROOT / "device" / "enrol")))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"<html>", "not Base64"),
        (base64.encodebytes(b"<html>a login page</html>"), "not PKCS#7"),
        (b"", "not PKCS#7"),
        (base64.encodebytes(bytes.fromhex("300b06092a864886f70d010702")), "no certificate"),
    ],
)
def test_an_answer_that_is_not_pkcs7_is_a_temporary_failure(enrol: ModuleType, answer: bytes, said: str) -> None:
    with pytest.raises(enrol.EnrolError, match=said) as raised:
        enrol.certificates(answer)
    assert raised.value.status == enrol.LATER


def test_white_space_in_the_base64_of_an_answer_is_ignored(enrol: ModuleType) -> None:
    certificate = Authority("A CA").certificate
    der = pkcs7.serialize_certificates([certificate], Encoding.DER)
    spaced = base64.encodebytes(der).replace(b"\n", b" \r\n")
    for answer in (base64.b64encode(der), base64.encodebytes(der), spaced):
        assert enrol.certificates(answer) == [certificate.public_bytes(PEM)]


def test_what_to_trust_of_the_broker_comes_from_the_portal_or_of_an_older_one_are_its_cas(
    enrol: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = Authority("A CA").certificate
    own = base64.encodebytes(pkcs7.serialize_certificates([certificate], Encoding.DER))
    answers: dict[str, Any] = {"/broker-ca.pem": (200, {}, b"PEM"), "/.well-known/est/cacerts": (200, {}, own)}
    monkeypatch.setattr(enrol, "call", lambda _args, _method, path: answers[path])
    assert enrol.trusted_of_broker(None) == b"PEM"
    answers["/broker-ca.pem"] = (404, {}, b"")
    assert enrol.trusted_of_broker(None) == certificate.public_bytes(PEM)
    answers["/broker-ca.pem"] = (503, {}, b"")
    with pytest.raises(enrol.EnrolError) as raised:
        enrol.trusted_of_broker(None)
    assert raised.value.status == enrol.LATER


@pytest.mark.parametrize("organization", ["ACME", "A/C+M=E, Inc.", "Pümpen \\ & Söhne"])
def test_a_renewal_is_asked_for_under_the_whole_subject(enrol: ModuleType, tmp_path: Path, organization: str) -> None:
    attributes = ((x509.NameOID.ORGANIZATION_NAME, organization), (x509.NameOID.SERIAL_NUMBER, "line-4/000217"))
    issued = make_hierarchy(datetime.now(UTC)).device(contents=DeviceContents(subject=attributes))
    (tmp_path / "current").mkdir()
    (tmp_path / "current" / "device.pem").write_text(issued.pem)
    request = enrol.make_request(Namespace(serial="unused", attest=None), tmp_path / "next", tmp_path / "current")
    check_same_names(read_enrolment_request(request), issued.der)


def test_a_link_in_place_of_the_lock_has_no_other_file_emptied(enrol: ModuleType, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("content")
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / ".lock").symlink_to(other)
    args = Namespace(dir=tmp_path / "device", serial="sn-1", attest=None, token_file=None, renew=False)
    with pytest.raises(OSError, match="symbolic links"):
        enrol.run(args)
    assert other.read_text() == "content"


CONFIG = {
    "client_id": "0f9d2c4e-5b1a-4c7d-9e8f-102030405060",
    "brokers": [{"host": "mqtt.example.com", "port": 8883}],
    "tls": {"ca": "-----BEGIN CERTIFICATE-----\nMII=\n-----END CERTIFICATE-----\n"},
    "publish": ["devices/0f9d2c4e-5b1a-4c7d-9e8f-102030405060/#"],
}


def answering(enrol: ModuleType, monkeypatch: pytest.MonkeyPatch, status: int, content: bytes) -> list[Any]:
    """Let the portal answer so; returns where the requests are noted."""
    asked: list[Any] = []

    def call(_args: object, method: str, path: str, **shown: Any) -> Any:
        asked.append((method, path, shown))
        return status, {}, content

    monkeypatch.setattr(enrol, "call", call)
    return asked


def test_what_the_portal_says_of_the_broker_is_written_for_programs_and_for_mosquitto(
    enrol: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = answering(enrol, monkeypatch, 200, json.dumps(CONFIG).encode())
    enrol.configure(None, tmp_path)
    assert asked == [("GET", "/.well-known/onboarding/config", {"credentials": tmp_path})]
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    assert (tmp_path / "ca.pem").read_text() == CONFIG["tls"]["ca"]  # type: ignore[index]
    options = (tmp_path / "mosquitto-client.conf").read_text().splitlines()
    assert options[1:4] == ["-h mqtt.example.com", "-p 8883", f"-i {CONFIG['client_id']}"]


@pytest.mark.parametrize(
    "change",
    [
        {"brokers": []},
        {"brokers": [{"host": "a\n--insecure", "port": 8883}]},
        {"brokers": [{"host": "a", "port": 0}]},
        {"brokers": [{"host": "a", "port": "x"}]},
        {"brokers": "a"},
        {"client_id": "x\n-L mqtts://evil.example"},
        {"tls": {"ca": ""}},
        {"tls": None},
    ],
)
def test_an_answer_about_the_broker_that_could_mislead_a_client_is_written_nowhere(
    enrol: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any]
) -> None:
    answering(enrol, monkeypatch, 200, json.dumps(CONFIG | change).encode())
    with pytest.raises(enrol.EnrolError) as raised:
        enrol.configure(None, tmp_path)
    assert raised.value.status == enrol.LATER
    assert list(tmp_path.iterdir()) == []


def test_an_older_portal_says_nothing_of_the_broker(
    enrol: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answering(enrol, monkeypatch, 404, b"")
    enrol.configure(None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_broker_is_asked_for_again_once_a_day_and_failing_is_no_failure_of_the_run(
    enrol: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answering(enrol, monkeypatch, 503, b"{}")
    enrol.refresh(None, tmp_path)
    assert "is not renewed" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    enrol.refresh(None, tmp_path)
    assert len(asked) == 1
    os.utime(tmp_path / "config.json", (0, 0))
    enrol.refresh(None, tmp_path)
    assert len(asked) == 2
    assert (tmp_path / "config.json").read_text() == "{}"


# --- A key in a TPM --------------------------------------------------------------------------------------------------

LISTED = b"Providers:\n  default\n    name: OpenSSL\n    version: 3.0.1\n  tpm2\n    name: TPM 2.0\n    version: %s\n"


@pytest.mark.parametrize(("version", "prefers"), [(b"1.1.1", True), (b"1.2.0", False), (b"2.0.0", False)])
def test_openssl_is_told_how_to_use_the_tpm_by_each_version_of_its_provider(
    enrol: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: bytes, prefers: bool
) -> None:
    monkeypatch.setattr(enrol, "openssl", lambda *_, **__: LISTED % version)
    args = Namespace(dir=tmp_path, tcti="swtpm:path=/tpm", configuration=None)
    environment = enrol.for_tpm(args)
    assert environment["TPM2OPENSSL_TCTI"] == "swtpm:path=/tpm"
    written = Path(environment["OPENSSL_CONF"]).read_text()
    assert written.startswith("openssl_conf = init\n")
    assert ("default_properties = ?tpm2.signature=yes\n" in written) is prefers


def test_what_is_missing_for_a_tpm_is_named(enrol: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "enrol_tpm", None)
    with pytest.raises(enrol.EnrolError, match="install tpm2-pytss") as raised:
        enrol.in_tpm("make_key", None)
    assert raised.value.status == enrol.MISUSED
    monkeypatch.setattr(enrol, "openssl", lambda *_, **__: b"Providers:\n")
    with pytest.raises(enrol.EnrolError, match="install tpm2-openssl"):
        enrol.for_tpm(Namespace(dir=tmp_path, tcti=None, configuration=None))
    assert not (tmp_path / "openssl.cnf").exists()


def test_a_key_of_another_kind_than_is_asked_for_now_is_made_again(enrol: ModuleType, tmp_path: Path) -> None:
    following = tmp_path / "next"
    following.mkdir()
    (following / "device.key").write_text("-----BEGIN TSS2 PRIVATE KEY-----\n")
    (following / "request.b64").write_text("of that key")
    request = enrol.make_request(Namespace(serial="sn-1", attest=None), following, tmp_path / "current")
    assert (following / "device.key").read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert read_enrolment_request(request.encode()).csr is not None
