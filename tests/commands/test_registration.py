"""The commands register and renew, against a small portal."""

from __future__ import annotations

import base64
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from commands.client import Client
from commands.csr import CsrFile
from pki.csr import csr_der, load_csr
from tests.pki.test_foreign import FORMS
from tests.support import foreign
from tests.support.cli_session import Session
from tests.support.harness import csr_pem
from tests.support.pki import PEM, Authority, key_pem
from tests.support.portal_stub import BUNDLE_PASSWORD, PortalStub, Reply, problem, sign_key

pytest_plugins = ("tests.support.cli_fixtures",)
KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)
REGISTER = ("register", "sensor-7", "--type", "thermometer", "--location", "Hall 2", "--firmware", "1.4.2")


def test_a_registration_sends_what_was_given(session: Session, stub: PortalStub) -> None:
    session.json(
        *REGISTER,
        "--metadata",
        "owner=ops=2",
        "--topic",
        "devices/{id}/a:b:write",
        "--key-type",
        "ed25519",
        "--days",
        "9",
        "--external-id",
        "SN-7",
    )
    (request,) = stub.calls("POST", "/register")
    assert request.body == {
        "name": "sensor-7",
        "type": "thermometer",
        "location": "Hall 2",
        "firmware": "1.4.2",
        "metadata": {"owner": "ops=2"},
        "topics": [{"filter": "devices/{id}/a:b", "access": "write"}],
        "key_type": "ed25519",
        "validity_days": 9,
        "external_id": "SN-7",
    }


def test_each_registration_has_an_idempotency_key_of_its_own(session: Session, stub: PortalStub) -> None:
    session.json(*REGISTER)
    session.json(*REGISTER)
    keys = [request.headers["Idempotency-Key"] for request in stub.calls("POST", "/register")]
    assert len(set(keys)) == 2
    assert min(len(key) for key in keys) >= 32


def test_a_broken_connection_is_tried_again_with_the_same_key(session: Session, stub: PortalStub) -> None:
    stub.replies["POST", "/register"] = [
        Reply(breaks_off=True, body=b""),
        Reply(201, {"a": "b" * 99}, breaks_off=True),
    ]
    answer = session.json(*REGISTER)
    keys = {request.headers["Idempotency-Key"] for request in stub.calls("POST", "/register")}
    assert answer["device_id"] in stub.devices
    assert (len(stub.calls("POST", "/register")), len(keys)) == (3, 1)


@pytest.mark.parametrize("failure", [Reply(breaks_off=True, body=b""), problem(503, "unavailable", "Not now.")])
def test_a_registration_with_unknown_result_says_how_to_find_out(
    failure: Reply, session: Session, stub: PortalStub
) -> None:
    stub.replies["POST", "/register"] = failure
    result = session.run(*REGISTER, "--password-out", "password")
    key = stub.calls("POST", "/register")[0].headers["Idempotency-Key"]
    assert f"--idempotency-key {key}" in result.stderr
    assert not Path("password").exists()
    del stub.replies["POST", "/register"]
    assert session.json(*REGISTER, "--idempotency-key", key)["device_id"] in stub.devices


