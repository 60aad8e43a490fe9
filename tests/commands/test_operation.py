"""The commands about the portal itself, against a small portal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.cli_session import Session
from tests.support.pki import PEM, Authority
from tests.support.portal_stub import PortalStub, Reply, problem

pytest_plugins = ("tests.support.cli_fixtures",)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, session: Session) -> None:
    result = session.run("completion", shell)
    assert result.exit_code == 0
    assert "_PORTAL_COMPLETE" in result.stdout


def test_certificates_and_audit_are_lines(session: Session, stub: PortalStub) -> None:
    assert session.run("certificates", stub.add_device()).stdout.split("\t")[:2] == ["0a1b", "active"]
    line = session.run("audit", "--action", "device:register").stdout
    assert line.startswith("2026-01-01T00:00:00Z\ttoken:factory\tdevice:register\tdevice:")
    assert stub.requests[-1].query["action"] == "device:register"


def test_status_says_why_the_portal_is_not_ready(session: Session, stub: PortalStub) -> None:
    assert session.run("status").exit_code == 0
    checks = [{"name": "database", "ok": True}, {"name": "broker", "ok": False, "problem": "It does not answer."}]
    stub.replies["GET", "/readyz"] = Reply(503, {"status": "not ready", "checks": checks})
    result = session.run("status")
    assert result.exit_code == 1
    assert "ready\tno" in result.stdout
    assert "broker\tno: It does not answer." in result.stdout
    shown = session.run("status", "--json")
    assert (shown.exit_code, json.loads(shown.stdout)["checks"]) == (1, checks)


def test_the_ca_is_printed_or_saved(session: Session, stub: PortalStub) -> None:
    assert session.run("ca").stdout.encode() == stub.pki.ca_bundle
    assert session.run("ca", "--out", "ca.pem").exit_code == 0
    assert Path("ca.pem").read_bytes() == stub.pki.ca_bundle
    assert session.run("ca", "--out", "ca.pem").exit_code == 1
    other = Authority("Broker root").certificate.public_bytes(PEM)
    stub.replies["GET", "/broker-ca.pem"] = Reply(body=stub.pki.ca_bundle + other)
    assert session.run("ca", "--broker").stdout.encode() == stub.pki.ca_bundle + other
    stub.replies["GET", "/broker-ca.pem"] = problem(404, "not_found", "Nothing is at this path.")  # an older portal
    assert session.run("ca", "--broker").stdout.encode() == stub.pki.ca_bundle
    root = session.json("ca")["certificates"][-1]
    assert root["subject"] == "CN=Test root"
    assert re.fullmatch("[0-9a-f]{64}", root["fingerprint"])
