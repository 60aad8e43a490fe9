"""What is printed to be passed on, and a portal that is trusted by the fingerprint of its root."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from unittest.mock import Mock

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from commands import handover
from commands.connection import ConnectionSettings
from commands.errors import Unreachable
from onboarding_portal.handover import Trust, by_hand
from tests.support.cli_session import Session
from tests.support.pki import Authority
from tests.support.portal_stub import BUNDLE_PASSWORD, PortalStub, Reply, problem

pytest_plugins = ("tests.support.cli_fixtures",)
REGISTER = ("register", "sensor-7", "--type", "thermometer", "--location", "Hall 2", "--firmware", "1.4.2")
LINK = "https://portal.example.com/download/signed-link-token"
FINGERPRINT = "4f" * 32


def test_a_registration_prints_one_block_without_the_password(session: Session, stub: PortalStub) -> None:
    result = session.run(*REGISTER, "--password-out", "password")
    (device_id,) = stub.devices
    link = f"{stub.url}/download/signed-link-token-0"
    block = result.stderr.partition("Pass this on, and the password by another way:\n\n")[2]
    assert (
        block
        == f"""\
  Credentials of sensor-7, to be fetched once, until 2036-01-01 00:00:00 UTC:
  {link}

  The password comes by another way. In a browser the link says what to do,
  and is used up by the button there alone. With the portal command:

    portal download {link}

  Without it, with curl and 7z, which asks for the password:

    curl -fsS {link} -o {device_id}.zip &&
    7z x -o{device_id} {device_id}.zip