@pytest.mark.parametrize("answered", [False, True], ids=["before the answer", "after it"])
def test_ctrl_c_says_that_it_may_be_registered_and_how_to_get_the_answer(
    session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    call = Client.call

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if answered:
            call(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "call" if answered else "_send", interrupted)
    result = session.run(*REGISTER, "--json", "--idempotency-key", "k" * 32)
    assert result.exit_code == 130
    assert result.stderr.count("Warning: ") == 1
    assert f"repeat the command with --idempotency-key {'k' * 32}\n" in result.stderr


def test_ctrl_c_while_a_portal_makes_a_change_says_how_to_see_whether_it_did(
    session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    device_id, send = stub.add_device(), Client._send

    def interrupted(client: Client, method: str, url: str, *more: Any, **options: Any) -> Any:
        answer = send(client, method, url, *more, **options)
        if method == "GET":
            return answer
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "_send", interrupted)
    for words, see in (
        (("revoke", device_id, "--yes"), "portal list"),
        (("suspend", device_id), "portal list"),
        (("token", "create", "t", "--role", "auditor", "--json"), "portal token list"),
        (("group", "add", "g"), "portal group list"),
    ):
        result = session.run(*words)
        assert result.exit_code == 130
        assert result.stderr == f"Warning: The portal may have done it all the same; see: {see}\n\n"


def test_ctrl_c_of_a_command_that_asks_alone_says_nothing(
    session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "_send", interrupted)
    assert session.run("list").stderr == "\n"


@pytest.mark.parametrize(
    ("field", "option"),
    [
        ("bundle_password", "--password-file"),
        ("bundle_format", "--format"),
        ("validity_days", "--validity"),
        ("groups", "--group"),
        ("topics.0.filter", "--topic (topics.0.filter)"),
    ],
)
def test_a_refused_field_is_called_by_its_option(session: Session, stub: PortalStub, field: str, option: str) -> None:
    stub.replies["POST", "/register"] = problem(
        400, "invalid_input", "Wrong.", errors=[{"field": field, "message": "This is wrong."}]
    )
    assert f"  {option}: This is wrong.\n" in session.run(*REGISTER, "--out", "new").stderr


def test_a_folder_that_is_a_file_is_called_so(session: Session, stub: PortalStub) -> None:
    (session.folder / "README.md").touch()
    result = session.run(*REGISTER, "--out", "README.md")
    assert (result.exit_code, result.stderr) == (1, "Error: README.md is not a folder; choose another name.\n")
    assert stub.calls("POST", "/register") == []


def test_a_password_never_goes_into_a_pipe_unasked(session: Session, stub: PortalStub) -> None:
    result = session.run(*REGISTER)
    assert result.exit_code == 2
    assert "--password-out" in result.stderr
    assert stub.requests == []


def test_a_password_goes_into_a_new_private_file(session: Session) -> None:
    result = session.run(*REGISTER, "--password-out", "password")
    assert result.exit_code == 0
    assert Path("password").read_text() == BUNDLE_PASSWORD + "\n"
    assert stat.S_IMODE(Path("password").stat().st_mode) == 0o600
    assert BUNDLE_PASSWORD not in result.output
    assert "    portal download http" in result.stderr
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [
        "device_id",
        "fingerprint",
        "expires_at",
        "download_url",
        "download_expires_at",
    ]


def test_an_existing_password_file_stops_the_registration_before_a_request(session: Session, stub: PortalStub) -> None:
    Path("password").touch()
    result = session.run(*REGISTER, "--password-out", "password")
    assert (result.exit_code, stub.requests) == (2, [])
    assert "password already exists" in result.stderr


def test_json_contains_the_password_only_if_it_is_saved_nowhere_else(session: Session) -> None:
    assert session.json(*REGISTER)["bundle_password"] == BUNDLE_PASSWORD
    assert "bundle_password" not in session.json(*REGISTER, "--password-out", "password")
    assert "bundle_password" not in session.json(*REGISTER, "--out", "files")
    Path("chosen").write_text("chosen by myself\n")
    assert "bundle_password" not in session.json(*REGISTER, "--password-file", "chosen")


def test_register_and_unpack_at_once(session: Session, stub: PortalStub) -> None:
    result = session.run(*REGISTER, "--out", "sensor")
    assert result.exit_code == 0, result.output
    (device_id,) = stub.devices
    assert stat.S_IMODE(Path("sensor").stat().st_mode) == 0o700
    assert stat.S_IMODE(Path("sensor/device.key").stat().st_mode) == 0o600
    assert sorted(path.name for path in Path("sensor").iterdir()) == sorted(
        ["device.key", "device.pem", "chain.pem", "ca.pem", "mosquitto-client.conf", "README.txt"]
    )
    assert f"device_id\t{device_id}\n" in result.stdout
    assert BUNDLE_PASSWORD not in result.output
    (download,) = [request for request in stub.requests if request.path.startswith("/download/")]
    assert "Authorization" not in download.headers


def test_a_chosen_password_opens_the_bundle_at_once(session: Session, stub: PortalStub) -> None:
    result = session.run(*REGISTER, "--password-file", "-", "--out", "sensor", stdin="chosen by myself\n")
    assert result.exit_code == 0, result.output
    assert stub.calls("POST", "/register")[0].body["bundle_password"] == "chosen by myself"
    assert Path("sensor/device.key").is_file()


def test_a_folder_with_files_stops_the_registration_before_a_request(session: Session, stub: PortalStub) -> None:
    Path("sensor").mkdir(mode=0o700)
    Path("sensor/device.key").write_text("another")
    result = session.run(*REGISTER, "--out", "sensor")
    assert (result.exit_code, stub.requests) == (1, [])
    assert Path("sensor/device.key").read_text() == "another"


def test_a_fetch_that_fails_loses_neither_link_nor_password(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/download/signed-link-token-0"] = problem(503, "broker_unavailable", "The broker is away.")
    result = session.run(*REGISTER, "--out", "sensor")
    assert result.exit_code == 1
    assert "The broker is away." in result.stderr
    assert BUNDLE_PASSWORD not in result.output
    assert Path("sensor/bundle-password.txt").read_text() == BUNDLE_PASSWORD + "\n"
    assert stat.S_IMODE(Path("sensor/bundle-password.txt").stat().st_mode) == 0o600
    link = re.search(r"portal download '?(\S+)", result.stderr)
    assert link is not None
    stub.replies.clear()
    again = session.run("download", link[1], "--out", "sensor", "--password-file", "sensor/bundle-password.txt")
    assert again.exit_code == 0, again.output


def test_the_same_command_fetches_the_bundle_again_after_ctrl_c(
    session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Client.fetch_bundle

    def interrupted(*arguments: Any) -> None:
        fetch(*arguments)
        raise KeyboardInterrupt

    command = [*REGISTER, "--out", "sensor", "--idempotency-key", "k" * 32]
    with monkeypatch.context() as patch:
        patch.setattr(Client, "fetch_bundle", interrupted)
        assert session.run(*command).exit_code == 130
    again = session.run(*command)
    assert again.exit_code == 0, again.output
    assert Path("sensor/device.key").is_file()


def test_a_csr_brings_its_certificate(session: Session, stub: PortalStub) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    Path("sensor.csr").write_bytes(csr.public_bytes(PEM))
    result = session.run(*REGISTER, "--csr", "sensor.csr")
    assert result.exit_code == 0, result.output
    assert len(x509.load_pem_x509_certificates(result.stdout.encode())) == 2
    other = Authority("Broker root").certificate.public_bytes(PEM)
    stub.replies["GET", "/broker-ca.pem"] = Reply(body=stub.pki.ca_bundle + other)
    files = session.json(*REGISTER, "--csr", "sensor.csr", "--out", "sensor")["files"]
    assert files["files"] == ["ca.pem", "chain.pem", "device.pem", "mosquitto-client.conf"]
    assert Path("sensor/ca.pem").read_bytes() == stub.pki.ca_bundle + other


def test_the_files_for_a_csr_say_where_the_broker_is_as_a_bundle_does(session: Session, stub: PortalStub) -> None:
    Path("sensor.csr").write_text(csr_pem())
    in_bundle = session.run(*REGISTER, "--out", "bundle")
    result = session.run(*REGISTER, "--csr", "sensor.csr", "--out", "sensor")
    assert (in_bundle.exit_code, result.exit_code) == (0, 0), result.output

    def options(folder: str) -> list[str]:
        text = Path(folder, "mosquitto-client.conf").read_text()
        return [line for line in text.splitlines() if not line.startswith(("#", "-i ", "-h ", "-p "))]

    assert options("sensor") == options("bundle")
    device_id = list(stub.devices)[-1]
    broker = stub.devices[device_id]["brokers"][0]
    text = Path("sensor/mosquitto-client.conf").read_text()
    for line in (f"-h {broker['host']}", f"-p {broker['port']}", f"-i {device_id}"):
        assert line in text.splitlines()
    assert "put the key of the CSR beside it as device.key" in result.output
    assert "put the key" not in in_bundle.output


def test_a_certificate_is_written_even_if_the_portal_does_not_say_where_the_broker_is(
    session: Session, stub: PortalStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("sensor.csr").write_text(csr_pem())
    monkeypatch.setattr(stub, "_show", lambda _request: Reply(body={"device_id": "x", "brokers": []}))
    result = session.run(*REGISTER, "--csr", "sensor.csr", "--out", "sensor")
    assert result.exit_code == 0, result.output
    assert "mosquitto-client.conf is not written. The portal's answer does not say where the broker is" in result.stderr
    assert sorted(path.name for path in Path("sensor").iterdir()) == ["ca.pem", "chain.pem", "device.pem"]


@pytest.mark.parametrize("path", foreign.FILES, ids=[path.stem for path in foreign.FILES])
def test_a_csr_of_another_program_is_for_the_portal_to_judge(path: Path, session: Session, stub: PortalStub) -> None:
    sentence = "The CSR is refused for a reason that is named."
    stub.replies["POST", "/register"] = problem(422, "csr_invalid", sentence)
    result = session.run(*REGISTER, "--csr", str(path))
    assert (result.exit_code, "Unexpected" in result.output) == (1, False)
    assert sentence in result.stderr
    (request,) = stub.calls("POST", "/register")
    assert load_csr(csr_der(request.body["csr"])).content == load_csr(csr_der(path.read_bytes())).content


def test_the_text_around_a_csr_is_not_sent(session: Session, stub: PortalStub) -> None:
    csr = csr_pem()
    Path("sensor.csr").write_text(f"Certificate Request: Ünit\n{csr}the end\n")
    assert session.run(*REGISTER, "--csr", "sensor.csr").exit_code == 0
    (request,) = stub.calls("POST", "/register")
    assert request.body["csr"] == csr


def test_a_csr_in_der_is_sent_as_pem(session: Session, stub: PortalStub) -> None:
    csr = csr_pem()
    Path("sensor.csr").write_bytes(csr_der(csr))
    assert session.run(*REGISTER, "--csr", "sensor.csr").exit_code == 0
    (request,) = stub.calls("POST", "/register")
    assert request.body["csr"] == csr


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_csr_is_taken_in_each_form_that_the_portal_reads(
    form: Callable[[str], str], session: Session, stub: PortalStub
) -> None:
    csr = csr_pem()
    Path("sensor.csr").write_text(form(csr))
    assert session.run(*REGISTER, "--csr", "sensor.csr").exit_code == 0
    (request,) = stub.calls("POST", "/register")
    assert request.body["csr"] == csr


@pytest.mark.parametrize("wrap", [bytes, base64.encodebytes], ids=["DER", "Base64"])
@pytest.mark.parametrize(
    ("kind", "encryption"),
    [
        (PrivateFormat.PKCS8, NoEncryption()),
        (PrivateFormat.TraditionalOpenSSL, NoEncryption()),
        (PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")),
    ],
)
def test_a_private_key_without_a_label_is_not_sent(
    wrap: Callable[[bytes], bytes], kind: PrivateFormat, encryption: Any, session: Session, stub: PortalStub
) -> None:
    for key in (KEY, RSA_KEY):
        Path("sensor.csr").write_bytes(wrap(key.private_bytes(Encoding.DER, kind, encryption)))
        result = session.run(*REGISTER, "--csr", "sensor.csr")
        assert (result.exit_code, stub.requests) == (1, [])
        assert "nothing of it was sent" in result.stderr


@pytest.mark.parametrize("content", [key_pem(KEY).decode(), csr_pem() + key_pem(KEY).decode(), csr_pem() * 2, "x", ""])
def test_a_file_with_more_or_less_than_a_csr_is_not_sent(content: str, session: Session, stub: PortalStub) -> None:
    Path("sensor.csr").write_text(content)
    assert (session.run(*REGISTER, "--csr", "sensor.csr").exit_code, stub.requests) == (1, [])


@pytest.mark.parametrize("content", [b"hello\n", b"\x7fELF\x02\x01\x01\x00"], ids=["text", "program"])
def test_a_file_of_another_kind_is_not_called_a_csr(content: bytes, session: Session, stub: PortalStub) -> None:
    Path("sensor.csr").write_bytes(content)
    result = session.run(*REGISTER, "--csr", "sensor.csr")
    assert result.stderr == "Error: The file holds no CSR (PKCS#10): it is neither PEM nor DER nor Base64.\n"


@pytest.mark.parametrize(
    "key",
    [KEY, ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048), Ed25519PrivateKey.generate()],
    ids=["ec-p256", "ec-p384", "rsa-2048", "ed25519"],
)
def test_the_certificate_must_be_for_the_key_of_the_csr(key: Any) -> None:
    algorithm = None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256()
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm)
    own = CsrFile.of(csr.public_bytes(PEM))
    assert own.has_key(key.public_key())
    assert not own.has_key(ec.generate_private_key(ec.SECP256R1()).public_key())
    assert not own.has_key(Ed25519PrivateKey.generate().public_key())


@pytest.mark.parametrize("form", [PublicFormat.CompressedPoint, PublicFormat.UncompressedPoint])
def test_a_point_is_found_in_each_form(form: PublicFormat) -> None:
    point = KEY.public_key().public_bytes(Encoding.X962, form)
    assert CsrFile(b"0" + point).has_key(KEY.public_key())
    assert CsrFile(b"0\x06" + KEY.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]).has_key(
        KEY.public_key()
    )
    assert not CsrFile(b"0" + point[:-1]).has_key(KEY.public_key())


@pytest.mark.parametrize(
    "extra",
    [
        ("--csr", "x", "--key-type", "ed25519"),
        ("--password-file", "x", "--password-out", "y"),
        ("--topic", "devices/{id}/#"),
        ("--topic", "devices/{id}/#:everything"),
        ("--metadata", "novalue"),
        ("--metadata", "a=1", "--metadata", "a=2"),
        ("--days", "0"),
        ("--key-type", "rsa-1024"),
        ("--csr", "not-there.csr"),
        ("--password-file", "not-there"),
    ],
)
def test_contradictory_options_are_a_usage_error(extra: tuple[str, ...], session: Session, stub: PortalStub) -> None:
    assert (session.run(*REGISTER, *extra).exit_code, stub.requests) == (2, [])


def renewal(stub: PortalStub, device_id: str, **changed: Any) -> Reply:
    answer = {"device_id": device_id, "name": "sensor-7", "fingerprint": "cd" * 32, "serial_number": "0a1b"}
    answer |= {"expires_at": "2036-01-01T00:00:00Z", "previous_valid_until": "2026-01-02T00:00:00Z"}
    return Reply(201, answer | changed)


def test_a_renewal_shows_the_link_and_how_long_the_old_certificate_is_valid(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device()
    reply = renewal(stub, device_id, download_url=f"{stub.url}/download/x", bundle_password="a-password-of-22-chars")
    stub.replies[("POST", f"/devices/{device_id}/renew")] = reply
    options = ("--password-out", "password.txt", "--overlap-hours", "0", "--when-used", "--days", "9")
    result = session.run("renew", device_id, *options)
    assert result.exit_code == 0, result.output
    assert "previous_valid_until\t2026-01-02T00:00:00Z" in result.stdout
    assert f"Renewed sensor-7 ({device_id})" in result.stderr
    (request,) = stub.calls("POST", f"/devices/{device_id}/renew")
    assert request.body == {"overlap_hours": 0, "revoke_previous": "when_used", "validity_days": 9}
    assert len(request.headers["Idempotency-Key"]) == 32


def test_a_renewal_by_csr_is_checked_before_it_is_written(session: Session, stub: PortalStub, tmp_path: Path) -> None:
    device_id = stub.add_device()
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = sign_key(stub.pki.issuing, device_id, key.public_key()).decode()
    chain = certificate + stub.pki.issuing.certificate.public_bytes(PEM).decode()
    stub.replies[("POST", f"/devices/{device_id}/renew")] = renewal(
        stub, device_id, certificate=certificate, chain=chain
    )
    (tmp_path / "own.csr").write_text(csr_pem(key))
    (tmp_path / "others.csr").write_text(csr_pem())
    refused = session.run("renew", device_id, "--csr", str(tmp_path / "others.csr"), "--out", str(tmp_path / "no"))
    assert refused.exit_code == 1
    result = session.run("renew", device_id, "--csr", str(tmp_path / "own.csr"), "--out", str(tmp_path / "new"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / "chain.pem").read_text() == chain
