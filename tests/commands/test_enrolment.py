"""Devices that enrol by themselves, managed at the command line, against a small portal."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply

pytest_plugins = ("tests.support.cli_fixtures",)

ID, DEVICE = "1e66977361d81fe2", "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"
KEY = "ab" * 32
TERMS: dict[str, Any] = {"type": "pump", "location": "hall 1", "firmware": "1", "name_template": "{serial}"}
TERMS |= {"key_types": ["ec-p256"]}
TERMS |= {"validity_days": None, "approval": "operator", "repeated_serial": "new_device"}
TOKEN = {"enrolment_token_id": ID, "name": "line-4", "device_id": None, "count": 500, "uses": 3, **TERMS}
TOKEN |= {"created_at": "2027-01-01T00:00:00Z", "expires_at": "2037-01-01T00:00:00Z", "revoked_at": None}
MANUFACTURER = {"manufacturer_id": ID, "name": "acme", "status": "unproven", "fingerprint": "cd" * 32, **TERMS}
MANUFACTURER |= {"not_after": "2037-01-01T00:00:00Z", "nonce": "ef" * 32, "nonce_expires_at": "2027-01-02T00:00:00Z"}


def test_an_enrolment_token_is_written_to_a_file_or_to_json(session: Session, stub: PortalStub) -> None:
    stub.replies["POST", "/enrolment-tokens"] = Reply(201, TOKEN | {"token": "en_secret"})
    create = (
        *("enrolment", "create", "line-4", "--count", "500", "--hours", "72", "--type", "pump", "--days", "9"),
        *("--key-type", "ec-p256", "--key-type", "ed25519", "--name-template", "{serial}", "--approval", "operator"),
        *("--repeated-serial", "same_device"),
    )
    assert session.run(*create).exit_code == 2, "standard output is no terminal"
    assert session.json(*create)["token"] == "en_secret"
    path = session.folder / "token"
    result = session.run(*create, "--token-out", str(path))
    assert result.exit_code == 0, result.output
    assert "en_secret" not in result.output
    assert path.read_text() == "en_secret\n"
    assert path.stat().st_mode & 0o777 == 0o600
    body = stub.requests[-1].body
    assert body == {"name": "line-4", "count": 500, "expires_in_hours": 72, "type": "pump", "validity_days": 9} | {
        "key_types": ["ec-p256", "ed25519"], "name_template": "{serial}", "approval": "operator",
        "repeated_serial": "same_device",
    }  # fmt: skip


def test_a_token_can_be_for_one_expected_device(session: Session, stub: PortalStub) -> None:
    stub.replies["POST", "/devices"] = Reply(201, {"device_id": DEVICE, "status": "pending"})
    options = ("--type", "pump", "--location", "hall 1", "--firmware", "1", "--topic", "devices/{id}/up:write")
    result = session.run("expect", "pump-9", *options, "--metadata", "line=4", "--external-id", "SN-9")
    assert f"--device {DEVICE}" in result.stderr
    body = stub.requests[-1].body
    assert body["topics"] == [{"filter": "devices/{id}/up", "access": "write"}]
    assert (body["metadata"], body["external_id"]) == ({"line": "4"}, "SN-9")
    stub.replies["POST", "/enrolment-tokens"] = Reply(201, TOKEN | {"device_id": DEVICE, "token": "en_secret"})
    session.json("enrolment", "create", "pump-9", "--device", DEVICE)
    assert stub.requests[-1].body == {"name": "pump-9", "device_id": DEVICE}


PEM = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"


def test_a_policy_is_read_from_a_file_and_its_anchors_from_others(session: Session, stub: PortalStub) -> None:
    anchors = ["root.pem", PEM, {"pem": "root.pem", "types": ["psa"]}]
    folder = session.folder / "policies"
    folder.mkdir()
    (folder / "root.pem").write_text(PEM)
    (folder / "policy.json").write_text(json.dumps({"mode": "require", "anchors": anchors}))
    policy = {"mode": "require", "version": 2, "policy_id": ID}
    stub.replies["PATCH", f"/enrolment-tokens/{ID}"] = Reply(body=TOKEN | {"attestation": policy})
    shown = session.run("enrolment", "update", ID, "--attestation", str(folder / "policy.json"))
    assert f"attestation\trequire, version 2, {ID}\n" in shown.stdout
    sent = {"mode": "require", "anchors": [PEM, PEM, {"pem": PEM, "types": ["psa"]}]}
    assert stub.requests[-1].body == {"attestation": sent}
    stub.replies["PATCH", f"/manufacturers/{ID}"] = Reply(body=MANUFACTURER)
    session.run("manufacturer", "update", ID, "--attestation", str(folder / "policy.json"))
    assert stub.requests[-1].body == {"attestation": sent}


@pytest.mark.parametrize("content", ["", "[]", '{"anchors": 1}', '{"anchors": ["nowhere.pem"]}'])
def test_a_file_that_is_no_policy_is_refused_before_anything_is_sent(
    session: Session, stub: PortalStub, content: str
) -> None:
    (session.folder / "policy.json").write_text(content)
    result = session.run("enrolment", "update", ID, "--attestation", str(session.folder / "policy.json"))
    assert result.exit_code == 2
    assert not stub.requests


@pytest.mark.parametrize(
    "content",
    ["root:x:0:0:root:/root:/bin/sh\n", f"{PEM}-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"],
)
def test_somebody_elses_policy_has_no_other_file_sent(session: Session, stub: PortalStub, content: str) -> None:
    (session.folder / "other").write_text(content)
    (session.folder / "policy.json").write_text(json.dumps({"mode": "require", "anchors": ["other"]}))
    result = session.run("enrolment", "update", ID, "--attestation", str(session.folder / "policy.json"))
    assert result.exit_code == 2
    assert "AAAA" not in result.output
    assert not stub.requests


def test_enrolment_tokens_are_listed_and_revoked(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/enrolment-tokens"] = Reply(body={"enrolment_tokens": [TOKEN]})
    listed = session.run("enrolment", "list").stdout.rstrip("\n").split("\t")
    assert listed == [ID, "line-4", "", "3", "500", "operator", "2037-01-01T00:00:00Z", "", ""]
    assert session.run("enrolment", "revoke", ID).exit_code == 2, "nobody is there to be asked"
    stub.replies["DELETE", f"/enrolment-tokens/{ID}"] = Reply(body=TOKEN | {"revoked_at": "2027-01-01T00:00:00Z"})
    assert "Revoked the enrolment token line-4" in session.run("enrolment", "revoke", ID, "--yes").stderr
    mistaken = session.run("enrolment", "revoke", "en_a-secret-taken-for-an-id", "--yes")
    assert mistaken.exit_code == 2
    assert "en_a-secret" not in mistaken.output


def asked(stub: PortalStub, **changed: Any) -> None:
    answer = {"device_id": DEVICE, "key_fingerprint": KEY, "status": "waiting", "again": False, **changed}
    stub.replies["GET", f"/devices/{DEVICE}/enrolment"] = Reply(body=answer)


def test_a_waiting_device_is_listed_and_approved_with_the_key_that_was_shown(
    session: Session, stub: PortalStub
) -> None:
    row = {"device_id": DEVICE, "name": "pump-9", "again": True, "key_fingerprint": KEY, "manufacturer_id": ID}
    row |= {"enrolment_token_id": None, "asked_at": "2027-01-01T00:00:00Z"}
    stub.replies["GET", "/enrolments"] = Reply(body={"enrolments": [row]})
    waits = session.run("waiting").stdout.rstrip("\n").split("\t")
    assert waits == [DEVICE, "pump-9", "again", "2027-01-01T00:00:00Z", ID, KEY]
    asked(stub)
    path = f"/devices/{DEVICE}/approve"
    stub.replies["POST", path] = Reply(body={"device_id": DEVICE, "status": "pending"})
    assert session.run("approve", DEVICE).exit_code == 2, "nobody is there to be asked"
    assert stub.calls("POST", path) == []
    assert session.run("approve", DEVICE, "--yes").exit_code == 0
    assert stub.requests[-1].body == {"key_fingerprint": KEY}
    colons = ":".join(["AB"] * 32)
    assert session.run("approve", DEVICE, "--key", colons).exit_code == 0
    assert stub.requests[-1].body == {"key_fingerprint": KEY}
    assert session.run("approve", DEVICE, "--key", "12").exit_code == 2
    stub.replies["GET", "/enrolments"] = Reply(body={"enrolments": []})
    assert "No devices wait" in session.run("waiting").stderr


@pytest.mark.parametrize(("status", "said"), [("revoked", "permanently"), ("active", "stays active")])
def test_a_rejection_says_what_it_means(session: Session, stub: PortalStub, status: str, said: str) -> None:
    stub.replies["POST", f"/devices/{DEVICE}/reject"] = Reply(body={"device_id": DEVICE, "status": status})
    assert session.run("reject", DEVICE).exit_code == 2
    assert said in session.run("reject", DEVICE, "--yes").stderr
    assert session.json("reject", DEVICE, "--yes")["status"] == status
    assert not stub.requests[-1].body
    assert session.run("reject", DEVICE, "--why", "not ours", "--yes").exit_code == 0
    assert stub.requests[-1].body == {"why": "not ours"}


def test_a_manufacturer_is_added_proven_listed_and_removed(session: Session, stub: PortalStub) -> None:
    pem = session.folder / "acme.pem"
    pem.write_text("-----BEGIN CERTIFICATE-----\n")
    stub.replies["POST", "/manufacturers"] = Reply(201, MANUFACTURER)
    terms = ("--approval", "operator", "--repeated-serial", "same_device")
    added = session.run("manufacturer", "add", "acme", "--certificate", str(pem), *terms)
    assert f"nonce\t{'ef' * 32}" in added.stdout
    assert "openssl dgst -sha256 -sign" in added.stderr
    assert stub.requests[-1].body == {"name": "acme", "certificate": pem.read_text()} | {
        "approval": "operator", "repeated_serial": "same_device",
    }  # fmt: skip
    proof = f"/manufacturers/{ID}/proof"
    stub.replies["POST", proof] = Reply(body=MANUFACTURER | {"status": "registered", "nonce": None})
    signature = session.folder / "nonce.sig"
    for content in (b"0\x44\x02\xff\x80", base64.encodebytes(b"0\x44\x02\xff\x80")):
        signature.write_bytes(content)
        assert "Registered acme" in session.run("manufacturer", "prove", ID, "--signature", str(signature)).stderr
        assert stub.requests[-1].body == {"signature": base64.b64encode(b"0\x44\x02\xff\x80").decode()}
    assert session.json("manufacturer", "prove", ID, "--certificate", str(pem))["status"] == "registered"
    assert session.run("manufacturer", "prove", ID).exit_code == 2
    assert session.run("manufacturer", "add", "acme", "--certificate", "nowhere.pem").exit_code == 2
    signature.write_bytes(b"\xff")
    assert session.run("manufacturer", "add", "acme", "--certificate", str(signature)).exit_code == 2
    stub.replies["GET", "/manufacturers"] = Reply(body={"manufacturers": [MANUFACTURER]})
    assert session.run("manufacturer", "list").stdout.split("\t")[:4] == [ID, "acme", "unproven", "operator"]
    stub.replies["GET", f"/manufacturers/{ID}"] = Reply(body=MANUFACTURER)
    shown = session.run("manufacturer", "show", ID).stdout
    assert "key_types\tec-p256" in shown
    assert "repeated_serial\tnew_device" in shown
    stub.replies["PATCH", f"/manufacturers/{ID}"] = Reply(body=MANUFACTURER)
    assert "Changed certificate of acme" in session.run("manufacturer", "update", ID, "--certificate", str(pem)).stderr
    assert stub.requests[-1].body == {"certificate": pem.read_text()}
    stub.replies["DELETE", f"/manufacturers/{ID}"] = Reply(body=MANUFACTURER | {"status": "removed"})
    assert session.run("manufacturer", "remove", ID).exit_code == 2
    assert "Removed acme" in session.run("manufacturer", "remove", ID, "--yes").stderr