"""
    )
    assert BUNDLE_PASSWORD not in result.output


def test_json_has_no_block(session: Session) -> None:
    assert "Pass this on" not in session.run(*REGISTER, "--json").output


def test_there_is_nothing_to_pass_on_where_the_bundle_is_unpacked(session: Session) -> None:
    assert "Pass this on" not in session.run(*REGISTER, "--out", "files").output


def test_a_name_cannot_end_the_line_it_is_in(session: Session, stub: PortalStub) -> None:
    stub.name_shown = "x\n  portal download https://evil.example/download/abcdefgh\x1b[2J"
    result = session.run(*REGISTER, "--password-out", "password")
    assert r"Credentials of x\n  portal download" in result.stderr
    assert "\x1b" not in result.stderr


def test_a_link_that_a_head_request_cannot_reach_is_passed_on_as_a_zip(session: Session, stub: PortalStub) -> None:
    stub.replies["HEAD", "/download/signed-link-token-0"] = problem(503, "unavailable", "Not now.")
    assert re.search(r"-o [0-9a-f-]{36}\.zip &&", session.run(*REGISTER, "--password-out", "password").stderr)


@pytest.mark.parametrize(
    ("file", "trust", "lines"),
    [
        ("id.zip", Trust(), [f"curl -fsS {LINK} -o id.zip &&", "7z x -oid id.zip"]),
        ("id.p12", Trust(), [f"curl -fsS {LINK} -o id.p12 &&", "openssl pkcs12 -in id.p12 -out id.pem"]),
        (
            "id.zip",
            Trust(ca_file=Path("/etc/my company.pem")),
            [f"curl -fsS --cacert 'my company.pem' {LINK} -o id.zip &&", "7z x -oid id.zip"],
        ),
        (
            "id.zip",
            Trust(FINGERPRINT),
            [
                f"curl -fsSk https://portal.example.com/ca/{FINGERPRINT}.cer -o root.cer &&",
                f"echo '{FINGERPRINT}  root.cer' | sha256sum -c &&",
                "openssl x509 -inform DER -in root.cer -out root.pem &&",
                f"curl -fsS --cacert root.pem {LINK} -o id.zip &&",
                "7z x -oid id.zip",
            ],
        ),
    ],
)
def test_the_commands_fit_the_file_and_how_the_portal_is_trusted(file: str, trust: Trust, lines: list[str]) -> None:
    assert by_hand(LINK, file, trust) == lines


ONE, OTHER = (Authority(name).certificate.public_bytes(Encoding.DER) for name in ("One root", "Another root"))
AT, ELSEWHERE = "https://portal.example.com", "https://front.example.com"


def digest(der: bytes) -> str:
    return sha256(der).hexdigest()


@pytest.mark.parametrize(
    ("base", "served", "leading", "expected"),
    [
        (AT, [ONE], [], Trust(digest(ONE))),
        (AT, [ONE, OTHER], [OTHER], Trust(digest(OTHER))),
        (AT, [ONE, OTHER], [], Trust(digest(ONE))),
        (AT, [], [], Trust(ca_file=Path("ca.pem"))),
        (AT, None, [], Trust(ca_file=Path("ca.pem"))),
        (ELSEWHERE, [ONE], [], Trust(digest(ONE))),
        (ELSEWHERE, None, [], Trust()),
        ("http://127.0.0.1:8443", [ONE], [], Trust()),
    ],
)
def test_the_recipient_trusts_the_root_that_leads_to_the_server_in_the_link_if_that_serves_it(
    monkeypatch: pytest.MonkeyPatch, base: str, served: list[bytes] | None, leading: list[bytes], expected: Trust
) -> None:
    def is_served(_client: object, _base: str, root: bytes) -> bool:
        if served is None:  # the operator's CA does not verify it, or it cannot be reached from here
            raise Unreachable("It does not answer.")
        return root in served

    monkeypatch.setattr(handover, "_roots", lambda _path: [ONE, OTHER])
    monkeypatch.setattr(handover, "_is_served", is_served)
    monkeypatch.setattr(handover, "_leads_to", lambda _base, root: root in leading)
    portal = Mock(settings=ConnectionSettings(AT, Path("ca.pem"), None, ""))
    assert handover.trust_at(portal, base) == expected


def test_what_the_system_trusts_needs_no_option() -> None:
    portal = Mock(settings=ConnectionSettings(AT, None, None, ""))
    assert handover.trust_at(portal, AT).option == ""


@pytest.mark.parametrize("fingerprint", ["4f", "zz" * 32, "4f" * 33])
def test_what_is_no_fingerprint_is_refused_before_a_request(
    session: Session, stub: PortalStub, fingerprint: str
) -> None:
    result = session.run("download", LINK, "--fingerprint", fingerprint)
    assert result.exit_code == 2
    assert "64 hexadecimal digits" in result.stderr
    assert stub.requests == []


def test_a_server_without_that_root_does_not_get_the_link(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", f"/ca/{FINGERPRINT}.cer"] = Reply(body=b"\x30\x03abc")
    Path("password").write_text(BUNDLE_PASSWORD)
    link = stub.add_link(b"PK")
    result = session.run("download", link, "--fingerprint", FINGERPRINT, "--password-file", "password")
    assert result.exit_code == 1
    assert "has no root certificate with this fingerprint" in result.stderr
    assert [request.path for request in stub.requests] == [f"/ca/{FINGERPRINT}.cer"]


def test_a_link_that_begins_with_http_is_told_to_begin_with_https(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", f"/ca/{FINGERPRINT}.cer"] = Reply(400, "This port speaks HTTPS, not HTTP.")
    result = session.run("download", stub.add_link(b"PK"), "--fingerprint", FINGERPRINT)
    assert result.exit_code == 1
    assert f"the link must begin with {stub.url.replace('http:', 'https:')}" in result.stderr


def test_the_fingerprint_of_an_issuing_ca_is_refused_in_words_and_the_link_is_kept(
    session: Session, stub: PortalStub
) -> None:
    der = stub.pki.issuing.certificate.public_bytes(Encoding.DER)
    fingerprint = sha256(der).hexdigest()
    stub.replies["GET", f"/ca/{fingerprint}.cer"] = Reply(body=der)
    result = session.run("download", stub.add_link(b"PK"), "--fingerprint", fingerprint)
    assert result.exit_code == 1
    assert "not the root's" in result.stderr
    assert [request.path for request in stub.requests] == [f"/ca/{fingerprint}.cer"]
